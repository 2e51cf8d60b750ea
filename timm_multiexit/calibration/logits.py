"""The logits of a whole data set, kept: what policies are chosen and measured on."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_multiexit.data.batches import LabelCheck, read_batches
from timm_multiexit.utils.errors import DataError, StateError


class LogitSet(NamedTuple):
    """What every classifier says of every image of a data set, in the order of the data.

    It takes 4 bytes x images x classes x classifiers on the host: 1 GB for ImageNet's validation split and five
    classifiers, 20 GB for a million images and 1,000 classes; while it is joined, one classifier's share more. The
    device holds at most 64 MiB of it and one batch.

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


# What the device may hold before it is copied to the host. A copy waits for all that was queued, so they are few.
MAX_HELD_BYTES = 2**26
MAX_PRODUCTS = 2**23  # numbers that hashing holds at a time


class Fingerprinter:
    """Gives every image a number: equal for equal images, else equal by a chance of about 2^-64.

    It does not depend on the rest of the batch nor on the device, as sums of floats would.
    """

    def __init__(self) -> None:
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the numbers of a batch [B, C, H, W] of floats, [B] int64 on its device."""
        bits = images.contiguous().flatten(1)
        bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])  # [B, C * H * W]
        size = bits.shape[1]
        key = (size, images.device)
        if key not in self._weights:
            generator = torch.Generator('cpu').manual_seed(0)
            weights = torch.randint(-(2**62), 2**62, (size,), generator=generator, device='cpu')
            self._weights = {key: weights.to(images.device)}
        parts = bits.split(max(1, MAX_PRODUCTS // size))
        return torch.cat([(part * self._weights[key]).sum(1) for part in parts])


class _Columns:
    """Tensors that grow by rows, on the CPU in the end, copied there many rows at a time."""

    def __init__(self) -> None:
        self._held: list[Sequence[Tensor]] = []
        self._num_bytes = 0
        self._parts: list[list[Tensor]] = []

    def add(self, columns: Sequence[Tensor]) -> None:
        """Add one tensor of rows for each column."""
        self._held.append(columns)
        # A view, as of the class tokens, keeps all of its storage.
        self._num_bytes += sum(column.untyped_storage().nbytes() for column in columns)
        if self._num_bytes > MAX_HELD_BYTES:
            self._copy()

    def _copy(self) -> None:
        self._parts = self._parts or [[] for _ in self._held[0]]
        for part, held in zip(self._parts, zip(*self._held)):
            part.append(torch.cat(held).cpu())
        self._held, self._num_bytes = [], 0

    def join(self) -> list[Tensor]:
        """Return the columns, and forget them; empty without rows."""
        if self._held:
            self._copy()
        joined = []
        for part in self._parts:
            joined.append(torch.cat(part) if len(part) > 1 else part[0])
            part.clear()  # or everything would be there twice at the end
        return joined


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
    columns, fingerprint = _Columns(), Fingerprinter()
    first_batch: Tensor | None = None
    for images, target in read_batches(loader):
        if first_batch is not None and images.shape[1:] != first_batch.shape[1:]:
            raise DataError(
                f'All images must have one size, as costs depend on it, got {list(first_batch.shape[1:])} and'
                f' {list(images.shape[1:])}.'
            )
        images = images.to(param.device, param.dtype)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast() if accelerator else nullcontext():
            outputs = model(images, exits=True)
        target = labels.add(target, outputs.logits[-1].shape[-1])
        kept = (*outputs.logits, *outputs.features) if features else outputs.logits
        columns.add([target, fingerprint(images), *(single.float() for single in kept)])
        first_batch = images if first_batch is None else first_batch
    labels.finish()
    if first_batch is None:
        raise DataError('The data loader is empty, so there is nothing to evaluate.')
    targets, fingerprints, *joined = columns.join()
    count = len(outputs.logits)
    return LogitSet(tuple(joined[:count]), targets, first_batch, fingerprints, tuple(joined[count:]))
