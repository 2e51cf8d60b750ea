"""The `config.json` of a model folder, checked: closed tables, types and ranges for all that can come from the Hub.

Nothing of the file reaches timm but what is listed here.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models._hub import _parse_model_cfg

from timm_multiexit.checkpoints.config_rules import (
    _MAX_EXITS,
    _MAX_WIDTH,
    _PRETRAINED_CFG,
    _ROOT,
    _TEXT,
    CONFIG_KEY,
    CONFIG_NAME,
    EXITS_NAME,
    MODEL_ARGS,
    MODULE_KEY,
    _pick,
)
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.origin import Origin
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import CheckpointError, MultiExitError, brief, is_integer, one_line
from timm_multiexit.utils.untrusted import read_json

FORMAT_VERSION = 1  # of what `config.json` says of exits; a file of a later one is refused


class Truncation(NamedTuple):
    """What a truncated model is, besides its architecture.

    Attributes:
        exit_idx: Which classifier of the model that it was cut from.
        specs: The exit, nothing for main.
    """

    exit_idx: int
    specs: tuple[ExitSpec, ...]


@dataclass(frozen=True)
class ModelConfig:
    """What a model folder is, checked.

    Attributes:
        architecture: Name in timm's registry.
        model_args: Keywords of `timm.create_model` that the weights were made with.
        pretrained_cfg: Fields of timm's `PretrainedCfg`, without a place of weights.
        exits: None for a plain timm model, and for a truncated one.
        truncated: None but for a truncated model.
        policy: Of a calibrated model.
        budgets: Of a calibrated model.
        origin: What the weights started from, where it is known.
    """

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    exits: tuple[ExitSpec, ...] | None = None
    truncated: Truncation | None = None
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
        CheckpointError: `config.json` is missing, unreadable, of a newer format, or has values that are not allowed.
    """
    path = directory / CONFIG_NAME
    best = directory / 'best'  # as `run_folder` names it
    if not os.path.exists(path) and os.path.isfile(best / CONFIG_NAME):  # pathlib raises for names that are too long
        raise CheckpointError(f'{directory} is the folder of a run, not of a model: give {best}.')
    config = read_json(path)
    try:
        return _check(config, {name for name, value in (overridden or {}).items() if value is not None})
    except MultiExitError as error:
        raise CheckpointError(f'{path}: {error}') from error


def _check(config: dict[str, Any], overridden: set[str]) -> ModelConfig:
    _refuse_module(config)
    architecture = _find_cut(config).get('architecture') or config.get('architecture')
    known = isinstance(architecture, str) and re.fullmatch(r'\w{1,100}', architecture) and timm.is_model(architecture)
    if not known:
        raise CheckpointError(
            f'timm has no model {brief(architecture)}: update timm, or import the package that registers it.'
        )
    saved = config.get('pretrained_cfg', config)  # timm's older files have its fields at the root
    if not isinstance(saved, dict):
        raise CheckpointError(f'pretrained_cfg must be an object, got {brief(saved)}.')
    if 'labels' in saved and saved is config:
        saved = {**saved, 'label_names': saved['labels']}
    model_args = _check_model_args(config.get('model_args'), overridden)
    cleaned = {'input_size': [3, 224, 224], **_pick(saved, _PRETRAINED_CFG)}
    clean = {'architecture': architecture, 'model_args': model_args, 'pretrained_cfg': cleaned, **_pick(config, _ROOT)}
    pretrained_cfg, architecture, model_args = _parse_model_cfg(clean, {})
    return ModelConfig(
        architecture, model_args, _complete(pretrained_cfg, architecture, model_args), **read_section(config)
    )


def _refuse_module(config: Mapping[str, Any]) -> None:
    """Raise for the folder of a module that is not timm's, which no name can create."""
    section = config.get(CONFIG_KEY)
    module = section.get(MODULE_KEY) if isinstance(section, dict) else None
    if module is not None:
        kind = one_line(module.get('type') if isinstance(module, dict) else module, 80)
        raise CheckpointError(
            f'it is of a module that timm cannot create, {kind}: build it, and call'
            ' timm_multiexit.load_exits(module, FOLDER).'
        )


def _complete(pretrained_cfg: dict[str, Any], architecture: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's configuration with the fields that decide which weights are fresh, which a file must not set."""
    default = timm.get_pretrained_cfg(architecture)
    if default is not None:
        pretrained_cfg |= {'first_conv': default.first_conv, 'classifier': default.classifier}
        pretrained_cfg.setdefault('num_classes', default.num_classes)
    num_classes = model_args.get('num_classes', pretrained_cfg.get('num_classes'))
    if pretrained_cfg.setdefault('num_classes', num_classes) != num_classes:
        raise CheckpointError(
            f'num_classes must be that of model_args, {num_classes}, got {pretrained_cfg["num_classes"]}.'
        )
    names = pretrained_cfg.get('label_names')
    if isinstance(names, list) and len(names) != num_classes:
        raise CheckpointError(f'label_names must be {num_classes}, one per class, got {len(names)}.')
    return pretrained_cfg


def _check_model_args(values: Any, overridden: set[str]) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CheckpointError(f'model_args must be an object, got {brief(values)}.')
    for name, value in values.items():
        if name not in MODEL_ARGS and name not in overridden:
            raise CheckpointError(
                f'model_args has {brief(name)}, which a file must not set: pass it yourself, as'
                f' create_model(..., {brief(name).strip(chr(39))}={brief(value)}), if you trust it.'
            )
    # Null means the default of the architecture.
    return _pick({name: value for name, value in values.items() if value is not None}, MODEL_ARGS)


def _find_cut(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the configuration of a truncated model says of that, an empty dict for another model.

    The architecture is there: at the root is what other libraries say when they refuse the folder.
    """
    section = config.get(CONFIG_KEY)
    cut = section.get('truncated') if isinstance(section, dict) else None
    if cut is not None and (not isinstance(cut, dict) or not is_integer(cut.get('exit'), 0, _MAX_EXITS)):
        raise CheckpointError(f'truncated must be an object with an exit in [0, {_MAX_EXITS}], got {brief(cut)}.')
    return cut or {}


def read_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return exits, policy and budgets."""
    section = config.get(CONFIG_KEY)
    if section is None:
        return {}
    version = section.get('format_version') if isinstance(section, dict) else None
    if not is_integer(version, 1, FORMAT_VERSION):
        writer = section.get('library_version') if isinstance(section, dict) else None
        named = isinstance(writer, str) and re.fullmatch(r'[0-9A-Za-z.+-]{1,30}', writer)
        raise CheckpointError(
            f'it has multi-exit format {brief(version)}, this version reads {FORMAT_VERSION}: update timm_multiexit'
            + (f' to {writer} or later.' if named else '.')
        )
    if section.get('weights', EXITS_NAME) != EXITS_NAME:
        raise CheckpointError(f'the weights of the exits must be in {EXITS_NAME}, got {brief(section["weights"])}.')
    exits = section.get('exits')
    if not isinstance(exits, list) or len(exits) > _MAX_EXITS:
        raise CheckpointError(f"'{CONFIG_KEY}' must list up to {_MAX_EXITS} exits.")
    specs = tuple(ExitSpec.from_dict(values) for values in exits)
    if len({(spec.module, spec.output) for spec in specs}) < len(specs):
        raise CheckpointError('exits must be at different places, got two at the same.')
    for spec in specs:
        if len(spec.widths) > _MAX_EXITS or max((spec.channels, *spec.widths)) > _MAX_WIDTH:
            raise CheckpointError(
                f'the exit at {brief(spec.module)} must have at most {_MAX_WIDTH} channels and {_MAX_EXITS} widths of'
                f' at most {_MAX_WIDTH}, got {brief(spec.channels)} channels and widths {brief(spec.widths)}.'
            )
    if cut := _find_cut(config):
        if len(specs) > 1:
            raise CheckpointError(f'A truncated model must have at most one exit, got {len(specs)}.')
        return {'truncated': Truncation(cut['exit'], specs), 'origin': _read_origin(section)}
    return {'exits': specs, 'origin': _read_origin(section), **_read_policies(section, len(specs))}


def _read_origin(section: Mapping[str, Any]) -> Origin | None:
    values = section.get('origin')
    if values is None:
        return None
    texts = [values.get(name) for name in Origin._fields] if isinstance(values, dict) else [values]
    if not isinstance(values, dict) or not all(text is None or _TEXT.allows(text) for text in texts):
        raise CheckpointError(f'origin must be an object of texts {", ".join(Origin._fields)}, got {brief(values)}.')
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
