"""Agreement of classifiers, counted image by image."""

import numpy as np
import pytest
import torch
from helpers.analysis import labels, random_logits

import timm_multiexit as tme
from timm_multiexit.analysis.agreement import (
    agreement_matrix,
    describe_agreement,
    frequent_pairs,
    outcome_confusion,
    predict_classes,
    prediction_confusion,
)


def test_predictions_end_with_those_of_the_mean_logits():
    logits = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.5]])]
    assert predict_classes(logits).tolist() == [[0], [1], [1], [0]]  # the mean is 1.0 and 0.83


def test_agreement_is_counted_image_by_image():
    predictions = torch.randint(0, 3, (4, 50))
    expected = [[sum(int(a == b) for a, b in zip(one, other)) / 50 for other in predictions] for one in predictions]
    assert torch.allclose(agreement_matrix(predictions), torch.tensor(expected).double())


def test_outcomes_are_counted_image_by_image():
    predictions, targets = torch.randint(0, 3, (3, 50)), torch.randint(0, 3, (50,))
    expected = np.zeros((3, 3, 2, 2))
    for i in range(3):
        for j in range(3):
            for n in range(50):
                expected[i, j, int(predictions[i, n] != targets[n]), int(predictions[j, n] != targets[n])] += 1 / 50
    assert np.allclose(outcome_confusion(predictions, targets), expected)


def test_confusion_of_predictions_has_the_first_in_rows():
    confusion = prediction_confusion(labels('0022'), labels('0120'), 3)
    assert confusion.tolist() == [[0.25, 0.25, 0], [0, 0, 0], [0.25, 0, 0.25]]


def test_frequent_pairs_are_of_different_predictions_most_frequent_first():
    assert frequent_pairs(labels('00001122'), labels('00001112')[[0, 4, 4, 7, 0, 1, 7, 0]]) == [
        (0, 1, 0.25),
        (1, 0, 0.25),
        (0, 2, 0.125),
        (2, 0, 0.125),
    ]
    assert frequent_pairs(labels('01'), labels('01')) == []


def test_confusions_of_many_classes_are_left_out():
    targets = torch.zeros(4, dtype=torch.long)
    assert set(describe_agreement([torch.randn(4, 100)] * 2, targets)['confusions']) == {'exit0'}
    assert describe_agreement([torch.randn(4, 101)] * 2, targets)['confusions'] == {}


def test_targets_of_other_classes_are_refused():
    with pytest.raises(tme.MultiExitError, match=r'must be in \[0, 4\], the classes of the network, got 0 to 7'):
        describe_agreement(random_logits(num=2), torch.tensor([0, 7]))
