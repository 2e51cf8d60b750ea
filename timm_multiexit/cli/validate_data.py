"""The images of `validate.py`: those reported, those that thresholds are chosen on, and those timed."""

import copy
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.models import parse_model_name
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.checkpoints.timm_checkpoint import read_training_checkpoint
from timm_multiexit.cli.build_training import loader_creator
from timm_multiexit.data.datasets import (
    check_classes,
    choose_image_mode,
    class_names,
    class_to_idx,
    create_checked_dataset,
    is_same_split,
)
from timm_multiexit.data.holdout import SubsetReader, TransformSubset, hold_out
from timm_multiexit.evaluation.exit_table import CreateLoader
from timm_multiexit.evaluation.validator import ValidationData
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.checks import is_list
from timm_multiexit.utils.errors import DataError, InvalidValueError

_logger = logging.getLogger(__name__)

_TRAIN_NAMES = ('train', 'training')
_DEFAULT_SEED = 42  # train.py's
_MAX_TWICE = 0.05  # share of images that may be in two splits: CIFAR-100 and ImageNet have a few


def create_validation_data(
    args: Namespace, model: MultiExitModel, data_config: dict[str, Any], accelerator: Accelerator
) -> ValidationData:
    """Return the images that the flags name, whose `data_dir`, `dataset` and `split` are resolved."""
    create_loader = logged(loader_creator(args, accelerator), args.log_freq)
    in_chans = data_config['input_size'][0]
    dataset = create_split(args, args.split, in_chans)
    num_classes = check_classes(dataset, None)
    if num_classes and num_classes > model.num_classes:
        raise DataError(f'The data has {num_classes} classes, the model {model.num_classes}. Set --num-classes.')
    _compare_names(class_names(dataset, model.num_classes), model.pretrained_cfg.get('label_names'))
    return ValidationData(
        split=args.split,
        dataset=dataset,
        config=data_config,
        create_loader=create_loader,
        load_timed=partial(load_mixed_batch, dataset, data_config, args.batch_size, create_loader, accelerator.device),
        calibration=create_calibration_split(args, dataset, in_chans),
        check_shared=partial(check_other_images, args, share_by_chance=_MAX_TWICE),
        channels_last=args.channels_last,
    )


def _compare_names(names: list[str] | None, known: Any) -> None:
    """Warn of data whose classes have other names than the model's, or the same in another order."""
    if names is None or not is_list(known) or names == list(known):
        return
    idx = next(idx for idx, (name, other) in enumerate(zip(names, known)) if name != other)
    _logger.warning(
        f"Class {idx} is '{names[idx]}' in the data and '{known[idx]}' in the model: accuracy means something only if"
        ' both name the same class. Folders are numbered in sorted order; --class-map sets another.'
    )


def logged(create_loader: CreateLoader, every: int) -> CreateLoader:
    """Return a function that creates the same loaders, which log how far they are after every so many batches."""
    return lambda dataset, data_config: LoggedLoader(create_loader(dataset, data_config), every)


class LoggedLoader:
    """A loader that logs how far it is; all else is that of the loader."""

    def __init__(self, loader: Any, every: int):
        self.loader, self.every = loader, every

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        start, num = time.perf_counter(), 0
        for idx, batch in enumerate(self.loader, 1):
            yield batch
            num += len(batch[0])
            if idx % self.every == 0:
                rate = num / (time.perf_counter() - start)
                _logger.info(f'Test: {idx} of {len(self.loader)} batches, {num} images, {rate:.0f} img/s')


def create_split(args: Namespace, split: str, in_chans: int) -> Any:
    """Return the data set of a split."""
    return create_checked_dataset(
        args.dataset,
        root=args.data_dir,
        split=split,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        # The analysis has no flags for all of these.
        num_samples=getattr(args, 'num_samples', None),
        input_key=getattr(args, 'input_key', None),
        target_key=getattr(args, 'target_key', None),
        trust_remote_code=bool(getattr(args, 'dataset_trust_remote_code', False)),
        input_img_mode=choose_image_mode(args.input_img_mode, in_chans),
    )


def create_calibration_split(args: Namespace, reported: Any, in_chans: int) -> tuple[Any, str] | None:
    """Return the data set that thresholds are chosen on and its description; None if the flags name none.

    It must have the classes of `reported`, the data set of `args.split`, and none of its images.
    """
    if args.calib_from_train is None and args.calib_split is None:
        return None
    run = find_training_args(args)
    split = args.calib_split or args.train_split or run.get('train_split') or _TRAIN_NAMES[0]
    if split == args.split:
        check_other_images(args, args.calib_from_train or 1, args.calib_from_train or 1)
    if args.calib_from_train is not None:
        dataset, source = _hold_out_again(args, split, run, in_chans)
    else:
        dataset, source = create_split(args, split, in_chans), f'the {split} split'
        source += f', {len(dataset)} images' if hasattr(dataset, '__len__') else ''
    names = image_names(dataset)
    check_other_images(args, len(names & image_names(reported)), len(names))
    if args.calib_from_train is None and split in (*_TRAIN_NAMES, run.get('train_split')):
        _logger.warning(
            f'Thresholds are chosen on the whole {args.calib_split} split: the model is more confident on images that'
            ' it was trained on than on others, so budgets and drops will not hold.'
        )
    if args.max_drop is not None and _chose_epoch(args, run):
        _logger.warning(
            f'The run that trained the model chose its best epoch on {source}: --max-drop {args.max_drop:g} assumes'
            ' images that nothing was chosen on, and may be exceeded more often than it promises.'
        )
    classes = [class_to_idx(data) for data in (dataset, reported)]
    if None not in classes and classes[0] != classes[1]:
        raise DataError(
            f'Cannot choose thresholds on {source}: its classes are not those of the {args.split} split. Give both'
            ' the same class folders, or a --class-map.'
        )
    return dataset, source


def _chose_epoch(args: Namespace, run: dict[str, Any]) -> bool:
    """Return whether the training run measured its epochs on what thresholds are chosen on."""
    if run.get('val_from_train'):
        return args.calib_from_train is not None
    return args.calib_split is not None and is_same_split(args.calib_split, run.get('val_split') or '')


def _hold_out_again(args: Namespace, split: str, run: dict[str, Any], in_chans: int) -> tuple[Any, str]:
    """Return the images that `train.py --val-from-train` held out, by the same choice with the same seed."""
    dataset = create_split(args, split, in_chans)
    if isinstance(dataset, IterableDataset):
        raise InvalidValueError('Cannot hold images out of a stream. Give --calib-split NAME, not --calib-from-train.')
    seed = next(seed for seed in (args.seed, run.get('seed'), _DEFAULT_SEED) if seed is not None)
    how, caveat = 'held out of', ''
    held_out = {'val_from_train': args.calib_from_train, 'seed': seed, 'train_split': split}
    if not run:
        how = 'drawn from'
        _logger.warning(
            'The arguments of the run that trained the model were not found, so it is unknown whether it was trained on'
            f' the {args.calib_from_train} images of {split} that thresholds are chosen on.'
        )
    elif any(run.get(name) != value for name, value in held_out.items()):
        how, caveat = 'drawn from', ', on which the network was trained'
        number, other_seed = run.get('val_from_train') or 0, run.get('seed')
        _logger.warning(
            f'The run that trained the model held out {number} images of {run.get("train_split")} with seed'
            f' {other_seed}, not {args.calib_from_train} of {split} with seed {seed}: thresholds are chosen'
            ' on images that it was trained on.'
        )
    source = f'{args.calib_from_train} images {how} the {split} split with seed {seed}{caveat}'
    return hold_out(dataset, args.calib_from_train, seed=seed)[1], source


def find_training_args(args: Namespace) -> dict[str, Any]:
    """Return the arguments of the run that trained the model; empty if they are not found."""
    if args.checkpoint:
        found = read_training_checkpoint(args.checkpoint).get('args')
        return dict(vars(found)) if isinstance(found, Namespace) else {}
    source, name = parse_model_name(args.model)
    if source != 'local-dir':
        return {}
    run = RunFolder(Path(name).absolute().parent)
    # One that is there and cannot be read is an error: its model may have been trained on the very images.
    return run.read_args(needed=()) if run.args_path.exists() else {}


def image_names(dataset: Any) -> set[str]:
    """Return the paths of the images of a data set, links to folders resolved; nothing if images have no path."""
    reader = getattr(dataset, 'reader', dataset)
    indices = None
    while isinstance(reader, (SubsetReader, TransformSubset)):
        places = reader.indices
        indices = places if indices is None else [places[idx] for idx in indices]
        reader = reader.reader if isinstance(reader, SubsetReader) else reader.dataset
    samples = getattr(reader, 'samples', None) or ()
    samples = samples if indices is None else [samples[idx] for idx in indices if samples]
    paths = [sample[0] for sample in samples]
    if not all(isinstance(path, str) for path in paths):
        return set()
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return {os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths}


def check_other_images(args: Namespace, num_shared: int, num: int, *, share_by_chance: float = 0) -> None:
    """Raise if images that thresholds are chosen on are among those reported.

    `num_shared` of the `num` are in both splits; `share_by_chance` of them may be: data sets contain some images twice.
    """
    if num_shared <= share_by_chance * num:
        return
    what, hint = f'--calib-split {args.calib_split}', 'see --calib-from-train'
    if args.calib_from_train is not None:
        what, hint = f'--calib-from-train {args.calib_from_train}', 'report another --split, from a folder of its own'
    shared = f'{num_shared} of the {num} images of {what} are in --split {args.split} too'
    if num_shared == num and args.calib_from_train is None:
        shared = f'{what} and --split {args.split} are the same images'
    raise DataError(f'{shared}: thresholds must be chosen on other images than those reported, {hint}.')


def load_mixed_batch(
    dataset: Any, data_config: Mapping[str, Any], batch_size: int, create_loader: CreateLoader, device: torch.device
) -> Tensor:
    """Return a batch of images from all over a data set, since folders are sorted by class; of a stream the first.

    The transform of the data set stays. There are fewer than `batch_size` images if it has fewer.
    """
    dataset = copy.copy(dataset)
    if not isinstance(dataset, IterableDataset):
        places = np.linspace(0, len(dataset) - 1, min(batch_size, len(dataset))).round().astype(int)
        dataset = TransformSubset(dataset, places.tolist())
    images: Tensor
    images, _ = next(iter(create_loader(dataset, data_config)))
    return images.to(device)
