"""Pictures of accuracy: main against the ensemble, runs against each other, over MACs, and over diversity."""

import math
from collections.abc import Mapping
from typing import Any

from timm_multiexit.evaluation.pictures import Line, plot_accuracy_over_macs
from timm_multiexit.utils.figures import COLORS, MARKERS, legend_label, line_style, new_figure, show_epochs
from timm_multiexit.utils.text import ENSEMBLE

_PANELS_PER_ROW = 3


def draw_main_and_ensemble(curves: Mapping[str, Mapping[str, Any]], label: str) -> Any:
    """Return figure 3: a panel per run that `describe_curve` described, all on one scale, with the gap at the end."""
    columns = min(len(curves), _PANELS_PER_ROW)
    rows = math.ceil(len(curves) / columns)
    figure = new_figure(max(6, 4.5 * columns), 0.5 + 3.6 * rows, 'Main and the ensemble of all classifiers in training')
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, curve) in zip(panels.flat, curves.items()):
        axes.plot(curve['epochs'], curve['ensemble'], color=COLORS[1], linestyle='--', label='ensemble')
        axes.plot(curve['epochs'], curve['main'], color=COLORS[0], label='main')
        axes.fill_between(curve['epochs'], curve['main'], curve['ensemble'], color='0.85')
        axes.set_title(f'{name}\nensemble - main: {curve["final_gap"]:+.2f} at the end', fontsize=9)
        show_epochs(axes)
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.legend(fontsize=8, loc='lower right')
    for axes in panels[:, 0]:
        axes.set_ylabel(label)
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    return figure


def draw_training(curves: Mapping[str, Mapping[str, Any]], label: str, reference: str | None) -> Any:
    """Return figure 5: main of all runs over the epochs; how fast and how stable each is stands in the legend.

    The final accuracy of the reference is drawn as a line.
    """
    figure = new_figure(9, 5.5 + 0.2 * len(curves), 'Main in training')
    axes = figure.subplots()
    for idx, (name, curve) in enumerate(curves.items()):
        points = len(curve['epochs']) < 20
        axes.plot(
            curve['epochs'],
            curve['main'],
            label=legend_label(_describe_run(name, curve, reference)),
            marker=MARKERS[idx % len(MARKERS)] if points else None,
            markersize=4,
            # Thinner than those below it, so that where two runs are alike both show.
            linewidth=1.2 + 2.4 * (1 - idx / max(len(curves) - 1, 1)),
            **line_style(idx),
        )
    if reference is not None and reference in curves:
        target = curves[reference]['final_main']
        axes.axhline(target, color='0.5', linewidth=1, label=legend_label(f'{reference} at the end: {target:.2f}'))
    show_epochs(axes)
    axes.set_ylabel(label)
    figure.legend(fontsize=8, loc='outside lower center', ncols=1)
    return figure


def _describe_run(name: str, curve: Mapping[str, Any], reference: str | None) -> str:
    parts = [name]
    if reference is not None and name != reference and 'epochs_to_keep' in curve:
        epochs = curve['epochs_to_keep']
        parts.append(f'not at {reference} yet' if epochs is None else f'at {reference} from epoch {epochs}')
    if curve['instability'] is not None:
        parts.append(f'deviation of changes {curve["instability"]:.2f}')
    return ', '.join(parts)


def draw_accuracy_over_macs(points: Mapping[str, list[Mapping[str, Any]]], title: str) -> Any:
    """Return accuracy over MACs: a line of all exits in sequence, a dotted one of each alone, a star for the ensemble.

    `points` are run -> what `accuracy_over_macs` returned; a run without exits is one point, a ring around what is at
    the same place.
    """
    lines = []
    for idx, (name, line) in enumerate(points.items()):
        color, marker = COLORS[idx % len(COLORS)], MARKERS[idx % len(MARKERS)]
        singles = [point for point in line if point['classifier'] != ENSEMBLE]
        if len(singles) == 1:
            ring = {'color': color, 'marker': 'o', 'markersize': 15, 'markerfacecolor': 'none', 'markeredgewidth': 2}
            lines.append(Line([(singles[0]['fixed'], singles[0]['top1'])], name, {**ring, 'linestyle': 'none'}))
            continue
        for key, dashes, filling in (('fixed', ':', 'white'), ('sequential', '-', color)):
            lines.append(
                Line(
                    [(point[key], point['top1']) for point in singles],
                    f'{name}, {"one exit alone" if key == "fixed" else "in sequence"}',
                    {'color': color, 'linestyle': dashes, 'marker': marker, 'markerfacecolor': filling},
                )
            )
        star = {'color': color, 'marker': '*', 'markersize': 13, 'linestyle': 'none'}
        lines += [
            Line([(point['sequential'], point['top1'])], f'{name}, ensemble', star) for point in line[len(singles) :]
        ]
    return plot_accuracy_over_macs(
        lines, title=title, xlabel='cost of an image', width=9, height=6 + 0.15 * len(points)
    )


def draw_diversity(rows: Mapping[str, Mapping[str, Any]], reference: str) -> Any:
    """Return table IV as a picture: gain over the reference against two measures of how diverse the teacher is.

    `rows` are run -> `teacher` (`describe_members`, of two or more members) and `gain` (`describe_gain`).
    """
    figure = new_figure(10, 4.6 + 0.2 * len(rows), f'Diversity of the teacher and gain over {reference}')
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, xlabel, factor in (
        (panels[0], 'disagreement', 'mean pairwise disagreement of its members, %', 100),
        (panels[1], 'softmax_variance', 'variance of their probabilities', 1),
    ):
        for idx, (name, row) in enumerate(rows.items()):
            x, color = factor * row['teacher'][key], COLORS[idx % len(COLORS)]
            members = '+'.join(row['teacher']['members'])
            for kind, marker, filling in (('main', 'o', color), (ENSEMBLE, '^', 'white')):
                text = legend_label(f'{name} ({members}): {"main" if kind == "main" else "ensemble"}')
                label = text if axes is panels[0] else None
                axes.plot(x, row['gain'][kind], marker, color=color, markerfacecolor=filling, markersize=8, label=label)
        axes.axhline(0, color='0.5', linewidth=1)
        axes.set_xlabel(xlabel)
        axes.tick_params(labelleft=True)
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('gain in top-1, points')
    figure.legend(fontsize=8, loc='outside lower center', ncols=2)
    return figure
