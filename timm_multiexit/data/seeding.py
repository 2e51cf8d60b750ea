"""Randomness that follows from the seed, the epoch and the place in it alone.

Every random number of a run is drawn after seeding with (seed, what for, epoch, place): the order of the samples, each
sample's augmentation, each batch's mixing and erasing, each step's dropout. So nothing has to be saved to resume a
run in the middle of an epoch as if it had never stopped, and the number of data loading processes changes nothing.
"""

import random
from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, Sampler


class Stream(IntEnum):
    """What random numbers are for, so that no two uses share them."""

    SAMPLE = 0
    BATCH = 1
    ERASING = 2
    STEP = 3


def seed_generators(seed: int, stream: Stream, *place: int, all_devices: bool = False) -> None:
    """Seed Python's, NumPy's and torch's global generators, with `all_devices` those of accelerators too.

    The place is the epoch, the place in it and the rank: integers from 0, as the seed is.

    >>> seed_generators(42, Stream.STEP, 0, 7)
    >>> first = torch.rand(1), random.random(), np.random.rand()
    >>> seed_generators(42, Stream.STEP, 0, 7)
    >>> first == (torch.rand(1), random.random(), np.random.rand())
    True
    """
    words = np.random.SeedSequence((seed, stream, *place)).generate_state(4, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch_seed = int(words[2]) << 32 | int(words[3])
    torch.default_generator.manual_seed(torch_seed)
    # Not torch.manual_seed, which formats the call stack for every kind of device that is not there.
    device = torch.accelerator.current_accelerator(check_available=True) if all_devices else None
    if device is not None:
        module = torch.get_device_module(device)
        getattr(module, 'manual_seed_all', module.manual_seed)(torch_seed)


class Place(NamedTuple):
    """Where a sample comes in a run: its position is that in the order of the epoch, over all ranks, from 0."""

    epoch: int
    position: int
    sample: int


class PlaceSampler(Sampler[Place]):
    """The places of one epoch's samples, this rank's share of them.

    The order is torch's `DistributedSampler`'s, for one process too: two processes see together, batch for batch, what
    one with twice the batch sees. In place of the shuffled order the sampler may be another one with `set_epoch`, e.g.
    timm's for repeated augmentation.
    """

    def __init__(self, dataset: Any, *, seed: int, num_replicas: int = 1, rank: int = 0, sampler: Any | None = None):
        self.sampler = sampler or DistributedSampler(dataset, num_replicas, rank, seed=seed)
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Place]:
        # The start is of one iteration alone: the epochs after a resumed one are whole.
        epoch, start, self.start = self.epoch, self.start, 0
        for local, index in islice(enumerate(self.sampler), start, None):
            yield Place(epoch, local * self.num_replicas + self.rank, index)

    def __len__(self) -> int:
        return len(self.sampler)


class SeededDataset(Dataset[Any]):
    """A map-style data set that takes a `Place` for an index, and seeds what follows with it.

    A sample gets its place as a further last element, for `SeededCollate`. Its transform is the data set's own.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    @property
    def transform(self) -> Any:
        """The data set's transform."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __getitem__(self, place: Place) -> tuple[Any, ...]:
        # Not undone afterwards: timm's scheduled sizes transform the image after this, from the same numbers.
        seed_generators(self.seed, Stream.SAMPLE, place.epoch, place.position)
        return (*self.dataset[place.sample], place)

    def __len__(self) -> int:
        return len(self.dataset)


class SeededCollate:
    """A collate function for the samples of a `SeededDataset`: mixing is seeded, and ends when it should.

    The epoch from which it mixes no more, 0 for never, is told here and not to the loader, whose persistent workers
    hold a copy that nothing reaches.
    """

    def __init__(self, collate_fn: Callable[..., Any], seed: int, mixup_off_epoch: int = 0):
        self.collate_fn = collate_fn
        self.seed = seed
        self.mixup_off_epoch = mixup_off_epoch

    def __call__(self, samples: list[tuple[Any, ...]]) -> Any:
        """Return the batch."""
        place = samples[0][-1]
        seed_generators(self.seed, Stream.BATCH, place.epoch, place.position)
        if hasattr(self.collate_fn, 'mixup_enabled'):
            self.collate_fn.mixup_enabled = not 0 < self.mixup_off_epoch <= place.epoch
        return self.collate_fn([sample[:-1] for sample in samples])


class SeededErasing:
    """timm's random erasing of whole batches [B, C, H, W], seeded batch by batch."""

    def __init__(self, erasing: Callable[[torch.Tensor], torch.Tensor], seed: int, rank: int):
        self.erasing = erasing
        self.place = (seed, rank)
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, batch: int = 0) -> None:
        """Say where the next batch is."""
        self.epoch, self.batch = epoch, batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images with parts of them erased."""
        seed, rank = self.place
        seed_generators(seed, Stream.ERASING, self.epoch, self.batch, rank, all_devices=True)
        self.batch += 1
        return self.erasing(images)


class SeededLoader:
    """A training loader of timm's that can start an epoch at any batch.

    Its data set is a `SeededDataset`, its collate function a `SeededCollate`; iterable data sets come as they are, and
    then order and augmentation are those of their reader.

    Args:
        loader: What `timm.data.create_loader` returned.
        seed: Of the run.
        num_replicas: Processes that share the samples.
        rank: Of this process.
        repeats_augmentation: Keep the loader's own sampler, which is timm's for repeated augmentation.
    """

    def __init__(
        self, loader: Any, *, seed: int, num_replicas: int = 1, rank: int = 0, repeats_augmentation: bool = False
    ):
        self.loader = loader
        self.sampler: PlaceSampler | None = None
        if getattr(loader, 'random_erasing', None) is not None:
            loader.random_erasing = SeededErasing(loader.random_erasing, seed, rank)
        batch_sampler = loader.batch_sampler
        self.skips_quickly = isinstance(batch_sampler, BatchSampler)
        if hasattr(batch_sampler, 'sampler') and hasattr(batch_sampler.sampler, 'sampler'):
            batch_sampler = batch_sampler.sampler  # timm's loader of repeated epochs wraps the real one
        # Scheduled sizes have a data set around ours.
        datasets = (loader.dataset, getattr(loader.dataset, 'dataset', None))
        if any(isinstance(dataset, SeededDataset) for dataset in datasets):
            own = batch_sampler.sampler if repeats_augmentation else None
            self.sampler = PlaceSampler(loader.dataset, seed=seed, num_replicas=num_replicas, rank=rank, sampler=own)
            batch_sampler.sampler = self.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch.

        Args:
            epoch: From 0.
            first_batch: Where to begin. Batches before it are not read, but with scheduled sizes, repeated epochs and
                iterable data sets, where they are read and dropped.
        """
        for owner in (self.loader.dataset, self.loader.batch_sampler, self.sampler):
            if owner is not None and hasattr(owner, 'set_epoch'):
                owner.set_epoch(epoch)
        to_drop = first_batch
        if self.sampler is not None and self.skips_quickly:
            self.sampler.start = first_batch * self.loader.batch_sampler.batch_size
            to_drop = 0
        if isinstance(getattr(self.loader, 'random_erasing', None), SeededErasing):
            self.loader.random_erasing.begin_epoch(epoch, first_batch - to_drop)
        batches = iter(self.loader)
        for batch in islice(batches, to_drop):
            del batch
        yield from batches
