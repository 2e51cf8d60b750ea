"""Arguments of the public Python names: what is refused in one line before any work, and what must be accepted."""

import copy
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import cases, enliven

import timm_multiexit as tme
from timm_multiexit.evaluation.validator import Questions, ValidationData, Validator
from timm_multiexit.losses.teachers import DepthWeights, KDConfig
from timm_multiexit.policies.budgets import PolicyResult, parse_budget
from timm_multiexit.utils.errors import DataError, InvalidTypeError, InvalidValueError, MissingFileError

SIZE = (3, 32, 32)
TYPE, VALUE, DATA = InvalidTypeError, InvalidValueError, DataError
NAN = float('nan')


def make_world():
    """What the calls are made on; nobody changes it."""
    torch.manual_seed(0)
    model = tme.attach_exits(timm.create_model('test_resnet', num_classes=10), head='linear', input_size=SIZE)
    model = enliven(model).eval()
    x, targets = torch.randn(8, *SIZE), torch.arange(8)
    with torch.no_grad():
        logits = model(x, exits=True).logits
    return SimpleNamespace(
        model=model,
        plain=timm.create_model('test_resnet', num_classes=10),
        x=x,
        targets=targets,
        loader=[(x, targets)],
        logits=logits,
        outputs=model(x, exits=True),
        costs=model.cost(),
        policy=tme.ExitPolicy('confidence', (0.5, 0.5, 0.5)),
        loss=tme.create_loss('eed'),
        data=ValidationData('val', None, {'input_size': SIZE}, lambda *args: [], lambda: x, calibration=(None, '')),
    )


@pytest.fixture(scope='module')
def world():
    return make_world()


def changed(module, edit):
    """Return a copy of a module that was edited in place."""
    module = copy.deepcopy(module)
    edit(module)
    return module


# Images: (what is given for images, kind, text), of every call that takes them.

IMAGES = {
    'list': (lambda w: w.x.tolist(), TYPE, r'^Images must be a non-empty tensor \[B, 3, H, W\], got list\.$'),
    'array': (lambda w: w.x.numpy(), TYPE, r'H, W\], got ndarray\.$'),
    'None': (lambda w: None, TYPE, r'H, W\], got None\.$'),
    'pair': (lambda w: (w.x, w.targets), TYPE, r'H, W\], got tuple\.$'),
    'unbatched': (lambda w: w.x[0], VALUE, r'got \[3, 32, 32\]\. Add the dimension of the batch: x\[None\]\.$'),
    'vectors': (lambda w: w.x.flatten(1), VALUE, r'got \[8, 3072\]\.$'),
    'grey': (lambda w: w.x[:, :1], VALUE, r'\[B, 3, H, W\], got \[8, 1, 32, 32\]\.$'),
    'channels last': (lambda w: w.x.permute(0, 2, 3, 1), VALUE, r'got \[8, 32, 32, 3\]\. Put channels before'),
    'no pixels': (lambda w: w.x[..., :0], VALUE, r'got \[8, 3, 32, 0\]\.$'),
    'uint8': (lambda w: w.x.byte(), TYPE, '^Images must be floating point, got uint8. Scale and normalize them'),
    'int64': (lambda w: w.x.long(), TYPE, '^Images must be floating point, got int64.'),
    'float64': (
        lambda w: w.x.double(),
        TYPE,
        r'^Images must be float32, as the weights are, got float64\. Convert them: x\.to\(torch\.float32\)\.$',
    ),
    'float16': (lambda w: w.x.half(), TYPE, 'must be float32, as the weights are, got float16'),
    'sparse': (
        lambda w: w.x.to_sparse(),
        TYPE,
        r'^Images must be a dense tensor, got a sparse one: x\.to_dense\(\)\.$',
    ),
    'elsewhere': (
        lambda w: w.x.to('meta'),
        VALUE,
        r"^Images must be on cpu, where the model is, got meta: x.to\('cpu'\)",
    ),
}

CALLS = {
    'exits': lambda model, x: model(x, exits=True),
    'exit_idx': lambda model, x: model(x, exit_idx=0),
    'exit_idx=main': lambda model, x: model(x, exit_idx=-1),
    'infer': lambda model, x: model.infer(x, threshold=0.5),
    'anytime': lambda model, x: model.anytime(x),
    'predict': lambda model, x: model.predict(x, deadline_ms=1000),
    'measure_times': lambda model, x: model.measure_times(x, rounds=1),
}


def assert_one_line(error, kind, text):
    assert type(error) is kind
    assert re.search(text, str(error)), str(error)
    assert '\n' not in str(error)
    assert len(str(error)) < 400


def refuse(call, kind, text):
    """Assert that a call is refused before anything of a backbone runs."""
    ran = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: ran.append(module))
    try:
        with pytest.raises(tme.MultiExitError) as caught:
            call()
    finally:
        handle.remove()
    assert_one_line(caught.value, kind, text)
    return [module for module in ran if not isinstance(module, tme.MultiExitModel)]


@pytest.mark.parametrize('call', cases(CALLS))
@pytest.mark.parametrize(('make', 'kind', 'text'), cases(IMAGES))
def test_wrong_images_are_refused_alike_by_all_calls(world, call, make, kind, text):
    assert refuse(lambda: call(world.model, make(world)), kind, text) == []


@pytest.mark.parametrize('name', ['uint8', 'unbatched', 'grey', 'float64'])
def test_plain_call_is_timms_own(world, name):
    """Whatever timm says or does is what the model says or does."""
    images = IMAGES[name][0](world)
    answers = []
    for module in (world.model.backbone, world.model):
        try:
            answers.append(module(images).shape)
        except Exception as error:  # timm's and torch's own kinds
            answers.append((type(error), str(error)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize('call', cases(CALLS))
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_images_have_the_dtype_of_the_weights(world, call, dtype):
    model = copy.deepcopy(world.model).to(dtype)
    call(model, world.x.to(dtype))
    with pytest.raises(InvalidTypeError, match=rf'must be {str(dtype)[6:]}, as the weights are, got float32'):
        call(model, world.x)


@pytest.mark.parametrize('call', cases(CALLS))
def test_autocast_takes_all_floats_that_it_converts(world, call):
    with torch.autocast('cpu', torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            call(world.model, world.x.to(dtype))
        with pytest.raises(InvalidTypeError, match='got float64'):
            call(world.model, world.x.double())


@pytest.mark.parametrize('call', cases(CALLS))
def test_first_of_the_weights_does_not_decide_alone(world, call):
    model = copy.deepcopy(world.model)
    model.backbone.register_parameter('scale', torch.nn.Parameter(torch.ones(1, dtype=torch.float16)))
    assert next(model.backbone.parameters()).dtype == torch.float16
    call(model, world.x)


def test_images_may_be_empty_where_timm_takes_them(world):
    assert [single.shape for single in world.model(world.x[:0], exits=True).logits] == [(0, 10)] * 4


# NaN: as from infer, from every call that answers by itself.


@pytest.mark.parametrize('call', ['infer', 'anytime', 'predict'])
@pytest.mark.parametrize(('idx', 'name'), [(0, 'Exit 0'), (2, 'Exit 2'), (3, 'Main')])
def test_nan_logits_are_an_error_that_names_the_classifier(world, call, idx, name):
    def spoil(model):
        layer = [*(head.fc for head in model.exits), model.get_classifier()][idx]
        layer.bias.data[3] = NAN

    model = changed(world.model, spoil)
    run = {
        'infer': lambda: model.infer(world.x, threshold=tuple(1.0 if k == idx else None for k in range(3))),
        'anytime': lambda: [seen.append(k) for k, _ in model.anytime(world.x)],
        'predict': lambda: model.predict(world.x, deadline_ms=60_000),
    }[call]
    seen = []
    if call == 'predict' and idx < 3:
        assert run().exit_idx.tolist() == [3] * 8  # what is not the answer does not count
        return
    message = rf'^{name} gives NaN or infinite logits for 8 of 8 images: check the weights and the input\.$'
    with pytest.raises(InvalidValueError, match=message):
        run()
    assert seen == (list(range(idx)) if call == 'anytime' else [])
    assert model._taps._state.visitor is None


def test_number_of_images_with_nan_is_told_by_all_calls(world):
    x = world.x.clone()
    x[[1, 5]] = NAN
    for call, name in (('infer', 'Exit 0'), ('anytime', 'Exit 0'), ('predict', 'Main')):
        with pytest.raises(InvalidValueError, match=f'^{name} gives NaN or infinite logits for 2 of 8 images'):
            list(CALLS[call](world.model, x))


def test_minus_infinity_of_some_classes_is_an_answer(world):
    def mask(model):
        for layer in (*(head.fc for head in model.exits), model.get_classifier()):
            layer.bias.data[3] = -float('inf')

    model = changed(world.model, mask)
    assert [idx for idx, _ in model.anytime(world.x)] == [0, 1, 2, 3]
    assert model.infer(world.x, threshold=0.5).logits[:, 3].tolist() == [-float('inf')] * 8
    assert model.predict(world.x, deadline_ms=60_000).logits.shape == (8, 10)


# All else: function: case -> (call, kind, text).

RANGE = r'exit_idx must be an integer in \[-4, 3\], got {}\. Main is 3 or -1\.'
HWC = r'input_size must be \(channels, height, width\)'


def exit_idx_cases():
    values = {'True': (True, TYPE), "'0'": ('0', TYPE), '1.0': (1.0, TYPE), r'\[0\]': ([0], TYPE)}
    values |= {'4': (4, VALUE), '-5': (-5, VALUE)}
    calls = {
        'MultiExitModel.forward': lambda w, value: w.model(w.x, exit_idx=value),
        'truncate': lambda w, value: tme.truncate(w.model, value),
    }
    return {
        f'{name}: exit_idx={shown}': (lambda w, call=call, value=value: call(w, value), kind, RANGE.format(shown))
        for name, call in calls.items()
        for shown, (value, kind) in values.items()
    }


def input_size_cases():
    values = {
        '64': (64, TYPE, r'input_size must be a list of integers, got 64\. Pass \(channels, height, width\)\.'),
        '(64, 64)': ((64, 64), VALUE, HWC + r', integers >= 1, got \(64, 64\)'),
        '(64, 64, 3)': ((64, 64, 3), VALUE, HWC + r'.*looks like \(height, width, channels\)|\(3, height, width\)'),
        '(3, 0, 0)': ((3, 0, 0), VALUE, HWC + r', integers >= 1, got \(3, 0, 0\)'),
        "'3x64x64'": ('3x64x64', TYPE, 'input_size must be a list of integers'),
        '(3, 64., 64)': ((3, 64.0, 64), TYPE, 'input_size must be a list of integers'),
    }
    calls = {
        'create_model': lambda w, size: tme.create_model('test_resnet', input_size=size),
        'attach_exits': lambda w, size: tme.attach_exits(w.plain, input_size=size),
        'exit_points': lambda w, size: tme.exit_points('test_resnet', size),
        'MultiExitModel.cost': lambda w, size: w.model.cost(size),
        'evaluate': lambda w, size: tme.evaluate(w.model, w.loader, input_size=size),
    }
    return {
        f'{name}: input_size={shown}': (lambda w, call=call, size=size: call(w, size), kind, text)
        for name, call in calls.items()
        for shown, (size, kind, text) in values.items()
    }


def model_cases():
    """Models without exits where a model with exits is wanted."""
    calls = {
        'truncate': lambda w, model: tme.truncate(model, 0),
        'evaluate': lambda w, model: tme.evaluate(model, w.loader),
        'MultiExitTask': lambda w, model: tme.MultiExitTask(model, w.loss, verbose=False),
        'Validator': lambda w, model: Validator(model, w.data, Questions(), accelerator=None),
    }
    values = {
        'plain': (lambda w: w.plain, r'model must be a MultiExitModel, got ResNet\. attach_exits\(model\) makes one'),
        'compiled': (
            lambda w: torch.compile(w.model),
            r'got OptimizedModule\. Pass the model inside: model\._orig_mod\.',
        ),
        'parallel': (
            lambda w: torch.nn.DataParallel(w.model),
            r'got DataParallel\. Pass the model inside: model\.module',
        ),
        'None': (lambda w: None, 'model must be a MultiExitModel, got None'),
        'a name': (lambda w: 'resnet18', "model must be a MultiExitModel, got 'resnet18'"),
    }
    return {
        f'{name}: model={shown}': (lambda w, call=call, make=make: call(w, make(w)), TYPE, text)
        for name, call in calls.items()
        for shown, (make, text) in values.items()
    }


def calibrate_cases():
    """Of both functions of that name."""
    values = {
        'delta with a budget': ({'budget': '60%', 'delta': 0.1}, VALUE, 'delta goes with max_drop, not with a budget'),
        'nothing': ({}, VALUE, r'Pass either budget, .* or max_drop, .* got budget=None and max_drop=None\.'),
        'both': ({'budget': '60%', 'max_drop': 0.1}, VALUE, "got budget='60%' and max_drop=0.1"),
        'budget=60': ({'budget': 60}, VALUE, "A budget must be .*'60%'.* got 60"),
        "budget='60'": ({'budget': '60'}, VALUE, "got '60'"),
        'max_drop=0': ({'max_drop': 0}, VALUE, r'max_drop must be in \(0, 1\), got 0\. 0\.01 is one percent'),
        "max_drop='1%'": ({'max_drop': '1%'}, TYPE, r"max_drop must be in \(0, 1\), got '1%'"),
        'max_drop=nan': ({'max_drop': NAN}, VALUE, r'max_drop must be in \(0, 1\), got nan'),
        'max_drop=True': ({'max_drop': True}, TYPE, 'got True'),
        'delta=1': ({'max_drop': 0.1, 'delta': 1}, VALUE, r'delta must be in \(0, 1\), got 1'),
        'criterion': ({'budget': '60%', 'criterion': 'conf'}, VALUE, "criterion must be one of .* got 'conf'"),
        'criterion=[]': ({'budget': '60%', 'criterion': ['margin']}, VALUE, 'criterion must be one of'),
        'combine': ({'budget': '60%', 'combine': 'sum'}, VALUE, "combine must be None, mean or geometric, got 'sum'"),
    }
    calls = {
        'calibrate': lambda w, kwargs: tme.calibrate(w.logits, w.targets, w.costs, **kwargs),
        'MultiExitModel.calibrate': lambda w, kwargs: w.model.calibrate(w.loader, **kwargs),
    }
    return {
        f'{name}: {shown}': (lambda w, call=call, kwargs=kwargs: call(w, kwargs), kind, text)
        for name, call in calls.items()
        for shown, (kwargs, kind, text) in values.items()
    }


OTHERS = {
    'create_model: None': (lambda w: tme.create_model(None), TYPE, r'model_name must be a str, got None\.'),
    'create_model: 3': (lambda w: tme.create_model(3), TYPE, r'model_name must be a str, got 3\.'),
    'create_model: model': (lambda w: tme.create_model(w.plain), TYPE, 'model_name must be a str, got ResNet'),
    'create_model: num_classes=-1': (
        lambda w: tme.create_model('test_resnet', num_classes=-1),
        VALUE,
        r'num_classes must be an integer >= 0, got -1\.',
    ),
    'create_model: unknown tag': (
        lambda w: tme.create_model('resnet18.nope'),
        VALUE,
        'Cannot create resnet18.nope: ',
    ),
    'create_model: unknown keyword': (
        lambda w: tme.create_model('test_resnet', nonsense=3),
        VALUE,
        "Cannot create test_resnet: .*'nonsense'",
    ),
    'create_model: pooling': (
        lambda w: tme.create_model('test_resnet', global_pool='x'),
        VALUE,
        'Cannot create test_resnet: ',
    ),
    'create_model: pretrained_cfg': (
        lambda w: tme.create_model('test_resnet', pretrained_cfg=3),
        VALUE,
        'Cannot create test_resnet: ',
    ),
    'create_model: no such checkpoint': (
        lambda w: tme.create_model('test_resnet', checkpoint_path='/nope'),
        MissingFileError,
        'checkpoint_path /nope does not exist',
    ),
    "create_model: num_classes='10'": (
        lambda w: tme.create_model('test_resnet', num_classes='10'),
        TYPE,
        "num_classes must be an integer >= 0, got '10'",
    ),
    'create_model: num_classes=2.0': (
        lambda w: tme.create_model('test_resnet', num_classes=2.0),
        TYPE,
        'num_classes must be an integer >= 0, got 2.0',
    ),
    'create_model: num_classes=True': (
        lambda w: tme.create_model('test_resnet', num_classes=True),
        TYPE,
        'num_classes must be an integer >= 0, got True',
    ),
    'create_model: in_chans=0': (
        lambda w: tme.create_model('test_resnet', in_chans=0),
        VALUE,
        'in_chans must be an integer >= 1, got 0',
    ),
    'create_model: channels': (
        lambda w: tme.create_model('test_resnet', in_chans=1, input_size=(3, 64, 64)),
        VALUE,
        r'ResNet cannot run on images \[3, 64, 64\]: .* Pass the input_size=\(channels, height, width\)',
    ),
    'attach_exits: name': (
        lambda w: tme.attach_exits('resnet18'),
        TYPE,
        r"backbone must be a module, got 'resnet18': create_model\('resnet18'\) makes one with exits\.",
    ),
    'attach_exits: class': (
        lambda w: tme.attach_exits(type(w.plain)),
        TYPE,
        'must be a module, got the class ResNet: make one',
    ),
    'attach_exits: head_widths=[8]': (
        lambda w: tme.attach_exits(w.plain, [1], head_widths=[8]),
        TYPE,
        r'head_widths must be a list with one list of integers per exit, got \[8\]',
    ),
    'attach_exits: head_widths=8': (
        lambda w: tme.attach_exits(w.plain, head_widths=8),
        TYPE,
        'head_widths must be .*got 8',
    ),
    'attach_exits: head=[]': (
        lambda w: tme.attach_exits(w.plain, head=['conv']),
        TYPE,
        r"head must be one of .*\['conv'\]",
    ),
    'attach_exits: drop_rate': (
        lambda w: tme.attach_exits(w.plain, drop_rate=1.5),
        VALUE,
        r'drop_rate must be in \[0, 1\], got 1.5',
    ),
    'attach_exits: exits=array': (
        lambda w: tme.attach_exits(w.plain, np.array([0.5])),
        VALUE,
        "exits must be 'auto', a",
    ),
    'attach_exits: input of other channels': (
        lambda w: tme.attach_exits(w.plain, input_size=(1, 64, 64)),
        VALUE,
        r'ResNet cannot run on images \[1, 64, 64\]: .*channels',
    ),
    'exit_points: 3': (lambda w: tme.exit_points(3), TYPE, 'backbone must be a module, got 3, of type int'),
    'MultiExitModel.cost: channels': (
        lambda w: w.model.cost((1, 32, 32)),
        VALUE,
        r'input_size must be \(3, height, width\) for this model, got \(1, 32, 32\)',
    ),
    'MultiExitModel.forward: exits=[0]': (
        lambda w: w.model(w.x, exits=[0, 1]),
        TYPE,
        r'exits must be a bool, got list\. exit_idx=0 runs the first exit alone\.',
    ),
    'MultiExitModel.forward: both': (lambda w: w.model(w.x, exits=True, exit_idx=0), VALUE, 'mutually exclusive'),
    'MultiExitModel.drop_exits: 0': (
        lambda w: w.model.drop_exits(0),
        TYPE,
        r'exits must be a list of integers in \[-3, 2\], got 0\.',
    ),
    "MultiExitModel.drop_exits: '0'": (lambda w: w.model.drop_exits('0'), TYPE, "exits must be a list .* got '0'"),
    'MultiExitModel.drop_exits: [True]': (lambda w: w.model.drop_exits([True]), TYPE, r'got \[True\]'),
    'MultiExitModel.drop_exits: main': (
        lambda w: w.model.drop_exits([3]),
        VALUE,
        r'got \[3\]\. Main cannot be dropped',
    ),
    "MultiExitModel.reset_classifier: '10'": (
        lambda w: w.model.reset_classifier('10'),
        TYPE,
        "num_classes must be an integer >= 0, got '10'",
    ),
    'MultiExitModel.reset_classifier: -1': (
        lambda w: w.model.reset_classifier(-1),
        VALUE,
        'num_classes must be an integer >= 0, got -1',
    ),
    'MultiExitModel.measure_times: rounds=0': (
        lambda w: w.model.measure_times(w.x, rounds=0),
        VALUE,
        'rounds must be an integer >= 1, got 0',
    ),
    'MultiExitModel.measure_times: rounds=2.5': (
        lambda w: w.model.measure_times(w.x, rounds=2.5),
        TYPE,
        'rounds must be an integer >= 1, got 2.5',
    ),
    "MultiExitModel.predict: '5'": (
        lambda w: w.model.predict(w.x, deadline_ms='5'),
        TYPE,
        r"deadline_ms must be > 0 and <= 1e\+09, got '5'",
    ),
    'MultiExitModel.predict: nan': (lambda w: w.model.predict(w.x, deadline_ms=NAN), VALUE, 'deadline_ms .* got nan'),
    'MultiExitModel.infer: bucket 2.5': (
        lambda w: w.model.infer(w.x, w.policy, bucket_sizes=2.5),
        TYPE,
        r'bucket_sizes must be a list of integers >= 1, got \[2.5\]',
    ),
    "MultiExitModel.infer: bucket '4'": (
        lambda w: w.model.infer(w.x, w.policy, bucket_sizes='4'),
        TYPE,
        r"bucket_sizes must be a list of integers >= 1, got \['4'\]",
    ),
    'MultiExitModel.infer: threshold True': (
        lambda w: w.model.infer(w.x, threshold=True),
        VALUE,
        r"A threshold of 'confidence' must be in \[0, 1\], .* got True",
    ),
    'MultiExitModel.infer: threshold dict': (
        lambda w: w.model.infer(w.x, threshold={0: 0.5}),
        VALUE,
        r"A threshold of 'confidence' must be in",
    ),
    'MultiExitModel.infer: a number for the policy': (
        lambda w: w.model.infer(w.x, 0.5),
        VALUE,
        'policy must be an ExitPolicy, got 0.5: pass an ExitPolicy, threshold=0.9',
    ),
    'ExitPolicy: a number': (
        lambda w: tme.ExitPolicy('confidence', 0.5),
        TYPE,
        'thresholds must be a sequence of numbers',
    ),
    'ExitPolicy: temperature': (
        lambda w: tme.ExitPolicy('margin', (0.5,), (1, '1')),
        VALUE,
        r"temperature must be .*'1'",
    ),
    'ExitPolicy: combine': (
        lambda w: tme.ExitPolicy('margin', (0.5,), combine=['mean']),
        VALUE,
        'combine must be None',
    ),
    'apply_policy: ExitOutputs': (
        lambda w: tme.apply_policy(w.policy, w.outputs),
        TYPE,
        r'logits must be a list of float tensors, .* got ExitOutputs with tuple\. Pass outputs\.logits\.',
    ),
    'apply_policy: swapped': (
        lambda w: tme.apply_policy(w.logits, w.policy),
        TYPE,
        r'policy must be an ExitPolicy, got tuple\.',
    ),
    'apply_policy: arrays': (
        lambda w: tme.apply_policy(w.policy, [single.numpy() for single in w.logits]),
        TYPE,
        'logits must be a list of float tensors, .* got list with ndarray',
    ),
    'apply_policy: indices': (
        lambda w: tme.apply_policy(w.policy, [single.long() for single in w.logits]),
        TYPE,
        'got list with torch.int64',
    ),
    'calibrate: ExitOutputs': (
        lambda w: tme.calibrate(w.outputs, w.targets, w.costs, budget='60%'),
        TYPE,
        r'got ExitOutputs with tuple\. Pass outputs\.logits',
    ),
    'calibrate: targets': (
        lambda w: tme.calibrate(w.logits, w.targets.tolist(), w.costs, budget='60%'),
        VALUE,
        r'targets must be a tensor \[8\] of class indices, one per sample, got list',
    ),
    'calibrate: costs': (
        lambda w: tme.calibrate(w.logits, w.targets, [1, 2, 3, 4], budget='60%'),
        TYPE,
        r'costs must be StageCosts or model\.cost\(\), got \[1, 2, 3, 4\]',
    ),
    'calibrate: costs=5': (lambda w: tme.calibrate(w.logits, w.targets, 5, budget='60%'), TYPE, 'model.cost.*got 5'),
    'StageCosts: a number': (lambda w: tme.StageCosts(5, (1,)), TYPE, 'paths must be a list of numbers, got 5'),
    'StageCosts: text': (
        lambda w: tme.StageCosts((1, '2'), (1,)),
        VALUE,
        r"costs of paths must be in \[0, 1e18\], got '2'",
    ),
    'StageCosts: unit': (lambda w: tme.StageCosts((1, 2), (1,), ['ms']), TYPE, 'unit must be one of MACs, ms'),
    'StageCosts.mean: policy': (
        lambda w: tme.StageCosts((1, 2), (1,)).mean(0.5, torch.tensor([0])),
        TYPE,
        'policy must be an ExitPolicy, got 0.5',
    ),
    'BudgetTable: a number': (lambda w: tme.BudgetTable(5), TYPE, 'must be PolicyResults, got 5'),
    'BudgetTable: policies': (lambda w: tme.BudgetTable((w.policy,)), TYPE, 'must be PolicyResults, got'),
    'BudgetTable.select: 60': (
        lambda w: tme.BudgetTable((PolicyResult(w.policy, 50, (1, 0, 0, 0), 5),), 10, 10).select(60),
        VALUE,
        'A budget must be .* got 60',
    ),
    'PolicyResult: shares': (
        lambda w: PolicyResult(w.policy, 50, 1.0),
        TYPE,
        'shares of a policy must be a list of numbers',
    ),
    'PolicyResult: policy': (lambda w: PolicyResult(0.5, 50, (1.0,)), TYPE, 'policy must be an ExitPolicy, got 0.5'),
    'parse_budget: None': (lambda w: parse_budget(None), VALUE, 'A budget must be .* got None'),
    'ExitSpec: widths': (
        lambda w: tme.ExitSpec('layer1', 8, 4, 'conv', 8),
        TYPE,
        "exit at 'layer1' must be a list .*got 8",
    ),
    'ExitSpec: channels': (
        lambda w: tme.ExitSpec('layer1', 8.0, 4, 'conv'),
        VALUE,
        r"channel count of the exit at 'layer1' must be an integer in \[1, 65536\], got 8.0",
    ),
    'create_loss: foo': (
        lambda w: tme.create_loss('eed', foo=1),
        TYPE,
        "create_loss has no argument 'foo', the arguments are teacher, output_loss, output_weight, ",
    ),
    'create_loss: foo=None': (lambda w: tme.create_loss('eed', foo=None), TYPE, "create_loss has no argument 'foo'"),
    'create_loss: None': (
        lambda w: tme.create_loss(None),
        VALUE,
        'loss must be one of beed, byot, ce, eed, phuong, got None',
    ),
    'MultiExitLoss: output_loss': (
        lambda w: tme.MultiExitLoss('all', ['kl']),
        VALUE,
        r"output_loss must be .*\['kl'\]",
    ),
    'MultiExitLoss: teacher': (lambda w: tme.MultiExitLoss([1.0]), VALUE, r'teacher must be .* got \[1\.0\]'),
    'MultiExitLoss: exit_weights': (lambda w: tme.MultiExitLoss(exit_weights=1), TYPE, 'exit_weights must be a list'),
    'MultiExitLoss: temperature': (
        lambda w: tme.MultiExitLoss(temperature='3'),
        VALUE,
        r"temperature must be .* got '3'",
    ),
    'MultiExitTask: loss': (
        lambda w: tme.MultiExitTask(w.model, 'eed', verbose=False),
        TYPE,
        r"loss must be a MultiExitLoss, got 'eed'\. create_loss\('eed'\) makes one\.",
    ),
    'evaluate: swapped': (lambda w: tme.evaluate(w.loader, w.model), TYPE, 'model must be a MultiExitModel, got list'),
    'evaluate: loader=None': (
        lambda w: tme.evaluate(w.model, None),
        TYPE,
        'loader must give batches of images and class indices, got NoneType',
    ),
    'evaluate: threshold': (
        lambda w: tme.evaluate(w.model, w.loader, multi_label=True, threshold=1),
        VALUE,
        r'threshold must be in \(0, 1\), got 1',
    ),
    'evaluate: threshold text': (
        lambda w: tme.evaluate(w.model, w.loader, multi_label=True, threshold='0.5'),
        TYPE,
        r"threshold must be in \(0, 1\), got '0.5'",
    ),
    'MultiExitModel.calibrate: loader=3': (
        lambda w: w.model.calibrate(3, budget='60%'),
        TYPE,
        'loader must give batches of images and class indices, got int',
    ),
    'load_checkpoint: swapped': (
        lambda w: tme.load_checkpoint('last.pth.tar', w.model),
        TYPE,
        r"model must be a Module, got 'last\.pth\.tar'",
    ),
    'push_to_hub: plain': (
        lambda w: tme.push_to_hub(w.plain, 'me/net'),
        TYPE,
        'must be a MultiExitModel to be published, got ResNet',
    ),
    'load_exits: no path': (lambda w: tme.load_exits(w.plain, None), TYPE, 'directory must be a path, got None'),
    'save_pretrained: empty path': (lambda w: tme.save_pretrained(w.model, ''), TYPE, "must be a path, got ''"),
    'load_checkpoint: no path': (lambda w: tme.load_checkpoint(w.model, 3), TYPE, 'path must be a path, got 3'),
    'export: plain': (lambda w: tme.export(w.plain, 'x'), TYPE, 'must be a MultiExitModel'),
    'export: no path': (lambda w: tme.export(w.model, None), TYPE, 'folder must be a path, got None'),
    'export: form': (
        lambda w: tme.export(w.model, 'x', forms=['chain']),
        VALUE,
        "must be one of fixed, stages, conditional, got 'chain'",
    ),
    'gather_model: name': (lambda w: tme.gather_model('resnet18'), TYPE, "model must be a Module, got 'resnet18'"),
    'load_exits: name': (lambda w: tme.load_exits('resnet18', 'x'), TYPE, "backbone must be a module, got 'resnet18'"),
    'push_to_hub: swapped': (
        lambda w: tme.push_to_hub('me/net', w.model),
        TYPE,
        "must be a MultiExitModel to be published, got 'me/net'",
    ),
    'Questions: budgets': (
        lambda w: Questions(budgets='60%'),
        TYPE,
        "budgets must be a list of texts such as '60%', got",
    ),
    'Questions: budget': (lambda w: Questions(budgets=(60,)), VALUE, 'A budget must be .* got 60'),
    'Questions: policies': (
        lambda w: Questions(policies={'a': 0.5}),
        TYPE,
        'policies must be ExitPolicies by name, got 0.5',
    ),
    'Questions: max_drop': (lambda w: Questions(max_drop=1), VALUE, r'max_drop must be in \(0, 1\), got 1'),
    'Questions: time_rounds': (
        lambda w: Questions(time_rounds=-1),
        VALUE,
        'time_rounds must be an integer >= 0, got -1',
    ),
}

WRONG = {**exit_idx_cases(), **input_size_cases(), **model_cases(), **calibrate_cases(), **OTHERS}


@pytest.mark.parametrize(('call', 'kind', 'text'), cases(WRONG))
def test_wrong_argument_is_one_line_before_any_work(world, call, kind, text):
    before = copy.deepcopy(world.model.state_dict())
    ran = refuse(lambda: call(world), kind, text)
    assert not any(module is world.model.backbone for module in ran)
    assert world.model.policy is None
    assert len(world.model.exits) == 3
    assert all(torch.equal(tensor, before[key]) for key, tensor in world.model.state_dict().items())


# What has no arguments that this table could be about, or is checked in the tests of its own module.
RESULTS = {'ExitOutputs', 'ExitPoint', 'ExitTable', 'Prediction', 'TruncatedModel', 'MultiExitModel'}
NO_ARGUMENTS = {'feature_widths', 'classifier_parameters', 'add_projectors', 'freeze_backbone', 'find_classifier'}
OLD_NAMES = {'measure_costs'}


def test_every_public_name_is_in_the_table():
    named = {name.partition(':')[0] for name in WRONG}
    public = {
        name
        for name in tme.__all__
        if callable(getattr(tme, name))
        and not (inspect.isclass(getattr(tme, name)) and issubclass(getattr(tme, name), Exception))
    }
    assert public - named == RESULTS
    methods = {
        name
        for name, value in vars(tme.MultiExitModel).items()
        if inspect.isfunction(value) and not name.startswith('_')
    }
    missing = {name for name in methods if f'MultiExitModel.{name}' not in named and name not in CALLS}
    assert missing == NO_ARGUMENTS | OLD_NAMES


# What must be accepted: function: case -> (call, the same with Python's own numbers).


def one(loss):
    return repr(loss)


ACCEPTED = {
    'forward: np.int64': (lambda w: w.model(w.x, exit_idx=np.int64(1)), lambda w: w.model(w.x, exit_idx=1)),
    'forward: np.int8': (lambda w: w.model(w.x, exit_idx=np.int8(-1)), lambda w: w.model(w.x, exit_idx=-1)),
    'forward: 0-d array': (lambda w: w.model(w.x, exit_idx=np.array(1)), lambda w: w.model(w.x, exit_idx=1)),
    'forward: tensor': (lambda w: w.model(w.x, exit_idx=torch.tensor(2)), lambda w: w.model(w.x, exit_idx=2)),
    'truncate: np.int64': (
        lambda w: tme.truncate(w.model, np.int64(-1)).eval()(w.x),
        lambda w: tme.truncate(w.model, -1).eval()(w.x),
    ),
    'infer: np.float32': (
        lambda w: w.model.infer(w.x, threshold=np.float32(0.5)),
        lambda w: w.model.infer(w.x, threshold=0.5),
    ),
    'infer: np.int64': (lambda w: w.model.infer(w.x, threshold=np.int64(0)), lambda w: w.model.infer(w.x, threshold=0)),
    'infer: 0-d array': (
        lambda w: w.model.infer(w.x, threshold=np.array(0.5)),
        lambda w: w.model.infer(w.x, threshold=0.5),
    ),
    'infer: list': (
        lambda w: w.model.infer(w.x, threshold=[np.float64(0.2), None, np.float16(0.5)]),
        lambda w: w.model.infer(w.x, threshold=(0.2, None, 0.5)),
    ),
    'infer: buckets': (
        lambda w: w.model.infer(w.x, w.policy, bucket_sizes=np.array([2, 4])),
        lambda w: w.model.infer(w.x, w.policy, bucket_sizes=(2, 4)),
    ),
    'infer: bucket': (
        lambda w: w.model.infer(w.x, w.policy, bucket_sizes=np.int64(4)),
        lambda w: w.model.infer(w.x, w.policy, bucket_sizes=4),
    ),
    'predict: np.float32': (
        lambda w: w.model.predict(w.x, deadline_ms=np.float32(6e4)),
        lambda w: w.model.predict(w.x, deadline_ms=60_000),
    ),
    'cost: list': (lambda w: w.model.cost([3, np.int64(32), 32]), lambda w: w.model.cost((3, 32, 32))),
    'cost: Size': (lambda w: w.model.cost(w.x.shape[1:]), lambda w: w.model.cost((3, 32, 32))),
    'ExitPolicy: numbers': (
        lambda w: tme.ExitPolicy('margin', (np.float32(0.5),), (np.float64(2), np.int64(1))).to_dict(),
        lambda w: {'criterion': 'margin', 'thresholds': [0.5], 'temperatures': [2.0, 1.0], 'combine': None},
    ),
    'ExitPolicy: patience': (
        lambda w: tme.ExitPolicy('patience', (np.int64(2),)).to_dict(),
        lambda w: {'criterion': 'patience', 'thresholds': [2], 'temperatures': [], 'combine': None},
    ),
    'ExitSpec: numbers': (
        lambda w: tme.ExitSpec('layer1', np.int64(8), np.int32(4), 'conv', np.array([8, 16])).to_dict(),
        lambda w: tme.ExitSpec('layer1', 8, 4, 'conv', (8, 16)).to_dict(),
    ),
    'attach_exits: count': (
        lambda w: tme.attach_exits(copy.deepcopy(w.plain), np.int64(2)).exits.specs,
        lambda w: tme.attach_exits(copy.deepcopy(w.plain), 2).exits.specs,
    ),
    'attach_exits: indices': (
        lambda w: tme.attach_exits(copy.deepcopy(w.plain), [np.int64(1), np.int8(-2)]).exits.specs,
        lambda w: tme.attach_exits(copy.deepcopy(w.plain), [1, -2]).exits.specs,
    ),
    'attach_exits: widths': (
        lambda w: tme.attach_exits(copy.deepcopy(w.plain), [2], head_widths=np.array([[8, 8, 8]])).exits.specs,
        lambda w: tme.attach_exits(copy.deepcopy(w.plain), [2], head_widths=[[8, 8, 8]]).exits.specs,
    ),
    'attach_exits: drop_rate': (
        lambda w: [head.drop.p for head in tme.attach_exits(copy.deepcopy(w.plain), drop_rate=np.float32(0.5)).exits],
        lambda w: [0.5] * 3,
    ),
    'create_model: numbers': (
        lambda w: (
            tme.create_model(
                'test_resnet', num_classes=np.int64(7), input_size=np.array([1, 64, 64]), exits=[np.int64(1)]
            ).input_size
        ),
        lambda w: (1, 64, 64),
    ),
    'create_model: None': (lambda w: tme.create_model('test_resnet', num_classes=None).num_classes, lambda w: 1000),
    'drop_exits: array': (
        lambda w: changed(w.model, lambda model: model.drop_exits(np.array([0, -1])))(w.x, exits=True).logits,
        lambda w: (w.logits[1], w.logits[3]),
    ),
    'drop_exits: set': (
        lambda w: changed(w.model, lambda model: model.drop_exits({2})).exits.specs,
        lambda w: w.model.exits.specs[:2],
    ),
    'reset_classifier': (
        lambda w: changed(w.model, lambda model: model.reset_classifier(np.int64(5)))(w.x, exit_idx=0).shape,
        lambda w: (8, 5),
    ),
    'StageCosts: numbers': (
        lambda w: tme.StageCosts(np.array([1, 2]), [np.float32(1)]),
        lambda w: tme.StageCosts((1.0, 2.0), (1.0,)),
    ),
    'calibrate: max_drop': (
        lambda w: tme.calibrate(w.logits, w.targets, w.costs, max_drop=np.float64(0.9), delta=np.float32(0.5)),
        lambda w: tme.calibrate(w.logits, w.targets, w.costs, max_drop=0.9, delta=0.5),
    ),
    'calibrate: int32': (
        lambda w: tme.calibrate(w.logits, w.targets.int(), w.costs, budget='90%'),
        lambda w: tme.calibrate(w.logits, w.targets, w.costs, budget='90%'),
    ),
    'BudgetTable': (
        lambda w: tme.BudgetTable(
            [PolicyResult(w.policy, np.float32(50), np.array([1, 0, 0, 0]), np.int64(5))], np.float64(10), np.int64(10)
        ).to_dict(),
        lambda w: tme.BudgetTable((PolicyResult(w.policy, 50.0, (1.0, 0.0, 0.0, 0.0), 5.0),), 10.0, 10.0).to_dict(),
    ),
    'MultiExitLoss: numbers': (
        lambda w: one(
            tme.MultiExitLoss([np.int64(0), np.int64(-1)], temperature=np.float32(2), exit_weights=np.ones(2))
        ),
        lambda w: one(tme.MultiExitLoss([0, -1], temperature=2.0, exit_weights=[1.0, 1.0])),
    ),
    'DepthWeights, KDConfig': (
        lambda w: (DepthWeights(np.float32(2), np.int64(1)), KDConfig(np.float64(0.5)).factors),
        lambda w: (DepthWeights(2.0, 1.0), (0.5, 0.5)),
    ),
    'Questions': (lambda w: Questions(time_rounds=np.int64(3), max_drop=np.float32(0.5)).time_rounds, lambda w: 3),
    'evaluate: threshold': (
        lambda w: tme.evaluate(w.model, [(w.x, torch.eye(10)[:8])], multi_label=True, threshold=np.float64(0.5)).rows,
        lambda w: tme.evaluate(w.model, [(w.x, torch.eye(10)[:8])], multi_label=True, threshold=0.5).rows,
    ),
}


@pytest.mark.filterwarnings('ignore:No policy that uses an exit is safe')
@pytest.mark.parametrize(('call', 'expected'), cases(ACCEPTED))
def test_numbers_of_other_libraries_are_numbers(world, call, expected):
    with torch.no_grad():
        found, wanted = call(world), expected(world)
    if isinstance(wanted, (torch.Tensor, tuple)) and not isinstance(wanted, torch.Size):
        flat, other = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted)
        assert len(flat) == len(other)
        for first, second in zip(flat, other):
            assert torch.equal(first, second) if isinstance(second, torch.Tensor) else first == second
    else:
        assert repr(found) == repr(wanted)  # JSON and reprs of numpy's numbers are others


def test_calibration_on_one_image_gives_a_policy_within_the_budget(world):
    model = copy.deepcopy(world.model)
    policy = model.calibrate([(world.x[:1], world.targets[:1])], budget='100%')
    assert model.infer(world.x, policy).logits.shape == (8, 10)
    with pytest.raises(InvalidValueError, match=r'^max_drop needs 2 or more held-out samples, .* got 1\.$'):
        model.calibrate([(world.x[:1], world.targets[:1])], max_drop=0.1)
    assert model.policy is policy
