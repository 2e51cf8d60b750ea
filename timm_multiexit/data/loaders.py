"""Data sets and loaders from command-line arguments: timm's, seeded so that a run can go on anywhere."""

from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import AugMixDataset, Mixup, create_loader
from timm.data.loader import fast_collate
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import IterableDataset, default_collate
from torchvision.transforms import RandomCrop

from timm_multiexit.cli.build_training import _augmentation, _create_mixing, _scheduled_sizes
from timm_multiexit.data.seeding import SeededCollate, SeededDataset, SeededLoader
from timm_multiexit.utils.errors import MultiExitError


def create_train_loader(
    args: Namespace, dataset: Any, data_config: dict[str, Any], accelerator: Accelerator
) -> tuple[SeededLoader, Mixup | None]:
    """Return the loader for training, and the function that mixes its batches if the loader does not.

    Raises:
        MultiExitError: The images do not fill one batch, or a flag does not go with an iterable data set.
    """
    is_iterable = isinstance(dataset, IterableDataset)
    collate_fn, mixup_fn = _create_mixing(args)
    if is_iterable and args.mixup_off_epoch and collate_fn:
        raise MultiExitError(
            '--mixup-off-epoch does not reach the prefetcher of an iterable data set: add --no-prefetcher.'
        )
    if not is_iterable:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits) if args.aug_splits else dataset
        dataset = SeededDataset(dataset, args.seed)
        collate_fn = collate_fn or (default_collate if args.no_prefetcher else fast_collate)
        collate_fn = SeededCollate(collate_fn, args.seed, args.mixup_off_epoch)
    interpolation = data_config['interpolation'] if args.no_aug else args.train_interpolation
    try:
        loader = create_loader(
            dataset,
            batch_size=args.batch_size,
            is_training=True,
            interpolation=interpolation or data_config['interpolation'],
            collate_fn=collate_fn,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            num_workers=args.workers,
            worker_seeding=args.worker_seeding,
            **_augmentation(args),
            **_scheduled_sizes(args),
            **_common(args, data_config, accelerator),
        )
    except (ValueError, AssertionError) as error:
        raise MultiExitError(f'The training data cannot be loaded so: {error}'.rstrip('.') + '.') from error
    if args.crop_padding:
        if is_iterable:
            raise MultiExitError('--crop-padding does not reach the images of a stream: leave it out.')
        # timm puts the crop first, and has none of a padded image.
        size = data_config['input_size'][-2:]
        resize = ResizeKeepRatio(size, interpolation=interpolation or data_config['interpolation'])
        dataset.transform.transforms[:1] = [resize, RandomCrop(size, padding=args.crop_padding)]
    if len(loader) == 0 and not is_iterable:
        raise MultiExitError(f'{len(dataset)} training images do not fill one batch of {args.batch_size}.')
    seeded = SeededLoader(
        loader,
        seed=args.seed,
        num_replicas=accelerator.num_processes,
        rank=accelerator.process_index,
        repeats_augmentation=bool(args.aug_repeats),
    )
    return seeded, mixup_fn


def _common(args: Namespace, data_config: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    # Accelerate does not prepare the loaders: it does nothing to timm's prefetcher, and would shard a second time what
    # timm's samplers have sharded.
    return {
        'input_size': data_config['input_size'],
        'mean': data_config['mean'],
        'std': data_config['std'],
        'pin_memory': args.pin_mem,
        'device': accelerator.device,
        'distributed': accelerator.num_processes > 1,
        'use_prefetcher': not args.no_prefetcher,
        'img_dtype': getattr(torch, getattr(args, 'model_dtype', None) or 'float32'),
    }


def create_eval_loader(args: Namespace, dataset: Any, data_config: dict[str, Any], accelerator: Accelerator) -> Any:
    """Return a loader that gives every image once, in order, this rank's share of them."""
    workers = args.workers
    if accelerator.num_processes > 1 and isinstance(dataset, IterableDataset):
        workers = min(2, workers)  # as timm does: fewer shards, less padding
    return create_loader(
        dataset,
        batch_size=getattr(args, 'validation_batch_size', None) or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        num_workers=workers,
        **_common(args, data_config, accelerator),
    )
