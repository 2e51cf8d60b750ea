"""Files that are written whole or not at all, and one line where the disk refuses them."""

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from timm_multiexit.utils.errors import DiskError, InvalidValueError, MultiExitError, StateError, one_line

# What to do once a file can be written: in training, and elsewhere.
RESUME = 'then resume by --resume auto'

RUN_AGAIN = 'then run it again'

# What Python writes beside a module that is imported, and what a kill leaves of a file that is being written.
_LEFTOVERS = ('__pycache__/*', '*/__pycache__/*', '.*.tmp', '*/.*.tmp')

# What keeps a file from being written, by the system's number, and what helps.
_FULL = 'free disk space'
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), 'make it writable or name another folder'),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), 'name another folder, there is a file where one must be'),
    errno.EISDIR: 'name another file, there is a folder where it must be',
    errno.ENOENT: 'make its folder, which is gone',
    errno.ENAMETOOLONG: 'give a shorter name',
}


@contextmanager
def explain_disk_errors(
    path: str | os.PathLike[str], draft: str | os.PathLike[str] | None = None, *, advice: str = RESUME
) -> Iterator[None]:
    """Turn errors of writing `path` into one line, with what helps and what to do `advice` afterwards.

    A partly written `draft` is removed.

    Raises:
        DiskError: The disk is full or not writable, or the path is not one that can be written.
    """
    try:
        yield
    except MultiExitError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        cause: BaseException | None = error
        # torch's writer raises RuntimeError when the file object does.
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        if draft:
            with suppress(OSError):
                Path(draft).unlink()
        intact = '. The previous content is intact:' if os.path.isfile(path) or draft else ';'
        raise DiskError(
            f'{path} could not be written: {one_line(cause)}{intact} {_remedy(cause)}, {advice}.'
        ) from error


def _remedy(error: OSError | SafetensorError) -> str:
    number = getattr(error, 'errno', None)
    if number is None:  # safetensors' errors are text alone
        found = re.search(r'os error (\d+)', str(error))
        number = int(found.group(1)) if found else errno.ENOSPC
    return _REMEDIES.get(number, 'see to the disk')


@contextmanager
def replacing(path: str | os.PathLike[str], *, advice: str = RUN_AGAIN) -> Iterator[Path]:
    """Yield a hidden name beside `path`; what is written there replaces `path` at the end, if nothing was raised.

    Raises:
        DiskError: The disk is full or not writable.
    """
    path = Path(path)
    draft = path.with_name(f'.{path.name}.tmp')
    try:
        with explain_disk_errors(path, advice=advice):
            yield draft
            os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, advice: str = RUN_AGAIN) -> None:
    """Write a text file, whole or not at all; see `replacing`."""
    with replacing(path, advice=advice) as draft:
        draft.write_text(text, encoding='utf-8')


def check_new_folder(path: str | os.PathLike[str], marks: Collection[str], owned: Collection[str]) -> None:
    """Raise unless `new_folder` may write there.

    Raises:
        InvalidValueError: There is something else at `path`, or a file where one of its folders must be.
    """
    path = Path(path).absolute()
    existing = next(each for each in (path, *path.parents) if os.path.exists(each))
    if not existing.is_dir():
        raise InvalidValueError(f'{path} must be a folder, got the file {existing}. Give another folder.')
    if path == Path.cwd():
        raise InvalidValueError(f'{path} must not be the working directory. Give another folder.')
    if existing == path:
        names = (each.relative_to(path).as_posix() for each in path.rglob('*') if not each.is_dir())
        known = (*owned, *_LEFTOVERS) if all((path / mark).is_file() for mark in marks) else _LEFTOVERS
        if other := next((name for name in names if not any(fnmatchcase(name, each) for each in known)), None):
            raise InvalidValueError(f'{path} holds other files, such as {other}: give another folder.')


@contextmanager
def new_folder(path: str | os.PathLike[str], marks: Collection[str], owned: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces `path` at the end, if nothing was raised.

    Args:
        path: May be a folder that was written so before, and is left as it was if this fails.
        marks: Files that are in every such folder, by which it is known.
        owned: Patterns of all files that may be in one, the marks too; a star is any text. A folder that has another
            file, or lacks a mark, is not replaced.

    Raises:
        InvalidValueError: There is something else at `path`, see `check_new_folder`.
        DiskError: The disk is full or not writable.
    """
    path = Path(path).resolve() if os.path.islink(path) else Path(path).absolute()
    draft = path.with_name(f'.{path.name}.new')
    try:
        with explain_disk_errors(path, advice=RUN_AGAIN):
            check_new_folder(path, marks, owned)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            _swap(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, path: Path) -> None:
    """Put a folder in the place of another one, or leave that there."""
    if not path.exists():
        draft.rename(path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.'))
    old = aside / path.name
    try:
        path.rename(old)
        draft.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)  # if this fails too, it stays where it is
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_output(path: Path, content: bytes) -> None:
    """Write a result, whole or not at all."""
    with replacing(path, advice='the results are printed above') as draft:
        draft.write_bytes(content)


def lock_file(path: Path) -> IO[str] | None:
    """Return a file that no other process can lock until this one closes it or ends, however it ends.

    None where the system or the file system has no such locks. They are not inherited by processes that load data,
    which outlive a killed run by seconds, and network file systems know them.

    Raises:
        StateError: Another process has it, on this machine or another.
        OSError: The file cannot be written.
    """
    if sys.platform == 'win32':
        return None
    import fcntl

    file = path.open('a+', encoding='utf-8', errors='replace')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = one_line(file.read(200)) or 'of an unknown number'
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise StateError(
                f'{path.parent} is in use by another process, {owner}: wait until it ends, or name another folder.'
            ) from error
        return None
    file.truncate(0)
    file.write(f'{os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
