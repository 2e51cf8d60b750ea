"""Flags of exits, of their training and of runs, beside timm's; and what their values mean."""

import argparse
import re
import sys
from collections.abc import Sequence

from timm_multiexit.cli.flags.parser import (
    Choice,
    Flag,
    Items,
    non_negative,
    positive,
    positive_int,
    share_between,
    switch,
    value,
)
from timm_multiexit.exits.heads import HEADS
from timm_multiexit.losses.distances import OUTPUT_WEIGHTS
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.losses.teachers import TEACHER_WEIGHTS

# Widths of the heads, a list per exit; weights of the classifiers, main last; thresholds, of all exits or of each,
# none for an exit that is not used.
parse_widths = Items(lambda item: [int(width) for width in item.split('-')], 'widths such as 64-128-512,128-512')
parse_weights = Items(non_negative, 'weights >= 0 such as 1,0.5,2')
parse_thresholds = Items(
    lambda item: None if item.strip().lower() == 'none' else float(item),
    'numbers, or none for an exit that is not used, such as 0.9 or 0.9,none,0.8',
)


def parse_exits(text: str) -> str | int | list[int] | list[float] | list[str]:
    """Return what `--exits` means: one value with commas, so that it never swallows the data folder after it.

    >>> parse_exits('auto'), parse_exits('3'), parse_exits('[3]'), parse_exits('3,'), parse_exits('layer1,layer2')
    ('auto', 3, [3], [3], ['layer1', 'layer2'])
    >>> parse_exits('0.25,0.5')
    [0.25, 0.5]
    """
    bare = text.strip()
    if bare == 'auto':
        return bare
    if bare.isdecimal():
        return int(bare)
    items = [item.strip() for item in Items.split(bare) if item.strip()]
    if not items:
        raise argparse.ArgumentTypeError(f'must be auto, 3, [3], 1,2, 0.25,0.5 or layer1,layer2, got {text!r}')
    if bare.startswith('-') and bare[1:].isdecimal():
        raise argparse.ArgumentTypeError(f'must be a number of exits >= 1, got {bare}: the index alone is [{bare}]')
    if all(item.removeprefix('-').isdecimal() for item in items):
        return [int(item) for item in items]
    if all(_NUMBER.fullmatch(item) for item in items):
        return [share_between(item) for item in items]
    return items


def join_shares(argv: Sequence[str] | None) -> list[str]:
    """Return a command line, the program's if None, in which shares behind `--exits` are one value.

    No data folder has a name like a share.

    >>> join_shares(['--exits', '0.25', '.5', '-b', '4'])
    ['--exits', '0.25,.5', '-b', '4']
    >>> join_shares(['--exits', '0.5', '1.5'])
    ['--exits', '0.5,1.5']
    >>> join_shares(['--exits', '2', '0.5'])
    ['--exits', '2', '0.5']
    >>> join_shares(['--exits=0.25', '0.5'])
    ['--exits=0.25,0.5']
    """
    joined: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        last = joined[-1] if joined else ''
        shares = last if joined[-2:-1] == ['--exits'] else last.partition('--exits=')[2]
        if all(_SHARE.fullmatch(item) for item in (word, *shares.split(','))):
            joined[-1] += f',{word}'
        else:
            joined.append(word)
    return joined


_NUMBER = re.compile(r'-?\d*\.?\d+(e-?\d+)?')
_SHARE = re.compile(r'\d*\.\d+')  # 1.5 too, so that it is refused as a share


def parse_teacher(text: str) -> str | list[int]:
    """Return who teaches: all classifiers, main, or those of some indices.

    >>> parse_teacher('main'), parse_teacher('0,-1')
    ('main', [0, -1])
    """
    return text if text in ('main', 'all') else Items(int, 'main, all, or indices such as 0,-1')(text)


# What names exits and makes their heads: for training and for evaluation.
EXIT_FLAGS: tuple[Flag, ...] = (
    value(
        '--exits',
        parse_exits,
        None,
        'E',
        'where exits are: auto, a number of exits, indices of feature_info ([3] or 1,2), shares of the MACs (0.25 0.5),'
        ' or names of modules',
    ),
    value('--exit-head', Choice(*HEADS), 'conv', None, 'type of the heads of the exits'),
    value(
        '--exit-widths',
        parse_widths,
        None,
        'W',
        'widths of the layers of each head: 64-128,128 are two of the first exit and one of the second',
        dest='head_widths',
    ),
)

# How exits are trained.
EXIT_TRAIN_FLAGS: tuple[Flag, ...] = (
    switch('--eed', 'Exit-Ensemble Distillation, the same as --exit-loss eed'),
    value('--exit-loss', Choice(*LOSSES), None, None, 'loss of the exits, ce if not given'),
    value('--exit-weights', parse_weights, None, 'W', "weight of each classifier's loss, main last: 1,0.5,2"),
    value(
        '--exit-teacher',
        parse_teacher,
        None,
        'T',
        "who teaches, if not the loss's: main, all, or indices of classifiers (0,-1)",
    ),
    value(
        '--exit-teacher-weights',
        Choice(*TEACHER_WEIGHTS),
        'equal',
        None,
        'weights of those who teach: even ones, or such as follow their skill',
    ),
    switch('--exit-survivors', 'with a frozen backbone: let each exit learn from the images that arrive there'),
    value(
        '--exit-output-loss',
        Choice(*OUTPUT_WEIGHTS),
        None,
        None,
        "distance from the teacher's outputs, kl if not given",
    ),
    value('--exit-output-weight', non_negative, None, 'W', "weight of --exit-output-loss, if not the loss's"),
    value(
        '--exit-feature-weight',
        non_negative,
        None,
        'W',
        "weight of the distance from the teacher's features, if not the loss's",
    ),
    switch('--exit-projectors', "bring narrow features to main's width in training"),
    value('--exit-temperature', positive, None, 'T', 'temperature of the distance of outputs, 3 if not given'),
    value('--exit-warmup-epochs', non_negative, 0.0, 'N', "epochs in which the teacher's weight rises from 0"),
    value('--exit-lr-scale', non_negative, 1.0, 'F', "factor of the heads' learning rate"),
    switch('--freeze-backbone', 'the same as --regime frozen'),
    value(
        '--regime',
        Choice('joint', 'frozen', 'mixed'),
        None,
        None,
        'what trains: all, the heads alone, or first the backbone alone and then all',
    ),
    value(
        '--backbone-epochs',
        positive_int,
        None,
        'N',
        'epochs of the backbone alone in --regime mixed, half of all if not given',
    ),
    value(
        '--head-warmup-epochs',
        non_negative,
        None,
        'N',
        'epochs in which fresh heads train alone, if not chosen by the model',
    ),
)

DATA_FLAGS = (
    value('--test-split', str, None, 'NAME', 'split of the final table, if not --val-split'),
    value('--val-from-train', positive_int, None, 'N', 'hold this many training images out to choose the epoch on'),
    value('--bad-images', Choice('skip', 'stop'), 'skip', None, 'what to do with images that cannot be read'),
    switch('--cache-images', 'keep decoded images in memory, in every loading process'),
)

AUGMENTATION_FLAGS = (
    value('--crop-padding', positive_int, None, 'N', 'crop at random from images padded by N zero pixels, 4 for CIFAR'),
)

NORM_FLAGS = (
    switch(
        '--freeze-bn-stats',
        "the backbone's batch norms normalize by the statistics of its pretrained weights, which stay",
    ),
)

RUN_FLAGS = (
    value(
        '--log-with', Choice('tensorboard', 'wandb'), [], None, 'write the curves of the run for these too', nargs='+'
    ),
    switch('--progress', 'show a progress bar'),
    value(
        '--push-to-hub', str, '', 'ORG/NAME', 'publish the best network there at the end, as `timm-multiexit publish`'
    ),
    switch('--hub-private', 'with --push-to-hub: into a private repository'),
    value(
        '--hub-license',
        str,
        None,
        'ID',
        'license of the weights with --push-to-hub, if not that of the weights training started from',
    ),
)
