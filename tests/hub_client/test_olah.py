"""Loading from another implementation of the Hub: Olah, as a mirror without network, serves a git repository.

Source: https://github.com/vtuber-plan/olah, written apart from huggingface_hub and from the Hub of these tests.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import timm_multiexit as tme

REPO = 'org/net'
OLAH = shutil.which('olah-cli')
CHILD = """
import sys
import timm
import torch
import timm_multiexit as tme
from huggingface_hub import hf_hub_download
repo, commit, images, result = sys.argv[1:]
torch.set_num_threads(1)
x = torch.load(images)
with torch.no_grad():
    model = tme.create_model(f'hf-hub:{repo}', pretrained=True).eval()
    pinned = tme.create_model(f'hf-hub:{repo}@{commit}', pretrained=True).eval()
    plain = timm.create_model(f'hf-hub:{repo}', pretrained=True).eval()
    outputs = {'exits': model(x, exits=True).logits, 'pinned': pinned(x, exits=True).logits, 'plain': plain(x)}
outputs['config'] = open(hf_hub_download(repo, 'config.json', revision=commit), 'rb').read()
torch.save(outputs, result)
"""

pytestmark = [
    pytest.mark.hub,
    pytest.mark.skipif(OLAH is None, reason='olah-cli is not on PATH: uv tool install olah==0.5.4'),
    pytest.mark.skipif(shutil.which('git') is None, reason='git is not on PATH'),
]


def commit_folder(folder):
    """Make a git repository of a folder and return the id of its only commit, whatever git is told elsewhere."""
    env = {**os.environ, 'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_NOSYSTEM': '1'}
    author = ('-c', 'user.name=test', '-c', 'user.email=test@localhost')
    for command in (('init', '-b', 'main'), ('add', '.'), (*author, 'commit', '-m', 'published')):
        subprocess.run(['git', *command], cwd=folder, env=env, check=True, capture_output=True)
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=folder, check=True, capture_output=True, text=True)
    return head.stdout.strip()


def wait_until_up(process, url, log):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    pytest.fail(f'Olah did not start: {log.read_text()}')


@pytest.fixture
def serve(hub, tmp_path):
    """Return a function that serves the repositories below a folder and returns the address.

    What the mirror does not have it would ask of the Hub on this machine.
    """
    processes = []

    def start(mirrors):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        netloc = hub.url.removeprefix('http://')
        basic = {'host': '127.0.0.1', 'port': port, 'repos-path': str(tmp_path / 'cached')}
        basic |= {'hf-scheme': 'http', 'hf-netloc': netloc, 'hf-lfs-netloc': netloc, 'mirrors-path': [str(mirrors)]}
        lines = [f'{key} = {json.dumps(value)}' for key, value in basic.items()]
        config, log = tmp_path / 'olah.toml', tmp_path / 'olah.log'
        config.write_text('\n'.join(['[basic]', *lines, '[accessibility]', 'offline = true', '']))
        with log.open('w') as file:
            command = [OLAH, '--config', config, '--log-path', tmp_path / 'logs']
            processes.append(subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file))
        url = f'http://127.0.0.1:{port}'
        wait_until_up(processes[-1], f'{url}/{REPO}/resolve/main/config.json', log)
        return url

    yield start
    for process in processes:
        process.terminate()
        process.wait(timeout=20)


def test_published_folder_loads_from_another_hub_with_equal_logits(make_model, serve, hub, tmp_path):
    model = make_model('test_resnet').eval()
    folder = tmp_path / 'mirrors' / 'models' / REPO
    tme.save_pretrained(model, folder)
    commit = commit_folder(folder)
    images = torch.randn(4, 3, 64, 64)
    torch.save(images, tmp_path / 'images.pt')
    env = {**os.environ, 'HF_ENDPOINT': serve(tmp_path / 'mirrors'), 'PYTHONPATH': str(Path(__file__).parents[2])}
    command = [sys.executable, '-c', CHILD, REPO, commit, tmp_path / 'images.pt', tmp_path / 'outputs.pt']
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    outputs = torch.load(tmp_path / 'outputs.pt')
    with torch.no_grad():
        expected = model(images, exits=True).logits
    assert len(expected) > 2
    for name in ('exits', 'pinned'):
        assert len(outputs[name]) == len(expected)
        assert all(torch.equal(got, want) for got, want in zip(outputs[name], expected))
    assert torch.equal(outputs['plain'], expected[-1])
    assert outputs['config'] == (folder / 'config.json').read_bytes()
    assert [entry for entry in hub.log if REPO in entry.path] == []  # all of it came from the mirror
