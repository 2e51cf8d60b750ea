"""Files from untrusted places: JSON, YAML and the headers of safetensors, read without trusting them.

Nothing here runs code from a file, and no memory is allocated for what a file claims.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import yaml

from timm_multiexit.utils.errors import CheckpointError, MissingFileError, brief, one_line

_MAX_JSON_BYTES = 4 * 2**20  # Python's objects take many times that
_MAX_YAML_BYTES = 2**18  # read at some 100 KB per second
_MAX_YAML_VALUES = 50_000
_LFS_POINTER = b'version https://git-lfs.github.com/spec/'
_MAX_HEADER_BYTES = 4 * 2**20  # some 30,000 tensors


def check_contained(path: Path) -> None:
    """Raise `CheckpointError` for a link that leaves the file's folder, or, in the Hub's cache, the repository."""
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(f'{path} cannot be read: {one_line(error)}.') from error
    homes = [folder]
    if folder.parent.name == 'snapshots':
        # A repository's own, and what Xet has stored once for all repositories.
        repository = folder.parent.parent
        homes += [repository / 'blobs', repository.parent / 'blobs']
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(f'{path} must be a file in its folder, got a link that leaves it: put a copy there.')


def check_pointer(path: Path) -> None:
    """Raise `CheckpointError` for what git-LFS leaves in place of a large file that was not fetched."""
    with path.open('rb') as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise CheckpointError(f'{path} is a git-LFS pointer and holds no weights: run `git lfs pull` in {path.parent}.')


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MissingFileError: The folder is missing.
        CheckpointError: The file is missing, larger than 4 MB, not JSON, nested too deeply, or has duplicate keys, NaN
            or infinities, or anything but an object at its root.
    """
    if not os.path.isdir(path.parent):  # pathlib raises for names that are too long
        raise MissingFileError(f'{path.parent} is not a model folder: it does not exist.')
    try:
        check_contained(path)
        if not path.is_file():
            raise CheckpointError(f'{path.parent} is not a model folder: it has no {path.name}.')
        check_pointer(path)
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f'{path} must have at most {_MAX_JSON_BYTES} bytes, got {size}.')
        values = json.loads(
            path.read_text(encoding='utf-8'),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = 'it is nested too deeply' if isinstance(error, RecursionError) else one_line(error)
        raise CheckpointError(f'{path} cannot be read: {reason}.') from error
    if not isinstance(values, dict):
        raise CheckpointError(f'{path} must hold a JSON object, got {brief(values)}.')
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f'the key {brief(counts.most_common(1)[0][0])} occurs twice')
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not a finite number')


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text[:40]} is out of the range of floats')
    return value


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML file of flags; {} for an empty one.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: It cannot be read, is larger than 256 KB, not YAML, nested too deeply, has a key twice, or
            aliases that stand for too many values, or holds anything but a mapping.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_YAML_BYTES:
            raise CheckpointError(f'{path} must have at most {_MAX_YAML_BYTES} bytes, got {size}.')
        loader = yaml.SafeLoader(path.read_text(encoding='utf-8'))
        node = loader.get_single_node()
        if node is not None:
            _count_values(node, {})
        values = {} if node is None else loader.construct_document(node)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f'{path} cannot be read: {one_line(error)}.') from error
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = 'it is nested too deeply' if isinstance(error, RecursionError) else one_line(error)
        raise CheckpointError(f'{path} must be a YAML file: {reason}.') from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise CheckpointError(f'{path} must be a mapping of flag names to values, got {brief(values)}.')
    return values


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int | None]) -> int:
    """Return how many values a node stands for where its aliases are written out, each node visited once."""
    if node in counts:
        known = counts[node]
        if known is None:
            raise ValueError(f'an alias in line {node.start_mark.line + 1} is part of what it stands for')
        return known
    counts[node] = None
    items: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        items = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        items = [item for pair in node.value for item in pair]
    counts[node] = count = 1 + sum(_count_values(item, counts) for item in items)
    if count > _MAX_YAML_VALUES:
        raise ValueError(f'it has more than {_MAX_YAML_VALUES} values, aliases written out')
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise ValueError(f'the key {brief(key.value)} occurs twice, in line {key.start_mark.line + 1} again')
            seen.add((key.tag, key.value))


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor in a file, the dtype as safetensors names it: 'F32', 'BF16', 'I64', ..."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return which tensors a safetensors file has, without reading them.

    Raises:
        CheckpointError: The file is missing, not a safetensors file, or git-LFS's pointer to one.
    """
    check_contained(path)
    if not path.is_file():
        raise CheckpointError(f'{path.parent} has no {path.name}, the only file that weights are read from.')
    try:
        check_pointer(path)
        with path.open('rb') as file:
            start = file.read(8)
        size = int.from_bytes(start[:8], 'little')
        if size > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f'{path} cannot be read: its header must have at most {_MAX_HEADER_BYTES} bytes, got {size}.'
            )
        with safetensors.safe_open(path, framework='pt') as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{path} cannot be read: {one_line(error)}.') from error
