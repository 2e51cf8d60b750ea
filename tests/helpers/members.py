"""Small networks of every layout, with the exits that they have to get."""

from typing import NamedTuple

import torch


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
