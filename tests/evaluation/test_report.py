"""The budgeted curve."""

import pytest
import torch

from timm_multiexit.calibration.logits import LogitSet
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.evaluation.report import Calibration, report_curve


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
