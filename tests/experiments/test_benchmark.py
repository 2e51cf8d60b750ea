"""benchmark.py: what it measures, and that every command runs."""

import math
from collections import Counter
from time import sleep

import pytest
import torch
from PIL import Image

import benchmark
from benchmarks import inference, training
from benchmarks.cuts import copy_plain, cut_by_hand
from timm_multiexit.factory import create_model
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.utils.errors import MultiExitError

COMMON = ('--model', 'test_resnet', '--rounds', 2, '--device', 'cpu')
TINY = (*COMMON, '--batch-size', 4)


def read_table(text, first_column):
    """Return the rows of a printed table as label -> {column: cell}; cells are two spaces apart."""
    lines = text.splitlines()
    start = next(idx for idx, line in enumerate(lines) if line.startswith(first_column))
    split = [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in lines[start:]]
    body = split[1 : split.index([]) if [] in split else None]
    return {row[0]: dict(zip(split[0][1:], row[1:], strict=True)) for row in body}


def number(cell):
    return float(cell.replace(',', ''))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(make_model):
    """A benchmark of three exits and 16 images."""
    return inference.InferenceBenchmark(make_model().eval(), torch.randn(16, 3, 64, 64))


FIXED = [
    'plain timm',
    'plain timm again',
    'model(x)',
    *('exit_idx=0', 'cut by hand at exit 0'),
    *('exit_idx=1', 'cut by hand at exit 1'),
    *('exit_idx=2', 'cut by hand at exit 2'),
    'exits=True',
    'anytime',
]
SEQUENTIAL = ['infer, all at exit 0', 'infer, all at exit 1', 'infer, all at exit 2', 'infer, none leaving']


def test_inference_is_timed_in_every_form_at_every_batch_size(run_script, threads):
    code, out, err = run_script(
        benchmark.main, 'infer', *COMMON, '--img-size', 64, '--batch-sizes', 1, 8, '--shares', 0.5, 0.25, '--threads', 1
    )
    assert (code, err) == (0, '')
    assert 'test_resnet, heads conv, 64 pixels, cpu\n' in out
    assert '1 torch thread' in out
    single, batch = out.split('\nbatch 8, 2 rounds\n')
    assert '\nbatch 1, 10 rounds\n' in single
    single, batch = read_table(single, 'call'), read_table(batch, 'call')
    # Half of one image cannot leave.
    assert list(single) == [*FIXED, *SEQUENTIAL]
    shares = [
        *('infer, 50 % leaving', 'exits=True, then policy, 50 %'),
        *('infer, 25 % leaving', 'exits=True, then policy, 25 %'),
    ]
    assert list(batch) == [*FIXED, *SEQUENTIAL, *shares]
    for row in (*single.values(), *batch.values()):
        for column in ('p50 ms', 'p95 ms', 'img/s', 'time ratio', 'MACs ratio'):
            assert 0 < number(row[column]) < math.inf
        assert number(row['p50 ms']) <= number(row['p95 ms'])
    assert number(batch['plain timm']['time ratio']) == 1
    assert batch['infer, 50 % leaving']['leaving, %'] == '50 25 12.5 12.5'
    assert batch['infer, 25 % leaving']['leaving, %'] == '25 12.5 12.5 50'
    assert batch['exit_idx=1']['against'] == 'cut by hand at exit 1'
    assert batch['infer, none leaving']['against'] == 'exits=True'
    assert batch['infer, 50 % leaving']['against'] == 'expected'


def test_macs_of_a_share_are_the_mean_over_where_images_leave(bench):
    bench.add_policies([0.5])
    costs = bench.costs
    wanted = sum(
        share * cost.sequential.macs for share, cost in zip((8 / 16, 4 / 16, 2 / 16, 2 / 16), costs, strict=True)
    )
    assert bench.variants['infer, 50 % leaving'].macs == pytest.approx(wanted)
    assert bench.variants['infer, none leaving'].macs == costs[-1].sequential.macs
    assert bench.variants['infer, all at exit 1'].macs == costs[1].sequential.macs
    assert bench.variants['exits=True, then policy, 50 %'].macs == costs[-1].sequential.macs


def test_expected_time_is_that_of_the_parts_by_the_shares(bench, monkeypatch):
    bench.add_fixed()
    bench.add_policies([0.5])
    seconds = dict.fromkeys(bench.variants, (1.0, 1.0))
    # By hand: 1/2 * 2 + 1/4 * 4 + 1/8 * 8 + 1/8 * 16 = 5 in the first round, twice that in the second.
    for name, time in zip(SEQUENTIAL, (2.0, 4.0, 8.0, 16.0)):
        seconds[name] = (time, 2 * time)
    seconds['plain timm'] = (10.0, 20.0)
    seconds['infer, 50 % leaving'] = (6.0, 12.0)
    monkeypatch.setattr(inference, 'time_interleaved', lambda variants, rounds, device: seconds)
    row = next(row for row in bench.measure(2) if row['call'] == 'infer, 50 % leaving')
    assert row['its ratio'] == pytest.approx(0.5)
    assert row['ratio to it'] == pytest.approx(1.2)
    assert row['time ratio'] == pytest.approx(0.6)
    assert (row['p50 ms'], row['p95 ms'], row['img/s']) == pytest.approx((9000, 11700, 16 / 9))


def test_forced_shares_are_of_those_that_get_there_and_round_down():
    # Softmax of (a, 0) rises with a; the second exit ranks the images the other way round.
    rising = torch.stack([torch.arange(10.0), torch.zeros(10)], 1)
    logits = [rising, rising.flip(0), rising]
    left = apply_policy(inference.force_policy(logits, 0.5), logits).exit_idx
    assert left.tolist() == [1, 1, 2, 2, 2, 0, 0, 0, 0, 0]
    left = apply_policy(inference.force_policy(logits, 0.09), logits).exit_idx
    assert left.tolist() == [2] * 10


def test_heads_that_no_threshold_holds_back_are_refused(bench):
    torch.nn.init.constant_(bench.model.exits[0].fc.bias, 0)
    with torch.no_grad():
        bench.model.exits[0].fc.bias[0] = 1000.0
    with pytest.raises(MultiExitError, match=r'^Some images have a confidence of 1 before exit 1, .*\.$'):
        bench.add_policies([0.5])


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_efficientnet', 'cifar_resnet18', 'densenet121'])
def test_network_cut_by_hand_gives_what_the_exit_gives_without_hooks(make_model, name):
    size = 160 if name == 'test_vit' else 32
    model = make_model(name, input_size=(3, size, size)).eval()
    plain = copy_plain(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    images = torch.randn(3, 3, size, size)
    for idx in range(len(model.exits)):
        network = cut_by_hand(model, plain, idx, images[:2])
        ran = []
        classifier = plain.get_classifier()
        handle = classifier.register_forward_hook(lambda *args, ran=ran: ran.append('classifier'))
        torch.testing.assert_close(network(images), model(images, exit_idx=idx))
        handle.remove()
        assert ran == []


def test_what_is_not_the_taps_tensor_is_no_cut(make_model):
    model = make_model().eval()
    plain = copy_plain(model)
    with torch.no_grad():
        next(plain.parameters()).mul_(2)
    assert cut_by_hand(model, plain, 0, torch.randn(2, 3, 64, 64)) is None


def test_an_exit_without_a_cut_is_timed_all_the_same_and_named(bench, monkeypatch):
    monkeypatch.setattr(inference, 'cut_by_hand', lambda model, plain, idx, images: None if idx == 1 else plain)
    bench.add_fixed()
    assert bench.uncut == [1]
    assert bench.variants['exit_idx=1'].against == {}
    assert 'cut by hand at exit 1' not in bench.variants


@pytest.mark.slow
def test_compiled_forms_are_compared_with_plain_timm_compiled(make_model, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda *args, **kwargs: real(*args, **(kwargs | {'backend': 'eager'})))
    model = make_model(exits=[2]).eval()
    # One bucket, or every block would be compiled for several.
    bench = inference.InferenceBenchmark(model, torch.randn(8, 3, 32, 32), bucket_sizes=[8])
    bench.add_fixed()
    bench.add_compiled([0.5])
    compiled = {name: variant for name, variant in bench.variants.items() if name.endswith(', compiled')}
    assert list(compiled) == [
        'plain timm, compiled',
        'model(x), compiled',
        'exit_idx=0, compiled',
        'exits=True, compiled',
        'infer, none leaving, compiled',
        'infer, 50 % leaving, compiled',
    ]
    assert compiled['infer, 50 % leaving, compiled'].shares == (0.5, 0.5)
    assert compiled.pop('plain timm, compiled').against == {'plain timm': 1.0}
    assert all(variant.against == {'plain timm, compiled': 1.0} for variant in compiled.values())
    with torch.inference_mode():
        logits = bench.model(bench.images, exits=True).logits
        wanted = apply_policy(inference.force_policy(logits, 0.5), logits)
        given = compiled['infer, 50 % leaving, compiled'].call()
    torch.testing.assert_close(tuple(given), tuple(wanted))


def test_the_table_for_a_gpu_has_every_form_at_every_batch_size(run_script, threads):
    flags = ('--img-size', 64, '--batch-sizes', 1, 2, '--no-torchcompile')
    code, out, err = run_script(benchmark.main, 'gpu', *COMMON, *flags)
    assert (code, err) == (0, '')
    assert 'cpu, bfloat16, channels_last\n' in out
    assert '\nWithout CUDA there are no rows of CUDA graphs.\n' in out
    rows = [line.split(' | ') for line in out.splitlines() if line.startswith('| ')][2:]
    calls = [*FIXED, *SEQUENTIAL]
    shares = ['infer, 50 % leaving', 'exits=True, then policy, 50 %']
    assert [row[:2] for row in rows] == [
        *(['| 1', call] for call in calls),
        *(['| 2', call] for call in (*calls, *shares)),
    ]
    assert all(0 < number(row[2]) < math.inf for row in rows)


def test_training_is_timed_for_every_loss_and_for_the_loop(run_script, threads):
    code, out, err = run_script(benchmark.main, 'train', *TINY, '--exit-head', 'linear', '--threads', 1)
    assert (code, err) == (0, '')
    assert 'torch 2.' in out
    assert '1 torch thread' in out
    steps = read_table(out, 'step')
    assert list(steps) == ['plain timm', 'plain timm again', *LOSSES]
    for row in steps.values():
        for column in ('ms', 'img/s', 'time ratio', 'MACs ratio', 'time / MACs', 'vs ce'):
            assert 0 < number(row[column]) < math.inf
    assert float(steps['plain timm']['time ratio']) == float(steps['ce']['vs ce']) == 1
    loop = read_table(out, 'loop of eed')
    assert list(loop) == ['tensors in memory', 'images, augmented, no workers']
    waiting = [float(row['waiting, %']) for row in loop.values()]
    assert 0 < waiting[0] < waiting[1] < 100
    assert all(0 < float(row['time ratio']) < math.inf for row in loop.values())
    assert [row['img/s prepared'] for row in loop.values()][0] == '-'
    assert number(loop['images, augmented, no workers']['img/s prepared']) > 0


def test_loop_is_measured_on_cached_images_of_a_folder(run_script, threads, image_folder, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr('PIL.Image.open', lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    flags = ('--exit-head', 'linear', '--losses', 'eed', '--data-dir', image_folder, '--num-classes', 2)
    code, out, err = run_script(benchmark.main, 'train', *TINY, *flags)
    assert (code, err) == (0, '')
    assert list(read_table(out, 'loop of eed')) == ['tensors in memory', 'images, augmented, no workers']
    # Every image of train/ once, however many batches there are; the first is looked at before, of both splits by the loop.
    counts = Counter(file.name for file, *_ in opened)
    assert sorted(counts.values()) == [1] * 24 + [3]


def test_macs_of_training_are_those_of_backbone_heads_and_projectors():
    args = benchmark.create_parser().parse_args([str(arg) for arg in ('train', *TINY, '--exit-head', 'linear')])
    model = create_model('test_resnet', head='linear', input_size=(3, 32, 32), num_classes=100)
    costs = model.cost()
    heads = sum(cost.head.macs for cost in costs)
    assert heads == 100 * (32 + 48 + 192)  # a linear layer each; the norms in front count nothing
    accelerator = benchmark.create_accelerator(training.create_train_args(args))
    macs = {
        loss: training.count_train_macs(training.create_step(training.create_train_args(args, loss), accelerator)[1])
        for loss in ('ce', 'byot')
    }
    assert macs['ce'] == costs[-1].fixed.macs + heads
    # byot distils features, so the exits' are brought to main's width of 96.
    assert macs['byot'] == macs['ce'] + 96 * (32 + 48 + 192)


def test_loop_and_bare_step_take_turns_and_the_warm_up_is_left_out():
    log = []
    loader = training.InterleavedLoader(
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


def test_waiting_is_measured_by_the_clock_of_the_loop():  # process time with one thread: sleep takes none
    batches = iter(lambda: (sleep(0.02),), None)
    loader = training.InterleavedLoader(batches, lambda *batch: None, rounds=2, turn=3, device=torch.device('cpu'))
    epoch = loader.epoch(0)
    for _ in range(len(loader)):
        next(epoch)
    assert len(loader.waiting) == 2
    assert all(0 <= waiting <= loop for waiting, loop in zip(loader.waiting, loader.loop))


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('train', '--rounds', 0), '--rounds must be >= 1, got 0.'),
        (('infer', '--batch-sizes', 1, 0), '--batch-sizes must be >= 1, got 0.'),
        (('infer', '--shares', 0.5, 1.0), '--shares must be in (0, 1), got 1.0.'),
        (('infer', '--threads', -1), '--threads must be >= 1, got -1.'),
    ],
)
def test_numbers_out_of_range_are_an_error_of_one_line(run_script, flags, message):
    code, out, err = run_script(benchmark.main, *flags)
    assert (code, out, err) == (2, '', f'benchmark.py: error: {message}\n')


def test_images_are_looked_at_before_anything_is_timed(run_script, image_folder):
    code, out, err = run_script(benchmark.main, 'train', '--data-dir', 'nowhere')
    message = "Data folder 'nowhere' does not exist: give one that holds train/CLASS/*.jpg."
    assert (code, out, err) == (2, '', f'benchmark.py: error: {message}\n')
    code, out, err = run_script(benchmark.main, 'train', '--data-dir', image_folder, '--num-classes', 3)
    message = f'--num-classes must be the 2 of {image_folder}, got 3.'
    assert (code, out, err) == (2, '', f'benchmark.py: error: {message}\n')


def test_rows_of_coverage_that_are_damaged_are_one_line_and_stay(run_script, tmp_path):
    path = tmp_path / 'coverage.json'
    path.write_text('{"models": [')
    code, out, err = run_script(benchmark.main, 'coverage', '--output', path)
    assert (code, out) == (2, '')
    assert err.startswith(f'benchmark.py: error: {path} ')
    assert err.count('\n') == 1
    assert path.read_text() == '{"models": ['


def test_unknown_devices_are_an_error_of_the_command_line(run_script):
    code, out, err = run_script(benchmark.main, 'infer', '--device', 'abacus')
    assert (code, out) == (2, '')
    assert "'abacus' is not a device of this machine" in err.splitlines()[-1]
