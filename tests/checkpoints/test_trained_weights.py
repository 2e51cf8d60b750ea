"""Trained weights of timm's names, which timm itself downloads: with a Hub, and without one."""

from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch

import timm_multiexit as tme
from timm_multiexit.checkpoints.source import create_backbone
from timm_multiexit.cli import train, validate
from timm_multiexit.utils.errors import HubError, InvalidValueError

REPOSITORY = 'timm/test_resnet.r160_in1k'
REFUSING = 'http://127.0.0.1:9'  # nobody listens
ADVICE = (
    f"; the cache has no model.safetensors of '{REPOSITORY}' at 'main'. Without a network, run"
    f' `hf download {REPOSITORY}` where there is one and copy its folder of HF_HUB_CACHE.'
)
REFUSED = f"{REFUSING} failed for '{REPOSITORY}': ConnectError: [Errno 111] Connection refused{ADVICE}"


def disconnect(monkeypatch):
    """Take the Hub away, and return the list that the client's waits between its tries go to."""
    waits = []
    monkeypatch.setattr('huggingface_hub.utils._http.time', SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', REFUSING)
    template = REFUSING + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE', template)
    return waits


@pytest.mark.parametrize('create', [tme.create_model, create_backbone], ids=['model', 'backbone'])
def test_without_a_connection_they_are_refused_at_once(create, hub, monkeypatch):
    waits = disconnect(monkeypatch)
    with pytest.raises(HubError) as caught:
        create('test_resnet', pretrained=True)
    assert (str(caught.value), waits) == (REFUSED, [])


@pytest.mark.parametrize(
    ('script', 'flags'),
    [
        (train, ('--pretrained',)),
        (train, ('--kd-model-name', 'test_resnet')),
        (validate, ('--pretrained',)),
    ],
    ids=['train', 'teacher', 'validate'],
)
def test_scripts_say_the_whole_line(script, flags, hub, monkeypatch, run_script):
    waits = disconnect(monkeypatch)
    code, _, err = run_script(script.main, '--model', 'test_resnet', *flags, '--num-classes', '10')
    assert (code, waits) == (2, [])
    assert err.strip().splitlines()[-1].endswith(f'error: {REFUSED}')


def test_offline_those_that_are_not_cached_are_one_line(hub, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(HubError) as caught:
        tme.create_model('test_resnet', pretrained=True)
    assert str(caught.value) == f'HF_HUB_OFFLINE is set, so {hub.url} was not contacted: unset it{ADVICE}'


def test_those_that_are_cached_need_no_connection(hub, monkeypatch):
    torch.manual_seed(3)
    served = timm.create_model('test_resnet').state_dict()
    hub.add(REPOSITORY, {'model.safetensors': safetensors.torch.save(served, metadata={'format': 'pt'})})
    for _ in range(2):  # the second time without a connection
        loaded = tme.create_model('test_resnet', pretrained=True).backbone.state_dict()
        assert all(torch.equal(loaded[key], served[key]) for key in served)
        waits = disconnect(monkeypatch)
    assert waits == []
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    loaded = tme.create_model('test_resnet', pretrained=True).backbone.state_dict()
    assert all(torch.equal(loaded[key], served[key]) for key in served)


def test_a_name_without_them_is_refused(hub):
    with pytest.raises(InvalidValueError, match="^timm has no trained weights of 'botnet50ts_256': start without them"):
        tme.create_model('botnet50ts_256', pretrained=True)
    assert hub.log == []
