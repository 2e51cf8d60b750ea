"""Backbones that give several outputs: distilled ones in training, and those with an auxiliary classifier."""

import copy

import pytest
import torch
from helpers.members import DEIT
from timm.task import TokenDistillationTask
from torch import nn

from timm_multiexit.losses.multi_exit_loss import create_loss
from timm_multiexit.losses.teachers import KDConfig
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.outputs import DistilledOutputs, ExitOutputs
from timm_multiexit.models.truncation import truncate
from timm_multiexit.training.task import MultiExitTask
from timm_multiexit.utils.errors import InvalidValueError

# One network of every class in timm that has two classifiers.
DISTILLED = {
    DEIT: {'img_size': 64},
    'efficientformer_l1': {},
    'efficientformerv2_s0': {},
    'efficientvim_m1_dist': {},
    'iformer_t': {'distillation': True},
    'levit_128s': {},
    'pit_ti_distilled_224': {},
    'repvit_m1': {},
    'swiftformer_xs': {},
}

SIZE = (3, 64, 64)


def subclasses(cls):
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


@pytest.fixture
def distilled(make_backbone):
    """A small distilled network in distilled training, with exits."""
    model = attach_exits(make_backbone(DEIT, img_size=64, depth=4), [0, 1], input_size=SIZE)
    model.set_distilled_training(True)
    return model.train()


def test_every_distilled_network_of_timm_is_in_the_table(make_empty):
    with_switch = {cls for cls in subclasses(nn.Module) if hasattr(cls, 'set_distilled_training')}
    with_switch = {cls for cls in with_switch if cls.__module__.startswith('timm.models.')}
    made = {base for name, kwargs in DISTILLED.items() for base in type(make_empty(name, **kwargs)).__mro__}
    # LeViT and EfficientViM have a class of their own for it, and so has every other that is only configured here.
    assert {cls for cls in with_switch if cls not in made} == set()


@pytest.mark.parametrize('name', DISTILLED)
def test_exits_answer_in_distilled_training_as_everywhere(make_empty, name):
    model = attach_exits(make_empty(name, num_classes=7, **DISTILLED[name]))
    images = torch.empty(2, *model.input_size, device='meta')
    model.set_distilled_training(True)
    model.train()
    assert [tuple(logits.shape) for logits in model(images)] == [(2, 7)] * 2  # as the plain model
    outputs = model(images, exits=True)
    assert isinstance(outputs, DistilledOutputs)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 7)] * (len(model.exits) + 1)
    assert [tuple(logits.shape) for logits in outputs.tokens] == [(2, 7)] * 2
    assert tuple(model(images, exit_idx=-1).shape) == (2, 7)
    model.set_distilled_training(False)
    assert isinstance(model(images, exits=True), ExitOutputs)
    model.set_distilled_training(True)
    assert isinstance(model.eval()(images, exits=True), ExitOutputs)


def test_main_in_distilled_training_is_the_mean_of_the_two_outputs_of_the_plain_model(distilled):
    images = torch.randn(2, *SIZE)
    first, second = distilled.backbone(images)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(distilled(images), (first, second), strict=True))
    outputs = distilled(images, exits=True)
    assert torch.equal(outputs.tokens[0], first)
    assert torch.equal(outputs.tokens[1], second)
    assert not torch.allclose(first, second, atol=1e-3)
    # The backbone has no dropout and no batch norm: it gives the same out of training, where timm averages.
    answer = distilled.backbone.eval()(images)
    torch.testing.assert_close(outputs.logits[-1], answer)
    assert torch.equal(distilled.backbone.train() and distilled(images, exit_idx=-1), outputs.logits[-1])


@pytest.mark.parametrize('weights', [{}, {'task_loss_weight': 0.3}, {'distill_loss_weight': 2.0}])
@pytest.mark.parametrize('trains_main_alone', [False, True])
def test_labels_and_teacher_reach_main_as_in_timms_token_distillation(
    distilled, make_backbone, weights, trains_main_alone
):
    teacher = make_backbone('test_resnet')
    images, target = torch.randn(4, *SIZE), torch.randint(10, (4,))
    theirs = TokenDistillationTask(
        copy.deepcopy(distilled.backbone), teacher, nn.CrossEntropyLoss(), temperature=2.5, verbose=False, **weights
    )
    theirs(images, target)['loss'].backward()
    kd = KDConfig(temperature=2.5, **weights)
    task = MultiExitTask(
        distilled, create_loss('ce', exit_weights=[0, 0, 1]), teacher=teacher, kd=kd, verbose=False
    ).train()
    task.trains_main_alone = trains_main_alone
    ours = task(images, target)
    ours['loss'].backward()
    expected = theirs(images, target)
    torch.testing.assert_close(ours['loss'], expected['loss'])
    torch.testing.assert_close(ours['output'], distilled(images, exit_idx=-1))
    gradients = {key: param.grad for key, param in theirs.trainable_module.named_parameters()}
    for key in ('head.weight', 'head_dist.weight', 'patch_embed.proj.weight'):
        torch.testing.assert_close(distilled.backbone.get_parameter(key).grad, gradients[key])


def test_ensemble_and_exits_use_the_mean_with_an_outside_teacher_too(distilled, make_backbone):
    teacher = make_backbone('test_resnet').eval()
    images, target = torch.randn(4, *SIZE), torch.randint(10, (4,))
    result = MultiExitTask(distilled, create_loss('eed'), teacher=teacher, verbose=False)(images, target)
    logits = [tensor.detach().double() for tensor in result['logits']]
    mean = sum(logits) / 3
    wanted = (mean / 3).softmax(1)
    for idx in range(3):
        distance = 9 * (wanted * (wanted.log() - (logits[idx] / 3).log_softmax(1))).sum(1).mean()
        torch.testing.assert_close(result['output_distance'][idx].double(), 0.1 * distance, rtol=1e-4, atol=1e-6)
    first, second = distilled.backbone(images)
    torch.testing.assert_close(result['task'][-1], nn.functional.cross_entropy(first, target))
    torch.testing.assert_close(result['logits'][-1], (first + second) / 2)


def test_without_an_outside_teacher_both_classifiers_learn_the_labels_by_their_mean(distilled):
    images, target = torch.randn(4, *SIZE), torch.randint(10, (4,))
    result = MultiExitTask(distilled, create_loss('ce'), verbose=False)(images, target)
    first, second = distilled.backbone(images)
    torch.testing.assert_close(result['task'][-1], nn.functional.cross_entropy((first + second) / 2, target))
    result['loss'].backward()
    left_out = [key for key, param in distilled.named_parameters() if param.grad is None]
    assert left_out == []


# An auxiliary classifier


class WithAuxiliary(nn.Module):
    """A network of two stages with a classifier after the first, as Inception and GoogLeNet have one."""

    def __init__(self, in_eval=True):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.aux, self.fc = nn.Linear(6, 5), nn.Linear(8, 5)
        self.num_classes, self.aux_logits, self.in_eval = 5, True, in_eval
        self.feature_info = [
            {'num_chs': 6, 'reduction': 4, 'module': 'stage1'},
            {'num_chs': 8, 'reduction': 8, 'module': 'stage2'},
        ]

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        first = self.stage1(x)
        main, aux = self.fc(self.stage2(first).mean((2, 3))), self.aux(first.mean((2, 3)))
        return (main, aux) if self.training or self.in_eval else main


@pytest.fixture
def auxiliary():
    return attach_exits(WithAuxiliary(), input_size=SIZE).eval()


def test_main_is_the_first_of_several_outputs_in_all_that_a_model_answers(auxiliary):
    images = torch.randn(5, *SIZE)
    with torch.no_grad():
        main, aux = auxiliary(images)
        assert not torch.allclose(main, aux, atol=1e-3)
        assert torch.equal(auxiliary(images, exits=True).logits[-1], main)
        assert torch.equal(auxiliary(images, exit_idx=1), main)
        assert torch.equal(truncate(auxiliary, -1)(images), main)
    assert torch.equal(auxiliary.infer(images, threshold=1.0).logits, main)
    assert torch.equal(dict(auxiliary.anytime(images))[1], main)
    assert torch.equal(auxiliary.predict(images, deadline_ms=1e6).logits, main)


def test_model_that_gives_several_outputs_in_training_alone_answers_there_too():
    model = attach_exits(WithAuxiliary(in_eval=False), input_size=SIZE).train()
    images = torch.randn(5, *SIZE)
    assert torch.equal(model(images, exits=True).logits[-1], model(images)[0])


def test_auxiliary_classifier_that_would_get_no_loss_is_refused_in_one_line(auxiliary):
    with pytest.raises(InvalidValueError, match=r'aux_logits must be False to train WithAuxiliary, got True') as error:
        MultiExitTask(auxiliary, create_loss('eed'))
    assert '\n' not in str(error.value)
    auxiliary.freeze_backbone()
    result = MultiExitTask(auxiliary, create_loss('ce'))(torch.randn(2, *SIZE), torch.tensor([0, 4]))
    assert [tuple(logits.shape) for logits in result['logits']] == [(2, 5)] * 2


def test_inception_of_timm_answers_by_its_first_output(make_empty):
    model = attach_exits(make_empty('inception_v3', aux_logits=True, num_classes=7))
    images = torch.empty(2, *model.input_size, device='meta')
    for mode in (True, False):
        assert [tuple(logits.shape) for logits in model.train(mode)(images)] == [(2, 7)] * 2
        outputs = model(images, exits=True)
        assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 7)] * (len(model.exits) + 1)
