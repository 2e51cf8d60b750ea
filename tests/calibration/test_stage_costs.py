"""What leaving costs, and what policies cost on average."""

import pytest
import torch

from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.exits.cost import Cost, combine_costs
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

COSTS = StageCosts(paths=(10, 20, 40), heads=(3, 2))


@pytest.mark.parametrize(
    ('used', 'expected'),
    [((), (10, 20, 40)), ((0,), (13, 23, 43)), ((1,), (10, 22, 42)), ((0, 1), (13, 25, 45))],
)
def test_leaving_charges_the_heads_of_used_exits_on_the_way(used, expected):
    assert COSTS.leaving(used) == expected


def test_exit_costs_give_the_same_sums():
    costs = combine_costs([Cost(10, 1), Cost(20, 1), Cost(40, 1)], [Cost(3, 1), Cost(2, 1)])
    stages = StageCosts.from_exit_costs(costs)
    assert stages == COSTS
    assert stages.leaving((0, 1)) == tuple(cost.sequential.macs for cost in costs)
    assert [stages.leaving((idx,))[idx] for idx in (0, 1)] == [cost.fixed.macs for cost in costs[:-1]]
    assert (stages.total, stages.largest) == (40, 45)


def test_mean_cost_is_over_where_images_left():
    exit_idx = torch.tensor([0, 0, 1, 2])
    assert COSTS.mean(ExitPolicy('confidence', (0.5, 0.5)), exit_idx) == (13 + 13 + 25 + 45) / 4
    assert COSTS.mean(ExitPolicy('confidence', (0.5, None)), torch.tensor([0, 2])) == (13 + 43) / 2
    with pytest.raises(MultiExitError, match='each of the 2 exits of the model, got 1'):
        COSTS.mean(ExitPolicy('confidence', (0.5,)), exit_idx)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'paths': (1, 2), 'heads': (1, 1)}, '2 paths with 2 heads'),
        ({'paths': (1, -2), 'heads': (1,)}, 'got -2'),
        ({'paths': (1, float('nan')), 'heads': (1,)}, 'got nan'),
        ({'paths': (0, 0), 'heads': (1,)}, 'cost of the backbone must be > 0, got 0.0 MACs'),
        ({'paths': (1, 2), 'heads': (1,), 'unit': 'FLOPs'}, "'FLOPs'"),
    ],
)
def test_costs_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MultiExitError, match=message):
        StageCosts(**values)


@pytest.mark.parametrize('unit', ['MACs', 'ms'])
def test_budgets_are_from_always_the_first_exit_to_main_with_all_heads(unit):
    costs = StageCosts(COSTS.paths, COSTS.heads, unit)
    for budget in (f'13{unit}', f'45{unit}', '32.5%', '112.5%'):  # of 40
        costs.check_budget(budget)
    for budget in (f'12{unit}', f'46{unit}', '32%', '113%'):
        with pytest.raises(MultiExitError, match=f'^The budget must be .*, got {budget}, which is'):
            costs.check_budget(budget)
    with pytest.raises(MultiExitError, match='The table has no costs in'):
        costs.check_budget({'MACs': '20ms', 'ms': '20MACs'}[unit])


@pytest.mark.parametrize(
    'exit_idx', [[0, 1], torch.tensor([]), torch.tensor([0, 9]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])]
)
def test_mean_cost_needs_where_each_image_left(exit_idx):
    costs = StageCosts((1.0, 2.0, 3.0), (0.1, 0.1))
    with pytest.raises(MultiExitError, match=r'exit_idx must be one integer in \[0, 2\] per image, got'):
        costs.mean(ExitPolicy('confidence', (0.5, 0.5)), exit_idx)
