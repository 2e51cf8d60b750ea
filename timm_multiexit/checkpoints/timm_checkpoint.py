"""The checkpoints that timm's saver and other trainers write: weights, optimizer, and the state of a run."""

import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import adapt_input_conv, get_model_input_config, load_state_dict
from timm.models._helpers import _torch_load
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import Tensor, nn

from timm_multiexit.checkpoints.architecture import PREFIX, TRAINING_ONLY, check_state, without
from timm_multiexit.checkpoints.exits_in_weights import find_specs
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.models.sharding import shard_state
from timm_multiexit.models.truncation import TruncatedModel
from timm_multiexit.utils.checks import check_instance, check_path
from timm_multiexit.utils.errors import CheckpointError, MissingFileError, MultiExitError, brief, one_line
from timm_multiexit.utils.untrusted import check_pointer

_logger = logging.getLogger(__name__)

_BACKBONE = 'backbone.'

# Numbers of numpy, which metrics often are: what they are pickled by, under the names of numpy 1 and 2. No code in it.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    *((_SCALAR, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ('?', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')},
]


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, use_ema: bool = True) -> None:
    """Load the weights of a training checkpoint (`*.pth.tar`, `*.ckpt`, `*.safetensors`) into a model.

    What other trainers put before the names, as Lightning's `model.`, is left out, and their further weights with it.
    The first convolution of a checkpoint for images of other channels is adapted as timm does.

    Args:
        model: A `MultiExitModel`, a `TruncatedModel` or a timm model. A checkpoint of a plain timm model goes into the
            backbone, the heads stay as they are; a truncated model takes what it has from a checkpoint of the whole.
        path: The file; only tensors and plain values are read from it.
        use_ema: Take the averaged weights where the file has them.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: The file cannot be read, or its weights do not match the model.
    """
    check_instance('model', model, nn.Module)
    check_path('path', path)
    state = read_weights(path, use_ema=use_ema)
    whole = model
    prefix = _find_prefix(model, state, path)
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if prefix:
        _logger.info(f"{path}: the {len(state)} weights below '{prefix}' are taken.")
    if isinstance(model, MultiExitModel) and not any(key.startswith(_BACKBONE) for key in state):
        _logger.info(f'{path} is of a plain timm model: loaded into the backbone, the exits stay as they are.')
        model = model.backbone
    own = model.state_dict()
    if isinstance(model, TruncatedModel):
        state = {key: tensor for key, tensor in state.items() if key in own}
    absent = [part for part in TRAINING_ONLY if not any(part in key for key in own)]
    state = without(state, *absent)
    _fit_channels(model, state, path)
    check_state(own, state, path)
    model.load_state_dict(shard_state(state, own))
    if whole is not model and isinstance(whole, MultiExitModel):
        whole.origin = Origin('a file')


def _find_prefix(model: nn.Module, state: Mapping[str, Tensor], path: Any) -> str:
    """Return what stands before the names of the model's weights, or of its backbone's; '' if they are not found."""
    inner = model.backbone if isinstance(model, MultiExitModel) else model
    names = sorted(without(inner.state_dict(), *TRAINING_ONLY), key=len)
    ends = [key.removesuffix(names[-1]) for key in state if names and key.endswith(names[-1])]
    found = sorted({end for end in ends if not end or end.endswith('.')}, key=lambda end: (len(end), end))
    found = [prefix for prefix in found if all(f'{prefix}{name}' in state for name in names)]
    if not found or found[0] == '':
        return ''
    if len(found) > 1:
        raise CheckpointError(
            f'{path} must hold one such model, got {len(found)}, below {", ".join(repr(name) for name in found[:3])}:'
            ' save the state dict of one of them.'
        )
    outer = found[0].removesuffix(_BACKBONE)
    has_exits = outer != found[0] and any(key.startswith(f'{outer}{PREFIX}') for key in state)
    return outer if has_exits else found[0]


def _fit_channels(model: nn.Module, state: dict[str, Tensor], path: Any) -> None:
    """Adapt the first convolution of images of other channels, in place, as timm does for its own weights."""
    has_parts = isinstance(model, (MultiExitModel, TruncatedModel))
    backbone: Any = model.backbone if has_parts else model
    if not hasattr(backbone, 'pretrained_cfg'):
        return
    config = get_model_input_config(backbone)
    names, in_chans = config['first_conv'], config['input_size'][0]
    for name in (names,) if isinstance(names, str) else names or ():
        key = f'{_BACKBONE if has_parts else ""}{name}.weight'
        own, given = model.state_dict().get(key), state.get(key)
        if own is None or given is None or own.ndim != 4 or given.ndim != 4 or own.shape[1] == given.shape[1]:
            continue
        base_chans = max(1, given.shape[1] * in_chans // own.shape[1])  # a stem may fold space into channels
        try:
            state[key] = adapt_input_conv(in_chans, given, base_chans=base_chans)
        except (NotImplementedError, ValueError, AssertionError):
            continue
        _logger.warning(
            f'{path} is for images of {base_chans} channels, the model for {in_chans}: {key} was adapted as timm does.'
        )


def read_weights(path: str | os.PathLike[str], *, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the weights that a checkpoint holds, as they are named there.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: The file cannot be read, or holds none.
    """
    values = _read(load_state_dict, path, use_ema=use_ema)
    state = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(
            f'{path} holds no weights: it must be a dict of tensors, or have one as state_dict, state_dict_ema or'
            ' model.'
        )
    return state


def read_training_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a training checkpoint holds besides its weights: epoch, args, metric, task_state.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: The file cannot be read, or does not hold a dict.
    """
    checkpoint = _read(_read_metadata, path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'Checkpoint {path} must hold a dict, got {brief(checkpoint)}.')
    return checkpoint


def _read_metadata(path: str) -> Any:
    if path.endswith('.safetensors'):  # holds tensors alone
        return {}
    # Files of torch before 1.6 cannot be mapped, as timm's function does.
    return load_checkpoint_metadata(path) if zipfile.is_zipfile(path) else _torch_load(path)


def _read(reader: Callable[..., Any], path: str | os.PathLike[str], **kwargs: Any) -> Any:
    if not os.path.isfile(path):  # pathlib raises for names that are too long
        raise MissingFileError(f'Checkpoint {path} does not exist.')
    try:
        check_pointer(Path(path))
        with torch.serialization.safe_globals(_NUMPY):
            return reader(os.fspath(path), **kwargs)
    except MultiExitError:
        raise
    except Exception as error:  # unpickling raises all kinds of errors
        raise CheckpointError(f'Cannot read checkpoint {path}: {one_line(error)}.') from error


def restore_exits(backbone: nn.Module, checkpoint: dict[str, Any], **kwargs: Any) -> MultiExitModel:
    """Return the backbone with the exits that a training checkpoint was written with, or fresh 'auto' ones.

    `checkpoint` is what `read_training_checkpoint` returned; the keywords are those of `MultiExitModel`.
    """
    values = _saved_exits(checkpoint)
    if values is None:
        return attach_exits(backbone, 'auto', **kwargs)
    return MultiExitModel(backbone, [ExitSpec.from_dict(value) for value in values], **kwargs)


def _saved_exits(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    state = checkpoint.get('task_state')
    return state.get('exits') if isinstance(state, dict) else None


def build_exits(backbone: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> MultiExitModel:
    """Return the backbone with the exits that a checkpoint has weights of, fresh, without exits if it has none.

    A run's checkpoint says where they are; else they are where 'auto' or that number of exits puts them, if the weights
    agree. The keywords are those of `MultiExitModel`.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: The file cannot be read, or its exits are elsewhere.
    """
    checkpoint = read_training_checkpoint(path)
    if _saved_exits(checkpoint):
        return restore_exits(backbone, checkpoint, **kwargs)
    return MultiExitModel(backbone, find_specs(backbone, read_weights(path), path), **kwargs)
