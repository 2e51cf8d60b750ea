"""Every failure of the Hub is one line, and no token is in it."""

import re

import hub_server.reading
import hub_server.server
import pytest
from helpers.hub import REPO, SECRET, WEIGHTS, refused
from hub_server.messages import Refusal, Response, answer

from timm_multiexit.hub_client.client import check_push, fetch_files, plan_push, push_folder
from timm_multiexit.utils.errors import HubError

pytestmark = pytest.mark.usefixtures('secret')


@pytest.mark.parametrize('revision', ['../../main', '/main', 'a//b', 'a..b', 'a b', '', 'main\n', '-x', 'a' * 251])
def test_revision_of_a_wrong_form_is_refused_before_any_request(hub, revision):
    assert refused(fetch_files, REPO, ['config.json'], revision=revision).startswith('Revision ')
    assert hub.log == []


@pytest.mark.parametrize(
    'repo_id', ['a/b/c', 'a/../b', 'org/na me', 'org/', '/x', 'org/x.git', 'org/n\u00e9t', '', None]
)
def test_repository_of_a_wrong_form_is_refused_before_any_request(hub, folder, repo_id):
    for call in (lambda: fetch_files(repo_id, ['config.json']), lambda: check_push(repo_id)):
        assert 'must have the form namespace/name' in refused(call)
    assert 'must have the form' in refused(push_folder, folder, repo_id)
    assert hub.log == []


def test_line_tells_what_the_hub_does_not_have(hub):
    hub.add(REPO, {'config.json': b'{}', 'pytorch_model.bin': b'pickle'})
    line = refused(fetch_files, 'org/other', ['config.json'])
    assert line.startswith(f"{hub.url} has no model repository 'org/other', or it is private")
    line = refused(fetch_files, REPO, ['config.json'], revision='v9')
    assert line == "'org/net' has no revision 'v9': give one of its branches, tags or commits."
    line = refused(fetch_files, REPO, ['config.json', WEIGHTS])
    assert line == (
        f"'org/net' has no model.safetensors at revision 'main': see {hub.url}/org/net/tree/main, only safetensors are"
        ' read as weights.'
    )
    assert not any('pytorch_model' in entry.path for entry in hub.log)


@pytest.mark.parametrize(
    ('status', 'expected'),
    [
        (401, 'rejected the token: log in with `hf auth login`'),
        (403, '403 Forbidden (injected failure)'),
        (429, '429 Too Many Requests (injected failure)'),
        (503, '503 Service Unavailable (injected failure)'),
        (400, '400 Bad Request (injected failure)'),
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
        (None, 'Access to this resource is disabled.', "{url} failed for 'org/net': DisabledRepoError: 403 Forbidden"),
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
    cold = "HF_HUB_OFFLINE is set, so .* was not contacted: unset it; the cache has no {} of 'org/{}' at '{}'"
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
    line = refused(fetch_files, 'org/x', ['config.json'])
    assert line.startswith(f"{hub.url} failed for 'org/x': RemoteProtocolError: ")
    hub.fail_next = [('resolve', 503)] * 99
    assert fetch_files(REPO, ['config.json', WEIGHTS]) == online
    line = refused(fetch_files, 'org/x', ['config.json'])
    assert "503 Service Unavailable (injected failure); the cache has no config.json of 'org/x'" in line


def test_without_a_connection_the_cache_gives_what_it_has(hub, monkeypatch, folder):
    hub.add(REPO, {'config.json': b'{}'})
    online = fetch_files(REPO, ['config.json'])
    address = 'http://user:password@127.0.0.1:9'  # nobody listens
    template = address + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', address)
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE', template)
    assert fetch_files(REPO, ['config.json']) == online
    expected = "http://127.0.0.1:9 failed for 'org/net': ConnectError: [Errno 111] Connection refused"
    assert refused(fetch_files, REPO, ['x.json']) == (
        f"{expected}; the cache has no x.json of 'org/net' at 'main'. Without a network, run `hf download org/net` where"
        ' there is one and copy its folder of HF_HUB_CACHE.'
    )
    assert refused(check_push, REPO) == refused(push_folder, folder, REPO) == f'{expected}.'


def test_without_a_network_a_bare_name_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    expected = f"'net' has no namespace: give namespace/name. HF_HUB_OFFLINE is set, so {hub.url} was not contacted"
    for call in (lambda: plan_push(folder, 'net'), lambda: push_folder(folder, 'net')):
        assert refused(call).startswith(expected)


def test_token_must_be_there_and_taken(hub, folder, monkeypatch):
    calls = [lambda **kwargs: check_push(REPO, **kwargs), lambda **kwargs: push_folder(folder, REPO, **kwargs)]
    hub.create_repository(REPO)
    calls.append(lambda **kwargs: plan_push(folder, 'org/private', **kwargs))
    hub.create_repository('org/private', is_private=True)
    for call in calls:
        line = refused(call, token='hf_other')
        assert line.startswith(f'{hub.url} rejected the token: log in with `hf auth login`, or correct HF_TOKEN')
        assert 'hf_other' not in line
        for token in (f'{SECRET}\n', 'a b', '\u00e9'):  # the client's own refusal of these shows them
            assert refused(call, token=token).startswith('The token contains spaces')
    monkeypatch.setenv('HF_TOKEN', f'{SECRET} {SECRET}')
    assert refused(fetch_files, REPO, ['config.json']).startswith('The token contains spaces')
    monkeypatch.delenv('HF_TOKEN')
    for call in calls[:2]:
        assert refused(call) == "Pushing to 'org/net' requires a token: log in with `hf auth login`."
        call(token=SECRET)


def test_token_or_organization_that_only_reads_is_refused(hub, monkeypatch):
    def readers(value, *args, **kwargs):
        org = {'name': 'org', 'roleInOrg': 'read'}
        return answer({**value, 'orgs': [org, {'name': 'timm'}], 'auth': {'accessToken': {'role': role}}})

    monkeypatch.setattr(hub_server.reading, 'answer', readers)
    role = 'fineGrained'
    assert check_push('timm/net') == 'timm/net'
    assert (
        refused(check_push, REPO) == "Namespace must be one that 'tester' may write to ('tester', 'timm'), got 'org'."
    )
    role = 'read'
    assert refused(check_push, 'net').startswith("The token of 'tester' is read-only")


def test_words_of_the_server_come_on_one_line_without_the_token(hub, monkeypatch):
    words = f'no eyJh.bG-c of {SECRET}\n\x1b[31mfor {{you}}? see http://cdn/x?signature=abc hf_abc'
    monkeypatch.setattr(hub_server.reading, 'answer', lambda value: answer({'error': words}, 403))
    monkeypatch.setattr(hub, 'token', 'eyJh.bG-c')  # tokens by OAuth have no mark
    monkeypatch.setenv('HF_TOKEN', 'eyJh.bG-c')
    with pytest.raises(HubError, match=r'403 Forbidden \(no ') as caught:
        check_push('net')
    assert str(caught.value).endswith('403 Forbidden (no *** of *** [31mfor {you}? see http://cdn/x*** ***).')


def test_answers_of_another_server_are_told_as_such(hub, monkeypatch):
    for other in (answer({}), Response(200, b'<html>Log in to the Wi-Fi</html>')):
        monkeypatch.setattr(hub_server.reading, 'answer', lambda value, other=other: other)
        assert refused(check_push, 'net').startswith(f"{hub.url} failed for 'net': ")
