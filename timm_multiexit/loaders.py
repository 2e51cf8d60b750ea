"""Data sets and loaders from command-line arguments: timm's, seeded so that a run can go on anywhere."""

from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from timm.data.loader import fast_collate
from timm.data.target_transforms import MultiLabelTarget
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import IterableDataset, default_collate
from torchvision.transforms import RandomCrop

from timm_multiexit.checks import is_mixing
from timm_multiexit.config import MultiExitError
from timm_multiexit.data import check_classes, create_checked_dataset
from timm_multiexit.holdout import hold_out
from timm_multiexit.seeding import SeededCollate, SeededDataset, SeededLoader


def create_datasets(args: Namespace) -> tuple[tuple[Any, Any, Any], int | None]:
    """Return the data sets for training, for choosing the epoch and for the final table, and the number of classes.

    The last two data sets may be None, and so may be the number, where the data does not say. With `--val-from-train`
    the epoch is chosen on training images held out, and `--val-split` is for the final table.

    Raises:
        MultiExitError: Data that cannot be had, or splits that do not fit each other.
    """
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    common = {
        'root': args.data_dir,
        'class_map': args.class_map,
        'download': args.dataset_download,
        'batch_size': args.batch_size,
        'input_img_mode': args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        'input_key': args.input_key,
        'target_key': args.target_key,
        'target_format': args.target_format if args.task == 'multilabel' else None,
        'trust_remote_code': args.dataset_trust_remote_code,
        'bad_images': args.bad_images,
        'cache': args.cache_images,
    }
    training = {
        'split': args.train_split,
        'is_training': True,
        'seed': args.seed,
        'repeats': args.epoch_repeats,
        'num_samples': args.train_num_samples,
    }
    val_samples = {'num_samples': args.val_num_samples}
    train = create_checked_dataset(args.dataset, **training, **common)
    val = test = None
    if args.val_split:
        val = create_checked_dataset(args.dataset, split=args.val_split, **val_samples, **common)
    if args.test_split:
        test = create_checked_dataset(args.dataset, split=args.test_split, **val_samples, **common)
    test = test or val
    for other in (val, test):
        num_classes = check_classes(train, other)
    _check_distinct(args, train, val)
    if args.val_from_train:
        train, val = hold_out(train, args.val_from_train, seed=args.seed)
    return (train, val, test), num_classes


def _check_distinct(args: Namespace, train: Any, val: Any) -> None:
    """Raise where timm found no folders of splits, and took the whole folder for both."""
    roots = [getattr(getattr(dataset, 'reader', None), 'root', None) for dataset in (train, val)]
    if not args.dataset and roots[0] and roots[0] == roots[1] and args.train_split != args.val_split:
        raise MultiExitError(
            f"{args.data_dir} has no folders of splits, so '{args.val_split}' would be the training images again: make"
            f" {args.train_split}/ and {args.val_split}/, or give --val-split ''."
        )


def encode_targets(args: Namespace, datasets: tuple) -> None:
    """Let multi-label data sets give their targets as [C] vectors, once the number of classes is known."""
    if args.task == 'multilabel':
        for dataset in datasets:
            if dataset is not None:
                dataset.target_transform = MultiLabelTarget(args.num_classes, dense=args.target_format == 'multihot')


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


def _create_mixing(args: Namespace) -> tuple[FastCollateMixup | None, Mixup | None]:
    if not is_mixing(args):
        return None, None
    mixer = (Mixup if args.no_prefetcher else FastCollateMixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=args.task == 'multilabel',
    )
    return (None, mixer) if args.no_prefetcher else (mixer, None)


def _augmentation(args: Namespace) -> dict[str, Any]:
    same = 'no_aug train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob'.split()
    return {
        **{name: getattr(args, name) for name in same},
        'grayscale_prob': args.grayscale_prob or 0.0,
        'gaussian_blur_prob': args.gaussian_blur_prob or 0.0,
        'auto_augment': args.aa,
        're_prob': args.reprob,
        're_mode': args.remode,
        're_count': args.recount,
        're_split': args.resplit,
        'num_aug_repeats': args.aug_repeats,
        'num_aug_splits': args.aug_splits,
    }


def _scheduled_sizes(args: Namespace) -> dict[str, Any]:
    if args.train_img_sizes is None:
        return {}
    is_progressive = args.train_size_schedule == 'progressive'
    return {
        'input_size_choices': args.train_img_sizes,
        'batch_size_choices': args.train_batch_sizes,
        'batch_choice_weights': args.train_size_probs,
        'batch_choice_seed': args.seed,
        'batch_choice_schedule': args.train_size_schedule,
        'batch_schedule_epochs': args.epochs if is_progressive else None,
        'batch_schedule_spread': args.train_size_schedule_spread,
        'batch_schedule_random_mix': args.train_size_random_mix,
        'num_batches': args.train_batches_per_epoch,
    }


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
