"""The checkpoints that timm's saver writes in training: weights, optimizer, and the state of a run."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from timm_multiexit.checkpoints.load import check_state
from timm_multiexit.checkpoints.save import TRAINING_ONLY, without
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.checks import check_instance
from timm_multiexit.utils.errors import CheckpointError, MissingFileError, one_line

_logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, use_ema: bool = True) -> None:
    """Load the weights of a training checkpoint (`*.pth.tar`, `*.safetensors`) into a model.

    Args:
        model: A `MultiExitModel` or a timm model. A checkpoint of a plain timm model goes into the backbone, the
            heads stay as they are.
        path: The file; only tensors and plain values are read from it.
        use_ema: Take the averaged weights where the file has them.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: The file cannot be read, or its weights do not match the model.
    """
    check_instance('model', model, nn.Module)
    state = _read(load_state_dict, path, use_ema=use_ema)
    if isinstance(model, MultiExitModel) and not any(key.startswith('backbone.') for key in state):
        _logger.info(f'{path} is of a plain timm model: loaded into the backbone, the exits stay as they are.')
        model = model.backbone
    absent = [part for part in TRAINING_ONLY if not any(part in key for key in model.state_dict())]
    state = without(state, *absent)
    check_state(model.state_dict(), state, path)
    model.load_state_dict(state)


def read_training_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a training checkpoint holds besides its weights: epoch, args, metric, task_state.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: The file cannot be read.
    """
    checkpoint: dict[str, Any] = _read(load_checkpoint_metadata, path)
    return checkpoint


def _read(reader: Callable[..., Any], path: str | os.PathLike[str], **kwargs: Any) -> Any:
    if not Path(path).is_file():
        raise MissingFileError(f'Checkpoint {path} does not exist.')
    try:
        return reader(os.fspath(path), **kwargs)
    except Exception as error:  # unpickling raises all kinds of errors
        raise CheckpointError(f'Cannot read checkpoint {path}: {one_line(error)}.') from error


def restore_exits(backbone: nn.Module, checkpoint: dict[str, Any], **kwargs: Any) -> MultiExitModel:
    """Return the backbone with the exits that a training checkpoint was written with, or fresh 'auto' ones.

    `checkpoint` is what `read_training_checkpoint` returned; the keywords are those of `MultiExitModel`.
    """
    values = (checkpoint.get('task_state') or {}).get('exits')
    if values is None:
        return attach_exits(backbone, 'auto', **kwargs)
    return MultiExitModel(backbone, [ExitSpec.from_dict(value) for value in values], **kwargs)
