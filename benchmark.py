#!/usr/bin/env python3
"""Speed of a multi-exit network as ratios to plain timm in the same run: `benchmark.py infer --model resnet18`.

Every variant runs once per round and the rounds are interleaved, so that a busy machine slows all of them alike; the
table gives medians, and plain timm twice, whose difference is the noise.
"""

import argparse
import statistics
import sys
import time
from copy import deepcopy

import torch

import timm_multiexit as tme
from timm_multiexit.arguments import parse_exits
from timm_multiexit.metrics import describe_environment, format_table


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


def main(argv=None):
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('infer', help='forward passes')
    command.add_argument('--model', default='resnet18', metavar='NAME', help='timm name (default: resnet18)')
    command.add_argument('--exits', type=parse_exits, default='auto', metavar='E', help='as in train.py')
    command.add_argument('--exit-head', default='conv', choices=('conv', 'paper', 'linear'), help='default: conv')
    command.add_argument('-b', '--batch-size', type=int, default=8, metavar='N', help='default: 8')
    command.add_argument('--img-size', type=int, default=224, metavar='N', help='default: 224')
    command.add_argument('--rounds', type=int, default=20, metavar='N', help='default: 20')
    command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    args = parser.parse_args(argv)
    try:
        infer(args)
    except tme.MultiExitError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
