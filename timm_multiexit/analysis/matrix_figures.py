"""Pictures of matrices: where classifiers agree, and how unlike representations are."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from timm_multiexit.utils.figures import annotate_cells, drawable, new_figure
from timm_multiexit.utils.text import ENSEMBLE

_MAX_NAMED = 12  # classes that fit beside a matrix
_MAX_DISSIMILARITY = 1.2  # of the scale of colours, the same for all runs


def draw_agreement(numbers: Mapping[str, Any], title: str, class_names: Sequence[str] | None = None) -> Any:
    """Return figure 2: who predicts the same, main against each exit by right and wrong, and by class.

    `numbers` are those of `describe_agreement`; names of the classes are for a confusion of a few.
    """
    names = [{ENSEMBLE: 'ensemble'}.get(name, name) for name in numbers['classifiers']]
    main = len(names) - 2
    rows = 2 if numbers['confusions'] else 1
    figure = new_figure(3.4 * (main + 1) + 0.8, 3.8 * rows + 0.4, title)
    panels = figure.subplots(rows, main + 1, squeeze=False)
    _draw_shares(panels[0, 0], numbers['same_prediction'], names, names, 'same prediction, % of images')
    for idx in range(main):
        matrix = numbers['outcomes'][idx][main]
        sides = ['right', 'wrong']
        _draw_shares(panels[0, idx + 1], matrix, sides, sides, f'{names[idx]} and main, % of images')
        panels[0, idx + 1].set(xlabel='main', ylabel=names[idx])
    if numbers['confusions']:
        panels[1, 0].set_visible(False)
        _draw_confusions(figure, panels[1, 1:], numbers['confusions'], class_names)
    return figure


def _draw_shares(axes: Any, matrix: list[list[float]], rows: list[str], columns: list[str], title: str) -> None:
    axes.imshow(matrix, cmap='Blues', vmin=0, vmax=1.0)
    axes.set_xticks(range(len(columns)), columns, rotation=45 if len(columns) > 2 else 0, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title, fontsize=9)
    annotate_cells(axes, matrix)


def _draw_confusions(
    figure: Any, panels: Sequence[Any], confusions: Mapping[str, list[list[float]]], class_names: Sequence[str] | None
) -> None:
    """Draw where predictions differ; the diagonal, which would outshine the rest, is left blank."""
    different = {
        name: [[float('nan') if x == y else 100 * share for x, share in enumerate(row)] for y, row in enumerate(matrix)]
        for name, matrix in confusions.items()
    }
    highest = max(share for matrix in different.values() for row in matrix for share in row if share == share)
    image = None
    for axes, (name, matrix) in zip(panels, different.items()):
        image = axes.imshow(matrix, cmap='magma_r', vmin=0, vmax=highest or 1.0)
        axes.set(xlabel='class by main', ylabel=f'class by {name}')
        axes.set_title('different predictions', fontsize=9)
        axes.set_facecolor('0.9')
        if class_names and len(class_names) == len(matrix) <= _MAX_NAMED:
            labels = [drawable(label) for label in class_names]
            axes.set_xticks(range(len(matrix)), labels, rotation=90, fontsize=7)
            axes.set_yticks(range(len(matrix)), labels, fontsize=7)
    figure.colorbar(image, ax=list(panels), label='% of images', shrink=0.8)


def draw_dissimilarity(numbers: Mapping[str, Any], matrices: Mapping[str, Sequence[Tensor]], title: str) -> Any:
    """Return figure 4: a matrix per classifier before and after its linear layer, samples sorted by class.

    Numbers and matrices are those of `describe_dissimilarity`.
    """
    names = list(numbers['before'])
    figure = new_figure(2.9 * len(names) + 1, 6.8, title)
    panels = figure.subplots(2, len(names), squeeze=False)
    image = None
    for row, side in zip(panels, ('before', 'after')):
        for axes, name, matrix in zip(row, names, matrices[side]):
            image = axes.imshow(
                matrix.numpy(), cmap='viridis', vmin=0, vmax=_MAX_DISSIMILARITY, interpolation='nearest'
            )
            axes.tick_params(labelsize=7)
            axes.set_title(f'{name}, {side} the FC layer\n{_describe_blocks(numbers[side][name])}', fontsize=8)
    panels[1, 0].set_xlabel(
        f'{numbers["num_samples"]} images of {len(numbers["classes"])} classes, sorted by class', fontsize=8
    )
    figure.colorbar(image, ax=panels, label='1 - correlation', extend='max', shrink=0.8)
    return figure


def _describe_blocks(means: Mapping[str, Any]) -> str:
    parts = [f'{name} {means[name]:.2f}' for name in ('within', 'between') if means[name] is not None]
    return ', '.join(parts) + ('' if means['ratio'] is None else f', ratio {means["ratio"]:.1f}')
