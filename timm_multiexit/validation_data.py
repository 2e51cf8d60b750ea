"""The images of `validate.py`: those that are reported, those that thresholds are chosen on, those that are timed."""

import copy
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from timm.models import parse_model_name
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_multiexit.checkpoint import read_training_checkpoint
from timm_multiexit.config import MultiExitError
from timm_multiexit.data import class_to_idx, create_checked_dataset
from timm_multiexit.holdout import TransformSubset, hold_out
from timm_multiexit.loaders import create_eval_loader

_logger = logging.getLogger(__name__)

_TRAIN_NAMES = ('train', 'training')
_DEFAULT_SEED = 42  # train.py's


def create_split(args: Namespace, split: str, in_chans: int) -> Any:
    """Return the data set of a split.

    Raises:
        MultiExitError: It cannot be had.
    """
    return create_checked_dataset(
        args.dataset,
        root=args.data_dir,
        split=split,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
    )


def create_calibration_split(args: Namespace, reported: Any, in_chans: int) -> tuple[Any, str] | None:
    """Return the data set that thresholds are chosen on and what it is in words; None if the flags name none.

    Args:
        args: Of the command line.
        reported: The data set of `args.split`.
        in_chans: Channels of an image.

    Raises:
        MultiExitError: It is the reported split, numbers its classes otherwise, or cannot be had.
    """
    if args.calib_from_train is not None:
        dataset, source = _hold_out_again(args, in_chans)
    elif args.calib_split is not None:
        if args.calib_split == args.split:
            raise MultiExitError(_same_data_message(args))
        dataset, source = create_split(args, args.calib_split, in_chans), f'the {args.calib_split} split'
        source += f', {len(dataset)} images' if hasattr(dataset, '__len__') else ''
        roots = [getattr(getattr(data, 'reader', None), 'root', None) for data in (dataset, reported)]
        if not args.dataset and roots[0] and roots[0] == roots[1]:
            raise MultiExitError(_same_data_message(args))
        if args.calib_split in (*_TRAIN_NAMES, args.train_split):
            _logger.warning(
                f'Thresholds are chosen on the whole {args.calib_split} split: on images that the model was trained on'
                ' it is surer than on others, and budgets and drops will not be kept.'
            )
    else:
        return None
    classes = [class_to_idx(data) for data in (dataset, reported)]
    if None not in classes and classes[0] != classes[1]:
        raise MultiExitError(
            f'Thresholds cannot be chosen on {source}: its classes are not those of the {args.split} split. Give both'
            ' the same class folders, or a --class-map.'
        )
    return dataset, source


def _hold_out_again(args: Namespace, in_chans: int) -> tuple[Any, str]:
    """Return the images that `train.py --val-from-train` held out, by the same choice with the same seed."""
    if args.train_split == args.split:
        raise MultiExitError(
            f'--calib-from-train takes images of the {args.train_split} split, which is the reported one: report'
            ' another --split.'
        )
    dataset = create_split(args, args.train_split, in_chans)
    if isinstance(dataset, IterableDataset):
        raise MultiExitError('Images cannot be held out of a stream: give --calib-split NAME, not --calib-from-train.')
    run = find_training_args(args)
    seed = next(seed for seed in (args.seed, run.get('seed'), _DEFAULT_SEED) if seed is not None)
    held_out = {'val_from_train': args.calib_from_train, 'seed': seed, 'train_split': args.train_split}
    if run and any(run.get(name) != value for name, value in held_out.items()):
        number, other_seed = run.get('val_from_train') or 0, run.get('seed')
        _logger.warning(
            f'The run that trained the model held {number} images of {run.get("train_split")} out with seed'
            f' {other_seed}, not {args.calib_from_train} of {args.train_split} with seed {seed}: thresholds are chosen'
            ' on images that it was trained on.'
        )
    return hold_out(dataset, args.calib_from_train, seed=seed)[1], (
        f'{args.calib_from_train} images held out of the {args.train_split} split with seed {seed}'
    )


def find_training_args(args: Namespace) -> dict[str, Any]:
    """Return the arguments of the run that trained the model; empty where they are not to be found."""
    if args.checkpoint:
        found = read_training_checkpoint(args.checkpoint).get('args')
        return dict(vars(found)) if isinstance(found, Namespace) else {}
    source, name = parse_model_name(args.model)
    path = Path(name).parent / 'args.yaml'
    if source != 'local-dir' or not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def check_other_images(args: Namespace, is_same: bool) -> None:
    """Raise if two splits turned out to be the same images under two names.

    Raises:
        MultiExitError: They are.
    """
    if is_same:
        raise MultiExitError(_same_data_message(args))


def _same_data_message(args: Namespace) -> str:
    return (
        f'--calib-split {args.calib_split} and --split {args.split} are the same images: thresholds must be chosen on'
        ' others than those reported, see --calib-from-train.'
    )


def load_mixed_batch(args: Namespace, dataset: Any, data_config: dict[str, Any], accelerator: Accelerator) -> Tensor:
    """Return a batch of images from all over a data set, since folders are sorted by class; of a stream the first.

    Args:
        args: Of the command line; `batch_size` is the most.
        dataset: Its transform stays.
        data_config: How images are made ready.
        accelerator: Where the batch is.
    """
    dataset = copy.copy(dataset)
    if not isinstance(dataset, IterableDataset):
        places = np.linspace(0, len(dataset) - 1, min(args.batch_size, len(dataset))).round().astype(int)
        dataset = TransformSubset(dataset, places.tolist())
    images, _ = next(iter(create_eval_loader(args, dataset, data_config, accelerator)))
    return images.to(accelerator.device)
