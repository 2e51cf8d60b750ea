"""The Hub on this machine against the real huggingface_hub client; nothing of the client is replaced."""

import hashlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub_server.server import Server
from hub_server.xet import UNCOMPRESSED, parse_xorb

REPO = 'org/net'
CARD = b'---\nlicense: apache-2.0\nlibrary_name: timm\ntags: [a]\n---\n# Net\n'


@pytest.fixture
def folder(tmp_path):
    """A folder with regular files, one in a subfolder, and 300 KB that go by LFS."""
    contents = {'README.md': CARD, 'config.json': b'{"a": 1}', 'assets/plot.txt': b'plot', 'empty.safetensors': b''}
    contents['model.safetensors'] = noise(300_000)
    root = tmp_path / 'folder'
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


@pytest.fixture
def published(hub, folder):
    """The client and the id of the commit that has the folder."""
    api = HfApi()
    api.create_repo(REPO)
    return api, api.upload_folder(repo_id=REPO, folder_path=folder).oid


def noise(size, seed=b'0'):
    """Bytes that no compression makes smaller."""
    blocks = (hashlib.sha256(seed + str(idx).encode()).digest() for idx in range(size // 32 + 1))
    return b''.join(blocks)[:size]


def requests(hub, pattern, method=None):
    return [entry for entry in hub.log if re.search(pattern, entry.path) and method in (None, entry.method)]


def test_client_of_every_test_talks_to_this_server_alone(hub):
    assert huggingface_hub.constants.ENDPOINT == hub.url
    assert HfApi().whoami()['name'] == hub.user
    assert [(entry.method, entry.path) for entry in hub.log] == [('GET', '/api/whoami-v2')]
    assert not os.path.realpath(huggingface_hub.constants.HF_HUB_CACHE).startswith(os.path.expanduser('~/.cache'))


def test_uploaded_folder_comes_back_equal(published, folder, hub):
    api, commit = published
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())
    assert sorted(api.list_repo_files(REPO)) == sorted([*names, '.gitattributes'])
    snapshot = snapshot_download(REPO)
    assert os.path.basename(snapshot) == commit
    for name in names:
        assert (folder / name).read_bytes() == open(os.path.join(snapshot, name), 'rb').read()
    # Only the weights went by LFS, once; they came from the host of large files, the rest from the Hub.
    assert [entry.size for entry in requests(hub, '/_lfs/[0-9a-f]+$', 'PUT')] == [300_000]
    assert len(requests(hub, '/_cdn/', 'GET')) == 1
    assert not hub.xet.xorbs


def test_large_file_in_parts_is_put_together(hub, folder):
    hub.multipart_bytes = 100_000
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [entry.size for entry in requests(hub, r'/_lfs/\w+/[123]$', 'PUT')] == [100_000] * 3
    path = hf_hub_download(REPO, 'model.safetensors')
    assert open(path, 'rb').read() == noise(300_000)


def test_unchanged_upload_is_no_commit_and_sends_no_weights(published, folder, hub):
    api, commit = published
    hub.log.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == commit
    assert [c.commit_id for c in api.list_repo_commits(REPO)][0] == commit
    assert len(api.list_repo_commits(REPO)) == 2
    assert not requests(hub, '/_lfs/')


def test_commit_adds_and_deletes_and_old_revision_stays(published):
    api, first = published
    operations = [CommitOperationAdd('config.json', b'{"a": 2}'), CommitOperationDelete('assets/plot.txt')]
    second = api.create_commit(REPO, operations, commit_message='second', parent_commit=first).oid
    assert 'assets/plot.txt' not in api.list_repo_files(REPO)
    assert 'assets/plot.txt' in api.list_repo_files(REPO, revision=first)
    read = {rev: open(hf_hub_download(REPO, 'config.json', revision=rev)).read() for rev in (first, second, 'main')}
    assert read == {first: '{"a": 1}', second: '{"a": 2}', 'main': '{"a": 2}'}


def test_wrong_parent_is_412_and_changes_nothing(published):
    api, _ = published
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(REPO, [CommitOperationAdd('x', b'x')], commit_message='late', parent_commit='0' * 40)
    assert caught.value.response.status_code == 412
    assert 'x' not in api.list_repo_files(REPO)


def test_tags_and_branches_name_commits(published):
    api, first = published
    api.create_tag(REPO, tag='v1')
    api.create_branch(REPO, branch='old')
    second = api.create_commit(REPO, [CommitOperationAdd('config.json', b'{}')], commit_message='second').oid
    shas = {rev: api.model_info(REPO, revision=rev).sha for rev in ('v1', 'old', 'main', first)}
    assert shas == {'v1': first, 'old': first, 'main': second, first: first}
    refs = api.list_repo_refs(REPO)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [('v1', first)]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_tag(REPO, tag='v1')
    assert caught.value.response.status_code == 409
    api.delete_tag(REPO, tag='v1')
    assert not api.list_repo_refs(REPO).tags


def test_metadata_are_those_of_the_files(published, folder):
    api, commit = published
    info = api.model_info(REPO, files_metadata=True)
    weights = {sibling.rfilename: sibling for sibling in info.siblings}['model.safetensors']
    digest = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    assert (weights.size, weights.lfs.sha256) == (300_000, digest)
    assert (info.sha, info.card_data.license, info.library_name) == (commit, 'apache-2.0', 'timm')
    config, weights = api.get_paths_info(REPO, ['config.json', 'model.safetensors'])
    blob = subprocess.run(['git', 'hash-object', folder / 'config.json'], capture_output=True, text=True, check=True)
    assert (config.blob_id, config.lfs) == (blob.stdout.strip(), None)
    assert weights.lfs.sha256 == digest
    tree = {item.path: item for item in api.list_repo_tree(REPO)}
    assert 'assets' in tree
    assert 'assets/plot.txt' not in tree
    assert [item.path for item in api.list_repo_tree(REPO, 'assets')] == ['assets/plot.txt']


def test_private_repository_is_hidden_from_others(hub):
    api = HfApi()
    api.create_repo(REPO, private=True)
    api.upload_file(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id=REPO)
    assert api.model_info(REPO).private
    statuses = []
    for token in (False, 'hf_wrong'):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info(REPO, token=token)
        statuses.append(caught.value.response.status_code)
        with pytest.raises((RepositoryNotFoundError, LocalEntryNotFoundError)):
            hf_hub_download(REPO, 'config.json', token=token)
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.model_info('org/missing')
    assert [*statuses, caught.value.response.status_code] == [401, 401, 404]


def test_missing_things_are_told_apart(published):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, 'missing.json')
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, 'config.json', revision='missing')
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('org/missing', 'config.json')


@pytest.mark.parametrize(
    ('action', 'status'),
    [
        (lambda api: api.create_repo('stranger/net'), 403),
        (lambda api: api.create_repo(REPO), 409),
        (lambda api: api.create_repo('org/new', token='hf_wrong'), 401),
        (lambda api: api.whoami(token='hf_wrong'), 401),
        (
            lambda api: api.create_commit(REPO, [CommitOperationAdd('x', b'')], commit_message='x', token='hf_wrong'),
            401,
        ),
    ],
    ids=['foreign namespace', 'exists', 'wrong token creates', 'wrong token asks', 'wrong token commits'],
)
def test_writes_without_the_right_are_refused(hub, action, status):
    hub.create_repository(REPO)
    with pytest.raises(HfHubHTTPError) as caught:
        action(HfApi())
    assert caught.value.response.status_code == status
    assert HfApi().create_repo(REPO, exist_ok=True).repo_id == REPO


def test_card_with_broken_yaml_is_refused(hub):
    hub.create_repository(REPO)
    with pytest.raises(ValueError, match='YAML'):
        HfApi().upload_file(path_or_fileobj=b'---\na: [\n---\n', path_in_repo='README.md', repo_id=REPO)


def test_state_is_empty_in_each_test(hub):
    assert (hub.repositories, hub.lfs, hub.log, hub.fail_next) == ({}, {}, [], [])
    assert not os.path.exists(huggingface_hub.constants.HF_HUB_CACHE)


def test_files_added_past_the_api_are_served(hub):
    commit = hub.add(REPO, {'config.json': b'{}', 'model.safetensors': b'weights'})
    assert HfApi().model_info(REPO).sha == commit
    assert open(hf_hub_download(REPO, 'model.safetensors'), 'rb').read() == b'weights'
    assert hub.add(REPO, {'config.json': b'[]'}) != commit
    assert open(hf_hub_download(REPO, 'model.safetensors', revision=commit), 'rb').read() == b'weights'


def test_injected_failure_spoils_one_answer(hub):
    hub.add(REPO, {'config.json': b'{}'})
    hub.fail_next.append((f'/api/models/{REPO}$', 418))
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().model_info(REPO)
    assert caught.value.response.status_code == 418
    assert HfApi().model_info(REPO).id == REPO


def test_server_that_is_down_leaves_the_cache(hub):
    hub.add(REPO, {'config.json': b'{}', 'other.json': b'{}'})
    path = hf_hub_download(REPO, 'config.json')
    with hub.unreachable():
        assert hf_hub_download(REPO, 'config.json') == path
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(REPO, 'other.json')
    assert open(hf_hub_download(REPO, 'other.json')).read() == '{}'


def test_server_is_down_though_a_forked_process_has_its_socket(hub):
    """Workers of a loader that are still there, for example."""
    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
    worker.start()
    try:
        with hub.unreachable(), pytest.raises(ConnectionRefusedError):
            socket.create_connection(('127.0.0.1', urlsplit(hub.url).port), timeout=5)
        hub.add(REPO, {'config.json': b'{}'})
        assert HfApi().model_info(REPO).id == REPO
    finally:
        worker.kill()
        worker.join()


def test_port_of_a_server_that_is_down_is_kept_from_others(hub, monkeypatch):
    hub.add(REPO, {'config.json': b'{}'})
    hf_hub_download(REPO, 'config.json')
    address, tried = ('127.0.0.1', urlsplit(hub.url).port), []

    def close_and_try(server, close=Server.close):
        close(server)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match='in use'):
                other.bind(address)
        tried.append(address)

    monkeypatch.setattr(Server, 'close', close_and_try)
    with hub.unreachable():
        pass
    assert tried == [address]
    assert HfApi().model_info(REPO).id == REPO


def test_connection_can_be_closed_without_an_answer(hub):
    hub.add(REPO, {'config.json': b'{}'})
    hub.fail_next.append(('config.json', 0))
    with pytest.raises(Exception, match='disconnected without sending a response'):
        hf_hub_download(REPO, 'config.json')
    assert open(hf_hub_download(REPO, 'config.json')).read() == '{}'


def test_request_can_be_held_while_others_are_answered(hub):
    hub.add(REPO, {'config.json': b'old'})
    is_held, may_go_on, paths = threading.Event(), threading.Event(), []

    def hold(method, path):
        if path.endswith('config.json'):
            is_held.set()
            may_go_on.wait(10)

    hub.on_request = hold
    thread = threading.Thread(target=lambda: paths.append(hf_hub_download(REPO, 'config.json')))
    thread.start()
    assert is_held.wait(10)
    commit = hub.add(REPO, {'config.json': b'new'})
    may_go_on.set()
    thread.join()
    assert open(paths[0]).read() == 'new'
    assert commit in paths[0]


def test_token_at_the_host_of_large_files_is_logged_as_a_leak(hub):
    digest = hashlib.sha256(b'weights').hexdigest()
    hub.add(REPO, {'model.safetensors': b'weights'})
    statuses = []
    for url in (hub.url, hub.cdn_url):
        request = urllib.request.Request(f'{url}/_cdn/{digest}', headers={'Authorization': 'Bearer secret'})
        with urllib.request.urlopen(request) as response:
            statuses.append(response.status)
    methods = [entry.method for entry in hub.log]
    hub.log.clear()
    assert (statuses, methods) == ([200, 200], ['GET', 'GET', 'LEAK'])


@pytest.mark.parametrize('host', ['192.0.2.1', '2001:db8::1'])
@pytest.mark.parametrize('method', ['connect', 'connect_ex'])
def test_guard_refuses_connections_that_leave_the_machine(host, method, network_guard):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with socket.socket(family) as connection, pytest.raises(RuntimeError, match=host):
        getattr(connection, method)((host, 80))
    assert network_guard.take_attempts() == [host]


def test_guard_refuses_the_real_hub_also_where_the_client_goes_on(network_guard):
    with pytest.raises(RuntimeError, match='huggingface.co'):
        HfApi(endpoint='https://huggingface.co').model_info(REPO)
    assert set(network_guard.take_attempts()) == {'huggingface.co'}


def test_guard_lets_this_machine_through(hub, network_guard):
    port = int(hub.url.rsplit(':', 1)[1])
    for host in ('127.0.0.1', 'localhost'):
        socket.create_connection((host, port)).close()
    assert network_guard.take_attempts() == []


XET_CHILD = """
import sys
from huggingface_hub import HfApi, hf_hub_download
repo, folder, copy = sys.argv[1:]
HfApi().upload_folder(repo_id=repo, folder_path=folder)
path = hf_hub_download(repo, 'model.safetensors', local_dir=copy)
"""


def test_xet_client_sends_xorbs_and_gets_them_back(hub, folder, tmp_path, monkeypatch):
    monkeypatch.delenv('HF_HUB_DISABLE_XET')
    monkeypatch.setenv('HF_XET_XORB_COMPRESSION_POLICY', 'none')
    hub.create_repository(REPO)
    copy = tmp_path / 'copy'
    command = [sys.executable, '-c', XET_CHILD, REPO, folder, copy]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert (copy / 'model.safetensors').read_bytes() == noise(300_000)
    sent = requests(hub, '/xorbs/', 'POST')
    assert sum(entry.size for entry in sent if entry.status == 200) > 300_000
    assert requests(hub, '/_xorb/', 'GET')
    assert not requests(hub, '/_lfs/')
    assert not requests(hub, '/_cdn/')
    assert {chunk[2] for xorb in hub.xet.xorbs.values() for chunk in parse_xorb(xorb)} == {UNCOMPRESSED}
    # A client without Xet gets the same bytes.
    assert open(hf_hub_download(REPO, 'model.safetensors'), 'rb').read() == noise(300_000)
