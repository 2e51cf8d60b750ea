"""Diversity of the members of a teacher, against slow oracles."""

import statistics

import pytest
import torch
from helpers.analysis import random_logits

from timm_multiexit.analysis.agreement import predict_classes
from timm_multiexit.analysis.diversity import describe_members, pairwise_disagreement, softmax_variance


def test_disagreement_is_the_mean_over_pairs_of_members():
    predictions = torch.randint(0, 3, (4, 30))
    shares = [sum(int(a != b) for a, b in zip(predictions[i], predictions[j])) / 30 for i in range(4) for j in range(i)]
    assert pairwise_disagreement(predictions) == pytest.approx(statistics.fmean(shares))
    assert pairwise_disagreement(predictions[:1]) is None


def test_softmax_variance_is_over_members_summed_over_classes(monkeypatch):
    monkeypatch.setattr('timm_multiexit.analysis.diversity._CHUNK', 7)
    logits = random_logits(num=20, classes=3)
    probabilities = [single.double().softmax(-1).tolist() for single in logits]
    expected = statistics.fmean(
        sum(statistics.pvariance([single[n][c] for single in probabilities]) for c in range(3)) for n in range(20)
    )
    assert softmax_variance(logits) == pytest.approx(expected)
    assert softmax_variance(logits[:1]) is None


def test_members_are_named_and_measured_alone():
    logits, targets = random_logits(), torch.randint(0, 5, (40,))
    described = describe_members(logits, targets, {0: 0.25, 2: 0.75})
    mean = logits[0] + 3 * logits[2]
    assert described['members'] == ['exit0', 'main']
    assert described['top1'] == pytest.approx(100 * (mean.argmax(-1) == targets).float().mean().item())
    assert described['disagreement'] == pairwise_disagreement(predict_classes(logits)[[0, 2]])
    assert described['softmax_variance'] == softmax_variance([logits[0], logits[2]])
