"""What a run notes of its steps and epochs: table, curves, trackers, one line per epoch."""

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_multiexit.engine import Trainer
from timm_multiexit.metrics import ENSEMBLE, default_metric, exit_names
from timm_multiexit.records import Eta, Summary, draw_curves, format_epoch_line, log_epoch, log_step, start_trackers

_logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_CURVES = 30.0


class Journal:
    """The notes of a run.

    Args:
        args: Of the run.
        accelerator: Its trackers are started by `open`.
        num_exits: Of the model, 0 without.
        epochs: The run's last epoch, as the line's denominator.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator, *, num_exits: int, epochs: int):
        self.args, self.accelerator, self.epochs = args, accelerator, epochs
        self.names = (*exit_names(num_exits), ENSEMBLE) if num_exits else exit_names(0)
        self.metric = default_metric(args.task == 'multilabel')
        self.summary, self._eta = Summary(), Eta()
        self._pending: list[tuple[int, float, torch.Tensor]] = []
        self._started = time.perf_counter()
        self._drawn = -_SECONDS_BETWEEN_CURVES

    def open(self, folder: Path, step: int) -> None:
        """Start the trackers; `step` updates were done before."""
        self.folder = folder
        start_trackers(self.accelerator, self.args, folder, folder.name, step=step)

    def begin_epoch(self) -> None:
        """Start the clock of an epoch."""
        self._started = time.perf_counter()

    def note_step(self, trainer: Trainer) -> None:
        """Note the numbers of a step, if there is a tracker for them."""
        if self.accelerator.trackers:
            self._pending.append((trainer.num_updates, trainer.learning_rate, trainer.batch_metrics))
            if len(self._pending) >= self.args.log_interval:
                self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Send what was noted to the trackers, read from the device in one go."""
        if not self._pending:
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
        self.summary.write(self.folder / 'summary.csv')
        is_last = self.summary.rows[-1]['epoch'] + 1 >= self.epochs
        if not is_last and time.perf_counter() - self._drawn < _SECONDS_BETWEEN_CURVES:
            return
        self._drawn = time.perf_counter()
        if not draw_curves(self.folder / 'curves.png', self.summary.rows, self.names, self.folder.name):
            _logger.debug('matplotlib is not installed: no curves.png.')

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
        line = format_epoch_line(
            row['epoch'],
            self.epochs,
            train_loss=row['train_loss'],
            accuracy=accuracy,
            lr=row['lr'],
            rate=rate,
            seconds=seconds,
            eta=self._eta.estimate(self.epochs - row['epoch'] - 1),
        )
        _logger.info(line)

    def _columns(self) -> dict[str, str]:
        return {name: f'eval_{self.metric}' if name == 'main' else f'eval_{name}_{self.metric}' for name in self.names}

    def best_epochs(self, metric: str, *, is_decreasing: bool, count: int = 10) -> list[dict[str, Any]]:
        """Return the best rows by a metric, the best one last, as timm's script ends with them."""
        key = f'eval_{metric}'
        rows = sorted((row for row in self.summary.rows if key in row), key=lambda row: row[key], reverse=is_decreasing)
        return [{'epoch': row['epoch'], 'train_loss': row['train_loss'], key: row[key]} for row in rows[-count:]]
