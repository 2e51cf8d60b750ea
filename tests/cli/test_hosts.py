"""Two machines, as Linux can make them of one: network namespaces, joined by a virtual cable, of which one is lost."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import write_images

from timm_multiexit.cli import train

ROOT = Path(__file__).parents[2]
# Layer norms only, so that two halves of a batch give the whole's gradient; crops, flips and colours stay on.
FLAGS = ('--model', 'test_vit', '--img-size', '32', '-j', '0', '--eed', '--exit-head', 'linear', '--exits', '2')
FLAGS += ('--epochs', '3', '--warmup-epochs', '0', '--opt', 'momentum', '--lr', '0.05', '--val-split', 'val')
FLAGS += ('--recovery-interval', '1', '--output', 'out')
ADDRESSES = ('10.213.77.1', '10.213.77.2')

pytestmark = pytest.mark.dist


def ip(*words):
    subprocess.run(['ip', *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces that reach each other by `ADDRESSES` over interfaces of the same names."""
    if os.name != 'posix' or os.geteuid() or not shutil.which('ip'):
        pytest.skip('needs root and iproute2 to make two machines of this one')
    names = [f'tme{os.getpid() % 10000}{side}' for side in 'ab']  # interfaces have up to 15 characters
    try:
        try:
            for name in names:
                ip('netns', 'add', name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f'this system makes no network namespaces: {error.stderr.strip()}')
        first, second = names
        ip('link', 'add', first, 'netns', first, 'type', 'veth', 'peer', 'name', second, 'netns', second)
        for name, address in zip(names, ADDRESSES):
            ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', name)
            for device in (name, 'lo'):
                ip('-n', name, 'link', 'set', device, 'up')
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


@pytest.fixture
def start(hosts, tmp_path):
    """Return a function that starts train.py on both machines, one process each, and returns their torchruns."""
    started = []

    def run(*flags):
        ours = {key: value for key, value in os.environ.items() if not key.startswith(('ACCELERATE_', 'MASTER_'))}
        for host, address in zip(hosts, ADDRESSES):
            command = ['ip', 'netns', 'exec', host, sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2']
            command += ['--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-id', 'test']
            command += ['--rdzv-endpoint', f'{ADDRESSES[0]}:29400', '--local-addr', address]
            # By its name torchrun cannot tell which of the two it is on.
            command += ['--rdzv-conf', f'is_host={int(address == ADDRESSES[0])}']
            environment = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'GLOO_SOCKET_IFNAME': host}
            with (tmp_path / f'{len(started)}.log').open('w') as log:
                started.append(
                    subprocess.Popen(
                        [*command, str(ROOT / 'train.py'), *FLAGS, '-b', '4', *flags],
                        cwd=tmp_path,
                        env={**ours, **environment},
                        stdout=log,
                        stderr=log,
                    )
                )
        return started[-2:]

    yield run
    for process in started:
        lose(process)


def lose(process):
    """Kill a torchrun and all that it started, at once and without a word, as a loss of power does."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def read_logs(folder):
    return '\n'.join(path.read_text()[-3000:] for path in sorted(folder.glob('*.log')))


def test_run_of_two_machines_goes_on_after_one_was_lost(start, run_script, tmp_path):
    images = write_images(tmp_path / 'images', num_train=23)
    run = tmp_path / 'out' / 'two'
    flags = ('--data-dir', str(images), '--experiment', 'two')
    first, second = start(*flags)
    while not list(run.glob('checkpoint-0.*')):  # one of three epochs
        assert first.poll() is None, read_logs(tmp_path)
        time.sleep(0.05)
    lose(second)
    assert first.wait(timeout=120) != 0  # its machine does not wait for the lost one for ever
    assert not (run / 'results.json').exists()
    again = start(*flags, '--resume', 'auto')
    assert [process.wait(timeout=300) for process in again] == [0, 0], read_logs(tmp_path)
    assert 'Resuming from' in (tmp_path / '2.log').read_text() + (tmp_path / '3.log').read_text()
    argv = (*FLAGS, '-b', '8', *flags[:3], 'one')
    assert run_script(train.main, *argv)[0] == 0
    one = tmp_path / 'out' / 'one'
    states = [torch.load(path / 'last.pth.tar', weights_only=False)['state_dict'] for path in (one, run)]
    assert len(states[0]) > 50
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=0, atol=1e-5, msg=key)
    tables = [list(csv.DictReader((path / 'summary.csv').open())) for path in (one, run)]
    assert len(tables[0]) == len(tables[1]) == 3
    assert all(row[key] == other[key] for row, other in zip(*tables) for key in row if 'top' in key)
    results = [json.loads((path / 'results.json').read_text()) for path in (one, run)]
    assert [result['num_samples'] for result in results] == [11, 11]
    assert [row['top-1'] for row in results[0]['rows']] == [row['top-1'] for row in results[1]['rows']]
