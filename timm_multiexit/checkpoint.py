"""Checkpoints: the folder that is published, and the files of a training run.

A folder holds `model.safetensors`, the backbone under timm's own keys, `exits.safetensors`, the heads, and
`config.json`, timm's configuration with one more key, `multiexit`. Plain timm loads it as the main network.
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import load_state_dict
from timm.models._hub import save_config_for_hf
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from timm_multiexit.attach import attach_exits
from timm_multiexit.budgets import BudgetTable
from timm_multiexit.config import FORMAT_VERSION, ExitSpec, MultiExitError
from timm_multiexit.model import MultiExitModel
from timm_multiexit.policy import ExitPolicy

_logger = logging.getLogger(__name__)

CONFIG_NAME = 'config.json'
BACKBONE_NAME = 'model.safetensors'
EXITS_NAME = 'exits.safetensors'
CONFIG_KEY = 'multiexit'


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> None:
    """Write a model to a folder that `create_model('local-dir:...', pretrained=True)` and plain timm load.

    All files are written beside the folder first and moved into it when they are whole; other files in the folder
    stay.

    Args:
        model: A `MultiExitModel`, with its policy and budgets, or a timm model, which is written without exits.
        directory: The folder; made if it is not there.
        data_config: How images are made ready: input_size, mean, std, interpolation, crop_pct, crop_mode; as far as
            it differs from the backbone's own configuration.
        label_names: Names of the classes, in order.

    Raises:
        OSError: The disk is full or not writable; the folder is as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {'label_names': label_names} if label_names else {}
    backbone = model
    if isinstance(model, MultiExitModel):
        backbone = model.backbone
        exits = [spec.to_dict() for spec in model.exits.specs]
        config[CONFIG_KEY] = {'format_version': FORMAT_VERSION, 'weights': EXITS_NAME, 'exits': exits}
        for name in ('policy', 'budgets'):
            if getattr(model, name) is not None:
                config[CONFIG_KEY][name] = getattr(model, name).to_dict()
    with tempfile.TemporaryDirectory(prefix=f'.{directory.name}-', dir=directory.parent) as temporary:
        save_config_for_hf(backbone, Path(temporary, CONFIG_NAME), model_config=config, data_config=data_config)
        _save_tensors(backbone.state_dict(), Path(temporary, BACKBONE_NAME))
        if isinstance(model, MultiExitModel):
            tensors = {f'exits.{key}': tensor for key, tensor in model.exits.state_dict().items()}
            _save_tensors(_without(tensors, *_TRAINING_ONLY), Path(temporary, EXITS_NAME))
        # config.json last: until then a reader sees the old network or an incomplete one, not a mixture it accepts.
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            shutil.move(path, directory / path.name)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Contiguous, which weights in channels_last are not.
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata={'format': 'pt'})


# Parts of names of weights that are for training alone: heads' projectors, the norms of further augmentation splits.
_TRAINING_ONLY = ('.projector.', '.aux_bn.')


def _without(tensors: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    """Leave out the tensors with one of these parts in their name."""
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


def read_specs(directory: str | os.PathLike) -> tuple[ExitSpec, ...] | None:
    """Return the exits that a folder's `config.json` lists, None if it has none.

    Raises:
        MultiExitError: There is no readable configuration, or it is of a newer format.
    """
    section = _read_section(directory)
    return None if section is None else tuple(ExitSpec.from_dict(values) for values in section['exits'])


def _read_section(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Return our part of a folder's `config.json`, None if it has none."""
    path = Path(directory, CONFIG_NAME)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise MultiExitError(f'{directory} is no model folder: it has no {CONFIG_NAME}.') from error
    except (OSError, ValueError) as error:
        raise MultiExitError(f'{path} cannot be read: {error}.') from error
    section = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if section is None:
        return None
    version = section.get('format_version') if isinstance(section, dict) else None
    if version != FORMAT_VERSION:
        raise MultiExitError(
            f'{path} has multi-exit format {version!r}, this version reads {FORMAT_VERSION}: update timm_multiexit.'
        )
    if not isinstance(section.get('exits'), list):
        raise MultiExitError(f"{path} lists no exits under '{CONFIG_KEY}'.")
    return section


def load_pretrained(directory: str | os.PathLike, *, pretrained: bool = True, **kwargs: Any) -> MultiExitModel:
    """Return the multi-exit model that a folder holds.

    Args:
        directory: A folder that `save_pretrained` wrote.
        pretrained: Load the weights; otherwise the architecture alone.
        **kwargs: For `timm.create_model`. With another `num_classes` all classifiers are fresh.

    Raises:
        MultiExitError: The folder holds no exits, or files that do not fit each other.
    """
    specs = read_specs(directory)
    if specs is None:
        raise MultiExitError(f'{directory} holds a plain timm model: name the exits to attach, or exits="auto".')
    backbone = timm.create_model(f'local-dir:{directory}', pretrained=pretrained, **kwargs)
    model = MultiExitModel(backbone, specs, drop_rate=float(kwargs.get('drop_rate') or 0.0))
    if not pretrained:
        return model
    path = Path(directory, EXITS_NAME)
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MultiExitError(f'{path} cannot be read: {error}.') from error
    own = {f'exits.{key}': tensor for key, tensor in model.exits.state_dict().items()}
    saved_classes = json.loads(Path(directory, CONFIG_NAME).read_text()).get('num_classes')
    if saved_classes != model.num_classes:
        # As timm does for main: the rest is kept, the classifiers start anew.
        _logger.info(f'{saved_classes} classes in {directory}, {model.num_classes} asked for: fresh classifiers.')
        tensors = {key: own[key] if '.fc.' in key else tensor for key, tensor in tensors.items()}
    else:
        _restore_policies(model, _read_section(directory))
    _check_state(own, tensors, path)
    model.exits.load_state_dict({key.removeprefix('exits.'): tensor for key, tensor in tensors.items()})
    return model


def _restore_policies(model: MultiExitModel, section: dict[str, Any]) -> None:
    """Give a model the policy and the table of budgets that it was saved with."""
    policy, budgets = section.get('policy'), section.get('budgets')
    if policy is not None:
        policy = ExitPolicy.from_dict(policy)
        policy.check_exits(len(model.exits))
    if budgets is not None:
        budgets = BudgetTable.from_dict(budgets)
        budgets.points[0].policy.check_exits(len(model.exits))
    model.policy, model.budgets = policy, budgets


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
        raise MultiExitError(f'{path} is no checkpoint that can be read: {_first_line(error)}.') from error
    if isinstance(model, MultiExitModel) and not any(key.startswith('backbone.') for key in state):
        _logger.info(f'{path} is of a plain network: loaded into the backbone, the exits stay as they are.')
        model = model.backbone
    absent = [part for part in _TRAINING_ONLY if not any(part in key for key in model.state_dict())]
    state = _without(state, *absent)
    _check_state(model.state_dict(), state, path)
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
        raise MultiExitError(f'{path} is no checkpoint that can be read: {_first_line(error)}.') from error


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


def _check_state(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Raise one line that says how a checkpoint differs from the model."""
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    misfits = [key for key in own.keys() & given.keys() if own[key].shape != given[key].shape]
    if missing or unexpected:
        raise MultiExitError(
            f'{path} does not fit this model: {len(missing)} weights are missing ({", ".join(missing[:2]) or "none"}),'
            f' {len(unexpected)} are unknown ({", ".join(unexpected[:2]) or "none"}).'
            ' Give the model, exits and head it was trained with.'
        )
    if misfits:
        key = min(misfits)
        raise MultiExitError(
            f'{path} does not fit this model: {key} is {list(given[key].shape)} there and {list(own[key].shape)} here'
            f' ({len(misfits)} such weights). Give the num_classes, exits and head widths it was trained with.'
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
