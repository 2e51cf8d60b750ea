"""The logits of a whole data set, kept: what policies are chosen and measured on."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_multiexit.config import MultiExitError


class LogitSet(NamedTuple):
    """What every classifier says of every image of a data set, in the order of the data.

    It takes 4 bytes x images x classes x classifiers: 1 GB for ImageNet's validation split and five classifiers.

    Attributes:
        logits: One [N, C] float32 tensor per classifier on the CPU, main last.
        targets: Class indices [N], int64.
        first_batch: The first batch of images, as the model was given it.
    """

    logits: tuple[Tensor, ...]
    targets: Tensor
    first_batch: Tensor

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return tuple(self.first_batch.shape[1:])

    def equals(self, other: 'LogitSet') -> bool:
        """Whether both are of the same images, by what the model says of them."""
        return torch.equal(self.targets, other.targets) and torch.equal(self.logits[-1], other.logits[-1])


@torch.no_grad()
def collect_logits(
    model: nn.Module,
    loader: Iterable,
    *,
    accelerator: Accelerator | None = None,
    channels_last: bool = False,
) -> LogitSet:
    """Return the logits of all classifiers on all images of a loader.

    Args:
        model: A `MultiExitModel` in eval mode, on the device where it is to run.
        loader: Batches of images and class indices, of this process alone.
        accelerator: Gives precision; none for that of the model.
        channels_last: Give images to the model in that memory format.

    Raises:
        MultiExitError: The loader gives no batch, or the model is in training mode.
    """
    if model.training:
        raise MultiExitError('The model is in training mode, its logits would depend on the batch: model.eval().')
    param = next(model.parameters())
    parts, targets, first_batch = [], [], None
    for images, target in loader:
        images = images.to(param.device, param.dtype)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast() if accelerator else nullcontext():
            logits = model(images, exits=True).logits
        parts.append([single.float().cpu() for single in logits])
        targets.append(target.cpu())
        first_batch = images if first_batch is None else first_batch
    if not parts:
        raise MultiExitError('The data loader gives no batch, so there is nothing to evaluate.')
    logits = []
    for idx in range(len(parts[0])):
        logits.append(torch.cat([part[idx] for part in parts]))
        for part in parts:
            part[idx] = None  # or everything would be there twice at the end
    return LogitSet(tuple(logits), torch.cat(targets), first_batch)
