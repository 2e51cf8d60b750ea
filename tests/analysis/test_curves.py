"""Curves: how fast and how stable runs are, against definitions worked the slow way."""

import math
import statistics

import pytest

from timm_multiexit.analysis.curves import describe_curve, epochs_to_keep, epochs_to_reach, instability, read_curve

ROWS = [
    {'epoch': 0, 'eval_top1': 10.0, 'eval_ens_top1': 14.0},
    {'epoch': 1, 'eval_top1': 30.0, 'eval_ens_top1': 31.0},
    {'epoch': 2},  # not evaluated
    {'epoch': 3, 'eval_top1': 20.0, 'eval_ens_top1': 29.0},
    {'epoch': 4, 'eval_top1': math.nan, 'eval_ens_top1': 1.0},
    {'epoch': 5, 'eval_top1': 40.0, 'eval_ens_top1': 42.0},
]


def test_curve_has_the_epochs_that_were_evaluated():
    curve = read_curve(ROWS)
    assert curve == {
        'epochs': [1, 2, 4, 6],
        'main': [10.0, 30.0, 20.0, 40.0],
        'ensemble': [14.0, 31.0, 29.0, 42.0],
    }
    assert read_curve([{'epoch': 0, 'eval_top1': 5.0}]) == {'epochs': [1], 'main': [5.0], 'ensemble': []}
    assert read_curve([{'epoch': 0, 'train_loss': 5.0}]) == {'epochs': [], 'main': [], 'ensemble': []}
    assert read_curve([{'epoch': 0, 'eval_map': 5.0}], 'map')['main'] == [5.0]


@pytest.mark.parametrize(
    ('values', 'target', 'reached', 'kept'),
    [
        ([10, 30, 20, 40], 25, 2, 6),
        ([10, 30, 30, 40], 30, 2, 2),
        ([50, 50, 50, 50], 25, 1, 1),
        ([10, 90, 20, 20], 25, 2, None),
        ([10, 20, 20, 20], 25, None, None),
        ([10, 20, 20, 25], 25, 6, 6),
    ],
    ids=['again', 'equal', 'at-once', 'lost', 'never', 'at-last'],
)
def test_fast_is_when_the_target_is_reached_and_kept(values, target, reached, kept):
    epochs = [1, 2, 4, 6]
    assert (epochs_to_reach(epochs, values, target), epochs_to_keep(epochs, values, target)) == (reached, kept)
    # The definition, the slow way.
    slow = [e for i, e in enumerate(epochs) if all(value >= target for value in values[i:])]
    assert kept == (min(slow) if slow else None)


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([0, 50, 60, 61, 62, 63], 0),  # changes 50, 10, 1, 1, 1: a steady rise counts nothing
        ([0, 50, 60, 61, 59, 62], statistics.pstdev([1, -2, 3])),
        ([0, 50, 60, 59, 61], statistics.pstdev([-1, 2])),
        ([0, 1, 3], None),  # one change in the last half
        ([], None),
    ],
    ids=['steady', 'odd', 'even', 'short', 'empty'],
)
def test_stable_is_the_deviation_of_the_changes_in_the_last_half(values, expected):
    assert instability(values) == expected


def test_curve_is_described_against_the_reference():
    described = describe_curve(read_curve(ROWS), 20.0)
    assert described['gap'] == [4.0, 1.0, 9.0, 2.0]
    assert (described['final_gap'], described['mean_gap'], described['final_main']) == (2.0, 5.5, 40.0)
    assert (described['epochs_to_reach'], described['epochs_to_keep']) == (2, 2)
    assert described['instability'] == 15.0  # changes 20, -10, 20: the last two deviate by 15 from their mean of 5
    nothing = describe_curve(read_curve([]), None)
    assert {key: value for key, value in nothing.items() if value not in (None, [])} == {}
