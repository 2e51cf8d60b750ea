"""Command lines: timm's flag names and defaults, and the few that exits add.

Parsers are made by functions, so that importing a script parses nothing and tests can call `main([...])`.
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from timm_multiexit.checks import check_args
from timm_multiexit.config import MultiExitError
from timm_multiexit.config_file import read_config
from timm_multiexit.data import DIGITS, DIGITS_SIZE
from timm_multiexit.distillation import OUTPUT_WEIGHTS
from timm_multiexit.flags import TIMM_FLAGS, Flag, ScriptParser, add_flags, switch, value
from timm_multiexit.heads import HEADS
from timm_multiexit.losses import LOSSES
from timm_multiexit.policy import COMBINATIONS, CRITERIA

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


def parse_widths(text: str) -> list[list[int]]:
    """Return the widths of every exit's head, shallow to deep.

    >>> parse_widths('64-128,128')
    [[64, 128], [128]]
    """
    try:
        return [[int(width) for width in part.split('-')] for part in _items(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of widths such as 64-128-512,128-512") from error


def parse_weights(text: str) -> list[float]:
    """Return one weight per classifier, shallow to deep, main last.

    >>> parse_weights('1,0.5,2')
    [1.0, 0.5, 2.0]
    """
    try:
        return [float(item) for item in _items(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of weights such as 1,0.5,2") from error


def parse_teacher(text: str) -> str | list[int]:
    """Return who teaches: all classifiers, main, or those of some indices.

    >>> parse_teacher('main'), parse_teacher('0,-1')
    ('main', [0, -1])
    """
    if text in ('main', 'all'):
        return text
    try:
        return [int(item) for item in _items(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no teacher, allowed are main, all, or 0,-1: indices") from error


def parse_thresholds(text: str) -> list[float | None]:
    """Return the thresholds of a policy, one for all exits or one per exit; none for an exit that is not used.

    >>> parse_thresholds('0.9'), parse_thresholds('0.9,none,0.8')
    ([0.9], [0.9, None, 0.8])
    """
    try:
        return [None if item.strip().lower() == 'none' else float(item) for item in _items(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no threshold, allowed are 0.9 or 0.9,none,0.8") from error


def _items(text: str) -> list[str]:
    return text.strip().removeprefix('[').removesuffix(']').split(',')


# What names exits and makes their heads: for training and for evaluation.
EXIT_FLAGS: tuple[Flag, ...] = (
    value(
        '--exits',
        parse_exits,
        None,
        'E',
        'auto; 3: that many; [3] or 3, or 1,2: feature_info indices; layer1,layer2: module names',
    ),
    value('--exit-head', str, 'conv', None, 'type of the heads', choices=tuple(HEADS)),
    value(
        '--exit-widths', parse_widths, None, 'W', 'widths of the heads, 64-128,128: a list per exit', dest='head_widths'
    ),
)

# How exits are trained.
EXIT_TRAIN_FLAGS: tuple[Flag, ...] = (
    switch('--eed', 'Exit-Ensemble Distillation, the same as --exit-loss eed'),
    value('--exit-loss', str, None, None, 'ce, where there are exits and none is named', choices=tuple(LOSSES)),
    value('--exit-weights', parse_weights, None, 'W', "weights of the classifiers' losses, 1,0.5,2: main last"),
    value('--exit-teacher', parse_teacher, None, 'T', "main, all, or 0,-1: indices, if not the loss's"),
    value('--exit-output-loss', str, None, None, 'distance of outputs, kl if not given', choices=tuple(OUTPUT_WEIGHTS)),
    value('--exit-output-weight', float, None, 'W', "its weight, if not the loss's"),
    value('--exit-feature-weight', float, None, 'W', "weight of the distance of features, if not the loss's"),
    switch('--exit-projectors', "bring narrow features to main's width in training"),
    value('--exit-temperature', float, None, 'T', 'temperature of the distance, 3 if not given'),
    value('--exit-warmup-epochs', float, 0.0, 'N', "epochs in which the teacher's weight rises from 0"),
    value('--exit-lr-scale', float, 1.0, 'F', "factor of the heads' learning rate"),
    switch('--freeze-backbone', 'the same as --regime frozen'),
    value('--regime', str, None, None, 'what trains; mixed: first the backbone', choices=('joint', 'frozen', 'mixed')),
    value('--backbone-epochs', int, None, 'N', 'epochs of the backbone alone in mixed, half of all if not given'),
    value('--head-warmup-epochs', float, None, 'N', 'epochs of fresh heads alone, if not chosen by the model'),
)

_DATA_FLAGS = (
    value('--test-split', str, None, 'NAME', 'split of the final table, if not --val-split'),
    value('--val-from-train', int, None, 'N', 'hold so many training images out to choose the epoch on'),
    value('--bad-images', str, 'skip', None, 'what to do with unreadable ones', choices=('skip', 'stop')),
    switch('--cache-images', 'keep decoded images in memory, in every loading process'),
)
_AUGMENTATION_FLAGS = (
    value('--crop-padding', int, None, 'N', 'crop at random from images padded by N zero pixels, 4 for CIFAR'),
)
_RUN_FLAGS = (
    value('--log-with', str, [], None, 'write curves for these', nargs='+', choices=('tensorboard', 'wandb')),
    switch('--progress', 'show a bar'),
    value('--push-to-hub', str, '', 'ORG/NAME', 'publish the best network there at the end, as hub/publish.py does'),
    switch('--hub-private', 'into a private repository'),
    value('--hub-license', str, None, 'ID', 'of the weights, if not that of those that training started from'),
)
_VALIDATE_FLAGS = (
    value('--checkpoint', str, '', 'PATH', 'training checkpoint (*.pth.tar) to evaluate'),
    switch('--use-ema', "take the checkpoint's averaged weights"),
    value('-b --batch-size', int, 256, 'N', 'batch size'),
    value('-j --workers', int, 4, 'N', 'data loading processes'),
    switch('--pin-mem', 'pin host memory for transfers'),
    switch('--no-prefetcher', 'leave out the prefetcher'),
    value('--results-file', str, '', 'FILE', 'write the results to this file'),
    value('--results-format', str, 'csv', None, 'csv: the table; json: all of it', choices=('csv', 'json')),
)
# What `validate.py` reports of dynamic inference.
_DYNAMIC_FLAGS = (
    value('--calib-split', str, None, 'NAME', 'choose thresholds on this split, not the reported one'),
    value('--calib-from-train', int, None, 'N', 'choose them on what train.py --val-from-train N held out'),
    value('--threshold', parse_thresholds, None, 'T', '0.9: of every exit; 0.9,none,0.8: of each, none: not used'),
    value('--criterion', str, 'confidence', None, 'what a threshold is compared with', choices=tuple(CRITERIA)),
    value('--combine', str, None, None, 'answer with the exits seen so far, together', choices=COMBINATIONS),
    value('--budget', str, [], 'B', 'mean cost of an image: 60%, 1.2GMACs or 5ms', nargs='+', action='extend'),
    value(
        '--max-drop',
        float,
        None,
        'F',
        "0.01: keep main's accuracy to a point; not on images that chose the epoch",
    ),
    value('--delta', float, None, 'P', 'chance that --max-drop is broken, 0.1 if not given'),
    value('--time-rounds', int, 5, 'N', 'rounds in which policies and plain timm are timed in turns, 0: none'),
    switch(
        '--save-policy',
        "write the first --budget's policy, else --max-drop's, and all budgets into the model folder's config.json",
    ),
    value(
        '--compare',
        str,
        [],
        'NAME',
        'static models to set beside it: NAME, NAME:CHECKPOINT',
        nargs='+',
        action='extend',
    ),
    value('--plot', str, '', 'PNG', 'draw accuracy over MACs; with --results-file always, beside it'),
)

# Flags that have the same effect as another: its name and the value it gets, None for the flag's own.
_ALIASES: tuple[tuple[str, str, Any], ...] = (
    ('eed', 'exit_loss', 'eed'),
    ('freeze_backbone', 'regime', 'frozen'),
    ('jsd_loss', 'loss', 'jsd'),
    ('bce_loss', 'loss', 'bce'),
    ('bce_pos_weight', 'loss_pos_weight', None),
    ('drop_connect', 'drop_path', None),
)


def create_train_parser() -> ScriptParser:
    """Return the parser of `train.py`: every flag of timm's, and ours."""
    parser = ScriptParser(
        prog='train.py',
        description='Train a timm model, with --eed or --exits a multi-exit one. Without data: handwritten digits.',
    )
    parser.add_argument(
        '-c', '--config', default='', metavar='FILE', help='YAML file of flag values; flags given here win'
    )
    ours = {'Data': _DATA_FLAGS, 'Augmentation and regularization': _AUGMENTATION_FLAGS, 'Run': _RUN_FLAGS}
    for title, flags in TIMM_FLAGS.items():
        add_flags(parser, title, (*flags, *ours.get(title, ())))
        if title == 'Model':
            add_flags(parser, 'Exits', (*EXIT_FLAGS, *EXIT_TRAIN_FLAGS))
    return parser


def create_validate_parser() -> ScriptParser:
    """Return the parser of `validate.py`."""
    parser = ScriptParser(
        prog='validate.py',
        description='Accuracy and cost of every exit of a model name, a model folder or a training checkpoint.',
    )
    split = value('--split', str, 'validation', 'NAME', 'split to evaluate')
    data = _pick('Data', 'data data_dir dataset dataset_download class_map input_img_mode')
    model = 'pretrained num_classes gp img_size in_chans input_size crop_pct mean std interpolation channels_last'
    name = replace(_pick('Model', 'model')[0], default=None)
    seed = replace(_pick('Run', 'seed')[0], default=None, help="of --calib-from-train, if not the run's")
    add_flags(parser, 'Data', (*data, split))
    add_flags(parser, 'Model', (name, *_pick('Model', f'{model} model_kwargs')))
    add_flags(parser, 'Exits', EXIT_FLAGS)
    add_flags(parser, 'Device', _pick('Device', 'amp amp_dtype'))
    add_flags(parser, 'Evaluation', _VALIDATE_FLAGS)
    train_split = replace(
        _pick('Data', 'train_split')[0], default=None, help="split that --calib-from-train is of, if not the run's"
    )
    add_flags(parser, 'Dynamic inference', (*_DYNAMIC_FLAGS, train_split, seed))
    return parser


def parse_train_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a training run: flags over `--config` over the digits' defaults over timm's.

    `is_demo` says whether no data was named, so that the run is on the digits. Errors of a single flag end the program
    with code 2 and one line, as argparse does.

    Raises:
        MultiExitError: The configuration file is of no use, values are out of range, or flags contradict each other.
    """
    parser = create_train_parser()
    actions = [action for action in parser._actions if action.dest != 'help']
    defaults = {action.dest: action.default for action in actions}
    for action in actions:
        action.default = argparse.SUPPRESS  # so that only what is given comes back
    given = vars(parser.parse_args(argv))
    chosen = read_config(given['config'], create_train_parser()) if given.get('config') else {}
    chosen |= given
    is_demo = not any(chosen.get(name) for name in ('data', 'data_dir', 'dataset'))
    settings = defaults | (deepcopy(DIGITS_DEFAULTS) if is_demo else {}) | chosen
    for dest, default in _dependent_defaults(settings).items():
        if dest not in chosen:
            settings[dest] = default
    for dest, target, _ in _ALIASES:
        if (dest in given) != (target in given):  # of two names for one thing, the one given here wins
            other = target if dest in given else dest
            settings[other] = defaults[other]
    args = argparse.Namespace(**settings, is_demo=is_demo)
    _resolve(args)
    needs_exits = [flag for flag in (*EXIT_FLAGS, *EXIT_TRAIN_FLAGS) if flag.dest not in ('exits', 'exit_loss', 'eed')]
    check_args(args, needs_exits)
    return args


def _dependent_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that depend on other flags, as in timm 1.0.31."""
    defaults: dict[str, Any] = {}
    if settings['task'] == 'multilabel':
        defaults |= {'smoothing': 0.0, 'eval_metric': 'map'}
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
            flags = [f'--{name.replace("_", "-")}' for name in (dest, target)]
            raise MultiExitError(f'{flags[0]} and {flags[1]} {now} contradict each other: give one of them.')
        setattr(args, target, meaning)
    if args.log_wandb and 'wandb' not in args.log_with:
        args.log_with = [*args.log_with, 'wandb']
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    if args.exit_loss and args.exits is None:
        args.exits = 'auto'
    if args.exits is not None and args.exit_loss is None:
        args.exit_loss = 'ce'


def _pick(title: str, dests: str) -> list[Flag]:
    """Return some of timm's flags of one title."""
    flags = {flag.dest: flag for flag in TIMM_FLAGS[title]}
    return [flags[dest] for dest in dests.split()]
