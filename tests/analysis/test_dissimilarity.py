"""Dissimilarity of representations, against numpy and means over pairs."""

import math
import statistics

import numpy as np
import pytest
import torch
from helpers.analysis import labels

from timm_multiexit.analysis.dissimilarity import (
    block_means,
    choose_samples,
    class_means,
    dissimilarity_matrix,
)


def test_dissimilarity_is_one_less_pearsons_correlation():
    vectors = torch.randn(12, 7)
    expected = 1 - np.corrcoef(vectors.double().numpy())
    assert np.allclose(dissimilarity_matrix(vectors), expected, atol=1e-12)
    maps = torch.randn(3, 2, 2, 2)
    assert torch.equal(dissimilarity_matrix(maps), dissimilarity_matrix(maps.reshape(3, 8)))


@pytest.mark.parametrize('value', [0.0, 0.1, 1e6])
def test_constant_features_are_like_nothing(value):
    matrix = dissimilarity_matrix(torch.stack([torch.full((7,), value), torch.full((7,), value), torch.arange(7.0)]))
    assert matrix.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_block_and_class_means_are_means_over_pairs():
    vectors, targets = torch.randn(9, 6), labels('002222557')
    matrix = dissimilarity_matrix(vectors)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = statistics.fmean(matrix[i, j].item() for i, j in pairs if targets[i] == targets[j])
    between = statistics.fmean(matrix[i, j].item() for i, j in pairs if targets[i] != targets[j])
    found = block_means(matrix, targets)
    assert found == pytest.approx({'within': within, 'between': between, 'ratio': between / within}, abs=2e-5)
    means = class_means(matrix, targets)
    for a, one in enumerate((0, 2, 5, 7)):
        for b, other in enumerate((0, 2, 5, 7)):
            values = [matrix[i, j].item() for i, j in pairs if (targets[i], targets[j]) == (one, other)]
            expected = statistics.fmean(values) if values else math.nan
            assert means[a, b].item() == pytest.approx(expected, nan_ok=True)


def test_means_without_pairs_are_none():
    ones = torch.ones(2, 2)
    assert block_means(ones, labels('01')) == {'within': None, 'between': 1.0, 'ratio': None}
    assert block_means(ones, labels('00')) == {'within': 1.0, 'between': None, 'ratio': None}


def test_samples_are_as_many_of_each_class_and_sorted_by_class():
    targets = torch.randint(0, 10, (2000,))
    places = choose_samples(targets, 500, seed=3)
    chosen = targets[places]
    assert len(set(places)) == len(places) == 500
    assert chosen.bincount().tolist() == [50] * 10
    assert chosen.tolist() == sorted(chosen.tolist())
    assert places == choose_samples(targets, 500, seed=3)
    assert places != choose_samples(targets, 500, seed=4)


def test_of_many_classes_some_are_chosen_with_ten_images_each():
    targets = torch.arange(100).repeat(30)
    chosen = targets[choose_samples(targets, 55)]
    assert sorted(chosen.unique(return_counts=True)[1].tolist()) == [11] * 5
    assert targets[choose_samples(targets, 3)].unique(return_counts=True)[1].tolist() == [2, 1]


def test_few_images_are_all_taken():
    targets = labels('1001')
    assert sorted(choose_samples(targets, 500)) == [0, 1, 2, 3]


def test_means_of_classes_leave_the_matrix_as_it_is():
    matrix = torch.ones(4, 4, dtype=torch.float64)
    class_means(matrix, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(matrix, torch.ones(4, 4, dtype=torch.float64))
