"""Where exits go by default and by request, and how wide their heads are."""

import re

import pytest
import timm
import torch
from helpers import cases
from helpers.members import modules
from timm.layers import LayerNorm2d
from torch import nn

from timm_multiexit.checkpoints.save import save_pretrained
from timm_multiexit.factory import exit_points
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError

# Backbone -> its number of 'auto' exits.
ZOO = {
    'resnet18': 3,
    'resnet50': 3,
    'resnet10t': 3,
    'mobilenetv3_large_100': 3,
    'mobilenetv4_conv_small': 3,
    'efficientnet_b0': 3,
    'efficientnet_lite0': 3,
    'convnext_tiny': 3,
    'regnety_008': 3,
    'densenet121': 3,
    'vgg19_bn': 4,
    'ghostnet_100': 3,
    'repvit_m1': 3,
    'fastvit_t8': 3,
    'hgnetv2_b0': 3,
}


def stages_of(model):
    """Return the indices into `feature_info` whose module holds each tap, found by name alone."""
    names = [entry['module'] for entry in model.backbone.feature_info]
    found = []
    for module in modules(model):
        (idx,) = [idx for idx, name in enumerate(names) if f'{module}.'.startswith(f'{name}.')]
        found.append(idx)
    return found


# What a request means


@pytest.mark.parametrize(
    ('name', 'taps', 'reductions'),
    [
        ('resnet18', ['layer1.1', 'layer2.1', 'layer3.1'], [4, 8, 16]),
        ('convnext_tiny', ['stages.0', 'stages.1', 'stages.2'], [4, 8, 16]),
        ('vgg11_bn', ['features.6', 'features.13', 'features.20', 'features.27'], [2, 4, 8, 16]),
        ('regnety_008', ['s1', 's2', 's3'], [4, 8, 16]),
        ('efficientnet_b0', ['blocks.1.1', 'blocks.2.1', 'blocks.4.2'], [4, 8, 16]),
        ('densenet121', ['features.denseblock1', 'features.denseblock2', 'features.denseblock3'], [4, 8, 16]),
    ],
)
def test_auto_means_the_stages_before_the_last_without_the_stem(make_empty, name, taps, reductions):
    model = attach_exits(make_empty(name))
    assert modules(model) == taps
    assert [spec.reduction for spec in model.exits.specs] == reductions
    assert {spec.head for spec in model.exits.specs} == {'conv'}


# Member -> module of each stage -> (channels, reduction) of its map.
ALIGNED = [(128, 4), (256, 8), (728, 16), (1024, 32), (2048, 32)]


XCEPTIONS = {
    'legacy_xception': {
        'act2': (64, 2),
        'block1': (128, 4),
        'block2': (256, 8),
        'block11': (728, 16),
        'act4': (2048, 32),
    },
    'xception41': dict(zip(('blocks.0', 'blocks.1', 'blocks.2', 'blocks.11', 'blocks.12'), ALIGNED)),
    'xception41p': dict(zip(('blocks.0', 'blocks.1', 'blocks.2', 'blocks.11', 'blocks.12'), ALIGNED)),
    'xception65': dict(zip(('blocks.0', 'blocks.1', 'blocks.2', 'blocks.19', 'blocks.20'), ALIGNED)),
    'xception65p': dict(zip(('blocks.0', 'blocks.1', 'blocks.2', 'blocks.19', 'blocks.20'), ALIGNED)),
    'xception71': dict(zip(('blocks.0', 'blocks.2', 'blocks.4', 'blocks.21', 'blocks.22'), ALIGNED)),
}


@pytest.mark.parametrize('name', cases({name: name for name in XCEPTIONS}, slow=[*XCEPTIONS][2:]))
def test_xception_is_tapped_between_its_blocks(make_empty, name):
    # feature_info names layers inside the blocks, where a shortcut beside the tap has the whole batch.
    points = exit_points(make_empty(name))
    assert {point.module: (point.channels, point.reduction) for point in points} == XCEPTIONS[name]
    assert [point.index for point in points] == [0, 1, 2, 3, 4]
    assert {point.layout for point in points} == {'NCHW'}
    # Its legacy form does not pad the stem: 147 pixels of 299 instead of 150.
    assert [point.size[0] for point in points][1:] == ([74, 37, 19, 10] if 'legacy' in name else [38, 19, 10, 10])
    model = attach_exits(make_empty(name))
    assert modules(model) == list(XCEPTIONS[name])[1:4]
    macs = [cost.fixed.macs for cost in model.cost()]
    assert macs == sorted(set(macs))


@pytest.mark.parametrize('name', ['legacy_xception', 'xception41p', 'xception41'])
def test_exits_of_xception_are_the_same_whichever_way_they_are_asked_for(make_model, name):
    model = make_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model(x, exits=True).logits
        for idx in range(3):
            torch.testing.assert_close(model(x, exit_idx=idx), outputs[idx], rtol=1e-4, atol=1e-5)
    assert model.can_leave == (True, True, True)


@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_b0', 'test_convnext', 'vgg11_bn'])
def test_specs_tell_channels_and_reduction_of_the_tapped_map(make_empty, name):
    model = attach_exits(make_empty(name)).eval()
    shapes = {}
    for spec in model.exits.specs:
        model.backbone.get_submodule(spec.module).register_forward_hook(
            lambda module, args, output, key=spec.module: shapes.__setitem__(key, output.shape)
        )
    side = model.input_size[-1]
    model(torch.empty(1, *model.input_size, device='meta'))
    assert len(shapes) == len(model.exits) >= 3
    for spec in model.exits.specs:
        assert tuple(shapes[spec.module][1:3]) == (spec.channels, side // spec.reduction)


@pytest.mark.parametrize(
    ('name', 'count'),
    [(name, count) for name in ('resnet18', 'test_efficientnet') for count in (1, 2, 3, 4)]
    + [(name, count) for name in ('test_convnext', 'regnetx_002') for count in (1, 2, 3)],
)
def test_number_of_exits_gives_that_many_from_shallow_to_deep(make_empty, name, count):
    backbone = make_empty(name)
    points = exit_points(backbone)
    model = attach_exits(backbone, count)
    assert len(model.exits) == count
    assert len(model.exits.specs) == count
    order = [[point.module for point in points].index(module) for module in modules(model)]
    assert order == sorted(set(order))
    assert order[-1] < len(points) - 1, 'the last stage is main alone'
    if count == len(points) - 1:
        assert order == list(range(count))


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'vgg11_bn', 'convnext_tiny', 'efficientnet_b0'])
def test_one_exit_is_the_stage_nearest_to_half_the_cost(make_empty, name):
    backbone = make_empty(name)
    points = exit_points(backbone)
    total = attach_exits(backbone).cost()[-1].fixed.macs
    model = attach_exits(backbone, 1)
    distances = {point.module: abs(point.cost.macs / total - 0.5) for point in points[:-1]}
    assert len(distances) >= 3
    assert distances[modules(model)[0]] == min(distances.values())


def test_two_exits_of_vgg11_are_those_next_to_a_third_and_two_thirds(make_empty):
    # MACs of the 3x3 convolutions of each stage at 224 pixels, worked by hand; then 7x7, 1x1 and linear on top.
    steps = [
        224**2 * 64 * 3 * 9,
        112**2 * 128 * 64 * 9,
        56**2 * 256 * (128 + 256) * 9,
        28**2 * 512 * (256 + 512) * 9,
        14**2 * 512 * (512 + 512) * 9,
    ]
    total = sum(steps) + 512 * 49 * 4096 + 4096 * 4096 + 4096 * 1000
    spent = [sum(steps[: idx + 1]) for idx in range(5)]
    assert [round(100 * macs / total) for macs in spent] == [1, 13, 50, 86, 98]
    points = exit_points(make_empty('vgg11_bn'))
    assert [point.cost.macs for point in points[:5]] == spent
    # 50 % is nearer to 67 % than 86 % is, and of the rest 13 % is nearer to 33 % than 1 % is.
    assert modules(attach_exits(make_empty('vgg11_bn'), 2)) == [points[1].module, points[2].module]


@pytest.mark.parametrize(
    'exits',
    [
        [1, 3],
        [3, 1],
        (3, 1),
        [-2, -4],
        [1, -2],
        ['layer1', 'layer3'],
        ['layer3', 'layer1'],
        ['layer3.1', 'layer1.1'],
        ['layer3', 1],
    ],
    ids=repr,
)
def test_list_of_exits_means_the_same_by_index_and_name_in_any_order(make_empty, exits):
    model = attach_exits(make_empty('resnet18'), exits)
    assert modules(model) == ['layer1.1', 'layer3.1']
    assert stages_of(model) == [1, 3]


def test_module_that_is_no_stage_can_be_named(make_empty):
    model = attach_exits(make_empty('resnet18'), ['layer3.0', 'layer1.0', 'layer2'])
    assert modules(model) == ['layer1.0', 'layer2.1', 'layer3.0']
    assert [(spec.channels, spec.reduction) for spec in model.exits.specs] == [(64, 4), (128, 8), (256, 16)]


def test_exit_at_the_last_stage_can_be_asked_for(make_empty):
    model = attach_exits(make_empty('resnet18'), [-1])
    assert modules(model) == ['layer4.1']


def test_exit_points_of_a_name_are_those_of_its_model(make_backbone, tmp_path):
    save_pretrained(make_backbone('test_vit', img_size=96), tmp_path)
    folder, other = exit_points(f'local-dir:{tmp_path}'), exit_points('test_vit')
    assert folder == exit_points(make_backbone('test_vit', img_size=96))
    assert [point.size for point in folder] != [point.size for point in other]
    with pytest.raises(MultiExitError, match="timm has no model 'test_vitt', nearest are test_vit"):
        exit_points('test_vitt')
    (tmp_path / 'config.json').write_text('{"architecture": "test_vit", "model_args": {"pretrained_strict": false}}')
    with pytest.raises(MultiExitError, match='pretrained_strict'):
        exit_points(f'local-dir:{tmp_path}')


def test_exit_points_are_the_stages_with_their_cost(make_empty):
    points = exit_points(make_empty('resnet18'))
    assert [point.module for point in points] == ['act1', 'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']
    assert [point.index for point in points] == [0, 1, 2, 3, 4]
    assert [point.channels for point in points] == [64, 64, 128, 256, 512]
    assert [point.size for point in points] == [(side, side) for side in (112, 56, 28, 14, 7)]
    # The stem: 112 * 112 * 64 * 3 * 7 * 7 MACs; layer1 adds four 3x3 convolutions at 56 * 56 with 64 channels.
    assert points[0].cost.macs == 112 * 112 * 64 * 147
    assert points[1].cost.macs == 112 * 112 * 64 * 147 + 4 * 56 * 56 * 64 * 64 * 9
    # Its parameters: the convolution, and weight and bias of its norm.
    assert points[0].cost.params == 64 * 147 + 2 * 64


# Heads


@pytest.mark.parametrize(
    ('name', 'chains'),
    [
        ('resnet18', [[64, 64, 128, 256, 512], [128, 128, 256, 512], [256, 256, 512]]),
        ('resnet50', [[256, 256, 128, 256, 2048], [512, 512, 256, 2048], [1024, 1024, 2048]]),
    ],
)
def test_paper_heads_have_the_widths_of_the_paper(make_empty, name, chains):
    # The paper writes an exit as the channels of its tap and of each convolution: 64-128-256-512.
    expected = [chain[1:] for chain in chains]
    model = attach_exits(make_empty(name), head='paper')
    for spec, head, chain in zip(model.exits.specs, model.exits, expected, strict=True):
        convs = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
        assert [convs[0].in_channels, *(conv.out_channels for conv in convs)] == chain
        assert {(conv.kernel_size, conv.stride) for conv in convs} == {((3, 3), (2, 2))}
        assert [spec.channels, *spec.widths] == chain


def test_paper_heads_end_at_the_size_and_width_of_the_last_stage(make_empty):
    model = attach_exits(make_empty('resnet18'), head='paper')
    for spec, head in zip(model.exits.specs, model.exits):
        side = 224 // spec.reduction
        assert head.convs(torch.empty(1, spec.channels, side, side, device='meta')).shape == (1, 512, 7, 7)
        assert head.num_features == 512


@pytest.mark.parametrize('name', cases({name: name for name in ZOO}, slow=[*ZOO][6:]))
def test_conv_heads_are_cheap_and_every_exit_is_cheaper_than_the_plain_network(make_empty, name):
    costs = attach_exits(make_empty(name)).cost()
    *exits, main = costs
    assert len(exits) == ZOO[name]
    for cost in exits:
        assert 0 < cost.head.macs <= 0.10 * main.fixed.macs
        assert cost.fixed.macs < main.fixed.macs
    assert main.head.macs == 0


class Topheavy(nn.Module):
    """97 % of the MACs are in front of the exit, so that a head of 3 % would undo what leaving early saves."""

    def __init__(self):
        super().__init__()
        self.num_classes = 10
        self.num_features = self.head_hidden_size = 64
        self.pretrained_cfg = self.default_cfg = {'input_size': (3, 32, 32)}
        self.feature_info = [
            {'num_chs': 128, 'reduction': 4, 'module': 'early'},
            {'num_chs': 64, 'reduction': 8, 'module': 'late'},
        ]
        convs = [nn.Conv2d(128, 128, 3, padding=1) for _ in range(2)]
        self.early = nn.Sequential(nn.Conv2d(3, 128, 3, stride=4, padding=1), *convs)
        self.late = nn.Conv2d(128, 64, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(64, 10)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.late(self.early(x)).mean((2, 3)))


def test_head_is_narrowed_further_where_little_is_left_to_save():
    early = 64 * 128 * 3 * 9 + 2 * 64 * 128 * 128 * 9
    late = 16 * 64 * 64 * 9 + 64 * 10

    def head_macs(width):
        # 1x1 at 8x8, then depthwise 3x3 and 1x1 at 4x4, linear.
        return 64 * 128 * width + 16 * width * 9 + 16 * width * width + width * 10

    # The widest is within 4 % of the MACs, yet dearer than what it saves; 32 spare half of it, 48 do not.
    assert late < head_macs(64) < 0.04 * (early + late)
    assert head_macs(32) < late / 2 < head_macs(48)
    model = attach_exits(Topheavy())
    exit_cost, main = model.cost()
    assert main.fixed.macs == early + late
    assert exit_cost.fixed.macs == early + head_macs(32) < main.fixed.macs
    assert model.exits.specs[0].widths == (32, 32)


def test_zoo_holds_fifteen_backbones():
    assert len(ZOO) == 15


def test_linear_head_is_norm_pooling_and_a_linear_layer(make_model):
    model = make_model('test_resnet', head='linear').eval()
    for spec, head in zip(model.exits.specs, model.exits):
        assert spec.widths == ()
        assert {type(module) for module in head.modules() if len(list(module.parameters(recurse=False)))} == {
            LayerNorm2d,
            nn.Linear,
        }
        single = torch.randn(2, spec.channels, 6, 6)
        # Each position is normalised over its channels.
        mean = single.mean(1, keepdim=True)
        norm = (single - mean) / (single.var(1, unbiased=False, keepdim=True) + head.convs.eps).sqrt()
        norm = norm * head.convs.weight.view(1, -1, 1, 1) + head.convs.bias.view(1, -1, 1, 1)
        logits, features = head(single)
        torch.testing.assert_close(features, norm.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, features @ head.fc.weight.T + head.fc.bias, rtol=1e-4, atol=1e-5)


def test_given_widths_are_used(make_empty):
    widths = [[64, 24, 32, 40], [48, 56, 72], [80, 88]]
    model = attach_exits(make_empty('resnet18'), head_widths=widths)
    assert [list(spec.widths) for spec in model.exits.specs] == widths
    assert [head.fc.in_features for head in model.exits] == [40, 72, 88]


def test_dear_head_in_the_stem_says_its_cost_and_what_to_do(make_backbone, caplog):
    backbone = make_backbone('test_resnet')
    attach_exits(backbone, [1], input_size=(3, 64, 64))
    assert not caplog.records
    model = attach_exits(make_backbone('test_resnet'), [0], input_size=(3, 64, 64))
    costs = model.cost()
    percent = 100 * costs[0].head.macs / costs[-1].fixed.macs
    assert percent > 4
    assert [record.getMessage() for record in caplog.records] == [
        f"The narrowest head at {model.exits.specs[0].module} costs {percent:.3g} % of main's MACs, more than the 4 %"
        ' that are advised: choose other places or fewer exits by exits (--exits).'
    ]


@pytest.mark.parametrize('exits', [['blocks.3', 'blocks.1'], [3, 1], [-1, 0], [0.75, 0.25]], ids=str)
def test_widths_are_of_exits_in_order(exits):
    backbone = timm.create_model('test_vit', num_classes=5)
    widths = [[16, 24], [32, 64]]
    with pytest.raises(
        InvalidValueError, match='^exits must be in order, shallow to deep, where head_widths are given'
    ):
        attach_exits(backbone, exits, head_widths=widths)
    model = attach_exits(backbone, exits[::-1], head_widths=widths)
    assert [list(spec.widths) for spec in model.exits.specs] == widths


def test_head_of_the_paper_that_makes_an_exit_dearer_than_main_is_warned_of(caplog):
    attach_exits(timm.create_model('mobilenetv3_small_100'), 1, head='paper')
    (message,) = [text for text in caplog.messages if 'saves nothing' in text]
    assert re.match(r"The exit at blocks\.\S+ costs \d{3} % of main's MACs with a 'paper' head, so leaving", message)
