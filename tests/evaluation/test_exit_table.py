"""The pass over a data set, and its table."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.sharded import make_model, shard

from timm_multiexit.evaluation.exit_table import evaluate, evaluate_loader
from timm_multiexit.evaluation.metrics import flatten_metrics
from timm_multiexit.utils.errors import DataError, InvalidValueError, MultiExitError


def make_batches(count, size=4, classes=10):
    return [(torch.randn(size, 3, 32, 32), torch.randint(0, classes, (size,))) for _ in range(count)]


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


def test_evaluation_of_a_plain_model_is_of_main_alone(make_backbone):
    backbone, batches = make_backbone(), make_batches(2, size=5)
    metrics = evaluate_loader(backbone, batches).metrics
    images, target = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        main = backbone.eval()(images)
    assert set(metrics) == {'main'}
    assert metrics['main']['loss'] == pytest.approx(F.cross_entropy(main, target).item(), rel=1e-4)
    assert metrics['main']['top1'] == pytest.approx(100 * (main.argmax(1) == target).float().mean().item())


def test_table_has_a_row_for_every_classifier_and_the_ensemble(make_model):
    model = make_model(input_size=(3, 64, 64))
    batches = make_batches(3, size=5)
    table = evaluate(model, batches)
    images, target = (torch.cat(parts) for parts in zip(*batches))
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


def test_table_of_several_labels_has_its_own_columns(make_model):
    model = make_model(input_size=(3, 32, 32)).eval()
    batches = [(images, (torch.rand(4, 10) < 0.3).float()) for images, _ in make_batches(3)]
    table = evaluate(model, batches, multi_label=True, threshold=0.4)
    images, target = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        logits = model(images, exits=True).logits
    for row, single in zip(table.rows, (*logits, sum(logits) / 4), strict=True):
        assert not row.keys() & {'top-1', 'top-5', 'ECE'}
        predicted = single.sigmoid() >= 0.4
        hits = (predicted & target.bool()).sum().item()
        assert row['micro-F1'] == pytest.approx(100 * 2 * hits / (predicted.sum() + target.sum()).item(), rel=1e-4)
    assert str(table).splitlines()[0].split()[-4:] == ['mAP', 'micro-F1', 'macro-F1', 'sample-F1']


def test_empty_loader_is_named(make_model):
    with pytest.raises(MultiExitError, match='loader is empty'):
        evaluate(make_model(), [])


def test_logits_that_are_nan_are_no_table(make_model):
    model = make_model(exits=[1], input_size=(3, 32, 32))
    torch.nn.init.constant_(model.exits[0].fc.bias, float('nan'))
    with pytest.raises(InvalidValueError, match='^exit 0 gives NaN|^exit0 gives NaN'):
        evaluate(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))])
    labels = torch.eye(model.num_classes)[:4]
    with pytest.raises(InvalidValueError, match='^exit0 gives NaN'):
        evaluate(model, [(torch.randn(4, 3, 32, 32), labels)], multi_label=True)


def evaluate_in_two(rank, folder, batches, multi_label):
    """One of two processes: the first has all batches, the second none, of a whole and of a sharded model."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1')
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    own = [] if rank else batches
    found = []
    for model in (make_model('test_resnet'), shard(make_model('test_resnet'), 'test_resnet')):
        result = evaluate_loader(model, own, accelerator=accelerator, multi_label=multi_label)
        found.append((result.num_samples, result.metrics))
    with pytest.raises(DataError, match='The data loader is empty, so there is nothing to evaluate'):
        evaluate_loader(model, [], accelerator=accelerator)
    torch.save(found, folder / f'{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize('multi_label', [False, True])
def test_process_without_images_takes_part_and_has_the_same_numbers(tmp_path, multi_label):
    batches = make_batches(2, size=6)
    if multi_label:
        batches = [(images, (torch.rand(6, 10) < 0.3).float()) for images, _ in batches]
    expected = evaluate_loader(make_model('test_resnet'), batches, multi_label=multi_label)
    # Forked, so that nothing is imported twice more.
    mp.start_processes(evaluate_in_two, args=(tmp_path, batches, multi_label), nprocs=2, start_method='fork')
    for rank in range(2):
        for num_samples, metrics in torch.load(tmp_path / f'{rank}.pt'):
            assert num_samples == expected.num_samples == 12
            assert flatten_metrics(metrics) == pytest.approx(flatten_metrics(expected.metrics), rel=1e-4)
