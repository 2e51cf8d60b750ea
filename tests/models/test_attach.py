"""Attaching: the model that comes out, what is refused, and a backbone that stays as it was."""

import pytest
import timm
import torch
from helpers.members import modules
from torch import nn

from timm_multiexit.exits.heads import HEADS
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import MultiExitError


def snapshot(backbone):
    return (
        {key: value.clone() for key, value in backbone.state_dict().items()},
        {name: module.training for name, module in backbone.named_modules()},
        {name: param.requires_grad for name, param in backbone.named_parameters()},
    )


def num_hooks(backbone):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.modules())


def assert_unchanged(backbone, before):
    state, training, requires_grad = snapshot(backbone)
    assert state.keys() == before[0].keys()
    for key, value in state.items():
        assert torch.equal(value, before[0][key]), key
    assert training == before[1]
    assert requires_grad == before[2]
    assert all(param.grad is None for param in backbone.parameters())


# Heads


def test_drop_rate_of_the_heads_is_the_backbones_unless_given(make_empty):
    backbone = make_empty('test_resnet', drop_rate=0.3)
    assert [head.drop.p for head in attach_exits(backbone).exits] == [0.3] * 3
    assert [head.drop.p for head in attach_exits(backbone, drop_rate=0.0).exits] == [0.0] * 3


def test_heads_live_where_the_backbone_lives(make_empty, make_backbone):
    assert {param.device.type for param in attach_exits(make_empty('test_resnet')).parameters()} == {'meta'}
    half = attach_exits(make_backbone().to(torch.bfloat16))
    assert {param.dtype for param in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_byobnet'])
def test_model_of_a_checkpoint_is_rebuilt_from_its_specs(make_backbone, make_model, name, head):
    x = torch.randn(1, 3, 64, 64)
    model = make_model(name, [1, 2], head=head).eval()
    other = MultiExitModel(make_backbone(name), model.exits.specs).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x, exits=True).logits, model(x, exits=True).logits)


# What is refused


@pytest.mark.parametrize(
    ('kwargs', 'fragments'),
    [
        ({'exits': ['layr1']}, ["no module 'layr1'", 'layer1', 'act1, layer1, layer2, layer3, layer4']),
        ({'exits': ['layer1', 'backbone.layer2']}, ["'backbone.layer2'", 'layer2']),
        ({'exits': ['']}, ["''", 'act1, layer1']),
        ({'exits': [5]}, ['no exit 5', '0 (act1', '1 (layer1.0', '4 (layer4.0']),
        ({'exits': [1, -6]}, ['no exit -6', '4 (layer4.0']),
        ({'exits': 5}, ['got 5', '[1, 4]']),
        ({'exits': 0}, ['got 0', '[1, 4]']),
        ({'exits': -1}, ['got -1', '[1, 4]']),
        ({'exits': True}, ['True', "'auto'"]),
        ({'exits': False}, ['False', "'auto'"]),
        ({'exits': None}, ['None', "'auto'"]),
        ({'exits': 1.5}, ['1.5', "'auto'"]),
        ({'exits': 'layer1'}, ["'layer1'", "'auto'"]),
        ({'exits': []}, ['[]', '1 (layer1.0']),
        ({'exits': [True]}, ['True', '1 (layer1.0']),
        ({'exits': [1.0]}, ['[1.0]', 'in (0, 1)']),
        ({'exits': [1, 0.5]}, ['[1, 0.5]', 'all shares']),
        ({'exits': [1, 1]}, ['each place once', '[1, 1]']),
        ({'exits': [1, -4]}, ['each place once', '[1, -4]']),
        ({'exits': ['layer1', 'layer1.0']}, ['each place once', 'layer1.0']),
        ({'exits': [1, 'layer1']}, ['each place once']),
        ({'exits': ['fc']}, ["'fc'", 'neither a map nor a grid of tokens']),
        ({'head': 'convs'}, ["'convs'", 'conv, paper, bottleneck, linear']),
        ({'head_widths': [[8, 8, 8, 8]]}, ['one list per exit (3), got 1']),
        ({'head_widths': []}, ['one list per exit (3), got 0']),
        ({'head_widths': [[8, 8, 8, 8], [8, 8], [8, 8]]}, ['layer2.0', '3 widths', 'got 2: [8, 8]']),
        ({'head': 'paper', 'head_widths': [[8] * 3, [8] * 2, [8] * 2]}, ['layer3.0', '1 widths', 'got 2']),
        ({'head': 'linear', 'head_widths': [[8], [], []]}, ['layer1.0', '0 widths', 'got 1']),
        ({'head_widths': [[8, 8, 8, 8], [8, 8, 8], [8, 0]]}, ['layer3.0', '[8, 0]', 'end with a convolution']),
        ({'head_widths': [[8, 8, 0, 8], [8, 8, 8], [8, 8]]}, ["'conv' head", 'must be > 0']),
        ({'head_widths': [[8, 8, 8, 8], [8, 8, 8], [8, 1.5]]}, ['layer3.0', '1.5']),
    ],
    ids=repr,
)
def test_wrong_request_is_refused_in_one_line_and_changes_nothing(make_backbone, kwargs, fragments):
    backbone = make_backbone('test_resnet')
    before = snapshot(backbone)
    with pytest.raises(MultiExitError) as error:
        attach_exits(backbone, **kwargs)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert '\n' not in str(error.value)
    assert_unchanged(backbone, before)
    assert num_hooks(backbone) == 0


class Unstaged(nn.Module):
    """A network with a classifier but without `feature_info`."""

    def __init__(self):
        super().__init__()
        self.num_classes = 2
        self.default_cfg = {'input_size': (3, 32, 32)}
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ('make', 'fragments'),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), ['Sequential', 'feature_info']),
        (Unstaged, ['Unstaged', 'feature_info']),
    ],
    ids=['sequential', 'unstaged'],
)
@pytest.mark.parametrize('exits', ['auto', [1]], ids=repr)
def test_backbone_without_stages_is_refused_in_one_line(make, fragments, exits):
    with torch.device('meta'):
        backbone = make()
    with pytest.raises(MultiExitError) as error:
        attach_exits(backbone, exits)
    assert '\n' not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize('name', ['mobilenetv5_300m_enc', 'qwen3_vit_88m_enc'])
def test_encoder_without_classifier_is_refused_in_one_line(make_empty, name):
    with pytest.raises(MultiExitError, match='has no classifier module') as error:
        attach_exits(make_empty(name))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['bn1', 'layer2.0.bn1'])
def test_tap_whose_output_the_next_layer_changes_in_place_is_refused(make_empty, name):
    # Heads run after the backbone: they would see another tensor than when the forward stops at the tap.
    backbone = make_empty('resnet18')
    assert backbone.act1.inplace
    with pytest.raises(MultiExitError, match=f"'{name}'.*in place") as error:
        attach_exits(backbone, [name, 'layer3'])
    assert '\n' not in str(error.value)
    assert modules(attach_exits(backbone, [name.replace('bn', 'act'), 'layer3']))[1] == 'layer3.1'


# The backbone stays as it was


@pytest.mark.parametrize('name', ['resnet18', 'test_convnext', 'mobilenetv3_small_050'])
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_attaching_leaves_the_backbone_as_it_was(make_backbone, name, train):
    backbone = make_backbone(name).train(train)
    # Half in training, half not; half frozen, half not.
    for module in list(backbone.modules())[5::2]:
        module.training = not train
    for param in list(backbone.parameters())[::2]:
        param.requires_grad_(False)
    before = snapshot(backbone)
    model = attach_exits(backbone)
    model.cost()
    assert model.backbone is backbone
    assert_unchanged(backbone, before)
    assert num_hooks(backbone) == len(model.exits) + 1
    assert all(param.requires_grad for param in model.exits.parameters())
    assert not {id(param) for param in model.exits.parameters()} & {id(param) for param in backbone.parameters()}


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_heads_have_the_dropout_of_the_backbone(name):
    backbone = timm.create_model(name, num_classes=5, drop_rate=0.5)
    assert [head.drop.p for head in attach_exits(backbone, 2).exits] == [0.5, 0.5]
