"""Programs come back from the Hub as they were published, or not at all."""

import json
import shutil

import numpy as np
import pytest
from helpers.exported import SIZE, make_exported, write_manifest
from helpers.runs import REPO

import timm_multiexit as tme
from timm_multiexit.deploy import runner
from timm_multiexit.deploy.fetch import fetch_export
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.runner import Runner

IMAGES = np.random.default_rng(0).normal(size=(4, *SIZE)).astype(np.float32)


def contents(folder):
    return {
        f'onnx/{path.relative_to(folder).as_posix()}': path.read_bytes() for path in folder.rglob('*') if path.is_file()
    }


@pytest.fixture
def exported(tmp_path):
    folder = make_exported(tmp_path / 'exported')
    (folder / 'runner.py').write_text('raise SystemExit("of the repository")')
    write_manifest(folder, json.loads((folder / 'manifest.json').read_text()))
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / 'target'


def test_programs_come_back_with_the_runner_of_the_package(hub, exported, target):
    commit = hub.add(REPO, contents(exported) | {'onnx/model.onnx': b'of somebody', 'config.json': b'{}'})
    assert fetch_export(REPO, target) == commit
    found = {path for path in contents(target)}
    assert found == {*contents(exported)}
    with open(runner.__file__, 'rb') as file:
        assert (target / 'runner.py').read_bytes() == file.read()
    read_manifest(target)
    for one, other in zip(Runner(target).anytime(IMAGES), Runner(exported).anytime(IMAGES)):
        np.testing.assert_array_equal(one[1], other[1])
    asked = {entry.path for entry in hub.log if 'onnx/' in entry.path}
    assert not any(path.endswith(('model.onnx', 'runner.py')) for path in asked)
    with hub.unreachable():  # from the cache, into a folder that is replaced
        assert fetch_export(REPO, target) == commit


def test_all_files_are_of_one_commit(hub, exported, target):
    first = hub.add(REPO, contents(exported))
    hub.add(REPO, {path: b'{}' for path in contents(exported)})
    assert fetch_export(REPO, target, revision=first) == first
    with pytest.raises(tme.MultiExitError, match=r"The programs of 'org/net' cannot be used: .*manifest\.json"):
        fetch_export(REPO, target)
    Runner(target)  # the folder is as it was


def with_file(name, content):
    def change(files):
        files[f'onnx/{name}'] = content

    return change


def with_manifest(edit):
    def change(files):
        manifest = json.loads(files['onnx/manifest.json'])
        edit(manifest)
        files['onnx/manifest.json'] = json.dumps(manifest).encode()

    return change


ENTRY = {'size': 3, 'sha256': 'a' * 64}

WRONG = {
    'changed program': (with_file('stages/main.onnx', b'abc'), r'main\.onnx must have \d+ bytes, got 3'),
    'other checksum': (
        with_manifest(lambda manifest: manifest['files']['stages/main.onnx'].update(sha256='a' * 64)),
        r'main\.onnx has changed',
    ),
    'unknown key': (with_manifest(lambda manifest: manifest.update(more=1)), "unknown key 'more'"),
    'path out of it': (
        with_manifest(lambda manifest: manifest['files'].update({'../../x.onnx': ENTRY})),
        'a file must',
    ),
    'pickle': (with_manifest(lambda manifest: manifest['files'].update({'fixed/x.bin': ENTRY})), 'ONNX alone.*x.bin'),
    'script': (with_manifest(lambda manifest: manifest['files'].update({'setup.py': ENTRY})), 'ONNX alone.*setup.py'),
    'file that is not there': (
        with_manifest(lambda manifest: manifest['files'].update({'more.onnx': ENTRY})),
        r'onnx/more\.onnx',
    ),
    'no manifest': (lambda files: files.pop('onnx/manifest.json'), r'onnx/manifest\.json'),
    'not a manifest': (with_file('manifest.json', b'[1]'), 'it must be an object'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_is_not_as_published_is_one_line_and_leaves_nothing(name, hub, exported, target):
    change, line = WRONG[name]
    files = contents(exported)
    change(files)
    hub.add(REPO, files)
    with pytest.raises(tme.MultiExitError, match=line) as caught:
        fetch_export(REPO, target)
    assert '\n' not in str(caught.value)
    assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ['exported']


def test_folder_of_others_is_not_replaced(hub, exported, target):
    hub.add(REPO, contents(exported))
    target.mkdir()
    (target / 'letter.txt').write_text('dear')
    with pytest.raises(tme.MultiExitError, match='holds other files'):
        fetch_export(REPO, target)
    assert [path.name for path in target.iterdir()] == ['letter.txt']
    shutil.rmtree(target)
    with pytest.raises(TypeError, match='folder must be a path'):
        fetch_export(REPO, None)
