"""Which files may go to the Hugging Face Hub or come from it, and what tells two of them apart."""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from timm_multiexit.utils.errors import MultiExitError

# What a publication writes, and so may delete in a repository; everything else there is its owner's.
OWNED_FILES = (
    'README.md',
    'args.yaml',
    'assets/accuracy_vs_macs.png',
    'config.json',
    'exits.safetensors',
    'metrics.json',
    'model.safetensors',
)

# What each publication has, and together no repository of anybody else's.
_MARKS = ('exits.safetensors', 'metrics.json')

# What the website puts into a new repository.
_OF_NEW = ('README.md', 'LICENSE')

# Formats that can hold pickles, which run code where they are read.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle', '.tar', '.npz')

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')


class RemoteFile(NamedTuple):
    """A file of a repository.

    Attributes:
        size: Bytes.
        digest: See `digest`.
        is_large: Whether it is stored apart from git.
    """

    size: int
    digest: str
    is_large: bool


class Change(NamedTuple):
    """What a push does with one file.

    Attributes:
        path: Path in the repository, with slashes.
        action: 'add', 'update', 'delete' or 'keep'.
        size: Bytes; of a file to delete, those it has there.
    """

    path: str
    action: str
    size: int


def check_file_name(name: str) -> None:
    """Raise `MultiExitError` unless this is a plain file name, of a format that holds no code.

    >>> check_file_name('model.safetensors')
    """
    if not _NAME.fullmatch(name):
        raise MultiExitError(
            f"File name {name!r} is not taken: allowed are letters and digits, and '.', '_', '-' after them."
        )
    if name.lower().endswith(PICKLES):
        raise MultiExitError(f"'{name}' is of a format that may hold code: give or write safetensors.")


def local_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and its folders that are not hidden, by their path in it with slashes.

    Raises:
        MultiExitError: There is no such folder or no publication in it, a file may hold code or has a name that is not
            taken, a link leads out of the folder or to another folder, something cannot be read.
    """
    if not folder.is_dir():
        raise MultiExitError(f'{folder} is no folder: give one that a publication was written to.')
    root = folder.resolve()
    files = {}
    try:
        for parent, names, file_names in os.walk(root, onerror=_raise):
            names[:] = [name for name in names if not name.startswith('.')]
            links = [name for name in names if Path(parent, name).is_symlink()]  # a walk does not follow them
            for path in (Path(parent, name) for name in links + file_names if not name.startswith('.')):
                files[path.relative_to(root).as_posix()] = _resolve(path, root)
    except (OSError, RuntimeError) as error:  # of links in a circle: RuntimeError before Python 3.13
        raise MultiExitError(f'{folder} cannot be read: {error}.') from error
    if not files:
        raise MultiExitError(f'{folder} has no files to push: give one that a publication was written to.')
    missing = [name for name in _MARKS if name not in files]
    if missing:
        raise MultiExitError(f'{folder} has no {missing[0]}: give one that a publication was written to.')
    return files


def check_owned(repo_id: str, paths: Collection[str]) -> None:
    """Raise `MultiExitError` unless a repository is new, or holds a publication.

    >>> check_owned('org/net', ['.gitattributes', 'LICENSE'])
    """
    others = sorted(path for path in paths if not path.startswith('.') and path not in _OF_NEW)
    if others and not set(_MARKS) <= set(others):
        more = f' and {len(others) - 3} more' if len(others) > 3 else ''
        raise MultiExitError(
            f"'{repo_id}' holds {', '.join(others[:3])}{more} and no model that timm_multiexit published, so nothing is"
            ' pushed to it: choose another name, or empty it first.'
        )


def compare(files: Mapping[str, Path], remote: Mapping[str, RemoteFile]) -> tuple[Change, ...]:
    """Return what makes a repository hold the files of a folder, by path.

    Args:
        files: Of the folder, by their path in it.
        remote: Of the repository, by path.

    Raises:
        OSError: A file cannot be read.
    """
    gone = [path for path in OWNED_FILES if path in remote and path not in files]
    changes = [Change(path, 'delete', remote[path].size) for path in gone]
    for path, file in files.items():
        action = 'add' if path not in remote else 'keep' if _is_same(file, remote[path]) else 'update'
        changes.append(Change(path, action, file.stat().st_size))
    return tuple(sorted(changes))


def _is_same(file: Path, remote: RemoteFile) -> bool:
    """Return whether a file has the bytes that the repository has; other sizes need no look at them."""
    return file.stat().st_size == remote.size and digest(file, is_large=remote.is_large) == remote.digest


def _resolve(path: Path, root: Path) -> Path:
    """Return the file that a path leads to."""
    target = path.resolve()
    for part in path.relative_to(root).parts:
        check_file_name(part)
    check_file_name(target.name)
    if not target.is_relative_to(root) or not target.is_file():
        raise MultiExitError(f'{path} leads out of {root} or to no file, so it is not pushed: copy or remove it.')
    return target


def _raise(error: OSError) -> None:
    raise error


def digest(file: Path, *, is_large: bool) -> str:
    """Return what the Hub tells of a file's content: SHA-256 of a large one (LFS), git's blob id of the others."""
    content = hashlib.sha256() if is_large else hashlib.sha1(b'blob %d\0' % file.stat().st_size)
    with file.open('rb') as stream:
        while chunk := stream.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()
