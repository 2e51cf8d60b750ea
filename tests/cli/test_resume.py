"""A run that was stopped, wherever, and gone on with is the run that was never stopped, bit for bit."""

import csv
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from helpers import write_images

from timm_multiexit.cli import train
from timm_multiexit.training.resume import read_position

# Everything that draws random numbers or keeps state: crops, colours, AutoAugment, erasing, mixing, dropout, averages.
RECIPE = (
    *('--model', 'test_resnet', '--img-size', '32', '--eed', '-b', '8', '--epochs', '3', '--warmup-epochs', '1'),
    *('--opt', 'lookahead_adamw', '--lr', '0.002', '--clip-grad', '1', '--layer-decay', '0.9'),
    *('--aa', 'rand-m5-mstd0.5', '--reprob', '0.4', '--mixup', '0.2', '--cutmix', '0.5', '--mixup-off-epoch', '2'),
    *('--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--grad-accum-steps', '2'),
    *('--exit-warmup-epochs', '2', '--lr-noise', '0.3', '0.9', '--seed', '5'),
)
KEPT = ('last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar')


class Killed(BaseException):
    """Ends a run as a kill does: nothing in it catches this."""


@pytest.fixture
def folder(tmp_path):
    """Eleven batches of eight images in two classes, so that windows of two leave a tail of one."""
    return write_images(tmp_path / 'images', num_train=44)


def load(path):
    return torch.load(path, weights_only=False)


def assert_equal(one, other, where=''):
    """Compare nested values, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f'{where}/{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for idx, (left, right) in enumerate(zip(one, other)):
            assert_equal(left, right, f'{where}/{idx}')
    else:
        assert one == other, where


def assert_same_run(one, other):
    """Compare two run folders: weights, averages, optimizer, bookkeeping, table, best network, and which files."""
    names = [sorted(path.name for path in run.rglob('*')) for run in (one, other)]
    assert names[0] == names[1]
    for name in KEPT:
        states = [load(run / name) for run in (one, other)]
        for key in ('epoch', 'state_dict', 'state_dict_ema', 'task_state', 'optimizer', 'metric', 'saver'):
            assert_equal(states[0][key], states[1][key], f'{name}/{key}')
    for name in ('summary.csv', 'best/model.safetensors', 'best/exits.safetensors', 'best/config.json'):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def train_here(run_script, folder):
    """Return a function that runs the recipe into out/NAME; `kill_at` ends it before that update, unsaved."""

    def run(name, *flags, kill_at=None, code=0):
        argv = (*RECIPE, '--data-dir', folder, '--output', 'out', '--experiment', name, *flags)
        with pytest.MonkeyPatch.context() as patch:
            if kill_at is not None:
                patch.setattr('timm_multiexit.training.trainer.Trainer._step', _killing_step(kill_at))
                with pytest.raises(Killed):
                    run_script(train.main, *argv)
            else:
                result = run_script(train.main, *argv)
                assert result[0] == code, result
        return folder.parent / 'out' / name

    return run


def _killing_step(kill_at):
    from timm_multiexit.training.trainer import Trainer

    original = Trainer._step

    def step(self):
        if self.num_updates == kill_at:
            raise Killed
        original(self)

    return step


@pytest.mark.slow
@pytest.mark.parametrize('workers', ['0', '2'])
def test_killed_and_resumed_run_equals_the_whole_one(workers, train_here):
    whole = train_here('whole', '-j', '0', '--sched-on-updates')
    flags = ('-j', workers, '--sched-on-updates', '--recovery-interval', '2', '--resume', 'auto')
    # Six updates an epoch: in the first epoch before and after the first recovery file, later, and in the last step.
    for kill_at in (1, 3, 9, 17):
        parts = train_here('parts', *flags, kill_at=kill_at)
    train_here('parts', *flags)
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    'flags',
    [
        pytest.param(('--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5'), marks=pytest.mark.slow),
        pytest.param(('--no-prefetcher', '--use-multi-epochs-loader'), marks=pytest.mark.slow),
        pytest.param(
            ('--train-img-sizes', '24', '32', '--sched', 'wsd', '--decay-epochs', '1'), marks=pytest.mark.slow
        ),
        pytest.param(
            ('--regime', 'mixed', '--backbone-epochs', '1', '--head-warmup-epochs', '0.5'), marks=pytest.mark.slow
        ),
        pytest.param(('--exit-teacher-weights', 'skill'), marks=pytest.mark.slow),
    ],
    ids=['plateau', 'host', 'sizes', 'mixed', 'skill'],
)
def test_other_schedules_loaders_and_regimes_resume_exactly(flags, train_here):
    whole = train_here('whole', '-j', '0', *flags)
    for kill_at in (8, 14):
        parts = train_here('parts', '-j', '0', '--recovery-interval', '1', '--resume', 'auto', *flags, kill_at=kill_at)
    train_here('parts', '-j', '0', '--resume', 'auto', *flags)
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_run_that_goes_on_with_anothers_checkpoint_and_is_killed_in_its_first_epoch_is_resumed(train_here):
    first = train_here('first', '-j', '0')
    flags = ('-j', '0', '--epochs', '4', '--resume')
    whole = train_here('whole', *flags, first / 'last.pth.tar')
    parts = train_here('parts', *flags, first / 'last.pth.tar', kill_at=20)
    assert read_position(load(parts / 'last.pth.tar')) == (3, 0)
    train_here('parts', *flags, 'auto')
    assert_equal(load(parts / 'last.pth.tar')['state_dict'], load(whole / 'last.pth.tar')['state_dict'])
    rows = [list(csv.DictReader((run / 'summary.csv').open())) for run in (whole, parts)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


@pytest.mark.parametrize('sign', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_saves_and_stops_and_the_run_goes_on_with_the_next_batch(sign, train_here, monkeypatch):
    from timm_multiexit.training.trainer import Trainer

    whole = train_here('whole', '-j', '0')
    before = signal.getsignal(sign)
    original, done = Trainer._step, []

    def step(self):
        original(self)
        done.append(self.num_updates)
        if len(done) == 9:
            os.kill(os.getpid(), sign)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, '_step', step)
        parts = train_here('parts', '-j', '0', code=128 + sign)
    assert (parts / 'recovery-1-6.pth.tar').exists()  # six updates an epoch, two batches each: three into the second
    assert signal.getsignal(sign) is before
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, '_step', lambda self: (done.append(self.num_updates + 1), original(self)))
        train_here('parts', '-j', '0', '--resume', 'auto')
    assert done == list(range(1, 19))  # no step twice
    assert_same_run(whole, parts)


def _train_forked(argv):
    # A process of its own, as torch's threads do not survive a fork in use.
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    os._exit(train.main([str(item) for item in argv]))


def _train_in_a_group(argv):
    os.setsid()
    _train_forked(argv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sign', 'send', 'flags'),
    [
        (signal.SIGTERM, os.killpg, ()),
        (signal.SIGTERM, os.killpg, ('--no-prefetcher', '--use-multi-epochs-loader')),
        (signal.SIGINT, os.killpg, ()),
        (signal.SIGTERM, os.kill, ()),
    ],
    ids=['group', 'group-multi-epochs', 'ctrl-c', 'main'],
)
def test_signal_to_all_processes_of_a_run_saves_and_stops(sign, send, flags, train_here, folder, monkeypatch):
    whole = train_here('whole', '-j', '0', *flags)
    monkeypatch.chdir(folder.parent)
    parts = folder.parent / 'out' / 'parts'
    argv = (*RECIPE, '--data-dir', folder, '--output', 'out', '--experiment', 'parts', '-j', '2', *flags)
    process = multiprocessing.get_context('fork').Process(
        target=_train_in_a_group, args=((*argv, '--recovery-interval', '2'),)
    )
    process.start()
    while process.is_alive() and not list(parts.glob('recovery-1-*')):
        time.sleep(0.002)
    send(process.pid, sign)
    process.join()
    assert process.exitcode == 128 + sign
    assert not (parts / 'results.json').exists()  # stopped, not ended
    train_here('parts', '-j', '0', *flags, '--resume', 'auto')
    assert_same_run(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize('workers', ['0', '2'])
def test_run_killed_at_ten_random_moments_equals_the_whole_one(workers, train_here, folder, monkeypatch):
    flags = ('--epochs', '7')
    whole = train_here('whole', '-j', '0', *flags)
    monkeypatch.chdir(folder.parent)
    argv = (*RECIPE, '--data-dir', folder, '--output', 'out', '--experiment', 'parts', '-j', workers, *flags)
    argv += ('--recovery-interval', '1', '--resume', 'auto')
    context, parts = multiprocessing.get_context('fork'), folder.parent / 'out' / 'parts'
    moments, kills = random.Random(0), 0
    process = context.Process(target=_train_forked, args=(argv,))
    process.start()
    for _ in range(200):
        process.join(moments.uniform(0.05, 1.5))
        if process.exitcode is None and kills < 10:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        if process.exitcode is not None:
            if process.exitcode == 0:
                break
            process = context.Process(target=_train_forked, args=(argv,))
            process.start()
    assert process.exitcode == 0
    assert kills == 10
    assert_same_run(whole, parts)
    with (parts / 'summary.csv').open() as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == list('0123456')
