"""The table of a run, and its curves: summary.csv and curves.png."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_multiexit.checkpoints.run_folder import read_summary
from timm_multiexit.utils.figures import depth_shades, encode_png, new_figure, show_epochs
from timm_multiexit.utils.files import RESUME, replacing
from timm_multiexit.utils.text import ENSEMBLE

_EVAL_METRICS = ('top1', 'top5', 'map', 'micro_f1', 'macro_f1', 'sample_f1')

_TIMM_COLUMNS = ('epoch', 'train_loss', 'eval_loss', *(f'eval_{metric}' for metric in _EVAL_METRICS), 'lr')


class Summary:
    """The rows of summary.csv, one per evaluated epoch: timm's columns in timm's order, then those of the exits.

    >>> summary = Summary()
    >>> row = summary.add(0, {'loss': 2.5, 'exit0_loss': 3.0}, {'loss': 2.0, 'top1': 60.0, 'exit0_top1': 50.0}, lr=0.1)
    >>> summary.columns
    ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'lr', 'train_exit0_loss', 'eval_exit0_top1')
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    @property
    def rows(self) -> list[dict[str, float]]:
        """One dict per row, column -> number; without a validation split there are no `eval_*` keys."""
        return [dict(row) for row in self._rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all rows together."""
        found = dict.fromkeys(key for row in self._rows for key in row)
        others = [key for key in found if key not in _TIMM_COLUMNS]
        # In training columns before evaluation columns even where the first epoch was not evaluated.
        others.sort(key=lambda key: not key.startswith('train_'))
        return (*(key for key in _TIMM_COLUMNS if key in found), *others)

    def add(self, epoch: int, train: Mapping[str, float], eval: Mapping[str, float], lr: float) -> dict[str, float]:
        """Add the row of an epoch and return it; rows of it and of later ones, left by an earlier run, are dropped.

        Metrics of main or the whole have bare names (`loss`, `exit0_top1`); `eval` is empty if there was no evaluation.
        """
        row: dict[str, float] = {'epoch': int(epoch), 'lr': float(lr)}
        row |= {f'train_{key}': float(value) for key, value in train.items()}
        row |= {f'eval_{key}': float(value) for key, value in eval.items()}
        self._rows = [old for old in self._rows if old['epoch'] < epoch] + [row]
        return dict(row)

    def write(self, path: Path | str) -> None:
        """Write the whole file, or nothing: a kill leaves the file as it was."""
        with replacing(path, advice=RESUME) as draft, draft.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._rows)

    def read(self, path: Path | str, before: int) -> None:
        """Take the rows of a file, timm's own too, up to an epoch, in place of all there are."""
        self._rows = [row for row in read_summary(path) if row['epoch'] < before]

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as plain lists, dicts and numbers, which `torch.load(weights_only=True)` reads."""
        return {'rows': self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows that `state_dict` gave, in place of all there are."""
        self._rows = [dict(row) for row in state['rows']]


def eval_column(name: str, metric: str) -> str:
    """Return the column of a classifier's metric; main's has timm's name."""
    return f'eval_{metric}' if name == 'main' else f'eval_{name}_{metric}'


def draw_curves(
    path: Path | str,
    rows: Sequence[Mapping[str, float]],
    names: Sequence[str],
    title: str = '',
    *,
    images: str = '',
    best_epoch: int | None = None,
    chosen_by: str = '',
) -> bool:
    """Draw accuracy of every classifier that is named, shallow to deep, and both losses, over the epochs.

    Numbers that are missing or not finite are left out. The PNG file is replaced as a whole; where matplotlib is not
    installed nothing is written, and the answer is False.

    Args:
        path: Of the PNG file.
        rows: Of the summary.
        names: Classifiers.
        title: Of the figure.
        images: What accuracy is measured on, in words.
        best_epoch: Index of the epoch that is kept, which is marked; None for none yet.
        chosen_by: The metric that it was chosen by.
    """
    try:
        figure = new_figure(11, 4.5, title)
    except ImportError:
        return False
    # The first metric that was evaluated; without evaluation there is only a panel of losses.
    metric = next((name for name in ('top1', 'map') if any(f'eval_{name}' in row for row in rows)), None)
    if metric is None:
        loss_axes = figure.subplots()
    else:
        accuracy_axes, loss_axes = figure.subplots(1, 2, width_ratios=(2, 1))
        _draw_accuracy(accuracy_axes, rows, names, metric)
        if best_epoch is not None:
            label = f'epoch {best_epoch + 1}, best {chosen_by}'.rstrip()
            accuracy_axes.axvline(best_epoch + 1, color='0.5', linestyle=':', linewidth=1.5, label=label)
        _finish_axes(accuracy_axes, {'top1': 'top-1 accuracy, %', 'map': 'mean average precision, %'}[metric])
        if images:
            accuracy_axes.set_title(f'measured on {images}', fontsize=9)
    _draw_line(loss_axes, rows, 'train_loss', label='training, all classifiers', color='black', linestyle='-')
    _draw_line(loss_axes, rows, 'eval_loss', label='evaluation, main', color='black', linestyle='--')
    _finish_axes(loss_axes, 'loss')
    with replacing(path, advice=RESUME) as draft:
        draft.write_bytes(encode_png(figure))
    return True


def _draw_accuracy(axes: Any, rows: Sequence[Mapping[str, float]], names: Sequence[str], metric: str) -> None:
    singles = [name for name in names if name != ENSEMBLE]
    colors = dict(zip(singles, depth_shades(len(singles))))
    step = min(1.0, 4 / max(len(singles) - 1, 1))
    for idx, name in enumerate(names):
        style: dict[str, Any] = {'color': 'black', 'linestyle': '--', 'zorder': 3}
        if name != ENSEMBLE:
            # A deeper one is wider and below, so that classifiers that are alike all show.
            width = 1.5 + step * idx
            style = {'color': colors[name], 'linewidth': max(3, width) if name == 'main' else width}
            style['zorder'] = 2 + (len(singles) - idx) / (len(singles) + 1)
        _draw_line(axes, rows, eval_column(name, metric), label='ensemble' if name == ENSEMBLE else name, **style)


def _draw_line(axes: Any, rows: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    points = [(row['epoch'] + 1, row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if points:
        axes.plot(*zip(*points), marker='o' if len(points) < 20 else None, markersize=3, **style)


def _finish_axes(axes: Any, label: str) -> None:
    show_epochs(axes)
    axes.set(ylabel=label)
    if axes.lines:
        axes.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.12), ncols=3)  # off the lines
