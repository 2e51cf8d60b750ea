"""Publishing to and loading from the Hub, with the real client against a server on this machine."""

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.hub import PLOT, REPO, SECRET, WEIGHTS, noise, refused, sent, tree, visible, write
from huggingface_hub import CommitInfo, HfApi, hf_hub_download

from timm_multiexit.hub_client.client import PushPlan, check_push, fetch_files, full_name, plan_push, push_folder

pytestmark = pytest.mark.usefixtures('secret')


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
    assert plan == PushPlan(REPO, f'{hub.url}/{REPO}', None, dict.fromkeys(sorted(visible(folder)), 'add'))
    commit = push_folder(folder, REPO).commit
    assert set(plan_push(folder, REPO).actions.values()) == {'keep'}
    (folder / PLOT).unlink()
    # Of the same sizes, one of each kind that the server tells by a hash of its own.
    write(folder, {'config.json': b'{"a": 3}', WEIGHTS: noise(300_000, b'other'), 'args.yaml': b'lr: 1'})
    hub.log.clear()
    plan = plan_push(folder, REPO)
    assert sent(hub) == []
    assert plan.parent == commit
    actions = {'args.yaml': 'add', 'config.json': 'update', WEIGHTS: 'update', PLOT: 'delete'}
    keys = sorted({*visible(folder), PLOT})
    assert list(plan.actions.items()) == [(path, actions.get(path, 'keep')) for path in keys]


def test_commit_that_fails_leaves_the_old_one_and_the_next_run_goes_on(hub, folder):
    first = push_folder(folder, REPO)
    before = tree(hub)
    write(folder, {'config.json': b'{"a": 2}', WEIGHTS: noise(300_000, b'new')})
    hub.fail_next = [(f'/{REPO}/commit/', 500)]
    assert '500 Internal Server Error (injected failure)' in refused(push_folder, folder, REPO)
    assert hub.repositories[REPO].branches == {'main': first.commit}
    assert tree(hub) == before
    hub.log.clear()
    push_folder(folder, REPO)
    assert tree(hub) == visible(folder)
    assert sent(hub, '/_lfs/') == []  # the weights had arrived


def test_first_push_that_fails_goes_on_in_the_empty_repository(hub, folder):
    hub.fail_next = [('/_lfs/', 403)]
    assert '403' in refused(push_folder, folder, REPO)
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
    source = 'import sys; from timm_multiexit.hub_client.client import push_folder; push_folder(*sys.argv[1:])'
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
    assert line.startswith(f"timm_multiexit.utils.errors.HubError: {hub.url} failed for 'org/other': "), child.stderr
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
    assert '412 Precondition Failed' in refused(push_folder, folder, REPO)
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
    assert f"Tag 'v1' of 'org/net' is already at commit {first.commit}, so nothing was pushed" in line
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
    assert line.startswith(f'Commit {commit} was pushed, but not tagged. ')
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
        assert "'org/net' already exists and is public: make it private at" in refused(call)
    assert tree(hub) == {}
    assert sent(hub) == []


def test_private_and_missing_repositories_are_checked_as_private(hub):
    hub.create_repository('org/private', is_private=True)
    assert [check_push(name, private=True) for name in ('org/private', 'org/new')] == ['org/private', 'org/new']


def test_repository_that_the_server_made_public_against_our_will_gets_nothing(hub, folder, monkeypatch):
    create = hub.create_repository
    monkeypatch.setattr(hub, 'create_repository', lambda repo_id, is_private: create(repo_id))
    assert "made 'org/net' public, so nothing was pushed" in refused(push_folder, folder, REPO, private=True)
    assert tree(hub) == {}


def test_card_that_the_hub_refuses_stops_the_push_with_its_reason(hub, folder):
    write(folder, {'README.md': b'---\nlicense: {a: 1}\n---\n'})
    assert 'Invalid metadata in README.md. - "license" is of a wrong type' in refused(push_folder, folder, REPO)
    assert tree(hub) == {}


def test_check_gives_the_full_name_and_changes_nothing(hub):
    assert check_push('net') == 'tester/net'
    assert check_push('tester/net') == 'tester/net'
    assert check_push(REPO) == REPO
    assert (
        refused(check_push, 'google/net')
        == "Namespace must be one that 'tester' may write to ('tester', 'org', 'timm'), got 'google'."
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
    start = "'net' has no namespace: give namespace/name. "
    for token in ('hf_other', 'a b'):
        line = refused(full_name, 'net', token=token)
        assert line.startswith(start)
        assert token not in line
    monkeypatch.delenv('HF_TOKEN')
    for call in (lambda: full_name('net'), lambda: plan_push(folder, 'net')):
        assert refused(call) == f"{start}Pushing to 'net' requires a token: log in with `hf auth login`."


def test_client_offers_what_is_relied_on():
    wanted = {'parent_commit', 'commit_message', 'allow_patterns', 'delete_patterns'}
    assert wanted <= set(inspect.signature(HfApi.upload_folder).parameters)
    assert 'oid' in CommitInfo.__dataclass_fields__
