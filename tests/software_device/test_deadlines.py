"""Deadlines, streams and copies where the host runs ahead of the device."""

import time

import pytest
import torch

import software_device
from timm_multiexit.calibration import logits as logits_module
from timm_multiexit.calibration.logits import collect_logits
from timm_multiexit.policies.leaving import check_answer

pytestmark = pytest.mark.slow

KERNEL_SECONDS = 2**-10


@pytest.fixture(autouse=True)
def host_clock(monkeypatch):
    """The host's clock is the device's: what is measured is the device's work to the kernel, on a busy machine too."""
    monkeypatch.setattr(time, 'perf_counter', software_device.read_clock)


@pytest.fixture
def model(make_model, device):
    return make_model(exits=[1, 2, 3]).eval().to(device)


@pytest.fixture
def images(device):
    return torch.randn(2, 3, 64, 64).to(device)


def predict_after(model, images, queued, deadline):
    """Return which exit answers a call that finds `queued` seconds of work on the stream, and its own seconds."""
    software_device.queue(queued)
    began = software_device.read_clock()
    prediction = model.predict(images, deadline_ms=1e3 * deadline)
    taken = software_device.read_clock() - began
    return prediction.exit_idx[0].item(), taken


@torch.no_grad()
def count_kernels(model, images):
    """Return how many kernels are launched on the way to each classifier's logits without the heads before it."""
    marks, handles = [], []
    for exit_idx, spec in enumerate(model.exits.specs):

        def read(module, args, output, exit_idx=exit_idx):
            with software_device.launches() as head:
                model.exits[exit_idx](output)
            marks.append((sum(software_device.build().launches().values()), sum(head.values())))

        handles.append(model.backbone.get_submodule(spec.module).register_forward_hook(read))
    before = sum(software_device.build().launches().values())
    model.backbone(images)
    after = sum(software_device.build().launches().values())
    for handle in handles:
        handle.remove()
    heads = [head for _, head in marks]
    ways = [mark - before - sum(heads[:exit_idx]) for exit_idx, (mark, _) in enumerate(marks)]
    return [*ways, after - before - sum(heads)]


def count_check(logits):
    """Return how many kernels are launched from the logits that answer to the answer."""
    with software_device.launches() as launched:
        check_answer(0, 3, logits, waits=True)
        torch.full((len(logits),), 0, device=logits.device)
    return sum(launched.values())


def test_queued_work_is_part_of_the_time(model, images):
    """The answer is the deepest that the rest of the time is enough for, and there in time."""
    check = count_check(model.backbone(images))
    kernels = [way + check for way in count_kernels(model, images)]
    assert len(kernels) == 4
    assert sorted(set(kernels)) == kernels
    answers = []
    with software_device.kernel_seconds(KERNEL_SECONDS):
        with software_device.launches() as launched:
            model.predict(images, deadline_ms=1e6)  # learns
        assert sum(launched.values()) > 5 * kernels[-1]
        deadline = (kernels[-1] + 10) * KERNEL_SECONDS
        for left in range(kernels[0], kernels[-1] + 10):  # and a half: what is expected is rounded
            expected = max(exit_idx for exit_idx in range(4) if kernels[exit_idx] <= left)
            assert predict_after(model, images, 0, 1e3)[0] == 3  # what is not run is hoped to become faster
            queued = deadline - (left + 0.5) * KERNEL_SECONDS
            exit_idx, taken = predict_after(model, images, queued, deadline)
            answers.append(exit_idx)
            assert (left, exit_idx) == (left, expected)
            assert taken <= deadline, left
    assert set(answers) == {0, 1, 2, 3}


def test_more_queued_than_there_is_time_leaves_the_shallowest_exit(model, images):
    shallowest = (count_kernels(model, images)[0] + count_check(model.backbone(images))) * KERNEL_SECONDS
    with software_device.kernel_seconds(KERNEL_SECONDS):
        model.predict(images, deadline_ms=1e6)
        assert predict_after(model, images, 4, 2) == (0, 4 + shallowest)


def test_work_on_other_streams_is_not_waited_for(model, images, device):
    model.predict(images, deadline_ms=1e3)
    began = software_device.read_clock()
    software_device.queue(1.0, stream=torch.Stream(device))
    assert model.predict(images, deadline_ms=500).exit_idx.tolist() == [3, 3]
    assert software_device.read_clock() == began


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
