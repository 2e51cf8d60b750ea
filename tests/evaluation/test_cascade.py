"""A cascade of two models is a policy on two classifiers, measured like own exits."""

import json
import shutil

import pytest
import timm
import torch
from torch import nn

import timm_multiexit as tme
from timm_multiexit.calibration.logits import LogitSet
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.cli import validate
from timm_multiexit.evaluation.cascade import Cascade, compare_curves, match_policies, measure_cascade
from timm_multiexit.evaluation.report import Calibration
from timm_multiexit.evaluation.speed import time_networks
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError

SIZE = (3, 32, 32)
COSTS = StageCosts(paths=(0.0, 10.0), heads=(4.0,))


@pytest.fixture
def cascade(make_backbone):
    small, large = make_backbone('test_resnet'), make_backbone('test_efficientnet')
    return Cascade(MultiExitModel(small, []), MultiExitModel(large, [])).eval()


def test_costs_are_the_small_model_or_both(cascade):
    small, large = (model.cost(SIZE)[-1].fixed.macs for model in (cascade.small, cascade.large))
    costs = cascade.costs(SIZE)
    assert costs.leaving(used=(0,)) == (small, small + large)
    assert costs.leaving(used=())[-1] == large
    assert (costs.total, costs.largest) == (large, small + large)


@pytest.mark.parametrize('combine', [None, 'mean', 'geometric'])
@pytest.mark.parametrize('quantile', [0.0, 0.45, 1.0, None])
def test_answers_are_those_of_the_policy_on_both_models_logits(cascade, quantile, combine):
    images = torch.randn(9, *SIZE)
    seen = []
    cascade.large.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        logits = [cascade.small.backbone(images), cascade.large.backbone(images)]
    sure = (logits[0] / 2).softmax(-1).amax(-1)
    threshold = None if quantile is None else sure.quantile(quantile).item() + (1e-3 if quantile == 1 else 0)
    policy = ExitPolicy('confidence', (threshold,), (2.0, 0.5), combine)
    expected, found = apply_policy(policy, logits), cascade.infer(images, policy)
    assert torch.equal(found.exit_idx, expected.exit_idx)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    num_unsure = int((expected.exit_idx == 1).sum())
    assert seen == [num_unsure] * (num_unsure > 0)
    assert num_unsure == {0.0: 0, 0.45: 4, 1.0: 9, None: 9}[quantile]


def make_logits(num, rights, seed):
    """Return logits of classifiers that are right in such shares, surer where they are, and targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (num,), generator=generator)
    logits = []
    for share in rights:
        is_right = torch.rand(num, generator=generator) < share
        answers = torch.where(is_right, targets, (targets + 1) % 4)
        size = 1 + 2 * torch.rand(num, 1, generator=generator) + 1.5 * is_right.unsqueeze(1)
        logits.append(size * nn.functional.one_hot(answers, 4))
    return logits, targets


def make_calibration(logits, targets):
    return Calibration(LogitSet(tuple(logits), targets, torch.zeros(1), torch.zeros(0)), 'some images')


def slow_macs(policy, logits):
    exit_idx = apply_policy(policy, logits).exit_idx
    costs = [4.0, 14.0] if policy.used else [0.0, 10.0]
    return sum(costs[idx] for idx in exit_idx.tolist()) / len(exit_idx)


def test_each_own_policy_is_matched_by_the_best_cascade_of_its_macs():
    held_out, reported = make_logits(400, (0.6, 0.8), 0), make_logits(300, (0.6, 0.8), 1)
    rival = measure_cascade(
        COSTS, PolicyMeter(*reported, COSTS), make_calibration(*held_out), criterion='confidence', combine=None
    )
    own_costs = StageCosts(paths=(2.0, 10.0), heads=(1.0,))
    own_meter = PolicyMeter(*make_logits(400, (0.5, 0.8), 2), own_costs)
    own = {'early': ExitPolicy('confidence', (0.8,)), 'cheap': ExitPolicy('confidence', (0.0,))}
    matched = match_policies(own, own_meter, rival)
    assert set(matched) == {'early'}  # at 3 MACs there is no cascade, whose small model takes 4
    name, policy = matched['early']
    assert name == 'cascade, MACs of early'
    limit = own_meter.measure(own['early']).macs
    assert 4 < slow_macs(policy, held_out[0]) <= limit
    # By hand: of all thresholds that can part these images, none within the limit is right more often.
    right = {}
    for threshold in [None, *sorted({round(v, 6) for v in held_out[0][0].softmax(-1).amax(-1).tolist()})]:
        tried = ExitPolicy('confidence', (threshold,))
        if slow_macs(tried, held_out[0]) <= limit:
            right[threshold] = (apply_policy(tried, held_out[0]).logits.argmax(-1) == held_out[1]).float().mean().item()
    assert len(right) > 10
    found = (apply_policy(policy, held_out[0]).logits.argmax(-1) == held_out[1]).float().mean().item()
    assert found >= max(right.values()) - 0.01
    assert rival.table.best_within(3.9) is None


def test_curves_are_compared_at_equal_budgets_and_measured_on_the_reported_images():
    held_out, reported = make_logits(400, (0.6, 0.8), 0), make_logits(300, (0.6, 0.8), 1)
    rival = measure_cascade(
        COSTS, PolicyMeter(*reported, COSTS), make_calibration(*held_out), criterion='confidence', combine=None
    )
    points = [{'budget_macs': macs, 'search': {'top-1': 70.0, 'macs': macs}} for macs in (2.0, 6.0, 12.0)]
    points.append({'budget_macs': 1.0, 'search': None})
    pairs = compare_curves({'points': points}, rival)
    assert [pair['budget_macs'] for pair in pairs] == [2.0, 6.0, 12.0]
    assert pairs[0]['cascade'] is None
    for pair in pairs[1:]:
        policy = rival.table.best_within(pair['budget_macs']).policy
        simulated = apply_policy(policy, reported[0])
        right = (simulated.logits.argmax(-1) == reported[1]).float().mean().item()
        assert pair['cascade']['top-1'] == pytest.approx(100 * right, rel=1e-5)
        assert pair['cascade']['macs'] == pytest.approx(slow_macs(policy, reported[0]))
        assert slow_macs(policy, held_out[0]) <= pair['budget_macs']


def test_networks_are_timed_batch_by_batch():
    seen = []
    variants = {'a': lambda x: seen.append(('a', len(x))), 'b': lambda x: seen.append(('b', len(x)))}
    images = {'a': torch.zeros(50, 1), 'b': torch.zeros(50, 1)}
    found = time_networks(variants, images, [1, 20, 50], rounds=2)
    for name in 'ab':
        assert list(found[name]) == ['1', '20', '50']
        counts = [num for other, num in seen if other == name]
        # 32 single images, one batch of 20, one of 50; a turn that does not count and two that do.
        assert counts == [1] * 32 * 3 + [20] * 3 + [50] * 3
        assert all(value > 0 for value in found[name].values())


def test_models_of_a_cascade_have_no_exits_and_the_same_classes(make_model, make_backbone):
    plain = MultiExitModel(make_backbone(), [])
    with pytest.raises(MultiExitError, match='must be without exits'):
        Cascade(plain, make_model())
    with pytest.raises(MultiExitError, match='the same classes, got 10 and 3'):
        Cascade(plain, MultiExitModel(make_backbone(num_classes=3), []))


# The command

CONFIG = {'input_size': SIZE, 'crop_pct': 1.0, 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear'}


def save(folder, name, *, exits=None, num_classes=10, **config):
    model = timm.create_model(name, num_classes=num_classes)
    model = model if exits is None else tme.attach_exits(model, exits, input_size=SIZE)
    tme.save_pretrained(model, folder, data_config=CONFIG | config)


@pytest.fixture
def folders(tmp_path):
    save(tmp_path / 'own', 'test_resnet', exits=[1, 3])
    save(tmp_path / 'small', 'test_efficientnet')
    save(tmp_path / 'large', 'test_resnet')
    return tmp_path


FLAGS = ('--split', 'test', '--calib-from-train', '64', '-j', '0', '-b', '64')


def test_command_reports_own_exits_cascade_and_static_models(run_script, folders, tmp_path):
    names = [f'local-dir:{folders}/{name}' for name in ('small', 'large')]
    flags = (*FLAGS, '--budget', '80%', '--compare-cascade', ','.join(names), '--compare', f'local-dir:{folders}/own')
    flags += (
        '--time-rounds',
        '1',
        '--time-batch-sizes',
        '2',
        '8',
        '512',
        '-b',
        '512',
        '--results-format',
        'json',
        '--results-file',
        'r.json',
    )
    code, out, err = run_script(validate.main, '--model', f'local-dir:{folders}/own', *flags)
    assert code == 0, err
    saved = json.loads((tmp_path / 'r.json').read_text())
    rivals = saved['rivals']
    expected = ['main', 'budget 80%', 'cascade, MACs of budget 80%', *names, f'local-dir:{folders}/own']
    assert [row['name'] for row in rivals['rows']] == expected
    assert [row['kind'] for row in rivals['rows']] == ['main', 'own', 'cascade', 'static', 'static', 'static']
    rows = dict(zip(expected, rivals['rows']))
    for name in names:
        cost = MultiExitModel(timm.create_model(name, pretrained=True), []).cost(SIZE)[-1].fixed.macs
        assert rows[name]['macs'] == cost
    assert rows[expected[-1]]['top-1'] == rows['main']['top-1'] == saved['rows'][2]['top-1']
    assert all(set(row['img/s']) == {'2', '8'} and min(row['img/s'].values()) > 0 for row in rivals['rows'])
    assert rivals['timing'] == {'batch_sizes': [2, 8], 'rounds': 1, 'device': 'cpu'}
    assert len(rivals['cascade']['pairs']) > 5
    assert rivals['cascade']['chosen_on'] == saved['calibrated_on']
    assert 'Times are of batches of [2, 8], the test split has no larger ones.' in err
    assert 'This network and others on the test split' in out
    assert 'plain timm' not in out


WRONG = {
    'one': (('small',), '--compare-cascade must be two different models, SMALL,LARGE, got'),
    'same': (('small', 'small'), '--compare-cascade must be two different models, SMALL,LARGE, got'),
    'three': (('small', 'large', 'small'), '--compare-cascade must be two different models, SMALL,LARGE, got'),
    'equal': (('small', 'twin'), 'MMACs. Name a cheaper first model.'),
    'swapped': (('large', 'small'), 'MMACs. Swap them.'),
    'unknown': (('small', 'nowhere'), '/nowhere'),
    'classes': (('small', 'few'), 'few must have the 10 classes of the model, got 3.'),
    'size': (('small', 'wide'), 'input_size [3, 32, 32], got [3, 48, 48]. Name models prepared alike'),
    'pixels': (('dark', 'large'), 'std [0.5, 0.5, 0.5], got [0.1, 0.1, 0.1]. Name models prepared alike'),
}


@pytest.mark.parametrize(('names', 'message'), WRONG.values(), ids=WRONG)
def test_cascade_that_cannot_be_compared_is_one_line(run_script, folders, names, message):
    save(folders / 'few', 'test_resnet', num_classes=3)
    save(folders / 'wide', 'test_resnet', input_size=(3, 48, 48))
    shutil.copytree(folders / 'small', folders / 'twin', dirs_exist_ok=True)
    save(folders / 'dark', 'test_resnet', std=(0.1,) * 3)
    text = ','.join(f'local-dir:{folders}/{name}' for name in names)
    code, out, err = run_script(validate.main, '--model', f'local-dir:{folders}/own', *FLAGS, '--compare-cascade', text)
    assert code == 2
    assert out == ''
    line = err.strip().splitlines()[-1]
    assert line.startswith('validate.py: error: ')
    assert message in line
    assert '--compare-cascade' in line


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--compare-cascade', 'a,b'), '--compare-cascade a,b needs data to choose thresholds on: give --calib-split'),
        (('--compare-cascade', 'a,'), "--compare-cascade must be two different models, SMALL,LARGE, got 'a,'."),
        (('--time-batch-sizes', '2'), '--time-batch-sizes needs --compare-cascade SMALL,LARGE.'),
        (
            ('--compare-cascade', 'a,b', '--calib-from-train', '9', '--time-batch-sizes', '512'),
            '--time-batch-sizes must be <= --batch-size 256, got 512.',
        ),
    ],
    ids=['data', 'empty', 'sizes', 'batch'],
)
def test_flags_that_do_not_fit_are_one_line(run_script, flags, message):
    code, out, err = run_script(validate.main, '--model', 'test_resnet', '--exits', '1', *flags)
    assert (code, out) == (2, '')
    assert message in err.strip().splitlines()[-1]


def test_answer_that_is_not_a_number_is_refused(make_backbone):
    broken = [MultiExitModel(make_backbone(), []).eval() for _ in range(2)]
    for model in broken:
        nn.init.constant_(model.backbone.fc.weight, torch.nan)
    for threshold in (0.5, None):
        with pytest.raises(MultiExitError, match='NaN'):
            Cascade(*broken).infer(torch.randn(3, 3, 64, 64), ExitPolicy('confidence', (threshold,)))
