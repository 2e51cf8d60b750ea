"""What a real GPU does: answers of the CPU, no waits, graphs, compiled blocks, deadlines, and train.py from end to end.

`pytest -m gpu` runs them where torch finds CUDA; `benchmark.py gpu` measures.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import write_images
from helpers.members import MEMBERS, QUICK
from helpers.runs import FLAGS, run_script

import benchmark
from benchmarks.gpu import capture
from benchmarks.inference import force_policy
from benchmarks.training import create_step, create_train_args
from timm_multiexit.cli import train, validate
from timm_multiexit.cli.launch import create_accelerator
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU, torch finds no CUDA'),
]

# Of float32 with other algorithms for convolutions and products.
CLOSE = {'rtol': 1e-3, 'atol': 1e-3}


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # without it, cuDNN is off
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def no_waits():
    """Let every wait of the host for the GPU raise."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.fixture
def pair(make_small):
    """Return a function that makes a network on the CPU and its copy on the GPU, with images for both."""

    def make(name, batch_size=8):
        model = make_small(name).eval()
        images = torch.randn(batch_size, *model.input_size) * torch.linspace(0.2, 3, batch_size).view(-1, 1, 1, 1)
        return (model, images), (copy.deepcopy(model).cuda(), images.cuda())

    return make


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, **CLOSE)


@pytest.mark.parametrize('name', MEMBERS)
@torch.no_grad()
def test_every_call_answers_as_on_the_cpu(name, pair):
    (model, images), (other, moved) = pair(name)
    expected, actual = model(images, exits=True), other(moved, exits=True)
    assert_same(actual.logits + actual.features, expected.logits + expected.features)
    assert_same([other(moved)], [model(images)])
    for idx in range(len(model.exits)):
        assert_same([other(moved, exit_idx=idx)], [model(images, exit_idx=idx)])
    assert_same([logits for _, logits in other.anytime(moved)], [logits for _, logits in model.anytime(images)])


@pytest.mark.parametrize('criterion', CRITERIA)
@torch.no_grad()
def test_infer_decides_as_the_policy_does_on_all_logits(criterion, pair):
    _, (model, images) = pair(QUICK[0], 64)
    logits = model(images, exits=True).logits
    policy = ExitPolicy(criterion, (1, 2, 2)) if criterion == 'patience' else ExitPolicy(criterion, (0.3, 0.4, 0.5))
    for sizes in (None, (8, 16, 32, 64)):
        prediction, expected = model.infer(images, policy, bucket_sizes=sizes), apply_policy(policy, logits)
        # A score that lies on a threshold may be rounded to either side.
        assert (prediction.exit_idx == expected.exit_idx).float().mean() > 0.95
        same = prediction.exit_idx == expected.exit_idx
        torch.testing.assert_close(prediction.logits[same], expected.logits[same], **CLOSE)


@pytest.mark.parametrize('name', QUICK)
@torch.no_grad()
def test_fixed_exits_and_loops_over_them_never_wait(name, pair):
    _, (model, images) = pair(name)
    calls = [lambda: model(images), lambda: model(images, exits=True), lambda: list(model.anytime(images))]
    calls += [lambda idx=idx: model(images, exit_idx=idx) for idx in range(len(model.exits))]
    for call in calls:
        call()
        with no_waits():
            call()


@pytest.mark.parametrize('loss', LOSSES)
def test_a_training_step_never_waits(loss):
    args = SimpleNamespace(
        **{'model': 'test_resnet', 'img_size': 32, 'batch_size': 8, 'num_classes': 10, 'data_dir': None},
        **{'exits': 'auto', 'exit_head': 'conv', 'channels_last': True, 'torchcompile': False, 'amp': True},
        device='cuda',
    )
    train_args = create_train_args(args, loss)
    step, model = create_step(train_args, create_accelerator(train_args))
    batch = torch.randn(8, 3, 32, 32).cuda(), (torch.arange(8) % 10).cuda()
    assert next(model.parameters()).is_cuda
    step(*batch)
    with no_waits():
        step(*batch)


@pytest.mark.parametrize('name', QUICK)
@torch.inference_mode()
def test_every_exit_can_be_a_cuda_graph(name, pair):
    _, (model, images) = pair(name)
    for idx in range(len(model.exits)):
        replay = capture(lambda x, idx=idx: model(x, exit_idx=idx), images)
        images.normal_()
        torch.testing.assert_close(replay(), model(images, exit_idx=idx), **CLOSE)


@torch.inference_mode()
def test_compiled_forward_and_blocks_answer_as_the_model(pair):
    _, (model, images) = pair('test_resnet', 32)
    logits = [single.cpu() for single in model(images, exits=True).logits]
    policy = force_policy(logits, 0.5)
    expected = model.infer(images, policy)
    assert expected.exit_idx.unique().numel() > 2
    compiled = copy.deepcopy(model)
    for block in (*compiled.backbone.layer3, *compiled.exits):
        block.compile(dynamic=False)
    prediction = compiled.infer(images, policy, bucket_sizes=(4, 8, 16, 32))
    assert (prediction.exit_idx == expected.exit_idx).float().mean() > 0.9
    whole = torch.compile(model, dynamic=False)
    torch.testing.assert_close(whole(images, exit_idx=1), model(images, exit_idx=1), **CLOSE)


@torch.inference_mode()
def test_bfloat16_in_channels_last_answers_as_float32_to_its_precision(pair):
    _, (model, images) = pair('test_resnet')
    expected = model(images, exits=True).logits
    half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)
    moved = images.to(torch.bfloat16, memory_format=torch.channels_last)
    for one, other in zip(half(moved, exits=True).logits, expected, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()
    assert half.infer(moved, threshold=0.3).logits.dtype == torch.float32


@torch.no_grad()
def test_early_exits_take_less_memory(pair):
    _, (model, images) = pair('test_resnet', 256)
    peaks = []
    for call in (lambda: model(images, exit_idx=0), lambda: model(images, exits=True)):
        call()
        torch.cuda.reset_peak_memory_stats()
        call()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1]


def test_deadlines_count_what_is_queued(pair):
    _, (model, images) = pair('test_resnet')
    for _ in range(8):
        model.predict(images, deadline_ms=1000)
    times = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times[0].record()
    torch.cuda._sleep(10_000_000)
    times[1].record()
    torch.cuda.synchronize()
    cycles = int(10_000_000 * 20 / times[0].elapsed_time(times[1]))  # of 20 ms
    answers = []
    for _ in range(20):
        torch.cuda._sleep(cycles)
        answers.append(int(model.predict(images, deadline_ms=5).exit_idx[0]))
    assert answers == [0] * 20
    assert int(model.predict(images, deadline_ms=1000).exit_idx[0]) == len(model.exits)


@pytest.mark.parametrize('flags', ['', '--amp', '--amp --amp-dtype bfloat16 --channels-last --model-ema'])
def test_training_resuming_and_validation_run(flags, tmp_path, capfd):
    write_images(tmp_path / 'images')
    places = ('--data-dir', tmp_path / 'images', '--output', tmp_path / 'out', '--experiment', 'run')
    run_script(train, tmp_path, *FLAGS.split(), *flags.split(), *places)
    assert '1 x cuda' in capfd.readouterr().err
    run_script(train, tmp_path, *FLAGS.split(), *flags.split(), *places, '--epochs', 2, '--resume', 'auto')
    argv = '-b 8 -j 0 --split validation --calib-split train --budget 90% --time-rounds 2'
    run_script(
        validate,
        tmp_path,
        '--model',
        f'local-dir:{tmp_path}/out/run/best',
        '--data-dir',
        tmp_path / 'images',
        *argv.split(),
    )
    assert 'budget 90%' in capfd.readouterr().out


def test_the_table_of_the_gpu_has_all_forms(run_script):
    flags = '--model test_resnet --img-size 64 --batch-sizes 1 8 --rounds 2'
    code, out, err = run_script(benchmark.main, 'gpu', *flags.split())
    assert (code, err) == (0, '')
    for call in ('exit_idx=0, CUDA graph', 'plain timm, CUDA graph', 'infer, 50 % leaving, compiled'):
        assert call in out
