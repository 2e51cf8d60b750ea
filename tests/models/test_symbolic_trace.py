"""torch.fx traces main's path of a model as that of the plain timm model, and one exit as a network of its own."""

import pytest
import torch
from helpers.members import MEMBERS, SWIN
from torch.fx import symbolic_trace

from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.truncation import truncate

VIT = 'vit_tiny_patch16_224'
KWARGS = {VIT: {'img_size': 64, 'depth': 4}, SWIN: MEMBERS[SWIN].kwargs}
NAMES = ['test_resnet', 'test_efficientnet', 'test_mambaout', VIT, SWIN]  # NCHW, NHWC and tokens


@pytest.fixture
def make(make_backbone):
    def make(name):
        return attach_exits(make_backbone(name, **KWARGS.get(name, {})), input_size=(3, 64, 64)).eval()

    return make


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'concrete', [None, {'exits': False}, {'exit_idx': None}, {'exits': False, 'exit_idx': None}], ids=repr
)
def test_trace_of_a_model_is_main(make, name, concrete):
    model = make(name)
    try:
        plain = symbolic_trace(model.backbone)
    except TypeError as error:  # torch 2.8 and attention
        pytest.skip(f'torch {torch.__version__} does not trace the plain network: {error}')
    traced = symbolic_trace(model, concrete_args=concrete)
    images = torch.randn(3, 3, 64, 64)
    assert torch.equal(traced(images), model(images))
    layers = [str(node.target) for node in traced.graph.nodes if node.op == 'call_module']
    assert layers == [f'backbone.{node.target}' for node in plain.graph.nodes if node.op == 'call_module']
    assert not [layer for layer in layers if layer.startswith('exits.')]


@pytest.mark.parametrize('asked', [{'exits': True}, {'exit_idx': 0}, {'exit_idx': -1}], ids=repr)
def test_traced_model_refuses_to_give_main_for_an_exit(make, asked):
    traced = symbolic_trace(make('test_resnet'))
    with pytest.raises(AssertionError, match="main's path alone"):
        traced(torch.randn(1, 3, 64, 64), **asked)


@pytest.mark.parametrize('name', NAMES)
def test_one_exit_is_traced_where_it_is_asked_for(make, name):
    model = make(name)
    traced = symbolic_trace(model, concrete_args={'exits': False, 'exit_idx': 1})
    images = torch.randn(3, 3, 64, 64)
    # torch.fx keeps arguments of a known value, and checks them.
    assert torch.equal(traced(images, False, 1), model(images, exit_idx=1))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('idx', [0, 2, -1])
def test_trace_of_a_truncated_model_is_its_exit(make, name, idx):
    model = make(name)
    traced = symbolic_trace(truncate(model, idx))
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(traced(images), model(images, exit_idx=idx))
    # As long as it is used for images of other sizes too: nothing of the traced size is in the graph.
    if name in ('test_resnet', 'test_efficientnet'):
        other = torch.randn(2, 3, 96, 64)
        torch.testing.assert_close(traced(other), model(other, exit_idx=idx))


def test_model_goes_on_as_before_after_a_trace(make):
    model = make('test_resnet')
    images = torch.randn(2, 3, 64, 64)
    before = model(images, exits=True)
    symbolic_trace(model)
    symbolic_trace(truncate(model, 0))
    after = model(images, exits=True)
    assert all(torch.equal(one, other) for one, other in zip(before.logits, after.logits, strict=True))
