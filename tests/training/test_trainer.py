"""The training loop against hand-written loops, and its progress bar."""

import io
import logging
import math
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from timm_multiexit.losses.multi_exit_loss import create_loss
from timm_multiexit.training.task import MultiExitTask
from timm_multiexit.training.trainer import Trainer, TrainerConfig, show_progress
from timm_multiexit.utils.errors import MultiExitError


def make_batches(count, size=4, classes=10):
    return [(torch.randn(size, 3, 32, 32), torch.randint(0, classes, (size,))) for _ in range(count)]


class Batches:
    """What a `SeededLoader` is to a trainer; `claimed` is its length where that is not the truth."""

    def __init__(self, batches, claimed=None):
        self.batches = batches
        self.claimed = len(batches) if claimed is None else claimed

    def __len__(self):
        return self.claimed

    def epoch(self, epoch, first_batch=0):
        yield from self.batches[first_batch:]


class Calls:
    """Notes what it is told, as a scheduler or an optimizer."""

    def __init__(self):
        self.seen = []

    def step_update(self, num_updates):
        self.seen.append(num_updates)


def make_trainer(task, optimizer, *, still=False, scheduler=None, mixup_fn=None, on_update=None, **config):
    """Return a trainer on the CPU; `still` keeps norms in eval mode, so that batches do not touch each other."""
    if still:
        task.train = lambda mode=True: task.trainable_module.eval()
    return Trainer(
        task,
        optimizer,
        accelerator=Accelerator(cpu=True),
        config=TrainerConfig(**config),
        scheduler=scheduler,
        mixup_fn=mixup_fn,
        on_update=on_update,
    )


@pytest.fixture
def model(make_model):
    return make_model(head='linear', input_size=(3, 32, 32))


def make_task(model, loss='ce', **kwargs):
    return MultiExitTask(model, create_loss(loss, **kwargs), verbose=False)


def ce_sum(model, images, target):
    return sum(F.cross_entropy(logits, target) for logits in model(images, exits=True).logits)


def gradients(model, images, target, factor=1.0):
    """Return the gradient of the sum of cross entropies, parameter by parameter."""
    return torch.autograd.grad(ce_sum(model, images, target) * factor, list(model.parameters()))


def test_accumulation_weighs_the_short_tail_by_its_own_length(model):
    model.double()  # sums of 16 images in another order are equal
    oracle, steps = deepcopy(model).eval(), []
    batches = [(images.double(), target) for images, target in make_batches(13)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    task = make_task(model, 'eed', output_loss='mse')
    trainer = make_trainer(
        task, optimizer, still=True, grad_accum_steps=4, on_update=lambda trainer: steps.append(trainer.batch)
    )
    metrics = trainer.train_epoch(0, Batches(batches))
    assert steps == [4, 8, 12, 13]
    assert trainer.num_updates == 4

    losses, momentum = [], [torch.zeros_like(param) for param in oracle.parameters()]
    for window in (batches[:4], batches[4:8], batches[8:12], batches[12:]):
        total = 0
        for images, target in window:
            logits = oracle(images, exits=True).logits
            teacher = sum(logits).detach() / 4
            loss = sum(F.cross_entropy(z, target) + (z - teacher).square().mean() for z in logits)
            losses.append(loss.item())
            total = total + loss / len(window)
        grads = torch.autograd.grad(total, list(oracle.parameters()))
        with torch.no_grad():
            for param, grad, velocity in zip(oracle.parameters(), grads, momentum):
                velocity.mul_(0.9).add_(grad)
                param -= 0.01 * velocity
    for param, expected in zip(model.parameters(), oracle.parameters()):
        torch.testing.assert_close(param, expected, rtol=1e-9, atol=1e-11)
    assert metrics['loss'] == pytest.approx(sum(losses) / 13, rel=1e-6)


def clipped_by_hand(model, grads, mode, bound):
    if mode == 'norm':
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        return {name: grad * min(1.0, bound / norm) for name, grad in grads.items()}
    if mode == 'value':
        return {name: grad.clamp(-bound, bound) for name, grad in grads.items()}
    clipped = {}
    for name, param in model.named_parameters():
        grad = grads[name].clone()
        # Each output unit by itself, a vector as one; all classifiers are as they are.
        if '.fc.' not in name:
            units = [grad] if grad.ndim == 1 else list(grad)
            weights = [param] if grad.ndim == 1 else list(param)
            for unit, weight in zip(units, weights):
                most = bound * max(float(weight.detach().norm()), 1e-3)
                unit *= min(1.0, most / max(float(unit.norm()), 1e-6))
        clipped[name] = grad
    return clipped


@pytest.mark.parametrize(('mode', 'bound'), [('norm', 0.1), ('value', 0.02), ('agc', 0.01)])
def test_clipping_bounds_the_gradient_of_each_step(mode, bound, model):
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: param.grad.clone() for name, param in model.named_parameters()})
    )
    batches = make_batches(2)
    model.eval()
    names = [name for name, _ in model.named_parameters()]
    assert sum('.fc.' in name for name in names) == 2 * 4
    free = [dict(zip(names, gradients(model, *batch))) for batch in batches]
    expected = [clipped_by_hand(model, grads, mode, bound) for grads in free]
    make_trainer(make_task(model), optimizer, still=True, clip_grad=bound, clip_mode=mode).train_epoch(
        0, Batches(batches)
    )
    for grads, by_hand, unclipped in zip(seen, expected, free, strict=True):
        for name in names:
            torch.testing.assert_close(grads[name], by_hand[name], rtol=1e-3, atol=1e-6)
        assert any(not torch.allclose(grads[name], unclipped[name], rtol=0.1) for name in names)


@pytest.mark.parametrize('log_interval', [2, 50])
def test_nan_names_the_classifier_and_the_batch_it_began_with(log_interval, model):
    hits, steps = [], []

    def poison(module, args, output):
        hits.append(len(hits))
        return (output[0] * (math.nan if len(hits) == 3 else 1.0), output[1])

    model.exits[1].register_forward_hook(poison)
    trainer = make_trainer(
        make_task(model),
        torch.optim.SGD(model.parameters(), lr=0.0),
        log_interval=log_interval,
        on_update=lambda trainer: steps.append(trainer.batch),
    )
    with pytest.raises(MultiExitError, match='The loss of exit1 is NaN or infinite at batch 2 of this epoch') as error:
        trainer.train_epoch(0, Batches(make_batches(5)))
    assert '\n' not in str(error.value)
    assert steps[-1] == (2 if log_interval == 2 else 4)  # noticed at the line that is due, before its step


def test_training_metrics_are_means_over_samples(model):
    batches = make_batches(2, size=6) + make_batches(1, size=2)
    trainer = make_trainer(make_task(model), torch.optim.SGD(model.parameters(), lr=0.0), still=True)
    metrics = trainer.train_epoch(0, Batches(batches))
    images, target = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        logits = model(images, exits=True).logits
    assert metrics['loss'] == pytest.approx(sum(F.cross_entropy(z, target).item() for z in logits), rel=1e-4)
    assert metrics['task'] == pytest.approx(metrics['loss'], rel=1e-4)
    assert metrics['output_distance'] == metrics['feature_distance'] == 0
    for name, single in zip(('exit0', 'exit1', 'exit2', 'main'), logits, strict=True):
        assert metrics[f'{name}_loss'] == pytest.approx(F.cross_entropy(single, target).item(), rel=1e-4)
        assert metrics[f'{name}_top1'] == pytest.approx(100 * (single.argmax(1) == target).float().mean().item())


def test_numbers_of_the_last_batch_are_its_own_under_their_names(model):
    batches = make_batches(3)
    trainer = make_trainer(make_task(model), torch.optim.SGD(model.parameters(), lr=0.0), still=True)
    trainer.train_epoch(0, Batches(batches))
    numbers = dict(zip(trainer.progress.columns(), trainer.batch_metrics.tolist(), strict=True))
    images, target = batches[-1]
    with torch.no_grad():
        single = model(images, exits=True).logits[1]
    assert numbers['exit1_task'] == pytest.approx(F.cross_entropy(single, target).item(), rel=1e-4)
    assert numbers['exit1_top1'] == pytest.approx(100 * (single.argmax(1) == target).float().mean().item())


def test_plain_task_has_the_columns_of_main_alone(make_backbone):
    backbone = make_backbone().eval()
    task = ClassificationTask(backbone, torch.nn.CrossEntropyLoss(), verbose=False)
    trainer = make_trainer(task, torch.optim.SGD(backbone.parameters(), lr=0.0), still=True)
    batches = make_batches(2)
    metrics = trainer.train_epoch(0, Batches(batches))
    images, target = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        assert metrics['main_loss'] == pytest.approx(F.cross_entropy(backbone(images), target).item(), rel=1e-4)
    assert {key for key in metrics if '_top1' in key} == {'main_top1'}


@pytest.mark.parametrize('second_order', [False, True])
def test_second_order_optimizers_get_gradients_that_have_a_graph(second_order, model):
    class Curious(torch.optim.SGD):
        is_second_order = second_order
        seen = []

        def step(self, closure=None):
            self.seen.append(all(param.grad.requires_grad for param in self.param_groups[0]['params']))

    optimizer = Curious(model.parameters(), lr=0.0)
    make_trainer(make_task(model), optimizer).train_epoch(0, Batches(make_batches(1)))
    assert optimizer.seen == [second_order]


def test_lookahead_is_synchronized_once_at_the_end_of_an_epoch(model):
    class Looking(torch.optim.SGD):
        calls = []

        def step(self, closure=None):
            self.calls.append('step')

        def sync_lookahead(self):
            self.calls.append('sync')

    optimizer = Looking(model.parameters(), lr=0.0)
    trainer = make_trainer(make_task(model), optimizer, grad_accum_steps=2)
    for epoch in range(2):
        trainer.train_epoch(epoch, Batches(make_batches(3)))
    assert optimizer.calls == ['step', 'step', 'sync'] * 2


def test_scheduler_hears_of_every_update_with_its_number_in_the_run(model):
    scheduler = Calls()
    trainer = make_trainer(
        make_task(model), torch.optim.SGD(model.parameters(), lr=0.0), grad_accum_steps=2, scheduler=scheduler
    )
    batches = Batches(make_batches(5))
    trainer.train_epoch(0, batches)
    trainer.train_epoch(1, batches)
    assert scheduler.seen == [1, 2, 3, 4, 5, 6]
    scheduler.seen.clear()
    trainer.train_epoch(1, batches, first_batch=4)
    assert scheduler.seen == [6]


def test_average_follows_every_update_and_no_batch_in_between(model):
    task = make_task(model)
    task.setup_ema(decay=0.5)
    average = {}

    def follow(trainer):
        for key, tensor in model.state_dict().items():
            # timm's average begins with the weights after the first update.
            is_mean = average.get(key) is not None and tensor.is_floating_point()
            average[key] = 0.5 * (average[key] + tensor) if is_mean else tensor.clone()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = make_trainer(task, optimizer, still=True, grad_accum_steps=2, on_update=follow)
    trainer.train_epoch(0, Batches(make_batches(5)))
    state = unwrap_model(task.get_trainable_module(ema=True)).state_dict()
    for key, tensor in average.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(average['exits.0.fc.weight'], model.exits[0].fc.weight)


@pytest.mark.parametrize(('kind', 'factors'), [('none', (1, 1)), ('sqrt', (0.5, 1.5)), ('linear', (0.25, 2.25))])
def test_loss_of_batches_of_several_sizes_is_scaled(kind, factors, model):
    seen, batches = [], make_batches(1, size=2) + make_batches(1, size=18)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append([param.grad.clone() for param in model.parameters()]))
    trainer = make_trainer(make_task(model), optimizer, still=True, loss_scale=kind, batch_size=8)
    metrics = trainer.train_epoch(0, Batches(batches))
    for grads, batch, factor in zip(seen, batches, factors, strict=True):
        for grad, expected in zip(grads, gradients(model, *batch, factor=factor)):
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)
    # The loss that is shown is not scaled.
    with torch.no_grad():
        expected = sum(len(batch[1]) * ce_sum(model, *batch).item() for batch in batches) / 20
    assert metrics['loss'] == pytest.approx(expected, rel=1e-4)


def test_mixing_function_makes_the_batch_that_is_trained_on(model):
    batches = make_batches(2)

    def mix(images, target):
        return images.flip(0), F.one_hot((target + 1) % 10, 10).float() * 0.9 + 0.01

    trainer = make_trainer(make_task(model), torch.optim.SGD(model.parameters(), lr=0.0), still=True, mixup_fn=mix)
    metrics = trainer.train_epoch(0, Batches(batches))
    images, target = (torch.cat(parts) for parts in zip(*[mix(*batch) for batch in batches]))
    with torch.no_grad():
        main = model(images)
    assert metrics['main_loss'] == pytest.approx(F.cross_entropy(main, target).item(), rel=1e-4)
    assert metrics['main_top1'] == pytest.approx(100 * (main.argmax(1) == target.argmax(1)).float().mean().item())
    assert torch.equal(trainer.images, batches[-1][0].flip(0))


def test_channels_last_reaches_the_model(model):
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    trainer = make_trainer(make_task(model), torch.optim.SGD(model.parameters(), lr=0.0), channels_last=True)
    trainer.train_epoch(0, Batches(make_batches(1)))
    assert seen == [True]


@pytest.mark.parametrize(('given', 'steps'), [(3, [2, 3]), (4, [2, 4]), (7, [2, 4, 5])])
def test_stream_of_another_length_than_it_said_does_not_disturb_the_epoch(given, steps, model):
    seen = []
    trainer = make_trainer(
        make_task(model),
        torch.optim.SGD(model.parameters(), lr=0.0),
        grad_accum_steps=2,
        on_update=lambda trainer: seen.append(trainer.batch),
    )
    trainer.train_epoch(0, Batches(make_batches(given), claimed=5))
    assert seen == steps


def test_stream_that_ends_within_a_window_updates_with_the_mean_gradient_of_what_came(model):
    batches = make_batches(3)
    short, whole = deepcopy(model), deepcopy(model)
    skills = []
    for network, claimed in ((short, 4), (whole, 3)):  # windows of 2 and 2 that misses one, of 2 and 1
        task = make_task(network, 'eed', teacher_weights='skill')
        trainer = make_trainer(task, torch.optim.SGD(network.parameters(), lr=0.01), still=True, grad_accum_steps=2)
        trainer.train_epoch(0, Batches(batches, claimed=claimed))
        assert trainer.num_updates == 2
        skills.append(task.loss.skill)
    torch.testing.assert_close(*skills)
    assert not torch.equal(skills[0], torch.full_like(skills[0], 1 / len(skills[0])))
    assert any(not torch.equal(one, other) for one, other in zip(short.parameters(), model.parameters()))
    for one, other in zip(short.parameters(), whole.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_stream_that_ends_early_with_nan_is_noticed(model):
    batches = make_batches(3)
    batches[1] = (batches[1][0] * math.nan, batches[1][1])
    trainer = make_trainer(make_task(model), torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(MultiExitError, match='at batch 1 of this epoch'):
        trainer.train_epoch(0, Batches(batches, claimed=9))


def test_epoch_without_a_batch_is_named(model):
    trainer = make_trainer(make_task(model), torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(MultiExitError, match='gave no batch in epoch 1'):
        trainer.train_epoch(0, Batches([], claimed=2))


def test_the_bar_is_drawn_only_if_it_should_be(capsys):
    batches = [1, 2, 3]
    assert list(show_progress(batches, is_shown=False)) == batches
    assert capsys.readouterr() == ('', '')
    assert list(show_progress(batches, is_shown=True, description='Epoch 1')) == batches
    captured = capsys.readouterr()
    assert captured.out == ''
    assert 'Epoch 1' in captured.err
    assert '0/3' in captured.err


def test_log_lines_go_above_the_bar_and_the_handlers_come_back(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.root, 'handlers', [handler])
    for batch in show_progress(iter([1, 2]), is_shown=True, total=2):
        logging.getLogger('timm_multiexit').warning(f'line {batch}')
        assert logging.root.handlers != [handler]
    assert logging.root.handlers == [handler]
    before, between, after = stream.getvalue().replace('line 2\n', 'line 1\n').split('line 1\n')
    assert before.endswith('\r')  # the bar is wiped out before a line, and drawn again after it
    assert '/2 [' in between
    assert '/2 [' in after
