"""The budgeted curve."""

import pytest
import torch

from timm_multiexit.calibration.logits import LogitSet
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.evaluation.report import Calibration, note_better_exits, report_curve


@pytest.mark.parametrize(
    ('seed', 'num', 'scales'), [(0, 200, (1, 2, 3, 4)), (10, 500, (4, 1, 5, 0.5)), (6, 200, (1,) * 4)]
)
def test_search_is_at_or_above_the_solver_where_both_were_chosen(seed, num, scales):
    """The solver decides by raw confidence as in the field, the search with temperatures."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (num,), generator=generator)
    shared, logits = torch.randn(num, 10, generator=generator), []
    for idx, scale in enumerate(scales):
        single = shared + torch.randn(num, 10, generator=generator) * (4 - idx) * 0.375
        single[torch.arange(num), targets] += 1 + 0.7 * idx
        logits.append(single * scale)
    costs = StageCosts((10, 40, 70, 100), (2, 2, 2))
    collected = LogitSet(tuple(logits), targets, torch.zeros(1, 3, 1, 1), torch.arange(num))
    table = search_budgets(logits, targets, costs, temperatures=fit_temperatures(logits, targets))
    meter = PolicyMeter(logits, targets, costs)
    curve = report_curve(meter, Calibration(collected, 'the same'), costs, table)
    for point in curve['points']:
        assert point['search'] is not None
        assert point['search']['top-1'] >= point['solver']['top-1'] - 1e-9
        assert point['search']['macs'] <= point['solver']['macs'] * (1 + 1e-6)


def test_exit_alone_that_beats_a_policy_within_its_budget_is_named():
    exits = [
        {'exit': str(idx), 'top-1': top1, 'GMACs fixed': macs} for idx, top1, macs in ((0, 60, 0.3), (1, 97, 0.75))
    ]
    main = {'policy': 'main', 'budget': None, 'top-1': 98.0, 'macs': 1e9}
    policies = [
        {'policy': f'budget {budget}', 'budget': budget, 'top-1': 91.0} for budget in ('80%', '750MMACs', '5ms')
    ]
    cheap, good = ({'policy': name, 'budget': name, 'top-1': top1} for name, top1 in (('74%', 91.0), ('90%', 96.0)))
    notes = note_better_exits([main, *policies, cheap, good], exits)
    assert notes == [
        f'{name}: exit 1 alone has 97.00 at 75.0 % of the MACs, more than this policy. Choose thresholds on more images,'
        ' or use exit_idx=1.'
        for name in ('budget 80%', 'budget 750MMACs')
    ]
