"""Publishing to and loading from the Hub, with the real client against a server on this machine."""

import hashlib
import inspect
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import hub_server.reading
import hub_server.server
import pytest
from hub_server.messages import Refusal, Response, answer
from huggingface_hub import CommitInfo, HfApi, hf_hub_download

from timm_multiexit.hub_client.client import PushPlan, check_push, fetch_files, full_name, plan_push, push_folder
from timm_multiexit.hub_client.files import OWNED_FILES, Change
from timm_multiexit.utils.errors import MultiExitError

REPO = 'org/net'
CARD = b'---\nlicense: apache-2.0\n---\n# Net\n'
SECRET = 'hf_theSecretOfAllTests'
WEIGHTS = 'model.safetensors'
PLOT = 'assets/accuracy_vs_macs.png'


@pytest.fixture(autouse=True)
def secret(hub, monkeypatch, caplog):
    """The token that the server takes; no record of any library may have it, at any level."""
    monkeypatch.setattr(hub, 'token', SECRET)
    monkeypatch.setenv('HF_TOKEN', SECRET)
    monkeypatch.setattr(logging.getLogger('huggingface_hub'), 'propagate', True)
    caplog.set_level(logging.DEBUG)
    for name in ('huggingface_hub', 'timm_multiexit', 'httpx', 'httpx2', 'httpcore', 'httpcore2'):
        caplog.set_level(logging.DEBUG, logger=name)
    yield SECRET
    records = caplog.get_records('call')
    assert not [record for record in records if SECRET in f'{record.getMessage()} {record.exc_info}']


@pytest.fixture
def folder(tmp_path):
    """A publication: small files and weights that go by LFS, one in a folder, and what must not go."""
    contents = {'README.md': CARD, 'config.json': b'{"a": 1}', 'metrics.json': b'{}', PLOT: b'\x89PNG'}
    contents |= {WEIGHTS: noise(300_000), 'exits.safetensors': noise(5_000, b'exits'), 'notes/recipe.txt': b'of mine'}
    return write(tmp_path / 'run', {**contents, '.cache/state': b'hidden', '.token': SECRET.encode()})


def noise(size, seed=b''):
    """Bytes that no compression makes smaller."""
    return b''.join(hashlib.sha256(seed + b'%d' % idx).digest() for idx in range(size // 32 + 1))[:size]


def write(folder, contents):
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def tree(hub, revision='main', repo_id=REPO):
    """What the server has at a revision, as path -> bytes, without the file that it made itself."""
    files = hub.repositories[repo_id].find(revision).files
    return {path: hub.content(file) for path, file in files.items() if path != '.gitattributes'}


def visible(folder):
    paths = (path for path in folder.rglob('*') if path.is_file())
    return {name: path.read_bytes() for path in paths if '/.' not in '/' + (name := str(path.relative_to(folder)))}


def sent(hub, pattern=''):
    """The requests that change something, among them those whose path has the pattern."""
    writes = [entry for entry in hub.log if entry.method not in ('GET', 'HEAD') and 'validate-yaml' not in entry.path]
    return [entry for entry in writes if re.search(pattern, entry.path)]


def refused(function, *args, **kwargs):
    """The line of the error that a call ends with; nothing on the way to it has the token."""
    with pytest.raises(MultiExitError) as caught:
        function(*args, **kwargs)
    error, line = caught.value, str(caught.value)
    while error is not None:
        assert SECRET not in f'{error} {error!r}'
        error = error.__cause__ or error.__context__
    assert '\n' not in line
    assert line.endswith('.')
    return line


def test_every_revision_gives_the_published_files(hub, folder):
    result = push_folder(folder, REPO, tag='v1', message='First')
    assert tree(hub) == visible(folder)
    assert set(visible(folder)) == {*tree(hub)} - {'.token', '.cache/state'}
    assert result == (REPO, hub.repositories[REPO].branches['main'], f'{hub.url}/{REPO}/tree/{result.commit}', True)
    assert hub.repositories[REPO].commits[result.commit].title == 'First'
    write(folder, {'config.json': b'{"a": 2}'})
    later = push_folder(folder, REPO)
    for revision, commit in ((None, later), ('main', later), ('v1', result), (result.commit, result)):
        snapshot = fetch_files(REPO, ['config.json', WEIGHTS], revision=revision)
        assert (snapshot.commit, snapshot.folder.name) == (commit.commit, commit.commit)
        assert (snapshot.folder / WEIGHTS).read_bytes() == noise(300_000)
        assert (snapshot.folder / 'config.json').read_bytes() == tree(hub, commit.commit)['config.json']
    assert later.commit != result.commit


def test_server_hears_which_library_asks(hub, folder, caplog):
    push_folder(folder, REPO)
    fetch_files(REPO, ['config.json'])
    assert all(
        entry.headers['user-agent'].startswith('timm_multiexit/0.1.0') for entry in hub.log if '_lfs' not in entry.path
    )
    # What the check for the token looks through has the clients' own records.
    assert {'huggingface_hub', 'httpcore2', 'httpcore'} & {record.name.split('.')[0] for record in caplog.records}


def test_files_are_of_one_commit_though_the_branch_moves_between_them(hub, tmp_path):
    first = hub.add(REPO, {'config.json': b'old', WEIGHTS: b'old weights'})

    def push_meanwhile(method, path):
        if path.endswith(WEIGHTS) and len(hub.repositories[REPO].commits) == 2:
            hub.add(REPO, {'config.json': b'new', WEIGHTS: b'new weights'})

    hub.on_request = push_meanwhile
    snapshot = fetch_files(REPO, ['config.json', WEIGHTS], revision='main', cache_dir=tmp_path / 'cache')
    assert snapshot.commit == first
    assert snapshot.folder.is_relative_to(tmp_path / 'cache')
    assert [(snapshot.folder / name).read_bytes() for name in ('config.json', WEIGHTS)] == [b'old', b'old weights']
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == b'new weights'  # unpinned, it would be the new one


def test_unchanged_folder_is_no_commit_and_sends_nothing(hub, folder):
    first = push_folder(folder, REPO)
    hub.log.clear()
    again = push_folder(folder, REPO)
    assert again == first._replace(has_changed=False)
    assert sent(hub) == []
    assert len(hub.log) == 1


def test_one_changed_file_is_one_commit_that_sends_it_alone(hub, folder):
    first = push_folder(folder, REPO)
    write(folder, {'exits.safetensors': noise(6_000, b'better')})
    hub.log.clear()
    second = push_folder(folder, REPO)
    commits = hub.repositories[REPO].commits
    assert commits[second.commit].parent == first.commit
    assert len(commits) == 3  # with the server's own
    assert tree(hub) == visible(folder)
    assert [entry.size for entry in sent(hub, '/_lfs/[0-9a-f]+$')] == [6_000]
    assert sum(entry.size for entry in sent(hub)) < 10_000


def test_plan_says_what_the_push_will_do_and_changes_nothing(hub, folder):
    plan = plan_push(folder, REPO)
    files = tuple(Change(path, 'add', len(content)) for path, content in sorted(visible(folder).items()))
    assert plan == PushPlan(REPO, hub.url, False, None, files)
    commit = push_folder(folder, REPO).commit
    assert {change.action for change in plan_push(folder, REPO).changes} == {'keep'}
    (folder / PLOT).unlink()
    # Of the same sizes, one of each kind that the server tells by a hash of its own.
    write(folder, {'config.json': b'{"a": 3}', WEIGHTS: noise(300_000, b'other'), 'args.yaml': b'lr: 1'})
    hub.log.clear()
    plan = plan_push(folder, REPO)
    assert sent(hub) == []
    assert (plan.exists, plan.parent) == (True, commit)
    actions = {'args.yaml': 'add', 'config.json': 'update', WEIGHTS: 'update', PLOT: 'delete'}
    keys = sorted({*visible(folder), PLOT})
    assert [change[:2] for change in plan.changes] == [(path, actions.get(path, 'keep')) for path in keys]
    assert {change.path: change.size for change in plan.changes}[PLOT] == 4


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
    assert {path for path, action, _ in plan.changes if action == 'delete'} == {'args.yaml', PLOT, 'README.md'}
    assert not {change.path for change in plan.changes} & theirs.keys()
    push_folder(folder, REPO)
    assert tree(hub) == {**visible(folder), **theirs, 'notes/recipe.txt': b'of mine'}


def test_every_file_of_a_publication_is_owned(hub, folder):
    write(folder, dict.fromkeys(OWNED_FILES, b'{}') | {'README.md': CARD})
    push_folder(folder, REPO)
    marks = {'metrics.json', 'exits.safetensors'}
    for path in {*OWNED_FILES} - marks:
        (folder / path).unlink()
    push_folder(folder, REPO)
    assert set(tree(hub)) == {*marks, 'notes/recipe.txt'}


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
        f"'org/net' holds {names} and no model that timm_multiexit published, so nothing is pushed to it: choose another"
        ' name, or empty it first.'
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
        expected = f'{folder} has no {name}: give one that a publication was written to.'
        assert refused(function, folder, REPO) == expected
    assert hub.log == []


def test_commit_that_fails_leaves_the_old_one_and_the_next_run_goes_on(hub, folder):
    first = push_folder(folder, REPO)
    before = tree(hub)
    write(folder, {'config.json': b'{"a": 2}', WEIGHTS: noise(300_000, b'new')})
    hub.fail_next = [(f'/{REPO}/commit/', 500)]
    assert 'fails with status 500: run again later' in refused(push_folder, folder, REPO)
    assert hub.repositories[REPO].branches == {'main': first.commit}
    assert tree(hub) == before
    hub.log.clear()
    push_folder(folder, REPO)
    assert tree(hub) == visible(folder)
    assert sent(hub, '/_lfs/') == []  # the weights had arrived


def test_first_push_that_fails_goes_on_in_the_empty_repository(hub, folder):
    hub.fail_next = [('/_lfs/', 403)]
    assert 'no right' in refused(push_folder, folder, REPO)
    assert tree(hub) == {}
    assert push_folder(folder, REPO, tag='v1').has_changed
    assert tree(hub, 'v1') == visible(folder)


@pytest.mark.hub
def test_killed_push_leaves_the_old_commit_and_the_next_one_is_whole(hub, folder):
    first = push_folder(folder, REPO)
    before = tree(hub)
    write(folder, {'config.json': b'{}', WEIGHTS: noise(300_000, b'a'), 'exits.safetensors': noise(5_000, b'b')})
    uploads, killed = [], threading.Event()

    def kill_at_second_upload(method, path):
        if method == 'PUT':
            uploads.append(path)
            if len(uploads) == 2:
                child.kill()
                killed.set()

    hub.on_request = kill_at_second_upload
    source = 'import sys; from timm_multiexit.hub import push_folder; push_folder(*sys.argv[1:])'
    child = subprocess.Popen([sys.executable, '-c', source, folder, REPO], stderr=subprocess.PIPE)
    _, errors = child.communicate(timeout=100)
    assert child.returncode == -9, errors.decode()
    assert killed.is_set()
    assert hub.repositories[REPO].branches == {'main': first.commit}
    assert tree(hub) == before
    hub.on_request = None
    assert push_folder(folder, REPO).has_changed
    assert tree(hub) == visible(folder)
    assert len(hub.repositories[REPO].commits) == 3


@pytest.mark.hub
def test_large_files_go_and_come_by_xet_too(hub, folder):
    def refuse_the_second(method, path):
        if path == '/api/repos/create' and REPO in hub.repositories:
            hub.fail_next = [('xet-write-token', 403)] * 99

    hub.on_request = refuse_the_second
    source = """if True:
        import sys
        from timm_multiexit.hub_client.client import fetch_files, push_folder
        folder, repo_id = sys.argv[1:]
        print(push_folder(folder, repo_id).commit, push_folder(folder, repo_id).has_changed)
        print(fetch_files(repo_id, ['model.safetensors']).folder)
        push_folder(folder, 'org/other')
    """
    env = {name: value for name, value in os.environ.items() if name != 'HF_HUB_DISABLE_XET'}
    child = subprocess.run(
        [sys.executable, '-c', source, folder, REPO],
        env={**env, 'HF_XET_XORB_COMPRESSION_POLICY': 'none'},
        capture_output=True,
        text=True,
        timeout=100,
    )
    *_, line = child.stderr.splitlines()
    assert 'MultiExitError' in line, child.stderr
    assert 'fails with a large file: run again later (it says: ' in line
    assert '403' in line
    assert SECRET not in child.stderr
    commit, has_changed, snapshot = child.stdout.split()
    assert (commit, has_changed) == (hub.repositories[REPO].branches['main'], 'False')
    assert tree(hub) == visible(folder)
    assert (Path(snapshot) / WEIGHTS).read_bytes() == noise(300_000)
    assert sent(hub, '/v1/xorbs/')
    assert not sent(hub, '/_lfs/')
    assert tree(hub, repo_id='org/other') == {}


def test_commit_of_somebody_else_in_between_is_never_undone(hub, folder):
    push_folder(folder, REPO)
    write(folder, {'config.json': b'{"a": 2}'})

    def commit_meanwhile(method, path):
        if path.endswith('/preupload/main'):
            hub.on_request = None
            hub.add(REPO, {'config.json': b'theirs'})

    hub.on_request = commit_meanwhile
    assert 'another commit in the meantime, and nothing was changed: run again' in refused(push_folder, folder, REPO)
    assert tree(hub)['config.json'] == b'theirs'
    assert push_folder(folder, REPO).has_changed
    assert tree(hub) == visible(folder)


def test_tag_is_set_once_and_never_moved(hub, folder):
    first = push_folder(folder, REPO)
    assert push_folder(folder, REPO, tag='v1') == first._replace(has_changed=False)
    assert push_folder(folder, REPO, tag='v1') == first._replace(has_changed=False)
    write(folder, {'config.json': b'{"a": 2}'})
    hub.log.clear()
    line = refused(push_folder, folder, REPO, tag='v1')
    assert f"Tag 'v1' of 'org/net' is at commit {first.commit} already, and nothing was pushed" in line
    assert sent(hub) == []
    second = push_folder(folder, REPO, tag='v2')
    assert hub.repositories[REPO].tags == {'v1': first.commit, 'v2': second.commit}
    # Nothing to push, yet the tag is at an older commit.
    assert 'nothing was pushed' in refused(push_folder, folder, REPO, tag='v1')


@pytest.mark.parametrize('tag', ['main', 'draft', '0' * 40, 'a b', '../x', '', '-v', 'v1\n'])
def test_name_that_no_tag_can_have_is_refused_before_the_push(hub, folder, tag):
    hub.add('org/old', {})
    hub.repositories['org/old'].branches['draft'] = hub.repositories['org/old'].branches['main']
    assert refused(push_folder, folder, 'org/old', tag=tag).startswith('Tag ')
    if tag != 'draft':
        refused(push_folder, folder, REPO, tag=tag)
    assert sent(hub) == []
    assert set(hub.repositories) == {'org/old'}


def test_tag_that_fails_is_told_apart_and_set_by_the_next_run(hub, folder):
    hub.fail_next = [('/tag/', 500)]
    line = refused(push_folder, folder, REPO, tag='v1')
    commit = hub.repositories[REPO].branches['main']
    assert line.startswith(f'Commit {commit} is pushed, its tag is not. ')
    assert not push_folder(folder, REPO, tag='v1').has_changed
    assert hub.repositories[REPO].tags == {'v1': commit}


def test_private_repository_is_made_private_and_stays_so(hub, folder, monkeypatch):
    push_folder(folder, REPO, private=True)
    assert hub.repositories[REPO].is_private
    write(folder, {'config.json': b'{"a": 2}'})
    push_folder(folder, REPO)
    assert hub.repositories[REPO].is_private
    monkeypatch.delenv('HF_TOKEN')
    assert 'it is private: check the name, or log in with `hf auth login`' in refused(
        fetch_files, REPO, ['config.json']
    )


def test_public_repository_is_not_pushed_to_as_private(hub, folder):
    hub.create_repository(REPO)
    assert check_push(REPO) == REPO
    hub.log.clear()
    for call in (
        lambda: push_folder(folder, REPO, private=True),
        lambda: plan_push(folder, REPO, private=True),
        lambda: check_push(REPO, private=True),
    ):
        assert "'org/net' is public already, so it cannot be pushed to as private" in refused(call)
    assert tree(hub) == {}
    assert sent(hub) == []


def test_private_and_missing_repositories_are_checked_as_private(hub):
    hub.create_repository('org/private', is_private=True)
    assert [check_push(name, private=True) for name in ('org/private', 'org/new')] == ['org/private', 'org/new']


def test_repository_that_the_server_made_public_against_our_will_gets_nothing(hub, folder, monkeypatch):
    create = hub.create_repository
    monkeypatch.setattr(hub, 'create_repository', lambda repo_id, is_private: create(repo_id))
    assert 'was made public' in refused(push_folder, folder, REPO, private=True)
    assert tree(hub) == {}


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('model.bin', 'may hold code'),
        ('checkpoint-3.pth.TAR', 'may hold code'),
        ('assets/x.pkl', 'may hold code'),
        ('a b.txt', 'not taken'),
        ('assets/\u00e9.png', 'not taken'),
        ('link.txt', 'leads out of'),
        ('assets/link', 'leads out of'),
        ('notes/within', 'leads out of .* or to no file'),
        ('hidden-pickle.json', 'may hold code'),
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
    assert 'is no folder' in refused(plan_push, folder / 'README.md', REPO)
    if os.geteuid():  # root reads everything
        (folder / 'notes').chmod(0)
        assert 'cannot be read' in refused(plan_push, folder, REPO)


def test_card_that_the_hub_refuses_stops_the_push_with_its_reason(hub, folder):
    write(folder, {'README.md': b'---\nlicense: {a: 1}\n---\n'})
    assert 'Invalid metadata in README.md. - "license" is of a wrong type' in refused(push_folder, folder, REPO)
    assert tree(hub) == {}


@pytest.mark.parametrize(
    'name', ['pytorch_model.bin', 'a.PT', 'x.ckpt', 'w.npz', '../x.json', '/etc/passwd', 'a/b', '', '.x']
)
def test_file_that_may_not_come_is_refused_before_any_request(hub, name):
    refused(fetch_files, REPO, ['config.json', name])
    assert hub.log == []


@pytest.mark.parametrize('revision', ['../../main', '/main', 'a//b', 'a..b', 'a b', '', 'main\n', '-x', 'a' * 251])
def test_revision_of_a_wrong_form_is_refused_before_any_request(hub, revision):
    assert refused(fetch_files, REPO, ['config.json'], revision=revision).startswith('Revision ')
    assert hub.log == []


@pytest.mark.parametrize(
    'repo_id', ['a/b/c', 'a/../b', 'org/na me', 'org/', '/x', 'org/x.git', 'org/n\u00e9t', '', None]
)
def test_repository_of_a_wrong_form_is_refused_before_any_request(hub, folder, repo_id):
    for call in (lambda: fetch_files(repo_id, ['config.json']), lambda: check_push(repo_id)):
        assert 'not of the form namespace/name' in refused(call)
    assert 'not of the form' in refused(push_folder, folder, repo_id)
    assert hub.log == []


def test_line_tells_what_the_hub_does_not_have(hub):
    hub.add(REPO, {'config.json': b'{}', 'pytorch_model.bin': b'pickle'})
    line = refused(fetch_files, 'org/other', ['config.json'])
    assert line.startswith(f"{hub.url} has no model repository 'org/other', or it is private")
    line = refused(fetch_files, REPO, ['config.json'], revision='v9')
    assert line == "'org/net' has no revision 'v9': give one of its branches, tags or commits."
    line = refused(fetch_files, REPO, ['config.json', WEIGHTS])
    assert line == "'org/net' has no model.safetensors at revision 'main': only safetensors are read."
    line = refused(fetch_files, REPO, ['metrics.json'])
    assert line == f"'org/net' has no metrics.json at revision 'main': see {hub.url}/org/net/tree/main."
    assert not any('pytorch_model' in entry.path for entry in hub.log)


@pytest.mark.parametrize(
    ('status', 'expected'),
    [
        (401, 'does not take the token: log in with `hf auth login`'),
        (403, 'The token has no right'),
        (429, 'takes no more requests'),
        (503, 'fails with status 503: run again later'),
        (400, 'refuses what was sent'),
    ],
)
def test_line_tells_what_a_status_means(hub, folder, status, expected):
    hub.fail_next = [(f'/{REPO}', status)] * 20
    assert expected in refused(push_folder, folder, REPO)
    assert expected in refused(fetch_files, REPO, ['config.json'])


@pytest.mark.parametrize(
    ('code', 'message', 'expected'),
    [
        (
            'GatedRepo',
            'Ask first',
            "'org/net' is gated: accept its terms at {url}/org/net and log in with `hf auth login`",
        ),
        (None, 'Access to this resource is disabled.', "'org/net' is disabled by {url}: choose another repository"),
    ],
)
def test_line_tells_that_a_repository_is_closed(hub, folder, monkeypatch, code, message, expected):
    refusal = Refusal(403, message, code=code)
    monkeypatch.setattr(hub_server.server.Handler, 'spoil', lambda handler, path: refusal.response)
    for call in (lambda: fetch_files(REPO, ['config.json']), lambda: plan_push(folder, REPO)):
        assert refused(call).startswith(expected.format(url=hub.url))


def test_without_a_network_the_cache_gives_what_it_has(hub, monkeypatch):
    commit = hub.add(REPO, {'config.json': b'{}', WEIGHTS: b'weights', 'exits.safetensors': b'exits'})
    hub.repositories[REPO].tags['v1'] = commit
    online = fetch_files(REPO, ['config.json', WEIGHTS])
    fetch_files(REPO, ['config.json'], revision='v1')
    hub.log.clear()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert fetch_files(REPO, ['config.json', WEIGHTS]) == online
    assert fetch_files(REPO, ['config.json', WEIGHTS], revision=commit) == online
    assert fetch_files(REPO, ['config.json', WEIGHTS], revision='v1') == online
    cold = "HF_HUB_OFFLINE is set, so that .* is not asked: unset it; the cache has no {} of 'org/{}' at '{}'"
    for file_name, name, revision in (
        ('exits.safetensors', 'net', None),
        ('config.json', 'x', None),
        (WEIGHTS, 'net', 'v2'),
    ):
        line = refused(fetch_files, f'org/{name}', [file_name], revision=revision)
        assert re.match(cold.format(file_name, name, revision or 'main'), line)
    assert 'HF_HUB_OFFLINE is set' in refused(check_push, 'net')
    assert hub.log == []


def test_with_the_server_down_the_cache_gives_what_it_has(hub):
    hub.add(REPO, {'config.json': b'{}', WEIGHTS: b'weights'})
    online = fetch_files(REPO, ['config.json', WEIGHTS])
    hub.fail_next = [('', 0)] * 99  # connections are closed without an answer
    assert fetch_files(REPO, ['config.json', WEIGHTS]) == online
    assert 'cannot be reached (RemoteProtocolError): check the network' in refused(
        fetch_files, 'org/x', ['config.json']
    )
    hub.fail_next = [('resolve', 503)] * 99
    assert fetch_files(REPO, ['config.json', WEIGHTS]) == online
    line = refused(fetch_files, 'org/x', ['config.json'])
    assert (
        "fails with status 503: run again later (it says: injected failure); the cache has no config.json of 'org/x'"
        in line
    )


def test_without_a_connection_the_cache_gives_what_it_has(hub, monkeypatch, folder):
    hub.add(REPO, {'config.json': b'{}'})
    online = fetch_files(REPO, ['config.json'])
    address = 'http://user:password@127.0.0.1:9'  # nobody listens
    template = address + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', address)
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE', template)
    assert fetch_files(REPO, ['config.json']) == online
    expected = 'http://127.0.0.1:9 cannot be reached (ConnectError): check the network and HF_ENDPOINT'
    assert refused(fetch_files, REPO, ['x.json']) == f"{expected}; the cache has no x.json of 'org/net' at 'main'."
    assert refused(check_push, REPO) == refused(push_folder, folder, REPO) == f'{expected}.'


def test_check_gives_the_full_name_and_changes_nothing(hub):
    assert check_push('net') == 'tester/net'
    assert check_push('tester/net') == 'tester/net'
    assert check_push(REPO) == REPO
    assert (
        refused(check_push, 'google/net') == "'tester' may not write to 'google', allowed are 'tester', 'org', 'timm'."
    )
    names = ('tester/net', REPO)
    assert {entry.path.partition('?')[0] for entry in hub.log} == {
        '/api/whoami-v2',
        *(f'/api/models/{name}' for name in names),
    }
    assert {entry.method for entry in hub.log} == {'GET'}
    assert hub.repositories == {}


def test_push_to_a_bare_name_is_to_the_user(hub, folder):
    assert push_folder(folder, 'net').repo_id == 'tester/net'
    assert plan_push(folder, 'net').repo_id == 'tester/net'


def test_bare_name_is_asked_for_once_and_full_ones_are_taken(hub, folder, monkeypatch):
    assert full_name(REPO) == REPO
    assert hub.log == []
    assert full_name('net') == 'tester/net'
    assert [entry.path for entry in hub.log] == ['/api/whoami-v2']
    start = "'net' names no user: give namespace/name. "
    for token in ('hf_other', 'a b'):
        line = refused(full_name, 'net', token=token)
        assert line.startswith(start)
        assert token not in line
    monkeypatch.delenv('HF_TOKEN')
    for call in (lambda: full_name('net'), lambda: plan_push(folder, 'net')):
        assert refused(call) == f"{start}'net' cannot be pushed to without a token: log in with `hf auth login`."


def test_without_a_network_a_bare_name_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    expected = f"'net' names no user: give namespace/name. HF_HUB_OFFLINE is set, so that {hub.url} is not asked"
    for call in (lambda: plan_push(folder, 'net'), lambda: push_folder(folder, 'net')):
        assert refused(call).startswith(expected)


def test_token_must_be_there_and_taken(hub, folder, monkeypatch):
    calls = [lambda **kwargs: check_push(REPO, **kwargs), lambda **kwargs: push_folder(folder, REPO, **kwargs)]
    hub.create_repository(REPO)
    calls.append(lambda **kwargs: plan_push(folder, 'org/private', **kwargs))
    hub.create_repository('org/private', is_private=True)
    for call in calls:
        line = refused(call, token='hf_other')
        assert line.startswith(f'{hub.url} does not take the token: log in with `hf auth login`, or mend HF_TOKEN')
        assert 'hf_other' not in line
        for token in (f'{SECRET}\n', 'a b', '\u00e9'):  # the client's own refusal of these shows them
            assert refused(call, token=token).startswith('The token has spaces or signs')
    monkeypatch.setenv('HF_TOKEN', f'{SECRET} {SECRET}')
    assert refused(fetch_files, REPO, ['config.json']).startswith('The token has spaces')
    monkeypatch.delenv('HF_TOKEN')
    for call in calls[:2]:
        assert refused(call) == "'org/net' cannot be pushed to without a token: log in with `hf auth login`."
        call(token=SECRET)


def test_token_or_organization_that_only_reads_is_refused(hub, monkeypatch):
    def readers(value, *args, **kwargs):
        org = {'name': 'org', 'roleInOrg': 'read'}
        return answer({**value, 'orgs': [org, {'name': 'timm'}], 'auth': {'accessToken': {'role': role}}})

    monkeypatch.setattr(hub_server.reading, 'answer', readers)
    role = 'fineGrained'
    assert check_push('timm/net') == 'timm/net'
    assert refused(check_push, REPO) == "'tester' may not write to 'org', allowed are 'tester', 'timm'."
    role = 'read'
    assert refused(check_push, 'net').startswith("The token of 'tester' only reads")


def test_words_of_the_server_come_on_one_line_without_the_token(hub, monkeypatch):
    words = f'no eyJh.bG-c of {SECRET}\n\x1b[31mfor {{you}}? see http://cdn/x?signature=abc hf_abc'
    monkeypatch.setattr(hub_server.reading, 'answer', lambda value: answer({'error': words}, 403))
    monkeypatch.setattr(hub, 'token', 'eyJh.bG-c')  # tokens by OAuth have no mark
    monkeypatch.setenv('HF_TOKEN', 'eyJh.bG-c')
    with pytest.raises(MultiExitError, match='it says: no ') as caught:
        check_push('net')
    assert str(caught.value).endswith('(it says: no *** of *** [31mfor {you}? see http://cdn/x*** ***).')


def test_answers_of_another_server_are_told_as_such(hub, monkeypatch):
    for other in (answer({}), Response(200, b'<html>Log in to the Wi-Fi</html>')):
        monkeypatch.setattr(hub_server.reading, 'answer', lambda value, other=other: other)
        assert refused(check_push, 'net') == f'{hub.url} does not answer as a Hub does: check HF_ENDPOINT and proxies.'


def test_client_offers_what_is_relied_on():
    assert {'parent_commit', 'commit_message'} <= set(inspect.signature(HfApi.create_commit).parameters)
    assert 'oid' in CommitInfo.__dataclass_fields__
