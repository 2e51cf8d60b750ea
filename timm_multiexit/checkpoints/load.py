"""From a folder back to its model, without trusting the folder."""

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import nn

from timm_multiexit.checkpoints.architecture import (
    PREFIX,
    check_finite,
    check_state,
    create_architecture,
    create_empty_architecture,
    create_empty_model,
    create_empty_truncated,
    cut_out,
    exit_tensors,
    fill_unsaved_buffers,
)
from timm_multiexit.checkpoints.config import ModelConfig, read_model_config
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_NAME, EXITS_NAME, MODEL_ARGS
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.truncation import TruncatedModel
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError
from timm_multiexit.utils.untrusted import TensorInfo, read_header

_logger = logging.getLogger(__name__)


def load_pretrained(
    directory: str | os.PathLike[str], *, config: ModelConfig | None = None, pretrained: bool = True, **kwargs: Any
) -> MultiExitModel:
    """Return the multi-exit model that a folder holds.

    The folder is not trusted: all it says is checked, and the headers of its weights are compared with the model on
    the meta device before memory is allocated.

    Args:
        directory: A folder that `save_pretrained` wrote.
        config: What `read_model_config` returned for the folder; it is read if not given.
        pretrained: Load the weights, the policy and the budgets; otherwise the architecture alone.
        **kwargs: For `timm.create_model`. With another `num_classes` all classifiers are fresh.

    Raises:
        CheckpointError: The folder has no exits, values that are not allowed, or files that do not match each other.
    """
    directory = Path(directory)
    config = config or read_model_config(directory, overridden=kwargs)
    if config.truncated is not None:
        raise CheckpointError(f'{directory} holds a truncated model, without exits: create_model loads it.')
    if config.exits is None:
        raise CheckpointError(f'{directory} holds a plain timm model: name the exits to attach, or exits="auto".')
    path = directory / EXITS_NAME
    headers = _read_headers(directory) if pretrained else []
    empty = create_empty_model(config, directory, kwargs)
    if pretrained:
        check_state(empty.backbone.state_dict(), headers[0], directory / BACKBONE_NAME)
        check_state(exit_tensors(empty), headers[1], path)
    backbone = _load_backbone(config, directory, pretrained=pretrained, **kwargs)
    model = MultiExitModel(backbone, config.exits, drop_rate=float(kwargs.get('drop_rate') or 0.0))
    if not pretrained:
        return model
    tensors = safetensors.torch.load_file(path)
    if empty.num_classes != model.num_classes:
        # As timm does for main: the rest is kept, the classifiers are fresh.
        _logger.info(f'{directory} has {empty.num_classes} classes, the model {model.num_classes}: fresh classifiers.')
        own = {key: tensor for key, tensor in exit_tensors(model).items() if '.fc.' in key}
        tensors = {key: tensor for key, tensor in tensors.items() if '.fc.' not in key} | own
    else:
        model.policy, model.budgets = config.policy, config.budgets
    model.exits.load_state_dict({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    check_finite(model.exits, path)
    return model


def _read_headers(directory: Path) -> list[dict[str, TensorInfo]]:
    if (directory / BACKBONE_NAME).is_file() and not (directory / EXITS_NAME).exists():
        raise CheckpointError(
            f'{directory} has no {EXITS_NAME}, though its {CONFIG_NAME} lists exits: other tools (transformers) save'
            " the backbone alone. Pass exits='auto' for fresh exits, or copy the file from where the model came from."
        )
    return [read_header(directory / name) for name in (BACKBONE_NAME, EXITS_NAME)]


def load_truncated(directory: Path, config: ModelConfig, *, pretrained: bool = True, **kwargs: Any) -> TruncatedModel:
    """Return the truncated model that a folder holds, which is not trusted.

    With weights the network that it was cut from is never made, which may be many times larger.

    Args:
        directory: A folder that `save_pretrained` wrote.
        config: What `read_model_config` returned for the folder.
        pretrained: Load the weights; otherwise the architecture alone.
        **kwargs: For `timm.create_model`; with weights none that changes their shapes.

    Raises:
        CheckpointError: The folder has values that are not allowed, or files that do not match each other.
        InvalidValueError: A keyword differs from what the weights were made for.
    """
    truncated = config.truncated
    assert truncated is not None
    if not truncated.specs:
        backbone = load_backbone(config, directory, pretrained=pretrained, **kwargs)
        return cut_out(MultiExitModel(backbone, []), truncated.exit_idx)
    drop_rate = float(kwargs.get('drop_rate') or 0.0)
    if not pretrained:
        backbone = load_backbone(config, directory, pretrained=False, **kwargs)
        return cut_out(MultiExitModel(backbone, truncated.specs, drop_rate=drop_rate), truncated.exit_idx)
    path = directory / BACKBONE_NAME
    header = read_header(path)
    network = create_empty_truncated(_with_rates(config, kwargs, directory), directory, kwargs)
    check_state(network.state_dict(), header, path)
    # Copies: tensors of a file are mapped to it, and would change with it.
    own = network.state_dict()
    tensors = {key: tensor.to(own[key].dtype, copy=True) for key, tensor in safetensors.torch.load_file(path).items()}
    network.load_state_dict(tensors, assign=True)
    fill_unsaved_buffers(network)
    if any(tensor.is_meta for module in network.modules() for tensor in (*module.parameters(), *module.buffers())):
        raise CheckpointError(f'{config.architecture} of {directory} has tables that cannot be computed anew.')
    check_finite(network, path)
    cast(Any, network.head).drop.p = drop_rate
    return network.to(device=kwargs.get('device'), dtype=kwargs.get('dtype'))


def _with_rates(config: ModelConfig, given: dict[str, Any], directory: Path) -> ModelConfig:
    """Return the configuration with the caller's drop rates, which weights do not depend on."""
    if given.get('checkpoint_path'):
        raise InvalidValueError('checkpoint_path cannot be set for a truncated model: call load_checkpoint afterwards.')
    given = {name: value for name, value in given.items() if name in MODEL_ARGS and value is not None}
    rates = {name: value for name, value in given.items() if name.endswith('_rate')}
    size = config.pretrained_cfg['input_size']
    fixed = {'num_classes': config.pretrained_cfg.get('num_classes'), 'in_chans': size[0], **config.model_args}
    for name in given.keys() - rates.keys():
        if given[name] != fixed.get(name):
            raise InvalidValueError(
                f'{name} must be that of the truncated model in {directory}, {fixed.get(name)}, got {given[name]}:'
                ' truncate the model that has other ones, or pass pretrained=False.'
            )
    return replace(config, model_args={**config.model_args, **rates})


def load_backbone(config: ModelConfig, directory: Path, *, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """Return the timm model that a folder holds, as `timm.create_model('local-dir:...')` does for one that is trusted.

    timm gets the checked configuration and one safetensors file, nothing else of the folder. The keywords are those of
    `timm.create_model`; they take precedence over the file.

    Raises:
        CheckpointError: timm cannot create the architecture, or the weights do not match it.
    """
    empty = create_empty_architecture(config, directory, kwargs)
    if pretrained:
        _check_weights(empty, config, directory)
    return _load_backbone(config, directory, pretrained=pretrained, **kwargs)


def _load_backbone(config: ModelConfig, directory: Path, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    path = directory / BACKBONE_NAME
    pretrained_cfg = dict(config.pretrained_cfg)
    if pretrained:
        pretrained_cfg['file'] = str(path)
    model = create_architecture(config, directory, kwargs, pretrained=pretrained, pretrained_cfg=pretrained_cfg)
    if pretrained:
        check_finite(model, path)
    return model


def _check_weights(empty: nn.Module, config: ModelConfig, directory: Path) -> None:
    """Raise for weights that do not match the architecture that the configuration names.

    Those of a plain timm model may have other names, since timm reads the files of the architectures' authors: they
    must not be far smaller.
    """
    path = directory / BACKBONE_NAME
    header = read_header(path)
    num_saved = sum(math.prod(info.shape) for info in header.values())
    if config.exits is not None:
        check_state(empty.state_dict(), header, path)
    num = sum(param.numel() for param in empty.parameters())
    if num > 2 * num_saved + 1_000_000:
        raise CheckpointError(
            f'{path} holds {num_saved} numbers and does not fit this model: {config.architecture} as configured in'
            f' {CONFIG_NAME} has {num} parameters.'
        )
