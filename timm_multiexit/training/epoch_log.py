"""The log of a run: table, curves, trackers, one line per epoch."""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.evaluation.metrics import default_metric
from timm_multiexit.training.summary import Summary, draw_curves, eval_column
from timm_multiexit.training.trackers import TrackerConfig, log_epoch, log_step, start_trackers
from timm_multiexit.training.trainer import Trainer
from timm_multiexit.utils.text import ENSEMBLE, exit_names

_logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_CURVES = 30.0

# How many epochs the remaining time is estimated from; the first ones, which warm up caches, drop out.
_ETA_WINDOW = 5


class EpochLog:
    """Table, curves, trackers and log lines of a run; trackers get the numbers of `log_interval` updates together.

    What accuracy is measured on, in words, and the metric that the best epoch is chosen by are for the curves.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        num_exits: int,
        num_epochs: int,
        multi_label: bool = False,
        log_interval: int,
        images: str = '',
        chosen_by: str = '',
    ):
        self.images, self.chosen_by = images, chosen_by
        self.accelerator, self.num_epochs, self.log_interval = accelerator, num_epochs, log_interval
        self.names = (*exit_names(num_exits), ENSEMBLE) if num_exits else exit_names(0)
        self.metric = default_metric(multi_label)
        self.summary = Summary()
        self._row: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=_ETA_WINDOW)
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

    def note_epoch(
        self, epoch: int, train: dict[str, float], eval: dict[str, float], lr: float, *, is_evaluated: bool = True
    ) -> None:
        """Note what was measured in an epoch, in training and in evaluation, and its last learning rate.

        As timm's, the table has a row for the epochs alone that `--val-interval` does not leave out.
        """
        table = self.summary if is_evaluated else Summary()
        self._row = table.add(epoch, train, eval, lr)

    def write(self, best_epoch: int | None = None) -> None:
        """Write `summary.csv`, and `curves.png` twice a minute at the most and at the end: to draw it takes a while.

        The best epoch so far is marked in the curves.
        """
        if not self.summary.rows:
            return
        self.summary.write(RunFolder(self.folder).summary_path)
        is_last = self.summary.rows[-1]['epoch'] + 1 >= self.num_epochs
        if not is_last and time.perf_counter() - self._drawn < _SECONDS_BETWEEN_CURVES:
            return
        self._drawn = time.perf_counter()
        is_drawn = draw_curves(
            self.folder / 'curves.png',
            self.summary.rows,
            self.names,
            self.folder.name,
            images=self.images,
            best_epoch=best_epoch,
            chosen_by=self.chosen_by,
        )
        if is_last and not is_drawn:
            _logger.warning('No curves.png without matplotlib. Install it with pip install "timm-multiexit[plots]".')

    def end_epoch(self, trainer: Trainer, rate: float) -> None:
        """Log what was noted of the epoch, and its line, with the rate in training images per second."""
        row = self._row
        log_epoch(self.accelerator, row, trainer.num_updates)
        self._durations.append(time.perf_counter() - self._started)
        columns = {name: eval_column(name, self.metric) for name in self.names}
        accuracy = {name: row[key] for name, key in columns.items() if key in row}
        _logger.info(format_epoch_line(row, self.num_epochs, accuracy=accuracy, rate=rate, durations=self._durations))

    def best_epochs(self, metric: str, *, is_decreasing: bool, count: int = 10) -> list[dict[str, Any]]:
        """Return the best rows by a metric, the best one last, as timm's script ends with them."""
        key = f'eval_{metric}'
        rows = sorted((row for row in self.summary.rows if key in row), key=lambda row: row[key], reverse=is_decreasing)
        return [{'epoch': row['epoch'], 'train_loss': row['train_loss'], key: row[key]} for row in rows[-count:]]


def format_epoch_line(
    row: Mapping[str, float], epochs: int, *, accuracy: Mapping[str, float], rate: float, durations: Sequence[float]
) -> str:
    """Return the line that an epoch leaves in the log.

    Args:
        row: Of the summary.
        epochs: How many there are.
        accuracy: Classifier -> top-1 or mAP in percent, shallow to deep; empty if the epoch was not evaluated.
        rate: Training images per second, of all processes.
        durations: Seconds of the last epochs, this one the last; their mean gives the time to the end of the run.

    >>> row = {'epoch': 2, 'train_loss': 1.2341, 'lr': 0.1}
    >>> format_epoch_line(row, 200, accuracy={'exit0': 61.24, 'main': 74.0}, rate=1234.4, durations=[12.2])
    'Epoch   3/200  loss 1.234  exit0 61.2 main 74.0  lr 1.0e-01  1234 img/s  12 s  ETA 0:40:03'
    """
    epoch, seconds = int(row['epoch']) + 1, durations[-1]
    parts = [f'Epoch {epoch:>{len(str(epochs))}}/{epochs}', f'loss {row["train_loss"]:.3f}']
    if accuracy:
        parts.append(' '.join(f'{name} {value:.1f}' for name, value in accuracy.items()))
    parts += [f'lr {row["lr"]:.1e}', f'{rate:.0f} img/s', f'{seconds:.0f} s' if seconds >= 9.95 else f'{seconds:.1f} s']
    eta = (epochs - epoch) * sum(durations) / len(durations)
    return '  '.join([*parts, f'ETA {timedelta(seconds=round(eta))}'])
