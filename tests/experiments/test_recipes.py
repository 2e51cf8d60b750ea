"""Recipes that follow each other, and scripts beside them."""

from pathlib import Path

import pytest
import timm
import torch

from hub.recipes import imagenette_classifier
from timm_multiexit.utils.untrusted import read_yaml

RECIPES = Path(imagenette_classifier.__file__).parent


def test_plain_network_is_trained_as_the_one_with_exits():
    with_exits, plain = (read_yaml(RECIPES / f'imagenette_{name}.yaml') for name in ('lite0_eed', 'plain'))
    of_exits = {'eed', 'exits', 'exit_lr_scale', 'eval_metric'}
    assert of_exits < with_exits.keys()
    assert plain == {name: value for name, value in with_exits.items() if name not in of_exits}


def run(monkeypatch, *words):
    monkeypatch.setattr('sys.argv', ['imagenette_classifier.py', *map(str, words)])
    imagenette_classifier.main()


def test_missing_folder_is_named_before_weights_are_fetched(monkeypatch, capsys):
    monkeypatch.setattr('timm.create_model', lambda *args, **kwargs: pytest.fail('weights were fetched'))
    with pytest.raises(SystemExit, match='2'):
        run(monkeypatch, 'resnet18')
    assert 'the following arguments are required: FOLDER' in capsys.readouterr().err


def test_network_answers_as_that_of_imagenet_among_its_ten_classes(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr('timm.create_model', lambda name, pretrained: timm.models.create_model(name))
        torch.manual_seed(0)
        source = timm.models.create_model('test_efficientnet').eval()
        torch.manual_seed(0)
        run(patch, 'test_efficientnet', tmp_path / 'ten')
    ten = timm.create_model(f'local-dir:{tmp_path / "ten"}', pretrained=True).eval()
    images = torch.randn(2, *ten.pretrained_cfg['input_size'])
    rows = list(imagenette_classifier.CLASSES.values())
    assert len(rows) == 10
    torch.testing.assert_close(ten(images), source(images)[:, rows])
    assert ten.pretrained_cfg['label_names'] == list(imagenette_classifier.CLASSES)


def test_network_of_other_classes_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr('timm.create_model', lambda *args, **kwargs: timm.models.create_model('cifar_resnet8'))
    with pytest.raises(SystemExit, match='2'):
        run(monkeypatch, 'cifar_resnet8', tmp_path / 'ten')
    assert 'MODEL must have the 1,000 classes of ImageNet, got cifar_resnet8 with 100.' in capsys.readouterr().err
    assert not (tmp_path / 'ten').exists()
