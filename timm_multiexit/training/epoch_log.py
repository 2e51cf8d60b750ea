"""The log of a run: table, curves, trackers, one line per epoch."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.evaluation.metrics import default_metric
from timm_multiexit.training.summary import Summary, draw_curves
from timm_multiexit.training.trackers import TrackerConfig, log_epoch, log_step, start_trackers
from timm_multiexit.training.trainer import Trainer
from timm_multiexit.utils.text import ENSEMBLE, exit_names

_logger = logging.getLogger(__name__)


_SECONDS_BETWEEN_CURVES = 30.0


class EpochLog:
    """Table, curves, trackers and log lines of a run.

    Args:
        accelerator: Its trackers are started by `open`.
        num_exits: Of the model, 0 without.
        num_epochs: Epochs after which the run ends.
        multi_label: Targets are [B, C] labels.
        log_interval: Updates that are sent to trackers together.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        num_exits: int,
        num_epochs: int,
        multi_label: bool = False,
        log_interval: int = 50,
    ):
        self.accelerator, self.num_epochs, self.log_interval = accelerator, num_epochs, log_interval
        self.names = (*exit_names(num_exits), ENSEMBLE) if num_exits else exit_names(0)
        self.metric = default_metric(multi_label)
        self.summary, self._eta = Summary(), Eta()
        self._pending: list[tuple[int, float, torch.Tensor]] = []
        self._started = time.perf_counter()
        self._drawn = -_SECONDS_BETWEEN_CURVES

    def open(self, folder: Path, trackers: TrackerConfig, *, record: Mapping[str, Any], step: int) -> None:
        """Start the trackers; see `start_trackers`."""
        self.folder = folder
        start_trackers(self.accelerator, trackers, folder, record=record, step=step)

    def begin_epoch(self) -> None:
        """Start the clock of an epoch."""
        self._started = time.perf_counter()

    def note_step(self, trainer: Trainer) -> None:
        """Note the numbers of a step, if there is a tracker for them."""
        if self.accelerator.trackers and trainer.batch_metrics is not None:
            self._pending.append((trainer.num_updates, trainer.learning_rate, trainer.batch_metrics))
            if len(self._pending) >= self.log_interval:
                self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Send what was noted to the trackers, read from the device in one go."""
        if not self._pending or trainer.progress is None:
            return
        rows = torch.stack([numbers for *_, numbers in self._pending]).tolist()
        speed = {'img_per_s': trainer.images_per_second, 'data_share': trainer.data_share}
        for (step, lr, _), row in zip(self._pending, rows):
            log_step(self.accelerator, {**dict(zip(trainer.progress.columns(), row)), 'lr': lr, **speed}, step)
        self._pending.clear()

    def note_epoch(self, epoch: int, train: dict[str, float], eval: dict[str, float], lr: float) -> None:
        """Add an epoch to the table: what was measured in training and in evaluation, and its last rate."""
        self.summary.add(epoch, train, eval, lr)

    def write(self) -> None:
        """Write `summary.csv`, and `curves.png` twice a minute at the most and at the end: to draw it takes a while."""
        if not self.summary.rows:
            return
        self.summary.write(RunFolder(self.folder).summary_path)
        is_last = self.summary.rows[-1]['epoch'] + 1 >= self.num_epochs
        if not is_last and time.perf_counter() - self._drawn < _SECONDS_BETWEEN_CURVES:
            return
        self._drawn = time.perf_counter()
        is_drawn = draw_curves(self.folder / 'curves.png', self.summary.rows, self.names, self.folder.name)
        if is_last and not is_drawn:
            _logger.warning('No curves.png without matplotlib. Install it with pip install "timm-multiexit[plots]".')

    def end_epoch(self, trainer: Trainer, rate: float) -> None:
        """Log the last epoch's row and its line.

        Args:
            trainer: Knows how many updates were done.
            rate: Training images per second.
        """
        row = self.summary.rows[-1]
        log_epoch(self.accelerator, row, trainer.num_updates)
        seconds = time.perf_counter() - self._started
        self._eta.add(seconds)
        accuracy = {name: row[key] for name, key in self._columns().items() if key in row}
        epoch = int(row['epoch'])
        line = format_epoch_line(
            epoch,
            self.num_epochs,
            train_loss=row['train_loss'],
            accuracy=accuracy,
            lr=row['lr'],
            rate=rate,
            seconds=seconds,
            eta=self._eta.estimate(self.num_epochs - epoch - 1),
        )
        _logger.info(line)

    def _columns(self) -> dict[str, str]:
        return {name: f'eval_{self.metric}' if name == 'main' else f'eval_{name}_{self.metric}' for name in self.names}

    def best_epochs(self, metric: str, *, is_decreasing: bool, count: int = 10) -> list[dict[str, Any]]:
        """Return the best rows by a metric, the best one last, as timm's script ends with them."""
        key = f'eval_{metric}'
        rows = sorted((row for row in self.summary.rows if key in row), key=lambda row: row[key], reverse=is_decreasing)
        return [{'epoch': row['epoch'], 'train_loss': row['train_loss'], key: row[key]} for row in rows[-count:]]


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
