"""Figures of matrices, read back."""

import numpy as np
import torch
from helpers.analysis import random_logits

from timm_multiexit.analysis.agreement import describe_agreement
from timm_multiexit.analysis.matrix_figures import draw_agreement, draw_dissimilarity


def test_agreement_is_drawn_in_percent_without_the_diagonal_of_confusions():
    logits = random_logits()
    targets = logits[-1].argmax(-1)  # main is always right, so that rows and columns differ
    numbers = describe_agreement(logits, targets)
    figure = draw_agreement(numbers, 'net', list('abcde'))
    same, first, second, *_ = figure.axes
    assert np.array_equal(same.get_images()[0].get_array(), numbers['same_prediction'])
    assert [text.get_text() for text in first.texts] == [
        f'{100 * share:.1f}' for row in numbers['outcomes'][0][2] for share in row
    ]
    assert (second.get_xlabel(), second.get_ylabel()) == ('main', 'exit1')
    confusion = next(axes for axes in figure.axes if axes.get_ylabel() == 'class by exit1')
    drawn = np.ma.filled(confusion.get_images()[0].get_array(), np.nan)
    expected = 100 * np.array(numbers['confusions']['exit1'])
    assert np.isnan(np.diag(drawn)).all()
    assert np.allclose(drawn[~np.eye(5, dtype=bool)], expected[~np.eye(5, dtype=bool)])
    assert [label.get_text() for label in confusion.get_xticklabels()] == list('abcde')


def test_agreement_of_many_classes_is_drawn_without_confusions():
    numbers = describe_agreement(random_logits(2, classes=101), torch.zeros(40, dtype=torch.long))
    assert [axes.get_title() for axes in draw_agreement(numbers, '').axes] == [
        'same prediction, % of images',
        'exit0 and main, % of images',
    ]


def test_dissimilarity_is_drawn_before_and_after_every_linear_layer():
    means = {'within': 0.25, 'between': 0.5, 'ratio': 2.0}
    numbers = {'num_samples': 4, 'classes': [0, 1]}
    numbers |= {side: {'exit0': means, 'main': means | {'ratio': None}} for side in ('before', 'after')}
    matrices = {side: [torch.rand(4, 4), torch.rand(4, 4)] for side in ('before', 'after')}
    figure = draw_dissimilarity(numbers, matrices, '')
    panels = figure.axes[:4]
    assert [axes.get_title() for axes in panels[::3]] == [
        'exit0, before the FC layer\nwithin 0.25, between 0.50, ratio 2.0',
        'main, after the FC layer\nwithin 0.25, between 0.50',
    ]
    drawn = [torch.tensor(np.asarray(axes.get_images()[0].get_array())) for axes in panels]
    assert all(torch.equal(one, other) for one, other in zip(drawn, [*matrices['before'], *matrices['after']]))
