"""Data sets: timm's, checked before work begins."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset
from timm.data.dataset_factory import (
    _search_split,
)  # which folder it takes for a split depends on the order of its names
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset

from timm_multiexit.data.digits import DIGITS, DigitsReader
from timm_multiexit.data.folders import FolderTree, check_linked_twice, read_folders
from timm_multiexit.utils.errors import (
    DataError,
    InvalidValueError,
    MissingFileError,
    brief,
    is_integer,
    one_line,
)

_logger = logging.getLogger(__name__)

BAD_IMAGES = ('skip', 'stop')

# What Pillow raises for damaged files, found by damaging 24,000 of them in seven formats; the last two in AVIF and QOI.
_READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, RuntimeError, IndexError)

# Pillow's modes of 8-bit pixels that timm's loaders take -> channels.
_CHANNELS = {'L': 1, 'LA': 2, 'RGB': 3, 'YCbCr': 3, 'LAB': 3, 'HSV': 3, 'RGBA': 4, 'RGBX': 4, 'CMYK': 4}

# Names of data sets that are read from class folders, links followed.
_FOLDERS = ('', 'torch/folder', 'torch/image_folder')

# timm takes every other name for that of a folder.
_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')

# Names that timm takes for one another where a folder holds its splits as folders.
_SPLIT_FOLDERS = ({'train', 'training'}, {'val', 'valid', 'validation', 'eval', 'evaluation'}, {'test'})


class BadImageError(DataError):
    """An image that cannot be read; the message is one line also when it comes out of a loader's worker."""

    def __init__(self, message: str):
        # torch raises a worker's error anew with the whole traceback as its message; the last line is what was said.
        super().__init__(message.strip().splitlines()[-1].split(f'{type(self).__name__}: ', 1)[-1])


class CheckedImages(ImageDataset):
    """A timm `ImageDataset` that names the files it cannot read, and leaves them out or stops.

    Args:
        dataset: Where reader, image mode and transforms are taken from.
        bad_images: 'skip' takes the next image instead, as timm does, and names a file once (per worker process);
            'stop' raises.
        cache: Keep decoded images in memory, in each process that reads them: width x height x channels bytes each.

    Raises:
        InvalidValueError: `bad_images` is something else.
        BadImageError: On reading, with 'stop', or when ten images in a row cannot be read (timm's
            TIMM_DATASET_MAX_RETRIES sets another number).
    """

    def __init__(self, dataset: ImageDataset, *, bad_images: str = 'skip', cache: bool = False):
        if bad_images not in BAD_IMAGES:
            raise InvalidValueError(f"--bad-images must be {' or '.join(BAD_IMAGES)}, got '{bad_images}'.")
        self._cache = cache
        same = ('reader', 'load_bytes', 'input_img_mode', 'transform', 'target_transform', 'additional_features')
        super().__init__('', **{name: getattr(dataset, name) for name in same})
        self.bad_images = bad_images
        self._named: set[str] = set()

    @property
    def reader(self) -> Any:
        """Where files come from; another one (a held-out part has its own) begins with nothing decoded."""
        return self._reader

    @reader.setter
    def reader(self, reader: Any) -> None:
        self._reader = reader
        self._decoded: dict[int, tuple[Any, ...]] | None = {} if self._cache else None

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, target, *features = self._read_next(index)
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1  # timm's mark of a missing label
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)

    def _read_next(self, index: int) -> tuple[Any, ...]:
        """Return the image at the index, or with 'skip' the first after it that can be read, and its labels."""
        if index >= len(self.reader):
            raise IndexError(f'There are {len(self.reader)} images, got the index {index}.')  # ends an iteration
        for _ in range(self._max_retries):
            try:
                return self._read(index)
            except _READ_ERRORS as error:
                name, reason = self._name(index), _reason(error)
                if self.bad_images == 'stop':
                    raise BadImageError(
                        f'Cannot read image {name}: {reason}. Remove or repair it, or use --bad-images skip.'
                    ) from error
                if name not in self._named:
                    self._named.add(name)
                    _logger.warning(f'Cannot read image {name}, skipped: {reason}')
                index = (index + 1) % len(self.reader)
        raise BadImageError(f'Cannot read {self._max_retries} images in a row, the last is {name}: {reason}.')

    def _read(self, index: int) -> tuple[Any, ...]:
        if self._decoded is None or self.load_bytes:
            return self._decode(index)
        if index not in self._decoded:
            self._decoded[index] = self._decode(index)
        image, *labels = self._decoded[index]
        return image.copy(), *labels  # a transform may change it in place

    def _decode(self, index: int) -> tuple[Any, ...]:
        file, *labels = self.reader[index]
        with file:
            if self.load_bytes:
                return file.read(), *labels
            opened = Image.open(file)
            opened.load()  # reads to the end: a file that was cut short shows itself here
            image = _to_8_bits(opened)
            return image.convert(self.input_img_mode) if self.input_img_mode else image, *labels

    def _name(self, index: int) -> str:
        return ' '.join(str(self.filename(index, absolute=True) or f'image {index}').splitlines())


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits in 8; Pillow itself would make white of all above 255.

    Raises:
        DataError: Its pixels are floats or 32-bit integers.
    """
    if image.mode.startswith('I;16'):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        kind = 'floats' if image.mode == 'F' else '32-bit integers'
        raise DataError(f'its pixels are {kind} of an unknown range: save it with 8 or 16 bits')
    return image


def choose_image_mode(given: str | None, in_chans: int) -> str:
    """Return Pillow's mode of the images of a model with so many channels, where a flag gives one or not.

    >>> choose_image_mode(None, 1), choose_image_mode('HSV', 3)
    ('L', 'HSV')

    Raises:
        InvalidValueError: Not such a mode, or one of another number of channels.
    """
    if given is None and in_chans in (1, 3):
        return 'L' if in_chans == 1 else 'RGB'
    modes = [mode for mode, channels in _CHANNELS.items() if channels == in_chans]
    if not modes:
        raise InvalidValueError(f'--in-chans must be 1 to 4, the channels of image files, got {in_chans}.')
    if given is None:
        raise InvalidValueError(f'--in-chans {in_chans} needs --input-img-mode {" or ".join(modes)}.')
    if given not in _CHANNELS:
        raise InvalidValueError(
            f"--input-img-mode must be one of {', '.join(_CHANNELS)}, got '{given}'. Images of 16 bits are scaled to 8."
        )
    if given not in modes:
        raise InvalidValueError(
            f'--input-img-mode {given} has {_CHANNELS[given]} channels, and the model takes {in_chans}: give'
            f' {" or ".join(modes)}, or --in-chans {_CHANNELS[given]}.'
        )
    return given


def check_augmentation(dataset: Any, augmentation: Mapping[str, Any]) -> None:
    """Raise for an augmentation that does not take images of the data set's mode.

    `augmentation` are keywords of `timm.data.create_loader`.

    Raises:
        InvalidValueError: Pillow cannot do it with this mode.
    """
    mode = getattr(dataset, 'input_img_mode', None)
    if mode not in _CHANNELS or mode in ('L', 'RGB') or augmentation.get('no_aug'):
        return
    flags = {'auto_augment': '--aa', 'grayscale_prob': '--grayscale-prob'}
    if mode in ('LAB', 'HSV'):
        flags['color_jitter'] = '--color-jitter'
    for name, flag in flags.items():
        if augmentation.get(name):
            hint = 'Give --color-jitter 0' if name == 'color_jitter' else f'Leave out {flag}'
            raise InvalidValueError(f'{flag} takes images of mode L or RGB, got --input-img-mode {mode}. {hint}.')


def _check_pixels(dataset: CheckedImages) -> None:
    """Raise if the first image cannot be used for what its pixels are; one that is broken is left to the loaders."""
    try:
        file, *_ = dataset.reader[0]
        with file, Image.open(file) as image:
            mode, is_wide = image.mode, image.mode in ('I', 'F')
    except _READ_ERRORS:
        return
    if is_wide:
        raise DataError(
            f'{dataset.filename(0, absolute=True) or "The first image"} has pixels of mode {mode}, floats or 32-bit'
            ' integers of an unknown range: save the images with 8 or 16 bits.'
        )


def _reason(error: Exception) -> str:
    # Pillow's own words name an address in memory.
    return 'it is not an image' if isinstance(error, UnidentifiedImageError) else one_line(error)


def create_checked_dataset(
    name: str, *, root: str | None, split: str, bad_images: str = 'skip', cache: bool = False, **kwargs: Any
) -> Any:
    """Return a data set: 'digits', or what `timm.data.create_dataset` makes of the name.

    Args:
        name: 'digits', a timm name such as 'torch/cifar10', or '' for a folder of class folders.
        root: Folder of the data.
        split: Name of the split, and of its folder.
        bad_images: 'skip' or 'stop', see `CheckedImages`; torchvision's data sets stop always.
        cache: Keep decoded images, see `CheckedImages`.
        **kwargs: For `timm.data.create_dataset`.

    Raises:
        MissingFileError: The folder is missing.
        DataError: The folder holds no images, a class has none, or the data set cannot be created.
        InvalidValueError: An option does not go with the data set.
    """
    if name == DIGITS:
        digits = ImageDataset('', reader=DigitsReader(split), input_img_mode=kwargs.get('input_img_mode') or 'RGB')
        return CheckedImages(digits, bad_images=bad_images, cache=cache)
    tree = _check_folders(name, root, split, kwargs.get('input_key'))
    dataset = _create_dataset(name, root, split, kwargs)
    if isinstance(dataset, IterableDataset) and bad_images == 'stop':
        raise InvalidValueError(f"'{name}' is a stream, which cannot stop at a bad image: use --bad-images skip.")
    if cache and not isinstance(dataset, ImageDataset):
        raise InvalidValueError(f"'{name}' does not read image files: leave --cache-images out.")
    if tree is not None and isinstance(getattr(dataset, 'reader', None), ReaderImageFolder):
        _check_classes_of_folders(dataset.reader, tree, kwargs.get('class_map'))
    if not isinstance(dataset, ImageDataset):
        return dataset
    images = CheckedImages(dataset, bad_images=bad_images, cache=cache)
    if tree is not None:
        _check_pixels(images)
    return images


def _check_folders(name: str, root: str | None, split: str, input_key: str | None) -> FolderTree | None:
    """Return the folders that timm will read, None for a data set that is not made of folders; they are checked."""
    prefix, separator, _ = name.partition('/')
    if name and not (separator and prefix.lower() in _PREFIXES):
        raise InvalidValueError(
            f"--dataset must be {DIGITS} or TYPE/NAME, TYPE one of {', '.join(_PREFIXES)}, got '{name}'. Leave it out"
            ' for a folder of class folders.'
        )
    if not name:
        if not root or not os.path.isdir(root):
            raise MissingFileError(
                f"Data folder '{root or ''}' does not exist: give one that holds {split}/CLASS/*.jpg."
            )
        _check_split(Path(root), split)
    if name.lower() not in _FOLDERS or not root or not os.path.isdir(root):
        return None
    return read_folders(_search_split(root, split), input_key.split(';') if input_key else None)


def _create_dataset(name: str, root: str | None, split: str, kwargs: dict[str, Any]) -> Any:
    try:
        return create_dataset(name, root=root, split=split, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError, ImportError) as error:
        # timm takes a name that it does not know for that of a folder: without one it raises TypeError.
        reason = ('' if isinstance(error, TypeError) else str(error).rstrip('.')) or 'timm has no reader of that name'
        if isinstance(error, ImportError):
            reason += '; install the package'
        raise DataError(f"No data set '{name or root}', split '{split}': {reason}.") from error


def _check_classes_of_folders(reader: ReaderImageFolder, tree: FolderTree, class_map: Any) -> None:
    # With a --class-map the numbers of the classes do not depend on which folders hold images.
    if class_map:
        _check_class_map(reader, tree, class_map)
    else:
        _check_class_folders(reader, tree)
    check_linked_twice(folder for folder in tree.num_images if _label(folder, reader) in reader.class_to_idx)


def _check_class_folders(reader: ReaderImageFolder, tree: FolderTree) -> None:
    """Raise if a class folder holds no images: timm leaves it out, and the classes after it get other numbers."""
    pending = [reader.root]
    while pending:
        folder = pending.pop()
        below = tree.below[folder]
        name = os.path.basename(folder)
        if not below and name not in reader.class_to_idx:
            raise DataError(
                f"Class '{name}' in {os.path.dirname(folder)} has no images: add some, or remove the folder."
            )
        pending += [path for path in reversed(below) if path not in tree.num_images]


def _check_class_map(reader: ReaderImageFolder, tree: FolderTree, class_map: Any) -> None:
    """Raise if a class map does not number classes, and say how many images have classes that it does not name."""
    for name, idx in reader.class_to_idx.items():
        if not is_integer(idx, least=0):
            raise DataError(f"--class-map must have an index >= 0 for each class, got {brief(idx)} for '{name}'.")
    left_out = {
        folder: num for folder, num in tree.num_images.items() if _label(folder, reader) not in reader.class_to_idx
    }
    if left_out:
        names = sorted({_label(folder, reader) for folder in left_out})
        more = ', ...' if len(names) > 3 else ''
        _logger.warning(
            f'{sum(left_out.values())} of the {tree.num_images.total()} images in {reader.root} are left out:'
            f' {len(names)} of their classes ({", ".join(names[:3])}{more}) are not in the --class-map {class_map}.'
        )


def _label(folder: str, reader: ReaderImageFolder) -> str:
    """Return the class of the images in a folder; those in the root itself have the empty name, as in timm."""
    return '' if folder == reader.root else os.path.basename(folder)


def is_same_split(one: str, other: str) -> bool:
    """Return whether two names of splits mean the same images of a folder.

    >>> is_same_split('val', 'validation'), is_same_split('train[:90%]', 'train[90%:]')
    (True, False)
    """
    return one == other or any({one, other} <= names for names in _SPLIT_FOLDERS)


def _check_split(root: Path, split: str) -> None:
    """Raise if timm would take the whole folder, all splits together, for a split that is not there."""
    split = split.split('[')[0]
    try:
        folders = {path.name for path in root.iterdir() if path.is_dir()}
    except OSError as error:
        raise DataError(f'Cannot read folder {root}: {one_line(error)}.') from error
    synonyms = next((names for names in _SPLIT_FOLDERS if split in names), {split})
    others = sorted(folders & set().union(*_SPLIT_FOLDERS))
    if others and not folders & {*synonyms, split}:
        raise DataError(f"split of {root} must be one of {', '.join(others)}, got '{split}'.")


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Return class name -> index of a data set, None where it does not say."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        for name in ('class_to_idx', 'class_name_to_idx'):  # the second is that of timm's reader of tar files
            if getattr(owner, name, None):
                return dict(getattr(owner, name))
    return None


def class_names(dataset: Any, num_classes: int) -> list[str] | None:
    """Return the names of a model's classes in order, None where the data set does not name each of them.

    >>> class_names(DigitsReader('test'), 10)[3]
    '3'
    """
    names = sorted((idx, name) for name, idx in (class_to_idx(dataset) or {}).items())
    return [name for _, name in names] if [idx for idx, _ in names] == list(range(num_classes)) else None


def check_classes(train: Any, val: Any | None) -> int | None:
    """Return the number of classes of the training set, None where it does not say.

    Raises:
        DataError: Another split numbers its classes differently, so that its accuracy would be meaningless.
    """
    classes = class_to_idx(train)
    if classes is None:
        return None
    other = None if val is None else class_to_idx(val)
    if other is not None and other != classes:
        odd = sorted(set(other.items()) ^ set(classes.items()))[0][0]
        raise DataError(
            f'Splits must have the same classes, got {len(classes)} in the training split and {len(other)} in the'
            f" other; '{odd}' differs. Give both the same class folders, or a --class-map."
        )
    return max(classes.values()) + 1
