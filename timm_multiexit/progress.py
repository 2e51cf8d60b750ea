"""Running sums of a training epoch, kept on the device: nothing is read before a line is due."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_multiexit.config import MultiExitError
from timm_multiexit.metrics import exit_names

# What a task may give besides its loss, one value per classifier.
_PARTS = ('task', 'output_distance', 'feature_distance', 'kd_distance')


class Progress:
    """Loss, its parts and top-1 of every classifier in training, over the part of an epoch that is done.

    Args:
        num_classifiers: Exits and main.
        device: Where the sums live.
        multi_label: Targets are [B, C] labels, which have no top-1.
    """

    def __init__(self, num_classifiers: int, device: torch.device, *, multi_label: bool = False):
        self.names = exit_names(num_classifiers - 1)
        self.multi_label = multi_label
        self.num_samples = 0
        self.sums = {key: torch.zeros(num_classifiers, device=device) for key in ('correct', *_PARTS)}
        self.sums['loss'] = torch.zeros(1, device=device)
        self.first_bad = torch.full((num_classifiers,), math.inf, device=device)

    @torch.no_grad()
    def update(self, result: dict[str, Any], target: Tensor, batch_idx: int) -> Tensor:
        """Add a batch.

        Args:
            result: What the task returned; timm's own tasks have one loss and no parts.
            target: Class indices [B], or probabilities or labels [B, C].
            batch_idx: Of the batch in its epoch.

        Returns:
            The batch's own numbers on the device, in the order of `columns`: [1 + 5 K] for K classifiers.
        """
        size = len(target)
        logits = torch.stack([single.detach() for single in result.get('logits', [result['output']])])  # [K, B, C]
        loss = result['loss'].detach().float()[None]
        batch = {'loss': loss, 'correct': torch.zeros_like(self.sums['correct'])}
        if not self.multi_label:
            labels = target.argmax(-1) if target.ndim > 1 else target
            # Augmentation splits have the batch's targets once for each split.
            batch['correct'] = logits.argmax(-1).eq(labels).float().mean(-1)
        parts = {'task': loss.expand(len(logits)), **result}
        for key in _PARTS:
            batch[key] = parts[key].detach().float() if key in parts else torch.zeros_like(batch['correct'])
        bad = ~torch.isfinite(sum(batch[key] for key in _PARTS))
        self.first_bad.masked_fill_(bad & torch.isinf(self.first_bad), batch_idx)
        self.num_samples += size
        for key, value in batch.items():
            self.sums[key] += value * size
        batch['correct'] = 100.0 * batch['correct']
        return torch.cat([batch[key] for key in ('loss', 'correct', *_PARTS)])

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
            raise MultiExitError(
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
        self.sums = {key: state[key].to(value.device) for key, value in self.sums.items()}

    def metrics(self, state: dict[str, Any] | None = None) -> dict[str, float]:
        """Return means: loss, the parts of it that were there, top-1 in percent and loss per classifier.

        Args:
            state: What `state_dict` returned; without it this rank's sums.
        """
        sums = state or self.sums
        count = max(int(sums['num_samples']) if state else self.num_samples, 1)
        means = {'loss': float(sums['loss']) / count}
        for key in _PARTS:
            means[key] = float(sums[key].sum()) / count
        for name, correct in zip(self.names, sums['correct'].tolist()):
            means[f'{name}_top1'] = 100.0 * correct / count
        for name, task in zip(self.names, sums['task'].tolist()):
            means[f'{name}_loss'] = task / count
        return means
