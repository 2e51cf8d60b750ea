"""Closed tables of what a `config.json` may say: which keys, of which types, in which ranges."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from timm_multiexit.utils.errors import CheckpointError, brief, is_integer, is_number

CONFIG_NAME = 'config.json'
BACKBONE_NAME = 'model.safetensors'
EXITS_NAME = 'exits.safetensors'
CONFIG_KEY = 'multiexit'
MODULE_KEY = 'module'  # in that section, of a backbone that is not timm's
_MAX_EXITS = 64
_MAX_CLASSES = 100_000
_MAX_WIDTH = 16_384
_MAX_PIXELS = 2048
_MAX_TEXT = 10_000


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
        allows: Whether a value is allowed.
        text: The allowed values, in words.
    """

    allows: Callable[[Any], bool]
    text: str


def _integers(least: int, most: int) -> Rule:
    return Rule(lambda value: is_integer(value, least, most), f'integers in [{least}, {most}]')


def _numbers(least: float, most: float) -> Rule:
    return Rule(lambda value: is_number(value) and least <= value <= most, f'numbers in [{least:g}, {most:g}]')


def _lists(rule: Rule, lengths: range) -> Rule:
    return Rule(
        lambda value: isinstance(value, list) and len(value) in lengths and all(map(rule.allows, value)),
        f'lists of {lengths[0]} to {lengths[-1]} {rule.text}' if len(lengths) > 1 else f'{lengths[0]} {rule.text}',
    )


def _either(*rules: Rule) -> Rule:
    return Rule(lambda value: any(rule.allows(value) for rule in rules), ' or '.join(rule.text for rule in rules))


def _words(pattern: str, text: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, text)


_BOOL = Rule(lambda value: isinstance(value, bool), 'true or false')
_NULL = Rule(lambda value: value is None, 'null')
_TEXT = Rule(lambda value: isinstance(value, str) and len(value) <= _MAX_TEXT, f'text of up to {_MAX_TEXT} characters')
_TEXTS = _either(_TEXT, _lists(_TEXT, range(_MAX_CLASSES + 1)))

_TEXT_TABLE = Rule(
    lambda value: isinstance(value, dict) and len(value) <= _MAX_CLASSES and all(map(_TEXT.allows, value.values())),
    'an object of texts',
)

_PIXELS = _integers(1, _MAX_PIXELS)
_SIZE = _either(_PIXELS, _lists(_PIXELS, range(2, 3)))
_RATE = _numbers(0, 1)
_CLASSES = _integers(0, _MAX_CLASSES)
_CHANNELS = _integers(1, 1024)
_PATHS = _words(r'[A-Za-z0-9_.]{1,200}', 'names of modules')
_MODULES = _either(_NULL, _PATHS, _lists(_PATHS, range(9)))
_NAMES = _words(r'[A-Za-z0-9_-]{0,40}', 'short names')
_COLORS = _lists(_numbers(-1e4, 1e4), range(1, 1025))

_IMAGE = Rule(
    lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and _CHANNELS.allows(value[0])
        and all(map(_PIXELS.allows, value[1:]))
    ),
    f'[channels, height, width] of up to {_MAX_PIXELS} pixels a side',
)

_NOTHING = Rule(lambda value: not value, '')

# Keywords of timm.create_model that a file may set.
MODEL_ARGS: dict[str, Rule] = {
    'num_classes': _CLASSES,
    'in_chans': _CHANNELS,
    'img_size': _SIZE,
    'global_pool': _NAMES,
    'drop_rate': _RATE,
    'drop_path_rate': _RATE,
    'drop_block_rate': _RATE,
    'proj_drop_rate': _RATE,
    'attn_drop_rate': _RATE,
    'pos_drop_rate': _RATE,
    'patch_drop_rate': _RATE,
    'bn_momentum': _RATE,
    'bn_eps': _RATE,
    'output_stride': _integers(1, 64),
    'patch_size': _SIZE,
    'window_size': _SIZE,
    'class_token': _BOOL,
    'no_embed_class': _BOOL,
    'dynamic_img_size': _BOOL,
    'dynamic_img_pad': _BOOL,
    'strict_img_size': _BOOL,
}

# Fields of timm's PretrainedCfg; the first ones name a place of weights, which a file must not do.
_PRETRAINED_CFG: dict[str, Rule] = {
    'url': _NOTHING,
    'file': _NOTHING,
    'state_dict': _NOTHING,
    'hf_hub_id': _NOTHING,
    'hf_hub_filename': _NOTHING,
    'source': _NOTHING,
    # True in older files of timm: of the weights in the authors' format, not of those beside the file.
    'custom_load': _BOOL,
    'tag': _either(_NULL, _TEXT),
    'input_size': _IMAGE,
    'test_input_size': _either(_NULL, _IMAGE),
    'min_input_size': _either(_NULL, _IMAGE),
    'fixed_input_size': _BOOL,
    'interpolation': _NAMES,
    'crop_pct': _numbers(1e-3, 10),
    'test_crop_pct': _either(_NULL, _numbers(1e-3, 10)),
    'crop_mode': _NAMES,
    'mean': _COLORS,
    'std': _lists(_numbers(1e-6, 1e4), range(1, 1025)),
    'num_classes': _integers(-1, _MAX_CLASSES),
    'label_offset': _either(_NULL, _integers(0, 1)),
    'label_names': _either(_NULL, _lists(_TEXT, range(_MAX_CLASSES + 1)), _TEXT_TABLE),
    'label_descriptions': _either(_NULL, _TEXT_TABLE),
    'pool_size': _either(_NULL, _lists(_PIXELS, range(2, 3))),
    'test_pool_size': _either(_NULL, _lists(_PIXELS, range(2, 3))),
    'first_conv': _MODULES,
    'classifier': _MODULES,
    'license': _either(_NULL, _TEXT),
    'description': _either(_NULL, _TEXT),
    'origin_url': _either(_NULL, _TEXT),
    'paper_name': _either(_NULL, _TEXT),
    'paper_ids': _either(_NULL, _TEXTS),
    'notes': _either(_NULL, _TEXTS),
}

_ROOT: dict[str, Rule] = {
    'num_classes': _CLASSES,
    'label_names': _PRETRAINED_CFG['label_names'],
    'label_descriptions': _PRETRAINED_CFG['label_descriptions'],
}

# What a file says of a module that is not timm's.
MODULE_RULES: dict[str, Rule] = {
    'classifiers': _lists(_words(r'.{1,200}', 'names of modules'), range(1, 9)),
    'num_classes': _integers(1, _MAX_CLASSES),
    'input_size': _IMAGE,
}


def _pick(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Return the listed values, checked; others are ignored, so that newer files can be read."""
    picked = {name: values[name] for name in rules if name in values}
    for name, value in picked.items():
        if rules[name].allows(value):
            continue
        if rules[name] is _NOTHING:
            raise CheckpointError(
                f'{name} must be empty in a file, got {brief(value)}: weights are those in {BACKBONE_NAME} beside it.'
            )
        raise CheckpointError(f'{name} in a file must be {rules[name].text}, got {brief(value)}.')
    return {name: value for name, value in picked.items() if name != 'custom_load' and rules[name] is not _NOTHING}
