"""Flags of int8 programs, and the images that they are calibrated and compared on."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from timm_multiexit.cli.flags.parser import non_negative, positive_int, switch, value
from timm_multiexit.data.datasets import check_classes, choose_image_mode, create_checked_dataset
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.quantize import QuantizationResult, quantize
from timm_multiexit.deploy.runner import prepare
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import DataError, InvalidValueError
from timm_multiexit.utils.text import format_table

_BATCH_SIZE = 64
_CALIB_IMAGES = 256
_LIBRARIES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')  # as timm names their data sets

INT8_FLAGS = (
    switch('--int8', 'add int8 programs, and refuse them where accuracy falls'),
    value(
        '--calib-data',
        str,
        None,
        'DATA',
        'images for --int8: a folder with a folder per class, or with one of these per split; digits; or a data set'
        ' such as hfds/ORG/NAME',
    ),
    value('--calib-split', str, 'validation', 'NAME', 'split of these images, best one that was not trained on'),
    value(
        '--calib-images',
        positive_int,
        None,
        'N',
        'images that the ranges of int8 are those of (default: 256, of a small split half)',
    ),
    value('--held-out-images', positive_int, 2000, 'N', 'other images of the split, on which accuracy is compared'),
    value('--int8-limit', non_negative, 1.0, 'P', 'points of accuracy that an exit or a saved policy may lose'),
)


def check_int8_flags(args: Namespace, *, has_default: bool = False) -> None:
    """Raise unless the flags go together; `has_default` where something takes the place of `--calib-data`.

    Raises:
        InvalidValueError: They do not.
    """
    if args.int8 and args.calib_data is None and not has_default:
        raise InvalidValueError('--int8 needs images to calibrate on: give --calib-data DATA.')
    if not args.int8 and args.calib_data is not None:
        raise InvalidValueError('--calib-data is for --int8: give both, or neither.')


class Int8Images(NamedTuple):
    """Images that were drawn for int8 programs.

    Attributes:
        dataset: Where they are from.
        calibration: Indices of those that ranges are taken of.
        held_out: Indices of those that accuracy is compared on.
    """

    dataset: Any
    calibration: list[int]
    held_out: list[int]


def draw_images(
    args: Namespace, model: MultiExitModel, *, dataset: str | None = None, root: str | None = None
) -> Int8Images:
    """Return the images that the flags name, drawn by chance from their split, always the same.

    Args:
        args: Of `INT8_FLAGS`.
        model: Whose images they are.
        dataset: Data set where `--calib-data` names none; see `create_checked_dataset`.
        root: Its folder.

    Raises:
        DataError: There are too few images, they are a stream, or of other classes.
        MissingFileError: The folder does not exist.
    """
    if args.calib_data is not None:
        is_name = args.calib_data == DIGITS or args.calib_data.startswith(_LIBRARIES)
        is_folder = os.path.isdir(args.calib_data) or not is_name
        dataset, root = ('', args.calib_data) if is_folder else (args.calib_data, None)
    mode = choose_image_mode(None, model.in_chans)
    images = create_checked_dataset(dataset or '', root=root, split=args.calib_split, input_img_mode=mode)
    if isinstance(images, IterableDataset) or not hasattr(images, '__len__'):
        raise DataError('--calib-data must have a known number of images, got a stream.')
    count = check_classes(images, None)
    if count and count > model.num_classes:
        raise DataError(f'--calib-data must have the {model.num_classes} classes of the model, got {count}.')
    num_images = min(_CALIB_IMAGES, len(images) // 2) if args.calib_images is None else args.calib_images
    if not 0 < num_images < len(images):
        raise DataError(
            f'--calib-images must be less than the {len(images)} images of the split {args.calib_split}, as others are'
            f' needed to compare on, got {num_images}.'
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    rest = order[num_images:]
    return Int8Images(images, order[:num_images], rest[: args.held_out_images])


def add_int8(folder: Path, images: Int8Images, *, limit: float) -> QuantizationResult:
    """Add int8 programs to an exported folder; see `quantize`."""
    cfg = read_manifest(folder, checks_hashes=False)['preprocessing']

    def transform(image: Any) -> Tensor:
        return torch.from_numpy(prepare(image, cfg)[0])  # as a device does

    images.dataset.transform = transform
    calibration, held_out = (
        DataLoader(Subset(images.dataset, part), batch_size=_BATCH_SIZE)
        for part in (images.calibration, images.held_out)
    )
    return quantize(folder, calibration, held_out, limit=limit)


def describe_int8(result: QuantizationResult) -> str:
    """Return what int8 costs, as a table."""
    names = [*map(str, range(len(result.fp32) - 1)), 'main']
    rows = [
        {'exit': name, 'fp32, top-1': before, 'int8, top-1': after}
        for name, before, after in zip(names, result.fp32, result.int8)
    ]
    lines = [f'On {result.images} held-out images:', format_table(rows)]
    if result.policies:
        lost = max(policy['fp32'] - policy['int8'] for policy in result.policies)
        lines.append(f'The {len(result.policies)} saved policies lose at most {max(0.0, lost):.2f} points.')
    return '\n'.join(lines)
