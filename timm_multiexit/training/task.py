"""The training step: all classifiers in one forward, one loss, as a timm task."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import DistillationTeacher, TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_multiexit.evaluation.metrics import ExitEvaluator
from timm_multiexit.losses.multi_exit_loss import MultiExitLoss
from timm_multiexit.losses.teachers import KDConfig
from timm_multiexit.models.multi_exit import MultiExitModel, check_model
from timm_multiexit.models.outputs import pack_outputs
from timm_multiexit.utils.checks import check_instance
from timm_multiexit.utils.errors import InvalidValueError

_MOST_CHANNELS = 4  # of an image


class MultiExitTask(TrainingTask):
    """Train a `MultiExitModel` with a `MultiExitLoss`, and with a frozen outside teacher if there is one.

    EMA, checkpoints and resume are timm's. Under `DistributedDataParallel`, and Accelerate, wrap `trainable_module`,
    not the task: its EMA copy and the outside teacher get no gradients.

    Main's logits are the mean of its two classifiers where the backbone is distilled. In distilled training
    (`set_distilled_training(True)`) with an outside teacher the first learns the labels and the second that teacher,
    as in timm's `TokenDistillationTask`; every other term is of the mean.

    Args:
        model: The model to train.
        loss: What to minimise, e.g. `create_loss('eed')`.
        teacher: A model that every classifier learns from, main and exits: a `timm.task.DistillationTeacher`, a model,
            or the name of a pretrained timm model of the same classes. It is frozen in place, stays in eval mode, is
            not a part of `trainable_module`, and sees the images normalised as its own `pretrained_cfg` says.
        kd: How that teacher is weighed; None for timm's defaults.
        autocast: Gives the context that the teacher runs in, `accelerator.autocast` where Accelerate's wrapper puts
            the model alone into mixed precision; the surrounding one if not given.
        device: Where the loss, the teacher and the evaluator live.
        dtype: Of the teacher, if it is made here.
        verbose: Log what was set up.

    Attributes:
        trains_main_alone: Run the backbone and its own classifier only, by their task term.

    Raises:
        InvalidTypeError: The model has no exits, or the loss is not a `MultiExitLoss`.
        InvalidValueError: The loss does not fit the model's classifiers, it distils features and the widths of the
            heads do not allow it, the teacher has other classes, or the backbone has an auxiliary classifier.

    >>> import torch
    >>> from timm_multiexit.models.attach import attach_exits
    >>> from timm_multiexit.losses import create_loss
    >>> model = attach_exits(__import__('timm').create_model('test_resnet', num_classes=10))
    >>> result = MultiExitTask(model, create_loss('eed'))(torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))
    >>> result['output'].shape, len(result['logits'])
    (torch.Size([2, 10]), 4)
    """

    def __init__(
        self,
        model: MultiExitModel,
        loss: MultiExitLoss,
        *,
        teacher: DistillationTeacher | nn.Module | str | None = None,
        kd: KDConfig | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        check_model(model)
        check_instance('loss', loss, MultiExitLoss, hint="create_loss('eed') makes one.")
        if not model.is_backbone_frozen:
            check_auxiliary(model.backbone)
        loss.check_count(len(model.exits) + 1)
        if loss.feature_weight > 0:
            loss.check_features(model.feature_widths())
        self.trainable_module: Any = model
        self.loss = loss.to(self.device)
        self._main_loss = MultiExitLoss(criterion=loss.criterion, multi_label=loss.multi_label)
        self.trains_main_alone = False
        self.kd = kd or KDConfig()
        self.autocast = autocast
        self.teacher: DistillationTeacher | None = None
        if teacher is not None:
            self._set_teacher(teacher)
        elif kd is not None:
            raise InvalidValueError(f'kd needs an outside teacher to weigh, got {kd} without one.')

    def _set_teacher(self, teacher: DistillationTeacher | nn.Module | str) -> None:
        model = self.trainable_module
        if isinstance(teacher, DistillationTeacher):
            name, made = type(unwrap_model(teacher.model)).__name__, teacher
        else:
            name = teacher if isinstance(teacher, str) else type(unwrap_model(teacher)).__name__
            made = DistillationTeacher(
                teacher, num_classes=model.num_classes, in_chans=model.in_chans, device=self.device, dtype=self.dtype
            )
        inner: Any = unwrap_model(made.model)
        num_classes = getattr(inner, 'num_classes', model.num_classes)
        if isinstance(teacher, str):
            # timm gives it the student's classes, with a fresh classifier where the weights have others.
            num_classes = inner.pretrained_cfg.get('num_classes', num_classes)
        if num_classes != model.num_classes:
            raise InvalidValueError(
                f'The outside teacher must have the {model.num_classes} classes of the model, got {name} with'
                f' {num_classes}. Use one that was trained on these classes.'
            )
        stem = next((module for module in inner.modules() if isinstance(module, nn.Conv2d)), None)
        # Some stems take pixels of a block as channels.
        if stem is not None and stem.in_channels <= _MOST_CHANNELS and stem.in_channels != model.in_chans:
            raise InvalidValueError(
                f'The outside teacher must take images of {model.in_chans} channels, as the model does, got {name} for'
                f' {stem.in_channels}.'
            )
        self.teacher = made.to(self.device).eval().requires_grad_(False)
        # timm's normalize_input compares values, which waits for a GPU; the map to the teacher's pixels is fixed here.
        mean, std = (
            torch.tensor(model.pretrained_cfg.get(key, default), device=self.device).view(1, -1, 1, 1)
            for key, default in (('mean', IMAGENET_DEFAULT_MEAN), ('std', IMAGENET_DEFAULT_STD))
        )
        buffers: tuple[Any, Any] = (made.mean_kd, made.std_kd)
        # Of images of other channels than the numbers their mean, as timm prepares them.
        mean, std, *own = (
            each if each.shape[1] == model.in_chans else each.mean(1, keepdim=True) for each in (mean, std, *buffers)
        )
        same = all(torch.equal(ours.to(theirs.dtype), theirs) for ours, theirs in zip((mean, std), own))
        self.register_buffer('teacher_scale', None if same else std / own[1], persistent=False)
        self.register_buffer('teacher_shift', None if same else (mean - own[0]) / own[1], persistent=False)

    teacher_scale: Tensor | None
    teacher_shift: Tensor | None

    @torch.no_grad()
    def _outside_logits(self, images: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        if self.teacher_scale is not None and self.teacher_shift is not None:
            images = images * self.teacher_scale + self.teacher_shift
        with self.autocast():
            logits: Tensor = self.teacher(images.to(next(self.teacher.parameters()).dtype))
            return logits

    def train(self, mode: bool = True) -> 'MultiExitTask':
        """Set the mode; an outside teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:  # noqa: A002 - timm's name
        """Run all classifiers and the loss.

        Args:
            input: Images [B, in_chans, H, W].
            target: Class indices [B] or soft targets [B, C].

        Returns:
            output: main's logits [B, C]; logits: all, shallow to deep, main last; and the fields of `LossTerms`, all
            that there are: loss, to call backward on, task, output_distance, feature_distance, kd_distance. While main
            trains alone there is one classifier.
        """
        if self.trains_main_alone:
            backbone = unwrap_model(self.trainable_module).backbone
            outputs, loss = pack_outputs(backbone, self.trainable_module(input)), self._main_loss
        else:
            outputs, loss = self.trainable_module(input, exits=True), self.loss
        terms = loss.terms(outputs, target, self._outside_logits(input), self.kd)
        given = {name: term for name, term in terms._asdict().items() if term is not None}
        return {'output': outputs.logits[-1], 'logits': outputs.logits, **given}

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> 'MultiExitTask':
        """Wrap the model for distributed training without Accelerate."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # timm returns the module
        self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model in place, so that its keys and its type stay, the teacher too, and return the model."""
        module: nn.Module = self.trainable_module
        module.compile(backend=backend, mode=mode, **compile_kwargs)
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return module

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters to clip; without every classifier's linear layer if `exclude_head` (for agc)."""
        model = unwrap_model(self.trainable_module)
        excluded = set()
        if exclude_head:
            heads = [param for head in model.exits for param in head.fc.parameters()]
            excluded = {id(param) for param in (*model.classifier_parameters(), *heads)}
        return [param for param in model.parameters() if id(param) not in excluded]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the exits, so that a checkpoint can be opened without flags, and the teacher's weights by skill."""
        state: dict[str, Any] = {'exits': [spec.to_dict() for spec in unwrap_model(self.trainable_module).exits.specs]}
        if self.loss.skill is not None:
            state['teacher_skill'] = self.loss.skill.tolist()
        return state

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue with the teacher's weights of a checkpoint; its exits are the model's already."""
        skill = (state or {}).get('teacher_skill')
        if skill is not None and self.loss.teacher_weights == 'skill':
            self.loss.set_skill(skill)

    def create_evaluator(self, **kwargs: Any) -> ExitEvaluator:
        """Return an evaluator for every exit and the ensemble."""
        if self.loss.multi_label:
            kwargs.setdefault('multi_label', True)
        return ExitEvaluator(len(unwrap_model(self.trainable_module).exits), device=self.device, **kwargs)


def check_auxiliary(backbone: nn.Module) -> None:
    """Raise for a model with an auxiliary classifier, which would get no loss in training.

    Raises:
        InvalidValueError: It has one, as Inception has with aux_logits=True.
    """
    if getattr(backbone, 'aux_logits', False):
        raise InvalidValueError(
            f'aux_logits must be False to train {type(backbone).__name__}, got True: its auxiliary classifier would get'
            ' no loss, and an exit does its work.'
        )
