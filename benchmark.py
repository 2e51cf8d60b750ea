#!/usr/bin/env python3
"""What exits cost: `infer` and `train` in time, `heads` in MACs; and `coverage`: which of timm's models take them.

Speed is given as ratios to plain timm in the same run. Every variant takes one turn per round, in an order that changes
from round to round, so that a busy machine slows all of them alike; the table gives medians, and plain timm twice,
whose difference is the noise.
"""

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from copy import deepcopy
from functools import partial
from itertools import chain, count, cycle

import numpy as np
import timm
import torch

import timm_multiexit as tme
from timm_multiexit.arguments import parse_exits, parse_train_args
from timm_multiexit.build import create_regime, create_task, create_train_model, create_train_optimizer, place_model
from timm_multiexit.launch import create_accelerator
from timm_multiexit.losses import LOSSES
from timm_multiexit.metrics import describe_environment, format_table
from timm_multiexit.training import TrainingRun

POPULAR = """
    resnet18 resnet50 resnet10t mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0
    convnext_tiny regnety_008 densenet121 vgg19_bn ghostnet_100 repvit_m1 fastvit_t8 swin_tiny_patch4_window7_224
    vit_small_patch16_224 vit_tiny_patch16_224 deit_tiny_patch16_224 mobilevit_s hgnetv2_b0
""".split()


def read_clock(device):
    """Return the time in seconds, with all work on the device done.

    On a CPU with one thread it is the time that this process has used, in which other programs do not count.
    """
    if device.type == 'cpu' and torch.get_num_threads() == 1:
        return time.process_time()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def time_interleaved(variants, rounds, device):
    """Return the seconds of each variant in each round, after one round that does not count."""
    times = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for round_idx in range(rounds + 1):
        shuffle(order)
        for name in order:
            started = read_clock(device)
            variants[name]()
            if round_idx:
                times[name].append(read_clock(device) - started)
    return times


@torch.inference_mode()
def infer(args):
    """Print time and MACs of every way to ask the model, as ratios to the plain backbone."""
    device = torch.device(args.device)
    size = (3, args.img_size, args.img_size)
    model = tme.create_model(args.model, exits=args.exits, head=args.exit_head, input_size=size).to(device).eval()
    plain = deepcopy(model.backbone)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    images = torch.randn(args.batch_size, *size, device=device)
    costs = model.cost(size)
    total = costs[-1].fixed.macs
    variants = {'plain timm': lambda: plain(images), 'plain timm again': lambda: plain(images)}
    macs = {'plain timm': total, 'plain timm again': total, 'model(x)': total}
    variants['model(x)'] = lambda: model(images)
    for idx in range(len(model.exits)):
        variants[f'exit_idx={idx}'] = lambda idx=idx: model(images, exit_idx=idx)
        macs[f'exit_idx={idx}'] = costs[idx].fixed.macs
    variants['exits=True'] = lambda: model(images, exits=True)
    macs['exits=True'] = costs[-1].sequential.macs
    times = time_interleaved(variants, args.rounds, device)
    times = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            'call': name,
            'ms': 1e3 * seconds,
            'img/s': args.batch_size / seconds,
            'time ratio': seconds / times['plain timm'],
            'MACs ratio': macs[name] / total,
        }
        for name, seconds in times.items()
    ]
    print(f'{args.model}, batch {args.batch_size}, {args.img_size} pixels, {device}, medians of {args.rounds} rounds')
    print(', '.join(describe_environment().values()), f'\n\n{format_table(rows)}', sep='')


def create_train_args(args, loss=None):
    """Return the arguments with which `train.py` would train; without a loss, the plain model.

    The data is what it takes where none is named, images that come with an installed package.
    """
    flags = f'--model {args.model} --img-size {args.img_size} --batch-size {args.batch_size} --device {args.device}'
    # A low rate: the weights must stay finite on noise. timm's interval between log lines, at which numbers are read.
    flags += f' --num-classes {args.num_classes} --opt sgd --lr 1e-4 --log-interval 50'
    flags += ' --amp --amp-dtype bfloat16' if args.amp else ''
    flags += ' --channels-last' if args.channels_last else ''
    flags += ' --torchcompile' if args.torchcompile else ''
    if loss:
        flags += f' --exit-loss {loss} --exit-head {args.exit_head} --exit-projectors'
    train_args = parse_train_args(flags.split())
    if loss:
        train_args.exits = args.exits
    return train_args


def create_step(train_args, accelerator):
    """Return the bare training step, (images, target) -> None, and its model.

    It is what PyTorch and timm do without a loop around them: no Accelerate, no seeding, no numbers for a log.
    """
    model = place_model(train_args, create_train_model(train_args, None), accelerator)
    task = create_task(train_args, model, accelerator.device).train()
    regime = create_regime(train_args, model)
    optimizer = create_train_optimizer(train_args, model, train_args.batch_size, accelerator, regime)
    if train_args.torchcompile:
        torch._dynamo.config.recompile_limit = 64
        model.compile(backend=train_args.torchcompile)
    layout = torch.channels_last if train_args.channels_last else torch.contiguous_format

    def step(images, target):
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=train_args.amp):
            result = task(images.contiguous(memory_format=layout), target)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def count_train_macs(model):
    """Return the MACs of a forward in training: the backbone, all heads and their projectors."""
    if not hasattr(model, 'exits'):
        return None
    projectors = [head.projector for head in model.exits if head.projector is not None]
    return model.cost()[-1].sequential.macs + sum(linear.weight.numel() for linear in projectors)


def measure_peak(run):
    """Return the MiB that a run takes on the GPU above what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def describe_ratios(times, reference):
    """Return the median of the ratios of two variants' times, round by round, and their quartiles as text."""
    quarter, median, three_quarters = np.percentile(np.divide(times, reference), (25, 50, 75))
    return float(median), f'{quarter:.3f}-{three_quarters:.3f}'


def measure_steps(args, accelerator, batch, turn):
    """Return the rows of the table of bare steps: plain timm, and every loss.

    Args:
        args: Of the command line.
        accelerator: Owns the device.
        batch: Images and target.
        turn: Steps that a variant takes at a time.
    """
    device = accelerator.device
    variants, macs = {}, {}
    for name, loss in (('plain timm', None), ('plain timm again', None), *((loss, loss) for loss in args.losses)):
        step, model = create_step(create_train_args(args, loss), accelerator)
        variants[name] = partial(lambda step: [step(*batch) for _ in range(turn)], step)
        macs[name] = count_train_macs(model)
        if loss:
            total = model.cost()[-1].fixed.macs
    times = time_interleaved(variants, args.rounds, device)
    rows = []
    for name, values in times.items():
        ratio, spread = describe_ratios(values, times['plain timm'])
        macs_ratio = macs[name] / total if macs[name] else 1.0
        rows.append(
            {
                'step': name,
                'ms': 1e3 * statistics.median(values) / turn,
                'img/s': args.batch_size * turn / statistics.median(values),
                'time ratio': ratio,
                'quartiles': spread,
                'MACs ratio': macs_ratio,
                'time / MACs': ratio / macs_ratio,
                'vs ce': describe_ratios(values, times['ce'])[0] if 'ce' in times else None,
            }
        )
        if device.type == 'cuda':
            rows[-1]['MiB above weights'] = measure_peak(variants[name])
    return rows


class InterleavedLoader:
    """Batches for the loop; between its turns it takes the bare step as often.

    Args:
        batches: Endless images and targets.
        step: (images, target) -> None.
        rounds: How often loop and bare step take turns, after one round that does not count.
        turn: Batches in a turn.
        device: Where the work is done.

    Attributes:
        loop, bare: Seconds of each turn.
        waiting: Seconds of the loop's turns before its batches were there.
    """

    def __init__(self, batches, step, *, rounds, turn, device):
        self.batches, self.step, self.device = batches, step, device
        self.rounds, self.turn = rounds, turn
        self.loop, self.bare, self.waiting = [], [], []

    def __len__(self):
        return (self.rounds + 1) * self.turn + 1

    def epoch(self, epoch, first_batch=0):
        """Yield the batches."""
        for round_idx in range(self.rounds + 1):
            seen, waiting = [], 0.0
            begun = read_clock(self.device)
            for _ in range(self.turn):
                asked = time.perf_counter()
                seen.append(next(self.batches))
                waiting += time.perf_counter() - asked
                yield seen[-1]
            looped = read_clock(self.device)
            for batch in seen:
                self.step(*batch)
            if round_idx:
                self.bare.append(read_clock(self.device) - looped)
                self.loop.append(looped - begun)
                self.waiting.append(waiting)
        yield next(self.batches)  # nobody asks for more after the last one, and the last turn would not be seen


def measure_loop(args, accelerator, ready, turn):
    """Return the rows of the table of the training loop, with tensors in memory and with images to prepare.

    Args:
        args: Of the command line.
        accelerator: Owns the device.
        ready: Batches of images and target.
        turn: Steps at a time.
    """
    loss = 'eed' if 'eed' in args.losses else args.losses[0]
    train_args = create_train_args(args, loss)
    # Never opened, so nothing is written.
    run = TrainingRun(train_args, accelerator)
    step, _ = create_step(train_args, accelerator)
    rows = []
    prepared = chain.from_iterable(run.loader.epoch(epoch) for epoch in count())
    for name, batches in (('tensors in memory', cycle(ready)), ('images, augmented, no workers', prepared)):
        loader = InterleavedLoader(batches, step, rounds=args.rounds, turn=turn, device=accelerator.device)
        run.trainer.train_epoch(0, loader)
        ratio, spread = describe_ratios(loader.loop, loader.bare)
        rows.append(
            {
                f'loop of {loss}': name,
                'bare ms': 1e3 * statistics.median(loader.bare) / turn,
                'loop ms': 1e3 * statistics.median(loader.loop) / turn,
                'time ratio': ratio,
                'quartiles': spread,
                'waiting for data, ms': 1e3 * statistics.median(loader.waiting) / turn,
                'waiting, %': 100 * sum(loader.waiting) / sum(loader.loop),
            }
        )
    return rows


def train(args):
    """Print what training steps cost: every loss against plain timm, and the loop of `train.py` against its step."""
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = create_accelerator(create_train_args(args))
    device = accelerator.device
    # A GPU works behind the program's back: several steps at a time, or the wait for it would count.
    turn = 10 if device.type == 'cuda' else 1
    torch.manual_seed(0)
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    ready = [
        (torch.randn(shape, device=device), torch.randint(0, args.num_classes, shape[:1], device=device))
        for _ in range(4)
    ]
    precision = 'bfloat16 autocast' if args.amp else 'float32'
    form = [precision, *('channels_last',) * args.channels_last, *('torch.compile',) * args.torchcompile]
    print(
        f'{args.model}, heads {args.exit_head}, batch {args.batch_size}, {args.img_size} pixels, {device},'
        f' {", ".join(form)}, medians of {args.rounds} rounds of {turn} steps'
    )
    print(', '.join(describe_environment().values()))
    print('', format_table(measure_steps(args, accelerator, ready[0], turn)), sep='\n')
    print('', format_table(measure_loop(args, accelerator, ready, turn)), sep='\n')


def create_empty(name):
    """Return a model with exits whose tensors hold no data."""
    with torch.device('meta'):
        backbone = timm.create_model(name)
        if backbone.num_classes == 0:
            backbone = timm.create_model(name, num_classes=1000)
    return tme.attach_exits(backbone)


def heads(args):
    """Print what each exit costs as a share of its backbone."""
    rows = []
    for name in args.models:
        model = create_empty(name)
        *costs, main_cost = model.cost()
        total = main_cost.fixed.macs
        rows.append(
            {
                'model': name,
                'GMACs': total / 1e9,
                'heads, % of MACs': ' '.join(f'{100 * cost.head.macs / total:.1f}' for cost in costs),
                'fixed, % of MACs': ' '.join(f'{100 * cost.fixed.macs / total:.0f}' for cost in costs),
                'sequential, %': f'{100 * main_cost.sequential.macs / total:.1f}',
            }
        )
    print(format_table(rows))


def coverage(args):
    """Print how many of timm's models take exits, by what their stages give, and why the others do not."""
    names = [name for name in timm.list_models() if not name.startswith('cifar_')]
    kinds, refused = Counter(), {}
    for name in names[:: args.every]:
        try:
            specs = create_empty(name).exits.specs
        except tme.MultiExitError as error:
            refused[name] = str(error)
            continue
        kinds[' and '.join(sorted({spec.layout for spec in specs}))] += 1
    print(format_table([{'stages give': kind, 'models': count} for kind, count in kinds.most_common()]))
    print(f'\n{sum(kinds.values())} of {len(names[:: args.every])} models of timm {timm.__version__} take exits')
    for name, reason in refused.items():
        print(f'{name}: {reason}')


def add_common_flags(command, *, model, batch_size, img_size, rounds):
    """Add the flags of `infer` and `train`, with these defaults."""
    command.add_argument('--model', default=model, metavar='NAME', help=f'timm name (default: {model})')
    command.add_argument('--exits', type=parse_exits, default='auto', metavar='E', help='as in train.py')
    command.add_argument('--exit-head', default='conv', choices=('conv', 'paper', 'linear'), help='default: conv')
    command.add_argument('-b', '--batch-size', type=int, default=batch_size, metavar='N', help=f'default: {batch_size}')
    command.add_argument('--img-size', type=int, default=img_size, metavar='N', help=f'default: {img_size}')
    command.add_argument('--rounds', type=int, default=rounds, metavar='N', help=f'default: {rounds}')
    command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')


def create_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('coverage', help='which models take exits (a quarter of an hour)')
    command.add_argument('--every', type=int, default=1, metavar='N', help='look at every Nth name only')
    command.set_defaults(run=coverage)
    command = commands.add_parser('heads', help='MACs of heads')
    command.add_argument('models', nargs='*', default=POPULAR, metavar='NAME', help='default: twenty popular ones')
    command.set_defaults(run=heads)
    command = commands.add_parser('infer', help='forward passes')
    add_common_flags(command, model='resnet18', batch_size=8, img_size=224, rounds=20)
    command.set_defaults(run=infer)
    command = commands.add_parser('train', help='training steps, and the loop of train.py')
    add_common_flags(command, model='cifar_resnet18', batch_size=64, img_size=32, rounds=5)
    command.add_argument('--num-classes', type=int, default=100, metavar='N', help='default: 100')
    command.add_argument('--losses', nargs='+', default=list(LOSSES), choices=tuple(LOSSES), help='default: all')
    command.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    command.add_argument('--channels-last', action='store_true', help='channels_last memory format')
    command.add_argument('--torchcompile', action='store_true', help='torch.compile, by inductor')
    command.add_argument('--threads', type=int, metavar='N', help="CPU threads, if not torch's number")
    command.set_defaults(run=train)
    return parser


def main(argv=None):
    """Run the command line and return the exit code."""
    args = create_parser().parse_args(argv)
    try:
        if getattr(args, 'rounds', 1) < 1:
            raise tme.MultiExitError(f'--rounds is {args.rounds}, allowed are 1 or more.')
        args.run(args)
    except tme.MultiExitError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
