"""A run is published as what it is: the folder, its configuration, its numbers, its license and its card."""

import json
import re
import shutil

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import enliven
from helpers.runs import FLAGS, PREPARATION, REPO, ROOT, edit, make_run, measure_run
from huggingface_hub import parse_eval_result_entries
from timm.data import resolve_data_config

import timm_multiexit as tme
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.evaluation.stamp import describe_preparation
from timm_multiexit.hub_client.client import push_folder
from timm_multiexit.hub_client.files import EVAL_RESULTS
from timm_multiexit.publishing.card import write_eval_results
from timm_multiexit.publishing.licenses import PublicationInfo
from timm_multiexit.publishing.publication import write_publication
from timm_multiexit.publishing.push import push_to_hub
from timm_multiexit.publishing.results import add_row_keys


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run, trained and measured once; nobody changes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('trained')
    return measure_run(make_run(folder, *PREPARATION.split()))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run to change, as small as publishing allows."""
    return shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('*.pth.tar'))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'publication'


def replace_best(run, model):
    """Put another network into a run, as if it had been trained, with results of its weights."""
    shutil.rmtree(run / 'best')
    (run / 'validation.json').unlink(missing_ok=True)
    tme.save_pretrained(model, run / 'best', data_config={'input_size': (3, 32, 32)})
    config = read(run / 'best', 'config.json')['pretrained_cfg']
    preparation = describe_preparation(resolve_data_config(pretrained_cfg=config))
    edit(run / 'results.json', weights=hash_weights(run / 'best'), preparation=preparation)


def set_origin(run, base=None, license=None):
    """Change what the weights of a run started from."""
    edit(run / 'args.yaml', origin={'base': base, 'license': license})


def read(folder, name):
    return json.loads((folder / name).read_text())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def refused(run, folder, **kwargs):
    """The line that publishing ends with."""
    with pytest.raises(tme.MultiExitError) as caught:
        write_publication(run, folder, REPO, **kwargs)
    line = str(caught.value)
    assert '\n' not in line
    return line


def test_folder_holds_the_network_and_its_papers(run, folder):
    write_publication(run, folder, REPO)
    files = contents(folder)
    papers = {'README.md', 'config.json', 'args.yaml', 'metrics.json', 'assets/accuracy_vs_macs.png'}
    assert files.keys() == papers | {'model.safetensors', 'exits.safetensors'}
    for name in ('model.safetensors', 'exits.safetensors'):
        assert files[name] == (run / 'best' / name).read_bytes()
    assert files['assets/accuracy_vs_macs.png'] == (run / 'accuracy_vs_macs.png').read_bytes()
    assert sorted(path.name for path in folder.parent.iterdir()) == ['publication', 'run']


def test_configuration_says_how_the_network_was_trained(run, folder):
    write_publication(run, folder, REPO)
    config, old = read(folder, 'config.json'), read(run / 'best', 'config.json')
    assert config.pop('pretrained_cfg') == {
        'tag': 'eed_images',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2104.00299',
        'num_classes': 2,
        'input_size': [3, 32, 32],
        'fixed_input_size': False,
        'mean': [0.4, 0.5, 0.6],
        'std': [0.2, 0.3, 0.4],
        'crop_pct': 0.9,
        'crop_mode': 'center',
        'interpolation': 'bicubic',
        'custom_load': False,
        'pool_size': None,
        'first_conv': 'conv1.0',
        'classifier': 'fc',
    }
    del old['pretrained_cfg']
    assert old['multiexit'].pop('origin') == {'base': None, 'license': None}
    assert config['multiexit'].pop('origin') == {'base': REPO, 'license': 'apache-2.0'}
    assert config == old
    assert config['label_names'] == ['cat', 'dog']
    assert {'policy', 'budgets', 'exits'} <= config['multiexit'].keys()
    # It is what timm then prepares images with, also where it would use a larger size for testing.
    plain = timm.create_model(f'local-dir:{folder}', pretrained=True)
    data_config = timm.data.resolve_model_data_config(plain, use_test_size=True)
    assert (list(data_config['input_size']), data_config['crop_pct'], data_config['std']) == (
        [3, 32, 32],
        0.9,
        [0.2, 0.3, 0.4],
    )


def test_nothing_of_the_base_is_said_of_the_new_weights(run, folder):
    # a1_in1k of timm is tested at 288 px with crop 1, is of a paper of its own, and has 1,000 classes
    model = tme.create_model('resnet18.a1_in1k', exits=1, num_classes=2, input_size=(3, 32, 32))
    base = dict(model.pretrained_cfg)
    assert (base['test_input_size'], base['test_crop_pct'], base['license']) == ((3, 288, 288), 1.0, 'apache-2.0')
    replace_best(run, model)
    set_origin(run, 'timm/resnet18.a1_in1k', 'apache-2.0')
    metrics = write_publication(run, folder, REPO)
    cfg = read(folder, 'config.json')['pretrained_cfg']
    assert not {'test_input_size', 'test_crop_pct', 'origin_url', 'description'} & {
        name for name, value in cfg.items() if value is not None
    }
    assert (cfg['tag'], cfg['paper_ids'], cfg['num_classes']) == ('eed_images', 'arXiv:2104.00299', 2)
    plain = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert timm.data.resolve_model_data_config(plain, use_test_size=True)['input_size'] == (3, 32, 32)
    assert (metrics['base_model'], metrics['license']['id']) == ('timm/resnet18.a1_in1k', 'apache-2.0')


def test_text_files_have_no_path_of_this_machine(trained, run, folder):
    assert str(trained.parents[1]) in (run / 'args.yaml').read_text()
    assert str(trained.parents[1]) in (run / 'results.json').read_text()
    write_publication(run, folder, REPO)
    for name in ('README.md', 'config.json', 'args.yaml', 'metrics.json'):
        text = (folder / name).read_text()
        assert [
            word for word in (str(trained.parents[1]), str(folder.parent), str(ROOT), '/tmp/') if word in text
        ] == []
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (args['data_dir'], args['model'], args['lr']) == ('images', 'test_resnet', 0.002)
    # Whoever repeats it writes elsewhere, and does not publish it.
    assert not {'output', 'experiment', 'resume', 'push_to_hub', 'hub_private', 'hub_license'} & args.keys()
    expected = f'train.py {FLAGS} {PREPARATION} --data-dir images --output out --experiment run'
    assert read(folder, 'metrics.json')['training']['command'] == expected


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['--data-dir=/home/me/set'], '--data-dir=set'),
        (['--config', '~/recipe.yaml'], '--config recipe.yaml'),
        (['--initial-checkpoint=https://me.org/a/net.pth?sig=1'], '--initial-checkpoint=net.pth'),
        (['--initial-checkpoint', 'hf://o/n=1/net.pth'], '--initial-checkpoint net.pth'),
        (['--kd-model', 'local-dir:/home/me/net'], '--kd-model local-dir:net'),
        (['--model=local-dir:/home/me/net'], '--model=local-dir:net'),
        (['--model-kwargs', 'file=/home/me/a.txt'], '--model-kwargs file=a.txt'),
        (['--data-dir', 'data/set'], '--data-dir data/set'),
        (['--experiment', 'a run'], "--experiment 'a run'"),
    ],
    ids=['equals', 'home', 'address-equals', 'address', 'folder', 'folder-equals', 'keyword', 'relative', 'quoted'],
)
def test_command_has_the_last_part_of_paths(words, expected, run, folder):
    edit(run / 'results.json', command=['/home/me/bin/train.py', *words])
    metrics = write_publication(run, folder, REPO)
    assert metrics['training']['command'] == f'train.py {expected}'


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('/home/me/a.txt', 'a.txt'),
        (['/home/me/a.txt', 'b'], ['a.txt', 'b']),
        ({'file': '/home/me/a.txt', 'depth': 3}, {'file': 'a.txt', 'depth': 3}),
        ('local-dir:/home/me/net', 'local-dir:net'),
        ('resnet10t:/home/me/last.pth.tar', 'resnet10t:last.pth.tar'),
        ('/home/me/a:b/last.pth.tar', 'last.pth.tar'),
        ('hf-hub:org/net@v1', 'hf-hub:org/net@v1'),
        ('https://me:secret@host.org/a/net.pth?X-Amz-Signature=1', 'net.pth'),
        ('file:///home/me/net.pth', 'net.pth'),
        ('s3://my-bucket/me/net.pth', 'net.pth'),
        ('data/set', 'data/set'),
    ],
    ids=['text', 'list', 'keywords', 'folder', 'checkpoint', 'colon', 'hub', 'address', 'file', 'bucket', 'relative'],
)
def test_arguments_have_the_last_part_of_paths(value, expected, run, folder):
    edit(run / 'args.yaml', class_map=value)
    write_publication(run, folder, REPO)
    assert yaml.safe_load((folder / 'args.yaml').read_text())['class_map'] == expected


def test_compared_networks_have_the_last_part_of_paths(run, folder):
    row = {'image, px': 32, 'params': 5000, 'GMACs': 0.01, 'top-1': 50.0, 'top-5': 90.0}
    names = ['resnet10t:/home/me/last.pth.tar', 'local-dir:/home/me/small', 'resnet18.a1_in1k']
    edit(run / 'validation.json', compare=[{'static model': name, **row} for name in names])
    metrics = write_publication(run, folder, REPO)
    published = ['resnet10t:last.pth.tar', 'local-dir:small', 'resnet18.a1_in1k']
    assert [row['static model'] for row in metrics['compare']] == published
    assert '/home/me' not in (folder / 'README.md').read_text()


def test_same_run_gives_the_same_bytes(run, folder, tmp_path):
    write_publication(run, folder, REPO)
    first = contents(folder)
    write_publication(run, folder, REPO)
    assert contents(folder) == first
    shutil.copytree(run, tmp_path / 'moved')
    write_publication(tmp_path / 'moved', tmp_path / 'other', REPO)
    assert contents(tmp_path / 'other') == first


def test_numbers_are_those_that_were_measured(run, folder):
    metrics = write_publication(run, folder, REPO, info=PublicationInfo(dataset_id='org/images'))
    assert metrics == read(folder, 'metrics.json')
    validation, results = (add_row_keys(read(run, name)) for name in ('validation.json', 'results.json'))
    for name in ('rows', 'timing', 'latency', 'overthinking', 'curve', 'calibrated_on', 'precision'):
        assert metrics[name] == validation[name], name
    *others, budget = validation['dynamic']
    assert metrics['dynamic'] == [*others, {**budget, 'is_default': True}]
    assert [row['policy'] for row in metrics['dynamic']] == ['main', 'all exits', 'budget 90%']
    assert metrics['rows'] == results['rows']  # measured twice, the same
    assert metrics['dataset'] == {'name': 'images', 'hub_id': 'org/images', 'split': 'validation', 'num_samples': 11}
    assert metrics['epoch'] == {
        'best': 1,
        'epochs': 1,
        'chosen_by': 'top1',
        'chosen_on': 'validation',
        'is_reported_split': True,
    }
    assert (metrics['architecture'], metrics['num_classes'], metrics['input_size']) == ('test_resnet', 2, [3, 32, 32])
    assert metrics['weights'] == hash_weights(folder)
    assert metrics['has_picture'] is True
    assert metrics['needs_import'] is False
    names = ('hardware', 'threads', 'versions', 'commit')
    assert metrics['environment'] == {name: validation[name] for name in names}
    training = metrics['training']
    assert training['environment'] == {name: results[name] for name in names}
    assert (training['seed'], training['epochs'], training['exit_loss'], training['recipe']) == (42, 1, 'eed', None)


def test_without_validation_the_numbers_of_training_count(run, folder):
    (run / 'validation.json').unlink()
    metrics = write_publication(run, folder, REPO)
    assert metrics['rows'] == add_row_keys(read(run, 'results.json'))['rows']
    assert not {'dynamic', 'latency', 'curve'} & metrics.keys()
    # The picture is of what validate.py measured, which is not published.
    assert metrics['has_picture'] is False
    assert not (folder / 'assets').exists()
    assert 'assets' not in (folder / 'README.md').read_text()


def test_validation_may_lie_elsewhere_with_its_picture(run, folder, tmp_path):
    (tmp_path / 'other').mkdir()
    for name in ('validation.json', 'accuracy_vs_macs.png'):
        shutil.move(run / name, tmp_path / 'other' / name)
    metrics = write_publication(run, folder, REPO, validation=tmp_path / 'other/validation.json')
    assert 'dynamic' in metrics
    assert metrics['has_picture'] is True


def test_architecture_that_timm_does_not_have_is_imported_first(run, folder):
    replace_best(run, tme.create_model('cifar_resnet18', num_classes=2))
    metrics = write_publication(run, folder, REPO)
    assert metrics['needs_import'] is True
    assert 'import timm_multiexit  # registers the architecture' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('name', ['validation.json', 'results.json'])
def test_results_of_other_weights_are_refused(name, run, folder):
    if name == 'results.json':
        (run / 'validation.json').unlink()
    weights = run / 'best/exits.safetensors'
    tensors = safetensors.torch.load_file(weights)
    tensors['exits.0.fc.bias'] += 1
    safetensors.torch.save_file(tensors, weights)
    line = refused(run, folder)
    assert line.startswith(
        f'{run / name} has results of other weights than those of {run}/best: evaluate it by timm-multiexit validate'
    )
    assert not folder.exists()


def test_policies_of_other_thresholds_are_refused(run, folder):
    rows = read(run, 'validation.json')['dynamic']
    edit(run / 'validation.json', dynamic=[*rows[:2], rows[2] | {'thresholds': [0.123, 0.456]}])
    assert refused(run, folder) == (
        f"budget 90% of {run / 'validation.json'} has other thresholds than the network's: run timm-multiexit validate"
        ' again with --save-policy.'
    )
    own = {'policy': "the model's own", 'kind': 'own', 'budget': None, 'combine': 'mean'}
    edit(run / 'validation.json', dynamic=[*rows[:2], rows[2] | own])
    assert refused(run, folder).startswith(f"the model's own of {run / 'validation.json'} has other thresholds")
    # What is not called by a name that loading knows is as it was measured.
    given = {'policy': 'threshold 0.5', 'kind': 'threshold', 'budget': None, 'thresholds': [0.5, 0.5]}
    edit(run / 'validation.json', dynamic=[*rows[:2], rows[2] | given])
    assert not any('is_default' in row for row in write_publication(run, folder, REPO)['dynamic'])


@pytest.mark.parametrize('name', ['validation.json', 'results.json'])
def test_numbers_of_other_images_are_refused(name, run, folder):
    if name == 'results.json':
        (run / 'validation.json').unlink()
    edit(run / name, preparation=read(run, name)['preparation'] | {'crop_pct': 1.0})
    assert refused(run, folder) == (
        f'crop_pct of the images in {run / name} must be 0.9, as in the network, got 1.0: measure again without its flag.'
    )


def test_results_that_do_not_say_how_images_were_prepared_are_refused(run, folder):
    results = read(run, 'validation.json')
    del results['preparation']
    (run / 'validation.json').write_text(json.dumps(results))
    line = refused(run, folder)
    assert line.startswith(f'{run}/validation.json does not say how its images were prepared: evaluate it by')


def test_grey_images_are_published_as_they_were_measured(tmp_path, folder):
    metrics = write_publication(make_run(tmp_path, '--in-chans', '1'), folder, REPO)
    assert metrics['input_size'] == [1, 32, 32]
    assert tme.create_model(f'local-dir:{folder}', pretrained=True).in_chans == 1


def test_picture_may_lie_elsewhere(run, folder, tmp_path):
    (tmp_path / 'pictures').mkdir()
    shutil.move(run / 'accuracy_vs_macs.png', tmp_path / 'pictures/net.png')
    picture = read(run, 'validation.json')['picture']
    edit(run / 'validation.json', picture=picture | {'path': '../pictures/net.png'})
    assert write_publication(run, folder, REPO)['has_picture'] is True


def test_picture_of_another_evaluation_is_refused(run, folder):
    picture = run / 'accuracy_vs_macs.png'
    picture.write_bytes(picture.read_bytes() + b'0')
    assert refused(run, folder) == (
        f'{picture} is not the picture of {run / "validation.json"}: run timm-multiexit validate again, or remove it.'
    )
    picture.unlink()
    assert write_publication(run, folder, REPO)['has_picture'] is False


@pytest.mark.parametrize(
    ('split', 'dataset', 'is_reported'),
    [('val', 'images', True), ('validation', 'images', True), ('test', 'images', False), ('val', 'others', False)],
)
def test_epoch_chosen_on_the_reported_images_is_told_by_any_of_their_names(split, dataset, is_reported, run, folder):
    edit(run / 'validation.json', split=split, dataset=dataset)
    assert write_publication(run, folder, REPO)['epoch']['is_reported_split'] is is_reported


def test_run_that_stopped_early_says_how_many_epochs_it_had(tmp_path, folder):
    run = make_run(tmp_path, '--epochs', '3', '--stop-epoch', '1')
    metrics = write_publication(run, folder, REPO)
    assert (metrics['epoch']['best'], metrics['epoch']['epochs'], metrics['precision']) == (1, 1, 'float32')


def test_validation_that_is_not_there_is_refused(run, folder, tmp_path):
    assert refused(run, folder, validation=tmp_path / 'nosuch.json') == (
        f'{tmp_path}/nosuch.json does not exist: give a JSON file written by timm-multiexit validate --results-file.'
    )


@pytest.mark.parametrize(('field', 'name'), [('base_model', 'Base model'), ('dataset_id', 'Data set')])
def test_malformed_repository_is_refused(field, name, run, folder):
    assert refused(run, folder, info=PublicationInfo(**{field: 'org/sub/net'})) == (
        f"{name} must be the name of a repository, ORG/NAME, got 'org/sub/net'."
    )


def test_budgets_without_a_saved_policy_are_refused(run, folder):
    config = read(run / 'best', 'config.json')
    del config['multiexit']['budgets'], config['multiexit']['policy']
    (run / 'best/config.json').write_text(json.dumps(config))
    assert '--save-policy' in refused(run, folder)


@pytest.mark.parametrize(
    ('missing', 'message'),
    [
        ('args.yaml', 'is not a training run: it has no args.yaml'),
        ('best/config.json', 'config.json'),
        ('best/exits.safetensors', 'of other weights than'),
        ('results.json', 'results.json'),
    ],
)
def test_folder_that_is_no_whole_run_is_refused(missing, message, run, folder):
    (run / missing).unlink()
    assert message in refused(run, folder)
    assert not folder.exists()


def test_run_without_exits_is_refused(run, folder):
    replace_best(run, timm.create_model('test_resnet', num_classes=2))
    assert refused(run, folder) == f'{run} is a run without exits: publish it with timm.models.push_to_hf_hub.'


def test_folder_with_other_files_is_refused_and_untouched(run, folder):
    folder.mkdir()
    (folder / 'thesis.tex').write_text('mine')
    assert refused(run, folder) == f'{folder} holds other files, such as thesis.tex: give another folder.'
    assert contents(folder) == {'thesis.tex': b'mine'}


def test_refused_publication_leaves_the_earlier_one_whole(run, folder):
    write_publication(run, folder, REPO)
    before = contents(folder)
    set_origin(run, 'a file')
    assert 'look it up and give it by train --hub-license' in refused(run, folder)
    assert "or local-dir:folder/model, got 'hf-hub:net'" in refused_name(run, folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ['publication', 'run']


def refused_name(run, folder):
    with pytest.raises(tme.MultiExitError) as caught:
        write_publication(run, folder, 'net', info=PublicationInfo('mit'))
    return str(caught.value)


@pytest.mark.parametrize(
    ('origin', 'labels', 'base_model', 'license_id', 'note'),
    [
        ((), {}, None, 'apache-2.0', 'Trained from scratch; the license is the default'),
        ((), {'license': 'mit'}, None, 'mit', 'Trained from scratch; the license is chosen by the publisher.'),
        (
            ('timm/test_resnet.r160_in1k', 'apache-2.0'),
            {},
            'timm/test_resnet.r160_in1k',
            'apache-2.0',
            'That of the base weights (timm/test_resnet.r160_in1k).',
        ),
        (
            ('timm/resnet18.fb_swsl_ig1b_ft_in1k', 'cc-by-nc-4.0'),
            {},
            'timm/resnet18.fb_swsl_ig1b_ft_in1k',
            'cc-by-nc-4.0',
            'forbids commercial use',
        ),
        (
            ('a file',),
            {'license': 'mit'},
            None,
            'mit',
            'Chosen by the publisher; the license of the base weights (a file) is unknown.',
        ),
        (('a file',), {'license': 'mit', 'base_model': 'org/base'}, 'org/base', 'mit', '(org/base)'),
    ],
    ids=['scratch', 'asked', 'registry', 'non-commercial', 'file', 'named-base'],
)
def test_license_follows_from_what_training_started_from(origin, labels, base_model, license_id, note, run, folder):
    set_origin(run, *origin)
    metrics = write_publication(run, folder, REPO, info=PublicationInfo(**labels))
    assert (metrics['base_model'], metrics['license']['id']) == (base_model, license_id)
    assert note in metrics['license']['note']
    config = read(folder, 'config.json')
    assert config['pretrained_cfg']['license'] == license_id
    assert config['multiexit']['origin'] == {'base': REPO, 'license': license_id}
    head = yaml.safe_load((folder / 'README.md').read_text().split('---\n')[1])
    assert (head['license'], head.get('base_model')) == (license_id, base_model)


@pytest.mark.parametrize(
    ('origin', 'labels', 'message'),
    [
        (('a file',), {}, '(a file) is unknown: look it up and give it by train --hub-license'),
        (('a file',), {'base_model': 'org/base'}, '(org/base) is unknown'),
        (
            ('timm/resnet18.fb_swsl_ig1b_ft_in1k', 'cc-by-nc-4.0'),
            {'license': 'mit'},
            'License must be cc-by-nc-4.0, under which the base weights (timm/resnet18.fb_swsl',
        ),
        ((), {'license': 'mine-1.0'}, "got 'mine-1.0'"),
    ],
    ids=['file', 'named-base', 'non-commercial', 'unknown'],
)
def test_license_that_is_not_clear_is_refused(origin, labels, message, run, folder):
    set_origin(run, *origin)
    assert message in refused(run, folder, info=PublicationInfo(**labels))
    assert not folder.exists()


def test_arguments_of_timms_own_script_do_not_say_where_weights_are_from(run, folder):
    args = yaml.safe_load((run / 'args.yaml').read_text())
    del args['origin']
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    assert '(a file) is unknown' in refused(run, folder)


@pytest.mark.slow
def test_run_from_weights_of_the_registry_names_them(hub, tmp_path, folder):
    base = enliven(timm.create_model('test_resnet'))
    hub.add('timm/test_resnet.r160_in1k', {'model.safetensors': safetensors.torch.save(base.state_dict())})
    metrics = write_publication(make_run(tmp_path, '--pretrained'), folder, REPO)
    assert (metrics['base_model'], metrics['license']['id']) == ('timm/test_resnet.r160_in1k', 'apache-2.0')
    # What goes on from there says so too, and what goes on from that, though their flags do not.
    for epochs, before, name in ((2, 'run', 'second'), (3, 'second', 'third')):
        checkpoint = tmp_path / 'out' / before / 'last.pth.tar'
        more = ('--num-classes', '1000', '--epochs', epochs, '--resume', checkpoint)
        run = make_run(tmp_path, *more, name=name)
        assert yaml.safe_load((run / 'args.yaml').read_text())['pretrained'] is False
        assert write_publication(run, folder, REPO)['base_model'] == 'timm/test_resnet.r160_in1k'


def test_run_from_a_repository_takes_over_its_license(hub, tmp_path, folder):
    base = enliven(tme.create_model('test_resnet', exits=[1, 3], num_classes=4))
    commit = push_to_hub(base, 'org/base', license='cc-by-nc-4.0').commit
    run = make_run(tmp_path, '--model', 'hf-hub:org/base', '--pretrained')
    metrics = write_publication(run, folder, REPO)
    assert (metrics['base_model'], metrics['license']['id']) == ('org/base', 'cc-by-nc-4.0')
    assert yaml.safe_load((folder / 'args.yaml').read_text())['model'] == f'hf-hub:org/base@{commit}'


@pytest.mark.slow
def test_snippets_of_the_card_run_against_the_hub(hub, run, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = write_publication(run, folder, REPO)
    push_folder(folder, REPO)
    card = hub.content(hub.repositories[REPO].find('main').files['README.md']).decode()
    snippets = re.findall(r'^```python\n(.*?)^```$', card, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 3
    spaces = [{} for _ in snippets]
    for snippet, space in zip(snippets, spaces):
        assert 'hf-hub:org/net' in snippet
        exec(snippet, space)
    plain, every, onnx = spaces
    assert [tuple(logits.shape) for logits in every['outputs'].logits] == [(4, metrics['num_classes'])] * 3
    torch.testing.assert_close(every['early'], every['outputs'].logits[0])
    expected = every['model'].infer(every['images'], budget='90%')
    assert torch.equal(every['prediction'].logits, expected.logits)
    assert every['k'] == 2
    assert onnx['logits'].shape == (4, metrics['num_classes'])
    assert (tmp_path / 'net-onnx/runner.py').is_file()
    assert type(plain['model']) is timm.models.ResNet
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{expected.logits.argmax(-1)} {expected.exit_idx}'
    assert lines[-1] == '2 torch.Size([4, 2])'


def test_results_for_leaderboards_are_published_for_a_data_set_of_the_hub(hub, run, folder):
    write_publication(run, folder, REPO)
    assert not (folder / EVAL_RESULTS).exists()
    metrics = write_publication(run, folder, REPO, info=PublicationInfo(dataset_id='org/data'))
    push_folder(folder, REPO)
    content = hub.content(hub.repositories[REPO].find('main').files[EVAL_RESULTS])
    first, *others = parse_eval_result_entries(yaml.safe_load(content))
    main = next(row for row in metrics['rows'] if row['exit'] == 'main')
    assert (first.dataset_id, first.value) == ('org/data', main['top-1'])
    assert len(others) >= len(metrics['rows']) - 1


def test_note_on_the_images_is_on_the_card_and_with_every_result(run, folder):
    info = PublicationInfo(dataset_id='org/data', dataset_note='halved |\n twice')
    metrics = write_publication(run, folder, REPO, info=info)
    assert metrics['dataset']['note'] == 'halved |\n twice'
    (line,) = [line for line in (folder / 'README.md').read_text().splitlines() if 'Accuracies are in percent' in line]
    assert '11 images, halved &#124; twice; one run' in line
    entries = parse_eval_result_entries(yaml.safe_load(write_eval_results(metrics)))
    assert len(entries) > len(metrics['rows'])
    assert all(entry.notes.endswith(', halved | twice') for entry in entries)


def test_run_from_a_run_started_where_that_did(tmp_path, folder):
    (tmp_path / 'w').mkdir()
    safetensors.torch.save_file(
        timm.create_model('test_resnet', num_classes=2).state_dict(), tmp_path / 'w/w.safetensors'
    )
    first = make_run(tmp_path, '--initial-checkpoint', tmp_path / 'w/w.safetensors')
    assert '(a file) is unknown' in refused(first, folder)
    second = make_run(tmp_path, '--model', f'local-dir:{first}/best', '--pretrained', name='second')
    assert '(a file) is unknown' in refused(second, folder)
