import time

import pytest
import torch

from timm_multiexit.utils import timing as timing

CPU = torch.device('cpu')


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_variant_takes_one_turn_per_round_in_changing_order():
    log = []
    times = timing.time_interleaved({name: lambda name=name: log.append(name) for name in 'abc'}, 20, CPU)
    rounds = [log[start : start + 3] for start in range(0, len(log), 3)]
    assert len(rounds) == 21  # one to warm up
    assert all(sorted(turns) == ['a', 'b', 'c'] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) == 6
    assert {name: len(values) for name, values in times.items()} == {'a': 20, 'b': 20, 'c': 20}


def test_the_first_round_does_not_count():
    clock = iter(range(1000))
    calls = []

    def slow_at_first():
        calls.append(None)
        for _ in range(100 if len(calls) == 1 else 2):
            next(clock)

    times = timing.time_interleaved({'it': slow_at_first}, 3, CPU, clock=lambda device: next(clock))
    assert times == {'it': [3, 3, 3]}


def test_on_one_thread_of_a_cpu_waiting_takes_no_time(threads):
    spent = {}
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        spent[num_threads] = timing.time_interleaved({'wait': lambda: time.sleep(0.05)}, 1, CPU)['wait'][0]
    assert spent[1] < 0.02
    assert spent[2] >= 0.05


def test_the_wall_clock_counts_waiting_on_one_thread_too(threads):
    torch.set_num_threads(1)
    started = timing.read_wall_clock(CPU)
    time.sleep(0.05)
    assert timing.read_wall_clock(CPU) - started >= 0.05


def test_ratios_are_paired_round_by_round():
    # The machine slows down tenfold, the ratio stays at about two: 2, 2.5, 2, 1.9, 2.
    median, quartiles = timing.describe_ratios([2.0, 5.0, 20.0, 19.0, 4.0], [1.0, 2.0, 10.0, 10.0, 2.0])
    assert (median, quartiles) == (2.0, '2.000-2.000')
