"""Teachers and distances: BEED, the ramp, outside teachers, classes that do not exclude each other, split batches."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from timm.loss import JsdCrossEntropy
from timm.task import create_classification_loss
from torch import nn

from timm_multiexit.losses.distances import output_distance
from timm_multiexit.losses.multi_exit_loss import MultiExitLoss, create_loss
from timm_multiexit.losses.teachers import DepthWeights, KDConfig, resolve_teacher
from timm_multiexit.utils.errors import MultiExitError


class Outputs(NamedTuple):
    logits: tuple
    features: tuple | None = None


def random_outputs(exits=3, batch=3, classes=4, width=5, dtype=torch.float64):
    logits = tuple((3 * torch.randn(batch, classes, dtype=dtype)).requires_grad_() for _ in range(exits + 1))
    features = tuple(torch.randn(batch, width, dtype=dtype).requires_grad_() for _ in range(exits + 1))
    return Outputs(logits, features), torch.randint(classes, (batch,))


def beed_of_four(outputs, target):
    """BEED as hjdw2/BEED trains four classifiers: PyTorch's losses, and the paper's numbers written out."""
    (z1, z2, z3, z4), (f1, f2, f3, f4) = outputs
    total = 1 + 1.6 + 2.56 + 4.096
    teacher = ((z1 + 1.6 * z2 + 2.56 * z3 + 4.096 * z4) / total).detach()
    feature = ((f1 + 1.6 * f2 + 2.56 * f3 + 4.096 * f4) / total).detach()
    loss = 0.0
    for z, a in ((z1, 1.520875), (z2, 1.3225), (z3, 1.15), (z4, 1.0)):
        divergence = F.kl_div(F.log_softmax(z / 3, 1), F.softmax(teacher / 3, 1), reduction='batchmean')
        loss = loss + (2 - a) * F.cross_entropy(z, target) + a * 9 * divergence
    return loss + sum(0.1 * F.mse_loss(f, feature) for f in (f1, f2, f3, f4))


def test_beed_has_the_value_and_gradient_of_the_authors_script():
    outputs, target = random_outputs()
    wanted, got = beed_of_four(outputs, target), create_loss('beed', feature_weight=0.1)(outputs, target)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    leaves = (*outputs.logits, *outputs.features)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_beed_takes_at_most_five_classifiers():
    create_loss('beed').check_count(5)
    with pytest.raises(MultiExitError, match=r'6 classifiers the factor -0.0114 .* at most 4 exits or .* below 1.1487'):
        create_loss('beed').check_count(6)
    create_loss('beed', depth_weights=DepthWeights(1.6, 1.1486)).check_count(6)


def test_teacher_weights_belong_to_the_classifiers_as_they_are_named():
    assert resolve_teacher((3, 0, 2), DepthWeights([4.0, 1.0, 3.0]), 4) == {0: 0.125, 2: 0.375, 3: 0.5}
    assert resolve_teacher('all', DepthWeights([1, 0, 3]), 3) == {0: 0.25, 1: 0.0, 2: 0.75}
    # A base counts from the shallowest exit of the model, not of the teacher: 2^1 and 2^3.
    assert resolve_teacher((1, 3), DepthWeights(2.0), 4) == {1: 0.2, 3: 0.8}
    assert resolve_teacher('main', DepthWeights(1.6), 4) == {3: 1.0}


def test_weighted_teacher_is_the_hand_worked_mean():
    # Logits 0 and 4 weighed 3 : 1 make a teacher of 1; squared differences 1 and 9.
    outputs = Outputs((torch.zeros(1, 2), torch.full((1, 2), 4.0)))
    loss = MultiExitLoss('all', 'mse', depth_weights=DepthWeights([3, 1]))
    assert loss.terms(outputs, torch.tensor([0])).output_distance.tolist() == [1.0, 9.0]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'teacher': 0}, 'DepthWeights.teacher must be a finite number > 0, got 0'),
        ({'teacher': [1.0, -1.0]}, r'DepthWeights.teacher\[1\] must be .* got -1.0'),
        ({'teacher': [0.0, 0.0]}, 'sum > 0'),
        ({'teacher': []}, 'sum > 0'),
        ({'teacher': 'deep'}, "DepthWeights.teacher must be a list .* got 'deep'"),
        ({'balance': 0.0}, 'DepthWeights.balance must be .* got 0.0'),
        ({'balance': math.nan}, 'DepthWeights.balance must be .* got nan'),
    ],
)
def test_wrong_depth_weights_are_named(settings, message):
    with pytest.raises(MultiExitError, match=message):
        DepthWeights(**settings)


# ---- The ramp


@pytest.mark.parametrize('scale', [0.0, 0.3, 1.0])
def test_distill_scale_multiplies_output_and_feature_distances_alone(scale):
    outputs, target = random_outputs()
    outside = torch.randn(3, 4, dtype=torch.float64)
    loss = create_loss('beed', feature_weight=0.1)
    full = loss.terms(outputs, target, outside)
    loss.distill_scale = scale
    got = loss.terms(outputs, target, outside)
    for one, other in ((got.output_distance, full.output_distance), (got.feature_distance, full.feature_distance)):
        assert one.tolist() == pytest.approx((scale * other).tolist(), rel=1e-12)
    assert torch.equal(got.task, full.task)
    assert torch.equal(got.kd_distance, full.kd_distance)
    assert got.loss.item() == pytest.approx(sum(part.sum().item() for part in got[1:]))


def test_at_scale_zero_projected_features_still_get_a_gradient_of_zero():
    outputs, target = random_outputs()
    loss = create_loss('eed', feature_weight=1.0)
    loss.distill_scale = 0.0
    loss(outputs, target).backward()
    assert all(torch.equal(f.grad, torch.zeros_like(f)) for f in outputs.features)
    assert all(z.grad.abs().sum() > 0 for z in outputs.logits)


def test_a_moving_scale_is_followed_by_few_compilations():
    outputs, target = random_outputs(exits=1, dtype=torch.float32)
    loss, graphs = create_loss('eed'), []
    compiled = torch.compile(loss, backend=lambda module, _: graphs.append(module) or module.forward, fullgraph=True)
    for step in range(9):
        loss.distill_scale = step / 8
        torch.testing.assert_close(compiled(outputs, target), loss(outputs, target))
    assert len(graphs) <= 3


# ---- A teacher from outside


@pytest.mark.parametrize(
    ('settings', 'task_factor', 'kd_factor'),
    [
        ({}, 1.0, 1.0),
        ({'task_loss_weight': 0.3}, 0.3, 0.7),
        ({'distill_loss_weight': 2.0}, 1.0, 2.0),
        ({'task_loss_weight': 0.3, 'distill_loss_weight': 2.0}, 0.3, 2.0),
        ({'task_loss_weight': 1.0, 'temperature': 1.5}, 1.0, 0.0),
    ],
)
def test_every_classifier_is_a_student_of_the_outside_teacher(settings, task_factor, kd_factor):
    outputs, target = random_outputs()
    outside, temperature = torch.randn(3, 4, dtype=torch.float64), settings.get('temperature', 4.0)
    weights = [0.5, 1.0, 0.0, 2.0]
    terms = create_loss('eed', exit_weights=weights).terms(outputs, target, outside, KDConfig(**settings))
    plain = create_loss('eed', exit_weights=weights).terms(outputs, target)
    total = 0.0
    for idx, logits in enumerate(outputs.logits):
        log_student, teacher = F.log_softmax(logits / temperature, 1), F.softmax(outside / temperature, 1)
        wanted = kd_factor * temperature**2 * F.kl_div(log_student, teacher, reduction='batchmean')
        assert terms.kd_distance[idx].item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-15)
        assert terms.task[idx].item() == pytest.approx(task_factor * plain.task[idx].item(), rel=1e-12)
        total += weights[idx] * (wanted + terms.task[idx] + plain.output_distance[idx]).item()
    assert terms.loss.item() == pytest.approx(total, rel=1e-10)
    assert not terms.kd_distance.requires_grad
    assert 'kd' not in plain


def test_the_outside_teacher_gets_no_gradient_and_half_precision_is_upcast():
    outputs, target = random_outputs(dtype=torch.bfloat16)
    outside = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    upcast = Outputs(tuple(z.detach().float() for z in outputs.logits))
    with torch.autocast('cpu', torch.bfloat16):
        terms = create_loss('ce').terms(outputs, target, outside)
    assert torch.equal(terms.kd_distance, create_loss('ce').terms(upcast, target, outside.detach().float()).kd_distance)
    terms.loss.backward()
    assert outside.grad is None


def test_no_value_of_the_outside_teacher_is_read_on_the_host():
    # Tensors on the meta device have no values: reading one raises.
    logits = tuple(torch.empty(3, 4, device='meta') for _ in range(3))
    target = torch.empty(3, dtype=torch.int64, device='meta')
    terms = create_loss('beed').terms(Outputs(logits), target, logits[0], KDConfig(0.5))
    assert terms.loss.shape == ()


def test_an_outside_teacher_of_other_classes_is_refused():
    outputs, target = random_outputs()
    with pytest.raises(MultiExitError, match=r"model's shape \[3, 4\], got \[3, 5\]"):
        create_loss('ce').terms(outputs, target, torch.zeros(3, 5))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'temperature': 0.0}, 'temperature of the outside teacher must be .* got 0.0'),
        ({'task_loss_weight': -1.0}, 'task_loss_weight must be .* got -1.0'),
        ({'distill_loss_weight': math.inf}, 'distill_loss_weight must be .* got inf'),
        ({'task_loss_weight': 1.25}, 'got 1.25, which leaves -0.25'),
    ],
)
def test_wrong_weights_of_the_outside_teacher_are_named(settings, message):
    with pytest.raises(MultiExitError, match=message):
        KDConfig(**settings)


# ---- Classes that do not exclude each other


def slow_bernoulli(teacher, student, temperature):
    def sigmoid(z):
        return 1 / (1 + math.exp(-z / temperature))

    total = 0.0
    for t_row, s_row in zip(teacher, student, strict=True):
        for t, s in zip(t_row, s_row, strict=True):
            p, q = sigmoid(t), sigmoid(s)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return temperature**2 * total / (len(teacher) * len(teacher[0]))


def test_bernoulli_is_the_divergence_of_every_class_by_itself():
    outputs, _ = random_outputs(exits=2)
    target = torch.randint(2, (3, 4)).double()
    terms = create_loss('eed', output_loss='bernoulli', multi_label=True).terms(outputs, target)
    teacher = (sum(outputs.logits) / 3).tolist()
    wanted = [0.1 * slow_bernoulli(teacher, z.tolist(), 3.0) for z in outputs.logits]
    assert terms.output_distance.tolist() == pytest.approx(wanted, rel=1e-9)


def test_bernoulli_stays_finite_for_sure_classifiers():
    students = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    distance = output_distance('bernoulli', students, torch.tensor([[-200.0, -200.0]]), 1.0)
    assert distance.tolist() == [100.0]  # 200 nats in one of two classes
    distance.sum().backward()
    assert students.grad.tolist() == [[[0.5, 0.0]]]


def test_the_outside_teacher_of_many_labels_teaches_class_by_class():
    outputs, _ = random_outputs(exits=1)
    target, outside = torch.rand(3, 4).double(), torch.randn(3, 4).double()
    terms = create_loss('ce', multi_label=True).terms(outputs, target, outside)
    wanted = [slow_bernoulli(outside.tolist(), z.tolist(), 4.0) for z in outputs.logits]
    assert terms.kd_distance.tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize('loss_type', ['bce', 'asl', 'poly', 'twoway', 'zlpr'])
def test_timm_criteria_for_many_labels_apply_to_every_classifier(loss_type):
    outputs, _ = random_outputs(dtype=torch.float32)
    target = torch.randint(2, (3, 4)).float()
    criterion = create_classification_loss(loss_type, multi_label=True)
    terms = create_loss('eed', output_loss='mse', multi_label=True, criterion=criterion).terms(outputs, target)
    assert terms.task.tolist() == pytest.approx([criterion(z, target).item() for z in outputs.logits])
    assert torch.autograd.grad(terms.loss, outputs.logits)[0].abs().sum() > 0


# ---- Batches of augmentation splits


def test_jensen_shannon_criterion_applies_to_the_splits_of_every_classifier():
    splits, clean = 3, 4
    outputs, _ = random_outputs(batch=splits * clean)
    target = torch.randint(4, (clean,)).repeat(splits)
    terms = create_loss('eed', criterion=JsdCrossEntropy(splits, alpha=12, smoothing=0.0)).terms(outputs, target)
    for got, logits in zip(terms.task, outputs.logits, strict=True):
        first, second, third = (part.softmax(1) for part in logits.split(clean))
        log_mixture = ((first + second + third) / 3).log()
        divergence = sum((p * (p.log() - log_mixture)).sum(1).mean() for p in (first, second, third)) / 3
        assert got.item() == pytest.approx((F.cross_entropy(logits[:clean], target[:clean]) + 12 * divergence).item())
    wanted = create_loss('eed').terms(outputs, target).output_distance
    assert torch.equal(terms.output_distance, wanted)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms.loss, outputs.logits))


def test_a_loss_with_an_outside_teacher_compiles_to_one_graph():
    outputs, target = random_outputs(dtype=torch.float32)
    loss = create_loss('beed', criterion=nn.CrossEntropyLoss())
    outside = torch.randn(3, 4)
    compiled = torch.compile(loss.terms, backend='eager', fullgraph=True)
    assert torch.equal(compiled(outputs, target, outside).loss, loss.terms(outputs, target, outside).loss)
