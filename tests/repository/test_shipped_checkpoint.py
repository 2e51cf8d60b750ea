"""The trained networks that the repository holds: small, whole, and what their cards say."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_multiexit as tme
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.hub_client.files import EVAL_RESULTS
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.publishing.card import write_card, write_eval_results

KEPT = sorted(path.parent for path in (Path(__file__).parents[2] / 'hub/checkpoints').glob('*/config.json'))


# Network -> the most bytes that its folder may have.
SIZES = {'cifar10_resnet8_eed': 3_000_000, 'imagenette_lite0_eed': 19_000_000}


def test_these_networks_are_kept():
    assert [path.name for path in KEPT] == list(SIZES)


@pytest.fixture(params=KEPT, ids=lambda path: path.name)
def folder(request):
    return request.param


def test_it_is_small_and_whole_and_its_card_is_of_its_numbers(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*') if path.is_file()}
    assert set(files) == {
        *('README.md', 'args.yaml', 'assets/accuracy_vs_macs.png', 'config.json', 'metrics.json'),
        *('exits.safetensors', 'model.safetensors', EVAL_RESULTS),
    }
    assert sum(path.stat().st_size for path in files.values()) < SIZES[folder.name]
    metrics = json.loads(files['metrics.json'].read_text())
    assert metrics['weights'] == hash_weights(folder)
    assert files['README.md'].read_text() == write_card(metrics)
    assert files[EVAL_RESULTS].read_text() == write_eval_results(metrics)
    Image.open(files['assets/accuracy_vs_macs.png']).verify()


def test_it_answers_early_and_plain_timm_has_its_main_network(folder):
    model = tme.create_model(f'local-dir:{folder}', pretrained=True).eval()
    plain = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    channels, height, width = model.pretrained_cfg['input_size']
    images = nn.functional.interpolate(torch.randn(16, channels, 4, 4), (height, width), mode='bicubic')  # blurred
    images *= torch.linspace(0.1, 3, 16).view(-1, 1, 1, 1)  # of low and high contrast
    outputs = model(images, exits=True)
    assert torch.equal(plain(images), outputs.logits[-1])
    assert model.budgets is not None
    for budget in ('60%', '80%'):
        prediction = model.infer(images, budget=budget)
        assert prediction.logits.shape == (16, model.num_classes)
    expected, prediction = apply_policy(model.policy, outputs.logits), model.infer(images)
    assert torch.equal(prediction.exit_idx, expected.exit_idx)
    torch.testing.assert_close(prediction.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(expected.exit_idx.unique()) > 1, 'images leave at different exits'
