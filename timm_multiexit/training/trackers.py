"""Trackers."""

import importlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from timm_multiexit.utils.errors import MultiExitError

TRACKERS = {'tensorboard': is_tensorboard_available, 'wandb': is_wandb_available}


def check_trackers(names: Sequence[str] | None) -> None:
    """Check that every tracker of `--log-with` is known and installed.

    Raises:
        MultiExitError: One is not.
    """
    for name in names or ():
        if name not in TRACKERS:
            raise MultiExitError(f"--log-with is '{name}', allowed are {', '.join(TRACKERS)}.")
        if not TRACKERS[name]():
            raise MultiExitError(
                f'--log-with {name} needs {name}. Install it with pip install "timm-multiexit[{name}]".'
            )


def flatten_config(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return the values as trackers take them: numbers, bools and text stay, all else becomes text.

    >>> flatten_config({'lr': 0.1, 'ratio': [0.75, 1.5], 'seed': None})
    {'lr': 0.1, 'ratio': '[0.75, 1.5]', 'seed': 'None'}
    """
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in values.items()}


def start_trackers(
    accelerator: Accelerator, args: Namespace, output_dir: Path | str, run_name: str, *, step: int = 0
) -> None:
    """Start the trackers of `args.log_with` on the main process; `accelerator.end_training` finishes them.

    TensorBoard writes into `output_dir/tensorboard`, Weights & Biases beside it into `output_dir/wandb`.

    Args:
        accelerator: Made without `log_with`: there, TensorBoard would have to know its folder at once.
        args: The arguments of the run, with `log_with`, `wandb_project`, `wandb_tags` and `wandb_resume_id`; all of
            them are stored as the configuration.
        output_dir: Folder of the run.
        run_name: Its name at Weights & Biases.
        step: Updates before this start, of a run that goes on; TensorBoard hides what was logged after them.

    Raises:
        MultiExitError: A tracker is unknown, not installed, or Weights & Biases does not start.
    """
    check_trackers(args.log_with)
    if not args.log_with or not accelerator.is_main_process:
        return
    trackers: list[GeneralTracker] = []
    startup_errors: tuple[type[Exception], ...] = ()
    if 'tensorboard' in args.log_with:
        # Steps from `purge_step` on are hidden; the epoch that ended with `step` was logged with that number.
        purge_step = step + 1 if step else None
        trackers.append(TensorBoardTracker('tensorboard', str(output_dir), purge_step=purge_step))
    if 'wandb' in args.log_with:
        startup_errors = (importlib.import_module('wandb').Error,)
        resume = dict(id=args.wandb_resume_id, resume='must') if args.wandb_resume_id else {}
        trackers.append(
            WandBTracker(args.wandb_project, name=run_name, tags=args.wandb_tags, dir=str(output_dir), **resume)
        )
    accelerator.log_with = trackers
    try:
        accelerator.init_trackers(run_name, config=flatten_config(vars(args)))
    except startup_errors as error:
        accelerator.trackers.clear()  # `end_training` would finish what never started
        reason = ' '.join(str(error).split()).rstrip('.')
        raise MultiExitError(
            f'--log-with wandb did not start: {reason}. Without an account set WANDB_MODE=offline.'
        ) from error


def log_step(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Log numbers of a batch under `train_step/`; without trackers nothing happens.

    Args:
        accelerator: Whose trackers were started.
        values: Name -> number, e.g. `loss`, `output_distance`, `exit0_loss`, `main_top1`, `lr`, `img_per_s`.
        step: Updates so far.
    """
    if accelerator.trackers:
        accelerator.log({f'train_step/{key}': float(value) for key, value in values.items()}, step=step)


def log_epoch(accelerator: Accelerator, row: Mapping[str, float], step: int) -> None:
    """Log a row of the summary under `train/` and `eval/`, `epoch` and `lr` under `train/`.

    Args:
        accelerator: Whose trackers were started.
        row: One of `Summary.rows`.
        step: Updates so far.
    """
    if not accelerator.trackers:
        return
    parts = {key: ('eval' if key.startswith('eval_') else 'train') for key in row}
    accelerator.log({f'{part}/{key.removeprefix(f"{part}_")}': row[key] for key, part in parts.items()}, step=step)
