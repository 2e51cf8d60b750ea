"""Every layout of features, and how heads get their maps."""

import copy
import itertools
from typing import NamedTuple

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from helpers import enliven
from helpers.members import MEMBERS, SMALL_SWIN, SWIN, Member, assert_close, modules, record
from torch import nn

import timm_multiexit as tme
from timm_multiexit.exits.layouts import to_map
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import InvalidValueError


class Case(NamedTuple):
    row: Member
    plain: nn.Module
    model: tme.MultiExitModel
    x: torch.Tensor


@pytest.fixture(scope='module', params=MEMBERS)
def case(request):
    """A plain network, a copy of it with exits, both in eval mode, and images. Tests leave them as they are."""
    torch.manual_seed(0)
    row = MEMBERS[request.param]
    plain = enliven(timm.create_model(request.param, num_classes=10, **row.kwargs)).eval()
    for param in plain.parameters():
        if not param.any():  # a classifier that starts at zero
            nn.init.normal_(param, std=0.05)
    model = attach_exits(copy.deepcopy(plain), input_size=(3, row.size, row.size))
    enliven(model.exits)
    return Case(row, plain, model, torch.randn(2, 3, row.size, row.size))


def as_map(tensor, layout, grid, num_prefix_tokens):
    """Return [B, C, H, W], one place after the other."""
    if layout == 'NCHW':
        return tensor
    height, width = grid
    rows = []
    for row in range(height):
        if layout == 'NHWC':
            places = [tensor[:, row, column] for column in range(width)]
        else:
            places = [tensor[:, num_prefix_tokens + row * width + column] for column in range(width)]
        rows.append(torch.stack(places, -1))  # [B, C, W]
    return torch.stack(rows, -2)  # [B, C, H, W]


def test_main_is_the_plain_timm_model_bit_for_bit_in_every_layout(case):
    with torch.no_grad():
        expected = case.plain(case.x)
        answers = [case.model(case.x), case.model(case.x, exits=True).logits[-1], case.model(case.x, exit_idx=-1)]
    assert expected.isfinite().all()
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    for answer in answers:
        assert torch.equal(answer, expected)


def test_one_exit_gives_what_all_exits_give_in_every_layout(case):
    with torch.no_grad():
        logits = case.model(case.x, exits=True).logits
        assert len(logits) == len(case.row.exits) + 1
        for idx in (*range(len(logits)), -2):
            assert_close(case.model(case.x, exit_idx=idx), logits[idx])
    for first, second in itertools.combinations(logits, 2):
        assert (first - second).abs().max() > 1e-2, 'or a wrong index would go unseen'


def test_exit_classifies_the_map_at_its_tap_in_every_layout(case):
    assert modules(case.model) == [expected.module for expected in case.row.exits]
    _, left, _ = record(case.plain, case.x, outputs=modules(case.model))
    with torch.no_grad():
        outputs = case.model(case.x, exits=True)
        for idx, (expected, spec, head) in enumerate(zip(case.row.exits, case.model.exits.specs, case.model.exits)):
            given = (spec.layout, spec.num_prefix_tokens, spec.output)
            assert given == (expected.layout, expected.num_prefix_tokens, expected.output)
            tensor = left[expected.module]
            tensor = tensor if isinstance(tensor, torch.Tensor) else tensor[expected.output]
            tapped = as_map(tensor, expected.layout, expected.grid, expected.num_prefix_tokens)
            assert tapped.shape == (2, spec.channels, *expected.grid)
            if expected.layout == 'NLC':
                assert tensor.shape[1] == expected.num_prefix_tokens + expected.grid[0] * expected.grid[1]
            features = head.convs(tapped).mean((2, 3))
            assert_close(outputs.features[idx], features)
            assert_close(outputs.logits[idx], features @ head.fc.weight.T + head.fc.bias)


def test_loss_of_every_exit_reaches_its_own_head_and_the_first_convolution(case):
    logits = case.model(case.x, exits=True).logits
    first = next(module.weight for module in case.model.backbone.modules() if isinstance(module, nn.Conv2d))
    heads = [list(head.parameters()) for head in case.model.exits]
    for idx, own in enumerate(heads):
        others = [param for head in heads if head is not own for param in head]
        loss = F.cross_entropy(logits[idx], torch.tensor([1, 7]))
        grads = torch.autograd.grad(loss, [first, *own, *others], retain_graph=True, allow_unused=True)
        reached, untouched = grads[: 1 + len(own)], grads[1 + len(own) :]
        assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in reached)
        assert all(grad is None for grad in untouched)
    main = torch.autograd.grad(F.cross_entropy(logits[-1], torch.tensor([1, 7])), [first])
    assert main[0].any()


def test_features_of_main_are_what_enters_its_classifiers(case):
    _, _, entered = record(case.plain, case.x, inputs=case.row.classifiers)
    expected = [entered[name] for name in case.row.classifiers]
    with torch.no_grad():
        features = case.model(case.x, exits=True).features[-1]
    if len(expected) == 1:
        assert torch.equal(features, expected[0])
    elif case.row.join == 'concat':
        assert torch.equal(features, torch.cat(expected, 1))
    else:
        assert len(expected) == 2
        assert_close(features, (expected[0] + expected[1]) / 2)


def test_every_fixed_exit_costs_less_than_main_and_deeper_ones_more_in_every_layout(case):
    costs = [cost.fixed.macs for cost in case.model.cost()]
    assert len(costs) == len(case.row.exits) + 1
    assert 0 < costs[0]
    assert all(shallow < deep for shallow, deep in zip(costs, costs[1:]))


@pytest.mark.parametrize(
    ('name', 'size', 'layout'),
    [('test_mambaout', 64, 'NHWC'), (SWIN, 384, 'NHWC'), ('mambaout_femto', 192, 'NHWC'), ('test_resnet', 128, 'NCHW')],
)
def test_layout_is_told_right_where_the_first_map_is_as_high_and_wide_as_it_has_channels(
    make_empty,
    name,
    size,
    layout,
):
    kwargs = {'img_size': size} if name == SWIN else {}
    model = attach_exits(make_empty(name, **kwargs), input_size=(3, size, size))
    specs = model.exits.specs
    assert size // specs[0].reduction == specs[0].channels, 'the case has become another one'
    assert [spec.layout for spec in specs] == [layout] * 3


@pytest.mark.parametrize(
    ('name', 'num_blocks', 'expected'),
    [
        ('vit_tiny_patch16_224', 12, [2, 5, 8]),
        ('test_vit2', 8, [1, 3, 5]),
        ('mixer_s16_224', 8, [1, 3, 5]),
        ('cait_xxs24_224', 24, [5, 11, 17]),
        ('xcit_nano_12_p16_224', 12, [2, 5, 8]),
    ],
)
def test_auto_means_three_exits_at_the_quarters_of_an_isotropic_models_depth(make_empty, name, num_blocks, expected):
    backbone = make_empty(name)
    assert len(backbone.blocks) == num_blocks
    assert modules(attach_exits(backbone)) == [f'blocks.{idx}' for idx in expected]


@pytest.mark.parametrize('name', ['test_vit', 'test_vit3', 'gmlp_ti16_224'])
def test_auto_is_within_half_a_block_of_the_quarters_where_they_do_not_divide_the_depth(make_empty, name):
    backbone = make_empty(name)
    depth = len(backbone.blocks)
    assert depth % 4
    run = [int(module.split('.')[1]) + 1 for module in modules(attach_exits(backbone))]
    assert len(set(run)) == 3
    for quarter, blocks in enumerate(run, 1):
        assert abs(blocks - depth * quarter / 4) <= 0.5


@pytest.mark.parametrize('grid', [(4, 6), (6, 4), (1, 7), (10, 2), (14, 14)], ids=lambda grid: f'{grid[0]}x{grid[1]}')
@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 5])
def test_tokens_become_a_map_with_rows_from_top_to_bottom_and_columns_from_left_to_right(grid, num_prefix_tokens):
    height, width = grid
    places = [[-1.0, -1.0]] * num_prefix_tokens + [[row, col] for row in range(height) for col in range(width)]
    tokens = torch.tensor([places, [[-1.0 - row, 100.0 + col] for row, col in places]])  # [2, L, 2]
    spec = ExitSpec('blocks', 2, 1, 'conv', layout='NLC', num_prefix_tokens=num_prefix_tokens)
    result = to_map(tokens, spec, (16 * height, 16 * width))
    assert result.shape == (2, 2, height, width)
    for row in range(height):
        for col in range(width):
            assert result[0, :, row, col].tolist() == [row, col]
            assert result[1, :, row, col].tolist() == [-1 - row, 100 + col]


DYNAMIC = {'dynamic_img_size': True}


PADDED = {'dynamic_img_size': True, 'dynamic_img_pad': True}


@pytest.mark.parametrize(
    ('name', 'kwargs', 'attached_at', 'size', 'num_prefix_tokens', 'grids'),
    [
        ('test_resnet', {}, (64, 64), (64, 96), 0, [(16, 24), (8, 12), (4, 6)]),
        ('test_mambaout', {}, (96, 96), (64, 96), 0, [(16, 24), (8, 12), (4, 6)]),
        ('test_mambaout', {}, (64, 96), (96, 64), 0, [(24, 16), (12, 8), (6, 4)]),
        (SWIN, {**SMALL_SWIN, 'img_size': (64, 96)}, (64, 96), (64, 96), 0, [(16, 24), (8, 12), (4, 6)]),
        ('test_vit', {'img_size': (64, 96)}, (64, 96), (64, 96), 1, [(4, 6)] * 3),
        ('test_vit', DYNAMIC, (160, 160), (64, 96), 1, [(4, 6)] * 3),
        ('test_vit', DYNAMIC, (160, 160), (96, 64), 1, [(6, 4)] * 3),
        ('test_vit', DYNAMIC, (160, 160), (32, 160), 1, [(2, 10)] * 3),
        ('test_vit', PADDED, (160, 160), (70, 100), 1, [(5, 7)] * 3),
        ('test_vit', PADDED, (160, 160), (33, 48), 1, [(3, 3)] * 3),
        ('mixer_s16_224', {'img_size': (96, 64)}, (96, 64), (96, 64), 0, [(6, 4)] * 3),
        ('xcit_nano_12_p16_224', {}, (64, 64), (64, 96), 0, [(4, 6)] * 3),
        ('xcit_nano_12_p16_224', {}, (64, 64), (112, 52), 0, [(7, 4)] * 3),
        ('coat_lite_tiny', {'img_size': (64, 96)}, (64, 96), (64, 96), 1, [(16, 24), (8, 12), (4, 6)]),
        ('mvitv2_tiny', {}, (224, 224), (112, 52), 0, [(28, 13), (14, 7), (7, 4)]),
        ('twins_pcpvt_small', {'depths': (1, 2, 1, 1)}, (224, 224), (96, 64), 0, [(24, 16), (12, 8), (6, 4)]),
    ],
    ids=[
        'convnet',
        'channels-last',
        'channels-last-high',
        'swin',
        'vit',
        'dynamic-wide',
        'dynamic-high',
        'dynamic-strip',
        'padded',
        'padded-odd',
        'mixer',
        'xcit',
        'xcit-odd',
        'coat',
        'mvit-odd',
        'twins',
    ],
)
def test_head_gets_the_map_as_it_lies_in_an_image_that_is_not_square(
    make_backbone,
    name,
    kwargs,
    attached_at,
    size,
    num_prefix_tokens,
    grids,
):
    model = attach_exits(make_backbone(name, **kwargs), input_size=(3, *attached_at)).eval()
    images = torch.randn(1, 3, *size)
    names = modules(model)
    _, left, _ = record(model.backbone, images, outputs=names)
    entered = {}
    for idx, head in enumerate(model.exits):
        head.register_forward_pre_hook(lambda module, args, idx=idx: entered.update({idx: args[0]}))
    with torch.no_grad():
        outputs = model(images, exits=True)
        assert torch.equal(outputs.logits[-1], model.backbone(images))
        assert_close(model(images, exit_idx=1), outputs.logits[1])
    for idx, (tap, spec, grid) in enumerate(zip(names, model.exits.specs, grids, strict=True)):
        tensor = left[tap] if isinstance(left[tap], torch.Tensor) else left[tap][spec.output]
        layout = 'NLC' if tensor.ndim == 3 else MEMBERS[name].exits[idx].layout
        expected = as_map(tensor, layout, grid, num_prefix_tokens)
        assert entered[idx].shape == expected.shape == (1, spec.channels, *grid)
        assert torch.equal(entered[idx], expected)


def test_patches_that_are_no_grid_are_refused():
    """A head with convolutions would learn on neighbours that are none."""
    backbone = timm.create_model('test_vit', num_classes=5, patch_drop_rate=0.25)
    with pytest.raises(
        InvalidValueError, match="^patch_drop_rate must be 0 for heads with convolutions, got 0.25: .*'linear'"
    ):
        attach_exits(backbone, 2)
    model = attach_exits(backbone, 2, head='linear').train()
    assert len(model(torch.randn(2, 3, 160, 160), exits=True).logits) == 3
    with pytest.raises(InvalidValueError, match=r'^patch_size must be square for exits on tokens, got \(8, 16\)'):
        attach_exits(timm.create_model('test_vit', num_classes=5, patch_size=(8, 16)), 2)
