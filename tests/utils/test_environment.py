"""What measurements are stamped with."""

import platform
import subprocess
from types import SimpleNamespace

import pytest
import torch

from timm_multiexit.utils.environment import _cpu_name, _find_commit, describe_environment
from timm_multiexit.version import __version__


def test_commit_is_that_of_the_file_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    for name in ('ours', 'installed'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'module.py').write_text('')
        assert _find_commit.__wrapped__(tmp_path / name / 'module.py') == 'unknown'
        who = ('-c', 'user.name=a', '-c', 'user.email=a@b')
        for words in (('init', '-q'), (*who, 'commit', '-q', '--allow-empty', '-m', 'first')):
            subprocess.run(('git', '-C', str(tmp_path / name), *words), check=True)
    # Of the second, the file is in somebody's folder and not in his repository.
    assert _find_commit.__wrapped__(tmp_path / 'installed/module.py') == 'unknown'
    for words in (('add', '.'), (*who, 'commit', '-q', '-m', 'second')):
        subprocess.run(('git', '-C', str(tmp_path / 'ours'), *words), check=True)
    head = next((tmp_path / 'ours/.git/refs/heads').iterdir()).read_text()
    assert _find_commit.__wrapped__(tmp_path / 'ours/module.py') == head[:12]
    (tmp_path / 'ours/module.py').write_text('changed')
    assert _find_commit.__wrapped__(tmp_path / 'ours/module.py') == f'{head[:12]}-dirty'


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv('PATH', '')
    _find_commit.cache_clear()
    assert describe_environment()['commit'] == 'unknown'
    _find_commit.cache_clear()


def test_environment_names_every_library_that_results_hang_on():
    words = [item.split()[0] for item in describe_environment()['versions'].split(', ')]
    libraries = ['timm', 'torch', 'torchvision', 'accelerate', 'safetensors', 'huggingface_hub']
    assert words == ['python', 'timm_multiexit', *libraries]
    assert f'timm_multiexit {__version__},' in describe_environment()['versions']


def test_environment_names_the_threads_that_torch_uses():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert describe_environment()['threads'] == '3 torch threads'
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ('module', 'name'),
    [(SimpleNamespace(get_device_name=lambda: 'Maker GPU 7'), 'Maker GPU 7'), (SimpleNamespace(), 'mps')],
    ids=['name', 'kind'],
)
def test_any_accelerator_is_named_with_its_number(module, name, monkeypatch):
    accelerator = torch.accelerator
    monkeypatch.setattr(accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(accelerator, 'device_count', lambda: 2)
    monkeypatch.setattr(accelerator, 'current_accelerator', lambda: torch.device('mps'))
    monkeypatch.setattr(torch, 'get_device_module', lambda device: module)
    assert describe_environment()['hardware'].startswith(f'2 x {name}, ')


def test_cpu_is_named_by_its_model_where_the_system_tells_it(tmp_path):
    (tmp_path / 'x86').write_text(
        'processor\t: 0\nmodel\t\t: 85\nmodel name\t: Maker: Model 7\n\nmodel name\t: Other\n'
    )
    (tmp_path / 'arm').write_text('processor\t: 0\nBogoMIPS\t: 50.00\n')
    assert _cpu_name(tmp_path / 'x86') == 'Maker: Model 7'
    assert _cpu_name(tmp_path / 'arm') == platform.machine()
    assert _cpu_name(tmp_path / 'none') == platform.machine()
