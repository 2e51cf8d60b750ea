"""PEFT's LoRA on the whole model and on the backbone: a step of training, merging, and folders."""

import copy

import pytest
import torch
from torch.nn import functional as F

import timm_multiexit as tme
from timm_multiexit.utils.errors import InvalidTypeError

peft = pytest.importorskip('peft')
pytestmark = pytest.mark.compat


@pytest.fixture
def model(make_model):
    return make_model('test_vit', input_size=None).eval()


def adapt(module):
    config = peft.LoraConfig(r=4, target_modules=['qkv', 'proj', 'fc1'], init_lora_weights=False)
    return peft.get_peft_model(module, config)


def train_a_step(forward, parameters, x):
    trained = [param for param in parameters if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    targets = torch.arange(len(x)) % 10
    loss = sum(F.cross_entropy(logits, targets) for logits in forward(x))
    loss.backward()
    assert all(param.grad is not None for param in trained)
    optimizer.step()
    return len(trained)


def test_adapters_of_the_whole_model_train_merge_and_come_back(model, tmp_path):
    x = torch.randn(4, *model.input_size)
    frozen = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapted = adapt(model)
    before = [logits.detach() for logits in adapted(x, exits=True).logits]
    assert train_a_step(lambda x: adapted(x, exits=True).logits, adapted.parameters(), x) >= 6
    adapted.eval()
    with torch.no_grad():
        expected = adapted(x, exits=True).logits
    assert all(not torch.equal(*pair) for pair in zip(expected, before))
    for kind in (adapted, model):  # PEFT puts its layers into the model itself
        with pytest.raises((InvalidTypeError, tme.CheckpointError), match='merge_and_unload'):
            tme.save_pretrained(kind, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []
    merged = adapted.merge_and_unload()
    assert type(merged) is tme.MultiExitModel
    assert merged.state_dict().keys() == frozen.keys()
    tme.save_pretrained(merged, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    with torch.no_grad():
        logits = loaded(x, exits=True).logits
        assert all(map(torch.equal, logits, merged(x, exits=True).logits))
        for mine, theirs in zip(logits, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded.infer(x, threshold=0.0).logits, logits[0])


def test_adapters_of_the_backbone_train_merge_and_come_back(model, tmp_path):
    x = torch.randn(4, *model.input_size)
    model.backbone = adapt(model.backbone)
    model._set_taps()
    train_a_step(lambda x: model(x, exits=True).logits, model.parameters(), x)
    with torch.no_grad():
        expected = model(x, exits=True).logits
    with pytest.raises(
        InvalidTypeError, match=r'model\.backbone must not be a PeftModel: use model\.backbone\.merge_and_'
    ):
        tme.save_pretrained(model, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []
    model.backbone = model.backbone.merge_and_unload()
    model._set_taps()
    tme.save_pretrained(model, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    with torch.no_grad():
        for mine, theirs in zip(loaded(x, exits=True).logits, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_and_loaded_by_peft(model, tmp_path):
    x = torch.randn(2, *model.input_size)
    other = copy.deepcopy(model)
    adapted = adapt(model)
    train_a_step(lambda x: adapted(x, exits=True).logits, adapted.parameters(), x)
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        assert all(map(torch.equal, loaded(x, exits=True).logits, adapted(x, exits=True).logits))
