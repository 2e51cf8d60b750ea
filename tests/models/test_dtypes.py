"""Backbones of every dtype, and without data: exits are those of float32, and all that a model can works."""

import pytest
import timm
import torch
from helpers.members import QUICK

import timm_multiexit as tme
from timm_multiexit.cli.build_model import check_takes_images
from timm_multiexit.exits.cost import empty_images, find_dtype
from timm_multiexit.utils.errors import InvalidValueError, StateError

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
SIZE = (3, 64, 64)


def make(make_backbone, name, dtype=torch.float32):
    kwargs = {'img_size': 64} if 'vit' in name else {}
    torch.manual_seed(0)
    return tme.attach_exits(make_backbone(name, **kwargs).to(dtype), input_size=SIZE).eval()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('name', QUICK)
def test_exits_and_costs_are_those_of_float32(make_backbone, name, dtype):
    model, expected = make(make_backbone, name, dtype), make(make_backbone, name)
    assert model.exits.specs == expected.exits.specs
    assert model.cost() == expected.cost()
    assert model.feature_widths() == expected.feature_widths()
    assert {param.dtype for param in model.parameters()} == {dtype}
    places = tme.exit_points(make_backbone('test_resnet').to(dtype))
    assert places == tme.exit_points(make_backbone('test_resnet'))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('name', QUICK)
def test_all_that_a_model_can_works_in_its_dtype(make_backbone, name, dtype):
    model = make(make_backbone, name, dtype)
    x = torch.randn(6, *SIZE).to(dtype) * torch.linspace(0.3, 3, 6, dtype=dtype).view(-1, 1, 1, 1)
    with torch.no_grad():
        logits = model(x, exits=True).logits
    assert {single.dtype for single in logits} == {dtype}
    assert model.can_leave == (True,) * len(model.exits)
    scores = logits[0].float().softmax(1).amax(1).sort().values
    policy = tme.ExitPolicy('confidence', (float(scores[2:4].mean()), None, None))
    found, expected = model.infer(x, policy), tme.apply_policy(policy, logits)
    assert found.exit_idx.tolist() == expected.exit_idx.tolist()
    assert sorted(set(found.exit_idx.tolist())) == [0, 3]
    # Up to the rounding of batches of other sizes.
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.05, atol=0.05)
    for idx, step in model.anytime(x):
        torch.testing.assert_close(step, logits[idx], rtol=0.05, atol=0.05)
    for idx in (0, -1):
        network = tme.truncate(model, idx)
        with torch.no_grad():
            torch.testing.assert_close(network(x), model(x, exit_idx=idx), rtol=0, atol=0)
        assert find_dtype(network) == dtype


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_saved_weights_come_back_in_their_dtype(make_backbone, dtype, tmp_path):
    model = make(make_backbone, 'test_vit', dtype)
    tme.save_pretrained(model, tmp_path / 'model')
    loaded = tme.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True, dtype=dtype).eval()
    x = torch.randn(2, *SIZE, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(x, exit_idx=1), model(x, exit_idx=1))
    assert {param.dtype for param in loaded.parameters()} == {dtype}


def test_create_model_takes_a_dtype():
    model = tme.create_model('test_vit', dtype=torch.bfloat16, num_classes=3)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_images_are_of_the_first_floating_point_tensor():
    module = torch.nn.Sequential(torch.nn.Module(), torch.nn.Linear(2, 2).half())
    module[0].codes = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert empty_images(module, SIZE, 2).dtype == torch.float16
    assert empty_images(module, SIZE, 2).shape == (2, *SIZE)
    assert find_dtype(torch.nn.BatchNorm2d(2, affine=False).double()) == torch.float64
    assert find_dtype(torch.nn.ReLU()) == torch.get_default_dtype()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_model_without_data_is_attached_cut_and_counted(dtype):
    with torch.device('meta'):
        model = tme.attach_exits(timm.create_model('test_vit', num_classes=10).to(dtype)).eval()
    assert {param.device.type for param in model.parameters()} == {'meta'}
    assert model.cost() == tme.create_model('test_vit', num_classes=10).cost()
    assert next(tme.truncate(model, 0).parameters()).is_meta
    assert model(torch.empty(2, *model.input_size, dtype=dtype, device='meta'), exits=True).logits[0].shape == (2, 10)
    with pytest.raises(StateError, match=r'has no data \(device meta\): load its weights first'):
        _ = model.can_leave


def test_another_default_dtype_or_device_changes_nothing(make_backbone):
    backbone = make_backbone('test_resnet')
    expected = tme.attach_exits(backbone, input_size=SIZE)
    torch.set_default_dtype(torch.float64)
    try:
        model = tme.attach_exits(make_backbone('test_resnet').float(), input_size=SIZE).eval()
        assert model.cost() == expected.cost()
        assert model.can_leave == (True, True, True)
        assert {param.dtype for param in model.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    model = tme.attach_exits(make_backbone('test_resnet'), input_size=SIZE).eval()
    with torch.device('meta'):
        assert model.can_leave == (True, True, True)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_size_of_images_is_checked_in_the_models_dtype(make_backbone, dtype):
    model = make(make_backbone, 'test_vit', dtype)
    check_takes_images(model, SIZE)
    with pytest.raises(InvalidValueError, match=r'does not take images of \[1, 64, 64\]'):
        check_takes_images(model, (1, 64, 64))
