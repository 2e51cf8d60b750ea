"""Runs of `train.py` on disk: how each was trained, and its table of epochs."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.losses.teachers import DepthWeights, checked_teacher, resolve_teacher
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError, brief

PLAIN = 'plain'
_NEEDED_ARGS = {'model', 'exits', 'exit_loss', 'task', 'model_kwargs', 'train_split', 'val_split', 'test_split'}


@dataclass(frozen=True)
class Run:
    """A run: its unique name in figures, flags, rows of `summary.csv`, and `results.json`, empty until it ends."""

    name: str
    folder: Path
    args: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    results: Mapping[str, Any]

    @property
    def files(self) -> RunFolder:
        """Its files."""
        return RunFolder(self.folder)

    @property
    def method(self) -> str:
        """How it was trained, see `name_method`."""
        return name_method(self.args)

    @property
    def curve_split(self) -> str:
        """What its epochs were evaluated on."""
        held_out = self.args.get('val_from_train')
        return f'{held_out} images held out of {self.args["train_split"]}' if held_out else self.args['val_split']

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has any number of classes."""
        return bool(self.args['task'] == 'multilabel')


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return the runs in these folders, named by what tells their paths apart."""
    paths = [Path(folder).resolve() for folder in folders]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise InvalidValueError(f'{twice[0]} is given twice. Give each run once.')
    return [_read_run(path, name) for path, name in zip(paths, name_folders(paths))]


def name_folders(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, without the words that all names begin or end with.

    >>> name_folders([Path('/a/ce/seed0'), Path('/a/eed/seed0')])
    ['ce/seed0', 'eed/seed0']
    >>> name_folders([Path('/a/short16-resnet8-ce-s0'), Path('/a/short16-resnet8-eed-kl-s0')])
    ['ce', 'eed-kl']
    """
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ['/'.join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names if depth > 1 or len(names) == 1 else _cut_common_words(names)


def _cut_common_words(names: Sequence[str]) -> list[str]:
    words = [name.split('-') for name in names]
    for _ in range(2):  # from the front, then from the back
        while min(map(len, words)) > 1 and len({name[0] for name in words}) == 1:
            words = [name[1:] for name in words]
        words = [name[::-1] for name in words]
    return ['-'.join(name) for name in words]


def _read_run(folder: Path, name: str) -> Run:
    run = RunFolder(folder)
    missing = [path for path in (run.args_path, run.summary_path, run.best / CONFIG_NAME) if not os.path.isfile(path)]
    if missing:
        part = missing[0].relative_to(folder)
        raise CheckpointError(f'{folder} is not a training run: it has no {part}. Name the folder that has it.')
    results = run.read_results() if run.results_path.is_file() else {}
    args = run.read_args(_NEEDED_ARGS)
    if args['exits'] is not None and args['exit_loss'] not in LOSSES:
        raise CheckpointError(
            f'exit_loss in {run.args_path} must be one of {", ".join(LOSSES)}, got {brief(args["exit_loss"])}.'
        )
    return Run(name, folder, args, run.read_summary(), results)


def name_method(args: Mapping[str, Any]) -> str:
    """Return how a run was trained, in a word: 'plain' without exits, else the loss and what differs from its row.

    >>> name_method({'exits': 'auto', 'exit_loss': 'eed', 'exit_output_loss': 'mse', 'exit_teacher': [0, -1]})
    'eed-mse-teacher[0,-1]'
    >>> name_method({'exits': 'auto', 'exit_loss': 'eed', 'exit_output_weight': 1.0, 'exit_head': 'paper'})
    'eed-kl-weight1-paper'
    """
    if args['exits'] is None:
        return PLAIN
    loss: str = args['exit_loss']
    parts = [loss]
    if loss != 'ce':
        parts.append(args.get('exit_output_loss') or LOSSES[loss].get('output_loss', 'kl'))
    teacher = args.get('exit_teacher')
    if teacher is not None:
        parts.append('teacher' + (teacher if isinstance(teacher, str) else f'[{",".join(map(str, teacher))}]'))
    if args.get('exit_teacher_weights', 'equal') != 'equal':
        parts.append(args['exit_teacher_weights'])
    if args.get('exit_output_weight') is not None:
        parts.append(f'weight{args["exit_output_weight"]:g}')
    if args.get('exit_feature_weight'):
        parts.append('features')
    if args.get('exit_survivors'):
        parts.append('survivors')
    if args.get('exit_head', 'conv') != 'conv':
        parts.append(args['exit_head'])
    return '-'.join(parts)


def teacher_members(args: Mapping[str, Any], num_exits: int) -> dict[int, float]:
    """Return the classifiers that teach, 0-based, shallow to deep, with their weights; none if nothing is distilled.

    `num_exits` is without main. None are returned where weights follow skill, which changes during a run.

    >>> teacher_members({'exits': 'auto', 'exit_loss': 'eed', 'exit_teacher': [0, -1]}, 3)
    {0: 0.5, 3: 0.5}
    """
    if args['exits'] is None or args.get('exit_teacher_weights') == 'skill':
        return {}
    row, given = LOSSES[args['exit_loss']], args.get('exit_teacher')
    teacher = checked_teacher(row['teacher'] if given is None else given)
    return {} if teacher is None else resolve_teacher(teacher, row.get('depth_weights', DepthWeights()), num_exits + 1)


def find_reference(runs: Sequence[Run], name: str | None) -> Run | None:
    """Return the run that others are measured against: the first one of this name, method or loss, else of 'ce'.

    Without a name there need not be a run of 'ce'.
    """
    wanted = name or 'ce'
    found = [run for run in runs if wanted in (run.name, run.folder.name)]
    found = found or [run for run in runs if run.method == wanted]
    found = found or [run for run in runs if run.method.split('-')[0] == wanted]
    if not found and name is not None:
        known = ', '.join(f'{run.name} ({run.method})' for run in runs)
        raise InvalidValueError(f"--reference must be the name or method of a run, {known}, got '{name}'.")
    return found[0] if found else None
