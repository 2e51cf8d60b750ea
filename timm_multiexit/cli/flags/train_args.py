"""The command line of training: timm's flags and defaults, and those for exits.

The parser is made by a function, so that importing a command parses nothing and tests can call `main([...])`.
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from timm_multiexit.cli.flags.config_file import read_config
from timm_multiexit.cli.flags.exit_flags import (
    AUGMENTATION_FLAGS,
    DATA_FLAGS,
    EXIT_FLAGS,
    EXIT_TRAIN_FLAGS,
    NORM_FLAGS,
    RUN_FLAGS,
    join_shares,
)
from timm_multiexit.cli.flags.parser import ScriptParser, add_flags, option_name
from timm_multiexit.cli.flags.timm_flags import TIMM_FLAGS
from timm_multiexit.cli.flags.train_rules import check_args
from timm_multiexit.data.digits import DIGITS, DIGITS_SIZE
from timm_multiexit.utils.errors import InvalidValueError

# What training does where no data is named: a small real network on the digits, in under two minutes on two cores.
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
    'checkpoint_hist': 2,  # of 45 MB each
}

# Flags that have the same effect as another: its name and the value it gets, None for the flag's own.
_ALIASES: tuple[tuple[str, str, Any], ...] = (
    ('eed', 'exit_loss', 'eed'),
    ('freeze_backbone', 'regime', 'frozen'),
    ('jsd_loss', 'loss', 'jsd'),
    ('bce_loss', 'loss', 'bce'),
    ('bce_pos_weight', 'loss_pos_weight', None),
    ('drop_connect', 'drop_path', None),
)


def create_train_parser(prog: str = 'train.py') -> ScriptParser:
    """Return the parser of training: every flag of timm's, and ours."""
    parser = ScriptParser(
        prog=prog,
        description='Train a timm model, with --eed or --exits a multi-exit one. Without data: handwritten digits.',
    )
    parser.add_argument(
        '-c', '--config', default='', metavar='FILE', help='YAML file of flag values; flags given here win'
    )
    ours = {
        'Data': DATA_FLAGS,
        'Augmentation and regularization': AUGMENTATION_FLAGS,
        'Batch norm': NORM_FLAGS,
        'Run': RUN_FLAGS,
    }
    for title, flags in TIMM_FLAGS.items():
        add_flags(parser, title, (*flags, *ours.get(title, ())))
        if title == 'Model':
            add_flags(parser, 'Exits', (*EXIT_FLAGS, *EXIT_TRAIN_FLAGS))
    return parser


def parse_train_args(argv: Sequence[str] | None = None, prog: str = 'train.py') -> argparse.Namespace:
    """Return the arguments of a training run: flags over `--config` over the digits' defaults over timm's.

    `is_demo` says whether no data was named, so that the run is on the digits. Errors of a single flag end the program
    with code 2 and one line, as argparse does.
    """
    parser = create_train_parser(prog)
    actions = [action for action in parser._actions if action.dest != 'help']
    defaults = {action.dest: action.default for action in actions}
    for action in actions:
        action.default = argparse.SUPPRESS  # so that only what is given comes back
    given = vars(parser.parse_args(join_shares(argv)))
    chosen = read_config(given['config'], create_train_parser()) if given.get('config') else {}
    chosen |= given
    is_demo = not any(chosen.get(name) for name in ('data', 'data_dir', 'dataset'))
    settings = defaults | (deepcopy(DIGITS_DEFAULTS) if is_demo else {}) | chosen
    for dest, target, _ in _ALIASES:
        if (dest in given) != (target in given):  # of two names for one thing, the one given here wins
            other = target if dest in given else dest
            settings[other] = defaults[other]
    settings |= {dest: default for dest, default in _dependent_defaults(settings).items() if dest not in chosen}
    args = argparse.Namespace(**settings, is_demo=is_demo)
    _resolve(args)
    needs_exits = [flag for flag in (*EXIT_FLAGS, *EXIT_TRAIN_FLAGS) if flag.dest not in ('exits', 'exit_loss', 'eed')]
    check_args(args, needs_exits)
    return args


def _dependent_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that depend on other flags, as in timm 1.0.31, and for a frozen backbone."""
    defaults: dict[str, Any] = {}
    is_multilabel = settings['task'] == 'multilabel'
    if is_multilabel:
        defaults |= {'smoothing': 0.0, 'eval_metric': 'map'}
    if settings['freeze_backbone'] or settings['regime'] == 'frozen':  # main is the same in all epochs
        defaults['eval_metric'] = 'mean_map' if is_multilabel else 'mean_top1'
    if settings['sched'] in ('wsd', 'rsqrt'):
        defaults['decay_epochs'] = 0.2
    return defaults


def _resolve(args: argparse.Namespace) -> None:
    """Let flags that mean the same agree, and fill in what follows from others."""
    for dest, target, meaning in _ALIASES:
        own, now = getattr(args, dest), getattr(args, target)
        if own is None or own is False:
            continue
        if meaning is None:
            meaning = own if dest == 'drop_connect' else str(own)
        if now not in (None, meaning):
            flags = [option_name(name) for name in (dest, target)]
            raise InvalidValueError(f'{flags[0]} and {flags[1]} {now} contradict each other. Give one of them.')
        setattr(args, target, meaning)
    if args.log_wandb and 'wandb' not in args.log_with:
        args.log_with = [*args.log_with, 'wandb']
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    if args.exit_loss and args.exits is None:
        args.exits = 'auto'
    if args.exits is not None and args.exit_loss is None:
        args.exit_loss = 'ce'
