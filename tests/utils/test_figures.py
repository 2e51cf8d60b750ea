"""Names of people and files in figures: drawn as they are, whatever matplotlib reads into them."""

import warnings
from io import BytesIO

import pytest
import torch
from helpers.analysis import random_logits

from timm_multiexit.analysis.agreement import describe_agreement
from timm_multiexit.analysis.architecture import describe_architecture, draw_architecture
from timm_multiexit.analysis.curves import describe_curve
from timm_multiexit.analysis.line_figures import (
    draw_accuracy_over_macs,
    draw_diversity,
    draw_main_and_ensemble,
    draw_training,
)
from timm_multiexit.analysis.matrix_figures import draw_agreement, draw_dissimilarity
from timm_multiexit.evaluation.pictures import Line, plot_accuracy_over_macs
from timm_multiexit.training.summary import draw_curves
from timm_multiexit.utils.figures import COLORS, encode_png, new_figure

pytest.importorskip('matplotlib')

CURVE = describe_curve({'epochs': [1, 2, 3], 'main': [1.0, 5.0, 3.0], 'ensemble': [4.0, 6.0, 5.0]}, 3.0)
POINTS = [
    {'classifier': 'exit0', 'fixed': 1e6, 'sequential': 1e6, 'top1': 50.0},
    {'classifier': 'main', 'fixed': 3e6, 'sequential': 4e6, 'top1': 70.0},
    {'classifier': 'ens', 'fixed': None, 'sequential': 4e6, 'top1': 72.0},
]
DIVERSITY = {
    'teacher': {'members': ['exit0', 'main'], 'disagreement': 0.3, 'softmax_variance': 0.1},
    'gain': {'main': 1.0, 'ens': 2.0},
}
MEANS = {'within': 0.25, 'between': 0.5, 'ratio': 2.0}
MATRICES = {'num_samples': 4, 'classes': [0, 1], 'before': {'main': MEANS}, 'after': {'main': MEANS}}


def draw_classes(name, make_model):
    logits = random_logits()
    return draw_agreement(describe_agreement(logits, logits[-1].argmax(-1)), name, [name, *'bcde'])


FIGURES = {
    'main and ensemble': lambda name, make: draw_main_and_ensemble({name: CURVE, 'other': CURVE}, 'top-1'),
    'training': lambda name, make: draw_training({name: CURVE, 'other': CURVE}, 'top-1', name),
    'macs': lambda name, make: draw_accuracy_over_macs({name: POINTS}, name),
    'diversity': lambda name, make: draw_diversity({name: DIVERSITY}, name),
    'agreement': draw_classes,
    'dissimilarity': lambda name, make: draw_dissimilarity(MATRICES, {'before': [torch.eye(4)], 'after': [torch.eye(4)]}, name),
    'architecture': lambda name, make: draw_architecture(describe_architecture(make(), (3, 64, 64)), name),
    'validation': lambda name, make: plot_accuracy_over_macs([Line([(1e6, 60.0)], name, {}, [name])], title=name),
}  # fmt: skip
# The second is drawn with a glyph for what is no character.
NAMES = {'formula': r'x$\foo$', 'bytes': 'x\udcff', 'dollars': '$_{$^', 'underscore': '_$x$', 'percent': r'100%\$'}


@pytest.mark.parametrize('name', NAMES.values(), ids=NAMES)
@pytest.mark.parametrize('draw', FIGURES.values(), ids=FIGURES)
def test_all_names_are_drawn(draw, name, make_model):
    figure = draw(name, make_model)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        assert encode_png(figure).startswith(b'\x89PNG')


@pytest.mark.parametrize('name', NAMES.values(), ids=NAMES)
def test_run_of_any_name_has_curves(name, tmp_path):
    rows = [{'epoch': epoch, 'train_loss': 1.0, 'eval_top1': 50.0} for epoch in range(2)]
    assert draw_curves(tmp_path / 'curves.png', rows, ('main',), title=name)
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_dollar_signs_are_drawn_as_matplotlib_draws_escaped_ones():
    plain, escaped = (new_figure(4, 3, title) for title in ('a $x$ and $y$', r'a \$x\$ and \$y\$'))
    expected = BytesIO()
    escaped.savefig(expected, dpi=150, format='png')
    assert encode_png(plain) == expected.getvalue()


@pytest.mark.parametrize('draw', [FIGURES['training'], FIGURES['macs'], FIGURES['diversity'], FIGURES['validation']])
def test_legend_has_names_that_begin_with_an_underscore(draw, make_model):
    texts = {name: [text.get_text() for text in draw(name, make_model).legends[0].get_texts()] for name in ('_x', 'x')}
    assert len(texts['x']) >= 1
    assert [text.replace('_x', 'x').strip() for text in texts['_x']] == texts['x']


# How people without cones for medium and for long wavelengths see linear RGB (Machado, Oliveira and Fernandes 2009,
# table 1, severity 1.0).
BLINDNESS = {
    'deuteranopia': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    'protanopia': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def to_lab(color, matrix):
    """Return CIE L*a*b* (D65) of a colour as it is seen through the matrix."""
    rgb = torch.tensor([int(color[idx : idx + 2], 16) / 255 for idx in (1, 3, 5)])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (torch.tensor(matrix) @ linear).clamp(0, 1)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    scaled = (to_xyz @ seen) / torch.tensor([0.9505, 1.0, 1.089])
    x, y, z = torch.where(scaled > 0.008856, scaled ** (1 / 3), 7.787 * scaled + 16 / 116).tolist()
    return torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize('matrix', BLINDNESS.values(), ids=BLINDNESS)
def test_colours_are_told_apart_by_colour_blind_readers(matrix):
    seen = [to_lab(color, matrix) for color in COLORS]
    distances = torch.pdist(torch.stack(seen))
    assert float(distances.min()) > 10, distances  # 2.3 is just noticeable
    # The check itself: red and green of one lightness are alike.
    red, green = (to_lab(color, BLINDNESS['deuteranopia']) for color in ('#a05a30', '#6e7030'))
    assert float((red - green).norm()) < 10
