"""Bounded drops in accuracy: the p-value by hand, and how often the guarantee holds on a known population."""

import math
import warnings

import pytest
import torch

from timm_multiexit.calibration.bounded_drop import drop_losses, find_path, last_safe, p_value
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import calibrate, search_budgets
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

COSTS = StageCosts((30, 60, 100), (3, 2))
MAX_DROP, DELTA = 0.02, 0.1


def p_value_by_loop(losses, limit, past, delta):
    wealth, best, seen = 1.0, 1.0, list(past)
    for loss in losses:
        values = [0.0, 1.0, *seen]
        mean = sum(values) / len(values)
        variance = sum(value**2 for value in values) / len(values) - mean**2
        bet = min(math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)), 0.9 / (1 - limit))
        wealth *= 1 + bet * (limit - loss)
        best = max(best, wealth)
        seen.append(loss)
    return 1 / best


@pytest.mark.parametrize('limit', [0.3, 0.505, 0.55])
@pytest.mark.parametrize('delta', [0.01, 0.1])
def test_p_value_is_that_of_the_gambler(limit, delta):
    past, losses = torch.rand(20).round(decimals=1), torch.rand(60) * 0.9
    expected = p_value_by_loop(losses.tolist(), limit, past.tolist(), delta)
    assert p_value(losses, limit, past=past, delta=delta) == pytest.approx(expected, rel=1e-6)


def test_p_value_by_hand():
    # No loss five times, with the largest bet of 0.9 / 0.5: a wealth of 1.9 ** 5.
    assert p_value(torch.zeros(5), 0.5, past=torch.tensor([0.0, 1.0])) == pytest.approx(1.9**-5)
    # One loss of 1 takes nine tenths, and the wealth before it counts.
    assert p_value(torch.tensor([0.0, 1.0]), 0.5, past=torch.tensor([])) == pytest.approx(1 / 1.9, rel=1e-6)
    assert p_value(torch.ones(50), 0.5, past=torch.zeros(5)) == 1


@pytest.mark.parametrize('shares', [(0.02, 0.94, 0.04), (0.2, 0.58, 0.22), (0.0, 0.9, 0.1)])
def test_p_value_at_the_limit_is_small_no_more_often_than_it_says(shares):
    limit = 0.5 * shares[1] + shares[2]
    losses = torch.multinomial(torch.tensor(shares), 2000 * 150, replacement=True).view(2000, 150) / 2
    values = torch.tensor([p_value(row[50:], limit, past=row[:50]) for row in losses])
    for level in (0.3, 0.1, 0.03):
        assert float((values <= level).float().mean()) <= level + 2 * math.sqrt(level / 2000)
    assert float((values <= 0.1).float().mean()) > 0.01  # not by never saying anything


def test_p_value_finds_a_mean_below_the_limit():
    losses = torch.multinomial(torch.tensor([0.01, 0.98, 0.01]), 2000, replacement=True) / 2
    assert p_value(losses[500:], 0.51, past=losses[:500], delta=0.01) < 0.01
    assert p_value(losses[500:], 0.5, past=losses[:500], delta=0.01) > 0.05


def test_losses_average_to_half_of_one_plus_the_drop():
    correct, reference = torch.tensor([True, False, False, True]), torch.tensor([True, True, True, False])
    assert drop_losses(correct, reference).tolist() == [0.5, 1, 1, 0]
    assert float(drop_losses(correct, reference).mean()) == (1 + 0.25) / 2


def test_path_ends_at_the_first_failure():
    safe, unsafe = torch.full((400,), 0.5), torch.ones(400)
    past = torch.full((10,), 0.5)
    assert last_safe([(safe, past), (safe, past), (unsafe, past), (safe, past)], 0.1, 0.1) == 1
    assert last_safe([(unsafe, past), (safe, past)], 0.1, 0.1) == -1
    assert last_safe([], 0.1, 0.1) == -1


@pytest.fixture(scope='module')
def population():
    """Return logits of two exits and main for 120,000 samples of two classes, and their classes."""
    generator = torch.Generator().manual_seed(3)
    num = 120_000
    targets = torch.randint(0, 2, (num,), generator=generator)
    ease, shared = torch.randn(num, generator=generator), torch.randn(num, generator=generator)
    logits = []
    for quality in (1.1, 1.7, 2.3):
        gap = quality + 0.6 * ease + 0.6 * shared + 0.6 * torch.randn(num, generator=generator)
        gap = torch.where(targets == 1, gap, -gap)
        logits.append(torch.stack([torch.zeros(num), 3 * gap], 1))
    return logits, targets


def true_drop_and_cost(policy, population):
    """Return by how much a policy is worse than main, and its mean cost, on the whole population.

    Of two classes the confidence is a sigmoid of the gap, which saves the softmax of 120,000 samples.
    """
    logits, targets = population
    gaps = [single[:, 1] for single in logits]
    right = [(gap > 0).long() == targets for gap in gaps]
    here, correct, exit_idx = torch.ones(len(targets), dtype=torch.bool), right[-1], torch.full((len(targets),), 2)
    for idx in policy.used:
        leaves = here & ((gaps[idx].abs() / policy.temperatures[idx]).sigmoid() >= policy.thresholds[idx])
        correct, exit_idx = torch.where(leaves, right[idx], correct), exit_idx.masked_fill(leaves, idx)
        here = here & ~leaves
    drop = float(right[-1].double().mean() - correct.double().mean())
    return drop, COSTS.mean(policy, exit_idx)


def resample(population, times, size=800, **kwargs):
    """Return the true drop and cost [times, 2] of policies calibrated on as many random sets of samples."""
    logits, targets = population
    generator, results = torch.Generator().manual_seed(5), []
    for _ in range(times):
        rows = torch.randint(0, len(targets), (size,), generator=generator)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='No policy that uses an exit is safe')
            policy = calibrate([single[rows] for single in logits], targets[rows], COSTS, **kwargs)
        results.append(true_drop_and_cost(policy, population))
    return torch.tensor(results)


def test_population_is_simulated_by_the_rule_of_inference(population):
    logits, targets = population
    policy = calibrate([single[:500] for single in logits], targets[:500], COSTS, budget='60%')
    prediction = apply_policy(policy, logits)
    right, main = (single.argmax(-1) == targets for single in (prediction.logits, logits[-1]))
    drop, cost = true_drop_and_cost(policy, population)
    assert drop == pytest.approx(float(main.double().mean() - right.double().mean()), abs=1e-5)
    assert cost == pytest.approx(COSTS.mean(policy, prediction.exit_idx), rel=1e-5)


@pytest.mark.slow
def test_drop_is_kept_in_as_many_draws_as_promised(population):
    times = 400
    results = resample(population, times, max_drop=MAX_DROP, delta=DELTA)
    violations = (results[:, 0] > MAX_DROP).double().mean()
    # Two standard deviations of the count, for a rule that would use up all of delta.
    assert violations <= DELTA + 2 * math.sqrt(DELTA * (1 - DELTA) / times)
    assert results[:, 1].mean() < 75  # and something is saved


def naive(logits, targets):
    """Return the cheapest policy whose drop on these very samples is at most allowed: what must not be done."""
    main = 100 * float((logits[-1].argmax(-1) == targets).double().mean())
    table = search_budgets(logits, targets, COSTS, temperatures=fit_temperatures(logits, targets))
    return next(point.policy for point in table.points if point.accuracy >= main - 100 * MAX_DROP)


@pytest.mark.slow
def test_the_cheapest_that_looks_safe_breaks_the_promise(population):
    logits, targets = population
    generator, drops = torch.Generator().manual_seed(5), []
    for _ in range(40):
        rows = torch.randint(0, len(targets), (800,), generator=generator)
        policy = naive([single[rows] for single in logits], targets[rows])
        drops.append(true_drop_and_cost(policy, population)[0])
    assert (torch.tensor(drops) > MAX_DROP).double().mean() > DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 40)


@pytest.mark.slow
def test_asking_for_more_safety_never_gives_cheaper_policies(population):
    requests = [(0.04, 0.1), (0.02, 0.3), (0.02, 0.1), (0.02, 0.01), (0.01, 0.1)]
    means = [resample(population, 20, max_drop=drop, delta=delta).mean(0).tolist() for drop, delta in requests]
    for rising in ([means[0], means[2], means[4]], means[1:4]):
        drops, costs = zip(*rising)
        assert list(costs) == sorted(costs)
        assert costs[0] < costs[-1] - 2
        assert list(drops) == sorted(drops, reverse=True)


def test_no_exit_is_used_where_the_samples_prove_nothing(population):
    logits, targets = population
    with pytest.warns(UserWarning, match='safe with max_drop 0.001 and delta 0.1 on 100 samples, so no exit is used'):
        policy = calibrate([single[:100] for single in logits], targets[:100], COSTS, max_drop=0.001)
    assert policy.used == ()
    assert true_drop_and_cost(policy, population) == (0, 100)


def test_one_sample_is_too_few():
    logits = [torch.tensor([[1.0, 0.0]])] * 3
    with pytest.raises(MultiExitError, match='max_drop needs 2 or more held-out samples'):
        calibrate(logits, torch.tensor([0]), COSTS, max_drop=0.1)


@pytest.mark.parametrize('criterion', ['confidence', 'entropy', 'margin'])
def test_path_begins_with_an_eighth_of_those_that_leave(population, criterion):
    """By the most accurate policy most may leave at once, which too few samples prove safe."""
    logits = [single[:4000] for single in population[0]]
    thresholds = {'confidence': (0.7, 0.8), 'entropy': (0.6, 0.4), 'margin': (0.5, 0.5)}[criterion]
    first = ExitPolicy(criterion, thresholds, (1.0, 2.0, 1.0))
    cheapest = ExitPolicy(criterion, {'entropy': (1.0, 1.0)}.get(criterion, (0.0, 0.0)))
    path = find_path([first, cheapest], logits)
    assert path[7:] == [first, cheapest]
    shares = [float((apply_policy(policy, logits).exit_idx == 0).double().mean()) for policy in path[:8]]
    assert shares[-1] > 0.5
    assert shares == pytest.approx([shares[-1] * eighths / 8 for eighths in range(1, 9)], abs=2e-3)


def test_path_of_patience_and_of_policies_without_exits_is_as_given(population):
    logits = [single[:100] for single in population[0]]
    patient = ExitPolicy('patience', (1, 1))
    assert find_path([ExitPolicy('patience', (None, None)), patient], logits) == [patient]
    assert find_path([ExitPolicy('confidence', (None, None))], logits) == []
