"""The training step: an outside teacher beside the exits, the phase with a frozen backbone, and what is clipped."""

import copy
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.task import DistillationTeacher, LogitDistillationTask
from torch import nn

from timm_multiexit.losses.multi_exit_loss import create_loss
from timm_multiexit.losses.teachers import DepthWeights, KDConfig
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.training.task import MultiExitTask
from timm_multiexit.utils.errors import MultiExitError

SIZE = (3, 32, 32)


def make_batch(size=4, classes=10):
    return torch.randn(size, *SIZE), torch.randint(classes, (size,))


def give_pixels(model, mean, std):
    """Let a model expect images normalised so."""
    model.pretrained_cfg = {**model.pretrained_cfg, 'mean': mean, 'std': std}
    return model


@pytest.fixture
def make_teacher(make_backbone):
    """Return a function that makes a plain model which expects other pixels than test_resnet."""

    def make(**kwargs):
        return give_pixels(make_backbone('test_efficientnet', **kwargs), (0.2, 0.3, 0.4), (0.5, 0.6, 0.7))

    return make


# ---- An outside teacher


@pytest.mark.parametrize(
    'weights',
    [
        {},
        {'task_loss_weight': 0.3},
        {'distill_loss_weight': 2.0},
        {'task_loss_weight': 0.3, 'distill_loss_weight': 2.0},
    ],
)
@pytest.mark.parametrize('is_same_pixels', [False, True])
def test_main_alone_has_the_loss_of_timm(make_model, make_teacher, weights, is_same_pixels):
    model, teacher, batch = make_model(input_size=SIZE).eval(), make_teacher(), make_batch()
    if is_same_pixels:
        give_pixels(teacher, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])
    theirs = LogitDistillationTask(
        copy.deepcopy(model), copy.deepcopy(teacher), nn.CrossEntropyLoss(), temperature=2.5, verbose=False, **weights
    )(*batch)
    loss = create_loss('ce', exit_weights=[0, 0, 0, 1])
    ours = MultiExitTask(model, loss, teacher=teacher, kd=KDConfig(temperature=2.5, **weights), verbose=False)(*batch)
    torch.testing.assert_close(ours['loss'], theirs['loss'])
    assert ours['kd_distance'][-1] > 0


def test_exits_learn_from_the_outside_teacher_and_from_each_other(make_model, make_teacher):
    model, teacher, (images, target) = make_model(input_size=SIZE).eval(), make_teacher().eval(), make_batch()
    result = MultiExitTask(model, create_loss('eed'), teacher=teacher, verbose=False)(images, target)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    pixels = images * std + mean
    theirs = torch.tensor((0.2, 0.3, 0.4)).view(1, 3, 1, 1), torch.tensor((0.5, 0.6, 0.7)).view(1, 3, 1, 1)
    wanted = F.softmax(teacher((pixels - theirs[0]) / theirs[1]) / 4, 1)
    distances = [
        16 * F.kl_div(F.log_softmax(logits / 4, 1), wanted, reduction='batchmean') for logits in result['logits']
    ]
    torch.testing.assert_close(result['kd_distance'], torch.stack(distances).detach())
    plain = MultiExitTask(model, create_loss('eed'), verbose=False)(images, target)
    torch.testing.assert_close(result['loss'], plain['loss'] + sum(distances))
    assert 'kd_distance' not in plain


def test_the_teacher_is_frozen_and_part_of_nothing_that_trains(make_model, make_teacher):
    model, teacher = make_model(input_size=SIZE), make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    task = MultiExitTask(model, create_loss('eed'), teacher=teacher, verbose=False).train()
    assert task.training
    assert not any(module.training for module in teacher.modules())
    task.setup_ema()
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=0.1)
    task(*make_batch())['loss'].backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(param.grad is None and not param.requires_grad for param in teacher.parameters())
    assert set(task.get_checkpoint_state()['state_dict']) == set(model.state_dict())
    assert set(task.get_checkpoint_state(ema=True)['state_dict_ema']) == set(model.state_dict())
    assert len(list(task.get_clip_parameters())) == len(list(model.parameters()))


def test_the_teacher_runs_in_the_context_it_is_given(make_model, make_teacher):
    seen = []

    @contextmanager
    def autocast():
        with torch.autocast('cpu', torch.bfloat16):
            yield

    teacher = make_teacher()
    teacher.conv_stem.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    for context in ({'autocast': autocast}, {}):
        MultiExitTask(make_model(input_size=SIZE), create_loss('ce'), teacher=teacher, **context)(*make_batch())
    with torch.autocast('cpu', torch.bfloat16):
        MultiExitTask(make_model(input_size=SIZE), create_loss('ce'), teacher=teacher)(*make_batch())
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_under_accelerate_teacher_and_model_run_in_the_same_precision(make_model, make_teacher):
    accelerator, seen = Accelerator(cpu=True, mixed_precision='bf16'), []
    model, teacher = make_model(input_size=SIZE), make_teacher()
    for conv in (model.backbone.conv1[0], teacher.conv_stem):
        conv.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    task = MultiExitTask(model, create_loss('ce'), teacher=teacher, autocast=accelerator.autocast, verbose=False)
    task.trainable_module = accelerator.prepare_model(task.trainable_module)
    result = task(*make_batch())
    accelerator.backward(result['loss'])
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert result['kd_distance'].dtype == torch.float32


@pytest.mark.parametrize('is_same_pixels', [False, True])
@pytest.mark.parametrize('dtypes', [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_model_and_teacher_may_differ_in_precision(make_model, make_teacher, dtypes, is_same_pixels):
    model, teacher, (images, target) = make_model(input_size=SIZE).eval(), make_teacher().eval(), make_batch()
    if is_same_pixels:
        give_pixels(teacher, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])
    wanted = MultiExitTask(model, create_loss('ce'), teacher=copy.deepcopy(teacher), verbose=False)(images, target)
    task = MultiExitTask(model.to(dtypes[0]), create_loss('ce'), teacher=teacher.to(dtypes[1]), verbose=False)
    got = task(images.to(dtypes[0]), target)
    torch.testing.assert_close(got['kd_distance'], wanted['kd_distance'], rtol=0.1, atol=0.05)


@pytest.mark.parametrize('form', ['module', 'wrapped', 'name'])
def test_a_teacher_is_a_module_a_teacher_of_timm_or_a_name(make_model, make_teacher, tmp_path, form):
    teacher, model, batch = make_teacher().eval(), make_model(input_size=SIZE).eval(), make_batch()
    teacher.pretrained_cfg['num_classes'] = 10
    given = teacher
    if form == 'wrapped':
        given = DistillationTeacher(teacher)
    elif form == 'name':
        save_for_hf(teacher, tmp_path)
        given = f'local-dir:{tmp_path}'
    wanted = MultiExitTask(model, create_loss('ce'), teacher=copy.deepcopy(teacher), verbose=False)(*batch)
    got = MultiExitTask(model, create_loss('ce'), teacher=given, verbose=False)(*batch)
    torch.testing.assert_close(got['kd_distance'], wanted['kd_distance'])


@pytest.mark.parametrize('form', ['module', 'name'])
def test_a_teacher_of_other_classes_is_refused(make_model, make_teacher, tmp_path, form):
    teacher = make_teacher(num_classes=7)
    teacher.pretrained_cfg['num_classes'] = 7
    if form == 'name':
        # timm would give it ten classes with a fresh classifier.
        save_for_hf(teacher, tmp_path)
        teacher = f'local-dir:{tmp_path}'
    with pytest.raises(MultiExitError, match='must have the 10 classes of the model, got .* with 7'):
        MultiExitTask(make_model(input_size=SIZE), create_loss('ce'), teacher=teacher, verbose=False)


def test_a_teacher_of_other_channels_is_refused(make_model, make_teacher):
    with pytest.raises(MultiExitError, match='take images of 3 channels, as the model does, got EfficientNet for 1.'):
        MultiExitTask(make_model(input_size=SIZE), create_loss('ce'), teacher=make_teacher(in_chans=1), verbose=False)


def test_a_teacher_of_grey_images_sees_them_as_prepared(make_backbone, make_teacher):
    model = attach_exits(make_backbone('test_resnet', in_chans=1), [1], input_size=(1, 32, 32)).eval()
    teacher, images = make_teacher(in_chans=1).eval(), torch.randn(4, 1, 32, 32)
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ('mean', 'std'))
    wanted = teacher((images * std + mean - 0.3) / 0.6)
    task = MultiExitTask(model, create_loss('ce'), teacher=teacher, verbose=False)
    torch.testing.assert_close(task._outside_logits(images), wanted)


def test_weights_without_an_outside_teacher_are_refused(make_model):
    with pytest.raises(MultiExitError, match='needs an outside teacher'):
        MultiExitTask(make_model(input_size=SIZE), create_loss('ce'), kd=KDConfig(), verbose=False)


@pytest.mark.slow
def test_the_teacher_is_compiled_with_the_model(make_model, make_teacher):
    model, batch = make_model(input_size=SIZE).eval(), make_batch()
    task = MultiExitTask(model, create_loss('ce'), teacher=make_teacher(), verbose=False).eval()
    wanted, graphs = task(*batch), []
    task.compile(backend=lambda module, _: graphs.append(module) or module.forward)
    torch.testing.assert_close(task(*batch)['kd_distance'], wanted['kd_distance'])
    assert len(graphs) >= 2
    assert not task.train().teacher.model.training


# ---- What does not fit is refused before training


@pytest.mark.parametrize(
    ('loss', 'message'),
    [
        (lambda: create_loss('eed', exit_weights=[1.0] * 3), 'exit_weights has 3 values, but the model has 4'),
        (lambda: create_loss('eed', teacher=[5]), r'the model has 4 classifiers, got \[5\]'),
        (lambda: create_loss('beed', depth_weights=DepthWeights(1.6, 1.3)), 'at most 2 exits'),
    ],
)
def test_a_loss_that_does_not_fit_the_model_is_refused_before_the_first_step(make_model, loss, message):
    with pytest.raises(MultiExitError, match=message):
        MultiExitTask(make_model(input_size=SIZE), loss(), verbose=False)


# ---- The phase in which only the heads learn


@pytest.mark.parametrize('name', ['ce', 'phuong', 'byot', 'eed', 'beed'])
def test_heads_learn_alone_on_a_frozen_backbone_without_distillation(make_model, name):
    model = make_model(input_size=SIZE, head='linear')
    model.add_projectors()
    model.freeze_backbone()
    loss = create_loss(name, feature_weight=None if name == 'ce' else 1.0)
    loss.distill_scale = 0.0
    task = MultiExitTask(model, loss, verbose=False).train()
    result = task(*make_batch())
    assert not result['output'].requires_grad
    result['loss'].backward()
    for head in model.exits:
        assert head.fc.weight.grad.abs().sum() > 0
        if name != 'ce' and head.projector is not None:
            # Zero, but there: distributed training waits for every parameter.
            assert torch.equal(head.projector.weight.grad, torch.zeros_like(head.projector.weight))
    assert all(param.grad is None for param in model.backbone.parameters())


# ---- What is clipped, and how it is measured


def clipped_names(model):
    clipped = {id(param) for param in MultiExitTask(model, create_loss('ce')).get_clip_parameters(exclude_head=True)}
    return {name for name, param in model.named_parameters() if id(param) not in clipped}


@pytest.mark.parametrize(
    ('name', 'classifiers', 'kwargs'),
    [
        ('test_resnet', ['fc'], {}),
        ('test_convnext', ['head.fc'], {}),
        ('deit_tiny_distilled_patch16_224', ['head', 'head_dist'], {'depth': 4, 'embed_dim': 24, 'num_heads': 2}),
    ],
)
def test_every_classifier_is_left_out_of_clipping(name, classifiers, kwargs):
    model = attach_exits(timm.create_model(name, num_classes=10, **kwargs), 2)
    wanted = {f'{part}.{kind}' for part in classifiers for kind in ('weight', 'bias')}
    wanted = {f'backbone.{part}' for part in wanted} | {
        f'exits.{i}.fc.{kind}' for i in (0, 1) for kind in ('weight', 'bias')
    }
    assert clipped_names(model) == wanted


def test_a_model_without_classes_has_no_classifier_to_leave_out(make_model):
    model = make_model(input_size=SIZE)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert clipped_names(model) == set()


@pytest.mark.parametrize(('multi_label', 'column'), [(False, 'top1'), (True, 'map')])
def test_the_evaluator_measures_what_the_loss_trains(make_model, multi_label, column):
    task = MultiExitTask(make_model(input_size=SIZE), create_loss('ce', multi_label=multi_label), verbose=False)
    evaluator = task.create_evaluator()
    logits, labels = torch.rand(10, 10) + 2 * torch.eye(10), torch.arange(10)
    evaluator.update((logits,) * 4, F.one_hot(labels, 10).float() if multi_label else labels)
    assert {name: row[column] for name, row in evaluator.compute().items()} == pytest.approx(
        dict.fromkeys(['exit0', 'exit1', 'exit2', 'main', 'ens'], 100.0)
    )


# ---- Teachers by skill


def test_weights_by_skill_are_kept_with_the_task(make_model):
    task, (images, target) = (
        MultiExitTask(make_model(input_size=SIZE), create_loss('eed', teacher_weights='skill')),
        make_batch(),
    )
    assert 'teacher_skill' not in task.get_task_state()
    task(images, target)
    state = task.get_task_state()
    assert len(state['teacher_skill']) == 4
    assert state['teacher_skill'] != [0.25] * 4
    other = MultiExitTask(make_model(input_size=SIZE), create_loss('eed', teacher_weights='skill'))
    other.load_task_state(state)
    assert torch.equal(other.loss.skill, task.loss.skill)
    equal = MultiExitTask(make_model(input_size=SIZE), create_loss('eed'))
    equal.load_task_state(state)
    assert equal.loss.skill is None
    assert 'teacher_skill' not in equal.get_task_state()
