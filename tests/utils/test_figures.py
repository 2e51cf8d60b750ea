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
from timm_multiexit.utils.figures import encode_png, new_figure

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
