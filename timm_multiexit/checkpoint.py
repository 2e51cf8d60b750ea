"""The folder that is saved and published, and the way back from it.

A folder holds `model.safetensors`, the backbone under timm's own keys, `exits.safetensors`, the heads, and
`config.json`, timm's configuration with one more key, `multiexit`. Plain timm loads it as the main network.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_multiexit.budgets import BudgetTable
from timm_multiexit.config import FORMAT_VERSION, VERSION, MultiExitError, brief
from timm_multiexit.model import MultiExitModel
from timm_multiexit.model_config import (
    BACKBONE_NAME,
    CONFIG_KEY,
    CONFIG_NAME,
    EXITS_NAME,
    MODEL_ARGS,
    ModelConfig,
    read_model_config,
)
from timm_multiexit.policy import ExitPolicy
from timm_multiexit.untrusted import check_state, read_header, read_json

_logger = logging.getLogger(__name__)

# Parts of names of weights that are for training alone: heads' projectors, the norms of further augmentation splits.
TRAINING_ONLY = ('.projector.', '.aux_bn.')

_PREFIX = 'exits.'
_LABELS = ('label_names', 'label_descriptions')

# Keywords of timm.create_model that are not the architecture's.
_FACTORY_KEYWORDS = ('pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'device', 'dtype')


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
    backbone = model.backbone if isinstance(model, MultiExitModel) else model
    config = _describe_labels(backbone, label_names)
    if isinstance(model, MultiExitModel):
        exits = [spec.to_dict() for spec in model.exits.specs]
        config[CONFIG_KEY] = {
            'format_version': FORMAT_VERSION,
            'library_version': VERSION,
            'weights': EXITS_NAME,
            'exits': exits,
        }
        for name in ('policy', 'budgets'):
            if getattr(model, name) is not None:
                config[CONFIG_KEY][name] = getattr(model, name).to_dict()
    with tempfile.TemporaryDirectory(prefix=f'.{directory.name}-', dir=directory.parent) as temporary:
        path = Path(temporary, CONFIG_NAME)
        save_config_for_hf(backbone, path, model_config=config, data_config=data_config)
        values = read_json(path)
        for name in _LABELS:
            values['pretrained_cfg'].pop(name, None)  # where timm keeps those of a loaded model; they go to the root
        path.write_text(json.dumps(values, indent=2), encoding='utf-8')
        _save_tensors(backbone.state_dict(), Path(temporary, BACKBONE_NAME))
        if isinstance(model, MultiExitModel):
            _save_tensors(_exit_tensors(model), Path(temporary, EXITS_NAME))
        # config.json last: until then a reader sees the old network or an incomplete one, not a mixture it accepts.
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            shutil.move(path, directory / path.name)


def _describe_labels(backbone: nn.Module, label_names: list[str] | None) -> dict[str, Any]:
    """Return the names of the classes: those given, else those that the model was loaded with."""
    old = backbone.pretrained_cfg if backbone.pretrained_cfg.get('num_classes') == backbone.num_classes else {}
    labels = {'label_names': label_names} if label_names else {name: old.get(name) for name in _LABELS}
    return {name: value for name, value in labels.items() if value}


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Contiguous, which weights in channels_last are not, and each by itself, which shared ones (CoaT's) are not.
    written, places = {}, set()
    for key, tensor in tensors.items():
        written[key] = tensor.clone() if tensor.data_ptr() in places else tensor.contiguous()
        places.add(tensor.data_ptr())
    safetensors.torch.save_file(written, path, metadata={'format': 'pt'})


def save_policy(directory: str | os.PathLike, policy: ExitPolicy | None, budgets: BudgetTable | None) -> None:
    """Write policy and budgets into the `config.json` of a model folder, in place of those that are there.

    That file alone is replaced, whole or not at all, and all else that it says stays.

    Args:
        directory: A folder that `save_pretrained` wrote.
        policy: The model's policy; None for none.
        budgets: The policies to choose from by budget; None for none.

    Raises:
        MultiExitError: The folder holds no exits or another number of them, what it must not hold, or cannot be
            written; it is as it was.
    """
    path = Path(directory, CONFIG_NAME)
    values = read_json(path)
    given = values.get('model_args')
    # What a file must not set, whoever loads the folder says himself: here it makes no difference.
    config = read_model_config(path.parent, overridden=given if isinstance(given, dict) else None)
    if not config.exits:
        raise MultiExitError(f'{directory} holds a model without exits: no policy can be saved for it.')
    for one in (policy, budgets and budgets.points[0].policy):
        if one is not None:
            one.check_exits(len(config.exits))
    section = values[CONFIG_KEY]
    for name, value in (('policy', policy), ('budgets', budgets)):
        section.pop(name, None)
        if value is not None:
            section[name] = value.to_dict()
    draft = path.with_name(f'.{path.name}.tmp')
    try:
        draft.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise MultiExitError(
            f'{path} could not be written: {error.strerror or error}. It is as it was: make room, or copy the folder.'
        ) from error


def hash_weights(directory: str | os.PathLike) -> dict[str, str]:
    """Return the SHA-256 of the weights in a model folder, name of the file -> 64 hexadecimal digits.

    Raises:
        OSError: A file cannot be read.
    """
    hashes = {}
    for path in (Path(directory, name) for name in (BACKBONE_NAME, EXITS_NAME)):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open('rb') as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
            hashes[path.name] = digest.hexdigest()
    return hashes


def without(tensors: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    """Leave out the tensors with one of these parts in their name."""
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


def load_pretrained(directory: str | os.PathLike, *, pretrained: bool = True, **kwargs: Any) -> MultiExitModel:
    """Return the multi-exit model that a folder holds.

    The folder is not trusted: all it says is checked, and its weights are compared with the model without data, by
    the headers of the files, before memory is taken.

    Args:
        directory: A folder that `save_pretrained` wrote.
        pretrained: Load the weights, the policy and the budgets; otherwise the architecture alone.
        **kwargs: For `timm.create_model`. With another `num_classes` all classifiers are fresh.

    Raises:
        MultiExitError: The folder holds no exits, what it must not hold, or files that do not fit each other.
    """
    directory = Path(directory)
    config = read_model_config(directory, overridden=kwargs)
    if config.exits is None:
        raise MultiExitError(f'{directory} holds a plain timm model: name the exits to attach, or exits="auto".')
    path = directory / EXITS_NAME
    headers = [read_header(directory / name) for name in (BACKBONE_NAME, EXITS_NAME)] if pretrained else []
    empty = _create_empty(config, directory, kwargs)
    if pretrained:
        check_state(empty.backbone.state_dict(), headers[0], directory / BACKBONE_NAME)
        check_state(_exit_tensors(empty), headers[1], path)
    backbone = load_backbone(config, directory, pretrained=pretrained, **kwargs)
    model = MultiExitModel(backbone, config.exits, drop_rate=float(kwargs.get('drop_rate') or 0.0))
    if not pretrained:
        return model
    tensors = safetensors.torch.load_file(path)
    if empty.num_classes != model.num_classes:
        # As timm does for main: the rest is kept, the classifiers start anew.
        _logger.info(f'{empty.num_classes} classes in {directory}, {model.num_classes} asked for: fresh classifiers.')
        own = _exit_tensors(model)
        tensors = {key: own[key] if '.fc.' in key else tensor for key, tensor in tensors.items()}
    else:
        model.policy, model.budgets = config.policy, config.budgets
    model.exits.load_state_dict({key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()})
    _check_finite(model.exits, path)
    return model


def load_backbone(config: ModelConfig, directory: Path, *, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """Return the timm model that a folder holds, as `timm.create_model('local-dir:...')` does for one that is trusted.

    timm gets the checked configuration and one safetensors file, nothing else of the folder.

    Args:
        config: What `read_model_config` returned for the folder.
        directory: The folder.
        pretrained: Load the weights; otherwise the architecture alone.
        **kwargs: For `timm.create_model`; they go before what the file says.

    Raises:
        MultiExitError: The architecture cannot be made so, or the weights do not fit it.
    """
    path = directory / BACKBONE_NAME
    pretrained_cfg = dict(config.pretrained_cfg)
    if pretrained:
        _check_size(config, directory, kwargs)
        pretrained_cfg['file'] = str(path)
    model = _create_backbone(config, directory, kwargs, pretrained=pretrained, pretrained_cfg=pretrained_cfg)
    if pretrained:
        _check_finite(model, path)
    return model


def _create_backbone(config: ModelConfig, directory: Path, given: dict[str, Any], **kwargs: Any) -> nn.Module:
    kwargs = {'pretrained_cfg': dict(config.pretrained_cfg), 'pretrained_model_args': config.model_args, **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return timm.create_model(config.architecture, **kwargs, **{**config.model_args, **given})
    except Exception as error:  # architectures raise all kinds of errors for what they do not take
        raise MultiExitError(f'{config.architecture} of {directory} cannot be made so: {_reason(error)}.') from error


def _create_empty_backbone(config: ModelConfig, directory: Path, given: dict[str, Any]) -> nn.Module:
    """Return the architecture that the weights are of, on the meta device: of what is given, only what no file sets."""
    own = {name: value for name, value in given.items() if name not in (*MODEL_ARGS, *_FACTORY_KEYWORDS)}
    with torch.device('meta'):
        return _create_backbone(config, directory, own)


def _create_empty(config: ModelConfig, directory: Path, given: dict[str, Any]) -> MultiExitModel:
    """Return the model on the meta device.

    Raises:
        MultiExitError: The exits do not fit the backbone.
    """
    backbone = _create_empty_backbone(config, directory, given).eval()
    modules = dict(backbone.named_modules())
    for spec in config.exits:
        if spec.module not in modules:
            raise MultiExitError(
                f'{config.architecture} has no module to tap named {brief(spec.module)}, which {directory} names.'
            )
    images = torch.empty(1, *config.pretrained_cfg['input_size'], device='meta')
    with torch.device('meta'), torch.no_grad():
        model = MultiExitModel(backbone, config.exits)
        _check_heads(model, directory)
        try:
            backbone(images)
        except Exception:  # some read their data in forward, which is not there: nothing is said of the exits
            return model
        try:
            model(images, exits=True)
            order = model.tap_order(images)
        except Exception as error:
            raise MultiExitError(
                f'The exits in {directory / CONFIG_NAME} do not fit {config.architecture}: {_reason(error)}.'
            ) from error
    if order != sorted(order):
        raise MultiExitError(f'The exits in {directory / CONFIG_NAME} are in disorder, allowed is shallow to deep.')
    return model


def _check_heads(model: MultiExitModel, directory: Path) -> None:
    """Raise for heads far larger than the backbone, which nobody trains, before they take memory."""
    num = sum(param.numel() for param in model.exits.parameters())
    most = 4 * sum(param.numel() for param in model.backbone.parameters()) + 10_000_000
    if num > most:
        raise MultiExitError(f'The heads in {directory / CONFIG_NAME} have {num} parameters, allowed are {most}.')


def _check_size(config: ModelConfig, directory: Path, given: dict[str, Any]) -> None:
    """Raise for a file with far fewer numbers than the architecture that its configuration names.

    The names may differ: timm knows how to read files of the architectures' authors.
    """
    header = read_header(directory / BACKBONE_NAME)
    num_saved = sum(math.prod(info.shape) for info in header.values())
    empty = _create_empty_backbone(config, directory, given)
    num = sum(param.numel() for param in empty.parameters())
    if num > 2 * num_saved + 1_000_000:
        raise MultiExitError(
            f'{directory / BACKBONE_NAME} holds {num_saved} numbers and does not fit this model: {config.architecture}'
            f' as {CONFIG_NAME} has it takes {num}.'
        )


def _exit_tensors(model: MultiExitModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the heads under the names they are saved with."""
    return without({f'{_PREFIX}{key}': tensor for key, tensor in model.exits.state_dict().items()}, *TRAINING_ONLY)


def _check_finite(module: nn.Module, path: Path) -> None:
    params = dict(module.named_parameters())
    for key, tensor in module.state_dict().items():
        # Gemma's buffers hold infinite limits.
        is_bad = not tensor.isfinite().all() if key in params else tensor.isnan().any()
        if is_bad:
            raise MultiExitError(f'{path} holds numbers that are none (NaN or infinite), at {key}.')


def _reason(error: Exception) -> str:
    return ' '.join(' '.join(str(error).split())[:200].rstrip('.:').split()) or type(error).__name__
