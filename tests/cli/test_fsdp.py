"""train.py under `accelerate launch --use_fsdp --fsdp_version 2`, two processes on this machine, over gloo."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import write_images

import timm_multiexit as tme
from timm_multiexit.cli import train

ROOT = Path(__file__).parents[2]
# Layer norms only, so that two halves of a batch give the whole's gradient; crops, flips and colours stay on.
FLAGS = ('--model', 'test_vit', '--img-size', '32', '-j', '0', '--eed', '--exit-head', 'linear', '--exits', '2')
FLAGS += (
    '--epochs',
    '2',
    '--warmup-epochs',
    '0',
    '--opt',
    'momentum',
    '--lr',
    '0.05',
    '--model-ema',
    '--clip-grad',
    '1',
)
FLAGS += ('--model-ema-decay', '0.8', '--val-split', 'val', '--output', 'out')
LAUNCH = ('accelerate.commands.launch', '--quiet', '--use_fsdp', '--fsdp_version', '2', '--num_processes', '2')
WRAP = ('--fsdp_auto_wrap_policy', 'TRANSFORMER_BASED_WRAP', '--fsdp_transformer_layer_cls_to_wrap')

pytestmark = pytest.mark.dist


@pytest.fixture
def folder(tmp_path):
    """46 training images, an odd number of batches, and eleven to evaluate on, an odd number for two processes."""
    return write_images(tmp_path / 'images', num_train=23)


@pytest.fixture
def launch(tmp_path, folder):
    """Return a function that trains in two processes into out/NAME, and returns what they printed."""

    def run(name, *flags, wrap='Block,ExitHead'):
        ours = {key: value for key, value in os.environ.items() if not key.startswith(('ACCELERATE_', 'MASTER_'))}
        script = (str(ROOT / 'train.py'), *FLAGS, '-b', '4', '--data-dir', str(folder), '--experiment', name)
        done = subprocess.run(
            [sys.executable, '-m', *LAUNCH, *WRAP, wrap, *script, *flags],
            cwd=tmp_path,
            env={**ours, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'ACCELERATE_USE_CPU': 'true'},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def train_one(run_script, folder):
    """Return a function that trains in this process, on batches twice as large, into out/NAME."""

    def run(name, *flags):
        argv = (*FLAGS, '-b', '8', '--data-dir', folder, '--experiment', name, *flags)
        assert run_script(train.main, *argv)[0] == 0
        return Path('out', name).absolute()

    return run


def load(run, name='last'):
    return torch.load(run / f'{name}.pth.tar', weights_only=False)


def assert_same_runs(run, expected):
    """Weights, their average, optimizer, table, `best/` and results of the runs are the same."""
    actual, reference = load(run), load(expected)
    assert len(reference['state_dict']) > 50
    for key in ('state_dict', 'state_dict_ema'):
        assert list(actual[key]) == list(reference[key])
        for name, tensor in reference[key].items():
            assert type(actual[key][name]) is type(tensor)
            torch.testing.assert_close(actual[key][name], tensor, rtol=0, atol=1e-5, msg=name)
    states = [checkpoint['optimizer']['state'] for checkpoint in (actual, reference)]
    assert states[0].keys() == states[1].keys()
    for idx, state in states[1].items():
        torch.testing.assert_close(states[0][idx]['momentum_buffer'], state['momentum_buffer'], rtol=0, atol=1e-5)
    tables = [list(csv.DictReader((path / 'summary.csv').open())) for path in (run, expected)]
    assert len(tables[0]) == len(tables[1]) == 2
    for row, other in zip(*tables):
        assert {key for key in row if row[key] != other[key] and 'top' in key} == set()  # counts are exact
        assert float(row['train_loss']) == pytest.approx(float(other['train_loss']), abs=1e-5)
    results = [json.loads((path / 'results.json').read_text()) for path in (run, expected)]
    assert [result['num_samples'] for result in results] == [11, 11]
    assert [row['top-1'] for row in results[0]['rows']] == [row['top-1'] for row in results[1]['rows']]
    best, other = (tme.create_model(f'local-dir:{path / "best"}', pretrained=True) for path in (run, expected))
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(best.state_dict()[name], tensor, rtol=0, atol=1e-5)


def test_two_processes_and_one_take_turns_to_what_one_comes_to(launch, train_one, tmp_path):
    whole = train_one('whole')
    start = load(whole, 'checkpoint-0')['state_dict']
    moved = [key for key, tensor in load(whole)['state_dict'].items() if (tensor - start[key]).abs().max() > 1e-4]
    assert len(moved) > 20  # the tolerance is far below what an epoch does
    done = launch('two-one', '--stop-epoch', '1')
    assert done.stdout.count('exit  tap') == 1
    assert 'returned a view' not in done.stderr
    assert_same_runs(train_one('two-one', '--resume', 'auto'), whole)
    run = train_one('one-two', '--stop-epoch', '1')
    launch('one-two', '--resume', 'auto')
    assert_same_runs(run, whole)


def test_parts_that_train_by_turns_accumulated_batches_and_batch_norms(launch, tmp_path):
    flags = ('--model', 'test_resnet', '--regime', 'mixed', '--backbone-epochs', '1', '--head-warmup-epochs', '0.5')
    flags += ('--grad-accum-steps', '2', '--recovery-interval', '1', '--exit-head', 'conv')
    launch('run', *flags, wrap='BasicBlock,ExitHead')
    first, last = (load(tmp_path / 'out' / 'run', name)['state_dict'] for name in ('checkpoint-0', 'last'))
    heads = [key for key in first if key.startswith('exits.') and key.endswith('weight')]
    moved = {key for key in last if not torch.equal(first[key], last[key])}
    assert len(heads) >= 6
    assert moved >= set(heads)  # in the second epoch
    assert all(torch.isfinite(tensor).all() for tensor in last.values())
