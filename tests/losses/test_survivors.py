"""Heads that learn from the images that reach them: weights against thresholds tried one by one, and their gradients."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_multiexit.losses.multi_exit_loss import create_loss
from timm_multiexit.losses.survivors import survivor_weights, weigh_survivors
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.training.task import MultiExitTask
from timm_multiexit.utils.errors import MultiExitError


class Outputs(NamedTuple):
    logits: tuple
    features: tuple | None = None


def random_logits(exits=3, batch=6, classes=4):
    return [(2 * torch.randn(batch, classes, dtype=torch.float64)).requires_grad_() for _ in range(exits + 1)]


def test_weight_is_the_share_of_thresholds_at_which_an_image_arrives():
    logits = [tensor.detach() for tensor in random_logits()]
    thresholds = (np.arange(2000) + 0.5) / 2000
    arrives = torch.zeros(3, 6, dtype=torch.float64)
    for threshold in thresholds:
        policy = ExitPolicy('confidence', (float(threshold),) * 3)
        left = apply_policy(policy, logits).exit_idx
        for exit_idx in range(3):
            arrives[exit_idx] += left >= exit_idx
    arrives /= len(thresholds)
    weights = survivor_weights(logits[:3])
    assert len(weights) == 3
    assert torch.equal(arrives[0], torch.ones(6, dtype=torch.float64))
    for row, weight in zip(arrives, weights, strict=True):
        torch.testing.assert_close(weight, row / row.mean(), rtol=0, atol=0.01)
        assert weight.mean().item() == pytest.approx(1.0)


def test_weights_of_sure_classifiers_are_exact():
    # 1 - c is e^-30 and e^-40, which is 0 in float32 where c is subtracted from 1.
    logits = [torch.tensor([[30.0, 0.0], [40.0, 0.0]]), torch.zeros(2, 2)]
    ratio = np.exp(-10.0)
    assert survivor_weights(logits)[1].tolist() == pytest.approx([2 / (1 + ratio), 2 * ratio / (1 + ratio)], rel=1e-5)


@pytest.mark.parametrize('name', ['ce', 'phuong', 'eed'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_gradient_is_that_of_weighted_means_and_values_are_those_of_all_images(name, smoothing):
    logits, target = random_logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    loss = create_loss(name, survivors=True, criterion=criterion)
    plain = create_loss(name, criterion=criterion)
    terms, wanted = loss.terms(Outputs(tuple(logits)), target), plain.terms(Outputs(tuple(logits)), target)
    for value, other in zip(terms, wanted, strict=True):
        assert (value is None) == (other is None)
        if value is not None:
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    # The twin: one image after the other, its terms of an exit times its weight there.
    total = 0.0
    weights = survivor_weights([tensor.detach() for tensor in logits[:3]])
    teacher = {'ce': None, 'phuong': logits[3], 'eed': torch.stack(logits).mean(0)}[name]
    for row in range(6):
        for idx, tensor in enumerate(logits):
            term = F.cross_entropy(tensor[row : row + 1], target[row : row + 1], label_smoothing=smoothing)
            if teacher is not None and not (name == 'phuong' and idx == 3):
                fixed = F.softmax(teacher[row].detach() / 3, -1)
                term = term + 0.9 * F.kl_div(F.log_softmax(tensor[row] / 3, -1), fixed, reduction='sum')
            total = total + (weights[idx][row] if idx < 3 else 1.0) * term / 6
    got, expected = torch.autograd.grad(terms.loss, logits), torch.autograd.grad(total, logits)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(got[2], torch.autograd.grad(wanted.loss, logits)[2])


def test_features_are_weighed_too():
    logits = [tensor.detach() for tensor in random_logits()]
    features = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    loss = create_loss('eed', survivors=True, feature_weight=1.0, output_weight=0.0)
    outputs, target = Outputs(tuple(logits), tuple(features)), torch.zeros(6, dtype=torch.int64)
    (gradient,) = torch.autograd.grad(loss(outputs, target), features[2:3])
    mean = torch.stack(features).mean(0).detach()
    weight = survivor_weights(logits[:3])[2].unsqueeze(-1)
    torch.testing.assert_close(gradient, weight * 2 * (features[2] - mean).detach() / 30)


def test_main_and_the_first_exit_learn_from_all_images():
    logits = random_logits()
    weighed = weigh_survivors(logits, logits)
    assert weighed[-1] is logits[-1]
    for idx, is_same in ((0, True), (1, False), (2, False)):
        assert torch.equal(weighed[idx], logits[idx])
        (gradient,) = torch.autograd.grad(weighed[idx].sum(), logits[idx])
        assert torch.equal(gradient, torch.ones_like(gradient)) == is_same


def test_step_on_a_frozen_backbone_moves_heads_alone(make_model):
    model = make_model(input_size=(3, 32, 32))
    model.freeze_backbone()
    task = MultiExitTask(model, create_loss('ce', survivors=True), verbose=False)
    result = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    result['loss'].backward()
    names = {name for name, param in model.named_parameters() if param.grad is not None and param.grad.abs().sum() > 0}
    assert len(names) >= 6
    assert {name.split('.')[0] for name in names} == {'exits'}
    assert {name.split('.')[1] for name in names} == {'0', '1', '2'}


def test_survivors_need_classes_that_exclude_each_other():
    with pytest.raises(MultiExitError, match='survivors must be False with multi_label, got True'):
        create_loss('ce', survivors=True, multi_label=True)
    with pytest.raises(MultiExitError, match='survivors must be a bool, got 1'):
        create_loss('ce', survivors=1)
    assert repr(create_loss('ce', survivors=True)).endswith('survivors=True)')


def test_classes_that_are_masked_out_change_nothing():
    logits = [single.detach().index_fill(1, torch.tensor([2]), -torch.inf) for single in random_logits()]
    leaves = [single.requires_grad_() for single in logits]
    target = torch.tensor([0, 1, 3, 0, 1, 3])
    losses = [create_loss('ce', survivors=on)(Outputs(leaves), target) for on in (False, True)]
    assert losses[0].isfinite()
    torch.testing.assert_close(losses[1], losses[0])
    losses[1].backward()
    assert all(single.grad.isfinite().all() for single in leaves)
