"""Data sets: timm's, checked before work begins, and the handwritten digits that need no download."""

from argparse import Namespace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader
from timm.data.readers.reader import Reader

from timm_multiexit.config import MultiExitError

DIGITS = 'digits'
DIGITS_SIZE = 32
# Places in a fixed shuffle of the 1,797 images. The epoch is chosen on 'validation' and 'test' is reported.
_DIGITS_SPLITS = {'test': slice(0, 360), 'validation': slice(360, 540), 'train': slice(540, None)}
# Names that timm takes for one another where a folder holds its splits as folders.
_SPLIT_FOLDERS = ({'train', 'training'}, {'val', 'valid', 'validation', 'eval', 'evaluation'}, {'test'})


class DigitsReader(Reader):
    """scikit-learn's 1,797 handwritten digits (8x8 grey) as 32x32 images, in a fixed split.

    Args:
        split: 'train' (1,257 images), 'validation' (180) or 'test' (360).

    Raises:
        MultiExitError: Unknown split, or scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, test part.
    """

    def __init__(self, split: str):
        super().__init__()
        if split not in _DIGITS_SPLITS:
            raise MultiExitError(f"The digits have no split '{split}', allowed are {', '.join(_DIGITS_SPLITS)}.")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MultiExitError(
                'The digits come with scikit-learn, which is not installed: pip install scikit-learn, or name your own'
                ' images with --data-dir.'
            ) from error
        digits = load_digits()
        # The data set comes in runs of 0 to 9. RandomState's stream is frozen, so the split is the same everywhere.
        order = np.random.RandomState(0).permutation(len(digits.target))[_DIGITS_SPLITS[split]]
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        self.samples = [(_encode_digit(digits.images[idx]), int(digits.target[idx])) for idx in order]

    def __getitem__(self, index: int):
        content, target = self.samples[index]
        return BytesIO(content), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{index}.png'


def _encode_digit(image) -> bytes:
    """Return an 8x8 array of 0 to 16 as a 32x32 PNG."""
    content = BytesIO()
    picture = Image.fromarray((image * (255 / 16)).round().astype('uint8'))
    picture.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(content, 'png')
    return content.getvalue()


def create_checked_dataset(name: str, *, root: str | None, split: str, **kwargs: Any) -> Any:
    """Return a data set: 'digits', or what `timm.data.create_dataset` makes of the name.

    Args:
        name: 'digits', a timm name such as 'torch/cifar10', or '' for a folder of class folders.
        root: Folder of the data.
        split: Name of the split, and of its folder.
        **kwargs: For `timm.data.create_dataset`.

    Raises:
        MultiExitError: The folder is missing or holds no images, or the data set cannot be made.
    """
    if name == DIGITS:
        return ImageDataset('', reader=DigitsReader(split), input_img_mode=kwargs.get('input_img_mode') or 'RGB')
    if not name and not (root and Path(root).is_dir()):
        raise MultiExitError(f"There is no data folder '{root or ''}': give one that holds {split}/CLASS/*.jpg.")
    if not name:
        _check_split(Path(root), split)
    try:
        return create_dataset(name, root=root, split=split, **kwargs)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise MultiExitError(f"No data set '{name or root}', split '{split}': {error}".rstrip('.') + '.') from error


def _check_split(root: Path, split: str) -> None:
    """Raise if timm would take the whole folder, all splits together, for a split that is not there."""
    split = split.split('[')[0]
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    synonyms = next((names for names in _SPLIT_FOLDERS if split in names), {split})
    others = sorted(folders & set().union(*_SPLIT_FOLDERS))
    if others and not folders & {*synonyms, split}:
        raise MultiExitError(f"{root} has no split '{split}', allowed are {', '.join(others)}.")


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Return class name -> index of a data set, None where it does not say."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        mapping = getattr(owner, 'class_to_idx', None)
        if mapping:
            return dict(mapping)
    return None


def check_classes(train: Any, val: Any | None) -> int | None:
    """Return the number of classes of the training set, None where it does not say.

    Raises:
        MultiExitError: Another split numbers its classes otherwise, so that its accuracy would be of chance.
    """
    classes = class_to_idx(train)
    if classes is None:
        return None
    other = None if val is None else class_to_idx(val)
    if other is not None and other != classes:
        odd = sorted(set(other.items()) ^ set(classes.items()))[0][0]
        raise MultiExitError(
            f"The training split has {len(classes)} classes and the other {len(other)}, '{odd}' is not the same in"
            ' both: give both the same class folders, or a --class-map.'
        )
    return max(classes.values()) + 1


def loader_kwargs(args: Namespace, data_config: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Return what the loaders of training and evaluation have in common, for `timm.data.create_loader`.

    Accelerate does not prepare the loaders: it does nothing to timm's prefetcher, and would shard a second time what
    timm's samplers have sharded.
    """
    return {
        'input_size': data_config['input_size'],
        'mean': data_config['mean'],
        'std': data_config['std'],
        'num_workers': args.workers,
        'pin_memory': args.pin_mem,
        'device': accelerator.device,
        'distributed': accelerator.num_processes > 1,
        'use_prefetcher': not args.no_prefetcher,
    }


def create_eval_loader(args: Namespace, dataset: Any, data_config: dict[str, Any], accelerator: Accelerator) -> Any:
    """Return a loader that gives every image once, in order, this rank's share of them."""
    return create_loader(
        dataset,
        batch_size=getattr(args, 'validation_batch_size', None) or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **loader_kwargs(args, data_config, accelerator),
    )
