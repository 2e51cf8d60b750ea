"""Modules that are not timm's: what is found out about them, and what is refused, each with what to do instead."""

import collections
import copy
import pickle

import pytest
import timm
import torch
from helpers import cases, enliven
from helpers.members import modules, record
from torch import nn
from torch.nn.utils import parametrizations

import timm_multiexit as tme
from timm_multiexit.exits.cost import Cost
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, MultiExitError, StateError

SIZE = (3, 16, 16)


class Net(nn.Module):
    """A network of one's own, with one activation for all blocks."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.relu = nn.ReLU()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), self.relu, nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), self.relu)
        self.block3 = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2, padding=1), self.relu)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, num_classes))

    def forward(self, x):
        x = self.block3(self.block2(self.block1(x)))
        return self.classifier(self.pool(x).flatten(1))


def make_net(cls=Net, **kwargs):
    torch.manual_seed(1)
    return enliven(cls(**kwargs)).eval()


def attach(module=..., exits=('block1', 'block2'), **kwargs):
    module = make_net() if module is ... else module
    return tme.attach_exits(module, list(exits), input_size=SIZE, **kwargs).eval()


# What is found


def test_places_classes_and_classifier_of_a_network_of_ones_own():
    model = attach()
    # block2 ends with the activation that is called three times: it is tapped itself.
    assert modules(model) == ['block1.3', 'block2']
    assert [(spec.channels, spec.reduction, spec.layout) for spec in model.exits.specs] == [
        (8, 2, 'NCHW'),
        (12, 2, 'NCHW'),
    ]
    assert model.num_classes == 5
    assert model.get_classifier() is model.backbone.classifier[1]
    assert model.num_features == model.head_hidden_size == 16
    assert [head.fc.out_features for head in model.exits] == [5, 5]


def test_logits_and_features_are_those_of_the_heads_on_what_plain_hooks_see():
    model, x = attach(), torch.randn(4, *SIZE)
    logits, left, entered = record(copy.deepcopy(make_net()), x, ('block1', 'block2'), ('classifier.1',))
    with torch.no_grad():
        outputs = model(x, exits=True)
        expected = [head(left[name]) for head, name in zip(model.exits, ('block1', 'block2'))]
    for idx in range(2):
        assert torch.equal(outputs.logits[idx], expected[idx][0])
        assert torch.equal(outputs.features[idx], expected[idx][1])
        assert torch.equal(model(x, exit_idx=idx), expected[idx][0])
    assert torch.equal(outputs.logits[-1], logits)
    assert torch.equal(outputs.features[-1], entered['classifier.1'])
    assert torch.equal(model(x), logits)


def test_costs_are_those_worked_out_by_hand():
    costs = attach().cost()
    block1 = Cost(256 * 8 * 27, 8 * 27 + 8 + 16)  # 16x16 places; the norm has 16 parameters
    block2 = Cost(64 * 12 * 72, 12 * 72 + 12)  # after the pooling 8x8
    block3 = Cost(16 * 16 * 108, 16 * 108 + 16)  # 4x4
    linear = Cost(16 * 5, 16 * 5 + 5)
    paths = [block1, block1 + block2, block1 + block2 + block3 + linear]
    assert [Cost(cost.fixed.macs - cost.head.macs, cost.fixed.params - cost.head.params) for cost in costs] == paths


def test_widths_of_heads_count_halvings_to_the_last_map():
    # 8x8 at block1, 4x4 at the end: one halving, so one width.
    model = attach(head='paper')
    assert [spec.widths for spec in model.exits.specs] == [(16,), (16,)]


class Scaled(Net):
    """Logits that are scaled and normed after the classifier."""

    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.last(super().forward(x)).log_softmax(1)


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16))

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def cosine():
    net = Net()
    net.classifier = Cosine()
    return net


def normed():
    net = Net()
    parametrizations.weight_norm(net.classifier[1])
    return net


def convolutional():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return net


@pytest.mark.parametrize(
    ('make', 'name', 'num_classes', 'width'),
    cases(
        {
            'followed by a norm': (Scaled, 'classifier.1', 5, 16),
            'of a type of its own': (cosine, 'classifier', 5, 16),
            'weight norm': (normed, 'classifier.1', 5, 16),
            'convolution in front of the pooling': (convolutional, '2', 4, 8),
        }
    ),
)
def test_classifier_is_what_does_the_last_multiplications(make, name, num_classes, width):
    backbone = make_net(make)
    model = attach(backbone, ['1'] if make is convolutional else ['block1'])
    assert model.module_info == tme.exits.backbone.ModuleInfo((name,), num_classes, SIZE)
    _, _, entered = record(copy.deepcopy(backbone), x := torch.randn(2, *SIZE), inputs=[name])
    features = model(x, exits=True).features[-1]
    expected = entered[name] if entered[name].ndim == 2 else entered[name].mean((2, 3))
    assert features.shape == (2, width)
    torch.testing.assert_close(features, expected)


class Functional(Net):
    """A classifier that is no module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return super().forward(x) @ self.weight


class TwoHeads(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.block3(self.block2(self.block1(x)))).flatten(1)
        return (self.classifier(x) + self.other(x)) / 2


def test_classifier_that_a_forward_does_not_show_has_to_be_named():
    with pytest.raises(InvalidValueError, match='Functional does not show which module gives its 5 logits: name it'):
        attach(Functional())
    assert attach(Functional(), classifier='classifier').get_classifier().in_features == 16


def test_several_classifiers_are_named_and_their_features_averaged():
    model = attach(make_net(TwoHeads), classifier=['classifier', 'other'])
    assert model.module_info.classifiers == ('classifier.1', 'other')
    x = torch.randn(2, *SIZE)
    _, _, entered = record(make_net(TwoHeads), x, inputs=['other'])
    torch.testing.assert_close(model(x, exits=True).features[-1], entered['other'])  # both get the same
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


# timm's questions


def test_timms_data_configuration_and_optimizer_take_it():
    model = attach()
    config = timm.data.resolve_data_config(model=model)
    assert config['input_size'] == SIZE
    assert config['mean'] == timm.data.IMAGENET_DEFAULT_MEAN
    assert model.pretrained_cfg['num_classes'] == 5
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', weight_decay=0.1)
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert all((decays[id(param)] > 0) == (param.ndim > 1) for param in model.parameters())


@pytest.mark.parametrize('call', ['forward_features', 'forward_head', 'set_grad_checkpointing'])
def test_what_only_timms_models_have_is_refused_in_one_line(call):
    with pytest.raises(StateError, match=f'Net is not a timm model and has no {call}'):
        getattr(attach(), call)(torch.zeros(1))


def test_fresh_classifiers_have_their_classes_everywhere():
    model = attach()
    policy_before = model.policy = tme.ExitPolicy('confidence', (0.5, 0.5))
    model.reset_classifier(7)
    x = torch.randn(3, *SIZE)
    assert policy_before is not None
    assert model.policy is None
    assert model.num_classes == model.pretrained_cfg['num_classes'] == 7
    assert [single.shape for single in model(x, exits=True).logits] == [(3, 7)] * 3
    assert torch.equal(
        model(x, exits=True).features[-1], record(make_net(), x, inputs=['classifier.1'])[2]['classifier.1']
    )
    assert not model.get_classifier().training
    model.reset_classifier(0)
    assert model(x).shape == (3, 16)


def test_classifier_of_an_unknown_type_is_not_replaced():
    model = attach(make_net(cosine), ['block1'])
    with pytest.raises(
        StateError, match='The classifier of Net, of type Cosine, cannot be replaced by one of 7 classes'
    ):
        model.reset_classifier(7)
    assert model.num_classes == 5


def test_layer_decay_groups_the_heads_with_the_last_layer():
    model = attach()
    model.backbone.group_matcher = lambda coarse: {'stem': '^block1', 'blocks': r'^block(\d)'}
    layers = {name: model.group_matcher()(name) for name, _ in model.named_parameters()}
    assert layers['backbone.block1.0.weight'] == 0
    assert {layers[name] for name in layers if name.startswith('exits.')} == {max(layers.values())}


def test_map_of_as_many_channels_as_rows_is_read_by_other_maps_or_a_larger_image_or_refused():
    class Last(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.norm1 = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
            self.pool, self.norm2, self.fc = nn.AvgPool2d(2), nn.LayerNorm(width), nn.Linear(width, 5)

        def forward(self, x):
            x = self.norm1(self.stem(x).permute(0, 2, 3, 1))
            x = self.norm2(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            return self.fc(x.mean((1, 2)))

    # 4x4 places: [1, 4, 4, 4] tells nothing, [1, 2, 2, 4] of the other exit does, or [1, 8, 8, 4] of a larger image.
    for exits in (['norm1'], ['norm1', 'norm2']):
        specs = attach(Last(4), exits).exits.specs
        assert [(s.layout, s.channels, s.reduction) for s in specs] == [('NHWC', 4, 4), ('NHWC', 4, 8)][: len(exits)]
    first = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert [spec.layout for spec in attach(first, ['1']).exits.specs] == ['NCHW']
    fixed = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(InvalidValueError, match=r'\[1, 4, 4, 4\] may be \[B, C, H, W\] or \[B, H, W, C\], tap another'):
        attach(fixed, ['1'])


# Copies


@pytest.mark.parametrize(
    'clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['copy', 'pickle']
)
def test_copies_answer_to_themselves(clone):
    model, x = attach(), torch.randn(2, *SIZE)
    before = model(x, exits=True).logits
    other = clone(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    for one, expected in zip(other(x, exits=True).logits, before):
        assert torch.equal(one, expected)
    assert other.module_info == model.module_info
    assert other.get_classifier() is other.backbone.classifier[1]


# What is refused


class Dictionary(Net):
    def forward(self, x):
        return {'logits': super().forward(x)}


class Reading(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def compiled_in_place():
    net = Net()
    net.compile(backend='eager')
    return net


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(4, 2))


def truncated():
    return tme.truncate(attach(), 0)


def peft_like():
    kind = type('PeftModel', (nn.Module,), {'__module__': 'peft.peft_model'})
    module = kind()
    module.base_model = Net()
    return module


def like(name):
    module = type(name, (nn.Module,), {})()
    module.module = Net()
    return module


@pytest.mark.parametrize(
    ('make', 'error', 'fragments'),
    cases(
        {
            'name': (lambda: 'resnet18', InvalidTypeError, ["got 'resnet18'", "create_model('resnet18')"]),
            'class': (lambda: Net, InvalidTypeError, ['the class Net', 'make one, as Net(...)']),
            'function': (lambda: make_net, InvalidTypeError, ['must be a module', 'function']),
            'none': (lambda: None, InvalidTypeError, ['must be a module', 'None']),
            'data parallel': (lambda: nn.DataParallel(Net()), InvalidValueError, ['DataParallel', '.module first']),
            'ddp': (lambda: like('DistributedDataParallel'), InvalidValueError, ['.module first, then wrap']),
            'compiled': (lambda: torch.compile(Net(), backend='eager'), InvalidValueError, ['OptimizedModule', '_orig_mod']),
            'compiled in place': (compiled_in_place, InvalidValueError, ['backbone.compile()', 'then compile']),
            'script': (lambda: torch.jit.script(Net()), InvalidValueError, ['the model that it was made from']),
            'peft': (peft_like, InvalidValueError, ['PeftModel', 'get_peft_model', 'merge_and_unload']),
            'attached': (attach, InvalidValueError, ['got a MultiExitModel', '.backbone']),
            'attached inside': (lambda: nn.Sequential(attach()), InvalidValueError, ['Sequential', 'MultiExitModel inside']),
            'truncated': (truncated, InvalidValueError, ['got a TruncatedModel', 'new backbone']),
            'lazy': (lazy, InvalidValueError, ['parameters without a shape (0.weight)', 'run it once']),
            'dictionary': (Dictionary, InvalidValueError, ['must return logits [B, C]', 'a dict', 'a module around it']),
            'reads values': (Reading, InvalidValueError, ['a forward without data', 'must not read values']),
        }
    ),
)  # fmt: skip
def test_what_cannot_have_exits_is_refused_with_what_to_do_instead(make, error, fragments):
    with pytest.raises(error) as raised:
        attach(make(), ['block1'])
    assert '\n' not in str(raised.value)
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(
    ('kwargs', 'fragments'),
    cases(
        {
            'no size': ({'exits': ['block1']}, ['input_size must be given for Net']),
            'auto': ({'input_size': SIZE}, ['names no stages', "exits must name modules to tap, as ['block1', 'block2']"]),
            'index': ({'exits': [0], 'input_size': SIZE}, ['names no stages']),
            'number': ({'exits': 2, 'input_size': SIZE}, ['names no stages']),
            'name and index': ({'exits': ['block1', 0], 'input_size': SIZE}, ['no exit 0', 'Name modules']),
            'unknown place': ({'exits': ['blok1'], 'input_size': SIZE}, ["no module 'blok1', nearest are block1"]),
            'shared': ({'exits': ['relu'], 'input_size': SIZE}, ['called more than once']),
            'classifier': ({'exits': ['classifier'], 'input_size': SIZE}, ['neither a map nor a grid']),
            'unknown classifier': (
                {'exits': ['block1'], 'input_size': SIZE, 'classifier': 'fc'},
                ["classifier must name a module of Net, got 'fc'"],
            ),
            'near classifier': (
                {'exits': ['block1'], 'input_size': SIZE, 'classifier': 'clasifier'},
                ['nearest are classifier'],
            ),
            'no classifier': ({'exits': ['block1'], 'input_size': SIZE, 'classifier': []}, ['got []']),
            'other classes': ({'exits': ['block1'], 'input_size': SIZE, 'num_classes': 9}, ['does not show', '9 logits']),
            'other classes, named': (
                {'exits': ['block1'], 'input_size': SIZE, 'num_classes': 9, 'classifier': 'classifier'},
                ['num_classes must be that of Net, 5, got 9'],
            ),
            'wrong channels': ({'exits': ['block1'], 'input_size': (1, 16, 16)}, ['[1, 16, 16]', 'Check input_size']),
        }
    ),
)  # fmt: skip
def test_what_does_not_fit_a_module_is_refused_and_changes_nothing(kwargs, fragments):
    net = make_net()
    with pytest.raises(MultiExitError) as raised:
        tme.attach_exits(net, **kwargs)
    assert '\n' not in str(raised.value)
    for fragment in fragments:
        assert fragment in str(raised.value)
    hooks = collections.Counter(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    assert set(hooks) == {0}


def test_timms_models_keep_their_own_word(make_backbone):
    backbone = make_backbone('test_resnet')
    model = tme.attach_exits(backbone, [1], classifier='fc', num_classes=10)
    assert model.module_info is None
    for kwargs, text in (
        ({'classifier': 'head'}, 'classifier must be that of ResNet, fc'),
        ({'num_classes': 4}, ', 10, got 4'),
    ):
        with pytest.raises(InvalidValueError, match=text):
            tme.attach_exits(make_backbone('test_resnet'), [1], **kwargs)


def test_model_of_a_module_is_not_published():
    with pytest.raises(InvalidValueError, match='must have a timm backbone to be published, got Net'):
        tme.push_to_hub(attach(), 'org/net')


def test_exit_points_of_a_module_are_refused_with_what_to_do_instead():
    with pytest.raises(InvalidValueError, match='Net names no stages'):
        tme.exit_points(Net(), SIZE)


@pytest.mark.parametrize(
    ('classifier', 'message'),
    [
        ('0', r'classifier must give 5 logits, got 0 of Sequential, which gives 8'),
        (['2', '0'], r'classifier must give 5 logits, got 0 of'),
        (3, r'classifier must name a module of Sequential, got 3'),
    ],
    ids=['other', 'list', 'number'],
)
def test_layer_that_does_not_give_the_logits_is_not_taken_for_the_classifier(classifier, message):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InvalidValueError, match=message):
        tme.attach_exits(net, ['1'], input_size=(3, 32, 32), classifier=classifier)
    assert not net[1]._forward_hooks
