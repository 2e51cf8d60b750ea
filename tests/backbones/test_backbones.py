"""The paper's CIFAR networks: their size, their cost, their exits, and timm's surface."""

import math

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import timm_multiexit.backbones  # noqa: F401 - registers the networks
from timm_multiexit.backbones.cifar_resnet import CifarResNet
from timm_multiexit.backbones.cifar_resnet_small import PadShortcut, SmallCifarResNet
from timm_multiexit.backbones.cifar_vgg import CifarVgg
from timm_multiexit.backbones.pyramidnet import PyramidBlock, PyramidNet
from timm_multiexit.backbones.wide_resnet import WideBlock, WideResNet
from timm_multiexit.models.attach import attach_exits

# Name -> parameters with 100 classes, channels and reduction of each stage.
NETWORKS = {
    # With 100 classes, weiaicunzai/pytorch-cifar100:README.md has 11.2M, 23.7M, 42.7M and 58.3M.
    'cifar_resnet18': (11_220_132, [(64, 1), (128, 2), (256, 4), (512, 8)]),
    'cifar_resnet50': (23_705_252, [(256, 1), (512, 2), (1024, 4), (2048, 8)]),
    'cifar_resnet101': (42_697_380, [(256, 1), (512, 2), (1024, 4), (2048, 8)]),
    'cifar_resnet152': (58_341_028, [(256, 1), (512, 2), (1024, 4), (2048, 8)]),
    # He et al., Table 6, with ten classes: 0.27M, 0.46M and 0.85M; 90 classes more are 65 each. The shallowest by hand:
    # convolutions 432 + 4,608 + 13,824 + 55,296, norms 480, classifier 650.
    'cifar_resnet8': (75_290 + 90 * 65, [(16, 1), (32, 2), (64, 4)]),
    'cifar_resnet20': (269_722 + 90 * 65, [(16, 1), (32, 2), (64, 4)]),
    'cifar_resnet32': (464_154 + 90 * 65, [(16, 1), (32, 2), (64, 4)]),
    'cifar_resnet56': (853_018 + 90 * 65, [(16, 1), (32, 2), (64, 4)]),
    # No published count found: by hand, and its larger kin below by Xie et al., Table 7.
    'cifar_resnext29_4x64d': (17_654_692, [(256, 1), (512, 2), (1024, 4)]),
    # With 10 classes, bearpaw/pytorch-classification:README.md has 20.04M; 90 classes more are 0.05M.
    'cifar_vgg19_bn': (20_035_018 + 90 * 513, [(64, 1), (128, 2), (256, 4), (512, 8), (512, 16)]),
    # Zagoruyko and Komodakis, Table 4: 36.5M; osmr/imgclsmob: 36,536,884.
    'cifar_wide_resnet28_10': (36_536_884, [(160, 1), (320, 2), (640, 4)]),
    # jhkim89/PyramidNet:README.md: 28.3M and 286 features; osmr/imgclsmob: 28,511,307.
    'cifar_pyramidnet110_270': (28_511_307, [(106, 1), (196, 2), (286, 4)]),
}
# 6n + 2 layers.
SMALL_RESNETS = {f'cifar_resnet{6 * num_blocks + 2}': num_blocks for num_blocks in (1, 3, 5, 9)}
RESNETS = [name for name in NETWORKS if 'resnet' in name and 'wide' not in name and name not in SMALL_RESNETS]

# Lee and Lee, Table III: GFLOPs at two per multiply-add, exits 1 to 3 and main; relative tolerance.
TABLE_3 = {
    'cifar_resnet18': ([0.42, 0.66, 0.88, 1.12], 0.02),
    'cifar_resnet50': ([0.78, 1.42, 2.68, 2.60], 0.02),
    'cifar_resnet101': ([0.78, 1.42, 5.12, 5.04], 0.02),
    'cifar_vgg19_bn': ([0.14, 0.24, 0.50, 0.80], 0.05),
}

# The same classes, small enough to run.
SMALL = {
    'resnet': lambda **kwargs: CifarResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), **kwargs),
    'resnext': lambda **kwargs: CifarResNet(Bottleneck, (1, 2, 1), channels=(8, 8, 16), cardinality=4, **kwargs),
    'small resnet': lambda **kwargs: SmallCifarResNet(1, (8, 16, 16), **kwargs),
    'vgg': lambda **kwargs: CifarVgg((2, 2, 2, 2, 2), channels=(8, 8, 8, 16, 16), **kwargs),
    'wide': lambda **kwargs: WideResNet(16, 1, **kwargs),
    'pyramid': lambda **kwargs: PyramidNet(20, 9, **kwargs),
}


def make_small(name, **kwargs):
    """Return a small network whose norms differ from the identity."""
    model = SMALL[name](num_classes=10, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data += torch.rand_like(values) * 0.4
    return model


def early_stages(model):
    return [info['module'] for info in model.feature_info if info['module'] != 'act1'][:-1]


def attach_preset(backbone):
    preset = backbone.multiexit_preset
    return attach_exits(
        backbone,
        preset['exits'],
        head='paper',
        head_widths=preset['head_widths'],
        input_size=(3, 32, 32),
    )


# Size and cost


def test_timm_knows_the_networks_by_name():
    assert sorted(timm.list_models('cifar_*')) == sorted(NETWORKS)


@pytest.mark.parametrize('name', NETWORKS)
def test_parameters_are_those_of_the_literature(make_empty, name):
    assert sum(param.numel() for param in make_empty(name).parameters()) == NETWORKS[name][0]


@pytest.mark.parametrize(('cardinality', 'millions'), [(8, 34.4), (16, 68.1)])
def test_resnext_of_the_paper_has_its_parameters(cardinality, millions):
    # Xie et al., Table 7, with ten classes.
    with torch.device('meta'):
        model = CifarResNet(Bottleneck, (3, 3, 3), channels=(64, 128, 256), cardinality=cardinality, num_classes=10)
    assert sum(param.numel() for param in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_pyramidnet_with_small_alpha_has_its_parameters():
    # jhkim89/PyramidNet:README.md: 3.8M; osmr/imgclsmob: 3,904,446 with ten classes.
    with torch.device('meta'):
        model = PyramidNet(110, 84, num_classes=10)
    assert sum(param.numel() for param in model.parameters()) == 3_904_446


@pytest.mark.parametrize('name', TABLE_3)
def test_exits_cost_what_table_3_says(make_empty, name):
    gflops, tolerance = TABLE_3[name]
    costs = attach_preset(make_empty(name)).cost()
    assert [2 * cost.fixed.macs / 1e9 for cost in costs] == pytest.approx(gflops, rel=tolerance)


def test_vgg_costs_what_the_sum_over_its_convolutions_says(make_empty):
    # 9 * channels in * channels out * pixels out, by hand; blocks 1, 2, 3 end at 39.5, 96.1, 228.3 MMACs.
    heads = [
        9 * (64 * 128 * 16**2 + 128 * 256 * 4**2 + 256 * 512 * 2**2) + 512 * 100,
        9 * (128 * 256 * 8**2 + 256 * 512 * 2**2) + 512 * 100,
        9 * 256 * 512 * 4**2 + 512 * 100,
    ]
    model = attach_preset(make_empty('cifar_vgg19_bn'))
    assert [cost.fixed.macs for cost in model.cost()] == [
        39_518_208 + heads[0],
        96_141_312 + heads[1],
        228_261_888 + heads[2],
        398_131_200 + 512 * 100,
    ]


@pytest.mark.parametrize(
    ('name', 'millions'), [('cifar_resnet20', 0.27), ('cifar_resnet32', 0.46), ('cifar_resnet56', 0.85)]
)
def test_small_resnets_have_the_parameters_of_he_et_al(make_empty, name, millions):
    # Their Table 6, with ten classes; with projections for shortcuts the last two would have 0.47M and 0.86M.
    count = sum(param.numel() for param in make_empty(name, num_classes=10).parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize('name', SMALL_RESNETS)
def test_small_resnets_cost_what_the_sum_over_their_convolutions_says(make_empty, name):
    # 9 * channels in * channels out * pixels out. 16 channels at 32^2, 32 at 16^2 and 64 at 8^2 cost the same, the first
    # convolution of a stage half of that.
    full, blocks = 9 * 16 * 16 * 32**2, SMALL_RESNETS[name]
    stem = 9 * 3 * 16 * 32**2
    stages = [2 * blocks * full, (2 * blocks - 0.5) * full, (2 * blocks - 0.5) * full]
    heads = [full // 2 + full // 2 + 64 * 100, full // 2 + 64 * 100]
    model = attach_preset(make_empty(name))
    assert [cost.fixed.macs for cost in model.cost()] == [
        stem + stages[0] + heads[0],
        stem + sum(stages[:2]) + heads[1],
        stem + sum(stages) + 64 * 100,
    ]


@pytest.mark.parametrize('name', SMALL_RESNETS)
def test_heads_of_the_small_resnets_have_the_widths_of_the_stages_they_stand_for(make_empty, name):
    preset = make_empty(name).multiexit_preset
    assert preset['head_widths'] == [[32, 64], [64]]


@pytest.mark.parametrize('name', [name for name in NETWORKS if name not in ('cifar_vgg19_bn', *SMALL_RESNETS)])
def test_preset_is_what_the_rule_of_the_papers_heads_gives(make_empty, name):
    preset = make_empty(name).multiexit_preset
    model = attach_exits(make_empty(name), preset['exits'], head='paper')
    assert [list(spec.widths) for spec in model.exits.specs] == preset['head_widths']


@pytest.mark.parametrize('name', NETWORKS)
def test_preset_has_the_papers_number_of_exits_and_mains_width(make_empty, name):
    # Section III: exits where the resolution drops, three in networks of four blocks, two in networks of three.
    model = make_empty(name)
    preset = model.multiexit_preset
    stages = early_stages(model)
    assert preset['exits'] == (stages[:3] if name == 'cifar_vgg19_bn' else stages)
    assert len(preset['exits']) == (3 if name in ('cifar_vgg19_bn', *RESNETS[:4]) else 2)
    assert [widths[-1] for widths in preset['head_widths']] == [model.num_features] * len(preset['exits'])


# Weights


@pytest.mark.parametrize('name', ['cifar_resnet18', 'cifar_resnext29_4x64d'])
def test_convolutions_of_the_resnets_start_he_normal_by_fan_out(name):
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            weights = module.weight.flatten() / std
            # Five standard errors, of a normal distribution's second and fourth moment.
            assert abs(weights.square().mean() - 1) < 5 * math.sqrt(2 / len(weights))
            assert abs(weights.pow(4).mean() - 3) < 5 * math.sqrt(96 / len(weights))
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_resnet_keys_are_those_of_timm(make_empty, name):
    shapes = {key: value.shape for key, value in make_empty(name, num_classes=100).state_dict().items()}
    shapes['conv1.weight'] = torch.Size([64, 3, 3, 3])
    assert {key: value.shape for key, value in make_empty(f'cifar_{name}').state_dict().items()} == shapes


# Blocks


def test_wide_block_without_its_convolutions_is_the_shortcut():
    x = torch.randn(2, 4, 6, 6)
    same, wider = WideBlock(4, 4), WideBlock(4, 8, stride=2)
    for block in (same, wider):
        nn.init.zeros_(block.conv2.weight)
        block.eval()
    assert_close(same(x), x)
    # Zagoruyko and Komodakis, as in pre-activation ResNets: a projection reads what the first convolution reads.
    activated = x.div(math.sqrt(1 + 1e-5)).relu()
    assert_close(wider(x), F.conv2d(activated, wider.shortcut.weight, stride=2))


def test_shortcut_without_parameters_is_every_second_pixel_and_zeros():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = torch.zeros(1, 3, 2, 2)
    expected[0, 0] = torch.tensor([[0.0, 2.0], [8.0, 10.0]])
    assert torch.equal(PadShortcut(2)(x), expected)


def test_pyramid_block_without_its_convolutions_is_the_pooled_input_and_zeros():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    block = PyramidBlock(1, 3, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    expected = torch.zeros(1, 3, 2, 2)
    expected[0, 0] = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    assert_close(block(x), expected)


def test_pyramid_widens_by_the_same_step_from_block_to_block(make_empty):
    model = make_empty('cifar_pyramidnet110_270')
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert [block.conv2.out_channels for block in blocks] == list(range(21, 287, 5))
    assert [idx for idx, block in enumerate(blocks) if block.conv1.stride == (2, 2)] == [18, 36]


# timm's surface


@pytest.mark.parametrize('name', NETWORKS)
def test_feature_info_tells_the_stages_channels_and_sizes(make_empty, name):
    model = make_empty(name).eval()
    info = [entry for entry in model.feature_info if entry['module'] != 'act1']
    assert [(entry['num_chs'], entry['reduction']) for entry in info] == NETWORKS[name][1]
    assert model.feature_info[: len(model.feature_info) - len(info)] in (
        [],
        [{'num_chs': 64, 'reduction': 1, 'module': 'act1'}],
    )
    shapes = {}
    for entry in model.feature_info:
        model.get_submodule(entry['module']).register_forward_hook(
            lambda module, args, output, entry=entry: shapes.update({entry['module']: output.shape})
        )
    assert model(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, 100)
    for entry in model.feature_info:
        size = 32 // entry['reduction']
        assert shapes[entry['module']] == (2, entry['num_chs'], size, size)


@pytest.mark.parametrize('name', NETWORKS)
def test_configuration_is_for_32_pixels_and_names_the_layers_it_means(make_empty, name):
    model = make_empty(name, in_chans=1)
    cfg = model.pretrained_cfg
    assert cfg['input_size'] == (3, 32, 32)
    assert cfg['architecture'] == name
    assert cfg['crop_pct'] == 1.0
    assert cfg['license'] == 'apache-2.0'
    assert (cfg['num_classes'], model.num_classes, model.in_chans, model.drop_rate) == (100, 100, 1, 0.0)
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    conv = model.get_submodule(cfg['first_conv'])
    assert conv is next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert conv.weight.shape[1:] == (1, 3, 3)
    features = model.forward_features(torch.empty(2, 1, 32, 32, device='meta'))
    assert features.shape == (2, model.num_features, *cfg['pool_size'])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 100)


@pytest.mark.parametrize('name', NETWORKS)
def test_features_only_gives_the_stages(make_empty, name):
    model = make_empty(name, features_only=True)
    shapes = [tuple(feature.shape[1:]) for feature in model(torch.empty(1, 3, 32, 32, device='meta'))]
    stages = [(chs, 32 // reduction, 32 // reduction) for chs, reduction in NETWORKS[name][1]]
    assert shapes[-len(stages) :] == stages
    assert len(shapes) == len(stages) + (name in RESNETS or 'resnext' in name)


@pytest.mark.parametrize('name', SMALL)
def test_classifier_can_be_replaced_and_left_out(name):
    model = make_small(name, drop_rate=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7, 'max')
    assert model(x).shape == (2, model.num_classes) == (2, 7)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert not model.get_classifier().training
    model.reset_classifier(0, 'avg')
    assert_close(model(x), features)
    model.train()
    assert (model(x) == 0).float().mean() > 0.2, 'the dropout in front of the classifier'
    model.reset_classifier(0, 'catavgmax')
    assert model.head_hidden_size == 2 * model.num_features == model(x).shape[1]


@pytest.mark.slow
def test_classifier_can_be_left_out_from_the_start(make_empty):
    for name in NETWORKS:
        model = make_empty(name, num_classes=0)
        assert model(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, model.num_features)


@pytest.mark.parametrize('name', SMALL)
def test_layer_decay_slows_the_stem_most_and_the_classifier_not_at_all(name):
    model = make_small(name)
    model.pretrained_cfg = {}
    groups = create_optimizer_v2(model, opt='sgd', lr=1.0, layer_decay=0.7).param_groups
    scales = {id(param): group['lr_scale'] for group in groups for param in group['params']}
    modules = [model.conv1, model.bn1] if hasattr(model, 'conv1') else [model.stem]
    stem = {scales[id(param)] for module in modules for param in module.parameters()}
    blocks = [
        {scales[id(param)] for param in block.parameters()}
        for idx in range(1, 6)
        for block in getattr(model, f'layer{idx}', ())
        if list(block.parameters())
    ]
    chain = [stem, *blocks, {scales[id(model.fc.weight)], scales[id(model.fc.bias)]}]
    assert [list(group) for group in chain] == [
        [pytest.approx(0.7**distance)] for distance in reversed(range(len(blocks) + 2))
    ]
    if name in ('wide', 'pyramid'):
        assert {scales[id(param)] for param in model.tail.parameters()} == blocks[-1]
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    stages = len([key for key, _ in model.named_children() if key.startswith('layer') and len(getattr(model, key))])
    assert set(coarse.values()) == set(range(stages + 2))


# Exits


@pytest.mark.parametrize('name', SMALL)
def test_exit_gives_what_all_exits_give_so_no_layer_changes_a_tapped_map(name):
    backbone = make_small(name)
    model = attach_exits(backbone, early_stages(backbone), input_size=(3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    logits = model(x, exits=True).logits
    for idx, expected in enumerate(logits):
        assert_close(model(x, exit_idx=idx), expected)
    assert_close(logits[-1], backbone(x))


@pytest.mark.parametrize('name', SMALL)
def test_loss_of_each_exit_reaches_the_backbone_up_to_its_tap_and_no_further(name):
    backbone = make_small(name)
    stages = early_stages(backbone)
    model = attach_exits(backbone, stages, input_size=(3, 32, 32))
    x, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    names = [*stages, f'layer{len(stages) + 1}']
    for idx in range(len(stages) + 1):
        model.zero_grad()
        F.cross_entropy(model(x, exits=True).logits[idx], target).backward()
        reached = [any(param.grad is not None for param in backbone.get_submodule(name).parameters()) for name in names]
        assert reached == [True] * (idx + 1) + [False] * (len(stages) - idx)
        first = next(param for param in backbone.parameters())
        assert first.grad.abs().max() > 0


@pytest.mark.parametrize('name', SMALL)
def test_gradients_are_the_same_with_and_without_checkpointing(name):
    backbone = make_small(name)
    model = attach_exits(backbone, early_stages(backbone), input_size=(3, 32, 32))
    x, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    gradients, saved = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = sum(F.cross_entropy(logits, target) for logits in model(x, exits=True).logits)
        loss.backward()
        gradients.append({key: param.grad.clone() for key, param in model.named_parameters()})
        saved.append(sum(sizes))
    assert_close(gradients[0], gradients[1])
    assert saved[1] < 0.8 * saved[0], 'or nothing was checkpointed'
