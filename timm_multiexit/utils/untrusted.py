"""Files that come from anywhere: JSON and the headers of safetensors, read without trusting them.

Nothing here runs code from a file, and no memory is taken by what a file claims.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from timm_multiexit.utils.errors import MultiExitError, brief, one_line

_MAX_JSON_BYTES = 4 * 2**20  # Python's objects take many times that

_LFS_POINTER = b'version https://git-lfs.github.com/spec/'

_MAX_HEADER_BYTES = 4 * 2**20  # some 30,000 tensors


def check_contained(path: Path) -> None:
    """Raise for a file that is a link to another place than its folder, or, in the Hub's cache, its blobs.

    Raises:
        MultiExitError: It is one.
    """
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise MultiExitError(f'{path} cannot be read: {one_line(error)}.') from error
    homes = [folder]
    if folder.parent.name == 'snapshots':
        # A repository's own, and what Xet has stored once for all repositories.
        repository = folder.parent.parent
        homes += [repository / 'blobs', repository.parent / 'blobs']
    if not any(target.is_relative_to(home) for home in homes):
        raise MultiExitError(f'{path} is a link that leaves its folder, allowed are files in it: put a copy there.')


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MultiExitError: There is no such file, it is larger than 4 MB, no JSON, nested too deeply, or has a key twice, a
            number that is none (NaN, infinities) or no object at its root.
    """
    try:
        check_contained(path)
        if not path.is_file():
            raise MultiExitError(f'{path.parent} is no model folder: it has no {path.name}.')
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise MultiExitError(f'{path} has {size} bytes, allowed are {_MAX_JSON_BYTES}.')
        values = json.loads(
            path.read_text(encoding='utf-8'),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
    except MultiExitError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = 'it is nested too deeply' if isinstance(error, RecursionError) else one_line(error)
        raise MultiExitError(f'{path} cannot be read: {reason}.') from error
    if not isinstance(values, dict):
        raise MultiExitError(f'{path} holds {brief(values)}, allowed is an object.')
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f'{brief(counts.most_common(1)[0][0])} is there twice')
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is no number')


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text[:40]} is no number that a float holds')
    return value


class TensorInfo(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: Its shape.
        dtype: In the words of safetensors: 'F32', 'BF16', 'I64', ...
    """

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, without reading its tensors.

    Raises:
        MultiExitError: There is no such file, it is none of safetensors, or git-LFS's pointer to one.
    """
    check_contained(path)
    if not path.is_file():
        raise MultiExitError(f'{path.parent} has no {path.name}, and weights are read from nothing else.')
    try:
        with path.open('rb') as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise MultiExitError(
                f'{path} is what git has in place of a large file, and holds no weights: run `git lfs pull` in'
                f' {path.parent}.'
            )
        size = int.from_bytes(start[:8], 'little')
        if size > _MAX_HEADER_BYTES:
            raise MultiExitError(
                f'{path} cannot be read: its header has {size} bytes, allowed are {_MAX_HEADER_BYTES}.'
            )
        with safetensors.safe_open(path, framework='pt') as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise MultiExitError(f'{path} cannot be read: {one_line(error)}.') from error
