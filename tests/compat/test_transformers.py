"""Transformers reads published folders as timm and this package do, and its Trainer's folders come back."""

import json
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_multiexit as tme

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.compat

LABELS = ['ant', 'bee', 'cat', 'dog', 'eel']


def read_config(folder):
    return json.loads((folder / 'config.json').read_text())


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model(num_classes=5, input_size=None).eval()
    tme.save_pretrained(model, tmp_path / 'net', label_names=LABELS)
    return model, tmp_path / 'net'


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('test_resnet', {}), ('test_vit', {}), ('test_resnet', {'in_chans': 1}), ('test_vit', {'img_size': 96})],
    ids=str,
)
def test_timm_transformers_and_this_package_agree_bit_for_bit(name, kwargs, make_backbone, tmp_path):
    model = tme.attach_exits(make_backbone(name, num_classes=5, **kwargs)).eval()
    tme.save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.num_labels == 5
    x = torch.randn(2, *model.input_size)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(theirs(x).logits, expected)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)
        assert torch.equal(tme.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)


def test_pipeline_gives_the_names_of_the_classes(saved):
    model, folder = saved
    classify = transformers.pipeline('image-classification', model=str(folder), device='cpu')
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    found = classify(image, top_k=5)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model.backbone))
    with torch.no_grad():
        probs = model(transform(image)[None]).softmax(-1)[0]
    expected = sorted(zip(probs.tolist(), LABELS), reverse=True)
    assert [row['label'] for row in found] == [label for _, label in expected]
    assert [row['score'] for row in found] == pytest.approx([prob for prob, _ in expected], abs=1e-5)


def test_other_number_of_labels_gets_a_fresh_classifier_there_too(saved):
    _, folder = saved
    theirs = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    assert theirs(torch.randn(1, 3, 160, 160)).logits.shape == (1, 3)


def test_folder_of_the_trainer_comes_back(saved, tmp_path):
    _, folder = saved
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    data = [{'pixel_values': torch.randn(3, 64, 64), 'labels': idx % 5} for idx in range(8)]
    options = transformers.TrainingArguments(
        tmp_path / 'run', max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy='no'
    )
    trainer = transformers.Trainer(model=theirs, args=options, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / 'trained')
    assert not (tmp_path / 'trained' / 'exits.safetensors').exists()
    with pytest.raises(
        tme.CheckpointError, match=r'has no exits\.safetensors, .*transformers.* exits=\'auto\''
    ) as error:
        tme.create_model(f'local-dir:{tmp_path / "trained"}', pretrained=True)
    assert '\n' not in str(error.value)
    model = tme.create_model(f'local-dir:{tmp_path / "trained"}', pretrained=True, exits='auto').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), theirs.eval()(x).logits)
        assert len(model(x, exits=True).logits) == 4
    # And once more from there: what this package writes beside the classes' names.
    tme.save_pretrained(model, tmp_path / 'again')
    assert read_config(tmp_path / 'again')['label_names'] == LABELS
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'again').eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x))


def test_truncated_folder_is_refused_by_name(make_model, tmp_path):
    tme.save_pretrained(tme.truncate(make_model(), 0), tmp_path)
    with pytest.raises(Exception, match='test_resnet cut at exit 0, for timm_multiexit alone'):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


def test_hub_is_not_asked():
    assert os.environ['HF_ENDPOINT'].startswith('http://127.0.0.1')
