"""Exit flags."""

import argparse

from timm_multiexit.cli.flags.parser import Flag, switch, value
from timm_multiexit.exits.heads import HEADS
from timm_multiexit.losses.distances import OUTPUT_WEIGHTS
from timm_multiexit.losses.multi_exit_loss import LOSSES


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
