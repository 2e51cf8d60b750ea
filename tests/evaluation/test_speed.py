"""Times of policies and exits, by clocks that count work."""

from functools import partial

import pytest
import torch

from timm_multiexit.evaluation import speed
from timm_multiexit.evaluation.speed import compile_network, make_plain
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.timing import time_interleaved


@pytest.fixture
def model(make_model):
    return make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()


def test_times_are_ratios_to_plain_timm(model, monkeypatch):
    """By a clock that counts the images that convolutions see."""
    clock, convolve = [0], torch.nn.Conv2d.forward

    def counted(self, x):
        clock[0] += len(x)
        return convolve(self, x)

    def ticks(call):
        before = clock[0]
        with torch.no_grad():
            call()
        return clock[0] - before

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', counted)
    monkeypatch.setattr(speed, 'time_interleaved', partial(time_interleaved, clock=lambda device: clock[0]))
    images = torch.randn(6, 3, 32, 32)
    policies = {'first': ExitPolicy('confidence', (0.0, None)), 'none': ExitPolicy('confidence', (None, None))}
    model.can_leave  # noqa: B018 - found once, by forwards that are no part of the time
    times = speed.time_policies(model, images, policies, rounds=2)
    expected = {
        'main': ticks(lambda: model.backbone(images)),
        'all exits': ticks(lambda: model(images, exits=True)),
        'first': ticks(lambda: model(images, exit_idx=0)),
        'none': ticks(lambda: model.backbone(images)),
    }
    assert expected['first'] < expected['none'] < expected['all exits']
    assert {name: 6 / row['img/s'] for name, row in times.items()} == pytest.approx(expected)
    assert {name: row['time_ratio'] * expected['none'] for name, row in times.items()} == pytest.approx(expected)


def test_latency_is_of_one_image_to_each_exit_alone(model, monkeypatch):
    """By a clock that counts the values that convolutions give."""
    clock, convolve = [0], torch.nn.Conv2d.forward

    def counted(self, x):
        out = convolve(self, x)
        clock[0] += out.numel()
        return out

    def ticks(call):
        before = clock[0]
        with torch.no_grad():
            call()
        return clock[0] - before

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', counted)
    monkeypatch.setattr(speed, 'time_interleaved', partial(time_interleaved, clock=lambda device: clock[0]))
    images = torch.randn(6, 3, 32, 32)
    model(images[:1], exit_idx=0)  # what is found once is no part of the time
    latency = speed.time_exits(model, images, rounds=3)
    expected = {
        'main in timm': ticks(lambda: model.backbone(images[:1])),
        '0': ticks(lambda: model(images[:1], exit_idx=0)),
        '1': ticks(lambda: model(images[:1], exit_idx=1)),
        'main': ticks(lambda: model.backbone(images[:1])),
    }
    assert 0 < expected['0'] < expected['1']
    assert latency['ms'] == {name: 1e3 * num for name, num in expected.items()}
    assert {**latency, 'ms': None} == {'batch_size': 1, 'rounds': 3, 'device': 'cpu', 'ms': None}
    assert list(latency['ms']) == ['main in timm', '0', '1', 'main']


def test_plain_network_is_compiled_as_the_model_is(model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    assert make_plain(model)._compiled_call_impl is None
    compile_network(model, backend=backend)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.backbone(images)
        assert graphs == []
        torch.testing.assert_close(make_plain(model)(images), expected)
    assert len(graphs) == 1
