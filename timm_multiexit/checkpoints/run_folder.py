"""The folder of a training run: the names of its files, and their readers."""

import csv
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.source import ModelSource
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.utils.errors import CheckpointError, MissingFileError, brief, is_integer, is_number, one_line
from timm_multiexit.utils.untrusted import read_json, read_yaml

ARGS_NAME = 'args.yaml'
BEST_NAME = 'best'
LOCK_NAME = '.lock'
RESULTS_NAME = 'results.json'
SUMMARY_NAME = 'summary.csv'
VALIDATION_NAME = 'validation.json'
_NEEDED_ARGS = ('model', 'seed', 'exit_loss')


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_origin(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.keys() <= set(Origin._fields) and all(map(_is_text_or_none, value.values()))
    )


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


# What the arguments that are read here and elsewhere must be, if they are given and not None.
_ARGS_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        'model exit_loss exit_output_loss exit_teacher_weights exit_head config task train_split val_split',
        _is_text,
        'text',
    ),
    ('seed val_from_train', is_integer, 'an integer'),
    ('exit_output_weight exit_feature_weight', is_number, 'a number'),
    ('exits exit_teacher', lambda value: is_integer(value) or isinstance(value, (str, list)), 'text or a list'),
    ('model_kwargs', lambda value: isinstance(value, dict) and all(map(_is_text, value)), 'a mapping of names'),
    ('origin', _is_origin, 'a mapping of base, license and commit to text'),
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def args_path(self) -> Path:
        """`args.yaml`: the arguments, as the run resolved them."""
        return self.path / ARGS_NAME

    @property
    def summary_path(self) -> Path:
        """`summary.csv`: one row per epoch."""
        return self.path / SUMMARY_NAME

    @property
    def results_path(self) -> Path:
        """`results.json`: the table of the best network, which training writes at its end."""
        return self.path / RESULTS_NAME

    @property
    def validation_path(self) -> Path:
        """`validation.json`: the results of `validate.py` for the best network, if the user put them there."""
        return self.path / VALIDATION_NAME

    @property
    def lock_path(self) -> Path:
        """`.lock`: says who works in the folder."""
        return self.path / LOCK_NAME

    @property
    def best(self) -> Path:
        """`best`: the folder of the best network."""
        return self.path / BEST_NAME

    @property
    def holds_run(self) -> bool:
        """Whether a run has written to it."""
        return self.summary_path.exists() or any(self.path.glob('*.pth.tar'))

    def read_args(self, needed: Collection[str] = _NEEDED_ARGS) -> dict[str, Any]:
        """Return the arguments of the run.

        Args:
            needed: Names that must be among them.

        Raises:
            CheckpointError: The file is missing, unreadable or not that of a training run.
        """
        try:
            args = read_yaml(self.args_path)
        except MissingFileError as error:
            raise CheckpointError(f'{self.path} is not a training run: it has no {ARGS_NAME}.') from error
        except CheckpointError as error:
            raise CheckpointError(f'{self.path} is not a training run: {error}') from error
        missing = sorted(set(needed) - args.keys())
        if missing:
            raise CheckpointError(f'{self.args_path} is not the {ARGS_NAME} of a training run: it has no {missing[0]}.')
        for names, is_allowed, allowed in _ARGS_KINDS:
            for name in names.split():
                value = args.get(name)
                if value is not None and not is_allowed(value):
                    raise CheckpointError(f'{name} in {self.args_path} must be {allowed}, got {brief(value)}.')
        return args

    def read_summary(self) -> list[dict[str, float]]:
        """Return one dict per epoch, column -> number, without the columns that are empty in it; `epoch` is an integer.

        Raises:
            CheckpointError: The file is missing, unreadable or holds something else.
        """
        try:
            return read_summary(self.summary_path)
        except (OSError, ValueError, csv.Error) as error:
            raise CheckpointError(f'{self.summary_path} cannot be read: {one_line(error)}.') from error

    def read_results(self) -> dict[str, Any]:
        """Return what training measured at its end.

        Raises:
            CheckpointError: The run has not ended, or the file is not a JSON object.
        """
        if not self.results_path.is_file():
            raise CheckpointError(
                f'{self.path} has no {RESULTS_NAME}, which training writes when it ends: wait for it, or resume it.'
            )
        return read_json(self.results_path)

    def load_best(self, **kwargs: Any) -> MultiExitModel:
        """Return the best network with its weights, without exits if the run had none.

        Args:
            **kwargs: For `timm.create_model`; those of the run's `--model-kwargs` that a file must not set are needed.

        Raises:
            CheckpointError: See `load_pretrained` and `load_backbone`.
        """
        source = ModelSource(self.best, read_model_config(self.best, overridden=kwargs))
        if source.config.exits is None:
            return MultiExitModel(source.create_backbone(pretrained=True, **kwargs), [])
        return source.create_model(pretrained=True, **kwargs)


def read_summary(path: Path | str) -> list[dict[str, float]]:
    """Return the rows of a `summary.csv`, timm's own too, see `RunFolder.read_summary`.

    Raises:
        OSError: The file cannot be read.
        ValueError: A cell is not a number.
    """
    with Path(path).open(newline='', encoding='utf-8') as file:
        # timm's script writes the header again when it resumes.
        rows = [row for row in csv.DictReader(file) if row.get('epoch') not in (None, '', 'epoch')]
    numbers = [{key: float(value) for key, value in row.items() if value} for row in rows]
    return [{**row, 'epoch': int(row['epoch'])} for row in numbers]


def read_origin(args: Mapping[str, Any]) -> Origin:
    """Return what a run started from, as its arguments say; 'a file' for timm's own script, whose arguments do not.

    Raises:
        CheckpointError: They say something else.
    """
    origin = args.get('origin')
    if origin and not _is_origin(origin):
        raise CheckpointError(f'origin of a run must be a mapping of base, license and commit, got {brief(origin)}.')
    return Origin(**origin) if origin else Origin('a file')
