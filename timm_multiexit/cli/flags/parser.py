"""timm's command-line flags as data: names, types and defaults of its `train.py`, in our words.

Source: huggingface/pytorch-image-models train.py 1.0.29.dev0, and what the README and tests of 1.0.31 name since.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from timm_multiexit.utils.errors import MultiExitError


@dataclass(frozen=True)
class Flag:
    """One flag: its names with spaces between (without dashes: an argument by position), and what argparse is told."""

    names: str
    type: Any
    default: Any
    metavar: str | None
    help: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dest(self) -> str:
        """Name of the flag's attribute: that of its first long name, if no other is given."""
        long = next((name for name in self.names.split() if name.startswith('--')), self.names)
        return self.options.get('dest', long.removeprefix('--').replace('-', '_'))


class KwargsAction(ParseKwargs):
    """timm's action for `KEY=VALUE ...`, with a clear error where the sign is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store the pairs as a dict."""
        wrong = [value for value in values if value and '=' not in value]
        if wrong:
            raise argparse.ArgumentError(self, f"'{wrong[0]}' is no KEY=VALUE")
        super().__call__(parser, namespace, values, option_string)


class ScriptParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the nearest flag for one that there is not."""

    def parse_args(self, args=None, namespace=None):
        """Return the arguments, or end the program with code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((item for item in unknown if item.startswith('-')), None)
            if name is None:
                self.error(f"no flag takes '{unknown[0]}': put values with spaces in quotes.")
            flags = [option for action in self._actions for option in action.option_strings]
            nearest = get_close_matches(name.split('=')[0], flags, n=1)
            self.error(
                f"there is no flag '{name}', " + (f'nearest is {nearest[0]}.' if nearest else '--help lists the flags.')
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and end the program with code 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')


def value(names: str, type: Any, default: Any, metavar: str | None, help: str, **options: Any) -> Flag:
    """Return a flag that takes a value, or several with `nargs`."""
    return Flag(names, type, default, metavar, help, options)


def switch(names: str, help: str) -> Flag:
    """Return a flag that is on when given."""
    return Flag(names, None, False, None, help, {'action': 'store_true'})


def pairs(names: str, help: str) -> Flag:
    """Return a flag that takes KEY=VALUE any number of times."""
    return Flag(names, None, {}, None, help, {'action': KwargsAction, 'nargs': '*', 'metavar': 'KEY=VALUE'})


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """Add flags to a parser under one title; defaults that say something go into the help.

    >>> parser = ScriptParser()
    >>> add_flags(parser, 'Some', [value('-b --batch-size', int, 128, 'N', 'images'), switch('--amp', 'less precise')])
    >>> parser.parse_args(['-b', '4'])
    Namespace(batch_size=4, amp=False)
    """
    group = parser.add_argument_group(title)
    exclusive = None
    for flag in flags:
        shown = flag.default if isinstance(flag.default, list) else [flag.default]
        text = f'{flag.help} (default: {" ".join(map(_shortest, shown))})' if flag.default else flag.help
        options = {'default': copy(flag.default), 'help': text.replace('%', '%%'), **flag.options}
        if options.get('action', 'extend') == 'extend':
            options |= {'type': flag.type, 'metavar': None if 'choices' in options else flag.metavar}
        owner = group
        if flag.dest in ('torchscript', 'torchcompile'):
            owner = exclusive = exclusive or group.add_mutually_exclusive_group()
        owner.add_argument(*flag.names.split(), **options)


def _shortest(default: Any) -> str:
    return f'{default:.4g}' if isinstance(default, float) else str(default)


# What is allowed, how to tell, and the flags that it holds for: of a list for every item, and None always passes.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        'integers from 1',
        lambda number: number >= 1,
        'epochs batch_size validation_batch_size checkpoint_hist log_interval val_interval num_classes img_size'
        ' in_chans input_size recount lr_base_size lr_cycle_limit stop_epoch save_epochs train_num_samples'
        ' val_num_samples train_img_sizes train_batch_sizes train_batches_per_epoch val_from_train'
        ' kd_student_feature_dim kd_teacher_feature_dim naflex_train_seq_lens naflex_max_seq_len naflex_patch_sizes'
        ' backbone_epochs crop_padding',
    ),
    (
        'integers from 0',
        lambda number: number >= 0,
        'workers start_epoch warmup_epochs cooldown_epochs patience_epochs mixup_off_epoch recovery_interval aug_splits'
        ' tta decay_milestones',
    ),
    ('integers from 0 to 4294967295', lambda number: 0 <= number < 2**32, 'seed'),
    (
        'numbers from 0 to 1',
        lambda number: 0 <= number <= 1,
        'hflip vflip color_jitter_prob grayscale_prob gaussian_blur_prob reprob mixup_prob mixup_switch_prob drop'
        ' drop_path drop_connect drop_block bce_target_thresh multilabel_threshold model_ema_decay bn_momentum'
        ' cutmix_minmax opt_betas train_size_random_mix naflex_patch_size_probs',
    ),
    ('numbers from 0, below 1', lambda number: 0 <= number < 1, 'smoothing'),
    (
        'numbers from 0',
        lambda number: 0 <= number < math.inf,
        'lr lr_base warmup_lr min_lr weight_decay momentum decay_rate opt_eps layer_decay_min_scale'
        ' layer_decay_no_opt_scale lr_noise lr_noise_pct lr_noise_std lr_cycle_decay mixup cutmix color_jitter'
        ' epoch_repeats aug_repeats poly_gamma bce_pos_weight train_size_probs train_size_schedule_spread'
        ' distill_loss_weight task_loss_weight exit_weights exit_output_weight exit_feature_weight exit_warmup_epochs'
        ' exit_lr_scale head_warmup_epochs',
    ),
    (
        'numbers above 0',
        lambda number: 0 < number < math.inf,
        'clip_grad layer_decay decay_epochs lr_cycle_mul lr_k_decay lr_stable_timescale scale ratio std crop_pct bn_eps'
        ' kd_temperature exit_temperature',
    ),
    ('finite numbers', math.isfinite, 'mean head_init_scale head_init_bias loss_weight_power poly_epsilon'),
)

_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

NAMES: dict[str, tuple[str, ...]] = {
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': ('float32', 'float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'),
    'lr_decay_fn': ('linear', '1-sqrt', 'cosine', 'power', 'exp'),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'interpolation': _INTERPOLATIONS,
    'train_interpolation': ('random', *_INTERPOLATIONS),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'remode': ('pixel', 'rand', 'const'),
    'mixup_mode': ('batch', 'pair', 'elem', 'half'),
    'worker_seeding': ('all', 'part'),
    'dist_bn': ('reduce', 'broadcast', ''),
    'kd_loss_type': ('kl',),
}


def check_ranges(args: Namespace) -> None:
    """Raise where a value is out of its range or not one of its names.

    Raises:
        MultiExitError: One line with the flag, its value and what is allowed.
    """
    for allowed, is_right, dests in RANGES:
        for dest in dests.split():
            given = getattr(args, dest)
            for number in given if isinstance(given, (list, tuple)) else [given]:
                if number is not None and not is_right(number):
                    raise MultiExitError(f'{option_name(dest)} is {number}, allowed are {allowed}.')
    for dest, names in NAMES.items():
        given = getattr(args, dest)
        if given is not None and given not in names:
            raise MultiExitError(f"{option_name(dest)} is '{given}', allowed are {listed(names)}.")
    _check_lists(args)


def option_name(dest: str) -> str:
    """Return the flag of an attribute: `--batch-size` of `batch_size`."""
    return f'--{dest.replace("_", "-")}'


def listed(names: Iterable[str]) -> str:
    """Return names as a list in words.

    >>> listed(['norm', 'value', 'agc'])
    'norm, value and agc'
    """
    *most, last = [name or "''" for name in names]
    return f'{", ".join(most)} and {last}' if most else last


def _check_lists(args: Namespace) -> None:
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        given = getattr(args, dest)
        if given is not None and not (len(given) == 2 and given[0] <= given[1]):
            raise MultiExitError(
                f'{option_name(dest)} is {_spaced(given)}, allowed are two numbers, the smaller first.'
            )
    if any(later <= earlier for earlier, later in zip(args.decay_milestones, args.decay_milestones[1:])):
        raise MultiExitError(f'--decay-milestones is {_spaced(args.decay_milestones)}, allowed are rising epochs.')
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    for dest in ('mean', 'std'):
        given = getattr(args, dest)
        if given is not None and len(given) not in (1, channels):
            raise MultiExitError(
                f'{option_name(dest)} has {len(given)} numbers, allowed are 1 or {channels}, the channels.'
            )


def _spaced(numbers: Iterable[float]) -> str:
    return ' '.join(map(str, numbers))
