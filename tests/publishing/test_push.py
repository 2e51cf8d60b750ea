"""A model is published with what is known of it, under a license that follows from its weights."""

import json

import pytest
import safetensors.torch
import timm
import torch
from helpers import enliven
from helpers.runs import REPO

import timm_multiexit as tme
from timm_multiexit.publishing.licenses import License
from timm_multiexit.publishing.publication import write_publication_config
from timm_multiexit.publishing.push import push_to_hub


def test_model_itself_is_published_with_what_is_known_of_it(hub, make_model):
    model = make_model(exits=[1, 3], num_classes=2, input_size=(3, 32, 32))
    images, targets = torch.randn(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    table = tme.evaluate(model, [(images, targets)])
    result = push_to_hub(model, REPO, table=table, private=True, license='mit', label_names=['cat', 'dog'])
    repository = hub.repositories[REPO]
    files = {path: hub.content(file) for path, file in repository.find(result.commit).files.items()}
    assert repository.is_private
    names = {'README.md', 'config.json', 'metrics.json', 'model.safetensors', 'exits.safetensors'}
    assert files.keys() - {'.gitattributes'} == names
    metrics = json.loads(files['metrics.json'])
    assert metrics['rows'] == [dict(row) for row in table.rows]
    assert metrics['dataset']['num_samples'] == 8
    assert metrics['license']['id'] == 'mit'
    assert json.loads(files['config.json'])['label_names'] == ['cat', 'dog']
    assert metrics['weights'].keys() == {'model.safetensors', 'exits.safetensors'}


@pytest.fixture
def weights(hub):
    """Weights of timm's on the Hub, under a license that goes with them."""
    base = enliven(timm.create_model('resnet18'))
    content = safetensors.torch.save(base.state_dict())
    hub.add('timm/resnet18.fb_swsl_ig1b_ft_in1k', {'model.safetensors': content})
    hub.add('timm/resnet18.a1_in1k', {'model.safetensors': content})
    return content


@pytest.fixture
def license_of(hub):
    """Return a function that publishes a model and returns license and base of the publication."""

    def publish(model, **kwargs):
        push_to_hub(model, REPO, **kwargs)
        metrics = json.loads(hub.content(hub.repositories[REPO].find('main').files['metrics.json']))
        return metrics['license']['id'], metrics['base_model']

    return publish


SWSL = 'resnet18.fb_swsl_ig1b_ft_in1k'


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [(SWSL, {}), ('swsl_resnet18', {}), ('resnet18', {'pretrained_cfg': 'fb_swsl_ig1b_ft_in1k'})],
    ids=['tag', 'old-name', 'keyword'],
)
def test_model_knows_the_weights_of_timm_that_it_started_from(name, kwargs, weights, license_of):
    trained = tme.create_model(name, True, exits=1, num_classes=2, **kwargs)
    with pytest.raises(tme.MultiExitError, match='License must be cc-by-nc-4.0, .* got mit'):
        license_of(trained, license='mit')
    assert license_of(trained) == ('cc-by-nc-4.0', f'timm/{SWSL}')
    assert license_of(tme.create_model(name, exits=1, num_classes=2, **kwargs)) == ('apache-2.0', None)


@pytest.mark.slow
def test_what_a_model_started_from_goes_through_repositories_and_folders(weights, license_of, tmp_path):
    trained = tme.create_model(SWSL, True, exits=1, num_classes=2)
    tme.save_pretrained(trained, tmp_path / 'trained')
    again = tme.create_model(f'local-dir:{tmp_path}/trained', True)
    assert license_of(again) == ('cc-by-nc-4.0', f'timm/{SWSL}')
    assert license_of(tme.create_model(f'hf-hub:{REPO}', True)) == ('cc-by-nc-4.0', REPO)
    assert license_of(tme.create_model(f'hf-hub:{REPO}')) == ('apache-2.0', None)
    # From scratch, whatever license the architecture's own weights have.
    tme.save_pretrained(tme.create_model('convnextv2_atto', exits=1, num_classes=2), tmp_path / 'scratch')
    assert license_of(tme.create_model(f'local-dir:{tmp_path}/scratch', True)) == ('apache-2.0', None)
    # Nothing is known of a folder that does not say it, and of a file.
    model = tme.attach_exits(timm.create_model('resnet18', num_classes=2), 1)
    tme.save_pretrained(model, tmp_path / 'other')
    (tmp_path / 'weights.safetensors').write_bytes(weights)
    for unknown in (
        tme.create_model(f'local-dir:{tmp_path}/other', True),
        tme.create_model('resnet18', exits=1, checkpoint_path=str(tmp_path / 'weights.safetensors')),
        tme.create_model('resnet18', True, exits=1, pretrained_cfg_overlay={'file': f'{tmp_path}/weights.safetensors'}),
    ):
        with pytest.raises(tme.MultiExitError, match='is unknown: look it up and give it'):
            license_of(unknown)
    assert license_of(unknown, license='mit', base_model='org/base') == ('mit', 'org/base')


def test_backbone_made_elsewhere_counts_as_started_from_the_weights_it_could_have(weights, license_of):
    model = tme.attach_exits(timm.create_model(SWSL, num_classes=2), 1)
    assert license_of(model) == ('cc-by-nc-4.0', f'timm/{SWSL}')


def test_truncated_model_is_refused_with_what_to_do(hub, make_model):
    with pytest.raises(
        TypeError, match='must be a MultiExitModel to be published, got TruncatedModel: save_pretrained'
    ):
        push_to_hub(tme.truncate(make_model(), 0), REPO, license='mit')
    assert hub.repositories == {}


def test_older_folder_is_published_with_the_number_of_classes_at_the_root_alone(make_model, tmp_path):
    tme.save_pretrained(make_model(), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['model_args']['num_classes'] = 10
    (tmp_path / 'config.json').write_text(json.dumps(config))
    write_publication_config(tmp_path, 'multiexit', License('mit', None, None, 'chosen'), REPO)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_classes'] == 10
    assert 'num_classes' not in config['model_args']
