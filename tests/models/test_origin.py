"""What weights started from: a field of the model, and what is asked of a model that does not know it."""

import pickle

import pytest
import timm
import torch

import timm_multiexit as tme
from timm_multiexit.models.origin import Origin, find_origin

TIMM = timm.get_pretrained_cfg('resnet18.a1_in1k').to_dict()


@pytest.mark.parametrize(
    ('cfg', 'kwargs', 'origin'),
    [
        (TIMM, {'pretrained': True}, Origin('timm/resnet18.a1_in1k', 'apache-2.0')),
        (TIMM, {'pretrained': False}, Origin()),
        (TIMM, {'pretrained': True, 'has_file': True}, Origin('a file')),
        (TIMM | {'file': 'x.safetensors'}, {'pretrained': True}, Origin('a file')),
        ({'license': 'mit'}, {'pretrained': True}, Origin()),
        ({'hf_hub_id': 'org/net@c0ffee', 'license': 'mit'}, {'pretrained': True}, Origin('org/net', 'mit', 'c0ffee')),
    ],
    ids=['timm', 'scratch', 'checkpoint', 'file', 'without weights', 'hub'],
)
def test_origin_of_a_created_model(cfg, kwargs, origin):
    assert find_origin(cfg, **kwargs) == origin
    assert Origin(**origin.to_dict()) == origin


def test_hub_commit_is_that_of_the_origin(make_model):
    model = make_model()
    assert (model.origin, model.hub_commit) == (None, None)
    model.origin = Origin('org/net', 'mit', 'c0ffee')
    assert pickle.loads(pickle.dumps(model)).hub_commit == 'c0ffee'
    with pytest.raises(AttributeError):
        model.hub_commit = 'other'


@pytest.mark.parametrize('commit', [None, 'c0ffee'])
def test_origin_is_saved_and_loaded(make_model, tmp_path, commit):
    model = make_model()
    model.origin = Origin('org/net', None, commit)
    tme.save_pretrained(model, tmp_path)
    loaded = tme.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (loaded.origin, loaded.hub_commit) == (model.origin, commit)
    assert tme.create_model(f'local-dir:{tmp_path}').origin == Origin()


def test_weights_of_a_plain_checkpoint_are_of_a_file(tmp_path):
    plain = timm.create_model('test_resnet', num_classes=5)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = tme.create_model('test_resnet', exits=2, num_classes=5)
    assert model.origin == Origin()
    tme.load_checkpoint(model, tmp_path / 'plain.pth')
    assert model.origin == Origin('a file')
