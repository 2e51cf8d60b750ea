"""The picture of accuracy over cost, read back from the figure."""

import builtins
import io

import pytest
from PIL import Image

from timm_multiexit.evaluation.pictures import draw_validation, plot_accuracy_over_macs, validation_lines

matplotlib = pytest.importorskip('matplotlib')


def make_rows(*places):
    """Return rows of a table, of classifiers in sequence at (GMACs, top-1), main and the ensemble last."""
    idxs = (*range(len(places) - 2), 'main', 'ens')
    return [
        {'exit_idx': idx, 'GMACs fixed': 0.9 * macs, 'GMACs sequential': macs, 'top-1': top1}
        for idx, (macs, top1) in zip(idxs, places)
    ]


ROWS = make_rows((0.5, 60.0), (1.0, 70.0), (2.0, 76.0), (2.0, 77.0))
CURVE = {
    'points': [
        {'solver': {'macs': 0.9e9, 'top-1': 69.0}, 'search': {'macs': 1.5e9, 'top-1': 75.0}},
        {'solver': {'macs': 0.7e9, 'top-1': 66.0}, 'search': {'macs': 0.8e9, 'top-1': 71.0}},
        {'solver': {'macs': 0.6e9, 'top-1': 61.0}, 'search': None},
    ]
}
DYNAMIC = [
    {'policy': 'main', 'kind': 'reference', 'macs': 1.8e9, 'top-1': 76.0},
    {'policy': 'budget 60%', 'kind': 'budget', 'macs': 0.8e9, 'top-1': 71.0},
    {'policy': 'threshold 0.5', 'kind': 'threshold', 'macs': 0.7e9, 'top-1': 70.0},
]
SECTIONS = {'curve': CURVE, 'dynamic': DYNAMIC, 'compare': [{'static model': 'small', 'GMACs': 1.2, 'top-1': 72.0}]}
LABELS = {
    'one exit alone (exit_idx)',
    'with all exits before it',
    'policies that are saved',
    "budgets, MSDNet's solver",
    'budgets, search',
    'ensemble of all',
    'small',
}


def make_figure(rows=ROWS, sections=SECTIONS, title=''):
    return plot_accuracy_over_macs(validation_lines(rows, sections), title=title)


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_every_point_is_where_it_was_measured():
    figure = make_figure()
    lines = lines_of(figure)
    assert list(lines['one exit alone (exit_idx)'].get_xydata().flatten()) == [0.45, 60, 0.9, 70, 1.8, 76]
    assert list(lines['with all exits before it'].get_xydata().flatten()) == [0.5, 60, 1.0, 70, 2.0, 76]
    assert list(lines['policies that are saved'].get_xydata().flatten()) == [0.8, 71]
    assert list(lines['budgets, search'].get_xydata().flatten()) == [0.8, 71, 1.5, 75]  # in order of cost, not raised
    assert list(lines['ensemble of all'].get_xydata().flatten()) == [2.0, 77]
    assert list(lines['small'].get_xydata().flatten()) == [1.2, 72]
    assert set(lines) == LABELS
    assert {text.get_text() for text in figure.axes[0].texts} == {'exit 0', 'exit 1', 'main', 'budget 60%'}


def test_axes_say_what_they_are():
    figure = make_figure(title='net, test split')
    axes = figure.axes[0]
    assert axes.get_xlabel() == 'mean cost of an image, GMACs'
    assert axes.get_ylabel() == 'top-1 accuracy, %'
    assert figure.get_suptitle() == 'net, test split'
    assert {text.get_text() for text in figure.legends[0].get_texts()} == LABELS


def test_small_networks_are_in_mmacs():
    figure = make_figure(make_rows((0.002, 90.0), (0.005, 95.0), (0.005, 95.0)), {})
    assert figure.axes[0].get_xlabel() == 'mean cost of an image, MMACs'
    assert list(lines_of(figure)['with all exits before it'].get_xdata()) == [2.0, 5.0]


def test_picture_is_readable():
    picture = draw_validation(ROWS, SECTIONS, 'net')
    with Image.open(io.BytesIO(picture), formats=['PNG']) as image:
        image.load()
        assert image.size == (1200, 900)
        assert len(set(image.convert('L').tobytes())) > 10  # there is something on it


def test_without_matplotlib_there_is_no_picture(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', refuse)
    assert draw_validation(ROWS, {}, '') is None


def test_cascade_is_a_line_and_its_models_are_points():
    rows = [
        {'kind': 'main', 'name': 'main', 'macs': 1.8e9, 'top-1': 76.0},
        {'kind': 'static', 'name': 'tiny', 'macs': 0.4e9, 'top-1': 65.0},
    ]
    lines = lines_of(make_figure(sections=SECTIONS | {'rivals': {'rows': rows, 'cascade': {'curve': CURVE}}}))
    assert set(lines) == LABELS | {'cascade of two models', 'tiny'}
    assert list(lines['cascade of two models'].get_xydata().flatten()) == [0.8, 71, 1.5, 75]
    assert list(lines['tiny'].get_xydata().flatten()) == [0.4, 65]


def test_exits_alone_and_in_sequence_look_unlike_each_other():
    lines = lines_of(make_figure())
    alone, sequence = lines['one exit alone (exit_idx)'], lines['with all exits before it']
    assert alone.get_linestyle() != sequence.get_linestyle()
    assert sequence.get_markerfacecolor() == 'none'  # at exit 0 both are at one place
    assert sequence.get_markersize() > alone.get_markersize()
