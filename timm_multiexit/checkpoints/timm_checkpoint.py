"""The checkpoints that timm's saver writes in training: weights, optimizer, and where a run stands."""

import logging
import os
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
from timm_multiexit.utils.errors import MultiExitError, one_line

_logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: str | os.PathLike, *, use_ema: bool = True) -> None:
    """Load the weights of a training checkpoint (`*.pth.tar`, `*.safetensors`) into a model.

    Args:
        model: A `MultiExitModel` or a timm model. A checkpoint of a plain timm model goes into the backbone, the
            heads stay as they are.
        path: The file; only tensors and plain values are read from it.
        use_ema: Take the averaged weights where the file has them.

    Raises:
        MultiExitError: There is no such file, it cannot be read, or its weights do not fit the model.
    """
    if not Path(path).is_file():
        raise MultiExitError(f'There is no checkpoint {path}.')
    try:
        state = load_state_dict(os.fspath(path), use_ema=use_ema)
    except Exception as error:
        raise MultiExitError(f'{path} is no checkpoint that can be read: {one_line(error)}.') from error
    if isinstance(model, MultiExitModel) and not any(key.startswith('backbone.') for key in state):
        _logger.info(f'{path} is of a plain network: loaded into the backbone, the exits stay as they are.')
        model = model.backbone
    absent = [part for part in TRAINING_ONLY if not any(part in key for key in model.state_dict())]
    state = without(state, *absent)
    check_state(model.state_dict(), state, path)
    model.load_state_dict(state)


def read_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a training checkpoint says besides its weights: epoch, args, metric, task_state.

    Raises:
        MultiExitError: There is no such file or it cannot be read.
    """
    if not Path(path).is_file():
        raise MultiExitError(f'There is no checkpoint {path}.')
    try:
        return load_checkpoint_metadata(os.fspath(path))
    except Exception as error:
        raise MultiExitError(f'{path} is no checkpoint that can be read: {one_line(error)}.') from error


def restore_exits(backbone: nn.Module, checkpoint: dict[str, Any], **kwargs: Any) -> MultiExitModel:
    """Return the backbone with the exits that a training checkpoint was written with; fresh 'auto' ones if it had none.

    Args:
        backbone: A timm model of the checkpoint's architecture.
        checkpoint: What `read_training_checkpoint` returned.
        **kwargs: `drop_rate` and `input_size` of `MultiExitModel`.
    """
    values = (checkpoint.get('task_state') or {}).get('exits')
    if values is None:
        return attach_exits(backbone, 'auto', **kwargs)
    return MultiExitModel(backbone, [ExitSpec.from_dict(value) for value in values], **kwargs)
