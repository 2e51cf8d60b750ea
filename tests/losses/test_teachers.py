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
from timm_multiexit.losses.teachers import DepthWeights, KDConfig, follow_skill, resolve_teacher, skill_gradient
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


# ---- Weights by skill


def slow_step(weights, logits, target, multi_label=False):
    """The step of `follow_skill` from the derivative that autograd takes of the teacher's cross-entropy."""
    w = weights.clone().requires_grad_()
    mean = sum(w[idx] * tensor for idx, tensor in enumerate(logits))
    if multi_label:
        loss = F.binary_cross_entropy_with_logits(mean, target.to(mean.dtype))
    else:
        loss = F.cross_entropy(mean, target)
    (gradient,) = torch.autograd.grad(loss, w)
    raised = [math.exp(-0.3 * g) * v for g, v in zip(gradient.tolist(), weights.tolist())]
    return [0.999 * value / sum(raised) + 0.001 / len(raised) for value in raised]


@pytest.mark.parametrize('kind', ['indices', 'probabilities', 'labels'])
def test_step_by_skill_is_that_of_the_equation(kind):
    logits = torch.stack(random_outputs()[0].logits).detach()
    target = {
        'indices': torch.tensor([1, 0, 3]),
        'probabilities': torch.rand(3, 4, dtype=torch.float64).softmax(-1),
        'labels': torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]),
    }[kind]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    moved = follow_skill(weights, skill_gradient(weights, logits, target, multi_label=kind == 'labels'))
    assert moved.tolist() == pytest.approx(slow_step(weights, logits, target, kind == 'labels'), rel=1e-12)
    assert moved.sum().item() == pytest.approx(1.0)
    assert max(abs(moved - weights)) > 1e-3


def make_pupils(count, batch=64, classes=5, errors=(0.9, 0.6, 0.2), generator=None):
    """Return logits of pupils that are wrong in so many cases, each time at random, and targets."""
    target = torch.randint(classes, (batch,), generator=generator)
    pupils = []
    for share in errors[:count]:
        is_wrong = torch.rand(batch, generator=generator) < share
        answers = torch.where(is_wrong, torch.randint(classes, (batch,), generator=generator), target)
        pupils.append(2.0 * F.one_hot(answers, classes) + 0.1 * torch.randn(batch, classes, generator=generator))
    return torch.stack(pupils), target


def test_teacher_by_skill_comes_to_the_best_fixed_weights_and_is_not_worse_than_the_best_pupil():
    generator = torch.Generator().manual_seed(0)
    weights, spent, alone, even, batches = torch.full((3,), 1 / 3), [], [], [], []
    for _ in range(600):
        logits, target = make_pupils(3, generator=generator)
        batches.append((logits, target))
        spent.append(F.cross_entropy(torch.tensordot(weights, logits, 1), target))
        alone.append(torch.stack([F.cross_entropy(tensor, target) for tensor in logits]))
        even.append(F.cross_entropy(logits.mean(0), target))
        weights = follow_skill(weights, skill_gradient(weights, logits, target))
    late = slice(300, None)
    teacher, best, mean = (
        torch.stack(spent[late]).mean(),
        torch.stack(alone[late]).mean(0).min(),
        torch.stack(even[late]).mean(),
    )
    # The best fixed weights by a grid of the simplex, in steps of 0.05.
    grid = [torch.tensor([i, j, 20 - i - j]) / 20 for i in range(21) for j in range(21 - i)]
    assert len(grid) == 231
    logits, target = (
        torch.cat([batch[0] for batch in batches[late]], 1),
        torch.cat([batch[1] for batch in batches[late]]),
    )
    floor, at = min((F.cross_entropy(torch.tensordot(w, logits, 1), target).item(), idx) for idx, w in enumerate(grid))
    assert teacher < min(best, mean) + 0.005
    assert teacher < floor + 0.01
    assert weights.argmax() == 2
    assert (weights - grid[at]).abs().max() < 0.15


def test_classifier_that_was_poor_comes_back():
    weights = torch.tensor([0.5, 0.5])
    good, poor = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    for _ in range(2000):
        weights = follow_skill(weights, skill_gradient(weights, torch.stack([good, poor]), torch.tensor([0])))
    assert 0.0004 < weights[1] < 0.05
    steps = 0
    while weights[1] < 0.5:
        gradient = skill_gradient(weights, torch.stack([poor, good]), torch.tensor([0]))
        weights, steps = follow_skill(weights, gradient), steps + 1
    assert steps < 30


def test_logits_that_are_not_finite_leave_the_weights():
    weights = torch.tensor([0.3, 0.7])
    logits = torch.stack([torch.tensor([[torch.inf, 0.0]]), torch.tensor([[0.0, torch.nan]])])
    assert torch.equal(follow_skill(weights, skill_gradient(weights, logits, torch.tensor([0]))), weights)


@pytest.mark.parametrize('teacher', ['all', [0, -1], [-1, 1]])
def test_loss_is_that_of_the_weights_it_has_and_then_they_follow(teacher):
    loss = create_loss('eed', teacher=teacher, teacher_weights='skill', feature_weight=1.0)
    named = list(range(4)) if teacher == 'all' else [idx % 4 for idx in teacher]
    members = sorted(named)
    weights = torch.full((len(members),), 1 / len(members), dtype=torch.float64)
    for _ in range(3):
        outputs, target = random_outputs()
        # The twin: the weights that there are before the batch, given by hand.
        by_hand = [weights[members.index(idx)].item() for idx in named]
        twin = create_loss('eed', teacher=teacher, depth_weights=DepthWeights(by_hand), feature_weight=1.0)
        assert loss(outputs, target).item() == pytest.approx(twin(outputs, target).item(), rel=1e-12)
        taught = torch.stack([outputs.logits[idx].detach() for idx in members])
        weights = torch.tensor(slow_step(weights, taught, target), dtype=torch.float64)
        torch.testing.assert_close(loss.skill, weights, rtol=1e-12, atol=0)
    loss.eval()
    loss(*random_outputs())
    torch.testing.assert_close(loss.skill, weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.uint8])
def test_weights_by_skill_are_those_of_an_update_not_of_its_parts(dtype):
    outputs, target = random_outputs(batch=12)
    target = target.to(dtype)
    whole, parts = create_loss('eed', teacher_weights='skill'), create_loss('eed', teacher_weights='skill')
    parts.num_skill_calls = 3
    for _ in range(2):
        whole(outputs, target)
        for part in range(0, 12, 4):
            before = parts.skill
            parts(Outputs(tuple(each[part : part + 4] for each in outputs.logits)), target[part : part + 4])
            assert part == 8 or parts.skill is before
        torch.testing.assert_close(parts.skill, whole.skill, rtol=1e-12, atol=0)


def test_weights_by_skill_run_without_values_and_compile():
    logits = tuple(torch.empty(3, 4, device='meta') for _ in range(3))
    loss = create_loss('eed', teacher_weights='skill')
    assert loss(Outputs(logits), torch.empty(3, dtype=torch.int64, device='meta')).shape == ()
    outputs, target = random_outputs(dtype=torch.float32)
    plain, compiled = create_loss('eed', teacher_weights='skill'), create_loss('eed', teacher_weights='skill')
    function = torch.compile(compiled, backend='eager', fullgraph=True)
    for _ in range(3):
        assert torch.equal(plain(outputs, target), function(outputs, target))
    assert torch.equal(plain.skill, compiled.skill)
    assert repr(plain).endswith("exit_weights=None, teacher_weights='skill')")
    assert 'skill' not in plain.state_dict()


@pytest.mark.parametrize(
    ('name', 'settings', 'message'),
    [
        ('ce', {}, "teacher_weights must be 'equal' for a teacher of less than two classifiers, got 'skill' with None"),
        ('phuong', {}, "less than two classifiers, got 'skill' with 'main'"),
        ('eed', {'teacher': [-1]}, r"less than two classifiers, got 'skill' with \(-1,\)"),
        ('beed', {}, "teacher_weights must be 'equal' with weights by depth"),
        ('eed', {'teacher_weights': 'best'}, "teacher_weights must be one of equal, skill, got 'best'"),
    ],
)
def test_weights_by_skill_need_several_that_teach_alike(name, settings, message):
    with pytest.raises(MultiExitError, match=message) as caught:
        create_loss(name, **{'teacher_weights': 'skill', **settings})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('weights', [[0.5, 0.4], [1.0, 0.0], [], [0.5, math.nan], 'ab', None])
def test_weights_of_a_checkpoint_are_checked(weights):
    with pytest.raises(MultiExitError, match='skill'):
        create_loss('eed', teacher_weights='skill').set_skill(weights)
    loss = create_loss('eed', teacher_weights='skill')
    loss.set_skill([0.5, 0.5])
    with pytest.raises(MultiExitError, match='skill has 2 weights, but 4 classifiers teach'):
        loss(*random_outputs())


def test_targets_that_cross_entropy_ignores_teach_nothing_about_skill():
    logits, target = torch.randn(3, 5, 4), torch.tensor([1, -100, 0, 3, -100])
    weights = torch.tensor([0.2, 0.3, 0.5])
    expected = skill_gradient(weights, logits[:, target >= 0], target[target >= 0])
    torch.testing.assert_close(skill_gradient(weights, logits, target), expected)
    assert torch.equal(skill_gradient(weights, logits, torch.full((5,), -100)), torch.zeros(3))
