"""What comes back by `hf-hub:` names, from the Hub on this machine, is what was published."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import enliven
from huggingface_hub import constants

import timm_multiexit as tme
from timm_multiexit.checkpoints import source as sources
from timm_multiexit.cli import validate
from timm_multiexit.cli.build_model import create_static, create_train_model, model_kwargs
from timm_multiexit.cli.build_training import create_task
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.flags.validate_args import create_validate_parser
from timm_multiexit.publishing.push import push_to_hub

REPO = 'org/net'
NAME = f'hf-hub:{REPO}'
DATA_CONFIG = {'input_size': (3, 32, 32), 'mean': [0.1, 0.2, 0.3], 'crop_pct': 1.0}


@pytest.fixture(scope='module')
def net():
    """A calibrated model of five classes with lively weights and two exits."""
    torch.manual_seed(0)
    model = tme.create_model('test_resnet', exits=[1, 3], num_classes=5, input_size=(3, 32, 32))
    enliven(model).eval()
    images = torch.randn(40, 3, 32, 32)
    model.calibrate([(images, model(images).argmax(-1))], budget='92%')
    return model


@pytest.fixture
def published(hub, net):
    """The commit that has the network, tagged v1."""
    commit = push_to_hub(net, REPO, tag='v1', data_config=DATA_CONFIG).commit
    hub.log.clear()
    return commit


@pytest.fixture
def images():
    return torch.randn(12, 3, 32, 32)


@torch.no_grad()
def assert_same_answers(loaded, net, images):
    """Every classifier of the loaded model answers bit by bit as the published one."""
    assert loaded.exits.specs == net.exits.specs
    logits = loaded.eval()(images, exits=True).logits
    assert len(logits) == 3
    for one, expected in zip(logits, net(images, exits=True).logits):
        assert torch.equal(one, expected)


def asked(hub, pattern='', method=''):
    """The requests whose path has the pattern."""
    return [entry for entry in hub.log if re.search(pattern, entry.path) and re.search(method, entry.method)]


def refused(name, **kwargs):
    """The line that a request ends with."""
    with pytest.raises(tme.MultiExitError) as caught:
        tme.create_model(name, **kwargs)
    line = str(caught.value)
    assert '\n' not in line
    return line


def run_child(source, *argv):
    result = subprocess.run([sys.executable, '-c', source, *map(str, argv)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_published_model_answers_bit_by_bit_as_before(published, net, images):
    loaded = tme.create_model(NAME, pretrained=True)
    assert_same_answers(loaded, net, images)
    assert (loaded.policy, loaded.budgets) == (net.policy, net.budgets)
    for how in ({'budget': '92%'}, {}, {'threshold': 0.5}):
        one, expected = loaded.infer(images, **how), net.infer(images, **how)
        assert torch.equal(one.logits, expected.logits)
        assert torch.equal(one.exit_idx, expected.exit_idx)
    assert len(set(net.infer(images, budget='92%').exit_idx.tolist())) > 1  # or equality would mean little
    assert loaded.hub_commit == published
    assert loaded.pretrained_cfg['hf_hub_id'] == f'{REPO}@{published}'
    assert timm.data.resolve_model_data_config(loaded)['mean'] == DATA_CONFIG['mean']


def test_plain_timm_has_the_main_network(published, net, images):
    plain = timm.create_model(NAME, pretrained=True).eval()
    assert type(plain) is type(net.backbone)
    assert plain.state_dict().keys() == net.backbone.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(images), net(images))
    config = timm.data.resolve_model_data_config(plain)
    assert {name: config[name] for name in DATA_CONFIG} == DATA_CONFIG


def test_timm_extracts_features_and_tme_says_that_it_does_not(published, net, images):
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        assert torch.equal(features(images)[-1], net.backbone.forward_features(images))
    assert 'features_only has no classifier' in refused(NAME, pretrained=True, features_only=True)


@pytest.mark.parametrize('revision', ['tag', 'sha', 'main', None])
def test_revision_gives_the_model_of_that_time(published, net, hub, images, revision):
    later = enliven(tme.create_model('test_resnet', exits=[2], num_classes=7))
    second = push_to_hub(later, REPO).commit
    name = {'tag': f'{NAME}@v1', 'sha': f'{NAME}@{published}', 'main': f'{NAME}@main', None: NAME}[revision]
    loaded = tme.create_model(name, pretrained=True)
    if revision in ('tag', 'sha'):
        assert loaded.hub_commit == published
        assert_same_answers(loaded, net, images)
    else:
        assert loaded.hub_commit == second
        assert (loaded.num_classes, len(loaded.exits), loaded.policy) == (7, 1, None)


def test_unknown_revision_is_one_line_and_no_file(published, hub):
    line = refused(f'{NAME}@v9', pretrained=True)
    assert line == "'org/net' has no revision 'v9': give one of its branches, tags or commits."
    assert {entry.status for entry in hub.log} == {404}


def test_old_alias_of_timm_means_the_hub(published, net, images):
    assert_same_answers(tme.create_model(f'hf_hub:{REPO}@v1', pretrained=True), net, images)


def test_other_class_count_keeps_all_but_the_classifiers(published, net):
    loaded = tme.create_model(NAME, pretrained=True, num_classes=3).eval()
    assert [logits.shape[1] for logits in loaded(torch.randn(1, 3, 32, 32), exits=True).logits] == [3, 3, 3]
    assert (loaded.policy, loaded.budgets) == (None, None)
    own, expected = loaded.state_dict(), net.state_dict()
    changed = {key for key in own if own[key].shape != expected[key].shape or not torch.equal(own[key], expected[key])}
    assert changed == {
        f'{part}fc.{kind}' for part in ('backbone.', 'exits.0.', 'exits.1.') for kind in ('weight', 'bias')
    }


def test_one_channel_is_the_sum_of_three(published, net):
    loaded = tme.create_model(NAME, pretrained=True, in_chans=1).eval()
    image = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        for one, expected in zip(loaded(image, exits=True).logits, net(image.expand(-1, 3, -1, -1), exits=True).logits):
            torch.testing.assert_close(one, expected)


def test_cache_folder_holds_the_files_and_no_other_does(published, net, images, tmp_path):
    loaded = tme.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'mine')
    assert_same_answers(loaded, net, images)
    names = {path.name for path in (tmp_path / 'mine').rglob(f'snapshots/{published}/*')}
    assert names == {'config.json', 'model.safetensors', 'exits.safetensors'}
    assert list(Path(constants.HF_HUB_CACHE).glob('*')) == []


def test_architecture_alone_asks_for_no_weights(published, net, hub):
    loaded = tme.create_model(NAME)
    assert loaded.exits.specs == net.exits.specs
    assert (loaded.num_classes, loaded.policy, loaded.hub_commit) == (5, None, published)
    assert not torch.equal(loaded.backbone.conv1[0].weight, net.backbone.conv1[0].weight)
    assert asked(hub, 'config.json')
    assert asked(hub, 'safetensors|_cdn') == []


@pytest.mark.parametrize('is_down', [False, True], ids=['offline', 'down'])
def test_without_a_network_the_cache_is_enough(published, net, hub, images, monkeypatch, is_down):
    tme.create_model(NAME, pretrained=True)
    hub.log.clear()
    if not is_down:
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with hub.unreachable():
        for revision in ('', f'@{published}'):
            loaded = tme.create_model(NAME + revision, pretrained=True)
            assert_same_answers(loaded, net, images)
            assert (loaded.hub_commit, loaded.budgets) == (published, net.budgets)
    assert hub.log == []


def test_without_a_network_an_empty_cache_is_one_line(published, hub, monkeypatch):
    with hub.unreachable():
        assert 'failed for' in refused(NAME, pretrained=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    line = refused(NAME, pretrained=True)
    assert 'HF_HUB_OFFLINE is set' in line
    assert "the cache has no config.json of 'org/net' at 'main'" in line
    assert hub.log == []


def test_cache_with_the_configuration_alone_is_one_line(published, hub):
    tme.create_model(NAME)
    with hub.unreachable():
        tme.create_model(NAME)
        assert "the cache has no model.safetensors of 'org/net'" in refused(NAME, pretrained=True)


def test_cache_that_keeps_large_files_in_one_store_is_read(published, net, hub, images):
    """As the client does with Xet: blobs of a repository are links into a folder that all repositories share."""
    tme.create_model(NAME, pretrained=True)
    cache = Path(constants.HF_HUB_CACHE)
    large = [path for path in cache.glob('models--org--net/blobs/*') if len(path.name) == 64]
    assert len(large) == 2
    for path in large:
        store = cache / 'blobs' / path.name[:2]
        store.mkdir(parents=True)
        path.rename(store / path.name)
        path.symlink_to(f'../../blobs/{path.name[:2]}/{path.name}')
    with hub.unreachable():
        assert_same_answers(tme.create_model(NAME, pretrained=True), net, images)


@pytest.mark.parametrize('moment', ['model.safetensors', 'exits.safetensors'])
def test_push_in_between_gives_the_old_model_whole(published, net, hub, images, moment):
    later = enliven(tme.create_model('test_resnet', exits=[1, 3], num_classes=5, input_size=(3, 32, 32)))

    def push_meanwhile(method, path):
        if path.endswith(moment) and 'resolve' in path:
            hub.on_request = None
            push_to_hub(later, REPO)

    hub.on_request = push_meanwhile
    loaded = tme.create_model(NAME, pretrained=True)
    assert hub.on_request is None
    assert hub.repositories[REPO].branches['main'] != published
    assert loaded.hub_commit == published
    assert_same_answers(loaded, net, images)
    assert_same_answers(tme.create_model(NAME, pretrained=True), later.eval(), images)


def plain_files(tmp_path, model):
    """What timm publishes, as path -> bytes."""
    timm.models.save_for_hf(model, tmp_path / 'plain', safe_serialization=True)
    return {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()}


def test_repository_of_plain_timm_gets_fresh_exits_with_a_warning(hub, make_backbone, tmp_path, images, caplog):
    model = make_backbone(num_classes=5).eval()
    commit = hub.add(REPO, plain_files(tmp_path, model))
    loaded = tme.create_model(NAME, pretrained=True).eval()
    assert [spec.module for spec in loaded.exits.specs] == ['layer1.0', 'layer2.0', 'layer3.0']
    assert [record.message for record in caplog.records if 'not its exits' in record.message] == [
        'hf-hub:org/net is trained, but not its exits (3): train them before use.'
    ]
    assert asked(hub, 'exits.safetensors') == []
    assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg['hf_hub_id'] == f'{REPO}@{commit}'


def test_exits_that_the_caller_names_replace_the_published_ones(published, net, hub, images, caplog):
    loaded = tme.create_model(NAME, pretrained=True, exits=['layer2'], head='linear').eval()
    assert [(spec.module, spec.head) for spec in loaded.exits.specs] == [('layer2.0', 'linear')]
    assert (loaded.policy, loaded.budgets) == (None, None)
    assert torch.equal(loaded(images), net(images))
    assert len([record for record in caplog.records if 'not its exits (1)' in record.message]) == 1


def test_repository_of_pickles_alone_is_refused_and_they_are_not_asked_for(hub, make_backbone, tmp_path):
    files = plain_files(tmp_path, make_backbone(num_classes=5))
    weights = safetensors.torch.load(files.pop('model.safetensors'))
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    commit = hub.add(REPO, {**files, 'pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes()})
    line = refused(NAME, pretrained=True)
    assert line.startswith(f"'org/net' has no model.safetensors at revision '{commit}': see ")
    assert asked(hub, r'\.bin|_cdn') == []


def test_pickle_beside_safetensors_is_not_touched(published, net, hub, images):
    hub.add(REPO, {'pytorch_model.bin': b'a trap', 'exits.pt': b'another'})
    assert_same_answers(tme.create_model(NAME, pretrained=True), net, images)
    assert asked(hub, r'\.bin|\.pt$') == []
    assert len(asked(hub, '_cdn', 'GET')) == 2  # backbone and exits


def test_backbone_of_a_timm_name_is_that_of_timm():
    torch.manual_seed(1)
    own = sources.create_backbone('test_resnet', num_classes=3, drop_rate=0.1)
    torch.manual_seed(1)
    expected = timm.create_model('test_resnet', num_classes=3, drop_rate=0.1)
    assert type(own) is type(expected)
    assert own.drop_rate == 0.1
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in own.state_dict().items())


def test_backbone_of_a_repository_is_plain_timm(published, net, hub, images):
    backbone = sources.create_backbone(NAME, pretrained=True).eval()
    assert type(backbone) is type(net.backbone)
    assert torch.equal(backbone(images), net(images))
    assert backbone.pretrained_cfg['hf_hub_id'] == f'{REPO}@{published}'


@pytest.mark.parametrize('name', ['test_resnet', NAME], ids=['registry', 'hub'])
def test_name_of_a_source_means_its_commit_from_then_on(published, name):
    source = sources.find_source(name)
    if name == NAME:
        assert source.name == f'{NAME}@{published}'
        again = sources.find_source(source.name)
        assert (again.repo_id, again.commit) == (REPO, published)
    else:
        assert source is None


@pytest.mark.parametrize('exits', [None, [1]], ids=['own', 'others'])
def test_source_makes_the_model_of_its_name_and_its_config_is_read_once(published, monkeypatch, images, exits):
    reads = []
    read = sources.read_model_config
    monkeypatch.setattr(
        sources, 'read_model_config', lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs)
    )
    source = sources.find_source(NAME)
    assert sources.find_source(source) is source
    torch.manual_seed(1)
    model = tme.create_model(source, pretrained=True, exits=exits).eval()
    assert (str(source), source.has_exits, len(reads)) == (f'{NAME}@{published}', True, 1)
    torch.manual_seed(1)
    expected = tme.create_model(NAME, pretrained=True, exits=exits).eval()
    assert all(map(torch.equal, model(images, exits=True).logits, expected(images, exits=True).logits))
    assert tme.exit_points(source) == tme.exit_points(NAME)


def test_trained_weights_of_the_registry_come_with_fresh_exits(hub, make_backbone, images, caplog):
    model = make_backbone(num_classes=1000).eval()
    hub.add('timm/test_resnet.r160_in1k', {'model.safetensors': safetensors.torch.save(model.state_dict())})
    loaded = tme.create_model('test_resnet', pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))
    assert [record.message for record in caplog.records if 'not its exits' in record.message] != []


def test_model_from_the_hub_is_published_again_elsewhere(published, net, images):
    loaded = tme.create_model(NAME, pretrained=True)
    push_to_hub(loaded, 'org/copy')
    copy = tme.create_model('hf-hub:org/copy', pretrained=True)
    assert_same_answers(copy, net, images)
    assert (copy.policy, copy.budgets) == (net.policy, net.budgets)


def train_args(*flags):
    return parse_train_args(['--data-dir', 'images', '--num-classes', '5', '--img-size', '32', *flags])


def with_source(*flags):
    """Return the arguments and the source of their model."""
    args = train_args(*flags)
    return args, sources.find_source(args.model, **args.model_kwargs)


def learn_from(name):
    """Make the task of a small network with a teacher of this name."""
    args = train_args('--model', 'test_resnet', '--kd-model-name', name)
    return create_task(args, create_train_model(args, None, num_classes=5), torch.device('cpu'))


USES = {
    'create_model': lambda name: tme.create_model(name, pretrained=True),
    'other exits': lambda name: tme.create_model(name, pretrained=True, exits=[1]),
    'create_backbone': lambda name: sources.create_backbone(name, pretrained=True),
    'exit_points': tme.exit_points,
    'compare': lambda name: create_static(name, num_classes=5),
    'teacher': learn_from,
    'model_kwargs': lambda name: model_kwargs(*with_source('--model', name)),
    'train': lambda name: create_train_model(*with_source('--model', name, '--pretrained', '--eed'), num_classes=5),
    'validate': lambda name: validate.create_evaluated_model(create_validate_parser().parse_args(['--model', name])),
}


@pytest.mark.parametrize('use', USES.values(), ids=USES)
@pytest.mark.parametrize('place', ['hub', 'folder'])
def test_timm_reads_no_folder_and_no_repository_itself(published, hub, net, place, use, tmp_path, monkeypatch):
    """It takes what they say for its own: an unknown field is a TypeError there, and `model_args` set any keyword."""
    tme.save_pretrained(net, tmp_path / 'net')
    config = json.loads((tmp_path / 'net/config.json').read_text())
    config['pretrained_cfg']['a_field_of_later'] = 1
    (tmp_path / 'net/config.json').write_text(json.dumps(config))
    hub.add(REPO, {'config.json': (tmp_path / 'net/config.json').read_bytes()})
    for name in ('load_model_config_from_hf', 'load_model_config_from_path'):
        monkeypatch.setattr(f'timm.models._factory.{name}', None)
    name = NAME if place == 'hub' else f'local-dir:{tmp_path / "net"}'
    assert use(name) is not None
    config['model_args'] = {'pretrained_strict': False}
    (tmp_path / 'net/config.json').write_text(json.dumps(config))
    hub.add(REPO, {'config.json': (tmp_path / 'net/config.json').read_bytes()})
    with pytest.raises(tme.MultiExitError, match='pretrained_strict'):
        use(name)


NEEDS_IMPORT = """
import sys, timm, torch
name, images, expected = sys.argv[1:]
try:
    timm.create_model(name, pretrained=True)
except RuntimeError as error:
    assert 'Unknown model (cifar_resnet18)' in str(error), error
else:
    raise SystemExit('timm knew the network by itself')
import timm_multiexit
model = timm.create_model(name, pretrained=True).eval()
with torch.inference_mode():
    print(torch.equal(model(torch.load(images)), torch.load(expected)))
"""


@pytest.mark.hub
def test_network_of_the_paper_is_known_to_timm_after_our_import(hub, tmp_path):
    model = enliven(tme.create_model('cifar_resnet18', num_classes=5)).eval()
    result = push_to_hub(model, REPO)
    assert (
        'import timm_multiexit  # registers'
        in hub.content(hub.repositories[REPO].find(result.commit).files['README.md']).decode()
    )
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / 'images')
    with torch.inference_mode():
        torch.save(model(images), tmp_path / 'expected')
    assert run_child(NEEDS_IMPORT, NAME, tmp_path / 'images', tmp_path / 'expected') == 'True\n'


OFFLINE = """
import sys
import timm_multiexit as tme
name, other_cache = sys.argv[1:]
print(tme.create_model(name, pretrained=True).hub_commit)
try:
    tme.create_model(name, pretrained=True, cache_dir=other_cache)
except tme.MultiExitError as error:
    print(error)
"""


@pytest.mark.hub
def test_switch_of_the_environment_takes_a_process_off_the_network(published, hub, monkeypatch, tmp_path):
    tme.create_model(NAME, pretrained=True)
    hub.log.clear()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    commit, line = run_child(OFFLINE, NAME, tmp_path / 'empty').splitlines()
    assert commit == published
    assert 'HF_HUB_OFFLINE is set' in line
    assert "the cache has no config.json of 'org/net' at 'main'" in line
    assert hub.log == []
