"""Training from weights that come over the Hub's protocol, from the Hub on this machine."""

import pytest
import safetensors.torch
import timm
import torch

import timm_multiexit as tme
from timm_multiexit.cli import train

REPOSITORY = 'timm/resnet18.a1_in1k'


@pytest.fixture
def backbone(hub):
    """A resnet18 as trained: weights and statistics that no initialization gives; the Hub serves it."""
    torch.manual_seed(3)
    model = timm.create_model('resnet18')
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if 'running' in name:
                tensor.add_(0.1 * torch.rand_like(tensor))
    weights = safetensors.torch.save(model.state_dict(), metadata={'format': 'pt'})
    hub.add(REPOSITORY, {'model.safetensors': weights})
    return model


def test_frozen_pretrained_backbone_keeps_every_bit_while_its_heads_learn(backbone, run_script, image_folder):
    flags = ('--model', 'resnet18', '--pretrained', '--freeze-backbone', '--eed', '--num-classes', '2')
    flags += ('--img-size', '32', '-b', '8', '-j', '0', '--epochs', '2', '--opt', 'adamw', '--lr', '0.002')
    code, _, err = run_script(train.main, *flags, '--data-dir', image_folder, '--experiment', 'run')
    assert code == 0, err
    folder = image_folder.parent / 'output/train/run'
    first, last = (timm.models.load_state_dict(str(folder / f'checkpoint-{epoch}.pth.tar')) for epoch in (0, 1))
    served = backbone.state_dict()
    kept = [key for key in served if not key.startswith('fc.')]  # the classifier of 1,000 classes is replaced
    assert len(kept) == 120
    for state in (first, last):
        assert all(torch.equal(state[f'backbone.{key}'], served[key]) for key in kept)
    # Main's classifier is of other classes than the served one, as fresh as the heads, and learns with them.
    heads = [key for key in first if key.startswith(('exits.', 'backbone.fc.')) and 'num_batches' not in key]
    assert len(heads) > 30
    assert not [key for key in heads if torch.equal(first[key], last[key])]
    model = tme.create_model(f'local-dir:{folder}/best', pretrained=True)
    assert torch.equal(model.backbone.layer1[0].conv1.weight, backbone.layer1[0].conv1.weight)


def test_pretrained_backbone_with_fresh_heads_waits_for_them(backbone, run_script, image_folder):
    flags = ('--model', 'resnet18', '--pretrained', '--eed', '--num-classes', '2', '--img-size', '32', '-b', '8')
    flags += ('-j', '0', '--epochs', '2', '--data-dir', image_folder, '--experiment', 'run')
    assert run_script(train.main, *flags)[0] == 0
    folder = image_folder.parent / 'output/train/run'
    first, last = (timm.models.load_state_dict(str(folder / f'checkpoint-{epoch}.pth.tar')) for epoch in (0, 1))
    key = 'backbone.layer2.0.conv1.weight'
    assert torch.equal(first[key], backbone.state_dict()[key.removeprefix('backbone.')])  # the first epoch: heads alone
    assert not torch.equal(last[key], first[key])
