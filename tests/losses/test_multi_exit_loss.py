"""The loss against a slow twin written from the paper's equations, and against the authors' published figures."""

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_multiexit.losses.multi_exit_loss import LOSSES, MultiExitLoss, create_loss
from timm_multiexit.losses.teachers import DepthWeights
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError


class Outputs(NamedTuple):
    logits: tuple
    features: tuple | None = None


# ---- The slow twin: Python floats and loops, no tensor operation but reading values.


def slow_log_softmax(row):
    top = max(row)
    log_sum = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - log_sum for value in row]


def slow_cross_entropy(rows, target, smoothing=0.0):
    total = 0.0
    for row, wanted in zip(rows, target, strict=True):
        classes = len(row)
        if not isinstance(wanted, list):
            wanted = [float(c == wanted) for c in range(classes)]
        wanted = [(1 - smoothing) * p + smoothing / classes for p in wanted]
        total -= sum(p * log_p for p, log_p in zip(wanted, slow_log_softmax(row), strict=True))
    return total / len(rows)


def slow_kl(teacher, student, temperature):
    total = 0.0
    for teacher_row, student_row in zip(teacher, student, strict=True):
        log_q = slow_log_softmax([value / temperature for value in teacher_row])
        log_p = slow_log_softmax([value / temperature for value in student_row])
        for a, b in zip(log_q, log_p, strict=True):
            total += math.exp(a) * (a - b)
    return temperature**2 * total / len(teacher)


def slow_mse(teacher, student):
    errors = [
        (a - b) ** 2
        for teacher_row, student_row in zip(teacher, student, strict=True)
        for a, b in zip(teacher_row, student_row, strict=True)
    ]
    return sum(errors) / len(errors)


def slow_mean(tables, members, base=1.0):
    total = sum(base**k for k in members)
    return [
        [sum(base**k * tables[k][b][n] for k in members) / total for n in range(len(tables[0][0]))]
        for b in range(len(tables[0]))
    ]


def slow_terms(logits, features, target, members, **settings):
    """Return task, output and feature, one value per classifier, and the weighted total.

    `members` are the teacher's classifiers, 0-based; `teacher_logits` are what the teacher is made from if not the
    students' own logits; `base` and `balance` are BEED's numbers.
    """
    s = {'output_loss': 'kl', 'output_weight': 0.1, 'feature_weight': 0.0, 'temperature': 3.0} | settings
    count = len(logits)
    base, balance = s.get('base', 1.0), s.get('balance', 1.0)
    shallow_to_deep = [balance ** (count - 1 - k) for k in range(count)]
    task = [
        (2 - factor) * slow_cross_entropy(rows, target, s.get('smoothing', 0.0))
        for factor, rows in zip(shallow_to_deep, logits, strict=True)
    ]
    output, feature = [0.0] * count, [0.0] * count
    if members:
        teacher = slow_mean(s.get('teacher_logits', logits), members, base)
        for k in range(count):
            if members == [count - 1] and k == count - 1:
                continue
            if s['output_loss'] == 'kl':
                output[k] = slow_kl(teacher, logits[k], s['temperature'])
            else:
                output[k] = slow_mse(teacher, logits[k])
            output[k] *= s['output_weight'] * shallow_to_deep[k]
            if s['feature_weight']:
                feature[k] = s['feature_weight'] * slow_mse(slow_mean(features, members, base), features[k])
    weights = s.get('exit_weights') or [1.0] * count
    total = sum(w * (a + b + c) for w, a, b, c in zip(weights, task, output, feature, strict=True))
    return task, output, feature, total


# ---- Data


def published_outputs():
    """Return the tensors on which the authors' script was run: four classifiers, float64, and their targets."""
    logits = [
        [[2 * math.sin(1 + 0.9 * k + 0.7 * b + 0.3 * c + 0.05 * b * c) for c in range(5)] for b in range(4)]
        for k in range(4)
    ]
    features = [
        [[max(0.0, math.cos(0.4 + 0.6 * k + 0.5 * b + 0.35 * d)) for d in range(6)] for b in range(4)] for k in range(4)
    ]
    target = torch.tensor([(3 * b + 1) % 5 for b in range(4)])
    return Outputs(tensors(logits), tensors(features)), target


def tensors(tables):
    return tuple(torch.tensor(table, dtype=torch.float64, requires_grad=True) for table in tables)


def tables(tensors):
    return [tensor.tolist() for tensor in tensors]


def random_outputs(exits, batch=3, classes=4, width=5, dtype=torch.float64):
    """Return outputs of `exits` exits and main with gradient, and class indices."""
    logits = tuple((3 * torch.randn(batch, classes, dtype=dtype)).requires_grad_() for _ in range(exits + 1))
    features = tuple(torch.randn(batch, width, dtype=dtype).requires_grad_() for _ in range(exits + 1))
    return Outputs(logits, features), torch.randint(classes, (batch,))


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- The authors' published script


PUBLISHED_CE = [1.79590979, 2.04899257, 2.20812210, 2.08125999]
PUBLISHED_ENTROPY_FACTOR = 0.1 * 3.0**2


def entropy_of_teacher(logits, members, temperature=3.0):
    total = 0.0
    teacher = slow_mean(tables(logits), members)
    for row in teacher:
        total -= sum(math.exp(v) * v for v in slow_log_softmax([value / temperature for value in row]))
    return total / len(teacher)


def test_task_terms_are_the_published_ones():
    outputs, target = published_outputs()
    assert MultiExitLoss().terms(outputs, target).task.tolist() == pytest.approx(PUBLISHED_CE, abs=1e-7)


@pytest.mark.parametrize(
    ('settings', 'published'),
    [
        pytest.param({'output_loss': 'mse'}, 13.88088387, id='mse'),
        pytest.param({'output_loss': 'mse', 'feature_weight': 1.0}, 13.96228939, id='mse-features'),
        pytest.param({}, 13.97388129, id='kl'),
        pytest.param({'feature_weight': 1.0}, 14.05528681, id='kl-features'),
    ],
)
def test_eed_total_is_the_published_one(settings, published):
    outputs, target = published_outputs()
    total = create_loss('eed', **settings)(outputs, target).item()
    if 'output_loss' not in settings:
        # The script's soft cross-entropy is the divergence plus the teacher's entropy, once for each of four students.
        total += 4 * PUBLISHED_ENTROPY_FACTOR * entropy_of_teacher(outputs.logits, range(4))
    assert total == pytest.approx(published, abs=1e-7)


def test_one_way_parts_are_the_published_ones():
    outputs, target = published_outputs()
    # Published before the weight of 0.1 but with T^2.
    mse = MultiExitLoss('main', 'mse').terms(outputs, target).output_distance
    kl = MultiExitLoss('main', 'kl', output_weight=1.0).terms(outputs, target).output_distance
    feature = MultiExitLoss('main', feature_weight=1.0).terms(outputs, target).feature_distance
    assert mse.sum().item() == pytest.approx(14.63353860, abs=1e-7)
    assert kl.sum().item() + 3 * 9 * entropy_of_teacher(outputs.logits, [3]) == pytest.approx(44.45500211, abs=1e-7)
    assert feature.sum().item() == pytest.approx(0.17724267, abs=1e-7)
    assert [row[-1].item() for row in (mse, kl, feature)] == [0.0, 0.0, 0.0]


def test_eed_gradient_is_the_published_one():
    outputs, target = published_outputs()
    first, main = gradients(
        create_loss('eed', output_loss='mse')(outputs, target), (outputs.logits[0], outputs.logits[-1])
    )
    assert main[0].tolist() == pytest.approx(
        [-0.09931170, -0.39938974, -0.16469745, -0.15249753, -0.11712711], abs=1e-7
    )
    assert first[0].tolist() == pytest.approx([0.13161877, -0.05527499, 0.23754984, 0.25436589, 0.24638645], abs=1e-7)


# ---- The slow twin


def assert_equal_to_twin(loss, outputs, target, members, **settings):
    terms = loss.terms(outputs, target)
    wanted_target = target.tolist()
    wanted = slow_terms(tables(outputs.logits), tables(outputs.features), wanted_target, members, **settings)
    for name, row in zip(('task', 'output_distance', 'feature_distance'), wanted, strict=False):
        assert getattr(terms, name).tolist() == pytest.approx(row, rel=1e-9, abs=1e-12), name
    assert terms.loss.item() == pytest.approx(wanted[-1], rel=1e-9)
    assert torch.equal(loss(outputs, target), terms.loss)


@pytest.mark.parametrize('exits', [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ('name', 'members', 'settings'),
    [
        pytest.param('ce', 'none', {}, id='ce'),
        pytest.param('phuong', 'main', {}, id='phuong'),
        pytest.param('byot', 'main', {'feature_weight': 1.0}, id='byot'),
        pytest.param('eed', 'all', {}, id='eed'),
    ],
)
def test_each_row_of_losses_equals_the_twin(name, members, settings, exits):
    outputs, target = random_outputs(exits)
    members = {'none': [], 'main': [exits], 'all': list(range(exits + 1))}[members]
    assert_equal_to_twin(create_loss(name), outputs, target, members, **settings)


@pytest.mark.parametrize('feature_weight', [0.0, 0.1])
@pytest.mark.parametrize('exits', [1, 2, 3, 4])
def test_beed_equals_the_twin(exits, feature_weight):
    outputs, target = random_outputs(exits)
    settings = {'output_weight': 1.0, 'feature_weight': feature_weight, 'base': 1.6, 'balance': 1.15}
    loss = create_loss('beed', feature_weight=feature_weight)
    assert_equal_to_twin(loss, outputs, target, list(range(exits + 1)), **settings)


@pytest.mark.parametrize(('teacher', 'members'), [([0, -1], [0, 3]), ((3, 0, 2), [0, 2, 3]), ('main', [3])])
def test_beed_with_another_teacher_equals_the_twin(teacher, members):
    outputs, target = random_outputs(3)
    loss = create_loss('beed', teacher=teacher, output_loss='mse', exit_weights=[0.5, 1.0, 0.0, 2.0])
    settings = {'output_loss': 'mse', 'output_weight': 1.0, 'base': 1.6, 'balance': 1.15}
    assert_equal_to_twin(loss, outputs, target, members, exit_weights=[0.5, 1.0, 0.0, 2.0], **settings)


def test_every_row_of_losses_is_tested_against_the_twin():
    assert sorted(LOSSES) == ['beed', 'byot', 'ce', 'eed', 'phuong']


@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
@pytest.mark.parametrize(
    ('teacher', 'members'),
    [
        pytest.param([0, -1], [0, 3], id='exit1-main'),
        pytest.param([2, 3], [2, 3], id='exit3-main'),
        pytest.param((3, 0, 2), [0, 2, 3], id='exits13-main-unordered'),
        pytest.param([0, 1, 2], [0, 1, 2], id='exits-without-main'),
        pytest.param([1], [1], id='one-exit'),
        pytest.param([-1], [3], id='main-as-minus-one'),
        pytest.param([3], [3], id='main-as-K'),
        pytest.param([0, 1, 2, 3], [0, 1, 2, 3], id='all-by-number'),
    ],
)
def test_any_subset_teaches_as_in_the_twin(teacher, members, output_loss):
    outputs, target = random_outputs(3)
    settings = {
        'output_loss': output_loss,
        'output_weight': 0.7,
        'feature_weight': 0.3,
        'temperature': 2.0,
        'exit_weights': [0.5, 0.0, 1.5, 2.0],
    }
    assert_equal_to_twin(MultiExitLoss(teacher, **settings), outputs, target, members, **settings)


def test_main_named_by_number_is_main():
    outputs, target = random_outputs(3)
    wanted = gradients(MultiExitLoss('main')(outputs, target), outputs.logits)
    for teacher in ([-1], [3]):
        for got, want in zip(gradients(MultiExitLoss(teacher)(outputs, target), outputs.logits), wanted, strict=True):
            assert torch.equal(got, want)


def test_soft_targets_equal_the_twin():
    outputs, _ = random_outputs(2)
    target = torch.rand(3, 4, dtype=torch.float64).softmax(-1)
    assert_equal_to_twin(create_loss('eed'), outputs, target, [0, 1, 2])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_soft_targets_take_the_precision_of_the_logits(dtype):
    outputs, _ = random_outputs(2, dtype=torch.float32)
    target = torch.rand(3, 4).softmax(-1).to(dtype)
    got = create_loss('eed')(outputs, target)
    assert got.dtype == torch.float32
    assert torch.equal(got, create_loss('eed')(outputs, target.float()))


def test_label_smoothing_criterion_equals_the_twin():
    outputs, target = random_outputs(2)
    loss = create_loss('eed', criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    assert_equal_to_twin(loss, outputs, target, [0, 1, 2], smoothing=0.1)


def test_multi_label_task_is_binary_cross_entropy():
    outputs, _ = random_outputs(2)
    target = torch.randint(2, (3, 4))
    got = create_loss('eed', output_loss='mse', multi_label=True).terms(outputs, target)
    for value, rows in zip(got.task.tolist(), tables(outputs.logits), strict=True):
        wanted = [
            math.log(1 + math.exp(-z if y else z))
            for row, labels in zip(rows, target.tolist(), strict=True)
            for z, y in zip(row, labels, strict=True)
        ]
        assert value == pytest.approx(sum(wanted) / len(wanted), rel=1e-9)


def test_main_alone_is_plain_cross_entropy():
    outputs, target = random_outputs(0)
    terms = MultiExitLoss().terms(outputs, target)
    assert terms.loss.item() == pytest.approx(F.cross_entropy(outputs.logits[0], target).item(), rel=1e-12)
    assert [list(row.shape) for row in terms[:-1]] == [[], [1], [1], [1]]
    assert terms.kd_distance is None


@pytest.mark.parametrize('teacher', ['main', 'all'])
@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
def test_main_alone_is_never_its_own_student(teacher, output_loss):
    outputs, target = random_outputs(0)
    loss = MultiExitLoss(teacher, output_loss, feature_weight=1.0)(outputs, target)
    assert loss.item() == pytest.approx(F.cross_entropy(outputs.logits[0], target).item(), rel=1e-12)


# ---- Gradients


@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
@pytest.mark.parametrize(('teacher', 'members'), [('main', [2]), ('all', [0, 1, 2]), ([0, -1], [0, 2])])
def test_gradient_is_the_finite_difference_with_a_frozen_teacher(teacher, members, output_loss):
    outputs, target = random_outputs(2)
    loss = MultiExitLoss(teacher, output_loss, output_weight=0.8, exit_weights=[0.5, 1.0, 2.0])
    got = gradients(loss(outputs, target), outputs.logits)
    frozen, step = tables(outputs.logits), 1e-5

    def total(k, b, c, shift):
        moved = copy.deepcopy(frozen)
        moved[k][b][c] += shift
        settings = {'output_loss': output_loss, 'output_weight': 0.8, 'exit_weights': [0.5, 1.0, 2.0]}
        return slow_terms(moved, None, target.tolist(), members, teacher_logits=frozen, **settings)[-1]

    for k, gradient in enumerate(got):
        for b, row in enumerate(gradient.tolist()):
            for c, value in enumerate(row):
                wanted = (total(k, b, c, step) - total(k, b, c, -step)) / (2 * step)
                assert value == pytest.approx(wanted, abs=1e-7), (k, b, c)


@pytest.mark.parametrize(
    ('name', 'students'),
    [('ce', []), ('phuong', []), ('byot', [0, 1, 2]), ('eed', [0, 1, 2, 3])],
)
def test_gradient_of_features_reaches_every_student_and_no_one_else(name, students):
    outputs, target = random_outputs(3)
    overrides = {'feature_weight': 1.0} if name == 'eed' else {}
    got = gradients(create_loss(name, **overrides)(outputs, target), outputs.features)
    # A teacher is read through its detached copy, so where gradient comes at all it may be zeros.
    assert [k for k, g in enumerate(got) if g is not None and g.abs().sum() > 0] == students


def test_feature_gradient_is_that_of_a_frozen_teacher():
    outputs, target = random_outputs(3)
    got = gradients(create_loss('eed', feature_weight=0.4)(outputs, target), outputs.features)
    frozen = sum(tensor.detach().clone() for tensor in outputs.features) / 4
    for gradient, tensor in zip(got, outputs.features, strict=True):
        assert torch.allclose(gradient, 0.4 * 2 * (tensor.detach() - frozen) / tensor.numel(), rtol=1e-12)


@pytest.mark.parametrize('name', sorted(LOSSES))
@pytest.mark.parametrize('exits', [1, 4])
def test_gradient_reaches_the_logits_of_every_classifier(name, exits):
    outputs, target = random_outputs(exits)
    for gradient in gradients(create_loss(name)(outputs, target), outputs.logits):
        assert gradient.abs().sum() > 0


def test_main_learns_from_labels_alone_when_it_is_the_teacher():
    outputs, target = random_outputs(3)
    (got,) = gradients(create_loss('byot')(outputs, target), outputs.logits[-1:])
    (wanted,) = gradients(F.cross_entropy(outputs.logits[-1], target), outputs.logits[-1:])
    assert torch.allclose(got, wanted, rtol=1e-12)


# ---- The terms


def test_kl_is_zero_when_all_agree():
    outputs, target = random_outputs(0)
    same = Outputs(outputs.logits * 4)
    assert create_loss('eed').terms(same, target).output_distance.abs().max().item() < 1e-12


def test_kl_is_unchanged_by_a_shift_of_all_logits():
    outputs, target = random_outputs(2)
    shifted = Outputs(tuple(z + k for k, z in enumerate(outputs.logits)))
    want = create_loss('eed').terms(outputs, target).output_distance
    assert torch.allclose(create_loss('eed').terms(shifted, target).output_distance, want, rtol=1e-9)


@pytest.mark.parametrize('exit_weights', [None, [0.3, 1.0, 0.0, 1.7]])
def test_loss_is_exactly_the_weighted_sum_of_its_terms(exit_weights):
    outputs, target = random_outputs(3, dtype=torch.float32)
    terms = create_loss('eed', feature_weight=0.5, exit_weights=exit_weights).terms(outputs, target)
    weights = torch.tensor(exit_weights or [1.0] * 4)
    assert torch.equal(terms.loss, (weights * (terms.task + terms.output_distance + terms.feature_distance)).sum())


def test_only_the_loss_has_a_gradient():
    outputs, target = random_outputs(2)
    terms = create_loss('byot').terms(outputs, target)
    assert [row.requires_grad for row in terms[:-1]] == [True, False, False, False]


def test_features_are_not_read_without_feature_weight():
    outputs, target = random_outputs(2)
    want = create_loss('eed')(outputs, target)
    uneven = Outputs(outputs.logits, (torch.randn(3, 2), torch.randn(3, 7), None))
    assert torch.equal(create_loss('eed')(uneven, target), want)
    assert torch.equal(create_loss('eed')(Outputs(outputs.logits), target), want)


def test_a_zero_exit_weight_silences_a_classifier():
    outputs, target = random_outputs(2)
    got = gradients(create_loss('eed', exit_weights=[1, 0, 1])(outputs, target), outputs.logits)
    assert got[1].abs().sum() == 0


# ---- Precision, devices, copies


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('is_autocast', [False, True])
@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
def test_half_precision_inputs_give_the_float32_result(dtype, is_autocast, output_loss):
    outputs, target = random_outputs(3, dtype=dtype)
    upcast = Outputs(*(tuple(tensor.detach().float() for tensor in row) for row in outputs))
    loss_fn = create_loss('byot', output_loss=output_loss)
    want = loss_fn.terms(upcast, target)
    with torch.autocast('cpu', torch.bfloat16, enabled=is_autocast):
        got = loss_fn.terms(outputs, target)
    assert (got.kd_distance, want.kd_distance) == (None, None)
    for one, other in zip(got[:-1], want[:-1], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    assert all(gradient.dtype == dtype for gradient in gradients(got.loss, outputs.logits))


def test_the_criterion_runs_outside_autocast():
    outputs, target = random_outputs(1, dtype=torch.bfloat16)
    seen = []

    def criterion(logits, target):
        seen.append(((logits @ logits.T).dtype, torch.is_autocast_enabled('cpu')))
        return F.cross_entropy(logits, target)

    with torch.autocast('cpu', torch.bfloat16):
        create_loss('eed', criterion=criterion)(outputs, target)
        assert torch.is_autocast_enabled('cpu')
    assert seen == [(torch.float32, False)] * 2


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_no_value_is_read_on_the_host(name):
    # Tensors on the meta device have no values: reading one (item, bool, a mask) raises.
    logits = tuple(torch.empty(3, 4, device='meta') for _ in range(3))
    loss_fn = create_loss(name, exit_weights=[1.0, 2.0, 3.0])
    target = torch.empty(3, dtype=torch.int64, device='meta')
    assert loss_fn(Outputs(logits, logits), target).shape == ()


def test_compiles_to_one_graph():
    outputs, target = random_outputs(3, dtype=torch.float32)
    loss_fn = create_loss('byot', exit_weights=[1.0, 2.0, 3.0, 4.0])
    compiled = torch.compile(loss_fn, backend='eager', fullgraph=True)
    assert torch.equal(compiled(outputs, target), loss_fn(outputs, target))


def test_has_no_state_and_copies():
    loss_fn = create_loss('eed', exit_weights=[1.0, 2.0])
    outputs, target = random_outputs(1)
    assert not loss_fn.state_dict()
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(other(outputs, target), loss_fn(outputs, target))


def test_a_criterion_that_is_a_module_moves_with_the_loss():
    loss_fn = create_loss('eed', criterion=nn.CrossEntropyLoss(weight=torch.ones(4))).double()
    assert loss_fn.criterion.weight.dtype == torch.float64


# ---- create_loss


def test_defaults_of_eed_are_the_decided_ones():
    loss_fn = create_loss('eed')
    got = (loss_fn.teacher, loss_fn.output_loss, loss_fn.output_weight, loss_fn.feature_weight, loss_fn.temperature)
    assert got == ('all', 'kl', 0.1, 0.0, 3.0)
    assert create_loss('eed', output_loss='mse').output_weight == 1.0
    assert create_loss('eed', output_loss='bernoulli').output_weight == 0.1


def test_none_overrides_keep_the_defaults():
    unset = dict.fromkeys(('teacher', 'output_loss', 'output_weight', 'feature_weight', 'temperature', 'exit_weights'))
    for name in LOSSES:
        assert create_loss(name, **unset, criterion=None).extra_repr() == create_loss(name).extra_repr()


def test_an_override_replaces_the_row_and_leaves_the_table():
    before = copy.deepcopy(LOSSES)
    assert create_loss('byot', feature_weight=0.0).feature_weight == 0.0
    assert create_loss('eed', teacher=[0, -1]).teacher == (0, -1)
    assert before == LOSSES


# ---- Errors: each says what was wrong, what is allowed and what to do, in one line


@pytest.mark.parametrize(
    ('settings', 'parts'),
    [
        pytest.param({'output_loss': 'l1'}, ["'l1'", "'kl', 'mse' or 'bernoulli'"], id='output-loss'),
        pytest.param({'output_loss': None}, ['None', "'kl', 'mse' or 'bernoulli'"], id='output-loss-none'),
        pytest.param({'temperature': 0}, ['temperature must be', '> 0', 'got 0'], id='temperature-zero'),
        pytest.param({'temperature': math.nan}, ['temperature must be', 'finite', 'got nan'], id='temperature-nan'),
        pytest.param({'temperature': -3.0}, ['temperature must be', 'got -3.0'], id='temperature-negative'),
        pytest.param({'output_weight': -0.1}, ['output_weight must be', '>= 0', 'got -0.1'], id='output-weight'),
        pytest.param({'output_weight': True}, ['output_weight must be', 'got True'], id='output-weight-bool'),
        pytest.param(
            {'feature_weight': math.inf}, ['feature_weight must be', 'finite', 'got inf'], id='feature-weight'
        ),
        pytest.param({'feature_weight': '1'}, ['feature_weight must be', "got '1'"], id='feature-weight-text'),
        pytest.param({'exit_weights': [1.0, -1.0]}, ['exit_weights[1] must be', 'got -1.0'], id='exit-weight-negative'),
        pytest.param({'exit_weights': [math.nan]}, ['exit_weights[0] must be', 'got nan'], id='exit-weight-nan'),
        pytest.param({'exit_weights': 0.5}, ['exit_weights must be a list', 'got 0.5'], id='exit-weights-number'),
        pytest.param({'exit_weights': '1,1'}, ['exit_weights must be a list', "got '1,1'"], id='exit-weights-text'),
        pytest.param({'teacher': 'last'}, ["'last'", "'main', 'all'", 'main is -1'], id='teacher-name'),
        pytest.param({'teacher': []}, ['teacher must be', 'got []'], id='teacher-empty'),
        pytest.param({'teacher': 3}, ['teacher must be', 'list', 'got 3'], id='teacher-number'),
        pytest.param({'teacher': ['main', 0]}, ["['main', 0]"], id='teacher-mixed'),
        pytest.param({'teacher': [True]}, ['[True]'], id='teacher-bool'),
        pytest.param(
            {'teacher': None, 'feature_weight': 1.0},
            ['feature_weight is 1.0 but the loss has no teacher', "'main', 'all'"],
            id='features-without-teacher',
        ),
        pytest.param(
            {'teacher': None, 'output_weight': 0.1},
            ['output_weight is 0.1 but the loss has no teacher'],
            id='outputs-without-teacher',
        ),
        pytest.param(
            {'teacher': None, 'depth_weights': DepthWeights(balance=1.1)},
            ['depth_weights is DepthWeights(teacher=1.0, balance=1.1) but the loss has no teacher'],
            id='depth-weights-without-teacher',
        ),
        pytest.param({'depth_weights': 1.6}, ['depth_weights must be a DepthWeights', 'got 1.6'], id='depth-weights'),
        pytest.param(
            {'multi_label': True},
            ["output_loss must be 'mse' or 'bernoulli' with multi_label", "got 'kl'"],
            id='multi-label-kl',
        ),
        pytest.param({'criterion': 'bce'}, ['criterion must be a callable', "got 'bce'"], id='criterion'),
    ],
)
def test_a_wrong_argument_is_named(settings, parts):
    with pytest.raises(MultiExitError) as error:
        MultiExitLoss(**({'teacher': 'all'} | settings))
    assert_message(error, parts)


def assert_message(error, parts):
    message = str(error.value)
    assert '\n' not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ('settings', 'parts'),
    [
        pytest.param({'exit_weights': [1.0] * 2}, ['has 2 values', '3 classifiers (2 exits and main)'], id='too-few'),
        pytest.param({'exit_weights': [1.0] * 4}, ['has 4 values', '3 classifiers (2 exits and main)'], id='too-many'),
        pytest.param({'teacher': [0, 3]}, ['[0, 3]', '3 classifiers', '0 to 2'], id='teacher-beyond'),
        pytest.param({'teacher': [-4]}, ['[-4]', 'to -3'], id='teacher-before'),
        pytest.param(
            {'depth_weights': DepthWeights([1.0, 2.0])},
            ['has 2 weights', '3 classifiers teach', "'all'"],
            id='teacher-weights-too-few',
        ),
        pytest.param(
            {'depth_weights': DepthWeights(balance=1.5)},
            ['balance is 1.5', '3 classifiers', '-0.2500 (2 - 1.5^2)', 'at most 1 exits', 'below 1.4142'],
            id='balance-beyond',
        ),
        pytest.param({'teacher': [2, -1]}, ['[2, -1]', 'twice', 'main is -1 and 2'], id='teacher-twice'),
        pytest.param(
            {'criterion': nn.CrossEntropyLoss(reduction='none')},
            ['shape [3]', 'scalar', "reduction='mean'"],
            id='criterion-without-scalar',
        ),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_named(settings, parts):
    outputs, target = random_outputs(2)
    with pytest.raises(MultiExitError) as error:
        MultiExitLoss(**({'teacher': 'all'} | settings))(outputs, target)
    assert_message(error, parts)
    if 'criterion' not in settings:
        with pytest.raises(MultiExitError) as before:
            MultiExitLoss(**({'teacher': 'all'} | settings)).check_count(3)
        assert str(before.value) == str(error.value)


@pytest.mark.parametrize(
    ('outputs', 'parts'),
    [
        pytest.param(torch.zeros(3, 4), ['type Tensor', 'exits=True'], id='plain-tensor'),
        pytest.param(Outputs(()), ['tuple of logits'], id='no-classifier'),
        pytest.param(
            Outputs((torch.zeros(3, 4), torch.zeros(3, 5)), None), ['[3, 4], [3, 5]', 'num_classes'], id='shapes'
        ),
        pytest.param(Outputs((torch.zeros(3, 4),) * 2, None), ['all 2 classifiers', 'exits=True'], id='no-features'),
        pytest.param(
            Outputs((torch.zeros(3, 4),) * 2, (torch.zeros(3, 5),)), ['all 2 classifiers'], id='features-too-few'
        ),
        pytest.param(
            Outputs((torch.zeros(3, 4),) * 2, (None, torch.zeros(3, 5))), ['all 2 classifiers'], id='features-none'
        ),
        pytest.param(
            Outputs((torch.zeros(3, 4),) * 2, (torch.zeros(3, 2), torch.zeros(3, 5))),
            ['exit 0 has 2', 'main has 5', '--exit-head paper'],
            id='features-uneven',
        ),
    ],
)
def test_outputs_that_cannot_be_used_are_named(outputs, parts):
    with pytest.raises(MultiExitError) as error:
        create_loss('byot')(outputs, torch.zeros(3, dtype=torch.int64))
    assert_message(error, parts)


def test_check_features_names_the_exits_that_differ():
    with pytest.raises(MultiExitError) as error:
        create_loss('byot').check_features([64, 512, 256, 512])
    assert_message(
        error,
        ['exit 0 has 64, exit 2 has 256 and main has 512', "head='paper' (--exit-head paper)", 'feature_weight 0'],
    )
    assert 'exit 1' not in str(error.value)


@pytest.mark.parametrize('name', ['ce', 'phuong', 'eed'])
def test_check_features_lets_any_width_pass_without_feature_distillation(name):
    create_loss(name).check_features([64, 128, 512])


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        pytest.param('EED', ["'EED'", 'beed, byot, ce, eed, phuong', "did you mean 'eed'?"], id='upper-case'),
        pytest.param('phoung', ["did you mean 'phuong'?"], id='misspelled'),
        pytest.param('xyzzy', ['beed, byot, ce, eed, phuong', 'LOSSES'], id='nothing-near'),
        pytest.param(None, ['None', 'beed, byot, ce, eed, phuong'], id='none'),
    ],
)
def test_unknown_loss_names_the_legal_and_the_nearest(name, parts):
    with pytest.raises(MultiExitError) as error:
        create_loss(name)
    assert_message(error, parts)


@pytest.mark.parametrize('overrides', [{'feature_weight': 1.0}, {'output_weight': 0.5}])
def test_overrides_that_contradict_the_row_are_errors(overrides):
    with pytest.raises(MultiExitError, match='the loss has no teacher'):
        create_loss('ce', **overrides)


def test_multi_label_is_allowed_where_no_softmax_is_distilled():
    assert create_loss('eed', output_loss='mse', multi_label=True).multi_label
    assert create_loss('ce', multi_label=True).multi_label


@pytest.mark.parametrize(
    ('target', 'expected'),
    [
        (torch.tensor([1, 0, 3], dtype=torch.int32), torch.tensor([1, 0, 3])),
        (F.one_hot(torch.tensor([1, 0, 3]), 5), F.one_hot(torch.tensor([1, 0, 3]), 5).float()),
    ],
    ids=['int32', 'one-hot'],
)
def test_targets_of_other_integers_mean_the_same(target, expected):
    outputs = Outputs(tuple(torch.randn(3, 5) for _ in range(3)), (torch.randn(3, 4),) * 3)
    loss = create_loss('eed')
    assert torch.equal(loss(outputs, target), loss(outputs, expected))


@pytest.mark.parametrize('target', [None, torch.arange(2), torch.tensor(1)], ids=['none', 'two', 'scalar'])
def test_targets_of_other_samples_are_one_line(target):
    outputs = Outputs(tuple(torch.randn(3, 5) for _ in range(3)), (torch.randn(3, 4),) * 3)
    with pytest.raises(InvalidValueError, match='target must have one row for each of 3 samples'):
        create_loss('eed')(outputs, target)
