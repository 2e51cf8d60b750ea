"""The logits of a whole data set, kept: what policies are chosen and measured on."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_multiexit.data.batches import LabelCheck, read_batches
from timm_multiexit.utils.errors import DataError, StateError


class LogitSet(NamedTuple):
    """What every classifier says of every image of a data set, in the order of the data.

    It takes 4 bytes x images x classes x classifiers: 1 GB for ImageNet's validation split and five classifiers.

    Attributes:
        logits: One [N, C] float32 tensor per classifier on the CPU, main last.
        targets: Class indices [N], int64.
        first_batch: The first batch of images, as the model was given it.
        fingerprints: [N] int64, equal for equal images.
        features: What enters the linear layer of each classifier, [N, D] float32 tensors on the CPU; empty if not kept.
    """

    logits: tuple[Tensor, ...]
    targets: Tensor
    first_batch: Tensor
    fingerprints: Tensor
    features: tuple[Tensor, ...] = ()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.first_batch.shape[1:]
        return channels, height, width

    def count_shared(self, other: 'LogitSet') -> int:
        """Return how many of these images are among the others, as the model was given them."""
        return int(torch.isin(self.fingerprints, other.fingerprints).sum())


def fingerprint(images: Tensor) -> Tensor:
    """Return a number per image, [B] int64 on the CPU: equal for equal images, else equal by a chance of about 2^-64.

    It does not depend on the rest of the batch [B, C, H, W] of floats nor on the device, as sums of floats would.
    """
    bits = images.contiguous().flatten(1)
    bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])  # [B, C * H * W]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator).to(bits.device)
    return torch.stack([(row * weights).sum() for row in bits]).cpu()


@torch.no_grad()
def collect_logits(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    accelerator: Accelerator | None = None,
    channels_last: bool = False,
    features: bool = False,
) -> LogitSet:
    """Return the logits of all classifiers on all images of a loader.

    Args:
        model: A `MultiExitModel` in eval mode, on the device where it is to run.
        loader: Batches of images and class indices, see `timm_multiexit.data.batches`, of this process alone.
        accelerator: Gives precision; none for that of the model.
        channels_last: Give images to the model in that memory format.
        features: Keep the features of all classifiers too.

    Raises:
        InvalidTypeError: It is not a loader.
        DataError: The loader is empty, its images are of several sizes, or it gives something else.
        StateError: The model is in training mode.
    """
    if model.training:
        raise StateError(
            'The model is in training mode, so its logits would depend on the batch: call model.eval() first.'
        )
    param, labels = next(model.parameters()), LabelCheck()
    parts: list[list[Any]] = []
    batches: list[Tensor] = []
    targets, fingerprints = [], []
    for images, target in read_batches(loader):
        if batches and images.shape[1:] != batches[0].shape[1:]:
            raise DataError(
                f'All images must have one size, as costs depend on it, got {list(batches[0].shape[1:])} and'
                f' {list(images.shape[1:])}.'
            )
        images = images.to(param.device, param.dtype)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast() if accelerator else nullcontext():
            outputs = model(images, exits=True)
        target = labels.add(target, outputs.logits[-1].shape[-1])
        kept = (*outputs.logits, *outputs.features) if features else outputs.logits
        parts.append([single.float().cpu() for single in kept])
        targets.append(target.cpu())
        fingerprints.append(fingerprint(images))
        batches = batches or [images]
    labels.finish()
    if not parts:
        raise DataError('The data loader is empty, so there is nothing to evaluate.')
    joined = []
    for idx in range(len(parts[0])):
        joined.append(torch.cat([part[idx] for part in parts]))
        for part in parts:
            part[idx] = None  # or everything would be there twice at the end
    count = len(outputs.logits)
    logits, rest = tuple(joined[:count]), tuple(joined[count:])
    return LogitSet(logits, torch.cat(targets), batches[0], torch.cat(fingerprints), rest)
