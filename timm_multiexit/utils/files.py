"""Files that are there whole or not at all, and one line where the disk refuses them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from timm_multiexit.utils.errors import MultiExitError, one_line

# What to do where the disk refuses: in a run of training, and elsewhere.
RESUME = 'make room and go on (train.py: --resume auto)'

RUN_AGAIN = 'make room, then go on or run it again'


class explain_disk_errors:  # noqa: N801 - reads as a statement
    """Turns a full or unwritable disk into one line.

    Args:
        path: What is written.
        draft: A part that was written, to be removed then.
        advice: What to do then.
    """

    def __init__(self, path: str | os.PathLike, draft: str | os.PathLike | None = None, *, advice: str = RESUME):
        self.path = Path(path)
        self.draft = draft and Path(draft)
        self.advice = advice

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Raise `MultiExitError` for what the disk refused."""
        cause = error
        # torch's writer raises RuntimeError when the file object refuses.
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        if isinstance(cause, (OSError, SafetensorError)):
            if self.draft:
                with suppress(OSError):
                    self.draft.unlink()
            raise MultiExitError(
                f'{self.path} could not be written: {one_line(cause)}. What was there before is whole: {self.advice}.'
            ) from error


@contextmanager
def replacing(path: str | os.PathLike, *, advice: str = RUN_AGAIN) -> Iterator[Path]:
    """Give a hidden name beside `path`; what is written there takes its place at the end, if nothing raised.

    Args:
        path: What is written.
        advice: What to do if it cannot be.

    Raises:
        MultiExitError: The disk is full or cannot be written.
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


def write_text(path: str | os.PathLike, text: str, *, advice: str = RUN_AGAIN) -> None:
    """Write a text file, whole or not at all; see `replacing`.

    Raises:
        MultiExitError: The disk is full or cannot be written.
    """
    with replacing(path, advice=advice) as draft:
        draft.write_text(text, encoding='utf-8')


@contextmanager
def new_folder(path: str | os.PathLike, mark: str) -> Iterator[Path]:
    """Give an empty folder beside `path`, which takes its place at the end, if nothing raised.

    Args:
        path: What is there must be empty or have the file `mark`, which says that it may be replaced.
        mark: Name of a file.

    Raises:
        MultiExitError: There is something else, or the disk is full or cannot be written.
    """
    path = Path(path).absolute()
    draft = path.with_name(f'.{path.name}.new')
    try:
        with explain_disk_errors(path, advice=RUN_AGAIN):
            holds_others = path.exists() and (not path.is_dir() or any(path.iterdir())) and not (path / mark).is_file()
            if holds_others or path == Path.cwd():
                raise MultiExitError(f'{path} holds other files or is in use: give another folder.')
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            shutil.rmtree(path, ignore_errors=True)
            draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_output(path: Path, content: bytes) -> None:
    """Write a result, whole or not at all.

    Raises:
        MultiExitError: The disk is full or cannot be written.
    """
    with replacing(path, advice='what was found is printed above; make room or give another path') as draft:
        draft.write_bytes(content)
