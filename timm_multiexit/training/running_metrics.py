"""Running sums of a training epoch, kept on the device: nothing is read before a line is due."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_multiexit.losses.multi_exit_loss import LossTerms
from timm_multiexit.utils.errors import StateError
from timm_multiexit.utils.text import exit_names

_PARTS = LossTerms._fields[1:]


class RunningMetrics:
    """Loss, its parts and, of single labels, top-1 of every classifier in training, over the epoch so far."""

    def __init__(self, num_classifiers: int, device: torch.device, *, multi_label: bool = False):
        self.names = exit_names(num_classifiers - 1)
        self.multi_label = multi_label
        self.num_samples = 0
        # One tensor for all, so that a batch is added in one operation: a GPU takes longer to be told than to add.
        self._totals = torch.zeros(1 + (1 + len(_PARTS)) * num_classifiers, device=device)
        loss, *rows = self._totals.split((1, *[num_classifiers] * (1 + len(_PARTS))))
        self.sums = dict(zip(('loss', 'correct', *_PARTS), (loss, *rows)))
        self._nothing = torch.zeros(num_classifiers, device=device)
        self.first_bad = torch.full((num_classifiers,), math.inf, device=device)

    @torch.no_grad()
    def update(self, result: dict[str, Any], target: Tensor, batch_idx: int) -> Tensor:
        """Add a batch, given what the task returned (timm's own tasks have one loss and no parts).

        Targets are class indices [B], or probabilities or labels [B, C]. The batch's own numbers are returned on the
        device, in the order of `columns`: [1 + 5 K] for K classifiers.
        """
        size = len(target)
        logits = torch.stack([single.detach() for single in result.get('logits', [result['output']])])  # [K, B, C]
        loss = result['loss'].detach().float()[None]
        correct = self._nothing
        if not self.multi_label:
            labels = target.argmax(-1) if target.ndim > 1 else target
            # Augmentation splits have the batch's targets once for each split.
            correct = logits.argmax(-1).eq(labels).float().mean(-1)
        given = {'task': loss.expand(len(logits)), **result}
        parts = [given[key].detach().float() if key in given else self._nothing for key in _PARTS]
        numbers = torch.cat((loss, correct, *parts))
        self.num_samples += size
        self._totals.add_(numbers, alpha=size)
        is_good = torch.isfinite(numbers[1 + len(logits) :].view(len(_PARTS), -1).sum(0))
        self.first_bad = torch.minimum(self.first_bad, torch.where(is_good, math.inf, float(batch_idx)))
        numbers[1 : 1 + len(logits)] *= 100.0
        return numbers

    def columns(self) -> list[str]:
        """Return names for the numbers that `update` returns."""
        return ['loss', *(f'{name}_{key}' for key in ('top1', *_PARTS) for name in self.names)]

    def check_finite(self, accelerator: Accelerator) -> None:
        """Raise if a loss was NaN or infinite, on every rank at the same batch."""
        first_bad = self.first_bad
        if accelerator.num_processes > 1:
            first_bad = accelerator.gather(first_bad[None]).amin(0)
        first = float(first_bad.min())
        if math.isfinite(first):
            culprits = [name for name, at in zip(self.names, first_bad.tolist()) if at == first]
            raise StateError(
                f'The loss of {", ".join(culprits)} is NaN or infinite at batch {int(first)} of this epoch. Training'
                ' stops, the checkpoints so far are kept: lower --lr, or set --clip-grad, and resume.'
            )

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return the sums of all ranks together, on the CPU."""
        count = torch.tensor([self.num_samples], device=self.first_bad.device)
        state = {**self.sums, 'num_samples': count}
        if accelerator.num_processes > 1:
            state = {key: accelerator.reduce(value) for key, value in state.items()}
        return {key: value.cpu().clone() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over sums; one rank takes those of all, the others begin with nothing."""
        self.num_samples = int(state['num_samples'])
        for key, value in self.sums.items():
            value.copy_(state[key])

    def metrics(self, state: dict[str, Any] | None = None) -> dict[str, float]:
        """Return means of a state or of this rank: loss, its parts, top-1 in percent and loss per classifier."""
        sums = state or self.sums
        count = max(int(sums['num_samples']) if state else self.num_samples, 1)
        means = {key: float(sums[key].sum()) / count for key in ('loss', *_PARTS)}
        for name, correct in zip(self.names, [] if self.multi_label else sums['correct'].tolist()):
            means[f'{name}_top1'] = 100.0 * correct / count
        for name, task in zip(self.names, sums['task'].tolist()):
            means[f'{name}_loss'] = task / count
        return means
