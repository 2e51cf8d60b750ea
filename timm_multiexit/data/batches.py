"""What loaders give, as images and targets of one form.

A batch may be a pair of images and targets, a tuple that begins with these two, a dict with an entry of `IMAGE_KEYS`
and one of `TARGET_KEYS` (as Hugging Face's data sets give), or a list of single samples. Targets are class indices [B]
of any integer type, as tensor, array or list, or one-hot rows [B, C].
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from timm_multiexit.utils.checks import is_list
from timm_multiexit.utils.errors import DataError, InvalidTypeError, brief, one_line

IMAGE_KEYS = ('pixel_values', 'image', 'images', 'img', 'input')
TARGET_KEYS = ('labels', 'label', 'targets', 'target')

_WRAP = 'Wrap the data set in a loader: torch.utils.data.DataLoader(dataset, batch_size=64).'


def read_batches(loader: Iterable[Any], *, multi_label: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images [B, C, H, W], floats, and int64 class indices [B] of each batch, where the loader gave them.

    With `multi_label`, targets are labels [B, C] as they are. Batches without images are left out.

    Raises:
        InvalidTypeError: It is not a loader.
        DataError: It is a data set, or a batch is not what the module's docstring says.
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise DataError(f'loader must give batches, got the data set {type(loader).__name__}. {_WRAP}')
    if isinstance(loader, (str, bytes, Mapping)) or not isinstance(loader, Iterable):
        raise InvalidTypeError(f'loader must give batches of images and class indices, got {type(loader).__name__}.')
    for batch in loader:
        images, targets = _split(batch)
        images = _read_images(images)
        targets = _to_tensor('Targets', targets)
        if targets.ndim == 0 or len(targets) != len(images):
            raise DataError(
                f'A batch must have one target per image, got {len(images)} images and targets {_kind(targets)}.'
            )
        if len(images):
            yield images, targets if multi_label else _read_indices(targets)


class LabelCheck:
    """Checks class indices [B] batch by batch against a number of classes.

    What is on the CPU is checked at once. What is on a device is read in `finish`, so that nothing waits for it, and is
    clamped until then: there an index out of range would end the process.
    """

    def __init__(self) -> None:
        self._bounds: list[Tensor] = []
        self._num_classes = 0

    def add(self, targets: Tensor, num_classes: int) -> Tensor:
        """Return the class indices.

        Raises:
            DataError: One is below 0, or not below the number of classes.
        """
        self._bounds.append(torch.stack([targets.min(), targets.max()]))
        self._num_classes = num_classes
        if targets.device.type != 'cpu':
            return targets.clamp(0, num_classes - 1)
        self.finish()
        return targets

    def finish(self) -> None:
        """Raise `DataError` where `add` would have, had it waited for the device."""
        if not self._bounds:
            return
        bounds, self._bounds = torch.stack(self._bounds), []
        least, most = int(bounds.min()), int(bounds.max())
        if least < 0 or most >= self._num_classes:
            raise DataError(
                f'Class indices must be in [0, {self._num_classes - 1}] for {self._num_classes} classes, got'
                f' {least if least < 0 else most}. Check the number of classes, and that labels begin with 0.'
            )


def _split(batch: Any) -> tuple[Any, Any]:
    """Return what a batch has as images and as targets."""
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(item, (tuple, list, Mapping)) for item in batch):
        # Single samples, unless it is a pair of lists: of tensors, and of numbers.
        if not (len(batch) >= 2 and _is_list_of_targets(batch[1])):
            batch = _collate(batch)
    if isinstance(batch, Mapping):
        found = [next((key for key in keys if key in batch), None) for keys in (IMAGE_KEYS, TARGET_KEYS)]
        if None in found:
            raise DataError(
                f'A batch that is a dict must have images as one of {", ".join(IMAGE_KEYS)} and class indices as one of'
                f' {", ".join(TARGET_KEYS)}, got the keys {brief(sorted(map(str, batch)))}.'
            )
        return batch[found[0]], batch[found[1]]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        what = f'{type(batch).__name__} of {len(batch)}' if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise DataError(f'A batch must be a pair (images, class indices) or a dict with both, got {what}.')
    return batch[0], batch[1]


def _is_list_of_targets(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], (Real, tuple, list))


def _collate(samples: Sequence[Any]) -> Any:
    try:
        return default_collate(list(samples))
    except (TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise DataError(f'A list of single samples cannot be made a batch: {one_line(error)}.') from error


def _read_images(images: Any) -> Tensor:
    if isinstance(images, (tuple, list)) and images and all(isinstance(image, Tensor) for image in images):
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise DataError(f'All images of a batch must have one size, got {sorted(map(list, sizes))[:3]}.')
        images = torch.stack(tuple(images))
    images = _to_tensor('Images', images)
    if images.ndim != 4:
        hint = f' {_WRAP}' if images.ndim == 3 else ''
        raise DataError(f'Images must be a batch [B, C, H, W], got {_kind(images)}.{hint}')
    if not images.is_floating_point():
        raise DataError(
            f'Images must be floating point, got {_kind(images)}. Scale and normalize them as in training, e.g. with'
            ' torchvision.transforms.ToTensor and Normalize.'
        )
    return images


def _to_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f'a list of {type(values[0]).__name__}' if is_list(values) and len(values) else type(values).__name__
        raise DataError(f'{name} of a batch must be a tensor, an array or a list of numbers, got {what}.') from error


def _read_indices(targets: Tensor) -> Tensor:
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim == 2:
        is_one = targets == 1
        if not bool(((is_one.sum(1) == 1) & (is_one | (targets == 0)).all(1)).all()):
            raise DataError(
                f'Targets {_kind(targets)} must be one-hot rows or class indices [B], got rows of several or soft'
                ' labels. Evaluate on the labels themselves, without mixup.'
            )
        return is_one.int().argmax(1)
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        raise DataError(f'Targets must be class indices [B], integers, got {_kind(targets)}.')
    return targets.long()


def _kind(tensor: Tensor) -> str:
    return f'{list(tensor.shape)} of {str(tensor.dtype).removeprefix("torch.")}'
