"""From a folder back to its model, without trusting the folder."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from timm_multiexit.checkpoints.config import ModelConfig, read_model_config
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_NAME, EXITS_NAME, MODEL_ARGS
from timm_multiexit.checkpoints.save import PREFIX, exit_tensors
from timm_multiexit.exits.cost import empty_images
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import CheckpointError, MultiExitError, brief, one_line
from timm_multiexit.utils.untrusted import TensorInfo, read_header

_logger = logging.getLogger(__name__)

# Keywords of timm.create_model that are not the architecture's.
_FACTORY_KEYWORDS = ('pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'device', 'dtype')


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
    if config.exits is None:
        raise CheckpointError(f'{directory} holds a plain timm model: name the exits to attach, or exits="auto".')
    path = directory / EXITS_NAME
    headers = [read_header(directory / name) for name in (BACKBONE_NAME, EXITS_NAME)] if pretrained else []
    empty = _create_empty(config, directory, kwargs)
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
        own = exit_tensors(model)
        tensors = {key: own[key] if '.fc.' in key else tensor for key, tensor in tensors.items()}
    else:
        model.policy, model.budgets = config.policy, config.budgets
    model.exits.load_state_dict({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    _check_finite(model.exits, path)
    return model


def load_backbone(config: ModelConfig, directory: Path, *, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """Return the timm model that a folder holds, as `timm.create_model('local-dir:...')` does for one that is trusted.

    timm gets the checked configuration and one safetensors file, nothing else of the folder. The keywords are those of
    `timm.create_model`; they take precedence over the file.

    Raises:
        CheckpointError: timm cannot create the architecture, or the weights do not match it.
    """
    if pretrained:
        _check_weights(config, directory, kwargs)
    return _load_backbone(config, directory, pretrained=pretrained, **kwargs)


def _load_backbone(config: ModelConfig, directory: Path, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    path = directory / BACKBONE_NAME
    pretrained_cfg = dict(config.pretrained_cfg)
    if pretrained:
        pretrained_cfg['file'] = str(path)
    model = create_architecture(config, directory, kwargs, pretrained=pretrained, pretrained_cfg=pretrained_cfg)
    if pretrained:
        _check_finite(model, path)
    return model


def _create_empty_backbone(config: ModelConfig, directory: Path, given: dict[str, Any]) -> nn.Module:
    """Return the weights' architecture on the meta device; of `given` only what no file can set is used."""
    own = {name: value for name, value in given.items() if name not in (*MODEL_ARGS, *_FACTORY_KEYWORDS)}
    with torch.device('meta'):
        return create_architecture(config, directory, own)


def _create_empty(config: ModelConfig, directory: Path, given: dict[str, Any]) -> MultiExitModel:
    """Return the model on the meta device, if its exits match the backbone."""
    specs = config.exits or ()
    backbone = _create_empty_backbone(config, directory, given).eval()
    modules = dict(backbone.named_modules())
    for spec in specs:
        if spec.module not in modules:
            raise CheckpointError(
                f'{config.architecture} has no module to tap named {brief(spec.module)}, which {directory} names.'
            )
    with torch.device('meta'):
        model = MultiExitModel(backbone, specs)
    _check_heads(model, directory)
    images = empty_images(backbone, config.pretrained_cfg['input_size'])
    try:
        order = _order_exits(model, images)
    except MultiExitError as error:
        raise CheckpointError(
            f'The exits in {directory / CONFIG_NAME} do not fit {config.architecture}: {error}'
        ) from error
    except Exception:  # some backbones read their data in forward, which meta tensors have not: no finding on exits
        return model
    if order != sorted(order):
        raise CheckpointError(f'The exits in {directory / CONFIG_NAME} must be in order, shallow to deep.')
    return model


def _check_heads(model: MultiExitModel, directory: Path) -> None:
    """Raise for heads far larger than the backbone, which nobody trains, before memory is allocated."""
    num = sum(param.numel() for param in model.exits.parameters())
    most = 4 * sum(param.numel() for param in model.backbone.parameters()) + 10_000_000
    if num > most:
        raise CheckpointError(f'The heads in {directory / CONFIG_NAME} must have at most {most} parameters, got {num}.')


def _check_weights(config: ModelConfig, directory: Path, given: dict[str, Any]) -> None:
    """Raise for weights that do not match the architecture that the configuration names.

    Those of a plain timm model may have other names, since timm reads the files of the architectures' authors: they
    must not be far smaller.
    """
    path = directory / BACKBONE_NAME
    header = read_header(path)
    num_saved = sum(math.prod(info.shape) for info in header.values())
    empty = _create_empty_backbone(config, directory, given)
    if config.exits is not None:
        check_state(empty.state_dict(), header, path)
    num = sum(param.numel() for param in empty.parameters())
    if num > 2 * num_saved + 1_000_000:
        raise CheckpointError(
            f'{path} holds {num_saved} numbers and does not fit this model: {config.architecture} as configured in'
            f' {CONFIG_NAME} has {num} parameters.'
        )


def _check_finite(module: nn.Module, path: Path) -> None:
    params = dict(module.named_parameters())
    for key, tensor in module.state_dict().items():
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        least, most = tensor.aminmax()  # an order faster than isfinite; NaN is passed on
        # Gemma's buffers hold infinite limits.
        if least.isnan() or (key in params and not (least.isfinite() and most.isfinite())):
            raise CheckpointError(f'{path} contains NaN or inf, at {key}.')


def create_architecture(config: ModelConfig, directory: Path, given: dict[str, Any], **kwargs: Any) -> nn.Module:
    """Return the timm model that a checked configuration describes; `directory` is for the message alone.

    `given` are the caller's keywords of `timm.create_model`, which take precedence over the configuration; `kwargs` are
    more of them, `pretrained` and `pretrained_cfg`.

    Raises:
        CheckpointError: timm cannot create it.
    """
    kwargs = {'pretrained_cfg': dict(config.pretrained_cfg), 'pretrained_model_args': config.model_args, **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return timm.create_model(config.architecture, **kwargs, **{**config.model_args, **given})
    except Exception as error:  # architectures raise all kinds of errors for keywords that they do not accept
        raise CheckpointError(f'Cannot create {config.architecture} of {directory}: {one_line(error)}.') from error


def check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor | TensorInfo], path: Any) -> None:
    """Raise one line that says how a checkpoint or its header differs from the model, which may be on the meta device.

    Raises:
        CheckpointError: Weights are missing or unexpected, or have another shape or kind of dtype.
    """
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f'{path} does not fit this model: {len(missing)} weights are missing ({_first(missing)}), {len(unexpected)}'
            f' are unknown ({_first(unexpected)}). Give the model, exits and head it was trained with.'
        )
    misfits = [key for key in own if tuple(own[key].shape) != tuple(given[key].shape)]
    if misfits:
        key = min(misfits)
        raise CheckpointError(
            f'{path} does not fit this model: {_first([key])} is {brief(list(given[key].shape))} there and'
            f' {list(own[key].shape)} here ({len(misfits)} such weights). Give the num_classes, exits and head widths'
            ' it was trained with.'
        )
    for key, info in given.items():
        if isinstance(info, TensorInfo) and own[key].is_floating_point() != ('F' in info.dtype):
            raise CheckpointError(f'{path} does not fit this model: {_first([key])} is {info.dtype} there.')


def _first(names: list[str]) -> str:
    return ', '.join(brief(name).strip("'") for name in names[:2]) or 'none'


@torch.no_grad()
def _order_exits(model: MultiExitModel, images: torch.Tensor) -> list[int]:
    """Return the exits in the order in which a forward of images [B, C, H, W] reaches them; each head is run."""
    order: list[int] = []
    run_head = model._head_runner(images.shape[-2:])

    def visit(idx: int, tensor: torch.Tensor) -> None:
        if idx < len(model.exits):
            order.append(idx)
            try:
                run_head(idx, tensor)
            except Exception as error:  # a tap can give anything
                raise CheckpointError(
                    f'the head of exit {idx} does not take the output of its tap: {one_line(error)}'
                ) from error

    model._taps.visit(model.backbone, images, visit)
    if len(set(order)) < len(model.exits):
        raise CheckpointError(f'a forward reached the exits {order} of {len(model.exits)}.')
    return order
