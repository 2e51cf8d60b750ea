"""Two processes on this machine, over gloo."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FLAGS = ('--model', 'test_resnet', '--img-size', '32', '-j', '0', '--epochs', '1', '--eed', '--experiment', 'run')


def launch(tmp_path, *argv, **env):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **env}
    command = [sys.executable, '-m', *argv]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.dist
def test_two_processes_train_one_network_and_count_every_sample_once(tmp_path, image_folder):
    script = (str(ROOT / 'train.py'), *FLAGS, '-b', '4', '--data-dir', str(image_folder))
    done = launch(
        tmp_path,
        'accelerate.commands.launch',
        '--multi_gpu',
        '--num_processes',
        '2',
        *script,
        ACCELERATE_USE_CPU='true',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / 'output/train/run'
    # eleven images on two processes: one sampler pads to twelve, the evaluation does not count the copy
    assert json.loads((run / 'results.json').read_text())['num_samples'] == 11
    with open(run / 'summary.csv') as file:
        assert len(list(csv.DictReader(file))) == 1
    state = torch.load(run / 'last.pth.tar', weights_only=False)['state_dict']
    assert not any(key.startswith('module.') for key in state)
    assert done.stdout.count('exit  tap') == 1


@pytest.mark.dist
def test_processes_that_do_not_find_each_other_are_told_the_command_that_works(tmp_path, image_folder):
    # accelerate launch --cpu with two processes starts one; torchrun without a GPU starts two that are alone
    done = launch(
        tmp_path,
        'torch.distributed.run',
        '--nproc_per_node',
        '2',
        str(ROOT / 'train.py'),
        *FLAGS,
        '--data-dir',
        str(image_folder),
    )
    if torch.cuda.device_count() > 1:
        pytest.skip('torchrun works where there are several GPUs')
    assert done.returncode != 0
    assert 'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2' in done.stderr
    assert not (tmp_path / 'output').exists()
