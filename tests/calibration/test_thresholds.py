"""Thresholds from held-out logits, against brute force and a loop over single samples."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.samples import COSTS, make_samples, simulate

from timm_multiexit.calibration import candidates
from timm_multiexit.calibration.candidates import list_used_sets
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import calibrate, search_budgets, solve_budgeted_batch
from timm_multiexit.exits.cost import Cost, combine_costs
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError


def make_ties(num=400):
    logits, targets = make_samples(num, classes=5)
    return [single.round() for single in logits], targets


def make_saturated(num=400):
    return make_samples(num, classes=5, scale=20.0)


SETS = {
    'well calibrated': lambda: make_samples(600),
    'overconfident': lambda: make_samples(600, scale=3.0, quality=(0.8, 1.2, 1.6, 1.8)),
    'exit 1 worse than exit 0': lambda: make_samples(600, classes=10, quality=(1.2, 0.8, 1.5, 1.7)),
    'many classes': lambda: make_samples(600, classes=300, quality=(1.2, 1.8, 2.1, 2.4)),
    'few samples': lambda: make_samples(25, classes=4),
    'ties': make_ties,
    'saturated': make_saturated,
}


@pytest.fixture(params=SETS, ids=str)
def samples(request):
    return SETS[request.param]()


def check_points(points, logits, targets):
    for point in points:
        accuracy, macs, shares = simulate(point.policy, logits, targets)
        assert point.accuracy == pytest.approx(accuracy, abs=1e-9)
        assert point.macs == pytest.approx(macs, rel=1e-12)
        assert point.shares == pytest.approx(shares, abs=1e-12)


def solve_by_loops(logits):
    """Return the thresholds of the field's solver, written down sample by sample from its definition."""
    confidences = [single.softmax(-1).amax(-1).tolist() for single in logits]
    num, num_classifiers, policies = len(confidences[0]), len(logits), []
    for p in range(1, 40):
        powers = [(p / 20) ** k for k in range(1, num_classifiers + 1)]
        has_left, thresholds = [False] * num, []
        for k in range(num_classifiers - 1):
            wanted = math.floor(num * (powers[k] / sum(powers)))
            threshold, count = None, 0
            for sample in sorted(range(num), key=lambda sample: -confidences[k][sample]):
                if not has_left[sample]:
                    count += 1
                    if count == wanted:
                        threshold = confidences[k][sample]
                        break
            thresholds.append(threshold)
            if threshold is not None:
                has_left = [left or confidences[k][sample] >= threshold for sample, left in enumerate(has_left)]
        policies.append(tuple(thresholds))
    return policies


def test_field_solver_is_that_of_the_definition(samples):
    logits, targets = samples
    points = solve_budgeted_batch(logits, targets, COSTS)
    assert [point.policy.thresholds for point in points] == solve_by_loops(logits)
    check_points(points, logits, targets)


def best_within(table, macs):
    return max((p.accuracy for p in table.points if p.macs <= macs * (1 + 1e-12)), default=-1)


def test_search_is_never_below_the_field_at_its_cost(samples):
    logits, targets = samples
    fitted = fit_temperatures(logits, targets)
    for temperatures in ((), fitted):
        table = search_budgets(logits, targets, COSTS, temperatures=temperatures)
        for others in ((), temperatures):
            field = solve_budgeted_batch(logits, targets, COSTS, temperatures=others)
            assert len(field) == 39
            assert all(best_within(table, point.macs) >= point.accuracy for point in field)


def make_uneven(seed):
    """Return logits of exits whose temperatures are far apart: those who are surest are others without them."""
    num, scales = (200, 300, 500)[seed % 3], ((1, 2, 3, 4), (4, 1, 5, 0.5))[seed % 2]
    logits, targets = make_samples(num, classes=10, quality=(0.5, 0.8, 1.1, 1.4), seed=seed)
    return [scale * single for scale, single in zip(scales, logits)], targets


@pytest.mark.slow
def test_search_with_temperatures_is_never_below_the_field_without():
    bare = 0
    for seed in range(24):
        logits, targets = make_uneven(seed)
        fitted = fit_temperatures(logits, targets)
        table = search_budgets(logits, targets, COSTS, temperatures=fitted)
        field = solve_budgeted_batch(logits, targets, COSTS)
        assert all(best_within(table, point.macs) >= point.accuracy for point in field)
        assert {point.policy.temperatures for point in table.points} <= {fitted, ()}
        check_points(table.points, logits, targets)
        bare += sum(not point.policy.temperatures for point in table.points)
    assert 0 < bare < 24 * 10  # where they are needed, and seldom


def test_times_too_are_searched_from_the_field_without_temperatures():
    times = StageCosts((4, 5, 6, 8), (0.5, 0.1, 0.1), unit='ms')
    for seed in range(4):
        logits, targets = make_uneven(seed)
        table = search_budgets(logits, targets, COSTS, temperatures=fit_temperatures(logits, targets), times=times)
        for point in solve_budgeted_batch(logits, targets, times):
            assert table.select(f'{point.ms + 1e-9:.12f}ms').accuracy >= point.accuracy


@pytest.mark.slow
def test_calibrated_policy_is_never_below_the_field_at_its_cost():
    for seed in range(2):
        logits, targets = make_uneven(seed)
        for point in solve_budgeted_batch(logits, targets, COSTS):
            policy = calibrate(logits, targets, COSTS, budget=f'{point.macs + 1e-9:.12f}MACs')
            accuracy, macs, _ = simulate(policy, logits, targets)
            assert accuracy >= point.accuracy - 1e-9
            assert macs <= point.macs + 1e-6


@pytest.mark.parametrize('criterion', ['entropy', 'margin'])
def test_another_criterion_is_not_mixed_with_confidence(criterion):
    for seed in range(4):
        logits, targets = make_uneven(seed)
        fitted = fit_temperatures(logits, targets)
        tables = [search_budgets(logits, targets, COSTS, criterion=criterion, temperatures=t) for t in (fitted, ())]
        assert {point.policy.criterion for point in tables[0].points} == {criterion}
        check_points(tables[0].points, logits, targets)


def test_policies_with_temperatures_are_taken_where_those_without_are_the_same():
    logits, targets = make_samples(400)
    ones = (1.0,) * 4
    table = search_budgets(logits, targets, COSTS, temperatures=ones)
    assert {point.policy.temperatures for point in table.points} == {ones}


def test_search_gains_much_where_an_exit_is_worse_than_the_one_before():
    logits, targets = SETS['exit 1 worse than exit 0']()
    table = search_budgets(logits, targets, COSTS)
    gains = [
        table.select(f'{p.macs + 1e-6:.9f}MACs').accuracy - p.accuracy
        for p in solve_budgeted_batch(logits, targets, COSTS)
    ]
    assert sum(gains) / 39 > 2


RULES = [
    {},
    {'criterion': 'entropy'},
    {'criterion': 'margin'},
    {'criterion': 'patience'},
    {'combine': 'mean'},
    {'combine': 'geometric', 'criterion': 'entropy'},
    {'combine': 'mean', 'criterion': 'patience'},
]


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: '-'.join(rule.values()) or 'confidence')
@pytest.mark.parametrize('kind', ['overconfident', 'ties', 'saturated'])
def test_table_says_what_inference_does(rule, kind):
    logits, targets = SETS[kind]()
    table = search_budgets(logits, targets, COSTS, temperatures=(0.7, 1.0, 2.0, 3.0), **rule)
    check_points(table.points, logits, targets)
    for name in ('macs', 'accuracy'):
        values = [getattr(point, name) for point in table.points]
        assert values == sorted(values if name == 'accuracy' else set(values))
    assert {point.policy.criterion for point in table.points} == {rule.get('criterion', 'confidence')}
    assert {point.policy.combine for point in table.points} == {rule.get('combine')}


@pytest.mark.parametrize('rule', RULES[:3] + RULES[4:6], ids=lambda rule: '-'.join(rule.values()) or 'confidence')
def test_table_goes_from_the_cheapest_policy_to_the_most_accurate_classifier(rule):
    logits, targets = make_samples(600)
    table = search_budgets(logits, targets, COSTS, **rule)
    assert table.points[0].macs == 28  # the first exit for all
    assert table.points[-1].accuracy >= 100 * float((logits[-1].argmax(-1) == targets).double().mean()) - 0.5
    assert len(table.points) > 20


def test_combined_exits_of_a_deep_model_are_searched_in_few_sets():
    sets = list_used_sets(ExitPolicy('confidence', (None,) * 6, combine='mean'))
    assert {(), (0,), (0, 1, 2), (4, 5), (0, 2, 4), (1, 3, 5), (0, 1, 3, 4, 5), (0, 1, 2, 3, 4, 5)} <= set(sets)
    assert len(sets) == len(set(sets)) == 18
    assert list_used_sets(ExitPolicy('margin', (None,) * 6)) == [(0, 1, 2, 3, 4, 5)]


def test_patience_finds_every_policy_that_is_worth_it():
    logits, targets = make_samples(300, classes=5)
    table = search_budgets(logits, targets, COSTS, criterion='patience')
    best = [table.select(f'{budget}%').accuracy for budget in (80, 90, 107)]
    every = [
        simulate(ExitPolicy('patience', thresholds), logits, targets)
        for thresholds in product((None, 1, 2), (None, 1, 2), (None, 1, 2))
    ]
    # Picked by expected right answers: within a sample or two of the luckiest.
    for found, budget in zip(best, (80, 90, 107)):
        assert found >= max(accuracy for accuracy, macs, _ in every if macs <= budget) - 0.7


@pytest.mark.parametrize('criterion', ['confidence', 'entropy', 'margin'])
def test_many_policies_at_once_give_what_each_alone_gives(samples, criterion):
    """`HeldOut` against `PolicyMeter`: the same people leave at the same exits, to the last one."""
    logits, targets = samples
    base = ExitPolicy(criterion, (None, None, None))
    every = candidates.Candidates(base, (0, 1, 2), logits, targets)
    pool, counts, right, _, cost, _ = every.search(COSTS)
    meter, num = PolicyMeter(logits, targets, COSTS), len(targets)
    for row in range(0, len(pool), 7):
        result = meter.measure(every.to_policy(pool[row]))
        assert result.shares == tuple(count / num for count in counts[row].tolist())
        assert result.accuracy == 100 * int(right[row]) / num
        assert float(cost[row]) == pytest.approx(result.macs / COSTS.total, rel=1e-12)


def test_solver_says_what_the_meter_says_to_the_last_digit(samples):
    logits, targets = samples
    meter = PolicyMeter(logits, targets, COSTS)
    for result in solve_budgeted_batch(logits, targets, COSTS):
        assert meter.measure(result.policy) == result


def gain_on_fresh_samples(seed, fresh, quality):
    """Return by how much the search surpasses the field at equal cost on fresh samples, in points, on average."""
    held_out = make_samples(500, quality=quality, seed=seed)
    table = search_budgets(*held_out, COSTS, temperatures=fit_temperatures(*held_out))
    curve = sorted(simulate(point.policy, *fresh)[1::-1] for point in table.points)
    field = [simulate(point.policy, *fresh) for point in solve_budgeted_batch(*held_out, COSTS)[::6]]
    found = np.interp([macs for _, macs, _ in field], *zip(*curve))
    return float(np.mean(found - [accuracy for accuracy, _, _ in field]))


def test_what_a_budget_allows_is_spent_where_few_samples_cannot_tell_policies_apart():
    fresh = make_samples(5000, seed=99)
    spent, gains = [], []
    for seed in range(10):
        table = search_budgets(*make_samples(60, seed=seed), COSTS)
        chosen = table.select('80%')
        as_good = next(point for point in table.points if point.accuracy == chosen.accuracy)
        spent.append(chosen.macs)
        gains.append(simulate(chosen.policy, *fresh)[0] - simulate(as_good.policy, *fresh)[0])
    assert np.mean(spent) > 0.95 * 80
    assert np.mean(gains) > 1


def test_search_on_few_samples_is_as_good_as_the_field_on_fresh_ones(monkeypatch):
    quality = (1.2, 1.8, 2.4, 3.0)  # here the field's shares are close to the best there are
    fresh = make_samples(5000, quality=quality, seed=99)
    gain = np.mean([gain_on_fresh_samples(seed, fresh, quality) for seed in range(3)])
    monkeypatch.setattr(candidates, '_expect', lambda odds, correct: correct.float())
    by_counts = np.mean([gain_on_fresh_samples(seed, fresh, quality) for seed in range(3)])
    assert gain > -0.2
    assert by_counts < gain - 0.2


def test_thresholds_lie_between_scores():
    logits, targets = make_samples(500)
    scores = [set(single.softmax(-1).amax(-1).tolist()) for single in logits[:-1]]
    table = search_budgets(logits, targets, COSTS)
    thresholds = [pair for point in table.points for pair in zip(point.policy.thresholds, scores)]
    used = [(threshold, values) for threshold, values in thresholds if threshold is not None]
    assert len(used) > 50
    assert not any(threshold in values for threshold, values in used)


def test_one_table_serves_budgets_in_macs_and_in_milliseconds():
    logits, targets = make_samples(600)
    times = StageCosts((4, 5, 6, 8), (0.5, 0.1, 0.1), unit='ms')  # the first stage is slow for its MACs
    both = search_budgets(logits, targets, COSTS, times=times, measured_on='a test')
    alone = search_budgets(logits, targets, times)
    assert (both.total_macs, both.max_macs, both.total_ms, both.max_ms) == (100, 107, 8, 8.7)
    assert (alone.total_macs, alone.total_ms, alone.points[0].macs) == (None, 8, None)
    for budget in ('4.6ms', '5.5ms', '7ms'):
        assert both.select(budget).accuracy >= alone.select(budget).accuracy
        assert both.select(budget).ms == pytest.approx(
            simulate(both.select(budget).policy, logits, targets, times)[1], rel=1e-12
        )
    with pytest.raises(MultiExitError, match='costs must be in MACs and times in ms, got ms and ms'):
        search_budgets(logits, targets, times, times=times)


def test_calibrated_policy_keeps_the_budget_and_uses_all_of_it():
    logits, targets = make_samples(600)
    spent = {}
    for budget in ('40%', '60%', '80MACs'):
        policy = calibrate(logits, targets, COSTS, budget=budget)
        accuracy, spent[budget], _ = simulate(policy, logits, targets)
        assert policy.temperatures == fit_temperatures(logits, targets)
    assert 35 < spent['40%'] <= 40
    assert 50 < spent['60%'] <= 60
    assert spent['60%'] < spent['80MACs'] <= 80


def test_exit_costs_of_a_model_are_taken():
    costs = combine_costs([Cost(25), Cost(50), Cost(75), Cost(100)], [Cost(3), Cost(2), Cost(2)])
    logits, targets = make_samples(100)
    assert search_budgets(logits, targets, costs) == search_budgets(logits, targets, COSTS)


def test_half_precision_logits_are_taken():
    logits, targets = make_samples(200)
    logits = [single.bfloat16() for single in logits]
    table = search_budgets(logits, targets, COSTS)
    check_points(table.points, logits, targets)


def test_one_sample_and_one_exit_are_enough():
    logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]])]
    policy = calibrate(logits, torch.tensor([0]), StageCosts((40, 100), (2,)), budget='50%')
    assert simulate(policy, logits, torch.tensor([0]), StageCosts((40, 100), (2,))) == (100, 42, (1, 0))


WRONG = {
    'both': ({'max_drop': 0.1}, "Pass either .* got budget='60%' and max_drop=0.1"),
    'neither': ({'budget': None}, 'Pass either budget, as .* or max_drop, as .* got budget=None'),
    'unit': ({'budget': '60'}, "A budget must be .* got '60'"),
    'times': ({'budget': '5ms'}, 'no costs in ms'),
    'below': ({'budget': '1%'}, 'must be 28% to 107%, got 1%, which is below the cheapest policy'),
    'drop': ({'budget': None, 'max_drop': 1.0}, r'max_drop must be in \(0, 1\), got 1.0'),
    'percent': ({'budget': None, 'max_drop': '1%'}, r"max_drop must be in \(0, 1\), got '1%'"),
    'delta': ({'budget': None, 'max_drop': 0.1, 'delta': 0}, r'delta must be in \(0, 1\), got 0'),
    'criterion': ({'criterion': 'luck'}, "criterion must be .* got 'luck'"),
    'combine': ({'combine': 'vote'}, "combine must be .* got 'vote'"),
    'float targets': (
        {'targets': torch.zeros(30)},
        r'targets must be a tensor \[30\] of class indices, .* got \[30\] of torch.float32',
    ),
    'list': ({'targets': [0] * 30}, 'targets must be .* got list'),
    'one-hot': ({'targets': torch.zeros(30, 20).long()}, r'targets must be .* got \[30, 20\]'),
    'length': ({'targets': torch.zeros(29).long()}, r'targets must be a tensor \[30\] .* got \[29\]'),
    'range': (
        {'targets': torch.full((30,), 20)},
        r'targets must be in \[0, 19\] for logits of 20 classes, got 20 to 20',
    ),
    'negative': ({'targets': torch.full((30,), -1)}, 'got -1 to -1'),
    'NaN': ({'logits': [torch.full((30, 20), math.nan)] * 4}, 'logits of exit 0 are NaN'),
    'masked': ({'logits': [torch.full((30, 20), -math.inf)] * 4}, 'logits of exit 0 are'),
    'empty': ({'logits': [torch.zeros(0, 20)] * 4, 'targets': torch.zeros(0).long()}, '1 or more samples'),
    'costs': ({'costs': StageCosts((1, 2), (1,))}, 'costs must be those of the 3 exits .* got 1'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_request_that_cannot_be_met_is_one_line(name):
    changes, message = WRONG[name]
    logits, targets = make_samples(30)
    values = {'logits': logits, 'targets': targets, 'costs': COSTS, 'budget': '60%'} | changes
    with pytest.raises(MultiExitError, match=message) as caught:
        calibrate(values.pop('logits'), values.pop('targets'), values.pop('costs'), **values)
    assert '\n' not in str(caught.value)


def test_wrong_number_of_temperatures_is_refused():
    logits, targets = make_samples(30)
    with pytest.raises(MultiExitError, match='temperatures must be empty or have 4 values, .* got 2'):
        search_budgets(logits, targets, COSTS, temperatures=(1.0, 1.0))


def test_default_device_does_not_matter(make_model):
    model = make_model(num_classes=3).eval()
    loader = [(torch.randn(24, 3, 64, 64), torch.arange(24) % 3)]
    expected = [model.calibrate(loader, budget='80%'), model.calibrate(loader, max_drop=0.5)]
    with torch.device('meta'):
        assert [model.calibrate(loader, budget='80%'), model.calibrate(loader, max_drop=0.5)] == expected


def test_accuracy_of_logits_whose_probabilities_round_to_ties():
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (100,), generator=rng)
    logits = [1e-8 * (F.one_hot(targets, 3) + 0.5 * torch.rand(100, 3, generator=rng)) for _ in range(2)]
    assert all(torch.equal(each.argmax(-1), targets) for each in logits)
    costs = StageCosts(paths=(40, 100), heads=(2,))
    table = search_budgets(logits, targets, costs, criterion='confidence', temperatures=())
    assert {point.accuracy for point in table.points} == {100.0}


@pytest.mark.parametrize('solver', [search_budgets, solve_budgeted_batch])
def test_points_are_those_of_the_simulation_under_autocast_and_another_default_device(solver):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (1500,), generator=generator)
    logits = [torch.randn(1500, 5, generator=generator) + k * F.one_hot(targets, 5) for k in (1, 2, 3)]
    costs = StageCosts((1.0, 2.0, 3.0), (0.1, 0.1))
    expected = solver(logits, targets, costs)
    with torch.device('meta'), torch.autocast('cpu', torch.bfloat16):
        table = solver(logits, targets, costs)
    assert table == expected
    for point in getattr(table, 'points', table):
        found = apply_policy(point.policy, logits)
        right = (found.logits.argmax(-1) == targets).double().mean()
        assert point.accuracy == pytest.approx(100 * float(right), abs=1e-6)
