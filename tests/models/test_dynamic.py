"""The model's ways to answer early: `infer`, `anytime`, `predict`, and what they leave behind."""

import copy
import dataclasses
import gc
import pickle
import random
import sys
import threading
import time

import numpy as np
import pytest
import torch
from greenlet import greenlet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError, StateError

SIZE = (3, 32, 32)


@pytest.fixture
def model(make_model):
    return make_model(head='linear', input_size=SIZE).eval()


@pytest.fixture
def x():
    return torch.randn(12, *SIZE) * torch.linspace(0.2, 3, 12)[:, None, None, None]


@pytest.fixture
def policy(model, x):
    """A policy by which some of the images leave at each exit."""
    with torch.no_grad():
        logits = model(x, exits=True).logits
    quantiles = (0.7, 0.6, 0.5)
    policy = ExitPolicy(
        'confidence', tuple(float(single.softmax(-1).amax(-1).quantile(q)) for single, q in zip(logits, quantiles))
    )
    assert len(apply_policy(policy, logits).exit_idx.unique()) == 4
    return policy


def is_clean(model):
    """Whether nothing of a call is left: the taps are silent, and the model copies and pickles."""
    copy.deepcopy(model)
    pickle.dumps(model)
    return model._taps._state.visitor is None


# Infer


def test_infer_equals_the_simulation_in_input_order(model, x, policy):
    outputs = model(x, exits=True)
    expected = apply_policy(policy, [logits.detach() for logits in outputs.logits])
    prediction = model.infer(x, policy)
    assert torch.equal(prediction.exit_idx, expected.exit_idx)
    torch.testing.assert_close(prediction.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert not prediction.logits.requires_grad
    assert is_clean(model)


def test_infer_takes_policy_threshold_budget_or_its_own_policy(model, x, policy):
    expected = model.infer(x, policy)
    model.policy = policy
    for prediction in (model.infer(x), model.infer(x, threshold=policy.thresholds)):
        assert torch.equal(prediction.exit_idx, expected.exit_idx)
    first = model.infer(x, threshold=0.0)
    assert set(first.exit_idx.tolist()) == {0}
    torch.testing.assert_close(first.logits, model(x, exit_idx=0))
    assert set(model.infer(x, threshold=(None, None, 0.0)).exit_idx.tolist()) == {2}
    assert set(model.infer(x, threshold=1).exit_idx.tolist()) == {3}
    for zero in (np.float32(0), torch.tensor(0.0), torch.zeros(3), np.zeros(3)):
        assert set(model.infer(x, threshold=zero, bucket_sizes=4).exit_idx.tolist()) == {0}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, r'The model has no policy: pass an ExitPolicy, threshold=0.9, or budget="60%" after'),
        ({'policy': 'confidence'}, "policy must be an ExitPolicy, got 'confidence': pass an ExitPolicy"),
        ({'threshold': 0.5, 'budget': '60%'}, 'policy, threshold and budget are mutually exclusive'),
        ({'threshold': (0.5, 0.5)}, 'each of the 3 exits of the model, got 2'),
        ({'threshold': 1.5}, r"A threshold of 'confidence' must be in \[0, 1\], .* got 1.5"),
        ({'threshold': -0.1}, 'got -0.1'),
        ({'threshold': float('nan')}, 'got nan'),
        ({'threshold': 'high'}, "got 'high'"),
        ({'threshold': 0.5, 'bucket_sizes': 0}, r'bucket_sizes must be a list of integers >= 1, got \[0\]'),
        ({'budget': '60%'}, r"no table of budgets to look up '60%' in: call model.calibrate\(loader, budget="),
        ({'threshold': 0.5, 'bucket_sizes': (0, 8)}, r'bucket_sizes must be a list of integers >= 1, got \[0, 8\]'),
    ],
)
def test_what_infer_cannot_do_is_an_error_of_one_line(model, x, arguments, message):
    with pytest.raises(MultiExitError, match=message) as error:
        model.infer(x, **arguments)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (torch.zeros(0, *SIZE), r'Images must be a non-empty tensor \[B, 3, H, W\], got \[0, 3, 32, 32\]'),
        (torch.zeros(SIZE), r'H, W\], got \[3, 32, 32\]'),
        ([1, 2], r'H, W\], got list'),
    ],
)
@pytest.mark.parametrize(
    'call',
    [
        lambda model, x: model.infer(x, threshold=0.5),
        lambda model, x: model.anytime(x),
        lambda model, x: model.predict(x, deadline_ms=10),
        lambda model, x: model.measure_times(x),
    ],
    ids=['infer', 'anytime', 'predict', 'measure_times'],
)
def test_empty_or_misshaped_batches_are_an_error_before_any_work(model, images, message, call):
    with pytest.raises(MultiExitError, match=message):
        call(model, images)
    model.train()
    with pytest.raises(MultiExitError, match=r'The model is in training mode.*model.eval\(\)'):
        call(model, torch.zeros(2, *SIZE))


def test_nan_images_are_an_error_and_leave_the_model_clean(model, x, policy):
    x[3] = float('nan')
    with pytest.raises(MultiExitError, match='Exit 0 gives NaN or infinite logits for 1 of 12 images'):
        model.infer(x, policy)
    assert is_clean(model)


def test_policy_is_forgotten_with_the_classifiers(model, x, policy):
    model.policy = policy
    model.reset_classifier(7)
    with pytest.raises(MultiExitError, match='The model has no policy: pass an ExitPolicy'):
        model.infer(x)


def test_one_class_is_an_error(make_model, x):
    with pytest.raises(MultiExitError, match='The model must have 2 or more classes, got 1'):
        make_model(num_classes=1, head='linear', input_size=SIZE).eval().infer(x, threshold=0.5)


def test_where_images_leave_is_found_in_eval_mode_and_with_finite_weights_alone(model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MultiExitError, match='The model is in training mode'):
        _ = model.train().can_leave
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    weight = model.backbone.get_classifier().weight
    kept = weight.detach().clone()
    weight.data[0, 0] = float('nan')
    with pytest.raises(MultiExitError, match='gives NaN or infinite logits for random images: check its weights'):
        _ = model.eval().can_leave
    weight.data.copy_(kept)
    assert model.can_leave == (True, True, True)


def test_policy_and_what_was_learnt_are_forgotten_with_the_exits(model, x, policy):
    model.policy = policy
    model.infer(x)
    model.predict(x, deadline_ms=1000)
    model.drop_exits([1])
    assert (model.policy, model.budgets) == (None, None)
    assert model.can_leave == (True, True)
    assert model.predict(x, deadline_ms=10_000).exit_idx[0] == 2


@pytest.mark.parametrize(
    ('old', 'new', 'ask'),
    [
        ('routing', 'can_leave', lambda model, x: model.routing == model.can_leave),
        ('measure_costs', 'measure_times', lambda model, x: model.measure_costs(x, rounds=1).unit == 'ms'),
    ],
    ids=['routing', 'measure_costs'],
)
def test_old_names_still_work_and_say_the_new_ones(model, x, old, new, ask):
    with pytest.warns(DeprecationWarning, match=f'model.{old} is deprecated, use model.{new}') as caught:
        assert ask(model, x)
    assert caught[0].filename == __file__


# Anytime


def test_anytime_gives_every_exit_as_exits_true_does(model, x):
    outputs = model(x, exits=True)
    steps = list(model.anytime(x))
    assert [idx for idx, _ in steps] == [0, 1, 2, 3]
    for idx, logits in steps:
        assert torch.equal(logits, outputs.logits[idx])
    assert is_clean(model)


@pytest.mark.parametrize('last', range(4))
def test_leaving_the_loop_stops_the_work(model, x, last):
    calls = []
    for idx, spec in enumerate(model.exits.specs):
        model.backbone.get_submodule(spec.module).register_forward_pre_hook(lambda *args, idx=idx: calls.append(idx))
    model.backbone.get_classifier().register_forward_pre_hook(lambda *args: calls.append(3))
    for idx, _ in model.anytime(x):
        assert calls == list(range(idx + 1))
        if idx == last:
            break
    gc.collect()
    assert calls == list(range(last + 1))
    assert model._taps._state.visitor is None


def test_error_in_the_loop_leaves_the_model_clean(model, x):
    plain = model(x)

    def loop():
        for idx, _ in model.anytime(x):
            if idx == 1:
                raise KeyError('from the loop')

    with pytest.raises(KeyError, match='from the loop'):
        loop()
    assert torch.equal(model(x), plain)
    assert is_clean(model)


def test_other_calls_may_come_between_two_steps(model, x, policy):
    outputs, prediction = model(x, exits=True), model.infer(x, policy)
    for idx, logits in model.anytime(x):
        assert torch.equal(model(x), outputs.logits[-1])
        assert torch.equal(model.infer(x, policy).exit_idx, prediction.exit_idx)
        inner = [(inner_idx, inner_logits) for inner_idx, inner_logits in model.anytime(x[:3])]
        assert [inner_idx for inner_idx, _ in inner] == [0, 1, 2, 3]
        assert torch.equal(logits, outputs.logits[idx])
    assert is_clean(model)


def test_loops_may_take_turns(model, x):
    outputs = model(x, exits=True)
    for first, second in zip(model.anytime(x), model.anytime(x.flip(0))):
        assert torch.equal(first[1], outputs.logits[first[0]])
        torch.testing.assert_close(second[1].flip(0), outputs.logits[second[0]])


@pytest.mark.parametrize('checkpointing', [False, True])
def test_steps_have_no_gradients_and_the_callers_mode_stays(model, x, checkpointing):
    model.set_grad_checkpointing(checkpointing)
    other = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    for _, logits in model.anytime(x):
        assert torch.is_grad_enabled()
        assert not logits.requires_grad
        other(torch.randn(3, 5)).square().sum().backward()  # somebody else's, between two steps


def test_loop_continued_in_another_thread_is_an_error(model, x):
    steps = model.anytime(x)
    next(steps)
    errors = []

    def go_on():
        try:
            next(steps)
        except MultiExitError as error:
            errors.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    assert 'begun in another thread' in str(errors[0])
    assert [idx for idx, _ in steps] == [1, 2, 3]
    assert is_clean(model)


# Deadlines


def test_prediction_is_that_of_one_exit_and_time_decides_which(model, x):
    outputs = model(x, exits=True)
    whole = model.predict(x, deadline_ms=60_000)
    assert set(whole.exit_idx.tolist()) == {3}
    torch.testing.assert_close(whole.logits, outputs.logits[-1])
    first = model.predict(x, deadline_ms=1e-3)
    assert set(first.exit_idx.tolist()) == {0}
    torch.testing.assert_close(first.logits, outputs.logits[0])
    assert is_clean(model)


def test_first_call_of_a_shape_learns_before_its_time_begins(model, x):
    slow = model.backbone.get_submodule(model.exits.specs[0].module)
    calls = []
    slow.register_forward_pre_hook(lambda *args: calls.append(time.sleep(0.02)))
    assert set(model.predict(x, deadline_ms=10_000).exit_idx.tolist()) == {3}
    assert len(calls) > 1
    calls.clear()
    model.predict(x, deadline_ms=10_000)
    assert len(calls) == 1


@pytest.mark.parametrize('deadline', [0, -5, float('nan'), float('inf'), 10**400, None, '5ms', True])
def test_deadlines_that_are_none_are_an_error(model, x, deadline):
    with pytest.raises(MultiExitError, match=r'deadline_ms must be > 0 and <= 1e\+09, got '):
        model.predict(x, deadline_ms=deadline)


# Costs


def test_measured_costs_rise_with_depth(model, x):
    costs = model.measure_times(x, rounds=3)
    assert isinstance(costs, StageCosts)
    assert costs.unit == 'ms'
    assert (len(costs.paths), len(costs.heads)) == (4, 3)
    assert list(costs.paths) == sorted(costs.paths)
    assert min(*costs.paths, *costs.heads) > 0


# Calibration


@pytest.fixture
def loader(model):
    """Held-out batches of 64, 64 and 22 images; half of the targets are what an exit or main says."""
    torch.manual_seed(1)
    images = torch.randn(150, *SIZE) * torch.linspace(0.2, 3, 150)[torch.randperm(150)][:, None, None, None]
    with torch.no_grad():
        said = torch.stack([logits.argmax(-1) for logits in model(images, exits=True).logits])
    target = said[torch.randint(len(said), (150,)), torch.arange(150)]
    return DataLoader(TensorDataset(images, target), batch_size=64)


def test_calibration_keeps_a_policy_within_the_budget_and_those_of_all_budgets(model, loader):
    policy = model.calibrate(loader, budget='90%')
    assert model.policy is policy
    assert len(policy.temperatures) in (0, 4)
    images = torch.cat([images for images, _ in loader])
    costs = StageCosts.from_exit_costs(model.cost(SIZE))
    for budget, share in (('90%', 0.9), ('78%', 0.78)):
        prediction = model.infer(images, budget=budget)
        chosen = model.budgets.select(budget)
        assert costs.mean(chosen.policy, prediction.exit_idx) <= share * costs.total * (1 + 1e-9)
        target = torch.cat([target for _, target in loader])
        assert chosen.accuracy == pytest.approx(100 * (prediction.logits.argmax(-1) == target).float().mean().item())
    assert torch.equal(model.infer(images).exit_idx, model.infer(images, policy).exit_idx)
    assert model.budgets.total_ms is None
    with pytest.raises(MultiExitError, match="The table has no costs in ms for the budget '5ms'"):
        model.infer(images, budget='5ms')
    with pytest.raises(MultiExitError, match='got 1%, which is below the cheapest policy'):
        model.infer(images, budget='1%')


def test_calibration_in_milliseconds_measures_this_machine_at_the_loaders_batch_size(model, loader):
    model.calibrate(loader, budget='80%', measures_time=True)
    table = model.budgets
    assert table.measured_on.endswith('batch of 64')
    assert 0 < table.points[0].ms < table.total_ms
    images, _ = next(iter(loader))
    assert model.infer(images, budget=f'{table.max_ms}ms').logits.shape == (64, 10)
    with pytest.raises(MultiExitError, match='got 0.000001ms, which is below the cheapest policy'):
        model.calibrate(loader, budget='0.000001ms')
    assert model.budgets is table  # what was there is not lost


def test_calibration_with_a_bounded_drop_uses_cheap_exits_only_as_far_as_is_safe(model, loader):
    with pytest.warns(UserWarning, match='No policy that uses an exit is safe'):
        careful = model.calibrate(loader, max_drop=1e-4)
    assert careful.used == ()
    assert model.calibrate(loader, max_drop=0.9, delta=0.5).used != ()


@pytest.mark.parametrize('arguments', [{}, {'budget': '60%', 'max_drop': 0.01}])
def test_calibration_needs_one_of_budget_and_drop(model, loader, arguments):
    with pytest.raises(MultiExitError, match='Pass either budget, as budget="60%", or max_drop, as max_drop=0.01'):
        model.calibrate(loader, **arguments)


# Compiled blocks


SEQUENCES = [
    pytest.param('blocks', 'infer plain step plain', marks=pytest.mark.slow),
    pytest.param('blocks', 'plain infer exits stop', marks=pytest.mark.slow),
    pytest.param('backbone', 'step plain predict infer', marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('what', 'sequence'), SEQUENCES)
def test_every_call_is_right_with_a_compiled_backbone(model, x, policy, what, sequence):
    """What was compiled in one form of call must not answer for another."""
    torch._dynamo.reset()
    outputs, prediction = model(x, exits=True), model.infer(x, policy)
    for module in [model.backbone] if what == 'backbone' else model.backbone.children():
        module.compile(backend='eager')
    for call in sequence.split():
        if call == 'infer':
            found = model.infer(x, policy, bucket_sizes=(2, 4, 8))
            assert torch.equal(found.exit_idx, prediction.exit_idx)
            torch.testing.assert_close(found.logits, prediction.logits, rtol=1e-5, atol=1e-5)
        elif call == 'plain':
            torch.testing.assert_close(model(x), outputs.logits[-1], rtol=1e-5, atol=1e-5)
        elif call == 'stop':
            torch.testing.assert_close(model(x, exit_idx=1), outputs.logits[1], rtol=1e-5, atol=1e-5)
        elif call == 'predict':
            assert model.predict(x, deadline_ms=60_000).exit_idx.tolist() == [3] * 12
        else:
            steps = [logits for _, logits in model.anytime(x)] if call == 'step' else model(x, exits=True).logits
            torch.testing.assert_close(tuple(steps), outputs.logits, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


# Threads


def ask(model, x, policy, draw):
    """Make one call of a random form and return its (what was asked, answer) pairs."""
    form = draw.choice(['infer', 'calibrated', 'anytime', 'predict', 'exit_idx', 'plain', 'exits'])
    if form in ('infer', 'calibrated'):
        found = model.infer(x, policy) if form == 'infer' else model.infer(x)  # by the model's own policy
        return [(form, found.logits), (f'{form}, left at', found.exit_idx)]
    if form == 'predict':
        found = model.predict(x, deadline_ms=draw.choice([1e-3, 1.0, 60_000]))
        return [(int(found.exit_idx[0]), found.logits)]
    if form == 'anytime':
        last, pairs = draw.randrange(4), []
        for idx, logits in model.anytime(x):
            pairs.append((idx, logits))
            if idx == last:
                break
        assert [idx for idx, _ in pairs] == list(range(last + 1))
        return pairs
    if form == 'exit_idx':
        idx = draw.randrange(4)
        return [(idx, model(x, exit_idx=idx))]
    return list(enumerate(model(x, exits=True).logits)) if form == 'exits' else [(3, model(x))]


@pytest.mark.parametrize('seconds', [2, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_threads_mix_all_calls_on_one_model(model, policy, seconds):
    num_threads, tolerance = 8, 1e-4
    scales = torch.linspace(0.3, 3, 2 * num_threads).view(num_threads, 2, 1, 1, 1)
    inputs = torch.randn(num_threads, 2, *SIZE) * scales
    with torch.no_grad():
        # What main answers is right here, so that it pays to leave where an exit says the same.
        found = model.calibrate([(x, model(x).argmax(1)) for x in inputs], budget='90%')
    # Thresholds are scores of some images, which rounding takes across them where batches are of other sizes.
    model.policy = dataclasses.replace(found, thresholds=tuple(each and each * 0.999 for each in found.thresholds))
    assert model.policy.used
    expected = []
    with torch.no_grad():
        for x in inputs:
            logits = model(x, exits=True).logits
            expected.append(dict(enumerate(logits)))
            for form, used in (('infer', policy), ('calibrated', model.policy)):
                prediction = apply_policy(used, logits)
                expected[-1] |= {form: prediction.logits, f'{form}, left at': prediction.exit_idx}
    assert len(torch.cat([answers['infer, left at'] for answers in expected]).unique()) >= 3
    for idx in range(4):
        answers = torch.stack([answers[idx] for answers in expected])
        gaps = (answers[:, None] - answers[None]).abs().amax((2, 3)) + torch.eye(num_threads)
        assert gaps.min() > 10 * tolerance
    checked, wrong, failures = [0] * num_threads, [0] * num_threads, []
    barrier = threading.Barrier(num_threads)
    end = time.perf_counter() + seconds

    def work(thread):
        draw = random.Random(thread)
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                barrier.wait()
                while time.perf_counter() < end or checked[thread] < 10:
                    pairs = ask(model, inputs[thread], policy, draw)
                    gaps = [(answer - expected[thread][asked]).abs().max() for asked, answer in pairs]
                    wrong[thread] += float(max(gaps)) > tolerance
                    checked[thread] += 1
        except Exception as error:  # a thread's own would be lost
            failures.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(num_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-3)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert min(checked) >= 10
    assert wrong == [0] * num_threads, f'of {checked}'
    print(f'{sum(checked)} calls of {num_threads} threads')
    assert is_clean(model)


@pytest.mark.parametrize(
    'change',
    [
        pytest.param(lambda model: model.drop_exits([1]), id='exits'),
        pytest.param(lambda model: model.reset_classifier(3), id='classes'),
        pytest.param(lambda model: model.train(), id='mode'),
    ],
)
def test_model_that_changes_under_a_loop_ends_it_with_an_error(model, x, change):
    steps = model.anytime(x)
    next(steps)
    change(model)
    with pytest.raises(StateError, match='begin a new one'):
        next(steps)


def test_loops_left_waiting_end_with_their_threads(model, x):
    """Kept beyond the thread, a forward that waits would never be freed: its greenlet ends in its own thread alone."""
    loops, expected = [], model(x, exit_idx=0)

    def begin():
        steps = model.anytime(x)
        loops.append((steps, next(steps)[1]))

    def count():
        gc.collect()
        return sum(type(item) is greenlet for item in gc.get_objects())

    before = count()
    for _ in range(20):
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
    while loops:
        steps, logits = loops.pop()
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
        with pytest.raises(StateError, match='another thread'):
            next(steps)
        steps.close()
    del steps
    assert count() == before
    assert [idx for idx, _ in model.anytime(x)] == list(range(len(model.exits) + 1))


@pytest.mark.parametrize('by_timm', [True, False])
def test_main_of_other_classes_than_the_exits_is_refused(make_model, tmp_path, by_timm):
    model, images = make_model().eval(), torch.randn(2, 3, 64, 64)
    if by_timm:
        model.backbone.reset_classifier(5)
    else:
        model.backbone.fc = nn.Linear(model.backbone.fc.in_features, 5)
    calls = {
        'infer': lambda: model.infer(images, threshold=0.5),
        'anytime': lambda: next(iter(model.anytime(images))),
        'predict': lambda: model.predict(images, deadline_ms=1000),
        'evaluate': lambda: tme.evaluate(model, [(images, torch.tensor([0, 1]))]),
        'export': lambda: tme.export(model, tmp_path / 'net'),
    }
    message = r'^Exits and main must have the same classes, got \[10, 10, 10, 5\], main last\. Call model\.reset_class'
    for call in calls.values():
        with pytest.raises(StateError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    model.reset_classifier(5)
    assert model.infer(images, threshold=0.5).logits.shape == (2, 5)
