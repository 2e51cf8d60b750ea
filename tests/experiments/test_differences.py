"""Statistics of paired differences, and which methods are compared."""

import math
import statistics

import pytest
import torch
from evidence.differences import baselines, describe_difference, interval, paired
from helpers.experiments import METHODS


def test_interval_holds_the_mean_in_nineteen_of_twenty_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 0.7 + 1.5
    hits = sum(abs(mean - 1.5) <= half for mean, half in (interval(sample.tolist()) for sample in samples))
    # Four standard deviations of the binomial distribution.
    assert abs(hits / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_interval_is_smaller_than_that_of_unpaired_runs_where_seeds_move_both(results):
    differences = paired(results, 'eed-kl', 'ce', 'main')
    assert differences == pytest.approx([0.5, 0.6, 0.45])
    mean, half = interval(differences)
    assert mean == pytest.approx(0.5167, abs=1e-4)
    assert half == pytest.approx(4.302653 * statistics.stdev([0.5, 0.6, 0.45]) / math.sqrt(3))
    assert half < 0.2 < 4.303 * statistics.stdev([80.2, 81.1, 80.7]) / math.sqrt(3)


def test_pairs_are_of_one_seed(results):
    without = [result for result in results if (result['method'], result['seed']) not in (('ce', 1), ('eed-kl', 0))]
    assert paired(without, 'eed-kl', 'ce', 'main') == pytest.approx([0.45])
    assert paired(without, 'eed-kl', 'plain', 'ens') == []


@pytest.mark.parametrize(
    ('differences', 'reading'),
    [
        ([0.3, 0.5, 0.4], 'above 0'),
        ([-0.3, -0.5, -0.4], 'below 0'),
        ([0.1, -0.1, 0.0], 'no difference seen'),
        ([1.0, 1.5, 1.1], 'above 0'),  # by how much is not known to 0.5 points
        ([0.6, -0.2, 0.1], 'not resolved'),  # half of the interval is 1.0
        ([1.0, 1.0], 'not resolved'),  # by chance
    ],
)
def test_reading_says_what_the_interval_says(differences, reading):
    assert describe_difference(differences).endswith(f', {reading}')


def test_distances_are_compared_with_their_like():
    assert baselines('eed-kl', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl']
    assert baselines('eed-mse-teacher-0-main', METHODS) == ['plain', 'ce', 'phuong-mse', 'byot-mse', 'eed-mse']
    assert baselines('eed-kl-narrow', METHODS) == ['plain', 'eed-kl', 'ce-narrow', 'phuong-kl-narrow', 'byot-kl-narrow']
    assert baselines('eed-mse-bottleneck', METHODS) == ['plain', 'eed-mse', 'ce-bottleneck']
    assert baselines('beed-kl', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl', 'eed-kl']
    assert baselines('eed-kl-weight-1', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl', 'eed-kl']
    frozen = ['plain', 'eed-kl', 'eed-kl-quarters', 'ce-quarters-frozen']
    assert baselines('eed-kl-quarters-frozen', METHODS) == frozen
    fixed = ['plain', 'eed-kl', 'eed-kl-quarters', 'plain-fixednorms', 'ce-quarters-fixednorms']
    assert baselines('eed-kl-quarters-fixednorms', METHODS) == fixed
    assert baselines('plain-fixednorms', METHODS) == ['plain']
    assert [baselines(name, METHODS) for name in ('plain', 'ce', 'phuong-kl')] == [[], ['plain'], ['plain']]
    assert baselines('ce-narrow', METHODS) == ['plain', 'ce']


def test_variants_are_compared_with_what_they_vary():
    assert baselines('eed-kl-skill', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl', 'eed-kl']
    rivals = ['plain', 'eed-kl', 'ce-narrow', 'phuong-kl-narrow', 'byot-kl-narrow', 'eed-kl-narrow']
    assert baselines('eed-kl-skill-narrow', METHODS) == rivals
    assert baselines('eed-kl-quarters', METHODS) == ['plain', 'eed-kl', 'ce-quarters']
