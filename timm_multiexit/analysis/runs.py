"""Runs of `train.py` as they lie on disk: how each was trained, and its table of epochs."""

from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.losses.teachers import DepthWeights, checked_teacher, resolve_teacher
from timm_multiexit.utils.errors import CheckpointError, MultiExitError
from timm_multiexit.utils.text import exit_names

PLAIN = 'plain'

_NEEDED_ARGS = {'model', 'exits', 'exit_loss', 'task', 'model_kwargs', 'train_split', 'val_split', 'test_split'}


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: What it is called in figures; no two runs that are read together have the same.
        folder: Where it is.
        args: Of the command line, from `args.yaml`.
        rows: Of `summary.csv`, one per epoch.
        results: `results.json`; empty where the run did not come to its end.
    """

    name: str
    folder: Path
    args: Namespace
    rows: Sequence[Mapping[str, float]]
    results: Mapping[str, Any]

    @property
    def best(self) -> Path:
        """Folder of the network."""
        return RunFolder(self.folder).best

    @property
    def method(self) -> str:
        """How it was trained, see `name_method`."""
        return name_method(self.args)

    @property
    def curve_split(self) -> str:
        """What its epochs were evaluated on."""
        held_out, split = getattr(self.args, 'val_from_train', None), self.args.val_split
        return f'{held_out} images held out of {self.args.train_split}' if held_out else split

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has any number of classes."""
        return self.args.task == 'multilabel'


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return the runs in these folders, named by what tells their paths apart.

    Raises:
        MultiExitError: A folder is no run or is named twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise MultiExitError(f'{twice[0]} is named twice: name each run once.')
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
    missing = [path for path in (run.args_path, run.summary_path, run.best / CONFIG_NAME) if not path.is_file()]
    if missing:
        part = missing[0].relative_to(folder)
        raise CheckpointError(f'{folder} is not a run of train.py: it has no {part}. Name the folder that has it.')
    args = Namespace(**run.read_args(_NEEDED_ARGS))
    return Run(name, folder, args, run.read_summary(), run.read_results() if run.results_path.is_file() else {})


def name_method(args: Namespace) -> str:
    """Return how a run was trained, in a word: 'plain' without exits, else the loss and what differs from its row.

    >>> name_method(Namespace(exits='auto', exit_loss='eed', exit_output_loss='mse', exit_teacher=[0, -1]))
    'eed-mse-teacher[0,-1]'
    >>> name_method(Namespace(exits='auto', exit_loss='eed', exit_output_weight=1.0, exit_head='paper'))
    'eed-kl-weight1-paper'
    """
    if args.exits is None:
        return PLAIN
    parts = [args.exit_loss]
    if args.exit_loss != 'ce':
        parts.append(getattr(args, 'exit_output_loss', None) or LOSSES[args.exit_loss].get('output_loss', 'kl'))
    teacher = getattr(args, 'exit_teacher', None)
    if teacher is not None:
        parts.append('teacher' + (teacher if isinstance(teacher, str) else f'[{",".join(map(str, teacher))}]'))
    if getattr(args, 'exit_output_weight', None) is not None:
        parts.append(f'weight{args.exit_output_weight:g}')
    if getattr(args, 'exit_feature_weight', None):
        parts.append('features')
    if getattr(args, 'exit_head', 'conv') != 'conv':
        parts.append(args.exit_head)
    return '-'.join(parts)


def teacher_members(args: Namespace, num_exits: int) -> dict[int, float]:
    """Return the classifiers that teach, 0-based, shallow to deep, with their weights; none if nothing is distilled.

    Args:
        args: Of the run.
        num_exits: Of its network, without main.

    Raises:
        MultiExitError: A classifier is named that is not there.

    >>> teacher_members(Namespace(exits='auto', exit_loss='eed', exit_teacher=[0, -1]), 3)
    {0: 0.5, 3: 0.5}
    """
    if args.exits is None:
        return {}
    teacher = getattr(args, 'exit_teacher', None)
    row = LOSSES[args.exit_loss]
    teacher = checked_teacher(row['teacher'] if teacher is None else teacher)
    return {} if teacher is None else resolve_teacher(teacher, row.get('depth_weights', DepthWeights()), num_exits + 1)


def member_names(members: Sequence[int], num_exits: int) -> list[str]:
    """Return what the classifiers are called.

    >>> member_names((0, 3), 3)
    ['exit0', 'main']
    """
    names = exit_names(num_exits)
    return [names[idx] for idx in members]


def find_reference(runs: Sequence[Run], name: str | None) -> Run | None:
    """Return the run that others are measured against: the first one of this name, method or loss, else of 'ce'.

    Args:
        runs: All.
        name: What was asked for; None for nothing, which finds None where no run is of 'ce'.

    Raises:
        MultiExitError: No run is called so.
    """
    wanted = name or 'ce'
    found = [run for run in runs if wanted in (run.name, run.folder.name)]
    found = found or [run for run in runs if run.method == wanted]
    found = found or [run for run in runs if run.method.split('-')[0] == wanted]
    if not found and name is not None:
        known = ', '.join(f'{run.name} ({run.method})' for run in runs)
        raise MultiExitError(f"--reference is '{name}', allowed are the runs {known}: name one by name or by method.")
    return found[0] if found else None
