"""Data loaders: timm's, seeded so that training can be resumed at any batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.data.dataset import AugMixDataset
from timm.data.loader import adapt_to_chs, create_loader, fast_collate
from timm.data.mixup import FastCollateMixup, Mixup
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import IterableDataset, default_collate
from torchvision.transforms import RandomCrop

from timm_multiexit.data.datasets import check_augmentation
from timm_multiexit.data.seeding import SeededCollate, SeededDataset, SeededLoader
from timm_multiexit.utils.errors import DataError, InvalidValueError
from timm_multiexit.utils.signals import outlive_signals


def create_train_loader(
    dataset: Any,
    *,
    data_config: Mapping[str, Any],
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
    augmentation: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    mixing: Mapping[str, Any] | None = None,
    mixup_off_epoch: int = 0,
    interpolation: str = '',
    crop_padding: int = 0,
    multi_epochs: bool = False,
    worker_seeding: str = 'all',
    num_workers: int = 0,
    pin_memory: bool = False,
    uses_prefetcher: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[SeededLoader, Mixup | None]:
    """Return the loader for training, and the function that mixes its batches if the loader does not.

    Args:
        dataset: Its transform is set.
        data_config: What `timm.data.resolve_data_config` returned.
        batch_size: Of one process.
        seed: Of order, augmentation and mixing.
        accelerator: Gives device and processes.
        augmentation: Keywords of `timm.data.create_loader`.
        sizes: Keywords of `timm.data.create_loader` for batches of several image sizes; None for one size.
        mixing: Keywords of `timm.data.Mixup`; None mixes nothing.
        mixup_off_epoch: Epoch from which nothing is mixed; 0 for never.
        interpolation: Of the augmentation; '' for that of `data_config`.
        crop_padding: Crop from the image padded by so many pixels, in place of timm's crops; 0 for timm's.
        multi_epochs: Use timm's loader that keeps its workers from epoch to epoch.
        worker_seeding: See `timm.data.create_loader`.
        num_workers: Processes that load data.
        pin_memory: Load into pinned memory.
        uses_prefetcher: Use timm's prefetcher, which normalizes on the device.
        dtype: Of the prefetcher's images.

    Raises:
        DataError: The images do not fill one batch.
        InvalidValueError: An option does not go with an iterable data set or the images, or timm refuses it.
    """
    is_iterable = isinstance(dataset, IterableDataset)
    augmentation = augmentation or {}
    check_augmentation(dataset, augmentation)
    collate_fn: Callable[..., Any] | None = FastCollateMixup(**mixing) if mixing and uses_prefetcher else None
    if is_iterable and mixup_off_epoch and collate_fn:
        raise InvalidValueError(
            '--mixup-off-epoch does not reach the prefetcher of an iterable data set: add --no-prefetcher.'
        )
    if not is_iterable:
        num_splits = augmentation.get('num_aug_splits', 0)
        dataset = AugMixDataset(dataset, num_splits=num_splits) if num_splits else dataset
        dataset = SeededDataset(dataset, seed)
        collate_fn = collate_fn or (fast_collate if uses_prefetcher else default_collate)
        collate_fn = SeededCollate(collate_fn, seed, mixup_off_epoch)
    try:
        loader = _create_loader(
            dataset,
            batch_size=batch_size,
            is_training=True,
            interpolation=interpolation or data_config['interpolation'],
            collate_fn=collate_fn,
            use_multi_epochs_loader=multi_epochs,
            num_workers=num_workers,
            worker_seeding=worker_seeding,
            pin_memory=pin_memory,
            use_prefetcher=uses_prefetcher,
            img_dtype=dtype,
            **augmentation,
            **(sizes or {}),
            **_common(data_config, accelerator),
        )
    except (ValueError, AssertionError) as error:
        raise InvalidValueError(f'Cannot load the training data: {error}'.rstrip('.') + '.') from error
    if crop_padding:
        if is_iterable:
            raise InvalidValueError('--crop-padding does not reach the images of a stream: leave it out.')
        # timm puts the crop first, and has none of a padded image.
        size = data_config['input_size'][-2:]
        resize = ResizeKeepRatio(size, interpolation=interpolation or data_config['interpolation'])
        dataset.transform.transforms[:1] = [resize, RandomCrop(size, padding=crop_padding)]
    if len(loader) == 0 and not is_iterable:
        raise DataError(
            f'The batch size must be at most the number of training images, {len(dataset)}, got {batch_size}.'
        )
    seeded = SeededLoader(
        loader,
        seed=seed,
        num_replicas=accelerator.num_processes,
        rank=accelerator.process_index,
        repeats_augmentation=bool(augmentation.get('num_aug_repeats')),
    )
    return seeded, Mixup(**mixing) if mixing and not uses_prefetcher else None


def create_eval_loader(
    dataset: Any,
    *,
    data_config: Mapping[str, Any],
    batch_size: int,
    accelerator: Accelerator,
    num_workers: int = 0,
    pin_memory: bool = False,
    uses_prefetcher: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return a loader that gives every image once, in order, this rank's share of them.

    The arguments are those of `create_train_loader`.
    """
    if accelerator.num_processes > 1 and isinstance(dataset, IterableDataset):
        num_workers = min(2, num_workers)  # as timm does: fewer shards, less padding
    return _create_loader(
        dataset,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config.get('crop_mode'),
        crop_border_pixels=data_config.get('crop_border_pixels'),
        num_workers=num_workers,
        pin_memory=pin_memory,
        use_prefetcher=uses_prefetcher,
        img_dtype=dtype,
        **_common(data_config, accelerator),
    )


def _create_loader(dataset: Any, **kwargs: Any) -> Any:
    loader = create_loader(dataset, **kwargs)
    inner = getattr(loader, 'loader', loader)  # of timm's prefetcher
    inner.worker_init_fn = partial(_init_worker, inner.worker_init_fn)
    return loader


def _init_worker(init_fn: Callable[[int], None], worker_id: int) -> None:
    outlive_signals()
    init_fn(worker_id)


def _common(data_config: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    # Accelerate does not prepare the loaders: it does nothing to timm's prefetcher, and would shard a second time what
    # timm's samplers have sharded.
    # Augmentation fills with the mean, in as many channels as the image has.
    size = data_config['input_size']
    images = {'input_size': size, **{name: adapt_to_chs(data_config[name], size[0]) for name in ('mean', 'std')}}
    return {**images, 'device': accelerator.device, 'distributed': accelerator.num_processes > 1}
