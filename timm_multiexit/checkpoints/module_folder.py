"""The folder of a model around a module that is not timm's: weights, exits, and what the module has to be.

The code of the module is the user's, so no name can create it: `load_exits` takes one that was just built.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from timm_multiexit.checkpoints.architecture import PREFIX, check_state, exit_tensors
from timm_multiexit.checkpoints.config import read_section
from timm_multiexit.checkpoints.config_rules import (
    BACKBONE_NAME,
    CONFIG_KEY,
    CONFIG_NAME,
    EXITS_NAME,
    MODULE_KEY,
    MODULE_RULES,
)
from timm_multiexit.exits.backbone import ModuleInfo, describe_module
from timm_multiexit.exits.cost import meta_copy
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.exits.survey import survey_backbone
from timm_multiexit.models.attach import check_attachable, find_drop_rate
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_path
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError, MultiExitError, brief
from timm_multiexit.utils.untrusted import read_header, read_json


@dataclass(frozen=True)
class ModuleConfig:
    """What the folder of a model around a module that is not timm's says, checked.

    Attributes:
        info: What the module has to be.
        exits: Its exits.
        policy: Of a calibrated model.
        budgets: Of a calibrated model.
        origin: What the weights started from, where it is known.
    """

    info: ModuleInfo
    exits: tuple[ExitSpec, ...]
    policy: ExitPolicy | None = None
    budgets: BudgetTable | None = None
    origin: Origin | None = None


def read_module_config(directory: Path) -> ModuleConfig:
    """Return the checked configuration of a folder of a model around a module that is not timm's.

    Raises:
        CheckpointError: The folder is not of one, or `config.json` is missing, unreadable, of a newer format, or has
            values that are not allowed.
    """
    path = directory / CONFIG_NAME
    values = read_json(path)
    try:
        info, section = _read_module(values), read_section(values)
    except MultiExitError as error:
        raise CheckpointError(f'{path}: {error}') from error
    kept = {name: section.get(name) for name in ('policy', 'budgets', 'origin')}
    return ModuleConfig(info, section.get('exits') or (), **kept)


def _read_module(values: Mapping[str, Any]) -> ModuleInfo:
    section = values.get(CONFIG_KEY)
    module = section.get(MODULE_KEY) if isinstance(section, dict) else None
    if module is None:
        raise CheckpointError(
            "it is not of a module of one's own: create_model('local-dir:FOLDER', pretrained=True) loads timm models."
        )
    if not isinstance(module, dict):
        raise CheckpointError(f'{MODULE_KEY} must be an object, got {brief(module)}.')
    for name, rule in MODULE_RULES.items():
        if not rule.allows(module.get(name)):
            raise CheckpointError(f'{name} must be {rule.text}, got {brief(module.get(name))}.')
    channels, height, width = module['input_size']
    return ModuleInfo(tuple(module['classifiers']), module['num_classes'], (channels, height, width))


def write_module_config(
    model: MultiExitModel, path: Path, model_config: dict[str, Any], data_config: Mapping[str, Any] | None
) -> None:
    """Write the `config.json` of a model around a module that is not timm's, as timm's `save_config_for_hf` does.

    Args:
        model: The model.
        path: The file.
        model_config: What is at the root of it, with the section of exits.
        data_config: Preprocessing.
    """
    assert model.module_info is not None
    other = [key for key, value in model.backbone.state_dict().items() if not isinstance(value, Tensor)]
    if other:
        raise InvalidValueError(f'The state dict of a module must hold tensors to be saved, got {brief(other[0])}.')
    info, kind = model.module_info, type(model.backbone)
    described = {
        'type': f'{kind.__module__}.{kind.__qualname__}',
        'classifiers': list(info.classifiers),
        'num_classes': info.num_classes,
        'input_size': list(info.input_size),
    }
    values = {
        'num_classes': info.num_classes,
        'pretrained_cfg': {'input_size': list(info.input_size), **(data_config or {})},
        **model_config,
    }
    values[CONFIG_KEY] = {**values[CONFIG_KEY], MODULE_KEY: described}
    path.write_text(json.dumps(values, indent=2), encoding='utf-8')


def load_exits(
    module: nn.Module, directory: str | os.PathLike[str], *, drop_rate: float | None = None
) -> MultiExitModel:
    """Return the multi-exit model that a folder holds, around a freshly built module that is not timm's.

    The module gets its weights, and the model its exits, policy and budgets. The folder is not trusted: all it says is
    checked before the module is changed.

    Args:
        module: What `attach_exits` was given, built anew by the same code; its weights are replaced.
        directory: A folder that `save_pretrained` wrote.
        drop_rate: Dropout probability of the heads; the module's if not given, as with `attach_exits`.

    Raises:
        CheckpointError: The folder holds a timm model, values that are not allowed, or files that do not match the
            module or each other.
        InvalidTypeError: The module is not a module.
        InvalidValueError: The module is wrapped or has exits, or drop_rate is out of range.

    >>> import tempfile, torch, timm_multiexit as tme
    >>> def build():
    ...     layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    ...     return nn.Sequential(*layers, nn.Linear(9, 4)).eval()
    >>> model, x = tme.attach_exits(build(), ['1'], input_size=(3, 32, 32)), torch.randn(1, 3, 32, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tme.save_pretrained(model, folder)
    ...     loaded = tme.load_exits(build(), folder)
    >>> torch.equal(loaded(x, exit_idx=0), model(x, exit_idx=0))
    True
    """
    check_attachable(module)
    check_path('directory', directory)
    drop_rate = find_drop_rate(module, drop_rate)
    directory = Path(directory)
    config = read_module_config(directory)
    try:
        _check_fit(module, config)
    except MultiExitError as error:
        raise CheckpointError(f'{directory / CONFIG_NAME}: {error}') from error
    info = config.info
    kept: Any = {'input_size': info.input_size, 'classifier': info.classifiers, 'num_classes': info.num_classes}
    with torch.device('meta'):
        empty = MultiExitModel(meta_copy(module), config.exits, **kept)
    tensors = []
    for name, own in ((BACKBONE_NAME, module.state_dict()), (EXITS_NAME, exit_tensors(empty))):
        check_state(own, read_header(directory / name), directory / name)
        tensors.append(safetensors.torch.load_file(directory / name))
        _check_numbers(tensors[-1], {key for key, _ in empty.named_parameters()}, directory / name)
    model = MultiExitModel(module, config.exits, drop_rate=drop_rate, **kept)
    module.load_state_dict(tensors[0])
    model.exits.load_state_dict({key.removeprefix(PREFIX): tensor for key, tensor in tensors[1].items()})
    model.policy, model.budgets, model.origin = config.policy, config.budgets, config.origin
    return model


def _check_fit(module: nn.Module, config: ModuleConfig) -> None:
    """Raise unless the module has these classifiers, and at each exit's place gives what its head takes."""
    info, specs = config.info, config.exits
    describe_module(module, classifier=info.classifiers, num_classes=info.num_classes, input_size=info.input_size)
    if not specs:
        return
    survey = survey_backbone(module, [spec.module for spec in specs], info.input_size, info)
    points = {(point.module, point.output): point for point in survey.points}
    for spec in specs:
        point = points.get((spec.module, spec.output))
        if point is None:
            reason = survey.rejected.get(spec.module, 'it has no such output')
            raise InvalidValueError(f'no exit can be at {spec.module} of {type(module).__name__}: {reason}.')
        fields = ('channels', 'reduction', 'layout', 'num_prefix_tokens')
        differing = [name for name in fields if getattr(spec, name) != getattr(point, name)]
        if differing:
            name = differing[0]
            raise InvalidValueError(
                f'{name} of the exit at {spec.module} must be that of {type(module).__name__}, {getattr(point, name)},'
                f' got {getattr(spec, name)}: build the module that was saved.'
            )
    depths = [points[spec.module, spec.output].cost.macs for spec in specs]
    if depths != sorted(depths):
        raise InvalidValueError('the exits must be in order, shallow to deep.')


def _check_numbers(tensors: Mapping[str, Tensor], params: Collection[str], path: Path) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        is_param = key in params or f'backbone.{key}' in params
        # Masks may hold infinities.
        if tensor.isnan().any() or (is_param and not tensor.isfinite().all()):
            raise CheckpointError(f'{path} contains NaN or inf, at {key}.')
