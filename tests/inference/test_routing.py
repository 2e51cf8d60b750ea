"""Routing: what leaves the batch on the way is answered as if everything had been run on everything."""

import logging
import random
from collections import Counter

import pytest
import torch
from helpers.routing import assert_equals_simulation, draw_policy
from torch import nn

import timm_multiexit as tme
from timm_multiexit.exits.taps import Taps
from timm_multiexit.inference.routing import Route, find_leaving
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

NUM_EXITS = 3
NAMES = [f'acts.{idx}' for idx in range(NUM_EXITS)]


class Chain(nn.Module):
    """Three layers and a classifier on vectors, tapped after each layer; remembers how many rows each layer saw.

    Args:
        adds_at: Layer whose output the input is added to, before its tap; 3 for the classifier's input.
    """

    def __init__(self, adds_at=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(NUM_EXITS))
        self.acts = nn.ModuleList(nn.Tanh() for _ in range(NUM_EXITS))
        self.fc = nn.Linear(6, 5)
        self.adds_at = adds_at
        self.rows = []

    def forward(self, x):
        inputs = x = x.flatten(1)
        self.rows = []
        for idx, (layer, act) in enumerate(zip(self.layers, self.acts)):
            self.rows.append(len(x))
            x = 2 * layer(x)
            x = act(x + inputs if idx == self.adds_at else x)
        self.rows.append(len(x))
        return self.fc(x + inputs if self.adds_at == NUM_EXITS else x)


class Exits:
    """A chain with linear heads."""

    def __init__(self, adds_at=None, scale=3.0):
        self.chain = Chain(adds_at).eval()
        self.taps = Taps(NAMES, ['fc'])
        self.taps.install(self.chain)
        self.heads = [nn.Linear(6, 5) for _ in range(NUM_EXITS)]
        self.scale = scale

    def run_head(self, idx, tensor):
        return self.scale * self.heads[idx](tensor)

    @torch.no_grad()
    def logits(self, x):
        output, tensors, _ = self.taps.collect(self.chain, x)
        return [*(self.run_head(idx, tensor) for idx, tensor in enumerate(tensors)), output]

    @torch.no_grad()
    def infer(self, x, policy, *, can_leave=(True,) * NUM_EXITS, bucket_sizes=()):
        route = Route(policy, self.run_head, can_leave=can_leave, bucket_sizes=bucket_sizes)
        route.begin(len(x), x.device)
        return route.finish(self.taps.visit(self.chain, x, route.visit))


def make_images(count):
    return torch.randn(count, 6, 1, 1) * torch.rand(count, 1, 1, 1) * 3


@pytest.mark.parametrize('bucket_sizes', [(), (4, 16, 32), (1, 2, 4, 8, 16, 32, 64)], ids=['exact', 'few', 'powers'])
@pytest.mark.parametrize('can_leave', [(True, True, True), (False, True, True), (True, False, True), (False,) * 3])
def test_route_equals_simulation_for_random_policies_and_batches(can_leave, bucket_sizes):
    draw = random.Random(0)
    shares = Counter()
    for case in range(60):
        torch.manual_seed(case)
        exits = Exits()
        x = make_images(draw.choice([1, 2, 3, 7, 16, 33, 64]))
        logits = exits.logits(x)
        policy, scores = draw_policy(draw, logits)
        prediction = exits.infer(x, policy, can_leave=can_leave, bucket_sizes=bucket_sizes)
        expected = assert_equals_simulation(prediction, policy, logits, scores)
        shares.update(expected.exit_idx.tolist())
    assert min(shares[idx] for idx in range(NUM_EXITS + 1)) > 50, shares


def thresholds_for(logits, quantiles):
    """Return thresholds of confidence at these quantiles of what each exit says of all samples."""
    return tuple(float(single.softmax(-1).amax(-1).quantile(q)) for single, q in zip(logits, quantiles))


def test_layers_see_those_that_are_left_and_nobody_after_the_last():
    exits, x = Exits(), make_images(20)
    policy = ExitPolicy('confidence', (*thresholds_for(exits.logits(x), (0.5, 0.5)), None))
    prediction = exits.infer(x, policy)
    counts = torch.bincount(prediction.exit_idx, minlength=4).tolist()
    assert counts[0] == 10
    assert 0 < counts[1] < 10
    assert exits.chain.rows == [20, 10, 10 - counts[1], 10 - counts[1]]
    assert counts[2:] == [0, 10 - counts[1]]
    assert set(exits.infer(x, ExitPolicy('confidence', (0.0, 0.5, 0.5))).exit_idx.tolist()) == {0}
    assert exits.chain.rows == [20]
    assert set(exits.infer(x, ExitPolicy('confidence', (None, 1.0, None))).exit_idx.tolist()) == {3}
    assert exits.chain.rows == [20] * 4


def test_batch_goes_on_in_the_sizes_of_the_buckets():
    exits, x = Exits(), make_images(20)
    thresholds = thresholds_for(exits.logits(x), (0.5,))
    exits.infer(x, ExitPolicy('confidence', (*thresholds, None, None)), bucket_sizes=(4, 12, 16))
    assert exits.chain.rows == [20, 12, 12, 12]
    exits.infer(x, ExitPolicy('confidence', (*thresholds, None, None)), bucket_sizes=(4, 8))
    assert exits.chain.rows == [20, 10, 10, 10]
    exits.infer(x, ExitPolicy('confidence', (*thresholds, None, None)), bucket_sizes=(64,))
    assert exits.chain.rows == [20] * 4


def test_decided_samples_stay_where_they_cannot_leave_and_leave_at_the_next_tap():
    exits, x = Exits(), make_images(20)
    policy = ExitPolicy('confidence', (*thresholds_for(exits.logits(x), (0.5,)), 1.0, None))
    exits.infer(x, policy, can_leave=(False, True, True))
    assert exits.chain.rows == [20, 20, 10, 10]
    exits.infer(x, policy, can_leave=(False,) * 3)
    assert exits.chain.rows == [20] * 4
    everybody = ExitPolicy('confidence', (None, 0.0, None))
    assert exits.infer(x, everybody, can_leave=(False,) * 3).exit_idx.unique().tolist() == [1]
    assert exits.chain.rows == [20, 20]


def test_unused_exits_are_not_run():
    exits, x = Exits(), make_images(4)
    run = []
    run_head = exits.run_head
    exits.run_head = lambda idx, tensor: run.append(idx) or run_head(idx, tensor)
    exits.infer(x, ExitPolicy('confidence', (None, 1.0, None)))
    assert run == [1]


def test_tap_that_does_not_fire_is_an_error_and_no_silent_gap():
    exits = Exits()
    exits.taps.remove(exits.chain)
    route = Route(ExitPolicy('confidence', (None, 0.5, 0.5)), exits.run_head, can_leave=(True,) * NUM_EXITS)
    route.begin(2, torch.device('cpu'))
    with pytest.raises(RuntimeError, match='The tap of exit 1 did not fire'):
        route.finish(exits.chain(make_images(2)))


def test_nan_is_an_error_that_names_the_exit_and_counts_the_images():
    exits, x = Exits(), make_images(8)
    x[[2, 5]] = float('nan')
    with pytest.raises(MultiExitError, match='Exit 0 gives NaN or infinite logits for 2 of 8 images'):
        exits.infer(x, ExitPolicy('confidence', (0.5, 0.5, 0.5)))
    with pytest.raises(MultiExitError, match='Exit 1 gives NaN or infinite logits for 2 of 8 images'):
        exits.infer(x, ExitPolicy('patience', (None, 1, 1)))


# What is found of a backbone


@pytest.mark.parametrize(
    ('adds_at', 'expected'),
    [
        (None, (True, True, True)),
        (0, (True, True, True)),
        (1, (False, True, True)),
        (2, (False, False, True)),
        (3, (False, False, False)),
    ],
)
def test_taps_that_something_crosses_are_found(adds_at, expected, caplog):
    exits = Exits(adds_at)
    with caplog.at_level(logging.WARNING):
        found = find_leaving(exits.chain, exits.taps, (6, 1, 1))
    assert found == expected
    assert len(caplog.records) == (expected != (True, True, True))
    if caplog.records:
        leaving = ', '.join(f'exit {idx}' for idx in range(3) if expected[idx]) or 'no exit'
        assert f'samples leave the batch at {leaving};' in caplog.text
    x = make_images(16)
    logits = exits.logits(x)
    policy, scores = draw_policy(random.Random(1), logits)
    assert_equals_simulation(exits.infer(x, policy, can_leave=found), policy, logits, scores)


def test_values_that_mix_samples_are_found_where_the_shapes_agree():
    class Mixing(Chain):
        def forward(self, x):
            output = super().forward(x)
            return output + output.sum(0)  # depends on who else is in the batch

    exits = Exits()
    mixing = Mixing().eval()
    exits.taps.install(mixing)
    assert find_leaving(mixing, exits.taps, (6, 1, 1)) == (False, False, False)


def test_search_for_leaving_taps_draws_no_random_numbers():
    exits = Exits()
    state = torch.get_rng_state()
    find_leaving(exits.chain, exits.taps, (6, 1, 1))
    assert torch.equal(torch.get_rng_state(), state)


class WithConstants(nn.Module):
    """Gives a map and as many constants as the map has channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.gains = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.conv(x), self.gains


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.conv, self.fc = WithConstants(), nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 4)

    def forward(self, x):
        maps, gains = self.block(x)
        return self.fc(self.conv(maps * gains.view(1, -1, 1, 1)).mean((2, 3)))


@pytest.mark.parametrize('batch', [7, 8, 9])
@pytest.mark.parametrize('leaving', [1, 5, 7])
def test_constants_beside_the_tapped_map_are_not_taken_for_samples(batch, leaving):
    model = tme.attach_exits(Gated(), ['block'], head='linear', input_size=(3, 32, 32)).eval()
    images = torch.randn(batch, 3, 32, 32)
    scores = model(images, exit_idx=0).detach().softmax(-1).amax(-1).sort().values
    policy = ExitPolicy('confidence', (float(scores[-leaving:].min()),))
    with torch.no_grad():
        expected = tme.apply_policy(policy, model(images, exits=True).logits)
        result = model.infer(images, policy=policy)
    assert (result.exit_idx == 0).sum() == leaving
    assert torch.equal(result.exit_idx, expected.exit_idx)
    torch.testing.assert_close(result.logits, expected.logits)
