"""What a user installs: contents and metadata of wheel and sdist, and types that a checker sees."""

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from timm_multiexit.version import __version__

ROOT = Path(__file__).parents[2]

STRAY = (
    'data/train/cat/1.png',
    'my/images/train/dog/1.png',
    'output/train/run/best/model.safetensors',
    'hub/mine/weights.bin',
    'notes.txt',
    'notebook.ipynb',
    'tests/photo.jpg',
    'timm_multiexit/weights.pth',
)


def run(*words, cwd):
    result = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def tracked():
    names = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT).splitlines()
    return {name for name in names if (ROOT / name).is_file()}


@pytest.fixture(scope='module')
def built(tracked, tmp_path_factory):
    """Wheel and sdist, built in a clone in which a user has worked."""
    clone, dist = tmp_path_factory.mktemp('clone'), tmp_path_factory.mktemp('dist')
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    run('git', 'init', '-q', cwd=clone)
    run('git', 'add', '.', cwd=clone)
    for name in STRAY:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(b'of a user')
    run('uv', 'build', '--out-dir', dist, clone, cwd=dist)
    return next(dist.glob('*.whl')), next(dist.glob('*.tar.gz'))


@pytest.mark.slow
def test_sdist_holds_tracked_files_alone(built, tracked):
    with tarfile.open(built[1]) as archive:
        names = {name.split('/', 1)[1] for name in archive.getnames()}
    assert names - {'PKG-INFO'} <= tracked
    assert not names & set(STRAY)
    assert tracked - names == set()


@pytest.mark.slow
def test_wheel_holds_the_package_alone(built, tracked):
    with zipfile.ZipFile(built[0]) as archive:
        names = {name for name in archive.namelist() if not name.split('/')[0].endswith('.dist-info')}
    assert names == {name for name in tracked if name.startswith('timm_multiexit/')}
    assert 'timm_multiexit/py.typed' in names


@pytest.mark.slow
def test_metadata_name_command_extras_and_version(built):
    with zipfile.ZipFile(built[0]) as archive:
        folder = f'timm_multiexit-{__version__}.dist-info'
        metadata = email.message_from_bytes(archive.read(f'{folder}/METADATA'))
        commands = archive.read(f'{folder}/entry_points.txt').decode().split('\n')
    assert (metadata['Name'], metadata['Version']) == ('timm-multiexit', __version__)
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert {'digits', 'onnx', 'plots', 'tensorboard', 'wandb'} <= set(metadata.get_all('Provides-Extra'))
    assert 'timm-multiexit = timm_multiexit.__main__:main' in commands


@pytest.mark.slow
def test_types_of_the_public_names_reach_a_users_checker(tmp_path):
    (tmp_path / 'user.py').write_text(
        'import timm_multiexit as tme\n'
        'model = tme.create_model(3)\n'
        'outputs: str = tme.ExitOutputs((), ())\n'
        "other = tme.create_model('resnet18', exits='auto')\n"
    )
    words = [sys.executable, '-m', 'mypy', '--cache-dir', tmp_path / 'cache', 'user.py']
    result = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    errors = [line for line in result.stdout.splitlines() if ': error: ' in line]
    assert [line.split(':')[:2] for line in errors] == [['user.py', '2'], ['user.py', '3']], result.stdout
