"""Model, task, loss and regime are what the flags say."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.layers import SplitBatchNorm2d
from timm.models import resolve_model_input_args

import timm_multiexit as tme
from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.source import find_source
from timm_multiexit.cli.build_model import create_regime, create_train_model, model_kwargs, place_model
from timm_multiexit.cli.build_training import create_criterion, create_task, create_train_optimizer, resolve_lr
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.training.regimes import Regime

BASE = ('--model', 'test_resnet', '--img-size', '32', '--num-classes', '3', '--data-dir', 'images')
CPU = torch.device('cpu')


def parse(*flags):
    return parse_train_args([*BASE, *map(str, flags)])


def find(args):
    return find_source(args.model, **args.model_kwargs)


def build(args):
    return create_train_model(args, find(args), num_classes=3)


def one_hot(target):
    return F.one_hot(target, 3).float()


def smoothed_ce(x, target, smoothing=0.1):
    logs = x.log_softmax(1)
    return -((1 - smoothing) * logs[range(len(x)), target] + smoothing * logs.mean(1)).mean()


def bce(x, target, weight=1.0, pos_weight=1.0):
    terms = -(pos_weight * target * F.logsigmoid(x) + (1 - target) * F.logsigmoid(-x))
    return (weight * terms).mean()


def poly(x, target, epsilon):
    true = x.softmax(1)[range(len(x)), target]
    return (-true.log() + epsilon * (1 - true)).mean()


def asymmetric(x, target):
    logs, chance, hot = x.log_softmax(1), x.softmax(1), one_hot(target)
    focus = torch.where(hot > 0, 1 - chance, chance) ** torch.where(hot > 0, 1.0, 4.0)
    return -(hot * logs * focus).sum(1).mean()


def jsd(x, target):
    clean, other = x.chunk(2)
    chances = [clean.softmax(1), other.softmax(1)]
    mixed = (sum(chances) / 2).clamp(1e-7, 1).log()
    distance = sum((chance * (chance.log() - mixed)).sum(1).mean() for chance in chances) / 2
    return F.cross_entropy(clean, target[: len(clean)]) + 12 * distance


NO_SMOOTHING = ('--smoothing', '0')
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])
CRITERIA = {
    'smoothing': ((), smoothed_ce),
    'smoothing-0.3': (('--smoothing', '0.3'), lambda x, t: smoothed_ce(x, t, 0.3)),
    'ce': (NO_SMOOTHING, F.cross_entropy),
    'bce': (('--bce-loss', *NO_SMOOTHING), lambda x, t: bce(x, one_hot(t))),
    'bce-smoothed': (('--bce-loss',), lambda x, t: bce(x, one_hot(t) * 0.9 + 0.1 / 3)),
    'bce-sum': (('--loss', 'bce', '--bce-sum', *NO_SMOOTHING), lambda x, t: 3 * bce(x, one_hot(t))),
    'pos-weight': (
        ('--bce-loss', '--bce-pos-weight', '2', *NO_SMOOTHING),
        lambda x, t: bce(x, one_hot(t), pos_weight=2.0),
    ),
    'class-weight': (
        ('--bce-loss', '--loss-class-weight', '1,2,0.5', *NO_SMOOTHING),
        lambda x, t: bce(x, one_hot(t), weight=WEIGHTS),
    ),
    'class-stats': (
        ('--bce-loss', '--class-stats', 'stats.json', '--loss-pos-weight', 'neg_pos', *NO_SMOOTHING),
        lambda x, t: bce(x, one_hot(t), pos_weight=torch.tensor([3.0, 1.0, 1 / 3])),
    ),
    'poly': (('--loss', 'poly', '--poly-epsilon', '1.5', *NO_SMOOTHING), lambda x, t: poly(x, t, 1.5)),
    'asl': (('--loss', 'asl', *NO_SMOOTHING), asymmetric),
    'jsd': (('--jsd-loss', '--aug-splits', '2', *NO_SMOOTHING), jsd),
}


@pytest.mark.parametrize(('flags', 'by_hand'), CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize('exits', [(), ('--exits', 'auto')], ids=['plain', 'exits'])
def test_criterion_is_that_of_the_flags(exits, flags, by_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'stats.json').write_text(json.dumps({'pos_counts': [10, 20, 30], 'num_samples': 40}))
    args = parse(*flags, *exits)
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(create_criterion(args, 3)(logits, target), by_hand(logits, target))
    # And in the task: the sum over all classifiers.
    model = build(args)
    task = create_task(args, model, CPU).eval()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        outputs = model(images, exits=True).logits if exits else (model(images),)
        expected = sum(by_hand(single, target) for single in outputs)
        torch.testing.assert_close(task(images, target)['loss'], expected)


def test_soft_targets_above_the_threshold_are_one():
    args = parse('--bce-loss', '--bce-target-thresh', '0.2', '--mixup', '0.2')
    logits, target = torch.randn(2, 3), torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.0, 0.9]])
    expected = bce(logits, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(create_criterion(args, 3)(logits, target), expected)


@pytest.mark.parametrize('model', ['test_resnet', 'test_vit', 'deit_tiny_distilled_patch16_224'])
@pytest.mark.parametrize('exits', [(), ('--exits', '2')], ids=['plain', 'exits'])
def test_fresh_classifiers_start_as_they_are_told(exits, model):
    flags = ('--model', model, *exits)
    plain, scaled = (
        (torch.manual_seed(0), build(parse(*flags, *more)))[1]
        for more in ((), ('--head-init-scale', '0.25', '--head-init-bias', '-2'))
    )
    state, names = plain.state_dict(), []
    for key, tensor in scaled.state_dict().items():
        name = key.removeprefix('backbone.')
        is_classifier = name.startswith(('fc.', 'head.', 'head_dist.')) or (key.startswith('exits.') and '.fc.' in key)
        names += [key] if is_classifier else []
        if is_classifier:
            expected = torch.full_like(tensor, -2.0) if key.endswith('bias') else state[key] * 0.25
        else:
            expected = state[key]
        assert torch.equal(tensor, expected), key
    count = (2 if 'distilled' in model else 1) + (2 if exits else 0)
    assert len(names) == 2 * count


@pytest.mark.parametrize('exits', [(), ('--eed',)], ids=['plain', 'exits'])
def test_split_norms_have_statistics_of_their_own_for_each_split(exits):
    args = parse('--aug-splits', '3', '--jsd-loss', '--split-bn', *exits)
    model = build(args)
    norms = [module for module in model.modules() if isinstance(module, SplitBatchNorm2d)]
    assert {module.num_splits for module in norms} == {3}
    assert not [module for module in model.modules() if type(module) is torch.nn.BatchNorm2d and module not in
                {aux for norm in norms for aux in norm.aux_bn}]  # fmt: skip
    # Three splits of very different brightness.
    images = torch.cat([torch.randn(4, 3, 32, 32) + shift for shift in (0.0, 5.0, -5.0)])
    create_task(args, model, CPU).train()(images, torch.arange(12) % 3)['loss'].backward()
    means = [norms[0].running_mean, *(aux.running_mean for aux in norms[0].aux_bn)]
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in ((means[0], means[1]), means[1:]))


@pytest.fixture
def teacher(tmp_path):
    """A folder of a trained network without exits, and the network."""
    torch.manual_seed(3)
    model = timm.create_model('test_resnet', num_classes=3).eval()
    tme.save_pretrained(model, tmp_path / 'teacher')
    return f'local-dir:{tmp_path / "teacher"}', model


KD = {
    'logit': ('--kd-temperature', '2'),
    'feature': ('--kd-distill-type', 'feature'),
    'token': ('--kd-distill-type', 'token', '--model', 'deit_tiny_distilled_patch16_224', '--kd-temperature', '2'),
}


@pytest.mark.parametrize('kind', KD)
def test_outside_teacher_of_a_plain_network(kind, teacher):
    name, network = teacher
    args = parse(*KD[kind], '--kd-model-name', name, '--task-loss-weight', '0.5', '--distill-loss-weight', '3')
    model = build(args)
    task = create_task(args, model, CPU).eval()
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        # The teacher sees the images as its own configuration normalizes them.
        (own_mean, own_std), (mean, std) = (
            [torch.tensor(net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std')]
            for net in (model, network)
        )
        wanted = network((images * own_std + own_mean - mean) / std)
        if kind == 'token':
            model.eval().set_distilled_training(True)
            model.train()
            main, student = model(images)
        else:
            main = student = model(images)
        if kind == 'feature':
            ours, theirs = (net.forward_head(net.forward_features(images), pre_logits=True) for net in (model, network))
            distance = F.mse_loss(task.trainable_module.projection(ours) if _has_projection(task) else ours, theirs)
        else:
            distance = F.kl_div((student / 2).log_softmax(1), (wanted / 2).softmax(1), reduction='batchmean') * 4
        if kind == 'token':
            task.train()
        result = task(images, target)
    torch.testing.assert_close(result['loss'], 0.5 * smoothed_ce(main, target) + 3 * distance, rtol=1e-3, atol=1e-5)


def _has_projection(task):
    return getattr(task.trainable_module, 'projection', None) is not None


@pytest.mark.parametrize('flags', [(), ('--eed',)], ids=repr)
def test_auxiliary_classifier_without_a_loss_is_refused_in_one_line(flags):
    args = parse('--model', 'inception_v3', '--model-kwargs', 'aux_logits=True', '--img-size', '299', *flags)
    with torch.device('meta'):
        model = build(args)
    with pytest.raises(tme.MultiExitError, match='aux_logits must be False to train InceptionV3, got True') as error:
        create_task(args, model, CPU)
    assert '\n' not in str(error.value)


def test_outside_teacher_of_every_classifier(teacher):
    name, network = teacher
    args = parse('--exit-loss', 'ce', '--kd-model-name', name, '--kd-temperature', '2', '--distill-loss-weight', '3')
    model = build(args)
    task = create_task(args, model, CPU).eval()
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        wanted = (network(images) / 2).softmax(1)
        logits = model(images, exits=True).logits
        distances = [4 * F.kl_div((z / 2).log_softmax(1), wanted, reduction='batchmean') for z in logits]
        tasks = [smoothed_ce(z, target) for z in logits]
        result = task(images, target)
    torch.testing.assert_close(result['loss'], sum(tasks) + 3 * sum(distances), rtol=1e-4, atol=1e-5)


@pytest.fixture
def folders(tmp_path):
    """A folder without exits and one with, and a checkpoint of each."""
    plain = timm.create_model('test_resnet', num_classes=3)
    model = tme.create_model('test_resnet', num_classes=3)
    tme.save_pretrained(plain, tmp_path / 'plain')
    tme.save_pretrained(model, tmp_path / 'exits')
    torch.save({'state_dict': plain.state_dict()}, tmp_path / 'plain.pth.tar')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'exits.pth.tar')
    return tmp_path


REGIMES = {
    'fresh': ((), ('joint', 0, 0.0)),
    'fresh-heads-of-a-trained-backbone': (('--model', 'local-dir:{}/plain', '--pretrained'), ('joint', 0, 1.0)),
    'fresh-heads-of-weights': (('--initial-checkpoint', '{}/plain.pth.tar'), ('joint', 0, 1.0)),
    'trained-heads': (('--model', 'local-dir:{}/exits', '--pretrained'), ('joint', 0, 0.0)),
    'trained-heads-of-weights': (('--initial-checkpoint', '{}/exits.pth.tar'), ('joint', 0, 0.0)),
    'told-0': (('--model', 'local-dir:{}/plain', '--pretrained', '--head-warmup-epochs', '0'), ('joint', 0, 0.0)),
    'told-2.5': (('--head-warmup-epochs', '2.5'), ('joint', 0, 2.5)),
    'frozen': (('--model', 'local-dir:{}/plain', '--pretrained', '--regime', 'frozen'), ('frozen', 0, 0.0)),
    'mixed': (('--regime', 'mixed', '--epochs', '9'), ('mixed', 4, 1.0)),
    'mixed-told': (('--regime', 'mixed', '--backbone-epochs', '2', '--epochs', '9'), ('mixed', 2, 1.0)),
    'other-exits-of-a-folder': (('--model', 'local-dir:{}/exits', '--pretrained', '--exits', '1'), ('joint', 0, 1.0)),
}


@pytest.mark.parametrize(('flags', 'expected'), REGIMES.values(), ids=REGIMES.keys())
def test_fresh_heads_of_a_trained_backbone_warm_up_and_no_others(flags, expected, folders):
    args = parse('--eed', *(flag.format(folders) for flag in flags))
    regime = create_regime(args, build(args), find(args))
    assert (regime.name, regime.backbone_epochs, regime.head_warmup_epochs) == expected


REFUSED = {
    'model-kwargs': (('--model-kwargs', 'bogus=1'), "Cannot create test_resnet: .*'bogus'"),
    'pool': (('--gp', 'bogus'), 'Cannot create test_resnet: Invalid pool type: bogus'),
    'keyword': (('--model', 'test_vit', '--drop-block', '0.1'), "Cannot create test_vit: .*'drop_block_rate'"),
    'weights': (('--pretrained', '--pretrained-path', 'nowhere.pth'), '--pretrained-path must be a file, got nowhere'),
    'checkpointing': (
        ('--model', 'dla46x_c', '--grad-checkpointing'),
        '--grad-checkpointing is not supported by dla46x_c',
    ),
    'opt-kwargs': (('--opt', 'adamw', '--opt-kwargs', 'bogus=1'), "Cannot create --opt adamw: .*'bogus'"),
    'momentum': (('--momentum', '0'), 'Cannot create --opt sgd: Nesterov momentum requires'),
    'betas': (('--opt', 'adamw', '--opt-betas', '0.9'), 'Cannot create --opt adamw: '),
    'teacher': (('--kd-model-name', 'local-dir:nowhere'), 'nowhere is not a model folder'),
    'classes': (('--num-classes', '2'), '--num-classes must be at least 3, the classes of the data, got 2'),
}


@pytest.mark.parametrize(
    ('flags', 'num_classes', 'is_told'), [((), 4, True), ((), 10, False), (('--num-classes', '4'), 4, False)]
)
def test_trained_classifier_of_more_classes_than_the_data_is_warned_of(flags, num_classes, is_told, tmp_path, caplog):
    tme.save_pretrained(timm.create_model('test_resnet', num_classes=10), tmp_path / 'net')
    words = ['--data-dir', 'images', '--model', f'local-dir:{tmp_path / "net"}', '--pretrained', *flags]
    args = parse_train_args(words)
    create_train_model(args, find_source(args.model), num_classes=num_classes)
    line = 'The model has 10 classes and the data 4: add --num-classes 4'
    assert (line in caplog.text) == is_told


@pytest.mark.parametrize(('flags', 'message'), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_made_is_one_line(flags, message):
    def build_all():
        args = parse(*flags)
        model = build(args)
        create_task(args, model, CPU)
        create_train_optimizer(args, model, Regime(), lr=0.1)

    with pytest.raises(tme.MultiExitError, match=message) as error:
        build_all()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('flags', 'lr'),
    [
        (('--lr', '0.3'), 0.3),
        (('--lr', '0'), 0.0),
        (('--lr-base', '0.1', '--lr-base-size', '256', '--opt', 'sgd'), 0.1 * 64 * 2 / 256),
        (('--lr-base', '0.1', '--lr-base-size', '256', '--opt', 'adamw'), 0.1 * (64 * 2 / 256) ** 0.5),
        (('--lr-base', '0.1', '--opt', 'adamw', '--lr-base-scale', 'linear'), 0.1 * 64 * 2 / 256),
    ],
    ids=['given', 'zero', 'linear', 'sqrt', 'told'],
)
def test_learning_rate_grows_with_the_global_batch(flags, lr):
    args = parse('--grad-accum-steps', '2', *flags)
    optimizer = create_train_optimizer(args, build(args), Regime(), lr=resolve_lr(args, 64, 1)[0])
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([lr] * len(optimizer.param_groups))


def test_layer_decay_needs_no_schedule():
    rates = {}
    for sched in ('none', 'cosine'):
        args = parse('--layer-decay', '0.5', '--sched', sched)
        optimizer = create_train_optimizer(args, build(args), Regime(), lr=0.1)
        # A schedule of timm's multiplies by `lr_scale` itself.
        rates[sched] = [group['lr'] * group.get('lr_scale', 1.0) for group in optimizer.param_groups]
        assert ('lr_scale' in optimizer.param_groups[0]) == (sched == 'cosine')
    assert rates['none'] == pytest.approx(rates['cosine'])
    assert min(rates['none']) < 0.05


@pytest.mark.parametrize('exits', [(), ('--exits', '1')], ids=['plain', 'exits'])
def test_weight_of_the_task_that_leaves_the_teacher_less_than_nothing_is_refused(exits, teacher):
    args = parse('--kd-model-name', teacher[0], '--task-loss-weight', '2', *exits)
    with pytest.raises(tme.MultiExitError, match=r'must be in \[0, 1\]'):
        create_task(args, build(args), CPU)


def test_placed_model_has_type_and_memory_format():
    args = parse('--eed', '--model-dtype', 'bfloat16', '--channels-last')
    model = place_model(args, build(args), Accelerator(cpu=True))
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


SAVED = {
    'vit': ('test_vit', {}),
    'vit-96': ('test_vit', {'img_size': 96}),
    'vit-dynamic': ('test_vit', {'dynamic_img_size': True}),
    'vit-dynamic-96': ('test_vit', {'img_size': 96, 'dynamic_img_size': True}),
    'resnet': ('test_resnet', {}),
}
ASKED = {'nothing': (), 'flag': ('--img-size', '64'), 'keyword': ('--model-kwargs', 'img_size=48')}
ASKED['both'] = ASKED['flag'] + ASKED['keyword']


@pytest.mark.parametrize('name', ['local-dir', 'registry'])
@pytest.mark.parametrize('asked', ASKED.values(), ids=ASKED)
@pytest.mark.parametrize('saved', SAVED.values(), ids=SAVED)
def test_image_size_is_that_which_timm_finds(saved, asked, name, tmp_path):
    architecture, kwargs = saved
    model, own = architecture, None
    if name == 'local-dir':
        tme.save_pretrained(timm.create_model(architecture, **kwargs), tmp_path / 'net')
        model = f'local-dir:{tmp_path / "net"}'
        own = read_model_config(tmp_path / 'net').model_args.get('img_size')
    args = parse_train_args(['--model', model, '--num-classes', '3', '--data-dir', 'images', *asked])
    try:
        expected = resolve_model_input_args(model, vars(args), **args.model_kwargs).get('img_size')
    except ValueError as error:
        with pytest.raises(tme.MultiExitError, match=str(error)[:30]):
            model_kwargs(args, find(args))
        return
    found = model_kwargs(args, find(args))[0].get('img_size', own)
    assert _sides(found) == _sides(expected)


def _sides(size):
    """Return a size as two sides."""
    return (size, size) if isinstance(size, int) else size and tuple(size)
