"""Taps: hooks that copy, pickle, survive replaced modules, and know nothing between two calls."""

import copy
import pickle
import sys
import threading

import pytest
import timm
import torch
from timm.utils import freeze
from torch import nn

from timm_multiexit.exits.taps import ForwardStopped, Taps, resolve_tap
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import StateError

NAMES = ('0', '1')


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def make_chain():
    """Return x -> 2x -> 6x -> 30x with taps at 2x, at 6x and at what enters the last layer, 6x again."""
    chain = nn.Sequential(Scale(2.0), Scale(3.0), Scale(5.0))
    taps = Taps(NAMES, ('2',))
    taps.install(chain)
    return chain, taps


class Skipping(nn.Module):
    """Holds a layer that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.fc = Scale(2.0), Scale(3.0), Scale(5.0)

    def forward(self, x):
        return self.fc(self.used(x))


class Normed(nn.Module):
    """Two plain batch norms to tap, each followed by a convolution."""

    def __init__(self):
        super().__init__()
        self.norm0, self.conv0 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.conv1(self.norm1(self.conv0(self.norm0(x)))).mean((2, 3)))


class Recorder:
    def __init__(self):
        self.visits = []

    def __call__(self, idx, tensor):
        self.visits.append((idx, tensor.tolist()))


def num_hooks(module):
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def assert_same_outputs(outputs, expected, rtol=1e-5, atol=1e-6):
    for kind in ('logits', 'features'):
        torch.testing.assert_close(getattr(outputs, kind), getattr(expected, kind), rtol=rtol, atol=atol)


# What a visitor sees and may do


def test_visitor_sees_every_tap_once_in_order_of_depth():
    chain, taps = make_chain()
    recorder = Recorder()
    output = taps.visit(chain, torch.tensor([1.0]), recorder)
    assert recorder.visits == [(0, [2.0]), (1, [6.0]), (2, [6.0])]
    assert output.tolist() == [30.0]


@pytest.mark.parametrize('at', [0, 1, 2])
def test_samples_that_a_visitor_names_go_on_in_its_order(at):
    chain, taps = make_chain()
    seen = {}

    def visitor(idx, tensor):
        seen[idx] = tensor.tolist()
        return torch.tensor([2, 0]) if idx == at else None

    assert taps.visit(chain, torch.tensor([1.0, 10.0, 100.0]), visitor).tolist() == [3000.0, 30.0]
    whole = [[2.0, 20.0, 200.0], [6.0, 60.0, 600.0], [6.0, 60.0, 600.0]]
    left = [None, [600.0, 6.0], [600.0, 6.0]]
    assert seen == {idx: whole[idx] if idx <= at else left[idx] for idx in range(3)}
    assert chain(torch.tensor([1.0, 10.0])).tolist() == [30.0, 300.0]


def test_samples_leave_every_tensor_of_an_output():
    class Branches(nn.Module):
        def forward(self, x):
            return [x, {'twice': 2 * x}, 'name', torch.tensor(9.0), torch.tensor([8.0])]

    module = nn.Sequential(Branches(), nn.Identity())
    taps = Taps(['0'], ['1'])
    taps.install(module)
    keep_second = lambda idx, x: torch.tensor([1]) if idx == 0 else None  # noqa: E731
    output = taps._run(module, torch.tensor([1.0, 2.0, 3.0]), keep_second)
    assert type(output) is list
    # The first of several outputs is main's.
    assert taps.visit(module, torch.tensor([1.0, 2.0, 3.0]), keep_second).tolist() == [2.0]
    assert (output[0].tolist(), output[1]['twice'].tolist()) == ([2.0], [4.0])
    assert (output[2], output[3].item(), output[4].tolist()) == ('name', 9.0, [8.0])


def test_samples_do_not_leave_an_output_with_constants():
    class Constants(nn.Module):
        def forward(self, x):
            return x, torch.tensor([7.0, 8.0])

    module = nn.Sequential(Constants(), nn.Identity())
    taps = Taps(['0'], ['1'])
    taps.install(module)
    with pytest.raises(ValueError, match=r'Samples cannot be selected of \[2\], got 3 samples'):
        taps.visit(module, torch.tensor([1.0, 2.0, 3.0]), lambda idx, x: torch.tensor([1]) if idx == 0 else None)


def test_threads_that_hook_a_replaced_module_at_once_hook_it_once():
    chain, taps = make_chain()

    def hook_together(barrier):
        barrier.wait()
        taps.install(chain)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            chain[0] = Scale(2.0)
            barrier = threading.Barrier(4)
            threads = [threading.Thread(target=hook_together, args=(barrier,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(chain[0]._forward_hooks) == 1
    finally:
        sys.setswitchinterval(interval)


# Steps


def test_steps_come_in_order_and_the_output_is_returned():
    chain, taps = make_chain()
    steps = taps.step(chain, torch.tensor([1.0]), lambda idx, tensor: (idx, tensor.item()))
    assert next(steps) == (0, 2.0)
    assert next(steps) == (1, 6.0)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value.tolist() == [30.0]


def test_between_two_steps_the_taps_are_silent_and_other_visits_have_their_own_visitors():
    chain, taps = make_chain()
    x = torch.tensor([1.0])
    steps = taps.step(chain, x, lambda idx, tensor: tensor.item())
    inner = taps.step(chain, 10 * x, lambda idx, tensor: tensor.item())
    found = [next(steps), chain(x).item(), next(inner), taps.stop(chain, 100 * x, 1).item(), next(steps), next(inner)]
    assert found == [2.0, 30.0, 20.0, 600.0, 6.0, 60.0]
    inner.close()
    recorder = Recorder()
    taps.visit(chain, x, recorder)
    assert len(recorder.visits) == 3


@pytest.mark.parametrize('steps_taken', [0, 1, 2])
def test_closing_the_steps_runs_nothing_more_and_leaves_the_taps_clean(steps_taken):
    chain, taps = make_chain()
    calls = []
    chain[2].register_forward_pre_hook(lambda *args: calls.append('last layer'))
    steps = taps.step(chain, torch.tensor([1.0]), lambda idx, tensor: idx)
    for _ in range(steps_taken):
        next(steps)
    steps.close()
    assert calls == []
    assert taps._state.visitor is None
    assert copy.deepcopy(chain)(torch.tensor([1.0])).item() == 30.0


def test_error_of_a_reader_ends_the_steps_and_leaves_the_taps_clean():
    chain, taps = make_chain()

    def read(idx, tensor):
        if idx == 1:
            raise ValueError('no second step')
        return idx

    steps = taps.step(chain, torch.tensor([1.0]), read)
    assert next(steps) == 0
    with pytest.raises(ValueError, match='no second step'):
        next(steps)
    assert list(steps) == []
    assert taps._state.visitor is None


# Stopping


def test_stopped_visit_returns_none_and_runs_nothing_after_the_tap():
    chain, taps = make_chain()
    recorder = Recorder()

    def visitor(idx, tensor):
        recorder(idx, tensor)
        if idx == 1:
            raise ForwardStopped

    assert taps.visit(chain, torch.tensor([1.0]), visitor) is None
    assert recorder.visits == [(0, [2.0]), (1, [6.0])]


def test_collect_returns_output_and_tensors_in_declared_order():
    chain = nn.Sequential(Scale(2.0), Scale(3.0), Scale(5.0))
    taps = Taps(('1', '0'), ('2',))
    output, tensors, entering = taps.collect(chain, torch.tensor([1.0]))
    assert output.tolist() == [30.0]
    assert [tensor.tolist() for tensor in tensors] == [[6.0], [2.0]]
    assert [tensor.tolist() for tensor in entering] == [[6.0]]


@pytest.mark.parametrize(('idx', 'expected'), [(0, 2.0), (1, 6.0), (2, 6.0)])
def test_stop_returns_the_tensor_of_the_tap(idx, expected):
    chain, taps = make_chain()
    assert taps.stop(chain, torch.tensor([1.0]), idx).tolist() == [expected]


def test_tap_that_does_not_fire_is_an_error():
    backbone, taps = Skipping(), Taps(('used', 'unused'), ('fc',))
    with pytest.raises(RuntimeError, match="'unused' did not fire"):
        taps.collect(backbone, torch.ones(1))
    with pytest.raises(RuntimeError, match="'unused' did not fire"):
        taps.stop(backbone, torch.ones(1), 1)
    assert taps.stop(backbone, torch.ones(1), 0).tolist() == [2.0]


def test_classifier_that_is_not_called_is_an_error():
    backbone = Skipping()
    with pytest.raises(RuntimeError, match="'unused' did not fire"):
        Taps(('used',), ('unused',)).collect(backbone, torch.ones(1))


# Nothing stays behind between two calls


def test_plain_forward_after_a_visit_calls_no_visitor():
    chain, taps = make_chain()
    recorder = Recorder()
    taps.visit(chain, torch.ones(1), recorder)
    assert len(recorder.visits) == 3
    assert chain(torch.ones(1)).tolist() == [30.0]
    assert len(recorder.visits) == 3
    assert taps._state.visitor is None


class Failure(Exception):
    pass


def test_exception_in_the_backbone_leaves_no_visitor_behind():
    chain, taps = make_chain()
    recorder = Recorder()

    def fail(module, args):
        raise Failure

    handle = chain[1].register_forward_pre_hook(fail)
    with pytest.raises(Failure):
        taps.visit(chain, torch.ones(1), recorder)
    handle.remove()
    assert recorder.visits == [(0, [2.0])]
    assert chain(torch.ones(1)).tolist() == [30.0]
    assert recorder.visits == [(0, [2.0])]
    assert taps._state.visitor is None


def test_exception_in_a_visitor_leaves_no_visitor_behind():
    chain, taps = make_chain()
    visits = []

    def visitor(idx, tensor):
        visits.append(idx)
        raise Failure

    with pytest.raises(Failure):
        taps.visit(chain, torch.ones(1), visitor)
    assert chain(torch.ones(1)).tolist() == [30.0]
    assert visits == [0]


def test_visit_inside_a_visit_gives_the_outer_visitor_back():
    chain, taps = make_chain()
    outer, inner = Recorder(), Recorder()

    def visitor(idx, tensor):
        outer(idx, tensor)
        if idx == 0:
            taps.visit(chain, torch.tensor([10.0]), inner)

    taps.visit(chain, torch.tensor([1.0]), visitor)
    assert outer.visits == [(0, [2.0]), (1, [6.0]), (2, [6.0])]
    assert inner.visits == [(0, [20.0]), (1, [60.0]), (2, [60.0])]


def test_taps_of_two_owners_on_one_backbone_do_not_disturb_each_other():
    chain, first = make_chain()
    second = Taps(NAMES, ('2',))
    second.install(chain)
    recorders = Recorder(), Recorder()
    first.visit(chain, torch.tensor([1.0]), recorders[0])
    second.visit(chain, torch.tensor([10.0]), recorders[1])
    assert recorders[0].visits == [(0, [2.0]), (1, [6.0]), (2, [6.0])]
    assert recorders[1].visits == [(0, [20.0]), (1, [60.0]), (2, [60.0])]
    assert num_hooks(chain) == 6


def test_two_models_on_one_backbone_answer_as_each_does_alone(make_backbone):
    x = torch.randn(2, 3, 64, 64)
    backbone = make_backbone().eval()
    first = attach_exits(backbone, ['layer1', 'layer3']).eval()
    expected = first(x, exits=True)
    second = attach_exits(backbone, ['layer1', 'layer2'], head='linear').eval()
    alone = second(x, exits=True)
    assert len(alone.logits) == 3
    assert_same_outputs(first(x, exits=True), expected)
    assert_same_outputs(second(x, exits=True), alone)
    torch.testing.assert_close(first(x, exit_idx=1), expected.logits[1])
    torch.testing.assert_close(second(x, exit_idx=0), alone.logits[0])


# Copies and pickles


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, through_pickle], ids=['deepcopy', 'pickle'])
def test_copied_chain_fires_into_its_own_taps(duplicate):
    chain, taps = make_chain()
    other_chain, other_taps = duplicate((chain, taps))
    recorder, other_recorder = Recorder(), Recorder()

    def visitor(idx, tensor):
        # The copy's forward inside the original's must reach neither visitor: it is in mode off.
        recorder(idx, tensor)
        other_chain(torch.tensor([7.0]))

    taps.visit(chain, torch.tensor([1.0]), visitor)
    other_taps.visit(other_chain, torch.tensor([10.0]), other_recorder)
    assert recorder.visits == [(0, [2.0]), (1, [6.0]), (2, [6.0])]
    assert other_recorder.visits == [(0, [20.0]), (1, [60.0]), (2, [60.0])]
    assert num_hooks(other_chain) == num_hooks(chain) == 3


@pytest.mark.parametrize('duplicate', [copy.deepcopy, through_pickle], ids=['deepcopy', 'pickle'])
def test_copied_model_answers_to_itself_and_leaves_the_original_alone(make_model, duplicate):
    x = torch.randn(2, 3, 64, 64)
    model = make_model().eval()
    expected = model(x, exits=True)
    other = duplicate(model)
    assert_same_outputs(other(x, exits=True), expected)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.5)
    changed = other(x, exits=True)
    assert_same_outputs(model(x, exits=True), expected)
    for idx in range(len(model.exits) + 1):
        assert (changed.logits[idx] - expected.logits[idx]).abs().max() > 1e-2
        torch.testing.assert_close(other(x, exit_idx=idx), changed.logits[idx], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('exits', [True, False], ids=['collect', 'stop'])
def test_model_can_be_copied_after_a_forward_with_gradients(make_model, exits):
    model = make_model()
    output = model(torch.randn(2, 3, 64, 64), **({'exits': True} if exits else {'exit_idx': 1}))
    assert (output.logits[0] if exits else output).requires_grad
    assert num_hooks(copy.deepcopy(model)) == num_hooks(model) == len(model.exits) + 1


def test_model_can_be_copied_after_a_forward_that_failed(make_model):
    model = make_model()

    def fail(*args):
        raise RuntimeError('in the middle')

    handle = model.backbone.global_pool.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match='in the middle'):
        model(torch.randn(2, 3, 64, 64), exits=True)
    handle.remove()
    assert num_hooks(copy.deepcopy(model)) == len(model.exits) + 1


def test_copy_of_the_backbone_alone_drags_no_heads_along(make_model):
    model = make_model()
    memo = {}
    copy.deepcopy(model.backbone, memo)
    assert {id(param) for param in model.backbone.parameters()} <= set(memo)
    assert not {id(param) for param in model.exits.parameters()} & set(memo)


def test_pickle_of_the_backbone_alone_is_as_large_as_that_of_the_plain_model(make_backbone, make_model):
    plain, model = make_backbone(), make_model()
    heads = len(pickle.dumps(model.exits))
    extra = len(pickle.dumps(model.backbone)) - len(pickle.dumps(plain))
    assert heads > 50_000
    assert extra < 2_000


# Modules replaced after attaching


def test_taps_are_installed_again_where_a_module_was_replaced():
    chain, taps = make_chain()
    chain[1], chain[2] = Scale(7.0), Scale(11.0)
    recorder = Recorder()
    assert taps.visit(chain, torch.tensor([1.0]), recorder).tolist() == [154.0]
    assert recorder.visits == [(0, [2.0]), (1, [14.0]), (2, [14.0])]


def test_taps_are_installed_again_where_a_module_was_replaced_by_its_copy():
    # The copy brings hooks along, which answer to a copy of the taps.
    chain, taps = make_chain()
    chain[0], chain[2] = copy.deepcopy(chain[0]), copy.deepcopy(chain[2])
    recorder = Recorder()
    taps.visit(chain, torch.tensor([1.0]), recorder)
    assert recorder.visits == [(0, [2.0]), (1, [6.0]), (2, [6.0])]


def test_hooks_do_not_pile_up():
    chain, taps = make_chain()
    for _ in range(3):
        taps.install(chain)
        taps.collect(chain, torch.ones(1))
    assert num_hooks(chain) == 3


def test_taps_survive_sync_batch_norm_conversion_of_the_tapped_modules():
    x = torch.randn(2, 3, 12, 12)
    backbone, taps = Normed().eval(), Taps(('norm0', 'norm1'), ('fc',))
    taps.install(backbone)
    expected = taps.collect(backbone, x)
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    assert [type(backbone.norm0), type(backbone.norm1)] == [nn.SyncBatchNorm] * 2
    torch.testing.assert_close(taps.collect(backbone, x), expected)
    torch.testing.assert_close(taps.stop(backbone, x, 1), expected[1][1])


def convert_by_timm(backbone):
    return timm.layers.convert_sync_batchnorm(backbone)


def freeze_by_timm(backbone):
    freeze(backbone, ['features.norm0'])
    return backbone


@pytest.mark.parametrize('replace', [convert_by_timm, freeze_by_timm], ids=['sync-BN', 'freeze'])
def test_model_gives_the_same_answers_after_timm_replaced_a_tapped_norm(make_model, replace):
    x = torch.randn(2, 3, 64, 64)
    model = make_model('densenet121', ['features.norm0', 'features.denseblock2'], head='linear').eval()
    assert model.exits.specs[0].module == 'features.norm0'
    expected = model(x, exits=True)
    before = model.backbone.features.norm0
    model.backbone = replace(model.backbone)
    assert model.backbone.features.norm0 is not before
    # A frozen norm rounds differently.
    assert_same_outputs(model(x, exits=True), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(x, exit_idx=0), expected.logits[0], rtol=1e-3, atol=1e-4)


# Which module is hooked


class Called(nn.Sequential):
    """A container that timm calls as a whole."""

    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.Sequential):
    """A subclass that keeps the forward of `nn.Sequential`."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Identity())

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ('stage', 'expected'),
    [
        (nn.ReLU(), 'stage'),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), 'stage.1'),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))), 'stage.1.1.0'),
        (nn.Sequential(nn.ReLU(), Block()), 'stage.1'),
        (Called(nn.ReLU(), nn.Tanh()), 'stage'),
        (nn.Sequential(nn.ReLU(), Called(nn.ReLU(), nn.Tanh())), 'stage.1'),
        (Renamed(nn.ReLU(), nn.Tanh()), 'stage.1'),
        (nn.Sequential(), 'stage'),
    ],
    ids=['layer', 'sequential', 'nested', 'block', 'own-forward', 'own-forward-inside', 'inherited-forward', 'empty'],
)
def test_tap_descends_plain_sequentials_alone(stage, expected):
    backbone = nn.Module()
    backbone.stage = stage
    assert resolve_tap(backbone, 'stage') == expected


def test_stages_of_rdnet_which_have_a_forward_of_their_own_are_kept():
    with torch.device('meta'):
        backbone = timm.create_model('rdnet_tiny')
    stages = [resolve_tap(backbone, entry['module']) for entry in backbone.feature_info]
    assert len(stages) == 4
    for stage in map(backbone.get_submodule, stages):
        assert type(stage).__name__ == 'DenseStage'
        assert isinstance(stage, nn.Sequential)


def test_unknown_stage_is_an_attribute_error():
    with pytest.raises(AttributeError, match='stage9'):
        resolve_tap(nn.Module(), 'stage9')


# Gradient checkpointing

CHECKPOINTED = ('test_resnet', 'test_efficientnet', 'test_convnext')


def hold_norm_and_dropout(model):
    """Put layers that draw from or write to outside state in eval mode; checkpointing needs the rest in training."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout, timm.layers.DropPath)):
            module.eval()
    return model


def gradients(model, run):
    """Return the gradients by name, and how many convolutions the backward ran forward again."""
    model.zero_grad()
    logits = run(model)
    repeated = []
    convs = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    handles = [conv.register_forward_pre_hook(lambda *args: repeated.append(1)) for conv in convs]
    sum(single.square().mean() for single in logits).backward()
    for handle in handles:
        handle.remove()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}, len(repeated)


def run_all(x):
    return lambda model: model(x, exits=True).logits


def run_one(x):
    return lambda model: [model(x, exit_idx=1)]


@pytest.mark.parametrize('run', [run_all, run_one])
@pytest.mark.parametrize('name', CHECKPOINTED)
def test_taps_fire_under_gradient_checkpointing_and_gradients_are_the_same(make_model, name, run):
    x = torch.randn(2, 3, 64, 64)
    model = hold_norm_and_dropout(make_model(name))
    expected, repeated = gradients(model, run(x))
    assert repeated == 0
    if run is run_all:
        assert set(expected) == {name for name, _ in model.named_parameters()}
    model.set_grad_checkpointing()
    actual, repeated = gradients(model, run(x))
    assert repeated > 0
    torch.testing.assert_close(actual, expected)


class DropsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout2d(0.5, inplace=True)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(self.drop(self.norm(x))).mean((2, 3)))


def test_tensor_that_the_next_layer_changes_in_training_alone_is_refused_there():
    model = attach_exits(DropsInPlace(), ['norm'], head='linear', input_size=(3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    model.eval()(images, exits=True)
    with pytest.raises(StateError, match=r"^The layer after the tap 'norm' changes its output in place, tap that one"):
        model.train()(images, exits=True)


def test_layer_that_is_gone_is_named(make_model):
    model = make_model().eval()
    images = torch.randn(2, 3, 64, 64)
    name = model.exits.specs[0].module
    parent, _, child = name.rpartition('.')
    setattr(model.backbone.get_submodule(parent), child, None)
    with pytest.raises(StateError, match=r'^ResNet has changed since its exits were attached: .* Attach them anew\.$'):
        model(images, exits=True)
