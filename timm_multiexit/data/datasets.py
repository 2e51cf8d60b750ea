"""Data sets: timm's, checked before work begins."""

import logging
import os
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset

from timm_multiexit.data.digits import DIGITS, DigitsReader
from timm_multiexit.utils.errors import DataError, InvalidValueError, MissingFileError, one_line

_logger = logging.getLogger(__name__)

BAD_IMAGES = ('skip', 'stop')

# What Pillow raises for damaged files, found by damaging 24,000 of them in seven formats.
_READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

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
            image = Image.open(file)
            image.load()  # reads to the end: a file that was cut short shows itself here
            return image.convert(self.input_img_mode) if self.input_img_mode else image, *labels

    def _name(self, index: int) -> str:
        return ' '.join(str(self.filename(index, absolute=True) or f'image {index}').splitlines())


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
    if not name:
        if not root or not Path(root).is_dir():
            raise MissingFileError(
                f"Data folder '{root or ''}' does not exist: give one that holds {split}/CLASS/*.jpg."
            )
        _check_split(Path(root), split)
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError, ImportError) as error:
        # timm takes a name that it does not know for that of a folder: without one it raises TypeError.
        reason = ('' if isinstance(error, TypeError) else str(error).rstrip('.')) or 'timm has no reader of that name'
        if isinstance(error, ImportError):
            reason += '; install the package'
        raise DataError(f"No data set '{name or root}', split '{split}': {reason}.") from error
    if isinstance(dataset, IterableDataset) and bad_images == 'stop':
        raise InvalidValueError(f"'{name}' is a stream, which cannot stop at a bad image: use --bad-images skip.")
    if cache and not isinstance(dataset, ImageDataset):
        raise InvalidValueError(f"'{name}' does not read image files: leave --cache-images out.")
    # With a --class-map the numbers of the classes do not depend on which folders hold images.
    if isinstance(getattr(dataset, 'reader', None), ReaderImageFolder) and not kwargs.get('class_map'):
        _check_class_folders(dataset.reader)
    if not isinstance(dataset, ImageDataset):
        return dataset
    return CheckedImages(dataset, bad_images=bad_images, cache=cache)


def _check_class_folders(reader: ReaderImageFolder) -> None:
    """Raise if a class folder holds no images: timm leaves it out, and the classes after it get other numbers."""
    filled = {os.path.dirname(path) for path, _ in reader.samples}
    pending = [reader.root]
    while pending:
        folder = pending.pop()
        try:
            below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in '._')
        except OSError as error:
            raise DataError(f'Cannot read folder {folder}: {_reason(error)}.') from error
        name = os.path.basename(folder)
        if not below and name not in reader.class_to_idx:
            raise DataError(
                f"Class '{name}' in {os.path.dirname(folder)} has no images: add some, or remove the folder."
            )
        pending += [path for path in reversed(below) if path not in filled]


def is_same_split(one: str, other: str) -> bool:
    """Return whether two names of splits mean the same images of a folder.

    >>> is_same_split('val', 'validation'), is_same_split('train[:90%]', 'train[90%:]')
    (True, False)
    """
    return one == other or any({one, other} <= names for names in _SPLIT_FOLDERS)


def _check_split(root: Path, split: str) -> None:
    """Raise if timm would take the whole folder, all splits together, for a split that is not there."""
    split = split.split('[')[0]
    folders = {path.name for path in root.iterdir() if path.is_dir()}
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
