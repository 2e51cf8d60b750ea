"""What a run writes for people: summary.csv, curves.png, trackers, one line per epoch, a progress bar."""

import csv
import importlib
import math
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_multiexit.config import MultiExitError
from timm_multiexit.files import RESUME, replacing
from timm_multiexit.metrics import ENSEMBLE

TRACKERS = {'tensorboard': is_tensorboard_available, 'wandb': is_wandb_available}

_EVAL_METRICS = ('top1', 'top5', 'map', 'micro_f1', 'macro_f1', 'sample_f1')
_TIMM_COLUMNS = ('epoch', 'train_loss', 'eval_loss', *(f'eval_{metric}' for metric in _EVAL_METRICS), 'lr')


class Summary:
    """The rows of summary.csv, one per epoch: timm's columns in timm's order, then those of the exits.

    >>> summary = Summary()
    >>> summary.add(0, {'loss': 2.5, 'exit0_loss': 3.0}, {'loss': 2.0, 'top1': 60.0, 'exit0_top1': 50.0}, lr=0.1)
    >>> summary.columns
    ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'lr', 'train_exit0_loss', 'eval_exit0_top1')
    """

    def __init__(self):
        self._rows: list[dict[str, float]] = []

    @property
    def rows(self) -> list[dict[str, float]]:
        """One dict per epoch, column -> number; an epoch without evaluation has no `eval_*` keys."""
        return [dict(row) for row in self._rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all rows together."""
        found = dict.fromkeys(key for row in self._rows for key in row)
        others = [key for key in found if key not in _TIMM_COLUMNS]
        # In training columns before evaluation columns even where the first epoch was not evaluated.
        others.sort(key=lambda key: not key.startswith('train_'))
        return (*(key for key in _TIMM_COLUMNS if key in found), *others)

    def add(self, epoch: int, train: Mapping[str, float], eval: Mapping[str, float], lr: float) -> None:
        """Add the row of an epoch; rows of this epoch and of later ones, left by an earlier run, are dropped.

        Args:
            epoch: From 0.
            train: Metric -> number over the epoch, main's or the whole's under bare names (`loss`, `exit0_top1`).
            eval: The same of the evaluation (`loss`, `top1`, `exit0_top1`); empty if there was none.
            lr: Learning rate of the epoch's last step.
        """
        row = {'epoch': int(epoch), 'lr': float(lr)}
        row |= {f'train_{key}': float(value) for key, value in train.items()}
        row |= {f'eval_{key}': float(value) for key, value in eval.items()}
        self._rows = [old for old in self._rows if old['epoch'] < epoch] + [row]

    def write(self, path: Path | str) -> None:
        """Write the whole file, or nothing: a kill leaves the file as it was."""
        with replacing(path, advice=RESUME) as draft, draft.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._rows)

    def read(self, path: Path | str, before: int) -> None:
        """Take the rows of a file, timm's own too, up to an epoch, in place of all there are."""
        with Path(path).open(newline='', encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if row.get('epoch') not in (None, '', 'epoch')]
        numbers = [{key: float(value) for key, value in row.items() if value} for row in rows]
        self._rows = [{**row, 'epoch': int(row['epoch'])} for row in numbers if row['epoch'] < before]

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as plain lists, dicts and numbers, which `torch.load(weights_only=True)` reads."""
        return {'rows': self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows that `state_dict` gave, in place of all there are."""
        self._rows = [dict(row) for row in state['rows']]


def draw_curves(path: Path | str, rows: Sequence[Mapping[str, float]], names: Sequence[str], title: str = '') -> bool:
    """Draw accuracy of every classifier, and both losses, over the epochs.

    Args:
        path: The PNG file, replaced as a whole.
        rows: As `Summary.rows` gives them; numbers that are missing or not finite are left out.
        names: Classifiers, shallow to deep, with main and, if it is to be drawn, the ensemble.
        title: Heading of the figure.

    Returns:
        False, and nothing is written, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    # The first metric that was evaluated; without evaluation there is only a panel of losses.
    metric = next((name for name in ('top1', 'map') if any(f'eval_{name}' in row for row in rows)), None)
    if metric is None:
        loss_axes = figure.subplots()
    else:
        accuracy_axes, loss_axes = figure.subplots(1, 2, width_ratios=(2, 1))
        _draw_accuracy(accuracy_axes, rows, names, metric)
    for key, label, style in (
        ('train_loss', 'training, all classifiers', '-'),
        ('eval_loss', 'evaluation, main', '--'),
    ):
        _draw_line(loss_axes, rows, key, label=label, color='black', linestyle=style)
    _finish_axes(loss_axes, 'loss')
    figure.suptitle(title)
    with replacing(path, advice=RESUME) as draft:
        figure.savefig(draft, dpi=150, format='png')
    return True


def _draw_accuracy(axes: Any, rows: Sequence[Mapping[str, float]], names: Sequence[str], metric: str) -> None:
    from matplotlib import colormaps

    singles = [name for name in names if name != ENSEMBLE]
    for name in names:
        # Viridis gets lighter evenly, so order shows in grey too; its last fifth is too pale on white.
        style = dict(color='black', linestyle='--')
        if name != ENSEMBLE:
            shade = 0.8 * (1 - singles.index(name) / max(len(singles) - 1, 1))
            style = dict(color=colormaps['viridis'](shade), linewidth=3 if name == 'main' else 1.5)
        key = f'eval_{metric}' if name == 'main' else f'eval_{name}_{metric}'
        _draw_line(axes, rows, key, label='ensemble' if name == ENSEMBLE else name, **style)
    _finish_axes(axes, {'top1': 'top-1 accuracy, %', 'map': 'mean average precision, %'}[metric])


def _draw_line(axes: Any, rows: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    points = [(row['epoch'] + 1, row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if points:
        axes.plot(*zip(*points), marker='o' if len(points) < 20 else None, markersize=3, **style)


def _finish_axes(axes: Any, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel='epochs trained', ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def check_trackers(names: Sequence[str] | None) -> None:
    """Check that every tracker of `--log-with` is known and installed.

    Raises:
        MultiExitError: One is not.
    """
    for name in names or ():
        if name not in TRACKERS:
            raise MultiExitError(f"--log-with is '{name}', allowed are {', '.join(TRACKERS)}.")
        if not TRACKERS[name]():
            raise MultiExitError(f'--log-with {name} needs the package {name}: pip install {name}')


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


class Eta:
    """How long a run still takes, by the mean duration of its last epochs.

    >>> eta = Eta(window=2)
    >>> for seconds in (60.0, 10.0, 20.0):
    ...     eta.add(seconds)
    >>> eta.estimate(4)
    60.0

    Args:
        window: How many epochs count; the first ones, which warm up caches, drop out.
    """

    def __init__(self, window: int = 5):
        self._durations: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        """Add an epoch's duration, with evaluation and what is written."""
        self._durations.append(seconds)

    def estimate(self, epochs_left: int) -> float | None:
        """Return the seconds that so many epochs take; None before the first epoch."""
        if not self._durations:
            return None
        return epochs_left * sum(self._durations) / len(self._durations)


def format_epoch_line(
    epoch: int,
    epochs: int,
    *,
    train_loss: float,
    accuracy: Mapping[str, float],
    lr: float,
    rate: float,
    seconds: float,
    eta: float | None,
) -> str:
    """Return the line that an epoch leaves in the log.

    Args:
        epoch: From 0; shown from 1.
        epochs: How many there are.
        train_loss: Mean over the epoch.
        accuracy: Classifier -> top-1 or mAP in percent, shallow to deep; empty if the epoch was not evaluated.
        lr: Learning rate.
        rate: Training images per second, of all processes.
        seconds: Duration with evaluation.
        eta: Seconds to the end of the run; None leaves it out.

    >>> format_epoch_line(2, 200, train_loss=1.2341, accuracy={'exit0': 61.24, 'main': 74.0}, lr=0.1, rate=1234.4,
    ...     seconds=12.2, eta=2470.0)
    'Epoch   3/200  loss 1.234  exit0 61.2 main 74.0  lr 1.0e-01  1234 img/s  12 s  ETA 0:41:10'
    """
    parts = [f'Epoch {epoch + 1:>{len(str(epochs))}}/{epochs}', f'loss {train_loss:.3f}']
    if accuracy:
        parts.append(' '.join(f'{name} {value:.1f}' for name, value in accuracy.items()))
    parts += [f'lr {lr:.1e}', f'{rate:.0f} img/s', f'{seconds:.0f} s' if seconds >= 9.95 else f'{seconds:.1f} s']
    if eta is not None:
        parts.append(f'ETA {timedelta(seconds=round(eta))}')
    return '  '.join(parts)


def show_progress(batches: Iterable, *, is_shown: bool, total: int | None = None, description: str = '') -> Iterable:
    """Return the batches, which draw a bar on stderr while they are used if `is_shown`; log lines go above it.

    Args:
        batches: What to go through.
        is_shown: False returns `batches` itself; ask for it on the main process only.
        total: How many there are, if `batches` has no length.
        description: Text before the bar.
    """
    return _draw_bar(batches, total, description) if is_shown else batches


def _draw_bar(batches: Iterable, total: int | None, description: str) -> Iterator:
    with logging_redirect_tqdm():
        yield from tqdm(batches, desc=description, total=total, leave=False, unit='batch', dynamic_ncols=True)
