"""timm's whole surface: layouts, keywords, helpers and changes of a model after its exits were attached."""

import copy
import itertools
import pickle
from typing import NamedTuple

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from helpers import enliven
from timm.data import resolve_data_config
from timm.layers import DropPath, convert_sync_batchnorm
from timm.models import group_parameters, load_checkpoint
from timm.models.convmixer import ConvMixer
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, freeze
from torch import nn

import timm_multiexit as tme
from timm_multiexit.exits.layouts import to_map
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import MultiExitError


class Exit(NamedTuple):
    """Where an exit has to be, read off timm's source by hand."""

    module: str
    layout: str
    grid: tuple[int, int]
    num_prefix_tokens: int = 0
    output: int = 0


class Member(NamedTuple):
    """A small network of one layout.

    Attributes:
        size: Height and width of the images.
        exits: What 'auto' has to give.
        classifiers: Modules that make main's logits.
        join: How main's features come from what enters several classifiers: 'mean' or 'concat'.
        kwargs: For `timm.create_model`.
    """

    size: int
    exits: tuple[Exit, ...]
    classifiers: tuple[str, ...]
    join: str = ''
    kwargs: dict = {}


def stages(names, layout, grids, **kwargs):
    return tuple(Exit(name, layout, (grid, grid), **kwargs) for name, grid in zip(names.split(), grids, strict=True))


SMALL = {'img_size': 64}
SMALL_SWIN = {'img_size': 64, 'window_size': 4, 'embed_dim': 32, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8)}
SWIN = 'swin_tiny_patch4_window7_224'
DEIT = 'deit_tiny_distilled_patch16_224'
MEMBERS = {
    # Maps NCHW
    'test_resnet': Member(64, stages('layer1.0 layer2.0 layer3.0', 'NCHW', (16, 8, 4)), ('fc',)),
    'test_efficientnet': Member(64, stages('blocks.1.0 blocks.2.0 blocks.3.0', 'NCHW', (16, 8, 4)), ('classifier',)),
    # Maps NHWC
    'test_mambaout': Member(96, stages('stages.0 stages.1 stages.2', 'NHWC', (24, 12, 6)), ('head.fc',)),
    SWIN: Member(
        64,
        stages('layers.0 layers.1 layers.2', 'NHWC', (16, 8, 4)),
        ('head.fc',),
        kwargs=SMALL_SWIN,
    ),
    # Tokens behind class tokens
    'test_vit': Member(
        64, stages('blocks.1 blocks.2 blocks.3', 'NLC', (4, 4, 4), num_prefix_tokens=1), ('head',), kwargs=SMALL
    ),
    DEIT: Member(
        64,
        stages('blocks.2 blocks.5 blocks.8', 'NLC', (4, 4, 4), num_prefix_tokens=2),
        ('head', 'head_dist'),
        'mean',
        kwargs={'img_size': 64, 'embed_dim': 96},
    ),
    # Tokens alone
    'mixer_s16_224': Member(64, stages('blocks.1 blocks.3 blocks.5', 'NLC', (4, 4, 4)), ('head',), kwargs=SMALL),
    # Several classifiers
    'crossvit_9_240': Member(
        240,
        stages('blocks.0 blocks.1', 'NLC', (20, 20), num_prefix_tokens=1),
        ('head.0', 'head.1'),
        'concat',
        {'embed_dim': [64, 128], 'num_heads': [2, 2]},
    ),
    'efficientformer_l1': Member(
        224, stages('stages.0 stages.1 stages.2', 'NCHW', (56, 28, 14)), ('head', 'head_dist'), 'mean'
    ),
    'efficientvim_m1': Member(
        64, stages('stages.0 stages.1', 'NCHW', (4, 2)), tuple(f'heads.{idx}' for idx in range(4)), 'concat'
    ),
    'levit_128s': Member(64, stages('stages.0 stages.1', 'NLC', (4, 2)), ('head', 'head_dist'), 'mean', kwargs=SMALL),
    # Several outputs
    'pit_ti_224': Member(64, stages('transformers.0 transformers.1', 'NCHW', (7, 4)), ('head',), kwargs=SMALL),
    'tnt_s_patch16_224': Member(
        64,
        stages('blocks.2 blocks.5 blocks.8', 'NLC', (4, 4, 4), num_prefix_tokens=1, output=1),
        ('head',),
        kwargs={'img_size': 64, 'embed_dim': 96, 'num_heads_outer': 3},
    ),
    'hrnet_w18_small': Member(
        64,
        (
            Exit('layer1.0', 'NCHW', (16, 16)),
            Exit('stage2', 'NCHW', (8, 8), output=1),
            Exit('stage3', 'NCHW', (4, 4), output=2),
        ),
        ('classifier',),
    ),
    # Families whose feature_info is mended
    'coat_lite_tiny': Member(
        64,
        stages('serial_blocks1.1 serial_blocks2.1 serial_blocks3.1', 'NLC', (16, 8, 4), num_prefix_tokens=1),
        ('head',),
        kwargs=SMALL,
    ),
    'mvitv2_tiny': Member(64, stages('stages.0 stages.1 stages.2', 'NLC', (16, 8, 4)), ('head.fc',), kwargs=SMALL),
    'twins_pcpvt_small': Member(
        64,
        stages('blocks.0.0 blocks.1.1 blocks.2.0', 'NLC', (16, 8, 4)),
        ('head',),
        kwargs={'img_size': 64, 'depths': (1, 2, 1, 1)},
    ),
}
# Members that take a hundredth of a second.
QUICK = ('test_resnet', 'test_efficientnet', 'test_mambaout', 'test_vit')


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


@pytest.fixture
def make_small(make_backbone):
    """Return a function that makes a member of the table with exits; further keywords go to timm."""

    def make(name, *, num_classes=10, **kwargs):
        row = MEMBERS[name]
        backbone = make_backbone(name, num_classes=num_classes, **{**row.kwargs, **kwargs})
        model = attach_exits(backbone, input_size=(kwargs.get('in_chans', 3), row.size, row.size))
        enliven(model.exits)
        return model

    return make


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def modules(model):
    return [spec.module for spec in model.exits.specs]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same_answers(first, second, x):
    """Both models say the same, at every classifier, and not all classifiers say the same."""
    with torch.no_grad():
        actual, expected = first(x, exits=True), second(x, exits=True)
    assert len(actual.logits) == len(expected.logits) >= 2
    for one, other in zip(actual.logits + actual.features, expected.logits + expected.features):
        assert torch.equal(one, other)
    assert not torch.equal(expected.logits[0], expected.logits[-1])


def record(network, x, outputs=(), inputs=()):
    """Return what the network gives, and what leaves and what enters the modules of these names."""
    left, entered, handles = {}, {}, []
    for name in outputs:
        module = network.get_submodule(name)
        handles.append(module.register_forward_hook(lambda m, args, out, name=name: left.update({name: out})))
    for name in inputs:
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: entered.update({name: args[0]})))
    with torch.no_grad():
        result = network(x)
    for handle in handles:
        handle.remove()
    return result, left, entered


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


# Every layout


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


# Keywords of timm


@pytest.mark.parametrize('name', [*QUICK, DEIT, 'levit_128s', 'efficientvim_m1', 'crossvit_9_240'])
def test_reset_classifier_gives_every_classifier_the_new_classes_and_keeps_the_features(make_small, name):
    model = make_small(name).eval()
    images = torch.randn(1, 3, MEMBERS[name].size, MEMBERS[name].size)
    with torch.no_grad():
        before = model(images, exits=True)
        model.reset_classifier(7)
        after = model(images, exits=True)
        single = [tuple(model(images, exit_idx=idx).shape) for idx in range(len(after.logits))]
    assert model.num_classes == 7
    assert {tuple(logits.shape) for logits in after.logits} == set(single) == {(1, 7)}
    _, left, _ = record(model.backbone, images, outputs=MEMBERS[name].classifiers)
    assert [tuple(left[key].shape) for key in MEMBERS[name].classifiers] == [(1, 7)] * len(left)
    assert [head.fc.out_features for head in model.exits] == [7] * len(model.exits)
    for old, new in zip(before.features, after.features, strict=True):
        assert torch.equal(new, old)


def test_reset_classifier_passes_the_pooling_on(make_small, x):
    model = make_small('test_vit').eval()
    before = model(x, exits=True)
    model.reset_classifier(7, 'avg')
    after = model(x, exits=True)
    assert model.backbone.global_pool == 'avg'
    assert [tuple(logits.shape) for logits in after.logits] == [(2, 7)] * 4
    assert torch.equal(after.features[0], before.features[0])
    assert not torch.allclose(after.features[-1], before.features[-1], atol=1e-3)


@pytest.mark.parametrize('name', [*QUICK, DEIT, 'levit_128s', 'efficientvim_m1', 'crossvit_9_240'])
def test_model_without_classes_gives_features_and_gets_classifiers_later(make_small, name):
    model = make_small(name, num_classes=0).eval()
    images = torch.randn(1, 3, MEMBERS[name].size, MEMBERS[name].size)
    with torch.no_grad():
        before = model(images, exits=True)
        assert len(before.logits) == len(MEMBERS[name].exits) + 1
        for logits, features in zip(before.logits, before.features):
            assert torch.equal(logits, features)
        assert torch.equal(model(images), before.features[-1])
        assert torch.equal(model(images, exit_idx=0), before.features[0])
        model.reset_classifier(5)
        after = model(images, exits=True)
    assert [tuple(logits.shape) for logits in after.logits] == [(1, 5)] * len(before.logits)
    for old, new in zip(before.features, after.features):
        assert torch.equal(new, old)


@pytest.mark.parametrize('name', QUICK)
def test_one_channel_reaches_images_costs_and_answers(name):
    gray = tme.create_model(name, num_classes=10, in_chans=1).eval()
    color = tme.create_model(name, num_classes=10)
    size = gray.input_size[-1]
    assert gray.in_chans == 1
    assert gray.input_size == (1, size, size)
    outputs = gray(torch.randn(2, 1, size, size), exits=True)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 10)] * 4
    # The first convolution alone is cheaper, by two channels of three.
    first = next(module for module in gray.backbone.modules() if isinstance(module, nn.Conv2d))
    pixels = (size // first.stride[0]) ** 2
    spared = 2 * pixels * first.out_channels * first.kernel_size[0] * first.kernel_size[1]
    assert color.cost()[-1].fixed.macs - gray.cost()[-1].fixed.macs == spared


def count_vit_macs(size, *, width=192, depth=12, exit_at=(2, 5, 8), num_classes=10):
    """Return the MACs of every fixed exit of a ViT with 16 pixel patches, class token, and separable heads."""
    side = size // 16
    num_tokens = side**2 + 1
    patches = side**2 * width * 3 * 16**2
    qkv, attention, proj = 3 * num_tokens * width**2, 2 * num_tokens**2 * width, num_tokens * width**2
    mlp = 2 * num_tokens * width * 4 * width
    half = (side + 1) // 2
    head = half**2 * width * (9 + width) + width * num_classes  # 3x3 by channel, 1x1, linear
    block = qkv + attention + proj + mlp
    return [patches + (idx + 1) * block + head for idx in exit_at] + [patches + depth * block + width * num_classes]


def test_img_size_of_a_vit_sets_the_size_and_costs_follow():
    models = {size: tme.create_model('vit_tiny_patch16_224', num_classes=10, img_size=size) for size in (96, 224)}
    for size, model in models.items():
        assert model.input_size == (3, size, size)
        assert [spec.widths for spec in model.exits.specs] == [(192, 192)] * 3
        assert [cost.fixed.macs for cost in model.cost()] == count_vit_macs(size)
    assert all(small.fixed.macs < large.fixed.macs for small, large in zip(models[96].cost(), models[224].cost()))
    assert len(models[96].eval()(torch.randn(1, 3, 96, 96), exits=True).logits) == 4


@pytest.mark.parametrize('grid', [(4, 6), (6, 4), (1, 7), (10, 2), (14, 14)], ids=lambda grid: f'{grid[0]}x{grid[1]}')
@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 5])
def test_tokens_become_a_map_with_rows_from_top_to_bottom_and_columns_from_left_to_right(grid, num_prefix_tokens):
    height, width = grid
    places = [[-1.0, -1.0]] * num_prefix_tokens + [[row, col] for row in range(height) for col in range(width)]
    tokens = torch.tensor([places, [[-1.0 - row, 100.0 + col] for row, col in places]])  # [2, L, 2]
    result = to_map(tokens, 'NLC', num_prefix_tokens=num_prefix_tokens, image_size=(16 * height, 16 * width))
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


def test_vit_of_flexible_size_answers_at_several_sizes_one_after_the_other():
    model = tme.create_model('test_vit', num_classes=10, dynamic_img_size=True).eval()
    for size in ((64, 96), (160, 160), (96, 64), (48, 208)):
        images = torch.randn(1, 3, *size)
        tokens = record(model.backbone, images, outputs=modules(model))[1]['blocks.1']
        grid = model.backbone.patch_embed.dynamic_feat_size(size)
        assert grid == (size[0] // 16, size[1] // 16)
        spec = model.exits.specs[0]
        tapped = to_map(tokens, spec.layout, num_prefix_tokens=spec.num_prefix_tokens, image_size=size)
        assert tapped.shape == (1, 64, *grid)
        logits, _ = model.exits[0](tapped)
        assert_close(model(images, exit_idx=0), logits)


@pytest.mark.parametrize('pool', ['max', 'avg', 'token'])
def test_pooling_of_a_vit_reaches_main_and_its_features(make_backbone, x, pool):
    backbone = make_backbone('test_vit', img_size=64, global_pool=pool).eval()
    model = attach_exits(copy.deepcopy(backbone)).eval()
    with torch.no_grad():
        tokens = backbone.forward_features(x)  # [B, 1 + L, D]
        pooled = {'max': tokens[:, 1:].amax(1), 'avg': tokens[:, 1:].mean(1), 'token': tokens[:, 0]}[pool]
        outputs = model(x, exits=True)
        assert torch.equal(outputs.logits[-1], backbone(x))
        assert_close(outputs.features[-1], backbone.fc_norm(pooled))
        assert_close(outputs.logits[-1], backbone.head(outputs.features[-1]))


@pytest.mark.parametrize(
    ('name', 'drop_rate'),
    [('test_resnet', 0.0), ('test_vit', 0.0)]
    + [(name, 0.3) for name in ('test_resnet', 'test_mambaout', 'test_vit', SWIN, DEIT, 'mixer_s16_224', 'pit_ti_224')],
)
def test_drop_rate_reaches_the_heads(name, drop_rate):
    with torch.device('meta'):
        model = tme.create_model(name, num_classes=10, drop_rate=drop_rate, **MEMBERS[name].kwargs)
    assert [head.drop.p for head in model.exits] == [drop_rate] * len(model.exits)


@pytest.mark.parametrize('name', ['test_vit', 'test_mambaout', SWIN, DEIT])
def test_transformer_in_training_is_the_plain_timm_model_bit_for_bit(make_backbone, x, name):
    kwargs = {} if name == 'test_mambaout' else MEMBERS[name].kwargs
    plain = make_backbone(name, drop_rate=0.2, drop_path_rate=0.2, **kwargs).train()
    model = attach_exits(copy.deepcopy(plain), input_size=(3, 64, 64)).train()
    assert [path.drop_prob for path in model.modules() if isinstance(path, DropPath)][-1] == pytest.approx(0.2)

    def run(network, **form):
        torch.manual_seed(1)
        return network(x, **form)

    expected = run(plain)
    assert not torch.equal(plain(x), expected), 'nothing is drawn, so the comparison would not see a head that draws'
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model, exits=True).logits[-1], expected)


# Training


def hold_norm_and_dropout(model):
    """Put layers that draw from or write to outside state in eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout, DropPath)):
            module.eval()
    return model


@pytest.mark.parametrize('name', ['test_vit', 'test_mambaout', SWIN, DEIT])
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(make_small, name):
    model = make_small(name)
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    linears = [module for module in model.backbone.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]

    def run():
        with torch.no_grad():
            outputs = model.eval()(images, exits=True)
        hold_norm_and_dropout(model).zero_grad()
        loss = sum(logits.square().mean() for logits in model(images, exits=True).logits)
        again = []
        handles = [linear.register_forward_pre_hook(lambda *args: again.append(1)) for linear in linears]
        loss.backward()
        for handle in handles:
            handle.remove()
        return outputs, {key: param.grad for key, param in model.named_parameters()}, len(again)

    outputs, gradients, repeated = run()
    assert repeated == 0
    model.set_grad_checkpointing(True)
    checkpointed, actual, repeated = run()
    assert repeated > 0
    for one, other in zip(checkpointed.logits + checkpointed.features, outputs.logits + outputs.features, strict=True):
        assert torch.equal(one, other)
    reached = {key for key, gradient in gradients.items() if gradient is not None}
    assert reached == {key for key, gradient in actual.items() if gradient is not None}
    assert len(reached) > 0.9 * len(gradients)
    for key in reached:
        torch.testing.assert_close(actual[key], gradients[key], msg=lambda text, key=key: f'{key}: {text}')
    model.set_grad_checkpointing(False)
    assert run()[2] == 0


@pytest.mark.parametrize('name', ['test_vit', SWIN, DEIT, 'levit_128s', 'tnt_s_patch16_224'])
def test_parameters_that_timm_spares_from_weight_decay_are_spared_under_their_new_names(make_empty, name):
    model = attach_exits(make_empty(name, **MEMBERS[name].kwargs))
    own, params = set(model.backbone.no_weight_decay()), dict(model.named_parameters())
    existing = own & {key for key, _ in model.backbone.named_parameters()}
    assert existing
    assert model.no_weight_decay() == {f'backbone.{key}' for key in own}
    assert {f'backbone.{key}' for key in existing} <= params.keys()
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    names = {id(param): key for key, param in params.items()}
    decays = {names[id(param)]: group['weight_decay'] for group in optimizer.param_groups for param in group['params']}
    assert decays.keys() == params.keys()
    for key in existing:
        assert decays[f'backbone.{key}'] == 0
    assert decays['exits.0.fc.weight'] == 0.05


def layer_scales(model, layer_decay):
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    names = {id(param): key for key, param in model.named_parameters()}
    scales = {names[id(param)]: group['lr_scale'] for group in optimizer.param_groups for param in group['params']}
    assert scales.keys() == set(names.values())
    return scales


def test_layer_decay_of_a_vit_is_by_block_with_the_heads_at_the_full_rate(make_empty):
    scales = layer_scales(attach_exits(make_empty('test_vit')), 0.5)
    # Six blocks between the stem and the classifiers; the last norm goes with the last block.
    parts = {'cls_token': 7, 'pos_embed': 7, 'patch_embed.': 7, 'norm.': 1, 'head.': 0}
    parts |= {f'blocks.{idx}.': 6 - idx for idx in range(6)}
    expected = {}
    for key in scales:
        steps = [steps for part, steps in parts.items() if key.startswith(f'backbone.{part}')]
        assert len(steps) == (0 if key.startswith('exits.') else 1)
        expected[key] = 0.5 ** sum(steps)
    assert scales == expected


def test_layer_decay_of_a_resnet_has_the_heads_at_the_full_rate(make_empty):
    scales = layer_scales(attach_exits(make_empty('resnet18')), 0.5)
    heads = {scale for key, scale in scales.items() if key.startswith('exits.')}
    assert heads == {scales['backbone.fc.weight']} == {1.0}
    # Stem, eight blocks, classifier.
    blocks = [f'backbone.layer{stage}.{block}.conv1.weight' for stage in range(1, 5) for block in range(2)]
    assert [scales[key] for key in blocks] == [0.5**steps for steps in range(8, 0, -1)]
    assert scales['backbone.conv1.weight'] == 0.5**9


def test_layer_decay_works_with_a_matcher_that_is_a_function(make_empty):
    model = attach_exits(make_empty('cait_xxs24_224'))
    assert callable(model.backbone.group_matcher())
    scales = layer_scales(model, 0.5)
    assert {scale for key, scale in scales.items() if key.startswith('exits.')} == {1.0}
    steps = [scales[f'backbone.blocks.{idx}.attn.qkv.weight'] for idx in range(24)]
    # The token blocks share the steps of the last blocks.
    assert steps == [0.5 ** (24 - idx) for idx in range(24)]
    assert scales['backbone.patch_embed.proj.weight'] == 0.5**25


class Handmade(nn.Module):
    """A network of two stages that says what timm needs to know and no more."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 5)
        self.num_classes = 5
        self.feature_info = [
            {'num_chs': 6, 'reduction': 4, 'module': 'stage1'},
            {'num_chs': 8, 'reduction': 8, 'module': 'stage2'},
        ]

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


class Grouped(Handmade):
    """The same with a matcher that is a function."""

    def group_matcher(self, coarse=False):
        order = {'stem': 0, 'stage1': 1, 'stage2': 2}
        return lambda name: order.get(name.split('.')[0], float('inf'))


class Spared(Handmade):
    """The same with parameters that want no weight decay, as a list."""

    def no_weight_decay(self):
        return ['stem.weight']


def test_handmade_backbone_needs_no_more_than_stages_and_a_classifier(x):
    plain = Handmade().eval()
    model = attach_exits(copy.deepcopy(plain), input_size=(3, 64, 64))
    assert modules(model) == ['stage1.1']
    outputs = model(x, exits=True)
    assert torch.equal(outputs.logits[-1], plain(x))
    assert torch.equal(model(x, exit_idx=0), outputs.logits[0])
    assert model.no_weight_decay() == set()


def test_handmade_backbone_without_group_matcher_is_refused_with_layer_decay_in_one_line():
    model = attach_exits(Handmade(), input_size=(3, 64, 64))
    with pytest.raises(MultiExitError, match='Handmade has no group_matcher.*leave layer decay out') as error:
        timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3, layer_decay=0.5)
    assert '\n' not in str(error.value)
    assert len(timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3).param_groups) > 0


@pytest.mark.parametrize('coarse', [False, True])
def test_groups_of_a_handmade_matcher_are_its_own_with_the_heads_last(coarse):
    model = attach_exits(Grouped(), input_size=(3, 64, 64))
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    expected = {'stem': 0, 'stage1': 1, 'stage2': 2, 'fc': 3}
    assert len(layers) == len(list(model.parameters()))
    for key, layer in layers.items():
        assert layer == (3 if key.startswith('exits.') else expected[key.split('.')[1]])


def test_handmade_list_of_spared_parameters_is_understood():
    model = attach_exits(Spared(), input_size=(3, 64, 64))
    assert model.no_weight_decay() == {'backbone.stem.weight'}


# Copies and conversions


@pytest.mark.parametrize(
    'duplicate',
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=['deepcopy', 'pickle'],
)
@pytest.mark.parametrize('name', ['test_vit', 'test_mambaout', DEIT])
def test_duplicate_answers_to_itself_and_survives_changes_of_the_original(make_small, name, duplicate):
    model = make_small(name).eval()
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    model(images, exits=True)
    double = duplicate(model)
    with torch.no_grad():
        before = model(images, exits=True)
        assert_same_answers(double, model, images)
        for param in model.parameters():
            param.mul_(1.1)
        after, doubled = model(images, exits=True), double(images, exits=True)
    for old, new, same in zip(before.logits, after.logits, doubled.logits):
        assert torch.equal(same, old)
        assert not torch.allclose(new, old, atol=1e-3)


@pytest.mark.parametrize('name', QUICK)
def test_channels_last_gives_the_same_answers(make_small, name):
    model = make_small(name).eval()
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    with torch.no_grad():
        expected = model(images, exits=True)
        model.to(memory_format=torch.channels_last)
        converted = [param for param in model.parameters() if param.ndim == 4 and min(param.shape[1:]) > 1]
        assert converted
        assert all(param.is_contiguous(memory_format=torch.channels_last) for param in converted)
        actual = model(images.to(memory_format=torch.channels_last), exits=True)
        assert_close(actual.logits, expected.logits)
        assert_close(actual.features, expected.features)
        assert_close(model(images.to(memory_format=torch.channels_last), exit_idx=0), expected.logits[0])


def test_taps_on_norms_go_on_working_after_sync_batch_norm_conversion():
    plain = enliven(ConvMixer(32, 8, patch_size=4, num_classes=10)).eval()
    model = attach_exits(plain, input_size=(3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    assert modules(model) == ['blocks.1.3', 'blocks.3.3', 'blocks.5.3']
    assert {type(plain.get_submodule(name)) for name in modules(model)} == {nn.BatchNorm2d}
    with torch.no_grad():
        expected = model(images, exits=True)
        model = convert_sync_batchnorm(model)
        assert {type(plain.get_submodule(name)) for name in modules(model)} == {nn.SyncBatchNorm}
        actual = model(images, exits=True)
        assert_close(actual.logits, expected.logits)
        assert_close(actual.features, expected.features)
        for idx in range(4):
            assert_close(model(images, exit_idx=idx), expected.logits[idx])


def test_stage_that_timm_froze_gets_no_gradients_and_keeps_its_statistics(make_small, x):
    model = make_small('test_resnet')
    expected = copy.deepcopy(model).eval()(x, exits=True)
    freeze(model, ['backbone.layer1'])
    assert_close(model.eval()(x, exits=True).logits, expected.logits)
    before = copy.deepcopy(model.state_dict())
    outputs = model.train()(x, exits=True)
    sum(logits.square().mean() for logits in outputs.logits).backward()
    # What timm leaves in the place of a frozen norm has no parameters.
    graded = {key: param.grad is not None for key, param in model.named_parameters()}
    assert graded == {key: not key.startswith('backbone.layer1.') for key in graded}
    assert any(key.startswith('backbone.layer1.') for key in graded)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert not [key for key in moved if key.startswith('backbone.layer1.')]
    assert {key.split('.')[1] for key in moved if key.startswith('backbone.')} >= {'layer2', 'layer3', 'layer4'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('test_vit', {'depth': 3}), ('test_mambaout', {'depths': (1, 1, 1, 1)})],
    ids=['test_vit', 'test_mambaout'],
)
def test_three_forms_compile_whole_at_three_batch_sizes_for_tokens_and_channels_last_maps(make_small, name, kwargs):
    model = make_small(name, **kwargs).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    size = MEMBERS[name].size
    checked = 0
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for batch in (2, 3, 5):
            images = torch.randn(batch, 3, size, size)
            for form in ({}, {'exits': True}, {'exit_idx': 1}):
                assert_close(compiled(images, **form), model(images, **form))
                checked += 1
    assert checked == 9
    torch.compiler.reset()


# Frozen backbone


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_frozen_backbone_lets_the_heads_alone_learn_and_is_let_go_again(make_small, x, name):
    model = make_small(name).train()
    modes = {key: module.training for key, module in model.named_modules()}
    model.freeze_backbone()
    assert {key.split('.')[0] for key, param in model.named_parameters() if param.requires_grad} == {'exits'}
    assert all(param.requires_grad for param in model.exits.parameters())
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert not any(module.training for module in model.backbone.modules())
        assert model.training
        assert all(module.training for module in model.exits.modules())
        sum(logits.square().mean() for logits in model(x, exits=True).logits).backward()
        model.eval()
        model.train()
    assert all((param.grad is not None) == key.startswith('exits.') for key, param in model.named_parameters())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert {key.split('.')[0] for key in moved} == {'exits'}
    model.freeze_backbone(False)
    assert all(param.requires_grad for param in model.parameters())
    assert {key: module.training for key, module in model.named_modules()} == modes
    model(x, exits=True)
    statistics = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith('backbone.') for key in statistics) == (name == 'test_resnet')


def test_frozen_backbone_is_frozen_in_a_copy_too(make_small, x):
    model = make_small('test_resnet').train()
    model.freeze_backbone()
    double = copy.deepcopy(model).train()
    assert not any(module.training for module in double.backbone.modules())
    assert not any(param.requires_grad for param in double.backbone.parameters())


def test_unfreezing_leaves_an_eval_model_in_eval_mode(make_small):
    model = make_small('test_resnet').eval()
    model.freeze_backbone()
    model.freeze_backbone(False)
    assert not any(module.training for module in model.modules())


def test_layer_that_was_frozen_before_stays_frozen_when_the_backbone_is_let_go(make_small):
    model = make_small('test_resnet')
    model.backbone.layer1.requires_grad_(False)
    before = {key: param.requires_grad for key, param in model.named_parameters()}
    assert set(before.values()) == {True, False}
    model.freeze_backbone()
    model.freeze_backbone(False)
    assert {key: param.requires_grad for key, param in model.named_parameters()} == before


# Dropping exits


@pytest.mark.parametrize(
    ('dropped', 'kept'),
    [([0], [1, 2]), ([-1], [0, 1]), ([2, 0], [1]), ([0, -3], [1, 2]), ([], [0, 1, 2]), ([0, 1, 2], [])],
    ids=repr,
)
def test_dropped_exits_are_gone_and_the_others_answer_as_before(make_small, x, dropped, kept):
    # Maps and tokens in turn.
    model = make_small('test_vit' if len(kept) == 2 else 'test_resnet').eval()
    before, state, specs = model(x, exits=True), copy.deepcopy(model.state_dict()), model.exits.specs
    model.drop_exits(dropped)
    after = model(x, exits=True)
    assert model.exits.specs == tuple(specs[idx] for idx in kept)
    assert len(model.exits) == len(kept)
    for new, old in enumerate([*kept, 3]):
        assert torch.equal(after.logits[new], before.logits[old])
        assert torch.equal(after.features[new], before.features[old])
        assert_close(model(x, exit_idx=new), before.logits[old])
    assert len(after.logits) == len(kept) + 1 == len(model.cost())
    expected = {key: value for key, value in state.items() if key.startswith('backbone.')}
    for new, old in enumerate(kept):
        prefix = f'exits.{old}.'
        expected |= {
            f'exits.{new}.{key.removeprefix(prefix)}': value for key, value in state.items() if key.startswith(prefix)
        }
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key])
    for idx, spec in enumerate(specs):
        assert len(model.backbone.get_submodule(spec.module)._forward_hooks) == (idx in kept)
    assert len(model.get_classifier()._forward_pre_hooks) == 1


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_dropping_an_exit_keeps_the_mode(make_small, train):
    model = make_small('test_resnet').train(train)
    model.drop_exits([0])
    assert {module.training for module in model.modules()} == {train}


def test_model_survives_the_disk_after_an_exit_was_dropped(make_small, x, tmp_path):
    model = make_small('test_resnet').eval()
    model.drop_exits([0])
    tme.save_pretrained(model, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    assert loaded.exits.specs == model.exits.specs
    assert len(loaded.exits) == 2
    assert_same_answers(loaded, model, x)


@pytest.mark.parametrize(('exits', 'named'), [([3], 3), ([-4], -4), ([0, 7], 7)], ids=repr)
def test_dropping_an_exit_that_is_not_there_is_an_error_that_changes_nothing(make_small, x, exits, named):
    model = make_small('test_resnet').eval()
    before = copy.deepcopy(model)
    with pytest.raises(MultiExitError, match=f'no exit {named} to drop, allowed are 0 to 2') as error:
        model.drop_exits(exits)
    assert '\n' not in str(error.value)
    assert len(model.exits) == 3
    assert_same_answers(model, before, x)


def test_exits_can_be_sliced_as_a_list_of_modules_can(make_small):
    model = make_small('test_resnet')
    heads = [model.exits[idx] for idx in range(3)]
    assert list(model.exits[1:]) == heads[1:]
    assert list(model.exits[:2]) == heads[:2]


# Projectors


@pytest.fixture
def projected(make_small):
    """A model with projectors, in training mode, and a copy from before it got them."""
    model = make_small('test_mambaout')
    before = copy.deepcopy(model)
    model.add_projectors()
    return model, before


def test_features_have_mains_width_in_training_and_their_own_in_eval(projected):
    model, before = projected
    images = torch.randn(2, 3, 96, 96)
    raw = [features.shape[1] for features in before(images, exits=True).features]
    assert raw == [128, 192, 256, 256], 'narrower, narrower and as wide'
    assert [head.projector is None for head in model.exits] == [False, False, True]
    model.train()
    with torch.no_grad():
        outputs, unprojected = model(images, exits=True), before.train()(images, exits=True)
    assert [features.shape[1] for features in outputs.features] == [256] * 4
    for idx in range(2):
        assert_close(outputs.features[idx], model.exits[idx].projector(unprojected.features[idx]))
    for actual, expected in zip(outputs.logits, unprojected.logits, strict=True):
        assert torch.equal(actual, expected)
    model.load_state_dict(before.state_dict(), strict=False)  # statistics have moved
    assert_same_answers(model.eval(), before.eval(), images)
    assert model.feature_widths() == (256,) * 4
    assert before.feature_widths() == tuple(raw)


def test_projectors_are_added_once(projected):
    model, _ = projected
    projectors = [head.projector for head in model.exits]
    model.add_projectors()
    assert all(head.projector is old for head, old in zip(model.exits, projectors, strict=True))


def test_features_are_distilled_through_projectors(projected):
    model, before = projected
    images, targets = torch.randn(2, 3, 96, 96), torch.tensor([1, 7])
    with pytest.raises(MultiExitError):
        tme.MultiExitTask(before, tme.create_loss('byot'))
    task = tme.MultiExitTask(model.train(), tme.create_loss('byot'))
    result = task(images, targets)
    assert result['feature_distance'].shape == (4,)
    assert (result['feature_distance'][:3] > 0).all()
    outputs = model(images, exits=True)
    teacher = outputs.features[-1].detach()
    expected = [(outputs.features[idx] - teacher).square().mean() for idx in range(3)]
    assert_close(result['feature_distance'][:3], torch.stack(expected).detach())
    result['loss'].backward()
    for head in list(model.exits)[:2]:
        assert all(param.grad.any() for param in head.projector.parameters())
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', lr=1e-2)
    weight = model.exits[0].projector.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.exits[0].projector.weight, weight)


def test_folder_holds_no_projectors_and_loads(projected, tmp_path):
    model, _ = projected
    tme.save_pretrained(model, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    own = {key for key in model.state_dict() if '.projector.' in key}
    assert len(own) == 4
    assert loaded.state_dict().keys() == model.state_dict().keys() - own
    assert_same_answers(loaded, model.eval(), torch.randn(2, 3, 96, 96))


def test_projectors_do_not_need_a_classifier(make_small):
    model = make_small('test_mambaout', num_classes=0)
    model.add_projectors()
    outputs = model.train()(torch.randn(2, 3, 96, 96), exits=True)
    assert [features.shape[1] for features in outputs.features] == [256] * 4


# timm's helpers


@pytest.mark.parametrize('name', ['test_vit', 'test_mambaout', DEIT])
def test_averaged_copy_of_timm_is_the_average_at_every_exit(make_small, name):
    model = make_small(name).eval()
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    ema = ModelEmaV3(model, decay=0.75)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.2)
    ema.update(model)
    expected = copy.deepcopy(model)
    for key, value in expected.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.75 * first[key] + 0.25 * model.state_dict()[key])
    with torch.no_grad():
        actual, wanted, current = (network(images, exits=True).logits for network in (ema.module, expected, model))
    for one, other, last in zip(actual, wanted, current, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert (one - last).abs().max() > 1e-2


@pytest.mark.parametrize('kwargs', [{}, {'img_size': 96}, {'in_chans': 1}], ids=repr)
def test_data_configuration_is_that_of_the_plain_model(kwargs):
    plain = timm.create_model('vit_tiny_patch16_224', num_classes=10, **kwargs)
    model = attach_exits(plain)
    config = resolve_data_config({}, model=model)
    assert config == resolve_data_config({}, model=plain)
    assert config['mean'] == (0.5, 0.5, 0.5)
    assert config['crop_pct'] == 0.9


@pytest.mark.parametrize('load', [load_checkpoint, tme.load_checkpoint], ids=['timm', 'ours'])
def test_checkpoint_of_timms_saver_gives_the_model_back(make_small, x, tmp_path, load):
    model, other = make_small('test_vit').eval(), make_small('test_vit').eval()
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=1e-3)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    best, epoch = saver.save_checkpoint(0, metric=12.5)
    assert (best, epoch) == (12.5, 0)
    assert not torch.equal(other(x, exit_idx=0), model(x, exit_idx=0))
    load(other, str(tmp_path / 'model_best.pth.tar'))
    assert_same_answers(other, model, x)


def test_plain_evaluation_loop_counts_what_the_plain_model_gets_right(make_small):
    model = make_small('test_vit').eval()
    images = torch.randn(30, 3, 64, 64)
    with torch.no_grad():
        answers = model.backbone(images)
    targets = answers.argmax(1)
    targets[:12] = answers[:12].topk(5).indices[:, 4]  # in fifth place
    targets[:3] = answers[:3].argmin(1)
    top1, top5 = AverageMeter(), AverageMeter()
    with torch.no_grad():
        for batch, target in zip(images.split(8), targets.split(8)):
            output = model(batch)
            for meter, value in zip((top1, top5), accuracy(output, target, topk=(1, 5))):
                meter.update(value.item(), len(batch))
    assert top1.avg == pytest.approx(100 * 18 / 30)
    assert top5.avg == pytest.approx(100 * 27 / 30)


# What can be tapped


def test_exit_points_of_a_vit_by_name_are_its_blocks_with_rising_cost():
    points = tme.exit_points('vit_tiny_patch16_224')
    assert [(point.index, point.module) for point in points] == [(idx, f'blocks.{idx}') for idx in range(12)]
    assert {(point.layout, point.num_prefix_tokens, point.channels) for point in points} == {('NLC', 1, 192)}
    assert {(point.reduction, point.size) for point in points} == {(16, (14, 14))}
    # 196 patches and one class token: every block costs the same.
    block = 12 * 197 * 192**2 + 2 * 197**2 * 192
    assert [point.cost.macs for point in points] == [196 * 192 * 768 + block * (idx + 1) for idx in range(12)]


@pytest.mark.parametrize(
    'exits',
    [[12], [2, 40], [-13], 'blocks.2', ['blocks.12'], 2.5, True],
    ids=repr,
)
def test_wrong_exits_of_a_vit_are_answered_with_the_places_there_are(exits):
    with torch.device('meta'), pytest.raises(MultiExitError) as error:
        tme.create_model('vit_tiny_patch16_224', exits=exits)
    assert '\n' not in str(error.value)
    for idx in range(12):
        assert f'blocks.{idx}' in str(error.value)


def test_feature_lists_of_timm_are_refused_in_one_line():
    backbone = timm.create_model('test_vit', features_only=True)
    with pytest.raises(MultiExitError, match='no classifier') as error:
        attach_exits(backbone)
    assert '\n' not in str(error.value)
