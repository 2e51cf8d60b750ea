"""Training images held out to choose the epoch on, so that nothing is chosen on the test set."""

import copy
import logging
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import IterableDataset, Subset

from timm_multiexit.utils.errors import DataError

_logger = logging.getLogger(__name__)


class SubsetReader(Reader):
    """Some of the images of a timm reader.

    An `ImageDataset` that skips an unreadable image takes the next one of its reader, which is so never one of the
    other part.
    """

    def __init__(self, reader: Any, indices: Iterable[int]):
        super().__init__()
        self.reader = reader
        self.indices = [int(idx) for idx in indices]
        for name in ('root', 'class_to_idx', 'class_name_to_idx'):
            if hasattr(reader, name):
                setattr(self, name, getattr(reader, name))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.reader[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> Any:
        return self.reader.filename(self.indices[index], basename, absolute)


class TransformSubset(Subset[Any]):
    """Some of the images of a map-style data set that is not timm's, whose transform no other subset sets."""

    dataset: Any

    @property
    def transform(self) -> Any:
        """The transform of the data set, which timm's `create_loader` sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    @property
    def class_to_idx(self) -> dict[str, int] | None:
        """Class name -> index, None where the data set does not say."""
        return getattr(self.dataset, 'class_to_idx', None)


def hold_out(dataset: Any, num: int, *, seed: int = 0) -> tuple[Any, Any]:
    """Return a training set in two parts: what is left to train on, and `num` images to choose the epoch on.

    Every class gives the same share of its images, and keeps at least one. The choice depends on the seed and the
    targets alone. Where the data set does not tell its targets without reading images, or has several
    per image, the choice is plainly random. The parts share the data and have a `transform` each.

    Args:
        dataset: A map-style data set, timm's or torchvision's. It stays as it is.
        num: Images to hold out, 1 or more.
        seed: Of the choice, from 0 to 2**32 - 1.

    Raises:
        DataError: The data set is a stream, or too small to keep one image of each class for training.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__getitem__'):
        raise DataError('Images cannot be held out of a stream: leave --val-from-train out and name a --val-split.')
    targets = read_targets(dataset)
    if targets is None:
        _logger.info('The data set does not tell one class per image: held-out images are chosen without regard to it.')
        targets = [0] * len(dataset)
    chosen = choose_per_class(targets, num, seed=seed)
    kept = np.setdiff1d(np.arange(len(targets)), chosen)
    return _part(dataset, kept), _part(dataset, chosen)


def _part(dataset: Any, indices: np.ndarray) -> Any:
    part = copy.copy(dataset)
    if isinstance(dataset, ImageDataset):
        part.reader = SubsetReader(dataset.reader, indices)
        return part
    return TransformSubset(part, indices.tolist())


def read_targets(dataset: Any) -> list[int] | None:
    """Return the class index of every image without reading images, None where that cannot be done."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        targets = getattr(owner, 'targets', None)
        if targets is None and owner is not None and hasattr(owner, 'iter_targets'):
            targets = owner.iter_targets()
        if targets is None and owner is not None and hasattr(owner, 'samples'):
            targets = (target for _, target in owner.samples)
        if targets is not None:
            targets = targets.tolist() if hasattr(targets, 'tolist') else list(targets)
            return targets if all(isinstance(target, Integral) for target in targets) else None
    return None


def choose_per_class(targets: Iterable[int], num: int, *, seed: int = 0) -> np.ndarray:
    """Return the places of `num` targets, sorted, of every class the same share.

    The share of a class is rounded down; the largest remainders, in random order where equal, get one more.

    >>> choose_per_class([0, 0, 0, 0, 1, 1], 3, seed=1).tolist()
    [1, 2, 5]

    Raises:
        DataError: Not one target of each class would be left, or `num` is below 1.
    """
    classes, members, counts = np.unique(np.asarray(targets), return_inverse=True, return_counts=True)
    most = int((counts - 1).sum())
    if not 1 <= num <= most:
        raise DataError(
            f'Number of held-out images must be in [1, {most}], got {num}: each of {len(classes)} classes of the'
            f' {len(members)} training images keeps one to train on.'
        )
    # RandomState's stream is frozen, so the choice is the same everywhere.
    random = np.random.RandomState(seed)
    quotas = counts * num
    shares, remainders = quotas // len(members), quotas % len(members)
    order = random.permutation(len(classes))
    order = order[np.argsort(-remainders[order], kind='stable')]
    while shares.sum() < num:
        free = order[shares[order] < counts[order] - 1]
        shares[free[: num - shares.sum()]] += 1
    shuffled = random.permutation(len(members))
    shuffled = shuffled[np.argsort(members[shuffled], kind='stable')]  # class by class
    starts = np.cumsum(counts) - counts
    return np.sort(np.concatenate([shuffled[start : start + share] for start, share in zip(starts, shares)]))
