"""What trains when, and at which rate: the parts that wait stay bit for bit as they are."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import nn

from timm_multiexit.losses.multi_exit_loss import create_loss
from timm_multiexit.training.regimes import Regime, RegimeControl, split_exit_groups
from timm_multiexit.training.run import RunConfig, TrainingRun
from timm_multiexit.training.task import MultiExitTask
from timm_multiexit.training.trainer import Trainer, TrainerConfig

BATCHES_PER_EPOCH = 4


class Batches:
    def __init__(self):
        self.batches = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))) for _ in range(BATCHES_PER_EPOCH)]

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, first_batch=0):
        yield from self.batches[first_batch:]


class Run:
    """A model in training under a regime; `log` has phase, scale of the teacher and rates of every step."""

    def __init__(self, model, regime, *, make_scheduler=None, lr_scale=1.0, freeze_bn_stats=False, **optim):
        self.model, self.log = model, []
        self.task = MultiExitTask(model, create_loss('eed', output_loss='mse'), verbose=False)
        optim = {'opt': 'sgd', 'lr': 0.02, 'momentum': 0.9, 'weight_decay': 0.01, **optim}
        self.optimizer = create_optimizer_v2(model, **optim)
        split_exit_groups(self.optimizer, model, lr_scale)
        self.control = RegimeControl(regime, self.task, self.optimizer)
        self.optimizer.register_step_pre_hook(self._note)
        self.trainer = Trainer(
            self.task,
            self.optimizer,
            accelerator=Accelerator(cpu=True),
            config=TrainerConfig(freeze_bn_stats=freeze_bn_stats),
            scheduler=make_scheduler(self.optimizer) if make_scheduler else None,
            regime=self.control,
        )
        self.batches = Batches()

    def _note(self, *_):
        self.log.append((self.control.phase, self.task.loss.distill_scale, self.rates()))

    def rates(self):
        """Return the rates of the backbone and of the heads."""
        found = {bool(group['is_exit']): group['lr'] for group in self.optimizer.param_groups}
        return found.get(False), found[True]

    def train(self, *epochs):
        for epoch in epochs:
            self.trainer.train_epoch(epoch, self.batches)

    def state(self):
        return {key: tensor.clone() for key, tensor in self.model.state_dict().items()}


@pytest.fixture
def model(make_model):
    return make_model(input_size=(3, 32, 32))


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_regime_by_hand():
    regime = Regime('mixed', backbone_epochs=1, head_warmup_epochs=0.5, exit_warmup_epochs=1.0)
    times = [0.0, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 9.0]
    phases = ['backbone', 'backbone', 'heads', 'heads', *['joint'] * 6]
    assert [regime.phase(time) for time in times] == phases
    assert [regime.distill_scale(time) for time in times] == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [Regime().phase(0.0), Regime().distill_scale(0.0)] == ['joint', 1.0]
    assert {Regime('frozen').phase(time) for time in times} == {'heads'}
    assert Regime('frozen', exit_warmup_epochs=2.0).distill_scale(0.5) == 0.25
    for regime, changes in (
        (Regime(), False),
        (Regime('frozen'), False),
        (Regime(exit_warmup_epochs=3.0), False),
        (Regime(head_warmup_epochs=1.0), True),
        (Regime('mixed', backbone_epochs=1), True),
    ):
        assert regime.changes == changes


def test_steps_take_phase_and_scale_of_their_time(model):
    run = Run(model, Regime('mixed', backbone_epochs=1, head_warmup_epochs=0.5, exit_warmup_epochs=1.0))
    run.train(0, 1, 2)
    assert [entry[0] for entry in run.log] == ['backbone'] * 4 + ['heads'] * 2 + ['joint'] * 6
    assert [entry[1] for entry in run.log] == [0] * 6 + [0, 0.25, 0.5, 0.75, 1, 1]


def test_backbone_phase_trains_the_plain_network_and_no_head(model):
    plain = deepcopy(model.backbone).train()
    run = Run(model, Regime('mixed', backbone_epochs=1))
    before = run.state()
    run.train(0)
    after = run.state()
    assert {key for key in changed(before, after) if key.startswith('exits.')} == set()

    optimizer = create_optimizer_v2(plain, opt='sgd', lr=0.02, momentum=0.9, weight_decay=0.01)
    for images, target in run.batches.batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(images), target).backward()
        optimizer.step()
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(after[f'backbone.{key}'], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('regime', [Regime('mixed', 1, 1.0), Regime('frozen'), Regime(head_warmup_epochs=2.0)])
def test_heads_phase_leaves_the_backbone_bit_for_bit(regime, model):
    # In 'mixed' the optimizer has momentum and weight decay for the backbone from its own phase.
    if regime.name == 'frozen':
        model.freeze_backbone()
    run = Run(model, regime)
    if regime.name == 'mixed':
        run.train(0)
    probe = torch.randn(3, 3, 32, 32)
    before, main = run.state(), model.eval()(probe)
    run.train(1)
    assert run.log[-1][0] == 'heads'
    after = run.state()
    assert {key for key in changed(before, after) if key.startswith('backbone.')} == set()
    assert torch.equal(model.eval()(probe), main)
    heads = {name for name, _ in model.named_parameters() if name.startswith('exits.')}
    assert heads <= changed(before, after)
    assert any('running_mean' in key for key in changed(before, after))


def test_joint_phase_trains_all_again(model):
    run = Run(model, Regime('mixed', backbone_epochs=1, head_warmup_epochs=1.0))
    run.train(0, 1)
    before = run.state()
    run.train(2)
    trained = {name for name, _ in model.named_parameters()}
    assert trained <= changed(before, run.state())
    assert any(key.startswith('backbone.') and 'running_mean' in key for key in changed(before, run.state()))


def test_norms_of_the_backbone_keep_their_statistics_in_every_phase(model):
    regime = Regime('mixed', backbone_epochs=1, head_warmup_epochs=0.5)
    run = Run(model, regime, freeze_bn_stats=True)
    statistics = {key for key in run.state() if 'running_' in key or 'num_batches' in key}
    own = {key for key in statistics if key.startswith('backbone.')}
    assert len(own) > 10
    assert statistics - own
    before = run.state()
    run.train(0, 1, 2)
    assert [entry[0] for entry in run.log][::4] == ['backbone', 'heads', 'joint']
    after = changed(before, run.state())
    assert own & after == set()
    assert statistics - own <= after
    assert {name for name, _ in model.named_parameters()} <= after


def test_norms_that_stay_leave_what_they_hold_in_training_mode(model):
    run = Run(model, Regime('joint'), freeze_bn_stats=True)
    norm = next(module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    norm.drop = nn.Dropout()
    run.trainer._set_training_mode()
    assert (norm.training, norm.drop.training) == (False, True)


@pytest.mark.parametrize(
    ('name', 'freeze_bn_stats', 'expected'),
    [('joint', False, {'backbone', 'exits'}), ('joint', True, {'exits'}), ('frozen', False, {'exits'})],
)
def test_statistics_that_stay_are_not_distributed(name, freeze_bn_stats, expected, model, monkeypatch):
    seen = []
    monkeypatch.setattr('timm_multiexit.training.run.distribute_bn', lambda *args: seen.append(args))
    inner = Run(model, Regime(name), freeze_bn_stats=freeze_bn_stats)
    run = SimpleNamespace(
        config=RunConfig('a', dist_bn='reduce'),
        accelerator=SimpleNamespace(num_processes=3),
        trainer=inner.trainer,
        task=inner.trainer.task,
    )
    TrainingRun._distribute_norms(run)
    ((module, num_processes, is_reduced),) = seen
    assert (num_processes, is_reduced) == (3, True)
    own = {id(buffer) for buffer in module.buffers()}
    parts = {key.split('.')[0] for key, buffer in model.named_buffers() if id(buffer) in own and 'running_' in key}
    assert parts == expected


def test_plain_network_with_norms_that_stay_learns_as_in_eval_mode(model):
    network = model.backbone
    expected = deepcopy(network)
    task = ClassificationTask(network, verbose=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(task, optimizer, accelerator=accelerator, config=TrainerConfig(freeze_bn_stats=True))
    batches = Batches()
    trainer.train_epoch(0, batches)

    optimizer = torch.optim.SGD(expected.eval().parameters(), lr=0.02)
    for images, target in batches.batches:
        optimizer.zero_grad()
        F.cross_entropy(expected(images), target).backward()
        optimizer.step()
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)


def test_heads_warm_up_at_the_highest_rate_and_the_schedule_goes_on_behind(model):
    def warming(optimizer):
        return create_scheduler_v2(
            optimizer, 'cosine', num_epochs=10, warmup_epochs=2, warmup_lr=0.001, step_on_epochs=False,
            updates_per_epoch=BATCHES_PER_EPOCH,
        )[0]  # fmt: skip

    run = Run(model, Regime(head_warmup_epochs=0.5), make_scheduler=warming, lr_scale=3.0)
    scheduled = []
    run.trainer.on_update = lambda trainer: scheduled.append(run.rates())
    run.train(0)
    ramp = [0.001 + (0.02 - 0.001) * step / 8 for step in range(5)]
    ramp_heads = [3 * rate for rate in ramp]
    # The backbone waits two steps, and in the two after them its rate rises to the schedule's.
    held = [ramp[0], ramp[1], 0.0, ramp[3] * 0.5]
    assert [entry[2][0] for entry in run.log] == pytest.approx(held)
    assert [entry[2][1] for entry in run.log] == pytest.approx([0.06, 0.06, *ramp_heads[2:4]])
    assert scheduled == [pytest.approx((rate, rate)) for rate in ramp[1:]]


def test_rates_are_restored_where_the_step_fails(model):
    run = Run(model, Regime(head_warmup_epochs=1.0))
    run.control.begin_step(0.0)
    for group in run.optimizer.param_groups:
        group['initial_lr'], group['lr'] = 0.5, 0.1
    with run.control.rates():
        assert run.rates() == (0.1, 0.5)
    assert run.rates() == (0.1, 0.1)
    run.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train(0)
    assert run.rates() == (0.1, 0.1)


def test_frozen_backbone_follows_the_schedule_from_its_warm_up(model):
    model.freeze_backbone()
    run = Run(model, Regime('frozen'))
    run.control.begin_step(0.0)
    for group in run.optimizer.param_groups:
        group['initial_lr'], group['lr'] = 0.5, 0.1
    with run.control.rates():
        assert all(group['lr'] == 0.1 for group in run.optimizer.param_groups)


SCHEDULES = {
    'none': lambda optimizer: create_scheduler_v2(optimizer, 'none', num_epochs=4)[0],
    'constant': lambda optimizer: create_scheduler_v2(optimizer, 'constant', num_epochs=4, warmup_epochs=0)[0],
    'cosine': lambda optimizer: create_scheduler_v2(optimizer, 'cosine', num_epochs=4, warmup_epochs=0)[0],
}


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('layer_decay', [None, 0.5])
@pytest.mark.parametrize('opt', ['sgd', 'lookahead_sgd'])
def test_every_parameter_has_its_rate_once(opt, layer_decay, schedule, model):
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.01, layer_decay=layer_decay)
    decays = {id(param): group['weight_decay'] for group in optimizer.param_groups for param in group['params']}
    plain_lr = {id(param): group.get('lr_scale', 1.0) for group in optimizer.param_groups for param in group['params']}
    split_exit_groups(optimizer, model, 4.0)
    SCHEDULES[schedule](optimizer)
    control = RegimeControl(Regime(), MultiExitTask(model, create_loss('eed'), verbose=False), optimizer)
    inner = getattr(optimizer, '_base_optimizer', optimizer)
    assert inner.param_groups is optimizer.param_groups
    seen = {}
    for group in inner.param_groups:
        for param in group['params']:
            assert id(param) not in seen
            seen[id(param)] = group
    heads = {id(param) for param in model.exits.parameters()}
    for param in model.parameters():
        group = seen[id(param)]
        assert group['is_exit'] == (id(param) in heads)
        assert group['weight_decay'] == decays[id(param)]
        # timm's schedules multiply by the layer's factor; without one, timm has no layer decay.
        layer = plain_lr[id(param)] if schedule != 'none' else 1.0
        assert group['lr'] == pytest.approx(0.1 * layer)
        with control.rates():
            assert group['lr'] == pytest.approx(0.1 * (4.0 if id(param) in heads else 1.0) * layer)
        assert group['lr'] == pytest.approx(0.1 * layer)
    if layer_decay:
        assert {plain_lr[key] for key in heads} == {1.0}
        assert min(plain_lr.values()) < 1.0


@pytest.mark.parametrize(
    'schedule',
    [{'min_lr': 1e-3}, {'warmup_epochs': 2, 'warmup_lr': 1e-2}, {'min_lr': 1e-3, 'warmup_epochs': 1}],
    ids=str,
)
def test_rate_of_the_heads_is_that_of_the_schedule_times_its_factor_at_every_step(schedule, model):
    run = Run(
        model,
        Regime(),
        lr_scale=0.1,
        make_scheduler=lambda optimizer: create_scheduler_v2(
            optimizer, 'cosine', num_epochs=4, updates_per_epoch=BATCHES_PER_EPOCH, step_on_epochs=False, **schedule
        )[0],
    )
    run.train(*range(4))
    assert len(run.log) == 4 * BATCHES_PER_EPOCH
    assert len({backbone for _, _, (backbone, _) in run.log}) > BATCHES_PER_EPOCH
    for _, _, (backbone, heads) in run.log:
        assert heads == pytest.approx(0.1 * backbone)


def test_heads_learn_so_much_faster_as_they_were_told(model):
    # Plain SGD of one step: the heads' change is three times as large, main's is the same.
    moves = []
    for lr_scale in (1.0, 3.0):
        twin = deepcopy(model)
        run = Run(twin, Regime(), opt='momentum', lr_scale=lr_scale, momentum=0.0, weight_decay=0.0)
        torch.manual_seed(1)
        run.batches.batches = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))]
        run.train(0)
        moves.append({name: twin.get_parameter(name) - param for name, param in model.named_parameters()})
    for name, move in moves[0].items():
        factor = 3.0 if name.startswith('exits.') else 1.0
        torch.testing.assert_close(moves[1][name], move * factor, rtol=1e-3, atol=1e-6)


def test_model_without_exits_is_left_alone():
    model = timm.create_model('test_resnet', num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split_exit_groups(optimizer, model, 3.0)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]['lr'] == 0.1
    assert 'is_exit' not in optimizer.param_groups[0]
