"""Exits by shares of the MACs: block ends and their MACs worked by hand, on several families."""

import numpy as np
import pytest
import torch
from helpers.members import modules
from torch import nn

from timm_multiexit.checkpoints.save import save_pretrained
from timm_multiexit.exits.stages import find_block_ends, stage_entries
from timm_multiexit.factory import create_model
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import MultiExitError

SHARES = [0.25, 0.5, 0.75]


def resnet18():
    # 224 pixels: 7x7 at 112, then eight blocks of two 3x3 convolutions; where the map is halved also a 1x1 beside.
    ends = {'act1': 112**2 * 64 * 3 * 49}
    width, side = 64, 56
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            entering = width if stage == 1 or block else width // 2
            macs = side**2 * width * (entering + width) * 9
            ends[f'layer{stage}.{block}'] = macs + (side**2 * width * entering if entering < width else 0)
        width, side = width * 2, side // 2
    return ends, 512 * 1000


def vit_tiny():
    # 196 patches of 16 pixels and a class token, width 192: four square matrices and two of four times the width, and
    # products of 197 x 197 tokens twice.
    block = 197 * 192 * 192 * 12 + 2 * 197 * 197 * 192
    ends = {'norm_pre': 196 * 192 * 768} | {f'blocks.{idx}': block for idx in range(12)}
    return ends, 192 * 1000


def convnext_tiny():
    ends = {'stem.1': 56**2 * 96 * 48}
    width, side = 96, 56
    for stage, depth in enumerate((3, 3, 9, 3)):
        if stage:
            width, side = width * 2, side // 2
            ends[f'stages.{stage}.downsample.1'] = side**2 * width * (width // 2) * 4
        # A depthwise 7x7, then to four times the width and back. The stage's end is named for its last block.
        for idx in range(depth):
            name = f'stages.{stage}' if idx == depth - 1 else f'stages.{stage}.blocks.{idx}'
            ends[name] = side**2 * width * (49 + 8 * width)
    return ends, 768 * 1000


def efficientnet_lite0():
    ends = {'bn1': 112**2 * 32 * 27, 'blocks.0.0': 112**2 * (32 * 9 + 32 * 16)}
    entering, side = 16, 112
    rows = ((24, 2, 3, 2), (40, 2, 5, 2), (80, 3, 3, 2), (112, 3, 5, 1), (192, 4, 5, 2), (320, 1, 3, 1))
    for stage, (width, depth, kernel, stride) in enumerate(rows, 1):
        for idx in range(depth):
            # Expansion to six times the width at the old size, depthwise and projection at the new one.
            expanded = 6 * entering
            macs = side**2 * entering * expanded
            side = side // stride if idx == 0 else side
            ends[f'blocks.{stage}.{idx}'] = macs + side**2 * expanded * (kernel**2 + width)
            entering = width
    return ends, 7**2 * 320 * 1280 + 1280 * 1000


FAMILIES = {
    'resnet18': (resnet18, ['layer1.0', 'layer2.1', 'layer3.1']),
    'vit_tiny_patch16_224': (vit_tiny, ['blocks.2', 'blocks.5', 'blocks.8']),
    'convnext_tiny': (convnext_tiny, ['stages.1.blocks.0', 'stages.2.blocks.2', 'stages.2.blocks.6']),
    'efficientnet_lite0': (efficientnet_lite0, ['blocks.2.0', 'blocks.4.0', 'blocks.5.1']),
}


@pytest.mark.parametrize('name', FAMILIES)
def test_exits_are_at_the_block_ends_nearest_to_their_shares(make_empty, name):
    count, expected = FAMILIES[name]
    parts, rest = count()
    spent = dict(zip(parts, np.cumsum(list(parts.values())).tolist()))
    total = max(spent.values()) + rest
    nearest = [min(spent, key=lambda part: abs(spent[part] - share * total)) for share in SHARES]
    assert nearest == expected, 'the numbers by hand give other places'
    model = attach_exits(make_empty(name), SHARES)
    costs = model.cost()
    assert modules(model) == nearest
    assert [cost.fixed.macs - cost.head.macs for cost in costs] == [*(spent[part] for part in nearest), total]
    assert len(costs) == 4
    for cost in costs[:-1]:
        assert 0 < cost.head.macs <= 0.04 * total
        assert cost.fixed.macs < total


@pytest.mark.parametrize(
    ('name', 'head'),
    [
        ('resnet50', 'conv'),
        pytest.param('resnet50', 'paper', marks=pytest.mark.slow),
        pytest.param('resnet50', 'linear', marks=pytest.mark.slow),
        ('densenet121', 'conv'),
        ('efficientnet_lite0', 'conv'),
        pytest.param('swin_tiny_patch4_window7_224', 'conv', marks=pytest.mark.slow),
    ],
)
def test_each_exit_costs_less_than_the_plain_network_whatever_its_share(make_empty, name, head):
    model = attach_exits(make_empty(name), [0.2, 0.4, 0.97], head=head)
    *exits, main = model.cost()
    assert len(exits) == 3
    paths = [cost.fixed.macs - cost.head.macs for cost in exits]
    assert paths == sorted(set(paths))
    assert max(cost.fixed.macs for cost in exits) < main.fixed.macs


def test_heads_that_never_pay_are_refused(make_empty):
    # Their last layers have main's width, 1,280.
    message = r"at most 0 shares for EfficientNet with heads 'bottleneck', got 2: .* less than main are none\.$"
    with pytest.raises(MultiExitError, match=message):
        attach_exits(make_empty('efficientnet_lite0'), [0.25, 0.5], head='bottleneck')


class Branches(nn.Module):
    """Two convolutions beside each other between two others, and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        x = self.left(x) + self.right(x)
        return self.fc(self.last(x).mean((2, 3)))


def test_branch_that_others_bypass_is_not_the_end_of_a_block():
    net = Branches()
    assert find_block_ends(net, [], (3, 16, 16)) == ['first.0', 'first.1', 'last.0', 'last.1', 'last.2', 'fc']
    # 64 places x 8 x 27 is 13,824 MACs; each branch 64 x 8 x 72; the last 16 x 16 x 72; 64 of the classifier.
    model = attach_exits(net, [0.1], input_size=(3, 16, 16), head='linear')
    assert modules(model) == ['first.1']
    assert model.cost()[0].fixed.macs == 13824 + 8 * 4
    assert model.cost()[-1].fixed.macs == 13824 + 2 * 36864 + 18432 + 64


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_mambaout', 'test_vit'])
def test_images_can_leave_at_the_ends_of_blocks(make_model, name):
    # What is carried past a tap would keep them: an independent sign that all that comes later reads it alone.
    model = make_model(name, [0.2, 0.4, 0.6], input_size=None).eval()
    assert model.can_leave == (True, True, True)


def test_blocks_of_cs3darknet_which_half_of_the_channels_bypass_are_left_out(make_empty):
    backbone = make_empty('cs3darknet_s')
    ends = find_block_ends(backbone, stage_entries(backbone), (3, 256, 256))
    assert {'stages.0', 'stages.1', 'stages.2', 'stages.3'} <= set(ends)
    assert [name for name in ends if '.blocks.' in name] == []
    names = dict(backbone.named_modules())
    assert 'stages.0.blocks.0' in names


def test_shares_come_in_any_order_and_of_any_kind_of_number(make_empty):
    expected = modules(attach_exits(make_empty('resnet18'), SHARES))
    for shares in ([0.75, 0.25, 0.5], (0.5, 0.75, 0.25), [np.float32(0.25), np.float64(0.5), 0.75]):
        assert modules(attach_exits(make_empty('resnet18'), shares)) == expected


def test_two_shares_next_to_one_block_take_two_blocks(make_empty):
    # layer2.1 ends at 55 %, layer2.0 at 43 %.
    assert modules(attach_exits(make_empty('resnet18'), [0.52, 0.54])) == ['layer2.0', 'layer2.1']


WRONG = {
    'above-1': ([0.25, 1.5], r"exits must be shares of the backbone's MACs in \(0, 1\), got \[0.25, 1.5\]\."),
    'all': ([1.0], r'in \(0, 1\), got \[1.0\]'),
    'none': ([0.0, 0.5], r'in \(0, 1\), got \[0.0, 0.5\]'),
    'nan': ([float('nan')], r'in \(0, 1\), got \[nan\]'),
    'index': ([0.5, 2], r"exits must be all shares of the backbone's MACs or none, got \[0.5, 2\]\."),
    'name': ([0.5, 'layer2'], r'all shares .* or none, got'),
    'twice': ([0.5, 0.5], r'exits must name each place once, got \[0.5, 0.5\]\.'),
    'bare': (0.5, r"exits must be 'auto', a number of exits or a list, got 0.5\."),
    'too-many': (
        [idx / 40 for idx in range(1, 40)],
        r"exits must be at most 8 shares for ResNet with heads 'conv', got 39: .* less than main are act1 \(7%\), layer1.0 ",
    ),
}


@pytest.mark.parametrize(('exits', 'message'), WRONG.values(), ids=WRONG)
def test_wrong_shares_are_one_line(make_empty, exits, message):
    with pytest.raises(MultiExitError, match=message) as caught:
        attach_exits(make_empty('resnet18'), exits)
    assert '\n' not in str(caught.value)


def test_folder_keeps_exits_of_shares(tmp_path):
    model = create_model('test_resnet', exits=[0.3, 0.6], num_classes=4)
    save_pretrained(model, tmp_path)
    loaded = create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.exits.specs == model.exits.specs
    x = torch.randn(2, *model.input_size)
    for one, other in zip(loaded.eval()(x, exits=True).logits, model.eval()(x, exits=True).logits, strict=True):
        assert torch.equal(one, other)
