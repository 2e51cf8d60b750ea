"""When the parts of a multi-exit network train: all together, the heads alone, or the backbone first."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from timm_multiexit.models.multi_exit import MultiExitModel


@dataclass(frozen=True)
class Regime:
    """What trains when, with time in epochs from 0.

    Attributes:
        name: 'joint': everything together; 'frozen': the heads alone, on a backbone that stays as it is; 'mixed': the
            backbone alone for `backbone_epochs`, then everything together.
        backbone_epochs: Epochs of the backbone alone.
        head_warmup_epochs: Then, epochs in which fresh heads learn alone, each by its task term: backbone and teacher
            wait, the rate is the schedule's highest. Over as many epochs after them the backbone's rate rises from 0
            to the schedule's: its optimizer state is new, and the schedule may stand at its highest.
        exit_warmup_epochs: Then, epochs in which the teacher's pull rises from 0 to its weight; at least as many as
            the heads' warm-up has.
        trains_classifier: Main's own classifier is as fresh as the heads and trains with them.

    Source: the regimes are those of Kubaty et al., arXiv 2407.14320.

    >>> regime = Regime('mixed', backbone_epochs=2, head_warmup_epochs=1.0, exit_warmup_epochs=2.0)
    >>> [regime.phase(time) for time in (0.0, 1.9, 2.0, 3.0)]
    ['backbone', 'backbone', 'heads', 'joint']
    >>> [regime.distill_scale(time) for time in (0.0, 2.5, 3.5, 5.0)]
    [0.0, 0.0, 0.25, 1.0]
    """

    name: str = 'joint'
    backbone_epochs: int = 0
    head_warmup_epochs: float = 0.0
    exit_warmup_epochs: float = 0.0
    trains_classifier: bool = False

    def phase(self, time: float) -> str:
        """Return what trains: 'backbone', 'heads' or 'joint'."""
        if self.name == 'frozen' or self.backbone_epochs <= time < self.joint_from:
            return 'heads'
        return 'backbone' if time < self.backbone_epochs else 'joint'

    def distill_scale(self, time: float) -> float:
        """Return the factor of the teacher's pull, from 0 to 1."""
        if time < self.joint_from:
            return 0.0
        length = max(self.exit_warmup_epochs, self.head_warmup_epochs)
        return min(1.0, (time - self.joint_from) / length) if length else 1.0

    def backbone_scale(self, time: float) -> float:
        """Return the factor of the backbone's learning rate, from 0 to 1."""
        if not self.head_warmup_epochs or self.phase(time) != 'joint':
            return 1.0
        return min(1.0, (time - self.joint_from) / self.head_warmup_epochs)

    @property
    def joint_from(self) -> float:
        """Epochs before backbone and heads train together."""
        return self.backbone_epochs + self.head_warmup_epochs

    @property
    def changes(self) -> bool:
        """Whether some parameters train only for a part of the run, which distributed training must know of."""
        return self.name != 'frozen' and self.joint_from > 0


class RegimeControl:
    """Applies a regime to a task and its optimizer, whose groups of heads are marked by `split_exit_groups`.

    A task without exits is left alone.
    """

    def __init__(self, regime: Regime, task: TrainingTask, optimizer: torch.optim.Optimizer):
        self.regime = regime
        self.task: Any = task
        self.optimizer = optimizer
        self.model = unwrap_model(task.get_trainable_module())
        self.phase = 'joint'
        self.backbone_scale = 1.0

    def begin_step(self, time: float) -> bool:
        """Set what trains in the step at `time`, in epochs; return whether that changed, and modules' modes with it."""
        if not isinstance(self.model, MultiExitModel):
            return False
        phase = self.regime.phase(time)
        is_new = phase != self.phase
        if is_new:
            self.model.freeze_backbone(phase == 'heads', trains_classifier=self.regime.trains_classifier)
            self.task.trains_main_alone = phase == 'backbone'
            self.phase = phase
        self.task.loss.distill_scale = self.regime.distill_scale(time)
        self.backbone_scale = self.regime.backbone_scale(time)
        return is_new

    @contextmanager
    def rates(self) -> Iterator[None]:
        """Give the heads their own rates for one step.

        They are so many times those of the schedule, whatever it does. While the heads warm up they learn at its
        highest rate, or a schedule that begins with a warm-up would leave them untrained when the backbone joins; and
        then the backbone is held back.
        """
        groups = self.optimizer.param_groups
        scheduled = [group['lr'] for group in groups]
        is_warmup = self.phase == 'heads' and self.regime.name != 'frozen'
        for group in groups:
            if group.get('is_exit'):
                if is_warmup:
                    group['lr'] = group.get('initial_lr', group['lr']) * group.get('lr_scale', 1.0)
                group['lr'] *= group['exit_lr_scale']
            elif self.backbone_scale < 1:
                group['lr'] *= self.backbone_scale
        try:
            yield
        finally:
            for group, lr in zip(groups, scheduled):
                group['lr'] = lr


def split_exit_groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, lr_scale: float = 1.0, *, trains_classifier: bool = False
) -> None:
    """Put the heads' parameters into groups of their own, marked 'is_exit'.

    In each step of a `RegimeControl` their rate is `lr_scale` times that of the schedule. The groups of the optimizer,
    which must be fresh, are changed in place; without exits nothing happens. With `trains_classifier` main's own
    classifier goes with the heads.
    """
    if not isinstance(model, MultiExitModel):
        return
    trained = [*model.exits.parameters(), *(model.classifier_parameters() if trains_classifier else ())]
    heads = {id(param) for param in trained}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for is_exit in (False, True):
            params = [param for param in group['params'] if (id(param) in heads) == is_exit]
            if params:
                scale = lr_scale if is_exit else 1.0
                groups.append({**group, 'params': params, 'is_exit': is_exit, 'exit_lr_scale': scale})
    # In place: timm's Lookahead shares the list with the optimizer inside.
    optimizer.param_groups[:] = groups
