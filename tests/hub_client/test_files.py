"""Which files may go to the Hub or come from it, and which of them a push deletes."""

import os
import re

import pytest
from helpers.hub import CARD, PLOT, REPO, WEIGHTS, refused, sent, tree, visible, write

from timm_multiexit.hub_client.client import check_push, fetch_files, plan_push, push_folder
from timm_multiexit.hub_client.files import OWNED_FILES

pytestmark = pytest.mark.usefixtures('secret')


def test_what_a_publication_wrote_is_deleted_and_all_else_stays(hub, folder):
    write(folder, {'args.yaml': b'lr: 1'})
    push_folder(folder, REPO)
    theirs = {
        'LICENSE': b'mine',
        'assets/logo.png': b'logo',
        'assets/accuracy_vs_macs.svg': b'svg',
        'old.onnx': b'onnx',
    }
    theirs |= {
        'examples/run.py': b'by hand',
        'notes/README.md': b'text',
        'assets/config.json': b'{}',
        'results.json': b'',
    }
    hub.add(REPO, theirs)
    for path in ('args.yaml', PLOT, 'notes/recipe.txt', 'README.md'):
        (folder / path).unlink()
    plan = plan_push(folder, REPO)
    deleted = {path for path, action in plan.actions.items() if action == 'delete'}
    assert deleted == {'args.yaml', PLOT, 'README.md'}
    assert not plan.actions.keys() & theirs.keys()
    push_folder(folder, REPO)
    assert tree(hub) == {**visible(folder), **theirs, 'notes/recipe.txt': b'of mine'}


def test_every_file_of_a_publication_is_owned(hub, folder):
    owned = {path.replace('*', 'exit_0') for path in OWNED_FILES}
    theirs = {'onnx/model.onnx': b'', 'onnx/fixed/notes.txt': b'', 'onnx/int8/model.onnx': b''}
    hub.add(REPO, theirs | {'metrics.json': b'', 'exits.safetensors': b''})
    write(folder, dict.fromkeys(owned, b'{}') | {'README.md': CARD})
    push_folder(folder, REPO)
    assert owned | {*theirs} < set(tree(hub))
    marks = {'metrics.json', 'exits.safetensors'}
    for path in owned - marks:
        (folder / path).unlink()
    assert {path for path, action in plan_push(folder, REPO).actions.items() if action == 'delete'} == owned - marks
    push_folder(folder, REPO)
    assert set(tree(hub)) == {*marks, *theirs, 'notes/recipe.txt'}


THEIRS = {
    'model': (
        {'config.json': b'{}', WEIGHTS: b'theirs', 'README.md': CARD},
        'config.json, model.safetensors',
    ),
    'metrics': ({'metrics.json': b'{}', 'a.onnx': b'', 'b/c.txt': b'', 'd': b''}, 'a.onnx, b/c.txt, d and 1 more'),
}


@pytest.mark.parametrize(('files', 'names'), THEIRS.values(), ids=THEIRS)
def test_repository_of_something_else_is_refused_before_anything_is_sent(hub, folder, files, names):
    hub.add(REPO, files)
    before = tree(hub)
    expected = (
        f"'org/net' holds {names}, not a model published by timm_multiexit, so nothing was pushed: choose another name,"
        ' or empty it first.'
    )
    calls = (lambda: push_folder(folder, REPO), lambda: plan_push(folder, REPO), lambda: check_push(REPO))
    assert [refused(call) for call in calls] == [expected] * 3
    assert sent(hub) == []
    assert tree(hub) == before


def test_repository_as_the_website_makes_it_is_taken(hub, folder):
    hub.add(REPO, {'README.md': b'---\nlicense: mit\n---\n', 'LICENSE': b'MIT', '.gitattributes': b''})
    push_folder(folder, REPO)
    assert tree(hub)['LICENSE'] == b'MIT'
    assert tree(hub)['README.md'] == visible(folder)['README.md']


def test_repository_with_hidden_files_alone_is_empty(hub, folder):
    hub.add(REPO, {'.gitignore': b'*.pyc'})
    push_folder(folder, REPO)
    assert tree(hub) == {**visible(folder), '.gitignore': b'*.pyc'}


@pytest.mark.parametrize('name', ['metrics.json', 'exits.safetensors'])
def test_folder_that_is_no_publication_is_refused(hub, folder, name):
    (folder / name).unlink()
    for function in (push_folder, plan_push):
        expected = f'{folder} has no {name}: give a folder that a publication was written to.'
        assert refused(function, folder, REPO) == expected
    assert hub.log == []


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('model.bin', 'can contain code'),
        ('checkpoint-3.pth.TAR', 'can contain code'),
        ('assets/x.pkl', 'can contain code'),
        ('a b.txt', 'File name must be'),
        ('assets/\u00e9.png', 'File name must be'),
        ('link.txt', 'links to a file outside of'),
        ('assets/link', 'links to a file outside of'),
        ('notes/within', 'links to a file outside of .* or to no file'),
        ('hidden-pickle.json', 'can contain code'),
        ('broken.json', 'to no file'),
        ('circle.json', 'Symlink loop|to no file|symbolic links'),
    ],
)
def test_file_that_may_not_go_stops_the_push_before_any_request(hub, folder, tmp_path, path, expected):
    write(tmp_path, {'outside/key.txt': b'private', 'run/.state/x.pkl': b''})
    links = {'link.txt': '../outside/key.txt', 'assets/link': '../../outside', 'notes/within': '../assets'}
    links |= {'broken.json': 'nowhere', 'circle.json': 'circle.json', 'hidden-pickle.json': '.state/x.pkl'}
    if path in links:
        (folder / path).symlink_to(links[path])
    else:
        write(folder, {path: b'x'})
    for function in (push_folder, plan_push):
        assert re.search(expected, refused(function, folder, REPO))
    assert hub.log == []


def test_link_to_a_file_of_the_folder_goes_as_the_file(hub, folder):
    (folder / 'LICENSE').symlink_to('notes/recipe.txt')
    push_folder(folder, REPO)
    assert tree(hub)['LICENSE'] == b'of mine'


def test_folder_without_files_is_refused(hub, folder, tmp_path):
    (tmp_path / 'empty/.git').mkdir(parents=True)
    assert 'has no files to push' in refused(plan_push, tmp_path / 'empty', REPO)
    assert 'is not a folder' in refused(plan_push, folder / 'README.md', REPO)
    if os.geteuid():  # root reads everything
        (folder / 'notes').chmod(0)
        assert 'Cannot read' in refused(plan_push, folder, REPO)


@pytest.mark.parametrize(
    'name',
    [
        'pytorch_model.bin',
        'a.PT',
        'x.ckpt',
        'w.npz',
        '../x.json',
        '/etc/passwd',
        'a//b',
        '/b',
        'a/',
        'a/../b',
        'a/.b',
        'a/b.bin',
        '',
        '.x',
    ],
)
def test_file_that_may_not_come_is_refused_before_any_request(hub, name):
    refused(fetch_files, REPO, ['config.json', name])
    assert hub.log == []
