"""The model that a checked configuration describes, without data, and which tensors its files must have."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from timm_multiexit.checkpoints.config import ModelConfig, Truncation
from timm_multiexit.checkpoints.config_rules import CONFIG_NAME, MODEL_ARGS
from timm_multiexit.exits.cost import empty_images
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.truncation import TruncatedModel, truncate
from timm_multiexit.utils.errors import CheckpointError, MultiExitError, brief, one_line
from timm_multiexit.utils.untrusted import TensorInfo

# Parts of names of weights that only training uses: heads' projectors, the norms of further augmentation splits.
TRAINING_ONLY = ('.projector.', '.aux_bn.')

PREFIX = 'exits.'

# Keywords of timm.create_model that are not the architecture's.
_FACTORY_KEYWORDS = ('pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'device', 'dtype')

# Of the tensors that no file has, masks and tables of positions, beside the weights: `swin_base` has 40 MiB at 384 px.
_MAX_UNSAVED_BYTES = 64 * 2**20


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


def create_empty_architecture(config: ModelConfig, directory: Path, given: Mapping[str, Any]) -> nn.Module:
    """Return the weights' architecture on the meta device; of `given` only what no file can set is used.

    Raises:
        CheckpointError: timm cannot create it, or it would take far more memory than its weights.
    """
    own = {name: value for name, value in given.items() if name not in (*MODEL_ARGS, *_FACTORY_KEYWORDS)}
    with torch.device('meta'):
        backbone = create_architecture(config, directory, own)
    saved = {id(tensor): tensor.nbytes for tensor in backbone.state_dict(keep_vars=True).values()}
    num_saved = sum(saved.values())
    num_unsaved = sum(tensor.nbytes for tensor in backbone.buffers() if id(tensor) not in saved)
    if num_unsaved > num_saved + _MAX_UNSAVED_BYTES:
        raise CheckpointError(
            f'{config.architecture} as configured in {directory / CONFIG_NAME} must not have tables and masks far'
            f' larger than its weights of {num_saved >> 20} MiB, got {num_unsaved >> 20} MiB: check img_size'
            ' and window_size.'
        )
    return backbone


def create_empty_model(config: ModelConfig, directory: Path, given: Mapping[str, Any]) -> MultiExitModel:
    """Return the model on the meta device, if its exits match the backbone.

    Raises:
        CheckpointError: See `create_empty_architecture`; or an exit's place does not exist, or its head does not fit.
    """
    specs = config.exits or ()
    backbone = create_empty_architecture(config, directory, given).eval()
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


def create_empty_truncated(config: ModelConfig, directory: Path, given: Mapping[str, Any]) -> TruncatedModel:
    """Return the truncated model of a configuration on the meta device; see `create_empty_model` for errors."""
    truncated = cast(Truncation, config.truncated)
    model = create_empty_model(replace(config, exits=truncated.specs), directory, given).train()
    with torch.device('meta'):
        return cut_out(model, truncated.exit_idx)


def cut_out(model: MultiExitModel, exit_idx: int) -> TruncatedModel:
    """Return the first exit of a model, or main of one without exits, under the number of the model it was cut from.

    Raises:
        CheckpointError: The exit cannot be cut out.
    """
    try:
        network = truncate(model, 0)
    except Exception as error:  # backbones raise all kinds of errors where modules are missing
        raise CheckpointError(f'Exit {exit_idx} cannot be cut out: {one_line(error)}.') from error
    network._taps.remove(network.backbone)
    return TruncatedModel(network.backbone, exit_idx, network.spec, network.head, input_size=network.input_size)


def exit_tensors(model: MultiExitModel) -> dict[str, Tensor]:
    """Return the tensors of the heads under the names they are saved with."""
    return without({f'{PREFIX}{key}': tensor for key, tensor in model.exits.state_dict().items()}, *TRAINING_ONLY)


def without(tensors: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """Leave out the tensors with one of these parts in their name."""
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in the state dict, tables and masks that its code computes."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def fill_unsaved_buffers(model: nn.Module) -> None:
    """Compute the buffers that are not in the state dict, on the meta device so far, beside weights that have data.

    Buffers whose module has no method for it stay on the meta device.
    """
    device = next(model.parameters()).device
    for module in model.modules():
        if not hasattr(module, 'init_non_persistent_buffers'):
            continue
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
        cast(Any, module).init_non_persistent_buffers()


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


def check_finite(module: nn.Module, path: Any) -> None:
    """Raise `CheckpointError` for weights that are NaN or infinite."""
    params = dict(module.named_parameters())
    for key, tensor in module.state_dict().items():
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        least, most = tensor.aminmax()  # an order faster than isfinite; NaN is passed on
        # Gemma's buffers hold infinite limits.
        if least.isnan() or (key in params and not (least.isfinite() and most.isfinite())):
            raise CheckpointError(f'{path} contains NaN or inf, at {key}.')


def _first(names: list[str]) -> str:
    return ', '.join(brief(name).strip("'") for name in names[:2]) or 'none'


def _check_heads(model: MultiExitModel, directory: Path) -> None:
    """Raise for heads far larger than the backbone, which nobody trains, before memory is allocated."""
    num = sum(param.numel() for param in model.exits.parameters())
    most = 4 * sum(param.numel() for param in model.backbone.parameters()) + 10_000_000
    if num > most:
        raise CheckpointError(f'The heads in {directory / CONFIG_NAME} must have at most {most} parameters, got {num}.')


@torch.no_grad()
def _order_exits(model: MultiExitModel, images: Tensor) -> list[int]:
    """Return the exits in the order in which a forward of images [B, C, H, W] reaches them; each head is run."""
    order: list[int] = []
    run_head = model._head_runner(images.shape[-2:])

    def visit(idx: int, tensor: Tensor) -> None:
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
