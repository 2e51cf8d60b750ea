"""The runner answers as the model does, and says in one line what is wrong with a folder, a picture or an argument."""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exported import CLASSES, SIZE, make_exported, write_manifest

import timm_multiexit as tme
from timm_multiexit.deploy import runner as module
from timm_multiexit.deploy.runner import Runner, RunnerError
from timm_multiexit.policies.budgets import BudgetTable, PolicyResult

NUM_EXITS = 3


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder that nobody changes."""
    return make_exported(tmp_path_factory.mktemp('exported'))


@pytest.fixture
def folder(tmp_path):
    """A folder to change."""
    return make_exported(tmp_path / 'exported')


@pytest.fixture
def runner(exported):
    return Runner(exported, threads=1)


def draw_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, *SIZE)) + 0.5 * rng.normal(size=(count, SIZE[0], 1, 1))).astype(np.float32)


def draw_policy(rng, num_exits=NUM_EXITS):
    """A policy of any kind, its thresholds where scores are."""
    criterion = str(rng.choice(list(tme.policies.CRITERIA)))
    if criterion == 'patience':
        thresholds = [int(value) for value in rng.integers(1, 3, num_exits)]
    else:
        low, high = {'confidence': (0.3, 1), 'entropy': (0, 0.9), 'margin': (0, 0.9)}[criterion]
        thresholds = [float(value) for value in rng.uniform(low, high, num_exits)]
    thresholds = [None if rng.random() < 0.25 else value for value in thresholds]
    temperatures = [float(value) for value in rng.uniform(0.5, 3, num_exits + 1)] if rng.random() < 0.5 else []
    combine = [None, 'mean', 'geometric'][rng.integers(3)]
    return tme.ExitPolicy(criterion, tuple(thresholds), tuple(temperatures), combine)


def test_answers_are_those_of_the_policy_on_all_logits(runner):
    rng = np.random.default_rng(0)
    images = draw_images(23)
    logits = [torch.from_numpy(single) for _, single in runner.anytime(images)]
    seen = {}
    for _ in range(500):
        policy = draw_policy(rng)
        size = int(rng.choice([1, 2, 7, 23]))
        expected = tme.apply_policy(policy, [single[:size] for single in logits])
        answer = runner.infer(images[:size], policy.to_dict())
        np.testing.assert_array_equal(answer.exit_idx, expected.exit_idx)
        np.testing.assert_allclose(answer.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert (answer.logits.dtype, answer.exit_idx.dtype) == (np.float32, np.int64)
        seen.setdefault((policy.criterion, policy.combine), set()).update(answer.exit_idx.tolist())
    assert len(seen) == 4 * 3
    assert all(len(exits) >= NUM_EXITS for exits in seen.values())


@pytest.mark.parametrize('criterion', ['confidence', 'margin', 'entropy'])
def test_thresholds_at_the_ends_let_all_or_nearly_none_leave(criterion, runner):
    images = draw_images(9)
    all_leave, hard = (1.0, 0.0) if criterion == 'entropy' else (0.0, 1.0)
    for threshold in (all_leave, hard):
        policy = tme.ExitPolicy(criterion, (threshold,) * NUM_EXITS)
        logits = [torch.from_numpy(single) for _, single in runner.anytime(images)]
        expected = tme.apply_policy(policy, logits).exit_idx
        np.testing.assert_array_equal(runner.infer(images, policy.to_dict()).exit_idx, expected)
        assert (expected == 0).all() == (threshold == all_leave)


def test_criteria_are_those_of_the_package():
    assert {name: row.leaves_at_least for name, row in tme.policies.CRITERIA.items()} == module._AT_LEAST
    assert module._COMBINATIONS == (None, 'mean', 'geometric')


def test_images_that_have_left_are_not_computed_further(runner, monkeypatch):
    images = draw_images(40)
    policy = {'criterion': 'confidence', 'thresholds': [0.4, None, 0.6]}
    sizes = []
    run_stage = runner._run_stage

    def spy(idx, state):
        sizes.append({len(tensor) for tensor in state})
        return run_stage(idx, state)

    monkeypatch.setattr(runner, '_run_stage', spy)
    exit_idx = runner.infer(images, policy).exit_idx
    at = [int((exit_idx >= idx).sum()) for idx in range(NUM_EXITS + 1)]
    assert sizes == [{at[0]}, {at[1]}, {at[1]}, {at[3]}]
    assert at[0] > at[1] > at[3] > 0
    sizes.clear()
    runner.infer(images, threshold=0.0)
    assert sizes == [{40}]


def test_threshold_of_all_exits_or_of_each(runner):
    images = draw_images(20)
    one = runner.infer(images, threshold=0.8)
    for same in ([0.8] * 3, (0.8, 0.8, 0.8), np.full(3, 0.8)):
        np.testing.assert_array_equal(runner.infer(images, threshold=same).exit_idx, one.exit_idx)
    alone = runner.infer(images, threshold=[None, 0.8, None])
    assert set(alone.exit_idx.tolist()) <= {1, 3}


def test_own_policy_and_budgets_are_those_of_the_table(tmp_path):
    shares = [(1.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5), (0.1, 0.2, 0.3, 0.4)]
    policies = [tme.ExitPolicy('confidence', (0.1 * (idx + 1),) * 3) for idx in range(4)]
    # With times too, accuracy need not rise with MACs: the second point is better than the third.
    # The last two are equally accurate.
    costs, accuracies, ms = (250, 400, 700, 900), (70.0, 90.0, 85.0, 90.0), (1.0, 4.0, 2.0, 5.0)
    points = [PolicyResult(*row) for row in zip(policies, accuracies, shares, costs, ms)]
    table = BudgetTable(tuple(points), 1000, 1030, 6.0, 7.0)
    budgets = [
        {'macs': point.macs, 'accuracy': point.accuracy, 'policy': point.policy.to_dict()} for point in table.points
    ]
    runner = Runner(make_exported(tmp_path, policy=policies[2].to_dict(), budgets=budgets))
    images, cases = (
        draw_images(30),
        ['25%', '39.9%', '40%', '70%', '89%', '90%', '103%', '0.5kMACs', '1000MACs', '100 %'],
    )
    for budget in cases:
        expected = runner.infer(images, table.select(budget).policy.to_dict())
        answer = runner.infer(images, budget=budget)
        np.testing.assert_array_equal(answer.exit_idx, expected.exit_idx)
        assert runner._select(budget) == table.select(budget).policy.to_dict()
    np.testing.assert_array_equal(runner.infer(images).exit_idx, runner.infer(images, threshold=0.3).exit_idx)
    assert runner._select('100%') == policies[3].to_dict()
    for budget in ('24%', '104%', '1MACs', '9GMACs'):  # both say the same range
        with pytest.raises(tme.MultiExitError) as theirs:
            table.select(budget)
        with pytest.raises(RunnerError) as ours:
            runner.infer(images, budget=budget)
        low, high = re.findall(r'[0-9.]+(?:%|k?MACs)', str(ours.value))[:2]
        assert f'must be {low} to {high}, got {budget}' in str(theirs.value)
        for bound in (low, high):
            assert runner._select(bound) == table.select(bound).policy.to_dict()
    for budget in ('24%', '104%', '2kMACs', '0%', '60', '5ms', 60, 'all', '-5%', '1e3%'):
        with pytest.raises(RunnerError, match='^budget must be'):
            runner.infer(images, budget=budget)
        with pytest.raises(tme.MultiExitError):
            table.select(budget if budget != '5ms' else '0.5ms')


def test_anytime_gives_every_exit_and_stops_with_the_loop(exported):
    runner = Runner(exported)
    images = draw_images(2)
    steps = runner.anytime(images)
    idx, logits = next(steps)
    assert (idx, logits.shape, logits.dtype) == (0, (2, len(CLASSES)), np.float32)
    assert list(runner._sessions) == ['stages/exit_0.onnx']  # nothing after it has even been opened
    steps.close()
    assert [idx for idx, _ in runner.anytime(images)] == [0, 1, 2, 3]
    for idx, logits in runner.anytime(images):
        np.testing.assert_array_equal(runner(images, exit_idx=idx), logits)
    np.testing.assert_array_equal(runner(images), logits)
    np.testing.assert_array_equal(runner(images, exit_idx=-2), runner(images, exit_idx=2))


@pytest.fixture
def slow(runner, monkeypatch):
    """A function that says how many seconds each stage takes, on a clock that nothing else moves."""
    now, seconds = [0.0], [0.0] * (NUM_EXITS + 1)
    run_stage = runner._run_stage

    def run(idx, state):
        now[0] += seconds[idx]
        return run_stage(idx, state)

    monkeypatch.setattr(runner, '_run_stage', run)
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now[0])

    def set_seconds(*values):
        seconds[:] = values

    set_seconds.now = now
    return set_seconds


def test_deadline_is_met_by_the_deepest_answer_in_time(runner, slow):
    images = draw_images(3)
    logits = [single for _, single in runner.anytime(images)]
    slow(0.010, 0.010, 0.020, 0.040)
    for deadline, expected in ((1, 0), (15, 0), (21, 1), (39, 1), (41, 2), (79, 2), (81, 3), (1e9, 3)):
        before = slow.now[0]
        answer = runner.predict(images, deadline)
        assert answer.exit_idx.tolist() == [expected] * 3
        np.testing.assert_array_equal(answer.logits, logits[expected])
        if deadline > 1:  # the first call measures first
            assert slow.now[0] - before <= deadline / 1e3 + 1e-9


def test_late_answer_is_not_given_and_the_stage_is_tried_again_later(runner, slow):
    images = draw_images(1)
    slow(0.010, 0.010, 0.010, 0.010)
    assert runner.predict(images, 45).exit_idx.tolist() == [3]
    slow(0.010, 0.010, 0.100, 0.010)  # of which nobody could know
    assert runner.predict(images, 45).exit_idx.tolist() == [1]
    for _ in range(10):  # until it is known
        runner.predict(images, 45)
    before = slow.now[0]
    assert runner.predict(images, 45).exit_idx.tolist() == [1]
    assert slow.now[0] - before == pytest.approx(0.020)
    slow(0.010, 0.010, 0.010, 0.010)
    calls = next(idx for idx in range(20_000) if runner.predict(images, 45).exit_idx[0] == 3)
    assert calls > 50


def test_slow_machine_answers_earlier_at_once(runner, slow):
    images = draw_images(1)
    slow(0.010, 0.010, 0.010, 0.010)
    assert runner.predict(images, 45).exit_idx.tolist() == [3]
    slow(0.020, 0.020, 0.020, 0.020)
    for _ in range(2):  # the median of three
        runner.predict(images, 45)
    before = slow.now[0]
    assert runner.predict(images, 45).exit_idx.tolist() == [1]
    assert slow.now[0] - before == pytest.approx(0.040)


def test_real_clock(runner):
    images = draw_images(4)
    runner.predict(images, 1e6)
    assert runner.predict(images, 1e6).exit_idx.tolist() == [3] * 4
    assert runner.predict(images, 1e-6).exit_idx.tolist() == [0] * 4


def test_shapes_that_are_asked_with_stay_known(runner, monkeypatch):
    monkeypatch.setattr(module, '_NUM_FORMS', 3)
    learnt = []
    learn = runner._learn
    monkeypatch.setattr(runner, '_learn', lambda images: learnt.append(len(images)) or learn(images))
    for size in (1, 2, 3, 1, 4, 1, 5, 1, 4, 2):
        runner.predict(draw_images(size), 1000)
    assert learnt == [1, 2, 3, 4, 5, 2]
    assert [shape[0] for shape in runner._times] == [1, 4, 2]


def test_threads_that_learn_times_do_not_disturb_each_other():
    times, interval = module._Times(2), sys.getswitchinterval()
    for idx in (0, 1):
        times.add(idx, 1e-3)

    def work():
        for _ in range(3000):
            times.add(0, 1e-3)
            times.add(0, 1e-3)
            assert times.expect(1) > 0
            times.add(1, 1e-3 if times.expect(1) > 1e-5 else 1e-4)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)


def test_nan_of_a_classifier_is_an_error_that_names_it(folder):
    images = draw_images(3)
    images[1] = np.nan
    runner = Runner(folder)
    with pytest.raises(RunnerError, match='^exit 0 gives NaN or infinite logits for 1 of 3 images'):
        runner.infer(images, threshold=0.9)
    with pytest.raises(RunnerError, match='^main gives NaN'):
        runner.infer(images, threshold=[None, None, None])
    with pytest.raises(RunnerError, match='^exit 0 gives NaN'):
        next(runner.anytime(images))


POLICY = {'criterion': 'confidence', 'thresholds': [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ('kwargs', 'line'),
    [
        ({}, 'The network has no policy of its own: give policy, threshold or budget.'),
        ({'threshold': 1.5}, 'A threshold of confidence must be in [0, 1], or None'),
        ({'threshold': float('nan')}, 'A threshold of confidence must be in [0, 1], or None'),
        ({'threshold': [0.5, 0.5]}, 'The policy must have one threshold for each of the 3 exits, got 2.'),
        ({'threshold': 0.5, 'budget': '60%'}, 'policy, threshold and budget are mutually exclusive'),
        ({'budget': '60%'}, "The network has no table of budgets to look '60%' up in"),
        ({'policy': POLICY | {'criterion': 'luck'}}, 'criterion must be one of confidence, margin, patience, entropy'),
        ({'policy': POLICY | {'combine': 'max'}}, 'combine must be None, mean or geometric'),
        ({'policy': POLICY | {'temperatures': np.ones(4)}}, 'thresholds and temperatures of a policy must be lists'),
        ({'policy': POLICY | {'combine': np.ones(2)}}, 'combine must be None, mean or geometric, got array'),
        ({'policy': POLICY | {'temperatures': [1.0, 1.0]}}, 'temperatures must be empty or have 4 values'),
        ({'policy': POLICY | {'temperatures': [1.0, 1.0, 0.0, 1.0]}}, 'A temperature must be in [0.01, 100]'),
        ({'policy': POLICY | {'threshold': 1}}, 'policy must be a dict of criterion, thresholds'),
        ({'policy': 'confidence'}, 'policy must be a dict of criterion, thresholds'),
        ({'policy': {'criterion': 'patience', 'thresholds': [1, 0.5, 2]}}, 'must be an integer in [1, 1000]'),
        ({'policy': {'criterion': 'confidence', 'thresholds': 0.5}}, 'thresholds and temperatures of a policy must be'),
    ],
)
def test_wrong_policy_is_one_line(kwargs, line, runner):
    with pytest.raises(RunnerError) as caught:
        runner.infer(draw_images(1), **kwargs)
    assert line in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('images', 'line'),
    [
        ([[1.0]], 'got list'),
        (torch.zeros(1, *SIZE), 'got Tensor'),
        (np.zeros((1, *SIZE)), 'got float64: normalize them'),
        (np.zeros((1, *SIZE), np.uint8), 'got uint8'),
        (np.zeros(SIZE, np.float32), 'Add the dimension of the batch'),
        (np.zeros((0, *SIZE), np.float32), 'got [0, 3, 8, 10]'),
        (np.zeros((1, 3, 10, 8), np.float32), 'got [1, 3, 10, 8]'),
    ],
)
def test_wrong_images_are_one_line(images, line, runner):
    for ask in (
        lambda: runner.infer(images, threshold=0.5),
        lambda: runner.anytime(images),  # at the call, not at the first step
        lambda: runner.predict(images, 5),
        lambda: runner(images),
    ):
        with pytest.raises(RunnerError, match=r'^images must be a non-empty float32 array \[B, 3, 8, 10\]') as caught:
            ask()
        assert line in str(caught.value)


def test_other_wrong_arguments_are_one_line(exported, runner):
    images = draw_images(1)
    for deadline in (0, -1, float('nan'), '5', None, True, 1e10):
        with pytest.raises(RunnerError, match='^deadline_ms must be > 0'):
            runner.predict(images, deadline)
    for idx in (4, -5):
        with pytest.raises(RunnerError, match=r'^exit_idx must be in \[-4, 3\]'):
            runner(images, exit_idx=idx)
    for idx in (1.0, None, True):
        with pytest.raises(RunnerError, match='^exit_idx must be an integer'):
            runner(images, exit_idx=idx)
    with pytest.raises(RunnerError, match="^precision must be one of fp32 for this folder, got 'int8'"):
        Runner(exported, 'int8')
    for providers in ('CPUExecutionProvider', ['MyProvider'], []):
        with pytest.raises(RunnerError, match='^providers must be a list of .*CPUExecutionProvider'):
            Runner(exported, providers=providers)
    for threads in (0, 1.5, True, 'many'):
        with pytest.raises(RunnerError, match='^threads must be an integer'):
            Runner(exported, threads=threads)
    assert Runner(exported, providers=['CPUExecutionProvider'], threads=2)(images).shape == (1, 5)
    for idx, line in ((4, r'exit_idx must be in \[-4, 3\], got 4'), ('a', 'exit_idx must be an integer')):
        with pytest.raises(RunnerError, match=line):
            runner.macs(idx)
    assert runner.macs(-1) == runner.macs(3) == 1.03


def test_heads_that_are_skipped_cost_nothing(folder):
    runner = Runner(folder)  # heads cost 10 each, paths 250, 500, 750 and 1000
    assert runner.macs(3, [0, 2]) == pytest.approx(1.01)
    assert runner.macs(1, [0, 1, 2]) == pytest.approx(0.5)
    thresholds = [None, 0.5, None]
    assert runner.unused(threshold=thresholds) == []  # stages run all heads
    runner._programs = {'fixed': [], 'stages': [], 'conditional': {'path': 'a'}}
    assert runner.unused(threshold=thresholds) == [0, 2]
    assert runner.unused({'criterion': 'margin', 'thresholds': thresholds}) == [0, 2]


def test_missing_libraries_are_named(exported, runner, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(RunnerError, match='^ONNX Runtime is missing: pip install onnxruntime'):
        Runner(exported)
    monkeypatch.setitem(sys.modules, 'PIL', None)
    with pytest.raises(RunnerError, match='^Pillow is missing'):
        runner.preprocess('cat.jpg')


def change(folder, edit):
    """Edit the manifest, and leave sizes and checksums as they are."""
    manifest = json.loads((folder / 'manifest.json').read_text())
    edit(manifest)
    (folder / 'manifest.json').write_text(json.dumps(manifest))


def put(*path, value):
    """An edit that sets what is at a path of keys."""

    def edit(manifest):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


FIRST = 'stages/exit_0.onnx'

BROKEN = {
    'unknown key': (put('more', value=1), "unknown key 'more'"),
    'unknown key inside': (put('programs', 'fp32', 'gpu', value=[]), "programs.fp32 has an unknown key 'gpu'"),
    'missing key': (lambda manifest: manifest.pop('exits'), "no key 'exits'"),
    'newer format': (put('format', value=2), 'format must be 1, got 2: take the runner.py beside it'),
    'wrong type': (put('num_classes', value='5'), 'num_classes must be an integer'),
    'bool': (put('num_classes', value=True), 'num_classes must be an integer'),
    'number of programs': (
        put('programs', 'fp32', 'stages', value=[FIRST]),
        'a program of each form for each of the 4',
    ),
    'program not listed': (lambda manifest: manifest['files'].pop(FIRST), 'files must list all programs'),
    'path out of the folder': (put('files', '../secret', value={'size': 1, 'sha256': 'a' * 64}), 'inside the folder'),
    'absolute path': (put('files', '/etc/passwd', value={'size': 1, 'sha256': 'a' * 64}), 'inside the folder'),
    'hidden path': (put('files', 'stages/.x', value={'size': 1, 'sha256': 'a' * 64}), 'inside the folder'),
    'backslash': (put('files', '..\\x', value={'size': 1, 'sha256': 'a' * 64}), 'inside the folder'),
    'no checksum': (put('files', FIRST, 'sha256', value='a'), 'a SHA-256 of 64 digits'),
    'classes': (put('classes', value=['ant']), 'classes must be 5 names, got 1'),
    'mean': (put('preprocessing', 'mean', value=[0.5]), 'mean and std must have a number for each of 3 channels'),
    'std of 0': (put('preprocessing', 'std', value=[0.5, 0.0, 0.5]), 'std > 0'),
    'interpolation': (put('preprocessing', 'interpolation', value='magic'), 'interpolation'),
    'crop_pct': (put('preprocessing', 'crop_pct', value=0.0), 'crop_pct must be in'),
    'size': (put('preprocessing', 'input_size', value=[3, 8]), 'input_size must be three integers'),
    'policy': (put('policy', value={**POLICY, 'temperatures': [], 'combine': 'x'}), 'combine must be'),
    'policy of other exits': (
        put('policy', value={'criterion': 'margin', 'thresholds': [0.5], 'temperatures': [], 'combine': None}),
        'one threshold for each of the 3 exits, got 1',
    ),
    'macs of main': (put('plain_macs', value=999), 'plain_macs must be the fixed macs of main, 1000, got 999'),
    'macs with heads': (
        put('exits', 1, 'macs', 'sequential', value=1),
        'macs must be fixed >= 0 and sequential >= fixed, got ',
    ),
    'one classifier': (
        lambda manifest: manifest['exits'].__delitem__(slice(1, None)),
        'it must have two or more classifiers',
    ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_manifest_is_one_line(name, folder):
    edit, line = BROKEN[name]
    change(folder, edit)
    with pytest.raises(RunnerError) as caught:
        Runner(folder)
    assert line in str(caught.value)
    assert str(folder / 'manifest.json') in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'text',
    ['', '[]', '{', '{"format": 1, "format": 1}', '{"format": NaN}', '[' * 100_000, '"\ud800"', '{"format": 1e999}'],
)
def test_manifest_that_is_not_one_is_one_line(text, folder):
    (folder / 'manifest.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(RunnerError, match=r'manifest\.json cannot be read: ') as caught:
        Runner(folder)
    assert '\n' not in str(caught.value)
    (folder / 'manifest.json').write_bytes(b' ' * (4 * 2**20 + 1))
    with pytest.raises(RunnerError, match='more than 4194304 bytes'):
        Runner(folder)


def leaves_of(values, path=()):
    """All paths of keys in a JSON value."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves_of(item, (*path, key))


def refusal(folder):
    """The line that a folder is refused with; None if it is not."""
    try:
        Runner(folder)
    except RunnerError as error:
        return str(error)
    return None


def test_no_value_in_a_manifest_is_more_than_one_line(folder):
    original = json.loads((folder / 'manifest.json').read_text())
    strange = [None, True, -1, 0, 1e18, 10**400, 0.5, '', '../x', [], [None], {}, {'a': 1}]
    cases = refused = 0
    for path in leaves_of(original):
        for value in strange:
            manifest = copy.deepcopy(original)
            put(*path, value=value)(manifest)
            (folder / 'manifest.json').write_text(json.dumps(manifest))
            cases += 1
            line = refusal(folder)
            refused += line is not None
            assert line is None or ('\n' not in line and len(line) < 700)
    assert cases > 800
    assert refused > 0.8 * cases


def test_changed_and_missing_files_are_refused(folder):
    path = folder / 'stages/exit_1.onnx'
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(RunnerError, match=rf'exit_1.onnx must have {len(content)} bytes, got {len(content) - 1}'):
        Runner(folder, check=False)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RunnerError, match=r'exit_1.onnx has changed: its SHA-256'):
        Runner(folder)
    path.unlink()
    with pytest.raises(RunnerError, match=r'has no stages/exit_1.onnx, which its manifest.json lists'):
        Runner(folder)
    with pytest.raises(RunnerError, match=r'is not an exported folder: it has no manifest.json'):
        Runner(folder / 'stages')
    with pytest.raises(RunnerError, match=r'is not an exported folder: it has no manifest.json'):
        Runner(folder / 'nowhere')


def test_file_that_changes_under_a_runner_is_refused_when_it_is_opened(folder, monkeypatch):
    images, path = draw_images(1), folder / 'stages/main.onnx'
    monkeypatch.chdir(folder.parent)
    runners = [Runner(folder.name, check=check) for check in (True, False)]
    monkeypatch.chdir(folder)
    for runner in runners:
        assert runner.infer(images, threshold=0).exit_idx.tolist() == [0]  # opens the first alone
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunnerError, match=r'main.onnx has changed: its SHA-256'):
        runners[0](images)
    path.write_bytes(content[:-1])
    for runner in runners:
        with pytest.raises(RunnerError, match=rf'main.onnx must have {len(content)} bytes, got {len(content) - 1}'):
            runner(images)
    path.unlink()
    with pytest.raises(RunnerError, match=r'main.onnx cannot be opened: No such file'):
        runners[0](images)


def test_folder_that_may_not_be_read_is_one_line(folder, monkeypatch):
    is_file = Path.is_file

    def refuse(path):
        if path.name == name:
            raise PermissionError(13, 'Permission denied', str(path))
        return is_file(path)

    monkeypatch.setattr(Path, 'is_file', refuse)
    for name in ('manifest.json', 'main.onnx'):
        with pytest.raises(RunnerError, match=rf'{name} cannot be read: Permission denied[.]$'):
            Runner(folder)
    monkeypatch.undo()
    with pytest.raises(RunnerError, match=r'cannot be read: File name too long[.]$'):
        Runner('a' * 300)


def test_what_lies_beside_is_not_looked_at(folder):
    (folder / 'notes.txt').write_text('mine')
    (folder / 'runner.py').write_text('changed by hand')
    assert Runner(folder)(draw_images(1)).shape == (1, 5)


def test_program_that_is_none_is_one_line(folder):
    (folder / FIRST).write_bytes(b'not a graph')
    write_manifest(folder, json.loads((folder / 'manifest.json').read_text()))
    with pytest.raises(RunnerError, match=r'exit_0\.onnx cannot be opened: ') as caught:
        Runner(folder)(draw_images(1))
    assert '\n' not in str(caught.value)
    (folder / FIRST).write_bytes((folder / 'stages/main.onnx').read_bytes())
    write_manifest(folder, json.loads((folder / 'manifest.json').read_text()))
    with pytest.raises(RunnerError, match=r'exit_0\.onnx cannot be run: ') as caught:
        Runner(folder)(draw_images(1))
    assert '\n' not in str(caught.value)


def test_missing_form_is_named_by_the_call_that_needs_it(folder):
    manifest = json.loads((folder / 'manifest.json').read_text())
    stages = manifest['programs']['fp32']['stages']
    one = {'path': stages[0], 'criterion': 'confidence', 'combine': None}
    calls = {
        'anytime': (lambda runner: runner.anytime(draw_images(1)), ['stages']),
        'predict': (lambda runner: runner.predict(draw_images(1), 5), ['stages']),
        'infer': (lambda runner: runner.infer(draw_images(1), threshold=0.5), ['stages', 'conditional']),
        'a call with exit_idx': (lambda runner: runner(draw_images(1)), ['stages', 'fixed']),
    }
    for form, programs in (('fixed', {'fixed': stages}), ('conditional', {'conditional': one})):
        change(folder, put('programs', 'fp32', value={'fixed': [], 'stages': [], 'conditional': None, **programs}))
        runner = Runner(folder)
        for name, (ask, needed) in calls.items():
            if form in needed:
                continue
            with pytest.raises(RunnerError) as caught:
                ask(runner)
            forms = ' or '.join(needed)
            line = f'{folder} has no {forms} of fp32, which {name} needs: export it with the form {forms}.'
            assert str(caught.value) == line


def test_folder_without_programs_of_onnx_says_so(folder):
    paths = json.loads((folder / 'manifest.json').read_text())['programs']['fp32']['stages']
    change(folder, put('programs', 'fp32', 'stages', value=[]))
    with pytest.raises(RunnerError, match=r'manifest\.json cannot be read: it must have programs, got none'):
        Runner(folder)
    change(folder, put('pt2', value={'fixed': [], 'stages': paths}))
    with pytest.raises(RunnerError, match='has no ONNX programs of fp32: export it with the format onnx'):
        Runner(folder)


def run_main(capsys, *argv):
    code = module.main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def test_command_line(folder, tmp_path, capsys):
    from PIL import Image

    picture = tmp_path / 'cat.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)).save(picture)
    runner = Runner(folder)
    logits = list(runner.anytime(runner.preprocess(picture)))
    code, out, err = run_main(capsys, folder, picture, '--all')
    assert (code, err, out.count('\n')) == (0, '', 4)
    for line, (idx, single) in zip(out.splitlines(), logits):
        shares = torch.from_numpy(single[0]).softmax(-1)
        name, share = CLASSES[int(shares.argmax())], 100 * float(shares.max())
        where = 'main' if idx == 3 else f'exit {idx}'
        macs = (25, 51, 77, 103)[idx]
        assert line == f'{picture}: {name}, {share:.1f} %, at {where} with {macs} % of the MACs'
    code, again, _ = run_main(capsys, folder, picture, '--threshold', 0, '--threads', 1)
    assert (code, again) == (0, out.splitlines()[0] + '\n')
    code, again, _ = run_main(capsys, folder, picture, '--threshold', 'none,0,none')
    assert (code, again) == (0, out.splitlines()[1] + '\n')
    code, again, _ = run_main(capsys, folder, picture, picture, '--deadline-ms', 1e6)
    assert (code, again) == (0, (out.splitlines()[3] + '\n') * 2)
    code, again, err = run_main(capsys, folder, picture, tmp_path / 'none.png', picture, '--threshold', 0)
    assert (code, again) == (2, (out.splitlines()[0] + '\n') * 2)  # the others are answered
    assert err == f'runner.py: error: {tmp_path}/none.png cannot be read: No such file or directory.\n'
    wrong = [
        ([picture], 'The network has no policy of its own'),
        ([tmp_path / 'none.png', '--all'], 'none.png'),
        ([folder / 'manifest.json', '--all'], 'cannot be read'),
        ([picture, '--budget', '60%'], 'has no table of budgets'),
        ([picture, '--budget', '60%', '--all'], 'mutually exclusive'),
        ([picture, '--all', '--precision', 'int4'], 'precision must be one of fp32'),
    ]
    for argv, line in wrong:
        code, out, err = run_main(capsys, folder, *argv)
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert err.startswith('runner.py: error: ')
        assert line in err


def test_names_of_others_do_nothing_to_the_terminal(folder, tmp_path):
    from PIL import Image

    change(folder, put('classes', value=[f'\x1b[31m教会\n{idx}' for idx in range(len(CLASSES))]))
    names = [os.fsdecode(b'bad_\xff.png'), 'two\nlines.png', 'missing\n.png']
    for name in names[:2]:
        Image.new('RGB', (9, 9)).save(tmp_path / name)
    for encoding in ('utf-8', 'cp1252', 'ascii'):
        done = subprocess.run(
            [sys.executable, module.__file__, folder, *names, '--threshold', '0.9'],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONIOENCODING': f'{encoding}:strict'},
            capture_output=True,
        )
        lines = done.stdout.decode(encoding).splitlines()
        assert done.returncode == 2
        assert [line.split(': ')[0] for line in lines] == ['bad_ .png', 'two lines.png']
        shown = '教会' if encoding == 'utf-8' else r'\u6559\u4f1a'
        assert all(f':  [31m{shown} ' in line for line in lines)
        assert b'\x1b' not in done.stdout
        assert done.stderr.decode() == 'runner.py: error: missing .png cannot be read: No such file or directory.\n'


def test_file_imports_nothing_but_numpy_onnxruntime_and_pillow():
    with open(module.__file__) as file:
        tree = ast.parse(file.read())
    names = set()
    for node in ast.walk(tree):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    others = {name.split('.')[0] for name in names} - sys.stdlib_module_names
    assert others == {'numpy', 'onnxruntime', 'PIL'}


ISOLATED = """
import importlib.util, sys
import numpy as np
for name in ('torch', 'timm', 'timm_multiexit', 'torchvision', 'onnx'):
    assert importlib.util.find_spec(name) is None, name
sys.path.insert(0, sys.argv[1])
from runner import Runner
runner = Runner(sys.argv[1])
images = runner.preprocess(sys.argv[2])
answer = runner.infer(images, threshold=0.8)
np.savez(sys.argv[3], images=images, **answer._asdict())
"""


@pytest.mark.slow
def test_it_runs_where_there_is_no_torch(folder, tmp_path):
    from PIL import Image

    picture = tmp_path / 'cat.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)).save(picture)
    shutil.copy(module.__file__, folder / 'runner.py')
    uv = ['uv', 'run', '--isolated', '--no-project', '--with', 'onnxruntime', '--with', 'numpy', '--with', 'pillow']
    script = [sys.executable if sys.platform == 'win32' else 'python', '-c', ISOLATED]
    command = [*uv, *script, str(folder), str(picture), str(tmp_path / 'answer.npz')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, runner = np.load(tmp_path / 'answer.npz'), Runner(folder)
    expected = runner.infer(runner.preprocess(picture), threshold=0.8)
    np.testing.assert_array_equal(found['images'], runner.preprocess(picture))
    np.testing.assert_allclose(found['logits'], expected.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found['exit_idx'], expected.exit_idx)
    command = [*uv, 'python', 'runner.py', '.', str(picture), '--threshold', '0.8']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(f'{picture}: '), done.stderr
