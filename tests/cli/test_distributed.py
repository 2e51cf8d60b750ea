"""Two processes on this machine, over gloo."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import write_images

from timm_multiexit.cli import train

ROOT = Path(__file__).parents[2]
# Layer norms only, so that two halves of a batch give the whole's gradient; crops, flips and colours stay on.
FLAGS = ('--model', 'test_convnext', '--img-size', '32', '-j', '0', '--eed', '--exit-head', 'linear')
FLAGS += ('--epochs', '3', '--warmup-epochs', '0', '--opt', 'momentum', '--lr', '0.05', '--val-split', 'val')
TORCHRUN = ('torch.distributed.run', '--nproc_per_node', '2')
ACCELERATE = ('accelerate.commands.launch', '--multi_gpu', '--num_processes', '2')

pytestmark = pytest.mark.dist


@pytest.fixture
def folder(tmp_path):
    """46 training images (an odd number of batches), eleven to evaluate on: an odd number for two processes."""
    return write_images(tmp_path / 'images', num_train=23)


@pytest.fixture
def environment():
    """The variables of the processes: one thread each, and nothing of a launcher around this test."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(('ACCELERATE_', 'MASTER_'))}
    return {**ours, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


@pytest.fixture
def train_two(tmp_path, folder, environment):
    """Return a function that trains in two processes into out/NAME."""

    def run(name, *flags, launcher=TORCHRUN, **env):
        script = (str(ROOT / 'train.py'), *FLAGS, '--data-dir', str(folder), '--output', 'out', '--experiment', name)
        done = subprocess.run(
            [sys.executable, '-m', *launcher, *script, *flags],
            cwd=tmp_path,
            env={**environment, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count('exit  tap') == 1
        return tmp_path / 'out' / name

    return run


def read_table(run):
    with (run / 'summary.csv').open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def load(run):
    return torch.load(run / 'last.pth.tar', weights_only=False)


@pytest.mark.parametrize(
    'flags',
    [
        ('--exit-warmup-epochs', '1', '--clip-grad', '1'),
        # One process has the mean of both batches for its weights, each of two has that of its own.
        ('--exit-teacher-weights', 'skill'),
        # Parameters that take no part for a while: main alone, then the heads alone, then all.
        ('--regime', 'mixed', '--backbone-epochs', '1', '--head-warmup-epochs', '0.5', '--model-ema'),
    ],
    ids=['joint', 'skill', 'mixed'],
)
def test_two_processes_reach_what_one_with_twice_the_batch_reaches(flags, train_two, run_script, folder):
    two = train_two('two', '-b', '4', *flags)
    argv = (*FLAGS, '-b', '8', *flags, '--data-dir', folder, '--output', 'out', '--experiment', 'one')
    assert run_script(train.main, *argv)[0] == 0
    one = two.parent / 'one'
    first, second = load(one), load(two)
    skills = [state['task_state'].get('teacher_skill') for state in (first, second)]
    assert (skills[0] is not None) == ('skill' in flags)
    assert skills[0] == (skills[1] and pytest.approx(skills[1], rel=1e-3))
    start = torch.load(one / 'checkpoint-0.pth.tar', weights_only=False)['state_dict']
    assert len(first['state_dict']) > 50
    for key, tensor in first['state_dict'].items():
        torch.testing.assert_close(second['state_dict'][key], tensor, rtol=1e-3, atol=2e-5, msg=key)
    moved = [key for key in start if not torch.allclose(start[key], first['state_dict'][key], atol=1e-3)]
    assert len(moved) > 20  # the tolerance is far below what training does
    for row, other in zip(read_table(one), read_table(two), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-3)
    results = [json.loads((run / 'results.json').read_text()) for run in (one, two)]
    assert [result['num_samples'] for result in results] == [11, 11]
    assert [row['top-1'] for row in results[0]['rows']] == [row['top-1'] for row in results[1]['rows']]


def test_stopped_two_processes_go_on_where_they_were(train_two, tmp_path, folder, environment):
    flags = ('-b', '1', '--epochs', '6')  # 23 updates an epoch: every tenth is inside of one
    whole = train_two('whole', *flags)
    script = (str(ROOT / 'train.py'), *FLAGS, *flags, '--data-dir', str(folder))
    command = [sys.executable, '-m', *TORCHRUN, *script, '--output', 'out', '--experiment', 'parts']
    with (tmp_path / 'log').open('w') as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        while 'Epoch 1/6' not in (tmp_path / 'log').read_text():
            assert process.poll() is None, (tmp_path / 'log').read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # torchrun hands it to both
        assert process.wait(timeout=60) != 0
    parts = tmp_path / 'out' / 'parts'
    assert list(parts.glob('recovery-*')), (tmp_path / 'log').read_text()
    train_two('parts', *flags, '--resume', 'auto')
    first, second = load(whole), load(parts)
    assert all(torch.equal(tensor, second['state_dict'][key]) for key, tensor in first['state_dict'].items())
    assert [row['epoch'] for row in read_table(parts)] == list(range(6))
    # Sums of an epoch in parts are added in another order.
    assert read_table(whole) == [pytest.approx(row, rel=1e-5) for row in read_table(parts)]


def test_accelerate_launches_two_processes_with_batch_norms(train_two):
    flags = ('-b', '4', '--model', 'test_resnet', '--grad-accum-steps', '2', '--epochs', '1')
    run = train_two('run', *flags, launcher=ACCELERATE, ACCELERATE_USE_CPU='true')
    assert not any(key.startswith('module.') for key in load(run)['state_dict'])


def test_processes_that_are_not_started_are_told_the_command_that_works(tmp_path, folder, environment):
    script = (str(ROOT / 'train.py'), *FLAGS, '--data-dir', str(folder))
    launcher = ('accelerate.commands.launch', '--cpu', '--num_processes', '2')
    done = subprocess.run(
        [sys.executable, '-m', *launcher, *script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert 'train.py: error: accelerate launch started one of several processes' in done.stderr
    assert 'torchrun --nproc-per-node 2 -m timm_multiexit.cli.train' in done.stderr
    assert not (tmp_path / 'output').exists()
