"""`hub/publish.py` as its users run it, against the Hub on this machine."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import enliven
from helpers.runs import ROOT, edit, make_run, measure_run

import timm_multiexit as tme
from timm_multiexit.checkpoints.save import hash_weights

REPO = 'org/net'
NAME = f'hf-hub:{REPO}'
SCRIPT = ROOT / 'hub/publish.py'


@pytest.fixture(scope='module')
def publish():
    """The script as a module; `hub` is no package."""
    spec = importlib.util.spec_from_file_location('publish', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    torch.manual_seed(0)
    return measure_run(make_run(tmp_path_factory.mktemp('trained')))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run, to change."""
    return shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('*.pth.tar'))


@pytest.fixture
def call(publish, run, hub, capsys):
    """Return a function that runs the script on the run and returns exit code, stdout and stderr."""

    def call(*flags, run=run, repo_id=REPO):
        argv = [str(run), repo_id, *map(str, flags)]
        capsys.readouterr()
        try:
            code = publish.main(argv)
        except SystemExit as error:  # argparse
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32)


def sent(hub):
    """The requests that are not for reading; the check of a card changes nothing either."""
    return [
        (entry.method, entry.path)
        for entry in hub.log
        if entry.method not in ('GET', 'HEAD') and 'validate-yaml' not in entry.path
    ]


def uploaded(hub):
    """The SHA-256 of every large file that was sent."""
    return [entry.path.split('/')[2] for entry in hub.log if entry.method == 'PUT']


def commits(hub):
    """The commits of the repository behind the one that made it, oldest first."""
    repository = hub.repositories[REPO]
    return [commit for commit in repository.commits.values() if commit.parent]


def change_exits(run):
    """Train the exits on, as far as the run's files show: new heads, the same backbone, results of both."""
    model = tme.create_model(f'local-dir:{run}/best', pretrained=True)
    with torch.no_grad():
        for param in model.exits.parameters():
            param.add_(0.1)
    before, config = hash_weights(run / 'best'), (run / 'best/config.json').read_bytes()
    tme.save_pretrained(model, run / 'best')
    (run / 'best/config.json').write_bytes(config)
    after = hash_weights(run / 'best')
    assert [before[name] == after[name] for name in ('model.safetensors', 'exits.safetensors')] == [True, False]
    for name in ('results.json', 'validation.json'):
        edit(run / name, weights=after)
    return after


@torch.inference_mode()
def assert_same_answers(run, images, revision=''):
    """The Hub gives the run's network bit by bit, plain timm its main network."""
    model = tme.create_model(f'local-dir:{run}/best', pretrained=True).eval()
    loaded = tme.create_model(NAME + revision, pretrained=True).eval()
    expected = model(images, exits=True).logits
    assert all(torch.equal(one, other) for one, other in zip(loaded(images, exits=True).logits, expected))
    assert (loaded.policy, loaded.budgets) == (model.policy, model.budgets)
    assert model.policy is not None
    plain = timm.create_model(NAME + revision, pretrained=True).eval()
    assert torch.equal(plain(images), expected[-1])


def test_dry_run_says_what_it_would_do_and_sends_nothing(call, hub, run):
    code, out, err = call()
    assert (code, err) == (0, '')
    assert sent(hub) == []
    assert hub.repositories == {}
    folder = run / 'publication'
    headline, license_line, written, target, *changes, last = out.splitlines()
    assert headline in (folder / 'README.md').read_text()
    assert '% top-1' in headline
    assert license_line == 'License: Trained from scratch; the license is the default of timm_multiexit.'
    assert written == f'Wrote {folder}.'
    assert target == f'{folder} to {hub.url}/{REPO}, a new repository:'
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    expected = {f'add {path.relative_to(folder)} ({path.stat().st_size:,} bytes)' for path in files}
    assert {' '.join(line.split()) for line in changes} == expected
    assert last == 'Nothing was sent: add --yes to push.'


def test_dry_run_without_the_hub_says_that_the_folder_is_written(call, hub, run):
    with hub.unreachable():
        code, out, err = call()
    assert code == 2
    assert out.splitlines()[-1] == f'Wrote {run}/publication.'
    assert err.startswith('publish.py: error: ')
    assert (REPO in err, err.count('\n')) == (True, 1)
    assert tme.create_model(f'local-dir:{run}/publication', pretrained=True).policy is not None


def test_push_is_one_commit_that_loads_bit_by_bit(call, hub, run, images):
    code, out, err = call('--yes', '--message', 'First of all')
    assert (code, err) == (0, '')
    (commit,) = commits(hub)
    assert out.splitlines()[-1] == f'Pushed: {hub.url}/{REPO}/tree/{commit.commit_id}'
    assert commit.title == 'First of all'
    folder = run / 'publication'
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert {path: hub.content(file) for path, file in commit.files.items() if path != '.gitattributes'} == files
    assert_same_answers(run, images)
    assert tme.create_model(NAME, pretrained=True).hub_commit == commit.commit_id
    assert not hub.repositories[REPO].is_private
    assert hub.repositories[REPO].tags == {}


def test_second_push_of_the_same_run_sends_nothing(call, hub):
    assert call('--yes')[0] == 0
    (commit,) = commits(hub)
    hub.log.clear()
    code, out, _ = call('--yes')
    assert code == 0
    assert out.splitlines()[-1] == f'Nothing has changed: {hub.url}/{REPO}/tree/{commit.commit_id}'
    assert sent(hub) == []
    assert commits(hub) == [commit]
    code, out, _ = call()
    assert {line.split()[0] for line in out.splitlines()[4:-1]} == {'keep'}


def test_changed_exits_go_without_the_backbone(call, hub, run, images):
    assert call('--yes', '--tag', 'v1')[0] == 0
    before = hash_weights(run / 'best')
    assert set(uploaded(hub)) == set(before.values())
    hub.log.clear()
    after = change_exits(run)
    code, out, _ = call('--yes', '--tag', 'v2')
    assert code == 0
    actions = {line.split()[1]: line.split()[0] for line in out.splitlines()[4:-1]}
    assert actions == {
        'README.md': 'update',
        'args.yaml': 'keep',
        'assets/accuracy_vs_macs.png': 'keep',
        'config.json': 'keep',
        'exits.safetensors': 'update',
        'metrics.json': 'update',
        'model.safetensors': 'keep',
    }
    assert uploaded(hub) == [after['exits.safetensors']]
    first, second = commits(hub)
    assert second.parent == first.commit_id
    assert hub.repositories[REPO].tags == {'v1': first.commit_id, 'v2': second.commit_id}
    assert_same_answers(run, images, '@v2')
    old = tme.create_model(f'{NAME}@v1', pretrained=True)
    new = tme.create_model(NAME, pretrained=True)
    assert old.state_dict().keys() == new.state_dict().keys()
    changed = {key for key, value in old.state_dict().items() if not torch.equal(value, new.state_dict()[key])}
    assert changed == {f'exits.{name}' for name, _ in new.exits.named_parameters()}


def test_file_that_is_gone_from_the_run_is_gone_from_the_repository(call, hub, run):
    assert call('--yes')[0] == 0
    (run / 'accuracy_vs_macs.png').unlink()
    code, out, _ = call('--yes')
    assert code == 0
    assert '  delete assets/accuracy_vs_macs.png' in out
    assert 'assets/accuracy_vs_macs.png' not in commits(hub)[-1].files


def test_private_repository_is_private(call, hub):
    assert call('--yes', '--private')[0] == 0
    assert hub.repositories[REPO].is_private


def test_short_name_is_of_the_user(call, hub):
    code, out, _ = call('--yes', repo_id='net')
    assert code == 0
    assert f'{hub.url}/tester/net' in out
    assert list(hub.repositories) == ['tester/net']
    card = hub.repositories['tester/net'].find('main').files['README.md']
    assert b'hf-hub:tester/net' in hub.content(card)


def test_folder_and_validation_may_lie_elsewhere(call, hub, run, tmp_path):
    shutil.move(run / 'validation.json', tmp_path / 'numbers.json')
    code, _, err = call('--yes', '--folder', tmp_path / 'card', '--validation', tmp_path / 'numbers.json')
    assert (code, err) == (0, '')
    assert not (run / 'publication').exists()
    assert b'budget 90%' in hub.content(commits(hub)[0].files['README.md'])


def test_license_and_base_model_are_on_the_card(call, hub):
    flags = ('--license', 'mit', '--base-model', 'org/base', '--dataset-id', 'org/images', '--dataset-note', 'halved')
    assert call('--yes', *flags)[0] == 0
    head = yaml.safe_load(hub.content(commits(hub)[0].files['README.md']).decode().split('---\n')[1])
    assert (head['license'], head['base_model'], head['datasets']) == ('mit', 'org/base', ['org/images'])
    assert ', halved; one run' in hub.content(commits(hub)[0].files['README.md']).decode()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--license', 'mine-1.0'), "got 'mine-1.0'."),
        (('--folder', 'notes'), 'notes holds other files, such as a.txt: give another folder.'),
        (('--validation', 'nowhere.json'), 'nowhere.json'),
        (('--yes', '--tag', 'main'), "Tag 'main' is the name of a branch"),
        (('--yes', '--tag', 'a tag'), "begin with a letter or digit, got 'a tag'."),
    ],
    ids=['license', 'folder', 'validation', 'branch', 'tag'],
)
def test_wrong_flag_is_one_line_and_sends_nothing(flags, message, call, hub, run, monkeypatch):
    monkeypatch.chdir(run)
    (run / 'notes').mkdir()
    (run / 'notes/a.txt').write_text('mine')
    code, _, err = call(*flags)
    assert code == 2
    assert err.startswith('publish.py: error: ')
    assert err.count('\n') == 1
    assert message in err
    assert sent(hub) == []


@pytest.mark.parametrize(
    ('repo_id', 'message'),
    [('stranger/net', "'tester' may write to"), ('a/b/c', 'must have the form namespace/name')],
)
def test_name_that_cannot_be_pushed_to_is_known_before_any_work(repo_id, message, call, hub, run):
    code, _, err = call('--yes', repo_id=repo_id)
    assert (code, err.count('\n')) == (2, 1)
    assert message in err
    assert not (run / 'publication').exists()
    assert sent(hub) == []


def test_push_without_a_login_is_one_line(call, hub, run, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    code, _, err = call('--yes')
    assert (code, hub.log) == (2, [])
    assert err == f"publish.py: error: Pushing to '{REPO}' requires a token: log in with `hf auth login`.\n"
    assert not (run / 'publication').exists()
    assert call()[0] == 0  # what would be done can be seen without one


def test_run_that_is_not_there_is_one_line(call, hub, tmp_path):
    code, out, err = call(run=tmp_path / 'nowhere')
    assert (code, out) == (2, '')
    expected = f'{tmp_path}/nowhere is not a training run: it has no args.yaml.'
    assert err == f'publish.py: error: {expected}\n'
    assert not (tmp_path / 'nowhere').exists()


@pytest.mark.parametrize('state', ['down', 'failing', 'moved'])
def test_hub_that_fails_is_one_line_and_the_next_run_is_whole(state, call, hub, run, images):
    assert call('--yes')[0] == 0
    (first,) = commits(hub)
    change_exits(run)
    if state == 'down':
        with hub.unreachable():
            code, _, err = call('--yes')
        assert 'ConnectError' in err
    elif state == 'failing':
        hub.fail_next = [('/commit/', 403)]
        code, _, err = call('--yes')
        assert '403 Forbidden' in err
    else:

        def commit_meanwhile(method, path):
            if path.endswith('/commit/main'):
                hub.on_request = None
                hub.add(REPO, {'notes.txt': b'theirs'})

        hub.on_request = commit_meanwhile
        code, _, err = call('--yes')
        assert '412 Precondition Failed' in err
    assert (code, err.count('\n')) == (2, 1)
    if state != 'moved':
        assert hub.repositories[REPO].branches['main'] == first.commit_id
    assert call('--yes')[0] == 0
    assert_same_answers(run, images)
    assert ('notes.txt' in hub.repositories[REPO].find('main').files) == (state == 'moved')


@pytest.mark.hub
def test_killed_push_leaves_the_old_model_and_the_next_one_is_whole(call, hub, run, images, tmp_path):
    assert call('--yes')[0] == 0
    (first,) = commits(hub)
    old = shutil.copytree(run, tmp_path / 'old')
    model = enliven(tme.create_model(f'local-dir:{run}/best', pretrained=True))  # backbone and exits change
    tme.save_pretrained(model, run / 'best')
    for name in ('results.json', 'validation.json'):
        edit(run / name, weights=hash_weights(run / 'best'))
    uploads = []

    def kill_at_second_upload(method, path):
        if method == 'PUT':
            uploads.append(path)
            if len(uploads) == 2:
                child.kill()

    hub.on_request = kill_at_second_upload
    command = [sys.executable, SCRIPT, run, REPO, '--yes']
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    _, errors = child.communicate(timeout=200)
    hub.on_request = None
    assert (child.returncode, len(uploads)) == (-9, 2), errors.decode()
    assert hub.repositories[REPO].branches == {'main': first.commit_id}
    assert_same_answers(old, images)
    code, out, _ = call('--yes')
    assert (code, len(commits(hub))) == (0, 2)
    assert_same_answers(run, images)
    assert_same_answers(old, images, f'@{first.commit_id}')


@pytest.mark.hub
def test_whole_way_over_xet(hub, run, tmp_path, images):
    model = tme.create_model(f'local-dir:{run}/best', pretrained=True).eval()
    with torch.inference_mode():
        tensors = {str(idx): logits for idx, logits in enumerate(model(images, exits=True).logits)}
    safetensors.torch.save_file({**tensors, 'images': images}, tmp_path / 'expected.safetensors')
    env = {name: value for name, value in os.environ.items() if name != 'HF_HUB_DISABLE_XET'}
    env['HF_XET_XORB_COMPRESSION_POLICY'] = 'none'
    child = Path(__file__).parents[1] / 'hub_server/round_trip.py'
    command = [sys.executable, child, SCRIPT, run, REPO, tmp_path / 'expected.safetensors']
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    names = {'README.md', 'args.yaml', 'assets/accuracy_vs_macs.png', 'config.json', 'metrics.json'}
    assert set(seen['files']) - {'.gitattributes'} == names | {'model.safetensors', 'exits.safetensors'}
    assert seen['is_equal'] == [True, True, True]
    assert seen['is_plain_equal'] is True
    assert seen['commit'] == commits(hub)[-1].commit_id
    assert [commit.commit_id for commit in commits(hub)] == [seen['commit']]
    paths = [(entry.method, entry.path) for entry in hub.log]
    sizes = [entry.size for entry in hub.log if entry.method == 'POST' and '/xorbs/' in entry.path]
    assert sum(sizes) > 1_000_000  # the weights of both files
    assert [path for method, path in paths if method == 'GET' and '/_xorb/' in path]
    assert [path for _, path in paths if '/_lfs/' in path or '/_cdn/' in path] == []


def test_folder_of_a_run_with_any_name_is_written_for_itself(publish, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.rename('my run')
    assert publish.main(['my run']) == 0
    card = Path('my run/publication/README.md').read_text()
    assert '# Model card for `my run`' in card
    assert "'local-dir:my run/publication'" in card


def test_without_a_repository_the_folder_is_written_for_itself(publish, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert publish.main([str(run), '--folder', 'nets/small']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'Wrote nets/small.'
    card = Path('nets/small/README.md').read_text()
    assert '# Model card for `small`' in card
    assert 'hf-hub:' not in card
    snippets = re.findall(r'^```python\n(.*?)^```$', card, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 3
    for snippet in snippets:
        assert snippet.count("'local-dir:nets/small'") == 1
        exec(snippet, {})
    assert publish.main([str(run), '--yes']) == 2
    assert '--yes requires a repository' in capsys.readouterr().err
