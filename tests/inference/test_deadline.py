"""Deadlines, on a clock that the layers themselves turn."""

import copy
import pickle

import pytest
import torch
from torch import nn

from timm_multiexit.exits.taps import Taps
from timm_multiexit.inference.deadline import (
    NUM_FORMS,
    NUM_PROBES,
    PartTimes,
    TimeBook,
    learn_times,
    predict_by_deadline,
)


class Clock:
    """Seconds that pass only where something says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, device):
        return self.now


class Timed(nn.Module):
    """A layer that takes its time and adds one."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def forward(self, x):
        self.clock.now += self.seconds
        self.calls += 1
        return x + 1


class Network:
    """Stages of 10, 10, 10 and 10 ms, main's last, and heads of 1, 2 and 3 ms; exit k answers k + 1, main 4."""

    def __init__(self):
        self.clock = Clock()
        self.chain = nn.Sequential(*(Timed(self.clock, 0.010) for _ in range(4)))
        self.taps = Taps(['0', '1', '2'], ['3'])
        self.taps.install(self.chain)
        self.head_seconds = [0.001, 0.002, 0.003]
        self.heads_run = []
        self.times = PartTimes(3)

    def run_head(self, idx, tensor):
        self.clock.now += self.head_seconds[idx]
        self.heads_run.append(idx)
        return tensor

    def learn(self):
        self.times = learn_times(self.chain, self.taps, torch.zeros(2, 1), run_head=self.run_head, clock=self.clock)

    def predict(self, deadline_ms):
        self.heads_run.clear()
        before = self.clock.now
        x = torch.zeros(2, 1)
        end = before + deadline_ms / 1e3
        prediction = predict_by_deadline(
            self.chain, self.taps, x, self.times, end=end, run_head=self.run_head, clock=self.clock
        )
        idx = prediction.exit_idx[0].item()
        assert prediction.exit_idx.tolist() == [idx, idx]
        assert prediction.logits.flatten().tolist() == [idx + 1.0] * 2
        return idx, round(1e3 * (self.clock.now - before), 6), list(self.heads_run)


@pytest.fixture
def network():
    network = Network()
    network.learn()
    return network


def test_times_of_all_parts_are_learnt(network):
    found = [network.times.way(-1, idx) for idx in range(4)]
    assert found == pytest.approx([0.011, 0.022, 0.033, 0.040])
    assert network.times.way(1, 3) == pytest.approx(0.020)
    assert [network.times.head(idx) for idx in range(4)] == pytest.approx([0.001, 0.002, 0.003, 0.0])


# By hand: the deepest exit that fits, and the heads on the way that the time allows beside it.
CASES = [
    (1, 0, 11, [0]),  # nothing fits: the earliest there is, late
    (11.5, 0, 11, [0]),
    (21.9, 0, 11, [0]),
    (22.5, 1, 22, [1]),  # no time for head 0 beside
    (23.5, 1, 23, [0, 1]),
    (33.5, 2, 33, [2]),
    (34.5, 2, 34, [0, 2]),  # head 0 fits, head 1 not any more
    (36.5, 2, 36, [0, 1, 2]),
    (39.9, 2, 36, [0, 1, 2]),
    (40.5, 3, 40, []),
    (41.5, 3, 41, [0]),
    (43.5, 3, 43, [0, 1]),
    (46.5, 3, 46, [0, 1, 2]),
    (1000, 3, 46, [0, 1, 2]),
]


@pytest.mark.parametrize(('deadline', 'answer', 'taken', 'heads'), CASES)
def test_deepest_exit_that_fits_answers(network, deadline, answer, taken, heads):
    assert network.predict(deadline) == (answer, taken, heads)


def test_layers_after_the_answer_are_not_run(network):
    calls = [layer.calls for layer in network.chain]
    network.predict(22.5)
    assert [layer.calls - before for layer, before in zip(network.chain, calls)] == [1, 1, 0, 0]


def test_a_stage_that_takes_longer_than_reckoned_leaves_the_answer_before_it(network):
    network.chain[1].seconds = 0.1
    # Exit 0 answered on the way, exit 1 would come at 103 ms.
    assert network.predict(23.5) == (0, 111, [0])
    # Without time for head 0 beside, there is no answer in time: the next there is.
    network.learn()
    network.chain[1].seconds = 0.3
    assert network.predict(112.5) == (1, 312, [1])


def test_main_that_comes_late_does_not_count(network):
    network.chain[3].seconds = 0.050
    assert network.predict(46.5) == (2, 86, [0, 1, 2])


def test_slow_moments_are_forgotten_with_the_first_stage(network):
    """Everything was ten times slower while learning: later exits come back, though they were not run since."""
    for layer in network.chain:
        layer.seconds = 0.1
    network.head_seconds = [0.01, 0.02, 0.03]
    network.learn()
    assert network.predict(50)[0] == 0
    for layer in network.chain:
        layer.seconds = 0.01
    network.head_seconds = [0.001, 0.002, 0.003]
    answers = [network.predict(50)[0] for _ in range(60)]
    assert answers[0] == 0
    assert answers[-20:] == [3] * 20


def test_one_undisturbed_probe_is_enough(network):
    """Four of the five forwards that count while learning are disturbed, each in all of its parts."""
    calls = []

    def disturb(module, args):
        calls.append(module)
        network.clock.now += 0.5 if len(calls) != 4 else 0

    handles = [layer.register_forward_pre_hook(disturb) for layer in network.chain[3:]]
    network.learn()
    handles[0].remove()
    assert len(calls) == NUM_PROBES + 1
    assert network.predict(46.5) == (3, 46, [0, 1, 2])


def test_a_stage_that_was_slow_while_learning_alone_is_tried_again(network):
    network.chain[3].seconds = 0.03
    network.learn()
    network.chain[3].seconds = 0.01
    answers = [network.predict(50)[0] for _ in range(1000)]
    back = answers.index(3)
    # By hand: at tap 0 there are 40 ms left, and 10 + 10 + 30 (1 - 1e-4 (32 / 5)^2)^k <= 40 from k = 99 on.
    assert back == 99
    assert set(answers[:back]) == {2}
    assert set(answers[back:]) == {3}


def test_two_slow_moments_do_not_live_long(network):
    """Main is late twice: it is expected to be, until it is tried again and what was known is forgotten."""
    network.chain[3].seconds = 0.1
    assert [network.predict(50)[0] for _ in range(3)] == [2] * 3
    network.chain[3].seconds = 0.01
    answers = [network.predict(50)[0] for _ in range(2000)]
    back = answers.index(3)
    assert back < 1000
    assert set(answers[back:]) == {3}


def test_a_stage_that_is_slow_is_tried_seldom(network):
    network.chain[3].seconds = 0.02  # main is known after 50 ms, or 56 with the heads
    network.learn()
    late = [network.predict(49)[1] > 49 for _ in range(2000)]
    assert 0 < sum(late) < 40


def test_time_that_is_over_before_the_first_stage_counts(network):
    """The caller asked 20 ms before the stream was idle."""
    x = torch.zeros(2, 1)
    end = network.clock.now - 0.020 + 0.043
    found = predict_by_deadline(
        network.chain, network.taps, x, network.times, end=end, run_head=network.run_head, clock=network.clock
    )
    assert found.exit_idx.tolist() == [1, 1]  # 23 ms are left: 10 + 10 + 2, and head 0


def test_later_exits_are_given_up_when_everything_becomes_slower(network):
    assert network.predict(50)[0] == 3
    for layer in network.chain:
        layer.seconds = 0.02
    answers = [network.predict(50)[0] for _ in range(40)]
    assert set(answers[-10:]) == {1}  # 20 + 20 + 2 ms


def test_times_are_kept_by_form_of_input_and_the_longest_unused_are_forgotten():
    book = TimeBook()
    times = [PartTimes(1) for _ in range(NUM_FORMS + 1)]
    for idx, part_times in enumerate(times):
        book.keep(torch.empty(idx + 1, 3), part_times)
    assert book.find(torch.empty(1, 3)) is None
    assert book.find(torch.empty(2, 3)) is times[1]
    book.keep(torch.empty(NUM_FORMS + 2, 3), PartTimes(1))
    assert book.find(torch.empty(2, 3)) is times[1]  # it was just asked with, the third was not
    assert book.find(torch.empty(3, 3)) is None
    assert book.find(torch.empty(2, 3, dtype=torch.float64)) is None
    with torch.autocast('cpu', torch.bfloat16):
        assert book.find(torch.empty(2, 3)) is None


def test_book_copies_and_pickles(network):
    book = TimeBook()
    x = torch.zeros(2, 1)
    book.keep(x, network.times)
    for twin in (copy.deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert twin.find(x) is None  # another thread may have been adding times
    assert book.find(x) is network.times
