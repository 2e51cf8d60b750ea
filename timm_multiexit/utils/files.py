"""Files that are written whole or not at all, and one line where the disk is full or not writable."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from timm_multiexit.utils.errors import DiskError, InvalidValueError, MultiExitError, one_line

# What to do when a file cannot be written: in training, and elsewhere.
RESUME = 'free disk space and resume (train.py: --resume auto)'

RUN_AGAIN = 'free disk space, then run it again'


@contextmanager
def explain_disk_errors(
    path: str | os.PathLike[str], draft: str | os.PathLike[str] | None = None, *, advice: str = RESUME
) -> Iterator[None]:
    """Turn errors of writing `path` into one line with advice; a partly written `draft` is removed.

    Raises:
        DiskError: The disk is full or not writable.
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
        reason = one_line(cause)
        raise DiskError(f'{path} could not be written: {reason}. The previous content is intact: {advice}.') from error


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


@contextmanager
def new_folder(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces `path` at the end, if nothing was raised.

    An existing folder must be empty or have a file of the name `mark`, which says that it may be replaced.

    Raises:
        InvalidValueError: There is something else at `path`.
        DiskError: The disk is full or not writable.
    """
    path = Path(path).absolute()
    draft = path.with_name(f'.{path.name}.new')
    try:
        with explain_disk_errors(path, advice=RUN_AGAIN):
            holds_others = path.exists() and (not path.is_dir() or any(path.iterdir())) and not (path / mark).is_file()
            if holds_others or path == Path.cwd():
                raise InvalidValueError(f'{path} holds other files or is in use: give another folder.')
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            shutil.rmtree(path, ignore_errors=True)
            draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_output(path: Path, content: bytes) -> None:
    """Write a result, whole or not at all."""
    with replacing(path, advice='the results are printed above; free disk space or give another path') as draft:
        draft.write_bytes(content)


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
