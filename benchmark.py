#!/usr/bin/env python3
"""What exits cost: `infer` and `train` in time, `heads` in MACs; and `coverage`: which of timm's models take them.

`export` compares exported programs with their models, `export-time` measures them, `export-serving` on real images.

Speed is given as ratios to plain timm in the same run. Every variant takes one turn per round, in an order that changes
from round to round, so that a busy machine slows all of them alike; ratios are of one round, and the table gives their
medians, and plain timm twice, whose difference is the noise.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import timm
import torch

import timm_multiexit as tme
from benchmarks.gpu import measure_table
from benchmarks.inference import InferenceBenchmark
from benchmarks.training import create_train_args, measure_loop, measure_steps
from benchmarks.zoo import POPULAR, count_heads, measure_coverage
from timm_multiexit.cli.export import create_exported_model
from timm_multiexit.cli.flags.exit_flags import join_shares, parse_exits
from timm_multiexit.cli.launch import create_accelerator
from timm_multiexit.data.datasets import check_classes, create_checked_dataset
from timm_multiexit.exits.heads import HEADS
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.utils import markdown
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import InvalidValueError, one_line
from timm_multiexit.utils.files import write_output
from timm_multiexit.utils.text import format_table


def infer(args):
    """Print time and MACs of every way to ask a model, as ratios to the plain backbone."""
    size = (3, args.img_size, args.img_size)
    torch.manual_seed(0)
    model = tme.create_model(args.model, exits=args.exits, head=args.exit_head, input_size=size)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(args.device, memory_format=layout).eval()
    form = ', channels_last' * args.channels_last
    print(f'{args.model}, heads {args.exit_head}, {args.img_size} pixels, {args.device}{form}')
    print(', '.join(describe_environment().values()))
    stuck = [idx for idx, can_leave in enumerate(model.can_leave) if not can_leave]
    if stuck:
        print(
            f'Images cannot leave the batch at the exits {stuck}: the batch stops there once all images have decided.'
        )
    uncut = []
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, *size, device=args.device).contiguous(memory_format=layout)
        benchmark = InferenceBenchmark(model, images, bucket_sizes=args.bucket_sizes)
        benchmark.add_fixed()
        benchmark.add_policies(args.shares)
        if args.torchcompile:
            benchmark.add_compiled(args.shares)
        # Single images are quick, and percentiles of their times need many.
        rounds = args.rounds * (5 if batch_size < 8 else 1)
        print(f'\nbatch {batch_size}, {rounds} rounds')
        print(format_table(benchmark.measure(rounds)), flush=True)
        uncut = benchmark.uncut
    if uncut:
        print(f'\nNeither forward_intermediates nor the children in order give the taps of the exits {uncut}.')


def train(args):
    """Print what training steps cost: every loss against plain timm, and the loop of `train.py` against its step."""
    if args.data_dir:
        check_images(args)
    accelerator = create_accelerator(create_train_args(args))
    device = accelerator.device
    # A GPU works behind the program's back: several steps at a time, or the wait for it would count.
    turn = 1 if device.type == 'cpu' else 10
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


def check_images(args):
    """Raise unless --data-dir holds images of --num-classes classes: they are first read after all steps are timed."""
    count = check_classes(create_checked_dataset('', root=args.data_dir, split='train'), None)
    if count != args.num_classes:
        raise InvalidValueError(f'--num-classes must be the {count} of {args.data_dir}, got {args.num_classes}.')


def gpu(args):
    """Print the table of a GPU: channels_last and bfloat16, every form at every batch size, as Markdown."""
    torch.manual_seed(0)
    model = tme.create_model(args.model, exits=args.exits, head=args.exit_head, input_size=(3, *2 * (args.img_size,)))
    model.to(args.device, torch.bfloat16, memory_format=torch.channels_last).eval()
    print(f'{args.model}, heads {args.exit_head}, {args.img_size} pixels, {args.device}, bfloat16, channels_last')
    print(', '.join(describe_environment().values()))
    if args.device.type != 'cuda':
        print('Without CUDA there are no rows of CUDA graphs.')
    rows = measure_table(
        model, args.batch_sizes, rounds=args.rounds, shares=args.shares, compiled=not args.no_torchcompile
    )
    cells = [
        {key: value if isinstance(value, str) else markdown.number(value) for key, value in row.items()} for row in rows
    ]
    print(f'\n{markdown.table(cells, left=("call",))}', flush=True)


def heads(args):
    """Print what each exit costs as a share of its backbone."""
    print(format_table(count_heads(args.models)))


def coverage(args):
    """Write which of timm's models take exits, what these cost and where samples can leave; print the counts."""
    from tests.helpers.families import ENCODERS, FAMILIES, NAMES

    args.output.parent.mkdir(parents=True, exist_ok=True)
    names = [*FAMILIES.values(), *ENCODERS, *(NAMES if args.all else ())]
    content = measure_coverage(list(dict.fromkeys(names)), list(FAMILIES), args.output, again=args.again)
    taking = [row for row in content['models'] if 'reason' not in row]
    kinds = Counter(row['layout'] for row in taking)
    print(format_table([{'stages give': kind, 'models': count} for kind, count in kinds.most_common()]))
    print(f'\n{len(taking)} of {len(content["models"])} models of timm {timm.__version__} take exits')


def export(args):
    """Write a table of how far exported programs are from their models, a network a row."""
    from benchmarks.exporting import check_networks, list_networks

    known = list_networks()
    unknown = [name for name in args.networks if name not in known]
    if unknown:
        raise InvalidValueError(f'NETWORK must be one of {", ".join(known)}, got {unknown[0]}.')
    if args.output.is_file() and not args.networks and not args.again:
        done = {row['network'] for row in json.loads(args.output.read_text(encoding='utf-8'))['rows']}
        known = {name: make for name, make in known.items() if name not in done}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    check_networks(args.networks or list(known), args.output, seconds=args.seconds)


def export_time(args):
    """Print what exported programs of a model folder take, as ratios, and whether policies agree."""
    from benchmarks.export_time import ExportBenchmark, describe_int8, measure_int8, read_int8

    torch.set_num_threads(1)
    torch.manual_seed(0)
    manifest = read_int8(args.int8) if args.int8 else None
    model = create_exported_model(args.model).eval()
    benchmark = ExportBenchmark(model)
    show, lines = create_printer()
    name = args.name or model.pretrained_cfg.get('architecture')
    show(f'{name}, {list(model.input_size)}, batch 1, {args.rounds} rounds')
    show(', '.join(describe_environment().values()))
    show(f'\n{format_table(benchmark.measure(args.rounds))}')
    if model.budgets is not None and model.budgets.total_macs is not None:
        points = list(model.budgets.points)
        points = points[:: -(-len(points) // 10)]
        show(f'\n{format_table(benchmark.measure_savings(points, args.rounds))}')
    if manifest is not None:
        show(f'\n{format_table(measure_int8(args.int8, manifest, args.rounds))}')
        show(f'\n{format_table(describe_int8(manifest))}')
    images = torch.randn(64, *model.input_size) * torch.logspace(-1, 1, 64)[:, None, None, None]
    report = benchmark.compare_policies(args.policies, images.numpy())
    show(f'\n{format_table([{key: str(value) for key, value in report.items()}])}')
    if args.output:
        write_output(args.output, ('\n'.join(lines) + '\n').encode())


def export_serving(args):
    """Print what the runners of exported folders make of real images: images/s, MACs and accuracy of budgets."""
    from benchmarks.export_serving import Serving, load_images
    from timm_multiexit.deploy.runner import Runner, RunnerError

    threads = args.threads or 1
    torch.set_num_threads(threads)  # with one, times are those of this process alone
    show, lines = create_printer()
    try:
        runners = {str(path): Runner(path, threads=threads) for path in args.folders}
        model = create_exported_model(args.model) if args.model else None
        serving = Serving(runners, args.budgets, model)
        images, classes = load_images(next(iter(runners.values())), args.images, args.num_images)
        show(f'{len(images)} images of {list(images.shape[1:])}, {threads} threads of ONNX Runtime')
        show(', '.join(describe_environment().values()))
        for batch_size in args.batch_sizes:
            show(f'\n{format_table(serving.measure(images, classes, batch_size))}')
    except RunnerError as error:
        raise InvalidValueError(str(error)) from error
    if args.output:
        write_output(args.output, ('\n'.join(lines) + '\n').encode())


def create_printer():
    """Return a function that prints a text at once, and the list of what it has printed."""
    lines = []

    def show(text):
        print(text, flush=True)
        lines.append(text)

    return show, lines


def parse_device(text):
    """Return the device of that name."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a device of this machine: {one_line(error)}") from error
    return device


def add_common_flags(command, *, model, img_size, rounds):
    """Add the flags of `infer`, `gpu` and `train`, with these defaults."""
    command.add_argument('--model', default=model, metavar='NAME', help=f'timm name (default: {model})')
    command.add_argument('--exits', type=parse_exits, default='auto', metavar='E', help='as in train.py')
    command.add_argument('--exit-head', default='conv', choices=tuple(HEADS), help='default: conv')
    command.add_argument('--img-size', type=int, default=img_size, metavar='N', help=f'default: {img_size}')
    command.add_argument('--rounds', type=int, default=rounds, metavar='N', help=f'default: {rounds}')
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
    command.add_argument('--device', type=parse_device, default=device, metavar='NAME', help=f'default: {device}')
    command.add_argument('--threads', type=int, metavar='N', help="CPU threads, if not torch's number; 1: CPU time")


def add_infer_flags(command, *, sizes):
    """Add the flags that `infer` and `gpu` share, with these batch sizes."""
    command.add_argument(
        '--batch-sizes', nargs='+', type=int, default=sizes, metavar='N', help=f'default: {" ".join(map(str, sizes))}'
    )
    command.add_argument(
        '--shares', nargs='*', type=float, default=(0.5,), metavar='F', help='leaving at each exit (default: 0.5)'
    )


def create_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('coverage', help='which families take exits, and what these cost (five minutes)')
    path = Path('hub/results/coverage.json')
    command.add_argument('--all', action='store_true', help="all of timm's models, not one of each family (an hour)")
    command.add_argument('--output', type=Path, default=path, metavar='FILE', help=f'JSON (default: {path})')
    command.add_argument('--again', action='store_true', help='models too that the file has')
    command.set_defaults(run=coverage)
    command = commands.add_parser('export', help='exported programs against eager (an hour); needs the extra onnx')
    command.add_argument('networks', nargs='*', metavar='NETWORK', help='families of timm or CIFAR networks; all')
    path = Path('hub/export/parity.json')
    command.add_argument('--output', type=Path, default=path, metavar='FILE', help=f'JSON, and .md (default: {path})')
    command.add_argument('--seconds', type=int, default=600, metavar='N', help='time limit of a network (default: 600)')
    command.add_argument('--again', action='store_true', help='networks too that the file has')
    command.set_defaults(run=export)
    command = commands.add_parser('export-time', help='time of exported programs, and random policies')
    command.add_argument('model', metavar='MODEL', help='folder of a run or of a model')
    command.add_argument('--rounds', type=int, default=25, metavar='N', help='default: 25')
    command.add_argument('--output', type=Path, metavar='FILE', help='text file to write too')
    command.add_argument('--name', metavar='TEXT', help='what the network is called there')
    command.add_argument('--int8', metavar='FOLDER', help='exported folder of it, to compare its int8 programs')
    command.add_argument('--policies', type=int, default=500, metavar='N', help='default: 500')
    command.set_defaults(run=export_time)
    command = commands.add_parser('export-serving', help='exported folders and budgets on real images')
    command.add_argument('folders', nargs='+', type=Path, metavar='FOLDER', help='exported, of one network; main first')
    command.add_argument('--images', type=Path, required=True, metavar='DIR', help='a folder of images per class')
    command.add_argument('--model', help='folder of the run or model, for its times in PyTorch beside them')
    command.add_argument('--budgets', nargs='+', default=('60%',), metavar='B', help='default: 60%%')
    command.add_argument('--batch-sizes', nargs='+', type=int, default=(1, 64), metavar='N', help='default: 1 64')
    command.add_argument('--num-images', type=int, metavar='N', help='default: all')
    command.add_argument('--threads', type=int, metavar='N', help='of ONNX Runtime; 1, the default: CPU time')
    command.add_argument('--output', type=Path, metavar='FILE', help='text file to write too')
    command.set_defaults(run=export_serving)
    command = commands.add_parser('heads', help='MACs of heads')
    command.add_argument('models', nargs='*', default=POPULAR, metavar='NAME', help='default: twenty popular ones')
    command.set_defaults(run=heads)
    command = commands.add_parser('infer', help='forward passes')
    add_common_flags(command, model='resnet18', img_size=224, rounds=20)
    sizes = (1, 32, 64, 256) if torch.accelerator.is_available() else (1, 32)
    add_infer_flags(command, sizes=sizes)
    command.add_argument(
        '--bucket-sizes', nargs='+', type=int, metavar='N', help='batch sizes that infer continues with'
    )
    command.add_argument('--channels-last', action='store_true', help='channels_last memory format')
    command.add_argument('--torchcompile', action='store_true', help='compiled forms beside, by inductor')
    command.set_defaults(run=infer)
    command = commands.add_parser('gpu', help='forward passes on a GPU, in all forms of serving, as a table')
    add_common_flags(command, model='resnet50', img_size=224, rounds=20)
    add_infer_flags(command, sizes=(1, 16, 64, 256))
    command.add_argument('--no-torchcompile', action='store_true', help='leave the compiled forms out')
    command.set_defaults(run=gpu)
    command = commands.add_parser('train', help='training steps, and the loop of train.py')
    add_common_flags(command, model='cifar_resnet18', img_size=32, rounds=5)
    command.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='default: 64')
    command.add_argument('--num-classes', type=int, default=100, metavar='N', help='default: 100')
    command.add_argument('--data-dir', metavar='DIR', help='images of train/ for the loop, of --num-classes classes')
    command.add_argument('--losses', nargs='+', default=list(LOSSES), choices=tuple(LOSSES), help='default: all')
    command.add_argument('--channels-last', action='store_true', help='channels_last memory format')
    command.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    command.add_argument('--torchcompile', action='store_true', help='torch.compile, by inductor')
    command.set_defaults(run=train)
    return parser


def check_args(args):
    """Raise `InvalidValueError` if a number is out of range."""
    for name in (
        'rounds',
        'threads',
        'img_size',
        'batch_size',
        'batch_sizes',
        'bucket_sizes',
        'seconds',
        'policies',
        'num_images',
    ):
        values = getattr(args, name, None)
        for value in values if isinstance(values, (list, tuple)) else (values,):
            if value is not None and value < 1:
                raise InvalidValueError(f'--{name.replace("_", "-")} must be >= 1, got {value}.')
    for share in getattr(args, 'shares', ()):
        if not 0 < share < 1:
            raise InvalidValueError(f'--shares must be in (0, 1), got {share}.')


def main(argv=None):
    """Run the command line and return the exit code."""
    args = create_parser().parse_args(join_shares(argv))
    try:
        check_args(args)
        if getattr(args, 'threads', None):
            torch.set_num_threads(args.threads)
        args.run(args)
    except tme.MultiExitError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
