"""The `config.json` of a model folder, checked: closed tables, types and ranges for all that can come from the Hub.

Nothing of the file reaches timm but what is listed here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models._hub import _parse_model_cfg

from timm_multiexit.budgets import BudgetTable
from timm_multiexit.config import FORMAT_VERSION, ExitSpec, MultiExitError, brief
from timm_multiexit.licenses import Origin
from timm_multiexit.policy import ExitPolicy, is_number
from timm_multiexit.untrusted import read_json

CONFIG_NAME = 'config.json'
BACKBONE_NAME = 'model.safetensors'
EXITS_NAME = 'exits.safetensors'
CONFIG_KEY = 'multiexit'

_MAX_EXITS = 64
_MAX_CLASSES = 100_000
_MAX_WIDTH = 16_384
_MAX_PIXELS = 2048
_MAX_TEXT = 10_000


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
        allows: Whether a value is one of them.
        text: They, in words.
    """

    allows: Callable[[Any], bool]
    text: str


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _integers(least: int, most: int) -> Rule:
    return Rule(lambda value: _is_int(value, least, most), f'integers from {least} to {most}')


def _numbers(least: float, most: float) -> Rule:
    return Rule(lambda value: is_number(value) and least <= value <= most, f'numbers from {least:g} to {most:g}')


def _lists(rule: Rule, lengths: range) -> Rule:
    return Rule(
        lambda value: isinstance(value, list) and len(value) in lengths and all(map(rule.allows, value)),
        f'lists of {lengths[0]} to {lengths[-1]} {rule.text}' if len(lengths) > 1 else f'{lengths[0]} {rule.text}',
    )


def _either(*rules: Rule) -> Rule:
    return Rule(lambda value: any(rule.allows(value) for rule in rules), ' or '.join(rule.text for rule in rules))


def _words(pattern: str, text: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, text)


_BOOL = Rule(lambda value: isinstance(value, bool), 'true and false')
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

# Fields of timm's PretrainedCfg; the first ones say where weights come from, which is not for a file to say.
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


@dataclass(frozen=True)
class ModelConfig:
    """What a model folder is, checked.

    Attributes:
        architecture: Name in timm's registry.
        model_args: Keywords of `timm.create_model` that the weights were made with.
        pretrained_cfg: Fields of timm's `PretrainedCfg`, without a place of weights.
        exits: None for a plain timm model.
        policy: Of a calibrated model.
        budgets: Of a calibrated model.
        origin: What the weights started from, where it is known.
    """

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    exits: tuple[ExitSpec, ...] | None = None
    policy: ExitPolicy | None = None
    budgets: BudgetTable | None = None
    origin: Origin | None = None


def read_model_config(directory: Path, *, overridden: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the checked configuration of a model folder.

    Args:
        directory: The folder.
        overridden: Keywords that the caller gives to `timm.create_model`: those of them that a file must not set are
            not read from it.

    Raises:
        MultiExitError: There is none, it is unreadable, of a newer format, or says what a file must not say.
    """
    path = directory / CONFIG_NAME
    config = read_json(path)
    try:
        return _check(config, {name for name, value in (overridden or {}).items() if value is not None})
    except MultiExitError as error:
        raise MultiExitError(f'{path}: {error}') from error


def _check(config: dict[str, Any], overridden: set[str]) -> ModelConfig:
    architecture = config.get('architecture')
    known = isinstance(architecture, str) and re.fullmatch(r'\w{1,100}', architecture) and timm.is_model(architecture)
    if not known:
        raise MultiExitError(
            f'timm has no model {brief(architecture)}: update timm, or import the package that registers it.'
        )
    saved = config.get('pretrained_cfg', config)  # timm's older files have its fields at the root
    if not isinstance(saved, dict):
        raise MultiExitError(f'pretrained_cfg is {brief(saved)}, allowed is an object.')
    if 'labels' in saved and saved is config:
        saved = {**saved, 'label_names': saved['labels']}
    model_args = _check_model_args(config.get('model_args'), overridden)
    cleaned = {'input_size': [3, 224, 224], **_pick(saved, _PRETRAINED_CFG)}
    clean = {
        'architecture': architecture,
        'model_args': model_args,
        'pretrained_cfg': cleaned,
        **_pick(config, _ROOT),
    }
    pretrained_cfg, architecture, model_args = _parse_model_cfg(clean, {})
    return ModelConfig(
        architecture, model_args, _complete(pretrained_cfg, architecture, model_args), **_read_section(config)
    )


def _complete(pretrained_cfg: dict[str, Any], architecture: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's configuration with what decides which weights timm makes anew, which is not for a file to say."""
    default = timm.get_pretrained_cfg(architecture)
    if default is not None:
        pretrained_cfg |= {'first_conv': default.first_conv, 'classifier': default.classifier}
        pretrained_cfg.setdefault('num_classes', default.num_classes)
    num_classes = model_args.get('num_classes', pretrained_cfg.get('num_classes'))
    if pretrained_cfg.setdefault('num_classes', num_classes) != num_classes:
        raise MultiExitError(f'num_classes is {pretrained_cfg["num_classes"]}, in model_args it is {num_classes}.')
    names = pretrained_cfg.get('label_names')
    if isinstance(names, list) and len(names) != num_classes:
        raise MultiExitError(f'label_names are {len(names)}, allowed are {num_classes}, one per class.')
    return pretrained_cfg


def _pick(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Return the listed values, checked; others have no effect, so that newer files can be read."""
    picked = {name: values[name] for name in rules if name in values}
    for name, value in picked.items():
        if rules[name].allows(value):
            continue
        if rules[name] is _NOTHING:
            raise MultiExitError(
                f'{name} is {brief(value)}, which a file must not say: weights are those in {BACKBONE_NAME} beside it.'
            )
        raise MultiExitError(f'{name} is {brief(value)}, allowed in a file are {rules[name].text}.')
    return {name: value for name, value in picked.items() if name != 'custom_load' and rules[name] is not _NOTHING}


def _check_model_args(values: Any, overridden: set[str]) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise MultiExitError(f'model_args is {brief(values)}, allowed is an object.')
    for name, value in values.items():
        if name not in MODEL_ARGS and name not in overridden:
            raise MultiExitError(
                f'model_args has {brief(name)}, which a file must not set: give it yourself, as'
                f' create_model(..., {brief(name).strip(chr(39))}={brief(value)}), if you trust it.'
            )
    # Null means the architecture's own.
    return _pick({name: value for name, value in values.items() if value is not None}, MODEL_ARGS)


def _read_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return exits, policy and budgets."""
    section = config.get(CONFIG_KEY)
    if section is None:
        return {}
    version = section.get('format_version') if isinstance(section, dict) else None
    if not _is_int(version, 1, FORMAT_VERSION):
        writer = section.get('library_version') if isinstance(section, dict) else None
        named = isinstance(writer, str) and re.fullmatch(r'[0-9A-Za-z.+-]{1,30}', writer)
        raise MultiExitError(
            f'it has multi-exit format {brief(version)}, this version reads {FORMAT_VERSION}: update timm_multiexit'
            + (f' to {writer} or later.' if named else '.')
        )
    if section.get('weights', EXITS_NAME) != EXITS_NAME:
        raise MultiExitError(f'the weights of the exits are in {brief(section["weights"])}, allowed is {EXITS_NAME}.')
    exits = section.get('exits')
    if not isinstance(exits, list) or len(exits) > _MAX_EXITS:
        raise MultiExitError(f"it lists no exits under '{CONFIG_KEY}', or more than {_MAX_EXITS}.")
    specs = tuple(ExitSpec.from_dict(values) for values in exits)
    if len({(spec.module, spec.output) for spec in specs}) < len(specs):
        raise MultiExitError('two exits are at the same place, allowed is one.')
    for spec in specs:
        if len(spec.widths) > _MAX_EXITS or max((spec.channels, *spec.widths)) > _MAX_WIDTH:
            raise MultiExitError(
                f'the exit at {brief(spec.module)} has {brief(spec.channels)} channels and widths {brief(spec.widths)},'
                f' allowed are up to {_MAX_WIDTH}, and {_MAX_EXITS} widths.'
            )
    return {'exits': specs, 'origin': _read_origin(section), **_read_policies(section, len(specs))}


def _read_origin(section: Mapping[str, Any]) -> Origin | None:
    values = section.get('origin')
    if values is None:
        return None
    texts = [values.get(name) for name in Origin._fields] if isinstance(values, dict) else [values]
    if not isinstance(values, dict) or not all(text is None or _TEXT.allows(text) for text in texts):
        raise MultiExitError(f'origin is {brief(values)}, allowed is an object with {" and ".join(Origin._fields)}.')
    return Origin(*texts)


def _read_policies(section: Mapping[str, Any], num_exits: int) -> dict[str, Any]:
    policy, budgets = section.get('policy'), section.get('budgets')
    if policy is not None:
        policy = ExitPolicy.from_dict(policy)
        policy.check_exits(num_exits)
    if budgets is not None:
        budgets = BudgetTable.from_dict(budgets)
        budgets.points[0].policy.check_exits(num_exits)
    return {'policy': policy, 'budgets': budgets}
