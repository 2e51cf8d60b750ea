"""What a run leaves for the tables: one JSON file, without anything of the machine's folders."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evidence.plan import PlannedRun, to_command_line
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError, MissingFileError, one_line
from timm_multiexit.utils.files import RUN_AGAIN, explain_disk_errors, write_text

FORMAT = 1

_KEYS = ('name', 'protocol', 'data', 'network', 'method', 'seed', 'flags', 'classifiers', 'selection', 'seconds')


def collect_result(run: PlannedRun, folder: Path, *, seconds: float, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a finished run measured and how.

    Args:
        run: The run.
        folder: Where `train.py` wrote results.json and summary.csv.
        seconds: Wall time of all its starts.
        extra: Flags of the runner's caller.

    Returns:
        `classifiers` has a row per exit, main and the ensemble, on the split that is reported; `validation` a row per
        epoch, epochs from 0, on the images that the epoch was chosen on, with top-1 in training beside it, running over
        the epoch; `selection` says how; `flags` are all.

    Raises:
        CheckpointError: The files are missing or of another run.
    """
    try:
        files = RunFolder(folder)
        results = json.loads(files.results_path.read_text(encoding='utf-8'))
        epochs = files.read_summary()
        rows = results['rows']
        measured = {key: results[key] for key in ('split', 'num_samples', 'dataset', 'input_size', 'weights')}
        stamp = {key: results[key] for key in ('commit', 'versions', 'hardware', 'threads')}
        selection = {
            'by': results['epoch_chosen_by'],
            'on': results['epoch_chosen_on'],
            'epoch': results['best_epoch'],
            'epochs': results['epochs'],
            'is_reported_split': results['is_reported_split'],
        }
        is_same = (results['seed'], results['dataset']) == (run.seed, run.data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f'{folder} has no results of a finished run: {type(error).__name__} {error}.') from error
    if not is_same:
        raise CheckpointError(f'{folder} must be of {run.name}, got seed {results["seed"]} and {results["dataset"]}.')
    return {
        'format': FORMAT,
        **{key: getattr(run, key) for key in ('name', 'protocol', 'data', 'network', 'method', 'seed')},
        **measured,
        'classifiers': rows,
        'selection': selection,
        'validation': [_read_epoch(row) for row in epochs],
        'seconds': round(seconds, 1),
        **stamp,
        'command': describe_command(run, extra),
        'flags': run.flags,
        'extra': [_without_folder(word) for word in extra],
    }


def _read_epoch(values: dict[str, float]) -> dict[str, float]:
    kept = {
        key: value
        for key, value in values.items()
        # Accuracy in training, on augmented images and by weights that change, says how far the network fits.
        if key.startswith('eval_') or key in ('train_loss', 'lr') or re.fullmatch(r'train_(\w+_)?top1', key)
    }
    # JSON has no number for a loss that ran away.
    return {
        'epoch': values['epoch'],
        **{key: value if math.isfinite(value) else None for key, value in kept.items()},
    }


def describe_command(run: PlannedRun, extra: Sequence[str] = ()) -> str:
    """Return the command that trains the run from the root of the repository, with the data's folder beside it."""
    words = ['train.py', '--config', f'hub/recipes/{run.recipe.name}', '--data-dir', run.data]
    words += [*to_command_line(run.overrides), *map(_without_folder, extra)]
    return shlex.join(words)


def _without_folder(word: str) -> str:
    """Return a word of a command line; of an absolute path the last part alone."""
    flag, equals, value = word.rpartition('=')
    return f'{flag}{equals}{os.path.basename(value.rstrip("/"))}' if os.path.isabs(value) else word


def flags_that_matter(extra: Iterable[str]) -> list[str]:
    """Return what of the extra flags can change what is measured: how images are loaded cannot.

    >>> flags_that_matter(['--workers', '4', '--amp', '--pin-mem', '--lr', '0.2', '-j', '2', '--workers=3'])
    ['--amp', '--lr', '0.2']
    """
    kept, words = [], iter(extra)
    for word in words:
        if word in ('--workers', '-j'):
            next(words, None)
        elif word != '--pin-mem' and not word.startswith('--workers='):
            kept.append(_without_folder(word))
    return kept


def split_precision(flags: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return flags without those of automatic mixed precision, and those: which is fast depends on the hardware.

    >>> split_precision(['--lr', '0.2', '--amp', '--amp-dtype', 'bfloat16'])
    (['--lr', '0.2'], ['--amp', '--amp-dtype', 'bfloat16'])
    >>> split_precision(['--amp-dtype=bfloat16', '--amp'])
    ([], ['--amp', '--amp-dtype', 'bfloat16'])
    """
    rest, switch, dtype, words = [], [], [], iter(flags)
    for word in words:
        name, is_joined, value = word.partition('=')
        if name == '--amp-dtype':
            dtype = [name, *[value for value in [value if is_joined else next(words, None)] if value is not None]]
        elif word == '--amp':
            switch = [word]
        else:
            rest.append(word)
    return rest, switch + dtype


def result_path(folder: Path, run: PlannedRun) -> Path:
    """Return the file of a run's results."""
    return folder / f'{run.name}.json'


def write_result(folder: Path, run: PlannedRun, result: dict[str, Any]) -> None:
    """Write the file, whole or not at all.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    path = result_path(folder, run)
    with explain_disk_errors(path, advice=RUN_AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + '\n')


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a file of results.

    Raises:
        CheckpointError: It is not one, or a newer version's.
    """
    try:
        result = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise CheckpointError(f'Cannot read {path}: {one_line(error)}.') from error
    missing = [key for key in _KEYS if not isinstance(result, dict) or key not in result]
    if missing or result.get('format') != FORMAT:
        raise CheckpointError(
            f'{path} must be a file of results of format {FORMAT}. Remove it, or update timm_multiexit.'
        )
    return result


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the content of all files of results, in order of their names.

    Raises:
        MissingFileError: The folder has no such files.
        CheckpointError: A file is not one.
    """
    if not any(folder.glob('*.json')):
        raise MissingFileError(f'{folder} holds no results.')
    return [read_result(path) for path in sorted(folder.glob('*.json'))]


def check_same_flags(run: PlannedRun, flags: dict[str, Any], where: Path) -> None:
    """Check that what was done is what is planned: names alone do not say it once a recipe has changed.

    Raises:
        InvalidValueError: A flag differs.
    """
    for flag in sorted({*flags, *run.flags}):
        was, planned = flags.get(flag), run.flags.get(flag)
        if was != planned:
            raise InvalidValueError(
                f'{where} was made with {flag} {was}, the plan says {planned}. Remove it, or give the changed recipe'
                ' a name of its own.'
            )


def check_extra_flags(extra: Iterable[str], was: Iterable[str], where: Path) -> None:
    """Check that flags beyond the plan's are those of what is there.

    Raises:
        InvalidValueError: They are not.
    """
    now, before = flags_that_matter(extra), flags_that_matter(was)
    if now != before:
        raise InvalidValueError(
            f'{where} was made with the extra flags {before}, now they are {now}. Remove it, or give the same.'
        )


def is_done(run: PlannedRun, folder: Path, extra: Sequence[str] | None = None) -> bool:
    """Return whether there are results of the run.

    Args:
        run: The run.
        folder: Of results.
        extra: Flags beyond the plan's; None for any. Results in another precision are results.

    Raises:
        InvalidValueError: They are of other flags.
    """
    path = result_path(folder, run)
    if not path.exists():
        return False
    result = read_result(path)
    check_same_flags(run, result['flags'], path)
    if extra is not None:
        check_extra_flags(split_precision(extra)[0], split_precision(result.get('extra', ()))[0], path)
    return True
