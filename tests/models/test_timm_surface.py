"""timm's whole surface: its keywords, training and helpers on a model with exits."""

import copy
import json

import pytest
import timm
import timm.optim
import torch
from helpers.members import DEIT, MEMBERS, QUICK, SWIN, assert_close, assert_same_answers, modules, record
from timm.data import resolve_data_config, resolve_input_data_config
from timm.layers import DropPath
from timm.models import get_model_args, get_model_input_config, group_parameters, load_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy
from torch import nn

import timm_multiexit as tme
from timm_multiexit.exits.layouts import to_map
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.truncation import truncate
from timm_multiexit.utils.errors import MultiExitError


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


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


def test_classes_may_go_and_come_where_the_classifier_is_inside_a_block_that_goes_with_it(make_empty):
    images = torch.empty(2, 3, 64, 64, device='meta')
    made = attach_exits(make_empty('shvit_s1', num_classes=0), input_size=(3, 64, 64))
    model = attach_exits(make_empty('shvit_s1', num_classes=7), input_size=(3, 64, 64))
    model.reset_classifier(0)
    for each in (made, model):
        width = each.head_hidden_size
        assert [tuple(each(images, exits=True).logits[-1].shape), each.feature_widths()[-1]] == [(2, width), width]
        each.reset_classifier(5)
        assert {tuple(logits.shape) for logits in each(images, exits=True).logits} == {(2, 5)}
        assert tuple(each(images, exits=True).features[-1].shape) == (2, width)


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


def test_vit_of_flexible_size_answers_at_several_sizes_one_after_the_other():
    model = tme.create_model('test_vit', num_classes=10, dynamic_img_size=True).eval()
    for size in ((64, 96), (160, 160), (96, 64), (48, 208)):
        images = torch.randn(1, 3, *size)
        tokens = record(model.backbone, images, outputs=modules(model))[1]['blocks.1']
        grid = model.backbone.patch_embed.dynamic_feat_size(size)
        assert grid == (size[0] // 16, size[1] // 16)
        spec = model.exits.specs[0]
        tapped = to_map(tokens, spec, size)
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


def test_layer_decay_without_a_matcher_is_by_timms_automatic_groups(make_empty):
    plain = make_empty('pit_ti_distilled_224')
    assert not hasattr(plain, 'group_matcher')
    expected = layer_scales(plain, 0.5)
    model = attach_exits(plain)
    scales = layer_scales(model, 0.5)
    assert {key: scales[f'backbone.{key}'] for key in expected} == expected
    assert {scale for key, scale in scales.items() if key.startswith('exits.')} == {1.0}
    # Twelve parameters to a group, the last of them the classifiers'.
    names = [key for key in expected if not key.startswith('head')]
    groups = -(-len(names) // 12)
    assert [expected[key] for key in names] == [0.5 ** (groups - idx // 12) for idx in range(len(names))]


def test_handmade_backbone_without_group_matcher_gets_timms_one_group_and_its_warning(caplog):
    model = attach_exits(Handmade(), input_size=(3, 64, 64))
    assert set(layer_scales(model, 0.5).values()) == {1.0}
    assert 'Layer-wise lr decay has no effect' in caplog.text


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


# What else timm looks up


def names_of(entry):
    return [entry] if isinstance(entry, str) else list(entry)


@pytest.mark.parametrize('name', [*QUICK, DEIT, 'crossvit_9_240', 'pit_ti_distilled_224', 'efficientvim_m1_dist'])
def test_default_configuration_names_parameters_of_the_model_and_the_other_those_of_the_backbone(make_empty, name):
    backbone = make_empty(name, **MEMBERS[name].kwargs if name in MEMBERS else {})
    own = copy.deepcopy(backbone.pretrained_cfg)
    model = attach_exits(backbone)
    for key in ('first_conv', 'classifier'):
        assert {f'{part}.weight' for part in names_of(model.default_cfg[key])} <= model.state_dict().keys()
        assert {f'{part}.weight' for part in names_of(model.pretrained_cfg[key])} <= backbone.state_dict().keys()
    assert {key for key in own if model.default_cfg[key] != own[key]} == {'first_conv', 'classifier'}
    # What is written there stays: it is the backbone's own.
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3))
    assert backbone.pretrained_cfg == {**own, 'mean': (0.1, 0.2, 0.3)}
    assert model.default_cfg['mean'] == (0.1, 0.2, 0.3)


def test_saved_configuration_has_the_names_of_the_backbone(make_model, tmp_path):
    model = make_model('test_resnet')
    tme.save_pretrained(model, tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    assert (saved['first_conv'], saved['classifier']) == ('conv1.0', 'fc')
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7, in_chans=1)
    first = model.backbone.conv1[0].weight
    assert torch.equal(plain.conv1[0].weight, first.sum(1, keepdim=True))
    assert plain.fc.out_features == 7


ATTRIBUTES = ['output_fmt', 'feature_dim', 'out_features', 'forward_intermediates', 'set_input_size', 'get_patch_size']
ATTRIBUTES += ['set_distilled_training', 'global_pool', 'pretrained_model_args', '_model_args']


@pytest.mark.parametrize(
    'name',
    [
        *QUICK,
        DEIT,
        SWIN,
        pytest.param('sequencer2d_s', marks=pytest.mark.slow),
        *('levit_128s', 'naflexvit_base_patch16_gap', 'inception_v3'),
    ],
)
def test_model_has_what_its_backbone_has(make_empty, name):
    kwargs = {'depth': 4} if name.startswith('naflex') else {}
    backbone = make_empty(name, **kwargs)
    model = attach_exits(backbone, input_size=(3, 224, 224))
    for attribute in ATTRIBUTES:
        assert hasattr(model, attribute) == hasattr(backbone, attribute), attribute
        if hasattr(backbone, attribute) and attribute != 'set_input_size':
            assert getattr(model, attribute) == getattr(backbone, attribute)
    with pytest.raises(AttributeError, match='no attribute .not_an_attribute'):
        _ = model.not_an_attribute


@pytest.mark.parametrize('name', ['test_vit', 'test_mambaout', 'test_resnet'])
def test_maps_between_stages_are_those_of_the_plain_model_and_what_exits_read(make_small, name):
    model = make_small(name).eval()
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    last, maps = model.forward_intermediates(images)
    theirs = model.backbone.forward_intermediates(images)
    assert torch.equal(last, theirs[0])
    assert all(torch.equal(one, other) for one, other in zip(maps, theirs[1], strict=True))
    outputs = model(images, exits=True)
    for idx, head in enumerate(model.exits):
        assert any(torch.allclose(head(each)[0], outputs.logits[idx], atol=1e-5) for each in maps if _fits(head, each))


def _fits(head, tensor):
    try:
        head(tensor)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize('kwargs', [{}, {'img_size': 96}, {'in_chans': 1}, {'num_classes': 7}], ids=repr)
def test_input_of_a_model_is_that_of_the_plain_one(make_empty, kwargs):
    plain = make_empty('vit_tiny_patch16_224', **kwargs)
    model = attach_exits(plain)
    ours, theirs = get_model_input_config(model), get_model_input_config(plain)
    assert ours.pop('first_conv') == f'backbone.{theirs.pop("first_conv")}'
    assert ours == theirs
    assert ours['input_size'] == (kwargs.get('in_chans', 3), *[kwargs.get('img_size', 224)] * 2)
    assert resolve_input_data_config(model) == resolve_input_data_config(plain)
    assert get_model_args(model) == get_model_args(plain)


@pytest.mark.parametrize('size', [{'img_size': (96, 64)}, {'img_size': (48, 64), 'patch_size': 8}], ids=repr)
def test_another_size_of_images_reaches_backbone_exits_costs_and_forgets_what_was_learnt_at_the_old(make_small, size):
    model = make_small('test_vit', img_size=64).eval()
    plain = copy.deepcopy(model.backbone)
    model.policy = tme.ExitPolicy('confidence', (0.5,) * len(model.exits))
    old = model.cost()
    model.set_input_size(**size)
    plain.set_input_size(**size)
    height, width = size['img_size']
    patch = size.get('patch_size', 16)
    assert model.input_size == (3, height, width) == get_model_input_config(model)['input_size']
    assert model.policy is None
    assert model.cost()[0].fixed.macs > old[0].fixed.macs
    assert [spec.reduction for spec in model.exits.specs] == [patch] * len(model.exits)
    images = torch.randn(2, 3, height, width)
    tokens = record(plain, images, outputs=modules(model))[1]
    with torch.no_grad():
        outputs = model(images, exits=True)
        torch.testing.assert_close(outputs.logits[-1], plain(images))
        for idx, name in enumerate(modules(model)):
            grid = tokens[name][:, -(height // patch) * (width // patch) :].transpose(1, 2)
            logits, _ = model.exits[idx](grid.unflatten(2, (height // patch, width // patch)))
            assert_close(outputs.logits[idx], logits)
    assert model.infer(images, threshold=1.0).exit_idx.tolist() == [len(model.exits)] * 2


@pytest.mark.parametrize('mode', [True, False])
def test_fresh_classifiers_are_in_the_mode_of_the_model(make_model, mode):
    model = make_model().train(mode)
    for num_classes in (0, 7):
        model.reset_classifier(num_classes)
        assert {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_mambaout'])
def test_truncated_model_has_no_maps_of_the_backbone_and_names_its_own_classifier(make_small, name):
    model = make_small(name).eval()
    first, main = truncate(model, 0), truncate(model, -1)
    assert first.in_chans == main.in_chans == 3
    for network in (first, main):
        for key in ('first_conv', 'classifier'):
            assert {f'{part}.weight' for part in names_of(network.default_cfg[key])} <= network.state_dict().keys()
    assert first.get_submodule(first.default_cfg['classifier']) is first.get_classifier()
    assert not hasattr(first, 'forward_intermediates')
    assert not hasattr(first, 'output_fmt')
    assert getattr(main, 'output_fmt', 'NCHW') == getattr(model.backbone, 'output_fmt', 'NCHW')
    images = torch.randn(1, 3, MEMBERS[name].size, MEMBERS[name].size)
    assert torch.equal(main.forward_intermediates(images)[0], model.backbone.forward_features(images))


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
