#!/usr/bin/env python3
"""What exits cost: `benchmark.py infer` in time, `heads` in MACs, `coverage` which of timm's models take them.

Speed is given as ratios to plain timm in the same run. Every variant runs once per round, the rounds are interleaved,
so that a busy machine slows all of them alike; the table gives medians, and plain timm twice, whose difference is the
noise.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from copy import deepcopy

import timm
import torch

import timm_multiexit as tme
from timm_multiexit.arguments import parse_exits
from timm_multiexit.metrics import describe_environment, format_table

POPULAR = """
    resnet18 resnet50 resnet10t mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0
    convnext_tiny regnety_008 densenet121 vgg19_bn ghostnet_100 repvit_m1 fastvit_t8 swin_tiny_patch4_window7_224
    vit_small_patch16_224 vit_tiny_patch16_224 deit_tiny_patch16_224 mobilevit_s hgnetv2_b0
""".split()


def time_interleaved(variants, rounds, device):
    """Return the seconds of each variant in each round, after one round that does not count."""
    times = {name: [] for name in variants}
    for round_idx in range(rounds + 1):
        for name, run in variants.items():
            if device.type == 'cuda':
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if round_idx:
                times[name].append(time.perf_counter() - started)
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


def main(argv=None):
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('coverage', help='which models take exits (a quarter of an hour)')
    command.add_argument('--every', type=int, default=1, metavar='N', help='look at every Nth name only')
    command.set_defaults(run=coverage)
    command = commands.add_parser('heads', help='MACs of heads')
    command.add_argument('models', nargs='*', default=POPULAR, metavar='NAME', help='default: twenty popular ones')
    command.set_defaults(run=heads)
    command = commands.add_parser('infer', help='forward passes')
    command.add_argument('--model', default='resnet18', metavar='NAME', help='timm name (default: resnet18)')
    command.add_argument('--exits', type=parse_exits, default='auto', metavar='E', help='as in train.py')
    command.add_argument('--exit-head', default='conv', choices=('conv', 'paper', 'linear'), help='default: conv')
    command.add_argument('-b', '--batch-size', type=int, default=8, metavar='N', help='default: 8')
    command.add_argument('--img-size', type=int, default=224, metavar='N', help='default: 224')
    command.add_argument('--rounds', type=int, default=20, metavar='N', help='default: 20')
    command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    command.set_defaults(run=infer)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except tme.MultiExitError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
