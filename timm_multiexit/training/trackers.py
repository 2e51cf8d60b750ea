"""Trackers that numbers of a run are logged to: TensorBoard and Weights & Biases."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from timm_multiexit.utils.errors import InvalidValueError, StateError, one_line

TRACKERS = {'tensorboard': is_tensorboard_available, 'wandb': is_wandb_available}


@dataclass(frozen=True)
class TrackerConfig:
    """Where numbers of a run are logged: keys of `TRACKERS`, and settings of Weights & Biases."""

    names: Sequence[str] = ()
    project: str | None = None
    tags: Sequence[str] = ()
    resume_id: str | None = None


def check_trackers(names: Sequence[str] | None) -> None:
    """Raise if a tracker of `--log-with` is unknown or not installed."""
    for name in names or ():
        if name not in TRACKERS:
            raise InvalidValueError(f"--log-with must be {' or '.join(TRACKERS)}, got '{name}'.")
        if not TRACKERS[name]():
            raise InvalidValueError(
                f'--log-with {name} needs {name}. Install it with pip install "timm-multiexit[{name}]".'
            )


def flatten_config(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return the values as trackers take them: numbers, bools and text stay, all else becomes text.

    >>> flatten_config({'lr': 0.1, 'ratio': [0.75, 1.5], 'seed': None})
    {'lr': 0.1, 'ratio': '[0.75, 1.5]', 'seed': 'None'}
    """
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in values.items()}


def start_trackers(
    accelerator: Accelerator, config: TrackerConfig, folder: Path | str, *, record: Mapping[str, Any], step: int = 0
) -> None:
    """Start the trackers on the main process; `accelerator.end_training` finishes them.

    TensorBoard writes into `folder/tensorboard`, Weights & Biases beside it into `folder/wandb`, where the run has the
    name of the folder. The accelerator must be made without `log_with`: TensorBoard would have to know its folder at
    once. A resumed run starts after `step` updates; TensorBoard hides what was logged after them.

    Raises:
        InvalidValueError: A tracker is unknown or not installed.
        StateError: Weights & Biases does not start.
    """
    check_trackers(config.names)
    if not config.names or not accelerator.is_main_process:
        return
    run_name = Path(folder).name
    trackers: list[GeneralTracker] = []
    startup_errors: tuple[type[Exception], ...] = ()
    if 'tensorboard' in config.names:
        # Steps from `purge_step` on are hidden; the epoch that ended with `step` was logged with that number.
        trackers.append(TensorBoardTracker('tensorboard', str(folder), purge_step=step + 1 if step else None))
    if 'wandb' in config.names:
        startup_errors = (importlib.import_module('wandb').Error,)
        resume = dict(id=config.resume_id, resume='must') if config.resume_id else {}
        trackers.append(WandBTracker(config.project, name=run_name, tags=config.tags, dir=str(folder), **resume))
    accelerator.log_with = trackers
    try:
        accelerator.init_trackers(run_name, config=flatten_config(record))
    except startup_errors as error:
        accelerator.trackers.clear()  # `end_training` would finish what never started
        raise StateError(
            f'--log-with wandb did not start: {one_line(error)}. Without an account set WANDB_MODE=offline.'
        ) from error


def log_step(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Log numbers of a batch under `train_step/` after so many updates; without trackers nothing happens."""
    if accelerator.trackers:
        accelerator.log({f'train_step/{key}': float(value) for key, value in values.items()}, step=step)


def log_epoch(accelerator: Accelerator, row: Mapping[str, float], step: int) -> None:
    """Log a row of the summary under `train/` and `eval/`, `epoch` and `lr` under `train/`, after so many updates."""
    if not accelerator.trackers:
        return
    parts = {key: ('eval' if key.startswith('eval_') else 'train') for key in row}
    accelerator.log({f'{part}/{key.removeprefix(f"{part}_")}': row[key] for key, part in parts.items()}, step=step)
