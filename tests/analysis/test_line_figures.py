"""Figures of accuracy, read back."""

import pytest
from helpers.analysis import line_data

from timm_multiexit.analysis.curves import describe_curve
from timm_multiexit.analysis.line_figures import (
    draw_accuracy_over_macs,
    draw_diversity,
    draw_main_and_ensemble,
    draw_training,
)
from timm_multiexit.utils.figures import encode_png

CURVES = {
    'a/ce': describe_curve({'epochs': [1, 2, 3], 'main': [1.0, 5.0, 3.0], 'ensemble': [4.0, 6.0, 5.0]}, 3.0),
    'eed': describe_curve(
        {'epochs': [1, 2, 3, 4], 'main': [2.0, 2.0, 6.0, 7.0], 'ensemble': [2.0, 3.0, 6.0, 7.0]}, 3.0
    ),
}


def test_main_and_ensemble_are_drawn_for_each_run():
    figure = draw_main_and_ensemble(CURVES, 'top-1 accuracy, %')
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        'a/ce\nensemble - main: +2.00 at the end',
        'eed\nensemble - main: +0.00 at the end',
    ]
    assert line_data(shown[0]) == {
        'ensemble': [[1, 4.0], [2, 6.0], [3, 5.0]],
        'main': [[1, 1.0], [2, 5.0], [3, 3.0]],
    }


def test_training_shows_the_reference_and_when_it_is_reached():
    figure = draw_training(CURVES, 'top-1 accuracy, %', 'a/ce')
    lines = line_data(figure.axes[0])
    assert list(lines) == [
        'a/ce',
        'eed, at a/ce from epoch 3, deviation of changes 1.50',
        'a/ce at the end: 3.00',
    ]
    assert lines['a/ce'] == [[1, 1.0], [2, 5.0], [3, 3.0]]
    assert {y for _, y in lines['a/ce at the end: 3.00']} == {3.0}
    assert len(draw_training(CURVES, 'x', None).axes[0].get_lines()) == 2


def test_accuracy_over_macs_is_drawn_fixed_and_in_sequence():
    points = {
        'eed': [
            {'classifier': 'exit0', 'fixed': 1e6, 'sequential': 1e6, 'top1': 50.0},
            {'classifier': 'main', 'fixed': 3e6, 'sequential': 4e6, 'top1': 70.0},
            {'classifier': 'ens', 'fixed': None, 'sequential': 4e6, 'top1': 72.0},
        ],
        'plain': [{'classifier': 'main', 'fixed': 3e6, 'sequential': 3e6, 'top1': 69.0}],
    }
    axes = draw_accuracy_over_macs(points, '').axes[0]
    lines = line_data(axes)
    assert axes.get_xlabel() == 'cost of an image, MMACs'
    assert lines['eed, one exit alone'] == [[1, 50], [3, 70]]
    assert lines['eed, in sequence'] == [[1, 50], [4, 70]]
    assert lines['eed, ensemble'] == [[4, 72]]
    assert lines['plain'] == [[3, 69]]
    (plain,) = [line for line in axes.get_lines() if line.get_label() == 'plain']
    others = [line for line in axes.get_lines() if line is not plain]
    assert plain.get_markerfacecolor() == 'none', 'a run at the same place is not hidden'
    assert plain.get_markersize() > max(line.get_markersize() for line in others)


def test_runs_that_are_alike_all_show():
    curve = CURVES['eed']
    lines = draw_training({name: curve for name in 'abc'}, 'x', None).axes[0].get_lines()
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True)
    assert min(before - after for before, after in zip(widths, widths[1:])) > 0.5
    assert len({line.get_marker() for line in lines}) == 3
    assert len({line.get_color() for line in lines}) == 3


@pytest.mark.parametrize('count', [2, 4])
def test_every_panel_has_numbers_at_its_axes(count):
    diversity = {
        'teacher': {'members': ['exit0', 'main'], 'disagreement': 0.25, 'softmax_variance': 0.1},
        'gain': {'main': 1.5, 'ens': -0.5},
    }
    curves = {str(idx): CURVES['eed'] for idx in range(count)}
    for figure in (draw_main_and_ensemble(curves, 'x'), draw_diversity({'eed': diversity}, 'ce')):
        encode_png(figure)
        for axes in figure.axes:
            if axes.get_visible():
                for axis in (axes.xaxis, axes.yaxis):
                    assert any(tick.label1.get_visible() and tick.label1.get_text() for tick in axis.get_major_ticks())


def test_diversity_is_drawn_against_both_gains():
    teacher = {'members': ['exit0', 'main'], 'disagreement': 0.25, 'softmax_variance': 0.1}
    figure = draw_diversity({'eed': {'teacher': teacher, 'gain': {'main': 1.5, 'ens': -0.5}}}, 'ce')
    left, right = figure.axes
    assert line_data(left)['eed (exit0+main): main'] == [[25, 1.5]]
    assert line_data(left)['eed (exit0+main): ensemble'] == [[25, -0.5]]
    assert [line.get_xydata().tolist() for line in right.get_lines()][:2] == [[[0.1, 1.5]], [[0.1, -0.5]]]
