"""Plain timm models that `--compare` sets beside a model with exits."""

import pytest
import timm
import torch
from helpers.validation import DATA_CONFIG

import timm_multiexit as tme
from timm_multiexit.cli.build_model import create_static
from timm_multiexit.utils.errors import MultiExitError


def test_static_model_of_a_checkpoint_answers_as_it_did(tmp_path):
    network = timm.create_model('test_resnet', num_classes=5).eval()
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'last.pth.tar')
    model = create_static(f'test_resnet:{tmp_path}/last.pth.tar', num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), network(images))
    assert len(model.exits) == 0


def test_static_model_of_a_folder_is_the_main_network(tmp_path, make_model):
    model = make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()
    tme.save_pretrained(model, tmp_path / 'net', data_config=DATA_CONFIG)
    static = create_static(f'local-dir:{tmp_path}/net', num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(static(images), model(images))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnet51', "no model 'resnet51'"),
        ('test_resnet:nowhere.pth', '--compare test_resnet:nowhere.pth: Checkpoint nowhere.pth does not exist'),
        ('local-dir:nowhere', 'is not a model folder'),
        ('NET', 'must have the 4 classes of the model, got 10'),
        ('GRAY', 'must take images of 3 channels, got 1'),
    ],
)
def test_static_models_that_cannot_be_compared(name, message, tmp_path, make_model):
    for folder, classes, channels in (('NET', 10, 3), ('GRAY', 4, 1)):
        net = timm.create_model('test_resnet', num_classes=classes, in_chans=channels)
        net = tme.attach_exits(net, input_size=(channels, 32, 32))
        tme.save_pretrained(net, tmp_path / folder, data_config={'input_size': (channels, 32, 32)})
    name = f'local-dir:{tmp_path}/{name}' if name.isupper() else name
    with pytest.raises(MultiExitError, match=message) as raised:
        create_static(name, num_classes=4)
    assert '\n' not in str(raised.value)
