"""Which files may be exchanged with the Hugging Face Hub, and what a push changes."""

import os
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub.utils.sha import git_hash

from timm_multiexit.utils.errors import CheckpointError, HubError, InvalidValueError, MissingFileError
from timm_multiexit.utils.files import sha256

# Where the Hub looks for results of benchmarks; the one hidden file that is pushed.
EVAL_RESULTS = '.eval_results/timm_multiexit.yaml'

# What a publication writes, and may therefore delete in a repository; everything else belongs to its owner. A star is
# any name, as the client reads it.
OWNED_FILES = (
    EVAL_RESULTS,
    'README.md',
    'args.yaml',
    'assets/accuracy_vs_macs.png',
    'config.json',
    'exits.safetensors',
    'metrics.json',
    'model.safetensors',
    'onnx/manifest.json',
    'onnx/runner.py',
    'onnx/conditional.onnx',
    'onnx/fixed/*.onnx',
    'onnx/stages/*.onnx',
    'onnx/int8/conditional.onnx',
    'onnx/int8/fixed/*.onnx',
    'onnx/int8/stages/*.onnx',
)

# Together these identify a publication.
_MARKS = ('exits.safetensors', 'metrics.json')

# What the website adds to a new repository.
_OF_NEW = ('README.md', 'LICENSE')

# Formats that can contain pickles, which run code when they are loaded.
PICKLES = ('.bin', '.pt', '.pt2', '.pth', '.ckpt', '.pkl', '.pickle', '.tar', '.npz')

_GIVE = 'give a folder that a publication was written to'
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')


def check_file_name(name: str) -> None:
    """Raise `InvalidValueError` unless this is a plain file name, of a format that cannot contain code.

    >>> check_file_name('model.safetensors')
    """
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            "File name must be made of letters, digits, '.', '_' and '-' and begin with a letter or digit,"
            f' got {name!r}.'
        )
    if name.lower().endswith(PICKLES):
        raise InvalidValueError(f"'{name}' has a format that can contain code: use safetensors.")


def check_file_path(path: str) -> None:
    """Raise `InvalidValueError` unless this is a relative path of plain names with slashes; see `check_file_name`.

    >>> check_file_path('onnx/manifest.json')
    """
    for name in path.split('/'):
        check_file_name(name)


def local_files(folder: Path) -> dict[str, Path]:
    """Return the files in a folder and its subfolders, by relative path with slashes, of hidden ones `EVAL_RESULTS`.

    Raises:
        MissingFileError: The folder does not exist.
        CheckpointError: It holds no publication, a link leads out of it or to another folder, or something cannot be
            read.
        InvalidValueError: See `check_file_name`.
    """
    if not folder.is_dir():
        raise MissingFileError(f'{folder} is not a folder: {_GIVE}.')
    root = folder.resolve()
    files = {}
    try:
        for parent, names, file_names in os.walk(root, onerror=_raise):
            names[:] = [name for name in names if not name.startswith('.')]
            links = [name for name in names if Path(parent, name).is_symlink()]  # a walk does not follow them
            for path in (Path(parent, name) for name in links + file_names if not name.startswith('.')):
                files[path.relative_to(root).as_posix()] = _resolve(path, root)
        if files and (root / EVAL_RESULTS).is_file():
            files[EVAL_RESULTS] = _resolve(root / EVAL_RESULTS, root)
    except (OSError, RuntimeError) as error:  # of links in a circle: RuntimeError before Python 3.13
        raise CheckpointError(f'Cannot read {folder}: {error}.') from error
    if not files:
        raise CheckpointError(f'{folder} has no files to push: {_GIVE}.')
    missing = [name for name in _MARKS if name not in files]
    if missing:
        raise CheckpointError(f'{folder} has no {missing[0]}: {_GIVE}.')
    return files


def check_owned(repo_id: str, paths: Collection[str]) -> None:
    """Raise `HubError` unless a repository is new or holds a publication.

    >>> check_owned('org/net', ['.gitattributes', 'LICENSE'])
    """
    others = sorted(path for path in paths if not path.startswith('.') and path not in _OF_NEW)
    if others and not set(_MARKS) <= set(others):
        more = f' and {len(others) - 3} more' if len(others) > 3 else ''
        raise HubError(
            f"'{repo_id}' holds {', '.join(others[:3])}{more}, not a model published by timm_multiexit, so nothing was"
            ' pushed: choose another name, or empty it first.'
        )


def is_owned(path: str) -> bool:
    """Return whether a publication writes a file of this path.

    >>> is_owned('onnx/fixed/exit_0.onnx'), is_owned('onnx/model.onnx')
    (True, False)
    """
    return any(fnmatchcase(path, pattern) for pattern in OWNED_FILES)


def compare(files: Mapping[str, Path], remote: Mapping[str, str]) -> dict[str, str]:
    """Return 'add', 'update', 'delete' or 'keep' for each file, by path.

    The client leaves unchanged files out by itself, but only once the push has begun. Known before, an unchanged folder
    sends nothing at all, a tag is refused in time, and a dry run says what would change.

    `remote` is path -> SHA-256 of large files (LFS), git's blob id of the others.
    """
    actions = {path: 'delete' for path in remote if is_owned(path)}
    for path, file in files.items():
        actions[path] = 'add' if path not in remote else 'keep' if _has_digest(file, remote[path]) else 'update'
    return dict(sorted(actions.items()))


def _has_digest(file: Path, digest: str) -> bool:
    return digest == (git_hash(file.read_bytes()) if len(digest) == 40 else sha256(file))


def _resolve(path: Path, root: Path) -> Path:
    """Return the file that a path leads to."""
    target = path.resolve()
    relative = path.relative_to(root)
    for part in () if relative.as_posix() == EVAL_RESULTS else relative.parts:
        check_file_name(part)
    check_file_name(target.name)
    if not target.is_relative_to(root) or not target.is_file():
        raise CheckpointError(f'{path} links to a file outside of {root} or to no file: copy or remove it.')
    return target


def _raise(error: OSError) -> None:
    raise error
