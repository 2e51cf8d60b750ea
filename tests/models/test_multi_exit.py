"""The model: plain timm when nothing is asked of it, and every exit the same whichever way it is asked for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.torch_version import TorchVersion

from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.outputs import ExitOutputs
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError

# Architectures of different families; keywords make them draw random numbers in training, and VGG small.
DROP = {'drop_rate': 0.2, 'drop_path_rate': 0.1}
PLAIN = {
    'resnet18': DROP,
    'seresnext26d_32x4d': DROP,
    'vgg11_bn': {'drop_rate': 0.2, 'mlp_ratio': 0.0625},
    'regnetx_002': DROP,
    'efficientnet_b0': DROP,
    'convnext_atto': DROP,
    'mobilenetv3_small_050': DROP,
    'densenet121': {'drop_rate': 0.2},
    'repvit_m1': {'drop_rate': 0.2},
    'ghostnet_100': {'drop_rate': 0.2},
    'mobilenetv4_conv_small': DROP,
    'test_resnet': DROP,
    'test_efficientnet': DROP,
    'test_convnext': DROP,
    'test_nfnet': DROP,
}
SMALL = ('test_resnet', 'test_efficientnet', 'test_convnext', 'test_byobnet')
RESNET_STAGES = ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4', 'fc')


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def seeded(run, *args, **kwargs):
    torch.manual_seed(1)
    return run(*args, **kwargs)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Mode off: the plain timm model


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('name', PLAIN)
def test_model_is_the_plain_timm_model_bit_for_bit(make_backbone, x, name, train):
    plain = make_backbone(name, **PLAIN[name]).train(train)
    model = attach_exits(copy.deepcopy(plain), input_size=(3, 64, 64)).train(train)
    for form in ('off', 'collect', 'off'):
        expected = seeded(plain, x)
        actual = seeded(model, x) if form == 'off' else seeded(model, x, exits=True).logits[-1]
        assert expected.isfinite().all()
        assert expected.std() > 0
        assert torch.equal(actual, expected), form
    buffers = dict(plain.named_buffers())
    assert buffers.keys() == dict(model.backbone.named_buffers()).keys()
    for key, value in model.backbone.named_buffers():
        assert torch.equal(value, buffers[key]), key


def test_plain_architectures_are_at_least_ten():
    assert len(PLAIN) >= 10


def test_random_numbers_are_drawn_in_training(make_backbone, x):
    # Else the comparison above would not see a head that draws before the backbone has.
    backbone = make_backbone('resnet18', **DROP)
    assert not torch.equal(seeded(backbone, x), backbone(x))


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'test_efficientnet'])
def test_heads_do_not_touch_the_batch_statistics_of_the_backbone(make_model, x, name):
    model = make_model(name)
    plain, before = copy.deepcopy(model.backbone), copy.deepcopy(model)
    model(x, exits=True)
    plain(x)
    changed = [key for key, value in before.backbone.named_buffers() if not torch.equal(value, plain.get_buffer(key))]
    assert len(changed) > 10
    for key, value in plain.named_buffers():
        assert torch.equal(model.backbone.get_buffer(key), value), key
    heads = [key for key, value in before.exits.named_buffers() if not torch.equal(value, model.exits.get_buffer(key))]
    assert heads, 'heads keep statistics of their own'


# Collect and stop


@pytest.mark.parametrize('head', ['conv', 'paper', 'bottleneck', 'linear'])
@pytest.mark.parametrize('name', SMALL)
def test_one_exit_gives_what_all_exits_give(make_model, x, name, head):
    model = make_model(name, head=head).eval()
    logits = model(x, exits=True).logits
    num_exits = len(model.exits)
    assert num_exits == 3
    assert len(logits) == 4
    for idx in range(-num_exits - 1, num_exits + 1):
        assert_close(model(x, exit_idx=idx), logits[idx])
    for idx in range(num_exits):
        assert (logits[idx] - logits[idx + 1]).abs().max() > 1e-2, 'or a wrong index would go unseen'


def test_exit_behind_an_activation_in_place_gives_what_all_exits_give(make_model, x):
    model = make_model('resnet18', ['act1', 'layer2.0.act1', 'layer3']).eval()
    assert model.backbone.act1.inplace
    logits = model(x, exits=True).logits
    assert len(logits) == 4
    for idx in range(4):
        assert_close(model(x, exit_idx=idx), logits[idx])


def test_exit_equals_the_backbone_cut_by_hand(make_model, x):
    model = make_model('resnet18').eval()
    backbone = model.backbone
    stem = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(x))))
    maps = [backbone.layer1(stem)]
    maps.append(backbone.layer2(maps[-1]))
    maps.append(backbone.layer3(maps[-1]))
    outputs = model(x, exits=True)
    for idx, single in enumerate(maps):
        head = model.exits[idx]
        features = head.convs(single).mean((2, 3))
        logits = features @ head.fc.weight.T + head.fc.bias
        assert_close(outputs.features[idx], features)
        assert_close(outputs.logits[idx], logits)
        assert_close(model(x, exit_idx=idx), logits)


def test_output_has_one_entry_per_classifier_with_main_last(make_model, x):
    model = make_model('test_resnet').eval()
    outputs = model(x, exits=True)
    assert isinstance(outputs, ExitOutputs)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 10)] * 4
    widths = [spec.widths[-1] for spec in model.exits.specs] + [model.backbone.head_hidden_size]
    assert [tuple(features.shape) for features in outputs.features] == [(2, width) for width in widths]
    assert torch.equal(outputs.logits[-1], model(x))


@pytest.mark.parametrize(
    'name',
    ['resnet18', 'densenet121', 'mobilenetv3_small_050', 'ghostnet_100', 'repvit_m1', 'test_convnext', 'test_byobnet'],
)
def test_features_are_what_enters_the_linear_layers(make_model, x, name):
    model = make_model(name).eval()
    outputs = model(x, exits=True)
    pre_logits = model.backbone.forward_head(model.backbone.forward_features(x), pre_logits=True)
    assert_close(outputs.features[-1], pre_logits)
    classifiers = [*(head.fc for head in model.exits), model.backbone.get_classifier()]
    assert len(classifiers) == len(outputs.logits) >= 4
    for classifier, features, logits in zip(classifiers, outputs.features, outputs.logits):
        assert_close(classifier(features), logits)


def count_calls(model, names):
    """Return a dict that counts the forwards of these modules from now on."""
    calls = dict.fromkeys(names, 0)

    def count(name):
        calls[name] += 1

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: count(name))
    return calls


@pytest.mark.parametrize(
    ('name', 'stages'),
    [
        ('resnet18', ['layer1', 'layer2', 'layer3', 'layer4']),
        ('convnext_atto', ['stages.0', 'stages.1', 'stages.2', 'stages.3']),
        ('test_efficientnet', ['blocks.1', 'blocks.2', 'blocks.3', 'blocks.4']),
    ],
)
@pytest.mark.parametrize('exit_idx', [0, 1, 2, -4, -3, -2])
def test_exit_forward_runs_no_later_stage_and_no_other_head(make_model, x, name, stages, exit_idx):
    model = make_model(name).eval()
    heads = [f'exits.{idx}' for idx in range(3)]
    backbone = [f'backbone.{stage}' for stage in stages]
    classifier = [child for child, module in model.named_modules() if module is model.get_classifier()]
    calls = count_calls(model, [*backbone, *heads, *classifier])
    assert len(calls) == 8
    model(x, exit_idx=exit_idx)
    idx = exit_idx % 4
    assert [calls[key] for key in backbone] == [1] * (idx + 1) + [0] * (3 - idx)
    assert [calls[key] for key in heads] == [int(other == idx) for other in range(3)]
    assert calls[classifier[0]] == 0


@pytest.mark.parametrize('kwargs', [{}, {'exit_idx': -1}, {'exit_idx': 3}], ids=['off', 'minus-one', 'last'])
def test_main_forward_runs_no_head(make_model, x, kwargs):
    model = make_model('resnet18').eval()
    calls = count_calls(model, ['backbone.layer4', 'backbone.fc', *(f'exits.{idx}' for idx in range(3))])
    model(x, **kwargs)
    assert list(calls.values()) == [1, 1, 0, 0, 0]


def test_collect_runs_every_stage_and_head_once(make_model, x):
    model = make_model('resnet18').eval()
    names = [f'backbone.{stage}' for stage in RESNET_STAGES] + [f'exits.{idx}' for idx in range(3)]
    calls = count_calls(model, names)
    model(x, exits=True)
    assert list(calls.values()) == [1] * 10


@pytest.mark.parametrize('exit_idx', [4, -5, 100])
def test_exit_out_of_range_is_an_error_that_names_the_range(make_model, x, exit_idx):
    model = make_model()
    with pytest.raises(MultiExitError, match=rf'exit_idx must be an integer in \[-4, 3\], got {exit_idx}') as error:
        model(x, exit_idx=exit_idx)
    assert '\n' not in str(error.value)


def test_exits_and_exit_idx_together_are_an_error(make_model, x):
    model = make_model()
    with pytest.raises(MultiExitError, match='mutually exclusive'):
        model(x, exits=True, exit_idx=0)


def test_tap_at_a_module_that_is_not_there_is_an_error_and_leaves_no_hook(make_backbone):
    backbone = make_backbone()
    specs = [ExitSpec(module, 32, 4, 'linear') for module in ('layer1.0', 'layer9')]
    with pytest.raises(MultiExitError, match='layer9'):
        MultiExitModel(backbone, specs)
    assert sum(len(module._forward_hooks) for module in backbone.modules()) == 0


# Gradients


@pytest.mark.parametrize('form', ['collect', 'alone'])
@pytest.mark.parametrize('exit_idx', [0, 1, 2, 3])
def test_loss_of_an_exit_reaches_its_head_and_the_backbone_up_to_its_tap_alone(make_model, x, exit_idx, form):
    model = make_model('resnet18')
    logits = model(x, exits=True).logits[exit_idx] if form == 'collect' else model(x, exit_idx=exit_idx)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    reached = {name for name, param in model.named_parameters() if param.grad is not None and param.grad.any()}
    touched = {name for name, param in model.named_parameters() if param.grad is not None}
    stages = RESNET_STAGES if exit_idx == 3 else RESNET_STAGES[: 3 + exit_idx]
    prefixes = tuple(f'backbone.{stage}.' for stage in stages) + (f'exits.{exit_idx}.',)
    expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert touched == expected
    assert reached == expected


# torch.compile, torch.export, autocast


@pytest.mark.slow
def test_three_forms_compile_without_graph_break_at_three_batch_sizes(make_model):
    model = make_model().eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    checked = 0
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for batch in (2, 3, 5):
            x = torch.randn(batch, 3, 64, 64)
            for form in ({}, {'exits': True}, {'exit_idx': 1}):
                assert_close(compiled(x, **form), model(x, **form))
                checked += 1
    assert checked == 9
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] >= 3
    torch._dynamo.reset()


def test_exported_collect_forward_survives_the_disk(make_model, x, tmp_path):
    model = make_model().eval()
    program = torch.export.export(model, (torch.randn_like(x),), {'exits': True})
    torch.export.save(program, tmp_path / 'model.pt2')
    outputs = torch.export.load(tmp_path / 'model.pt2').module()(x, exits=True)
    assert isinstance(outputs, ExitOutputs)
    expected = model(x, exits=True)
    assert_close(outputs.logits, expected.logits)
    assert_close(outputs.features, expected.features)


@pytest.mark.parametrize('strict', [False, True])
def test_exported_exit_leaves_out_what_is_deeper(make_model, x, strict):
    if strict and TorchVersion(torch.__version__) < (2, 15):
        pytest.skip('strict export of torch 2.8 does not trace Module.get_submodule; 2.15 does')
    model = make_model().eval()
    program = torch.export.export(model, (torch.randn_like(x),), {'exit_idx': 0}, strict=strict)
    assert_close(program.module()(x, exit_idx=0), model(x, exit_idx=0))
    whole = torch.export.export(model, (torch.randn_like(x),), {}, strict=strict)
    blocks = [[node for node in part.graph.nodes if 'batch_norm' in str(node.target)] for part in (program, whole)]
    assert len(blocks[0]) < len(blocks[1])
    assert len(blocks[1]) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.backbone.modules())


def test_forward_under_bfloat16_autocast_is_near_the_float32_one(make_model, x):
    model = make_model().eval()
    expected = model(x, exits=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = model(x, exits=True)
        single = model(x, exit_idx=1)
    assert {logits.dtype for logits in outputs.logits} == {torch.bfloat16}
    assert torch.equal(single, outputs.logits[1])
    for actual, wanted in zip(outputs.logits, expected.logits):
        assert (actual.float() - wanted).norm() < 0.05 * wanted.norm()
        assert not torch.equal(actual.float(), wanted)


# timm's surface


@pytest.mark.parametrize('name', SMALL)
def test_state_dict_is_the_backbone_under_timm_keys_and_the_exits(make_backbone, make_model, name):
    plain, model = make_backbone(name), make_model(name)
    backbone = {key for key in model.state_dict() if key.startswith('backbone.')}
    others = set(model.state_dict()) - backbone
    assert backbone == {f'backbone.{key}' for key in plain.state_dict()}
    assert {key.split('.')[0] for key in others} == {'exits'}
    assert {key.split('.')[1] for key in others} == {'0', '1', '2'}


def test_reset_classifier_changes_main_and_every_exit(make_model, x):
    model = make_model('test_resnet').eval()
    before = model(x, exits=True)
    model.reset_classifier(7)
    after = model(x, exits=True)
    assert model.num_classes == 7
    assert [tuple(logits.shape) for logits in after.logits] == [(2, 7)] * 4
    assert [tuple(model(x, exit_idx=idx).shape) for idx in range(4)] == [(2, 7)] * 4
    assert_close(after.features, before.features)
    assert model.get_classifier().out_features == 7


def test_names_of_the_classes_go_with_their_classifier(make_model):
    model = make_model()
    model.backbone.pretrained_cfg.update(label_names=['a'] * model.num_classes, label_descriptions={'a': 'b'})
    model.reset_classifier(model.num_classes)
    assert not {'label_names', 'label_descriptions'} & model.pretrained_cfg.keys()
    assert model.pretrained_cfg['mean']


def test_reset_classifier_to_zero_leaves_features_as_logits(make_model, x):
    model = make_model('test_resnet').eval()
    model.reset_classifier(0)
    outputs = model(x, exits=True)
    assert len(outputs.logits) == 4
    for logits, features in zip(outputs.logits, outputs.features):
        assert torch.equal(logits, features)
    model.reset_classifier(3)
    assert [tuple(logits.shape) for logits in model(x, exits=True).logits] == [(2, 3)] * 4


@pytest.mark.parametrize(
    'attribute',
    ['num_classes', 'num_features', 'head_hidden_size', 'feature_info', 'pretrained_cfg'],
)
def test_attribute_is_the_backbones(make_model, attribute):
    model = make_model('test_resnet', num_classes=17)
    assert getattr(model, attribute) is getattr(model.backbone, attribute)


def test_num_classes_and_widths_are_those_of_the_architecture(make_model):
    model = make_model('mobilenetv3_small_050', num_classes=17)
    assert (model.num_classes, model.num_features, model.head_hidden_size, model.in_chans) == (17, 288, 1024, 3)
    assert model.get_classifier() is model.backbone.classifier


def test_two_halves_of_timms_forward_make_the_whole(make_model, x):
    model = make_model('resnet18').eval()
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))


def test_no_weight_decay_names_parameters_of_this_model(make_model, monkeypatch):
    model = make_model('test_resnet')
    assert model.no_weight_decay() == set()
    monkeypatch.setattr(model.backbone, 'no_weight_decay', lambda: {'conv1.0.weight'}, raising=False)
    assert model.no_weight_decay() == {'backbone.conv1.0.weight'}
    assert 'backbone.conv1.0.weight' in dict(model.named_parameters())


@pytest.mark.parametrize(
    ('name', 'stem', 'stages'),
    [
        ('resnet18', 'conv1', ['layer1', 'layer2', 'layer3', 'layer4', 'fc']),
        ('convnext_atto', 'stem', ['stages.0', 'stages.1', 'stages.2', 'stages.3', 'head']),
        ('test_efficientnet', 'conv_stem', ['blocks.1', 'blocks.2', 'blocks.3', 'blocks.4', 'classifier']),
    ],
)
def test_layer_decay_puts_heads_at_the_full_rate_and_the_stem_at_the_lowest(make_model, name, stem, stages):
    model = make_model(name)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    names = {id(param): key for key, param in model.named_parameters()}
    scales = {names[id(param)]: group['lr_scale'] for group in optimizer.param_groups for param in group['params']}
    assert set(scales) == set(names.values())
    heads = {scale for key, scale in scales.items() if key.startswith('exits.')}
    assert heads == {max(scales.values())} == {1.0}
    order = [max(scale for key, scale in scales.items() if key.startswith(f'backbone.{part}.')) for part in stages]
    lowest = {scale for key, scale in scales.items() if key.startswith(f'backbone.{stem}.')}
    assert lowest == {min(scales.values())}
    assert max(lowest) < order[0]
    assert all(shallow < deep for shallow, deep in zip(order, order[1:]))


def test_ema_copy_follows_the_model_and_answers_to_itself(make_model, x):
    model = make_model('test_resnet')
    model(x, exits=True)
    ema = ModelEmaV3(model, decay=0.0)
    model.eval()
    before = model(x, exits=True)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.2)
    after = model(x, exits=True)
    assert_close(ema.module(x, exits=True).logits, before.logits)
    ema.update(model)
    assert_close(ema.module(x, exits=True).logits, after.logits)
    assert_close(ema.module(x, exit_idx=1), after.logits[1])
    for old, new in zip(before.logits, after.logits):
        assert (old - new).abs().max() > 1e-2


def test_model_is_in_the_mode_of_its_backbone(make_backbone, x):
    model = attach_exits(make_backbone().eval(), input_size=(3, 32, 32))
    assert not any(module.training for module in model.modules())
    assert model.train().exits[0].training


def test_one_exit_is_not_trained_alone_under_reentrant_checkpointing(make_model):
    model = make_model().train()
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(MultiExitError, match='the backbone would get no gradient'):
            model(x, exit_idx=1)
        with torch.no_grad():
            model(x, exit_idx=1)
        model(x, exit_idx=-1)
        model.eval()(x, exit_idx=1)
    finally:
        set_reentrant_ckpt(False)
    # Not reentrant, the stem gets the gradient that it gets without checkpointing.
    gradients = []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(x, exit_idx=1).square().sum().backward()
        gradients.append(model.backbone.conv1[0].weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_last_call_of_freeze_backbone_counts(make_model):
    model = make_model()

    def trains():
        return [param.requires_grad for param in model.classifier_parameters()]

    model.freeze_backbone()
    assert trains() == [False, False]
    model.freeze_backbone(trains_classifier=True)
    assert trains() == [True, True]
    assert not any(param.requires_grad for param in model.backbone.conv1.parameters())
    model.reset_classifier(7)
    model.freeze_backbone()
    assert trains() == [False, False]
    model.reset_classifier(0)
    model.freeze_backbone(False)
    assert all(param.requires_grad for param in model.parameters())


def test_images_that_a_backbone_does_not_take_have_no_cost(make_model):
    model = make_model('vit_tiny_patch16_224', input_size=(3, 224, 224))
    with pytest.raises(
        InvalidValueError, match=r'^input_size must be one that VisionTransformer takes, got \(3, 96, 96\): '
    ):
        model.cost((3, 96, 96))


@pytest.mark.parametrize('pool', ['bogus', 5])
def test_unknown_pooling_leaves_the_classes(make_model, pool):
    model = make_model()
    with pytest.raises(InvalidValueError, match='^global_pool must be one that ResNet takes, got'):
        model.reset_classifier(7, pool)
    assert model.num_classes == 10
    assert [logits.shape for logits in model(torch.randn(2, 3, 64, 64), exits=True).logits] == [(2, 10)] * 4
