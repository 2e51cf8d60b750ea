"""Deadlines, streams and copies where the host runs ahead of the device."""

import statistics
import time

import pytest
import torch

import software_device
from timm_multiexit.calibration import logits as logits_module
from timm_multiexit.calibration.logits import collect_logits

pytestmark = pytest.mark.slow

KERNEL_SECONDS = 2e-4


@pytest.fixture
def model(make_model, device):
    return make_model(exits=[1, 2, 3]).eval().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 64, 64).to(device)


def predict_after(model, images, queued, deadline):
    """Return which exit answers a call that finds `queued` seconds of work on the stream, and its own seconds."""
    software_device.queue(queued)
    began = time.perf_counter()
    exit_idx = model.predict(images, deadline_ms=1e3 * deadline).exit_idx[0].item()
    return exit_idx, time.perf_counter() - began


def test_queued_work_is_part_of_the_time(model, images):
    """Calls with a part of their time queued are not late by more than the shallowest exit takes.

    The quickest of five counts: other processes can only delay a call, and one that forgot what is queued is late always.
    """
    with software_device.kernel_seconds(KERNEL_SECONDS):
        model.predict(images, deadline_ms=1e3)  # learns
        shallowest = min(predict_after(model, images, 0, 1e-6)[1] for _ in range(3))
        whole = min(predict_after(model, images, 0, 10)[1] for _ in range(3))
        assert 0 < shallowest < 0.7 * whole
        deadline = 1.2 * whole + 0.005
        answers = []
        for quarters in range(4):
            calls = [predict_after(model, images, quarters * deadline / 4, deadline) for _ in range(5)]
            assert min(taken for _, taken in calls) <= deadline + shallowest, (quarters, calls)
            answers.append([exit_idx for exit_idx, _ in calls])
    assert statistics.median(answers[0]) == 3  # nothing queued: main
    assert statistics.mean(answers[3]) < statistics.mean(answers[0])  # a quarter of the time is left


def test_more_queued_than_there_is_time_leaves_the_shallowest_exit(model, images):
    with software_device.kernel_seconds(KERNEL_SECONDS):
        model.predict(images, deadline_ms=1e3)
        shallowest = min(predict_after(model, images, 0, 1e-6)[1] for _ in range(3))
        calls = [predict_after(model, images, 0.2, 0.1) for _ in range(5)]
    assert [exit_idx for exit_idx, _ in calls] == [0] * 5
    assert 0.2 <= min(taken for _, taken in calls) < 0.2 + 3 * shallowest + 0.03


def test_work_on_other_streams_is_not_waited_for(model, images, device):
    model.predict(images, deadline_ms=1e3)
    software_device.queue(1.0, stream=torch.Stream(device))
    began = time.perf_counter()
    assert model.predict(images, deadline_ms=500).exit_idx.tolist() == [3, 3]
    assert time.perf_counter() - began < 0.5


def test_steps_resumed_under_other_streams_are_ordered(model, images, device):
    """The forward stays on the stream it began on; who resumes it on another one gets a stream that waits for it."""
    expected = model(images, exits=True).logits
    streams = [torch.Stream(device) for _ in range(4)]
    torch.accelerator.synchronize()
    results = []
    with software_device.races() as races:
        steps = model.anytime(images)
        for stream in streams:
            with stream:
                idx, logits = next(steps)
                results.append((idx, logits * 2))
        for stream in streams:
            torch.accelerator.current_stream().wait_stream(stream)
    assert races == []
    for idx, doubled in results:
        torch.testing.assert_close(doubled, 2 * expected[idx], rtol=0, atol=0)


def test_logits_are_collected_with_few_waits(model, device, monkeypatch):
    """One copy for each column in the end, whatever the number of batches; with a small limit one round more."""
    batches = [(torch.randn(4, 3, 64, 64).to(device), (torch.arange(4) % 10).to(device)) for _ in range(6)]
    expected = collect_logits(model, batches)
    num_columns = len(expected.logits) + 2
    with software_device.waits() as waits:
        found = collect_logits(model, batches)
    assert waits['copy to host'] == num_columns
    on_host = collect_logits(model.to('cpu'), [(images.cpu(), targets.cpu()) for images, targets in batches])
    assert torch.equal(found.fingerprints, on_host.fingerprints)
    for one, other in zip(found.logits, on_host.logits):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    model.to(device)
    monkeypatch.setattr(logits_module, 'MAX_HELD_BYTES', sum(each[:16].nbytes for each in expected.logits))
    with software_device.waits() as waits:
        collect_logits(model, batches)
    assert waits['copy to host'] == 2 * num_columns
