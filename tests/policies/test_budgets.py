"""How budgets are read, and the table of policies; also as a file that nobody vouches for."""

import json
from copy import deepcopy

import pytest

from timm_multiexit.policies.budgets import Budget, BudgetTable, PolicyResult, parse_budget
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError


def point(cost, accuracy, ms=None):
    return PolicyResult(ExitPolicy('confidence', (0.9, None)), accuracy, (0.5, 0.0, 0.5), cost, ms)


@pytest.fixture
def table():
    return BudgetTable((point(30.0, 70.0), point(60.0, 80.0), point(90.0, 85.0)), total_macs=100.0, max_macs=120.0)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('60%', Budget(60, '%')),
        ('0.5 %', Budget(0.5, '%')),
        ('1.2GMACs', Budget(1.2e9, 'MACs')),
        ('300MMACs', Budget(3e8, 'MACs')),
        ('7kMACs', Budget(7e3, 'MACs')),
        ('12MACs', Budget(12, 'MACs')),
        ('5ms', Budget(5, 'ms')),
    ],
)
def test_budget_is_read(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    'text',
    [
        '60',
        '',
        '%',
        '-5%',
        '0%',
        'nan%',
        'infms',
        '1e3MACs',
        '5 GFLOPs',
        '5s',
        '1_0%',
        '\u0665%',
        '5ms\n',
        '1' * 999,
        60,
        None,
    ],
)
def test_budget_without_a_unit_or_sense_is_refused(text):
    with pytest.raises(MultiExitError, match='A budget must be a share .* got') as caught:
        parse_budget(text)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('budget', 'accuracy'),
    [('30%', 70), ('59.9%', 70), ('60%', 80), ('100%', 85), ('120%', 85), ('45MACs', 70), ('90MACs', 85)],
)
def test_best_within_the_budget_is_selected(table, budget, accuracy):
    assert table.select(budget).accuracy == accuracy


def test_of_equally_accurate_points_the_dearest_within_the_budget_is_selected():
    table = BudgetTable((point(30.0, 70.0), point(60.0, 70.0), point(90.0, 70.0)), total_macs=100.0, max_macs=100.0)
    assert [table.select(budget).macs for budget in ('59%', '60%', '89%', '100%')] == [30, 60, 60, 90]


@pytest.mark.parametrize(
    ('budget', 'message'),
    [
        ('29%', 'must be 30% to 120%, got 29%, which is below the cheapest policy; main alone costs 100%'),
        ('29MACs', 'must be 30MACs to 120MACs'),
        (
            '121%',
            'must be 30% to 120%, got 121%, which is more than any policy can spend; main alone .* is run without',
        ),
        ('5ms', "no costs in ms for the budget '5ms': calibrate with measured times"),
    ],
)
def test_budget_out_of_range_names_the_range_in_its_unit(table, budget, message):
    with pytest.raises(MultiExitError, match=message):
        table.select(budget)


def test_the_range_that_an_error_names_is_accepted():
    table = BudgetTable((point(123456789.0, 70.0),), total_macs=3.3333333e9, max_macs=3.4567891e9)
    for budget in ('1%', '1MACs'):
        with pytest.raises(MultiExitError) as caught:
            table.select(budget)
        lowest, largest = str(caught.value).split('must be ')[1].split(', got')[0].split(' to ')
        assert parse_budget(lowest).value > parse_budget(budget).value
        assert table.select(lowest) == table.select(largest) == table.points[0]


def test_times_are_selected_by_time():
    points = (point(30.0, 70.0, ms=4.0), point(60.0, 80.0, ms=2.0))
    table = BudgetTable(points, 100.0, 120.0, total_ms=5.0, max_ms=6.0, measured_on='a CPU, batch size 1')
    assert table.select('3ms') == points[1]
    assert table.select('40%') == points[0]  # of the MACs


def test_a_table_of_times_alone_takes_shares_of_the_time():
    points = (point(None, 70.0, ms=2.0), point(None, 80.0, ms=4.0))
    table = BudgetTable(points, total_ms=5.0, max_ms=6.0)
    assert table.select('40%') == points[0]
    assert table.select('80%') == points[1]
    with pytest.raises(MultiExitError, match="no costs in MACs for the budget '1GMACs': use '%' or 'ms'"):
        table.select('1GMACs')


def test_table_returns_from_json(table):
    assert BudgetTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_table_prints_a_line_per_point(table):
    lines = str(table).splitlines()
    assert lines[0].split() == ['%', 'MACs', 'top-1', 'exit0', '%', 'exit1', '%', 'main', '%']
    assert lines[2].split() == ['60.00', '60', '80.00', '50.00', '0.00', '50.00']
    assert len(lines) == 4


WRONG = [
    (('points',), [], 'must have 1 to 1000 points, got 0'),
    (('points',), 'many', 'must be a list'),
    (('points',), [None] * 1001, 'at most 1000'),
    (('total_macs',), None, 'everywhere or nowhere'),
    (('total_macs',), 'x' * 10_000, r'must be in \[1e-9, 1e18\] MACs'),
    (('total_macs',), 130.0, 'not below the first'),
    (('max_macs',), float('inf'), r'must be in \[1e-9, 1e18\] MACs'),
    (('max_macs',), 10**400, r'must be in \[1e-9, 1e18\] MACs'),
    (('total_macs',), 1e-320, r'must be in \[1e-9, 1e18\] MACs'),
    (('max_macs',), 1e300, r'must be in \[1e-9, 1e18\] MACs'),
    (('points', 0, 'macs'), 1e-320, r'must be in \[1e-9, 1e18\], 0 or None'),
    (('points', 0, 'macs'), 1e300, r'must be in \[1e-9, 1e18\], 0 or None'),
    (('total_ms',), 5.0, 'everywhere or nowhere'),
    (('measured_on',), 'x' * 1000, 'at most 500 characters'),
    (('points', 0), 7, 'must be an object with exactly the keys'),
    (('points', 0, 'accuracy'), 101, r'must be in \[0, 100\]'),
    (('points', 0, 'accuracy'), True, r'must be in \[0, 100\]'),
    (('points', 0, 'macs'), -1.0, r'must be in \[1e-9, 1e18\], 0 or None'),
    (('points', 0, 'macs'), 95.0, 'cheapest first'),
    (('points', 0, 'shares'), [1.0], r'one number in \[0, 1\] per classifier'),
    (('points', 0, 'shares'), [1.0, 1.0, 0.0], 'with a sum of 1'),
    (('points', 0, 'shares'), [None, 1.0, 0.0], r'one number in \[0, 1\] per classifier'),
    (('points', 0, 'policy', 'thresholds'), ['x' * 10_000, None], r'must be in \[0, 1\]'),
    (('points', 0, 'policy', 'thresholds'), None, 'must be a sequence'),
    (('points', 0, 'policy', 'thresholds'), [0.5] * 100_000, r'one number in \[0, 1\] per classifier'),
    (('points', 0, 'policy', 'temperatures'), [10**400] * 3, 'A temperature must be'),
    (('points', 0, 'policy', 'temperatures'), [None] * 3, 'A temperature must be'),
    (('points', 0, 'shares'), {}, 'must be a list'),
    (('points', 0, 'shares'), None, 'must be a list'),
    (('points', 0, 'shares'), [10**400, 0, 0], r'one number in \[0, 1\] per classifier'),
    (('points', 0, 'accuracy'), 10**400, r'must be in \[0, 100\]'),
    (('points', 0, 'policy'), [], 'must be an object with exactly the keys'),
    (('points', 0, 'policy', 'criterion'), ['confidence'], 'criterion must be one of'),
    (('points', 0, 'policy', 'criterion'), 'x' * 10_000, 'criterion must be one of'),
    (('points', 0, 'policy', 'combine'), {}, 'combine must be'),
    (('points', 0, 'policy', 'combine'), 'x' * 10_000, 'combine must be'),
    (('points', 0, 'policy', 'criterion'), 'certainty', "criterion must be .* got 'certainty'"),
    (('points', 0, 'policy', 'thresholds'), [10**400, None], r'must be in \[0, 1\]'),
    (('points', 0, 'policy', 'thresholds'), [float('nan'), None], r'must be in \[0, 1\]'),
    (('points', 0, 'policy', 'thresholds'), [2.0, None], r'must be in \[0, 1\]'),
    (('points', 0, 'policy', 'thresholds'), [0.5], r'one number in \[0, 1\] per classifier'),
    (('points', 0, 'policy', 'temperatures'), None, 'must be a sequence'),
]


@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    WRONG,
    ids=[f'{"-".join(map(str, place))}-{idx}' for idx, (place, *_) in enumerate(WRONG)],
)
def test_a_wrong_file_is_refused_in_one_short_line(table, place, value, message):
    values = deepcopy(table.to_dict())
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(MultiExitError, match=message) as caught:
        BudgetTable.from_dict(values)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize('cheapest', [0.0, 1e-9, 1.0])
@pytest.mark.parametrize('total', [1e-9, 1.0, 1e18])
def test_a_table_of_any_allowed_size_prints_and_selects(cheapest, total):
    table = BudgetTable((point(min(cheapest, total), 70.0), point(total, 80.0)), total_macs=total, max_macs=total)
    assert len(str(table).splitlines()) == 3
    assert table.select('100%').accuracy == 80
    with pytest.raises(MultiExitError, match='more than any policy can spend'):
        table.select('101%')


@pytest.mark.parametrize('place', [(), ('points', 0), ('points', 0, 'policy')])
@pytest.mark.parametrize('change', ['missing', 'unknown'])
def test_a_file_with_other_keys_is_refused(table, place, change):
    values = deepcopy(table.to_dict())
    inner = values
    for key in place:
        inner = inner[key]
    if change == 'missing':
        inner.popitem()
    else:
        inner['surprise'] = 1
    with pytest.raises(MultiExitError, match='with exactly the keys'):
        BudgetTable.from_dict(values)
