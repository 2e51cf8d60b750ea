"""The class folders of a data set: links that timm would follow for ever, and what it leaves out without a word."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from timm.data import get_img_extensions

from timm_multiexit.utils.errors import DataError, one_line


@dataclass(frozen=True)
class FolderTree:
    """What is below a folder, links followed.

    Attributes:
        below: Folder -> the folders in it that are not hidden, sorted.
        num_images: Folder -> number of image files in it; folders without are left out.
    """

    below: dict[str, list[str]]
    num_images: Counter[str]


def read_folders(root: str | os.PathLike[str], types: Iterable[str] | None = None) -> FolderTree:
    """Return the folders below a folder, and itself.

    Args:
        root: The folder.
        types: Endings of image files, with the dot; timm's if not given.

    Raises:
        DataError: A link leads to a folder that it is in, or nowhere, or a folder cannot be read.
    """
    tree = FolderTree({}, Counter())
    types = set(types or get_img_extensions())
    top = os.fspath(root)
    pending: list[tuple[str, tuple[str, ...]]] = [(top, (os.path.realpath(top),))]
    while pending:
        folder, parents = pending.pop()
        found = []
        for entry in _list(folder):
            is_image = os.path.splitext(entry.name)[1].lower() in types
            if _is_folder(entry, is_image):
                found.append((entry.path, (*parents, _real_path(entry, parents))))
            elif is_image:
                tree.num_images[folder] += 1
        tree.below[folder] = sorted(path for path, _ in found if os.path.basename(path)[0] not in '._')
        pending += found
    return tree


def _list(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f'Cannot read folder {folder}: {one_line(error)}.') from error


def _is_folder(entry: os.DirEntry[str], is_image: bool) -> bool:
    try:
        is_folder = entry.is_dir()
        leads_nowhere = not is_folder and not is_image and entry.is_symlink() and not os.path.exists(entry.path)
    except OSError:  # a link to itself
        is_folder, leads_nowhere = False, not is_image
    if leads_nowhere:
        raise DataError(f'{entry.path} is a link to nothing that exists: repair or remove it.')
    return is_folder


def _real_path(entry: os.DirEntry[str], parents: tuple[str, ...]) -> str:
    if not entry.is_symlink():
        return os.path.join(parents[-1], entry.name)
    real = os.path.realpath(entry.path)
    if real in parents:
        raise DataError(f'{entry.path} is a link to {real}, a folder that it is in: remove it.')
    return real


def check_linked_twice(folders: Iterable[str]) -> None:
    """Raise if folders of images with other names, which are classes, are the same folder."""
    owners: dict[str, str] = {}
    for folder in sorted(folders):
        other = owners.setdefault(os.path.realpath(folder), folder)
        if Path(other).name != Path(folder).name:
            raise DataError(f'{other} and {folder} are the same folder, so its images would be of two classes.')
