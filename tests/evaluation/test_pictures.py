"""The picture of accuracy over cost, read back from the figure."""

import builtins
import io

import pytest
from PIL import Image

from timm_multiexit.evaluation.pictures import draw_accuracy_vs_macs, make_figure

matplotlib = pytest.importorskip('matplotlib')

EXITS = {'exit 0': (0.5e9, 60.0), 'exit 1': (1.0e9, 70.0), 'main': (2.0e9, 76.0)}
CURVES = {'search': [(1.5e9, 75.0), (0.8e9, 71.0)], 'solver': [(0.9e9, 69.0)]}
SINGLES = {'plain backbone': (1.8e9, 76.0), 'small': (1.2e9, 72.0)}


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_every_point_is_where_it_was_measured():
    figure = make_figure(EXITS, CURVES, SINGLES, 'net')
    lines = lines_of(figure)
    assert list(lines['one classifier for all'].get_xydata().flatten()) == [0.5, 60, 1.0, 70, 2.0, 76]
    assert list(lines['search'].get_xydata().flatten()) == [0.8, 71, 1.5, 75]  # in order of cost, not raised
    assert list(lines['plain backbone'].get_xydata().flatten()) == [1.8, 76]
    assert set(lines) == {'one classifier for all', 'search', 'solver', 'plain backbone', 'small'}
    assert {text.get_text() for text in figure.axes[0].texts} == set(EXITS)


def test_axes_say_what_they_are():
    figure = make_figure(EXITS, CURVES, SINGLES, 'net, test split')
    axes = figure.axes[0]
    assert axes.get_xlabel() == 'mean cost of an image, GMACs'
    assert axes.get_ylabel() == 'top-1 accuracy, %'
    assert axes.get_title() == 'net, test split'
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(CURVES) | set(SINGLES) | {
        'one classifier for all'
    }


def test_small_networks_are_in_mmacs():
    figure = make_figure({'exit 0': (2e6, 90.0), 'main': (5e6, 95.0)}, {}, {}, '')
    assert figure.axes[0].get_xlabel() == 'mean cost of an image, MMACs'
    assert list(lines_of(figure)['one classifier for all'].get_xdata()) == [2.0, 5.0]


def test_picture_is_readable():
    picture = draw_accuracy_vs_macs(exits=EXITS, curves=CURVES, singles=SINGLES, title='net')
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
    assert draw_accuracy_vs_macs(exits=EXITS) is None
