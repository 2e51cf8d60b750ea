import math

import pytest
import torch

import benchmark
from timm_multiexit.factory import create_model
from timm_multiexit.losses import LOSSES

TINY = ('--model', 'test_resnet', '--batch-size', 4, '--rounds', 2, '--device', 'cpu')


def read_table(text, first_column):
    """Return the rows of a printed table as label -> {column: cell}; cells are two spaces apart."""
    lines = text.splitlines()
    start = next(idx for idx, line in enumerate(lines) if line.startswith(first_column))
    split = [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in lines[start:]]
    body = split[1 : split.index([]) if [] in split else None]
    return {row[0]: dict(zip(split[0][1:], row[1:], strict=True)) for row in body}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_training_is_timed_for_every_loss_and_for_the_loop(run_script, threads):
    code, out, err = run_script(benchmark.main, 'train', *TINY, '--exit-head', 'linear', '--threads', 1)
    assert (code, err) == (0, '')
    assert 'torch 2.' in out
    assert '1 torch threads' in out
    steps = read_table(out, 'step')
    assert list(steps) == ['plain timm', 'plain timm again', *LOSSES]
    for row in steps.values():
        for column in ('ms', 'img/s', 'time ratio', 'MACs ratio', 'time / MACs', 'vs ce'):
            assert 0 < float(row[column].replace(',', '')) < math.inf
    assert float(steps['plain timm']['time ratio']) == float(steps['ce']['vs ce']) == 1
    loop = read_table(out, 'loop of eed')
    assert list(loop) == ['tensors in memory', 'images, augmented, no workers']
    waiting = [float(row['waiting, %']) for row in loop.values()]
    assert 0 < waiting[0] < waiting[1] < 100
    assert all(0 < float(row['time ratio']) < math.inf for row in loop.values())


def test_macs_of_training_are_those_of_backbone_heads_and_projectors():
    args = benchmark.create_parser().parse_args([str(arg) for arg in ('train', *TINY, '--exit-head', 'linear')])
    model = create_model('test_resnet', head='linear', input_size=(3, 32, 32), num_classes=100)
    costs = model.cost()
    heads = sum(cost.head.macs for cost in costs)
    assert heads == 100 * (32 + 48 + 192)  # a linear layer each; the norms in front count nothing
    accelerator = benchmark.create_accelerator(benchmark.create_train_args(args))
    macs = {
        loss: benchmark.count_train_macs(benchmark.create_step(benchmark.create_train_args(args, loss), accelerator)[1])
        for loss in ('ce', 'byot')
    }
    assert macs['ce'] == costs[-1].fixed.macs + heads
    # byot distils features, so the exits' are brought to main's width of 96.
    assert macs['byot'] == macs['ce'] + 96 * (32 + 48 + 192)


def test_loop_and_bare_step_take_turns_and_the_warm_up_is_left_out():
    log = []
    loader = benchmark.InterleavedLoader(
        iter([(idx,) for idx in range(100)]),
        lambda *batch: log.append('bare'),
        rounds=2,
        turn=3,
        device=torch.device('cpu'),
    )
    epoch = loader.epoch(0)
    for _ in range(len(loader)):
        next(epoch)
        log.append('loop')
    assert log == 3 * [*3 * ['loop'], *3 * ['bare']] + ['loop']
    assert [len(times) for times in (loader.loop, loader.bare, loader.waiting)] == [2, 2, 2]


def test_ratios_are_paired_round_by_round():
    # The machine slows down tenfold, the ratio stays at about two: 2, 2.5, 2, 1.9, 2.
    median, quartiles = benchmark.describe_ratios([2.0, 5.0, 20.0, 19.0, 4.0], [1.0, 2.0, 10.0, 10.0, 2.0])
    assert (median, quartiles) == (2.0, '2.000-2.000')


def test_no_rounds_are_an_error_of_one_line(run_script):
    code, out, err = run_script(benchmark.main, 'train', '--model', 'test_resnet', '--rounds', 0)
    assert (code, out, err) == (2, '', 'benchmark.py: error: --rounds is 0, allowed are 1 or more.\n')
