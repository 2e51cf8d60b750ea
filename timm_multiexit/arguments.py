"""Command lines: timm's flag names and defaults, and the few that exits add.

Parsers are made by functions, so that importing a script parses nothing and tests can call `main([...])`.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import yaml
from timm.utils import ParseKwargs

from timm_multiexit.config import MultiExitError
from timm_multiexit.data import DIGITS, DIGITS_SIZE
from timm_multiexit.heads import HEADS
from timm_multiexit.losses import LOSSES

# What `train.py` does where no data is named: a small real network on the digits, in under two minutes on two cores.
DIGITS_DEFAULTS: dict[str, Any] = {
    'dataset': DIGITS,
    'test_split': 'test',
    'model': 'cs3darknet_s',
    'num_classes': 10,
    'img_size': DIGITS_SIZE,
    'epochs': 10,
    'warmup_epochs': 1,
    'sched_on_updates': True,
    'batch_size': 64,
    'opt': 'adamw',
    'lr': 2e-3,
    'weight_decay': 0.05,
    'hflip': 0.0,
    'color_jitter': 0.0,
    'scale': [0.7, 1.0],
    'ratio': [0.9, 1.1],
    'crop_pct': 1.0,
    'smoothing': 0.0,
    'workers': 0,
    'log_interval': 10,
}


def parse_exits(text: str) -> str | int | list[int] | list[str]:
    """Return what `--exits` means: one value with commas, so that it never swallows the data folder after it.

    >>> parse_exits('auto'), parse_exits('3'), parse_exits('[3]'), parse_exits('3,'), parse_exits('layer1,layer2')
    ('auto', 3, [3], [3], ['layer1', 'layer2'])
    """
    bare = text.strip()
    if bare == 'auto':
        return bare
    if bare.isdecimal():
        return int(bare)
    items = [item.strip() for item in bare.removeprefix('[').removesuffix(']').split(',') if item.strip()]
    if not items:
        raise argparse.ArgumentTypeError(f"'{text}' names no exit; allowed are auto, 3, [3], 1,2 or layer1,layer2")
    if all(item.removeprefix('-').isdecimal() for item in items):
        return [int(item) for item in items]
    return items


def create_train_parser() -> argparse.ArgumentParser:
    """Return the parser of `train.py`."""
    parser = argparse.ArgumentParser(
        prog='train.py',
        description='Train a timm model, with --eed or --exits a multi-exit one. Without data: handwritten digits.',
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of flag values; flags given here win')
    _add_data(parser, is_training=True)
    _add_model(parser, is_training=True)
    _add_exits(parser, is_training=True)
    _add_device(parser)
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_run(parser)
    return parser


def create_validate_parser() -> argparse.ArgumentParser:
    """Return the parser of `validate.py`."""
    parser = argparse.ArgumentParser(
        prog='validate.py',
        description='Accuracy and cost of every exit of a model name, a model folder or a training checkpoint.',
    )
    _add_data(parser, is_training=False)
    _add_model(parser, is_training=False)
    _add_exits(parser, is_training=False)
    _add_device(parser)
    group = parser.add_argument_group('Evaluation')
    group.add_argument('--checkpoint', default='', metavar='PATH', help='training checkpoint (*.pth.tar) to evaluate')
    group.add_argument('--use-ema', action='store_true', help="take the checkpoint's averaged weights")
    group.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size (default: 256)')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes (default: 4)')
    group.add_argument('--pin-mem', action='store_true', help='pin host memory for transfers')
    group.add_argument('--no-prefetcher', action='store_true', help='leave out the prefetcher')
    group.add_argument('--results-file', default='', metavar='FILE', help='write the table to this file')
    group.add_argument('--results-format', default='csv', choices=('csv', 'json'), help='its format (default: csv)')
    return parser


def parse_train_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a training run: flags over `--config` over the digits' defaults over timm's.

    Raises:
        MultiExitError: The configuration file cannot be read or names unknown flags.
    """
    parser = create_train_parser()
    config_path = parser.parse_known_args(argv)[0].config
    config = read_config(config_path, parser) if config_path else {}
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    args.is_demo = not (args.data or args.data_dir or args.dataset)
    if args.is_demo:
        parser.set_defaults(**{**DIGITS_DEFAULTS, **config})
        args = argparse.Namespace(**vars(parser.parse_args(argv)), is_demo=True)
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    if args.eed:
        if args.exit_loss not in (None, 'eed'):
            raise MultiExitError(f'--eed and --exit-loss {args.exit_loss} contradict each other: give one of them.')
        args.exit_loss = 'eed'
    if args.exit_loss and args.exits is None:
        args.exits = 'auto'
    if args.exits is not None and args.exit_loss is None:
        args.exit_loss = 'ce'
    _check_ranges(args)
    return args


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the flag values of a YAML file.

    Raises:
        MultiExitError: The file is missing, no mapping, or has keys that are no flags.
    """
    try:
        with open(path) as file:
            config = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise MultiExitError(f'--config {path} cannot be read: {str(error).splitlines()[0]}.') from error
    if not isinstance(config, dict):
        raise MultiExitError(f'--config {path} must be a mapping of flag names to values.')
    known = {action.dest for action in parser._actions}
    config = {str(key).replace('-', '_'): value for key, value in config.items()}
    config.pop('is_demo', None)  # an args.yaml that a run wrote is a configuration too
    unknown = sorted(config.keys() - known)
    if unknown:
        raise MultiExitError(f'--config {path} has unknown keys: {", ".join(unknown)}. See --help for the flags.')
    if isinstance(config.get('exits'), str):
        config['exits'] = parse_exits(config['exits'])
    return config


def _check_ranges(args: argparse.Namespace) -> None:
    for name in ('epochs', 'batch_size', 'checkpoint_hist', 'log_interval'):
        if getattr(args, name) < 1:
            raise MultiExitError(f'--{name.replace("_", "-")} is {getattr(args, name)}, allowed are integers from 1.')
    if args.lr is not None and not (math.isfinite(args.lr) and args.lr >= 0):
        raise MultiExitError(f'--lr is {args.lr}, allowed are numbers from 0.')
    if args.clip_mode not in ('norm', 'value', 'agc'):
        raise MultiExitError(f"--clip-mode is '{args.clip_mode}', allowed are norm, value and agc.")
    if args.amp_dtype not in ('float16', 'bfloat16'):
        raise MultiExitError(f"--amp-dtype is '{args.amp_dtype}', allowed are float16 and bfloat16.")
    if args.head_widths is not None and args.exits is None:
        raise MultiExitError('--exit-widths needs exits: add --exits or --exit-loss.')


def _parse_widths(text: str) -> list[list[int]]:
    try:
        return [[int(width) for width in part.split('-')] for part in text.split(',')]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of widths such as 64-128-512,128-512") from error


def _add_data(parser: argparse.ArgumentParser, *, is_training: bool) -> None:
    parser.add_argument('data', nargs='?', metavar='DIR', help='data folder (deprecated, use --data-dir)')
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='data folder, holding SPLIT/CLASS/IMAGE')
    group.add_argument('--dataset', default='', metavar='NAME', help="timm data set TYPE/NAME, or 'digits'")
    if is_training:
        group.add_argument('--train-split', default='train', metavar='NAME', help='default: train')
        group.add_argument('--val-split', default='validation', metavar='NAME', help='evaluated after every epoch')
        group.add_argument('--test-split', metavar='NAME', help='for the final table (default: the val split)')
    else:
        group.add_argument('--split', default='validation', metavar='NAME', help='default: validation')
    group.add_argument('--dataset-download', action='store_true', help='let torch/ and tfds/ data sets download')
    group.add_argument('--class-map', default='', metavar='FILE', help='file of class names in index order')
    group.add_argument('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB, or L)')


def _add_model(parser: argparse.ArgumentParser, *, is_training: bool) -> None:
    group = parser.add_argument_group('Model')
    model = 'resnet50' if is_training else None
    group.add_argument('--model', default=model, metavar='NAME', help='timm name or local-dir:FOLDER')
    group.add_argument('--pretrained', action='store_true', help='start from trained weights')
    group.add_argument('--num-classes', type=int, metavar='N', help="default: the data set's, else the model's")
    group.add_argument('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    group.add_argument('--img-size', type=int, metavar='N', help="default: the model's")
    group.add_argument('--in-chans', type=int, metavar='N', help='image channels (default: 3)')
    group.add_argument('--input-size', nargs=3, type=int, metavar='N', help='channels height width')
    group.add_argument('--crop-pct', type=float, metavar='F', help='centre crop for evaluation, as a fraction')
    group.add_argument('--mean', type=float, nargs='+', metavar='M', help='channel means')
    group.add_argument('--std', type=float, nargs='+', metavar='S', help='channel standard deviations')
    group.add_argument('--interpolation', default='', metavar='NAME', help='resize for evaluation')
    group.add_argument('--channels-last', action='store_true', help='channels_last memory format')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='KEY=VALUE for the model')
    if is_training:
        group.add_argument('--initial-checkpoint', default='', metavar='PATH', help='weights to start from')
        group.add_argument('--resume', default='', metavar='PATH', help='checkpoint of a run to go on with')
        group.add_argument('--no-resume-opt', action='store_true', help='resume without the optimizer state')
        group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations in backward')
        group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile')
        group.add_argument('--torchcompile-mode', metavar='MODE', help="torch.compile's mode")


def _add_exits(parser: argparse.ArgumentParser, *, is_training: bool) -> None:
    group = parser.add_argument_group('Exits')
    group.add_argument(
        '--exits',
        type=parse_exits,
        metavar='E',
        help='auto; 3: that many; [3] or 3, or 1,2: feature_info indices; layer1,layer2: module names',
    )
    group.add_argument('--exit-head', default='conv', choices=tuple(HEADS), help='type of the heads (default: conv)')
    group.add_argument(
        '--exit-widths',
        dest='head_widths',
        type=_parse_widths,
        metavar='W',
        help='widths of the heads, 64-128-512,128-512,512: a list per exit',
    )
    if not is_training:
        return
    group.add_argument('--eed', action='store_true', help='Exit-Ensemble Distillation, the same as --exit-loss eed')
    group.add_argument('--exit-loss', choices=tuple(LOSSES), help='default with exits: ce')
    group.add_argument('--exit-output-loss', choices=('kl', 'mse'), help='distance of outputs (default: kl)')
    group.add_argument('--exit-output-weight', type=float, metavar='W', help='default: 0.1 for kl, 1 for mse')
    group.add_argument('--exit-feature-weight', type=float, metavar='W', help='default: 1 for byot, else 0')
    group.add_argument(
        '--exit-projectors', action='store_true', help="bring narrow features to main's width in training"
    )
    group.add_argument('--exit-temperature', type=float, metavar='T', help='temperature of kl (default: 3)')


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', metavar='TYPE', help='float16 or bfloat16 (default: float16)')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='timm optimizer (default: sgd)')
    group.add_argument('--opt-eps', type=float, metavar='E', help="default: the optimizer's")
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help="default: the optimizer's")
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='default: 0.9')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='W', help='default: 2e-5')
    group.add_argument('--clip-grad', type=float, metavar='V', help='bound for gradients (default: none)')
    group.add_argument('--clip-mode', default='norm', metavar='MODE', help='norm, value or agc (default: norm)')
    group.add_argument('--layer-decay', type=float, metavar='D', help='learning rate factor from layer to layer')
    group.add_argument('--layer-decay-min-scale', type=float, default=0, metavar='S', help='its lower bound')
    group.add_argument('--layer-decay-no-opt-scale', type=float, metavar='S', help='layers below it do not train')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, help='KEY=VALUE for the optimizer')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per step (default: 1)')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='timm schedule (default: cosine)')
    group.add_argument('--sched-on-updates', action='store_true', help='step it on every update')
    group.add_argument('--lr', type=float, metavar='LR', help='learning rate; overrides --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR', help='lr = base * global batch / base size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='default: 256')
    group.add_argument('--lr-base-scale', default='', metavar='S', help='linear or sqrt (default: by optimizer)')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='default: 1e-5')
    group.add_argument('--min-lr', type=float, default=0, metavar='LR', help='default: 0')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='default: 300')
    group.add_argument('--start-epoch', type=int, metavar='N', help='default: 0, or where the resumed run was')
    group.add_argument('--decay-milestones', default=[90, 180, 270], type=int, nargs='+', metavar='N')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='default: 90')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='default: 5')
    group.add_argument('--warmup-prefix', action='store_true', help='warm-up comes before the schedule')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the lowest rate')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='of the plateau schedule')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='F', help='default: 0.1')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation and regularization')
    group.add_argument('--no-aug', action='store_true', help='no training augmentation')
    group.add_argument('--train-crop-mode', metavar='MODE', help='crop mode in training')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='F', help='of random crops')
    group.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='F', help='of random crops')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='default: 0.5')
    group.add_argument('--vflip', type=float, default=0.0, metavar='P', help='default: 0')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='F', help='default: 0.4')
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment, RandAugment, AugMix policy')
    group.add_argument('--reprob', type=float, default=0.0, metavar='P', help='random erasing (default: 0)')
    group.add_argument('--remode', default='pixel', metavar='MODE', help='what erases (default: pixel)')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='erased patches (default: 1)')
    group.add_argument('--mixup', type=float, default=0.0, metavar='A', help='mixup alpha (default: 0, off)')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='A', help='cutmix alpha (default: 0, off)')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', metavar='F', help='cutmix ratios, instead of alpha')
    group.add_argument('--mixup-prob', type=float, default=1.0, metavar='P', help='of mixing a batch (default: 1)')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='of cutmix where both are on')
    group.add_argument('--mixup-mode', default='batch', metavar='MODE', help='batch, pair or elem (default: batch)')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='F', help='label smoothing (default: 0.1)')
    group.add_argument('--train-interpolation', default='random', metavar='NAME', help='default: random')
    group.add_argument('--drop', type=float, default=0.0, metavar='P', help='dropout (default: 0)')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='per process (default: 128)')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='default: --batch-size')
    group.add_argument('--sync-bn', action='store_true', help='BatchNorm over all processes')
    group.add_argument('--dist-bn', default='reduce', metavar='HOW', help="BN statistics: broadcast, reduce or ''")
    group.add_argument('--no-ddp-bb', action='store_true', help='no buffer broadcast in DDP')
    group.add_argument('--model-ema', action='store_true', help='keep and evaluate a moving average of the weights')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='default: 0.9998')
    group.add_argument('--model-ema-warmup', action='store_true', help='let its decay rise from 0')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='default: 42')
    group.add_argument('--worker-seeding', default='all', metavar='MODE', help='default: all')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='batches (default: 50)')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints kept (default: 10)')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes (default: 4)')
    group.add_argument('--pin-mem', action='store_true', help='pin host memory for transfers')
    group.add_argument('--no-prefetcher', action='store_true', help='leave out the prefetcher')
    group.add_argument('--output', default='', metavar='DIR', help='default: output/train')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder in --output (default: time and model)')
    group.add_argument(
        '--eval-metric',
        default='top1',
        metavar='M',
        help='that chooses the best epoch: a column of'
        ' summary.csv without eval_ (top1, exit0_top1, ens_top1, loss, ...)',
    )
