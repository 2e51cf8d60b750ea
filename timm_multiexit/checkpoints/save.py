"""The folder that is saved and published, and the way back from it.

A folder holds `model.safetensors`, the backbone under timm's own keys, `exits.safetensors`, the heads, and
`config.json`, timm's configuration with one more key, `multiexit`. Plain timm loads it as the main network.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_multiexit.checkpoints.config import FORMAT_VERSION, read_model_config, write_module_config
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_KEY, CONFIG_NAME, EXITS_NAME
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import CheckpointError
from timm_multiexit.utils.files import sha256, write_text
from timm_multiexit.utils.untrusted import read_json
from timm_multiexit.version import __version__

# Parts of names of weights that only training uses: heads' projectors, the norms of further augmentation splits.
TRAINING_ONLY = ('.projector.', '.aux_bn.')

PREFIX = 'exits.'
_LABELS = ('label_names', 'label_descriptions')


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> None:
    """Write a model to a folder that `create_model('local-dir:...', pretrained=True)` and plain timm load.

    That of a model around a module that is not timm's, `load_exits(module, directory)` loads.

    All files are written beside the folder first and moved into it when they are whole; other files in the folder
    stay.

    Args:
        model: A `MultiExitModel`, with its policy and budgets, or a timm model, which is written without exits.
        directory: The folder; created if it does not exist.
        data_config: Preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode; as far as it differs
            from the backbone's own configuration.
        label_names: Names of the classes, in order.

    Raises:
        OSError: The disk is full or not writable; the folder is as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backbone = model.backbone if isinstance(model, MultiExitModel) else model
    config = _describe_labels(model, label_names)
    if isinstance(model, MultiExitModel):
        config[CONFIG_KEY] = {
            'format_version': FORMAT_VERSION,
            'library_version': __version__,
            'weights': EXITS_NAME,
            'exits': [spec.to_dict() for spec in model.exits.specs],
        }
        for name in ('policy', 'budgets', 'origin'):
            if getattr(model, name) is not None:
                config[CONFIG_KEY][name] = getattr(model, name).to_dict()
    with tempfile.TemporaryDirectory(prefix=f'.{directory.name}-', dir=directory.parent) as temporary:
        path = Path(temporary, CONFIG_NAME)
        if isinstance(model, MultiExitModel) and model.module_info is not None:
            write_module_config(model, path, config, data_config)
        else:
            save_config_for_hf(backbone, str(path), model_config=config, data_config=data_config)
        values = read_json(path)
        for name in _LABELS:
            values['pretrained_cfg'].pop(name, None)  # where timm keeps those of a loaded model; they go to the root
        path.write_text(json.dumps(values, indent=2), encoding='utf-8')
        _save_tensors(backbone.state_dict(), Path(temporary, BACKBONE_NAME))
        if isinstance(model, MultiExitModel):
            _save_tensors(exit_tensors(model), Path(temporary, EXITS_NAME))
        # config.json last: until then a reader sees the old network or an incomplete one, not a mixture it accepts.
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            shutil.move(path, directory / path.name)


def _describe_labels(model: Any, label_names: list[str] | None) -> dict[str, Any]:
    """Return the names of the classes: those given, else those that the model was loaded with."""
    cfg = model.pretrained_cfg
    old = cfg if cfg.get('num_classes') == model.num_classes else {}
    labels = {'label_names': label_names} if label_names else {name: old.get(name) for name in _LABELS}
    return {name: value for name, value in labels.items() if value}


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Contiguous, which weights in channels_last are not, and each by itself, which shared ones (CoaT's) are not.
    written, places = {}, set()
    for key, tensor in tensors.items():
        written[key] = tensor.clone() if tensor.data_ptr() in places else tensor.contiguous()
        places.add(tensor.data_ptr())
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(written, path, metadata={'format': 'pt'})
    path.chmod(mode)  # that of every new file here; safetensors makes files that only their owner can read


def exit_tensors(model: MultiExitModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the heads under the names they are saved with."""
    return without({f'{PREFIX}{key}': tensor for key, tensor in model.exits.state_dict().items()}, *TRAINING_ONLY)


def save_policy(directory: str | os.PathLike[str], policy: ExitPolicy | None, budgets: BudgetTable | None) -> None:
    """Write policy and budgets into the `config.json` of a model folder, in place of those that are there.

    Only that file is replaced, whole or not at all; its other content stays.

    Args:
        directory: A folder that `save_pretrained` wrote.
        policy: The model's policy; None for no policy.
        budgets: The policies to choose from by budget; None for no table.

    Raises:
        CheckpointError: The folder has no exits or another number of them, or values that are not allowed.
        DiskError: The disk is full or not writable; the folder is unchanged.
    """
    path = Path(directory, CONFIG_NAME)
    values = read_json(path)
    given = values.get('model_args')
    # Keywords that a file must not set are for whoever loads the folder to pass: here they make no difference.
    config = read_model_config(path.parent, overridden=given if isinstance(given, dict) else None)
    if not config.exits:
        raise CheckpointError(f'{directory} holds a model without exits: no policy can be saved for it.')
    for one in (policy, budgets.points[0].policy if budgets else None):
        if one is not None:
            one.check_exits(len(config.exits))
    section = values[CONFIG_KEY]
    for name, value in (('policy', policy), ('budgets', budgets)):
        section.pop(name, None)
        if value is not None:
            section[name] = value.to_dict()
    write_text(path, json.dumps(values, indent=2) + '\n', advice='free disk space, or copy the folder')


def hash_weights(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of the weights in a model folder, name of the file -> 64 hexadecimal digits."""
    paths = [Path(directory, name) for name in (BACKBONE_NAME, EXITS_NAME)]
    return {path.name: sha256(path) for path in paths if path.is_file()}


def without(tensors: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    """Leave out the tensors with one of these parts in their name."""
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}
