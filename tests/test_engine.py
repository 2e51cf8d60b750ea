import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from timm_multiexit.config import MultiExitError
from timm_multiexit.engine import EpochConfig, evaluate_loader, train_one_epoch
from timm_multiexit.factory import evaluate
from timm_multiexit.losses import create_loss
from timm_multiexit.task import MultiExitTask


def make_batches(count, size=4, classes=10):
    return [(torch.randn(size, 3, 32, 32), torch.randint(0, classes, (size,))) for _ in range(count)]


def test_accumulation_weighs_the_short_tail_by_its_own_length(make_model):
    # 7 batches in windows of 3: steps after 3, 6 and 7. Norms in eval, so that batches do not touch each other.
    model = make_model(head='linear', input_size=(3, 32, 32))
    oracle = deepcopy(model)
    batches = make_batches(7)
    task = MultiExitTask(model, create_loss('eed', output_loss='mse'), verbose=False)
    task.train = lambda mode=True: model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    metrics = train_one_epoch(
        0, task, batches, optimizer, accelerator=Accelerator(cpu=True), config=EpochConfig(1, grad_accum_steps=3)
    )

    oracle.eval()
    losses = []
    for window in (batches[:3], batches[3:6], batches[6:]):
        grads = [torch.zeros_like(param) for param in oracle.parameters()]
        for images, target in window:
            outputs = oracle(images, exits=True)
            teacher = sum(outputs.logits).detach() / 4
            loss = sum(F.cross_entropy(z, target) + (z - teacher).square().mean() for z in outputs.logits)
            losses.append(loss.item())
            for total, grad in zip(grads, torch.autograd.grad(loss, list(oracle.parameters()))):
                total += grad / len(window)
        with torch.no_grad():
            for param, grad in zip(oracle.parameters(), grads):
                param -= 0.01 * grad
    for param, expected in zip(model.parameters(), oracle.parameters()):
        torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-6)
    assert metrics['loss'] == pytest.approx(sum(losses) / 7, rel=1e-4)


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipping_bounds_the_gradient_of_each_step(make_model, mode):
    model = make_model(input_size=(3, 32, 32))
    task = MultiExitTask(model, create_loss('ce'), verbose=False)
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append([param.grad.clone() for param in model.parameters()]))
    config = EpochConfig(1, clip_grad=0.01, clip_mode=mode)
    train_one_epoch(0, task, make_batches(2), optimizer, accelerator=Accelerator(cpu=True), config=config)
    assert len(seen) == 2
    for grads in seen:
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        if mode == 'norm':
            assert norm == pytest.approx(0.01, rel=1e-3)
        elif mode == 'value':
            assert max(float(grad.abs().max()) for grad in grads) == pytest.approx(0.01)
        else:
            # agc leaves the linear classifiers of main and of every exit as they are
            linear = [param for name, param in model.named_parameters() if name.split('.')[-2] == 'fc']
            names = [name for name, _ in model.named_parameters()]
            grads = dict(zip(names, grads))
            assert len(linear) == 2 * 4
            conv = grads['exits.0.convs.0.conv.weight'].flatten(1).norm(dim=1)
            bound = 0.01 * dict(model.named_parameters())['exits.0.convs.0.conv.weight'].flatten(1).norm(dim=1)
            assert (conv <= bound * 1.01).all()
            assert any((grads[f'exits.{idx}.fc.weight'].norm(dim=1) > 0.02).any() for idx in range(3))


def test_nan_names_the_classifier_and_the_batch_it_began_with(make_model):
    model = make_model(input_size=(3, 32, 32))
    task = MultiExitTask(model, create_loss('ce'), verbose=False)
    hits = []

    def poison(module, args, output):
        hits.append(len(hits))
        return (output[0] * (math.nan if len(hits) == 3 else 1.0), output[1])

    model.exits[1].register_forward_hook(poison)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(MultiExitError, match='The loss of exit1 is NaN or infinite at batch 2 of this epoch') as error:
        train_one_epoch(0, task, make_batches(5), optimizer, accelerator=Accelerator(cpu=True), config=EpochConfig(1))
    assert '\n' not in str(error.value)


def test_training_metrics_are_means_over_samples(make_model):
    model = make_model(head='linear', input_size=(3, 32, 32))
    task = MultiExitTask(model, create_loss('ce'), verbose=False)
    task.train = lambda mode=True: model.eval()
    batches = make_batches(2, size=6) + make_batches(1, size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = train_one_epoch(0, task, batches, optimizer, accelerator=Accelerator(cpu=True), config=EpochConfig(1))
    images, target = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        logits = model(images, exits=True).logits
    for name, single in zip(('exit0', 'exit1', 'exit2', 'main'), logits):
        assert metrics[f'{name}_loss'] == pytest.approx(F.cross_entropy(single, target).item(), rel=1e-4)
        assert metrics[f'{name}_top1'] == pytest.approx(100 * (single.argmax(1) == target).float().mean().item())


def test_evaluation_restores_modes_and_counts_every_sample(make_model):
    model = make_model(input_size=(3, 32, 32)).train()
    model.backbone.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    batches = make_batches(2, size=6) + make_batches(1, size=3)
    result = evaluate_loader(model, batches)
    assert (result.num_samples, result.input_size) == (15, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_table_has_a_row_for_every_classifier_and_the_ensemble(make_model):
    model = make_model(input_size=(3, 64, 64))
    batches = make_batches(3, size=5)
    table = evaluate(model, batches)
    images, target = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        logits = model.eval()(images, exits=True).logits
    assert [row['exit'] for row in table.rows] == ['0', '1', '2', 'main', 'ens']
    assert [row['tap'] for row in table.rows] == ['layer1.0', 'layer2.0', 'layer3.0', 'classifier', '-']
    top1 = [100 * (single.argmax(1) == target).float().mean().item() for single in (*logits, sum(logits) / 4)]
    assert [row['top-1'] for row in table.rows] == pytest.approx(top1)
    costs = model.cost((3, 32, 32))  # of the images that were seen, not of the size the exits were made for
    assert [row['GMACs fixed'] for row in table.rows[:4]] == [cost.fixed.macs / 1e9 for cost in costs]
    assert [row['GMACs sequential'] for row in table.rows] == [
        cost.sequential.macs / 1e9 for cost in (*costs, costs[-1])
    ]
    assert str(table).count('\n') == 5


def test_empty_loader_is_named(make_model):
    with pytest.raises(MultiExitError, match='gives no batch'):
        evaluate(make_model(), [])
