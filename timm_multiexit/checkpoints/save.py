"""The folder that is saved and published, and the way back from it.

A folder holds `model.safetensors`, the backbone under timm's own keys, `exits.safetensors`, the heads, and
`config.json`, timm's configuration with one more key, `multiexit`. Plain timm loads it as the main network. That of a
truncated model holds `model.safetensors` under the keys of its state dict, and plain timm refuses it.

What is written comes back equal: before anything is written the weights are compared with the model that the
configuration describes.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_multiexit.checkpoints.architecture import (
    check_finite,
    create_empty_architecture,
    create_empty_model,
    create_empty_truncated,
    exit_tensors,
    fill_unsaved_buffers,
    unsaved_buffers,
)
from timm_multiexit.checkpoints.config import FORMAT_VERSION, ModelConfig, read_model_config
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_KEY, CONFIG_NAME, EXITS_NAME
from timm_multiexit.checkpoints.module_folder import write_module_config
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.sharding import check_whole
from timm_multiexit.models.truncation import TruncatedModel
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_instance, check_path
from timm_multiexit.utils.errors import (
    CheckpointError,
    DiskError,
    InvalidTypeError,
    InvalidValueError,
    StateError,
    brief,
    one_line,
)
from timm_multiexit.utils.files import RUN_AGAIN, explain_disk_errors, sha256, write_text
from timm_multiexit.utils.untrusted import read_json
from timm_multiexit.version import __version__

_LABELS = ('label_names', 'label_descriptions')

# What changes the weights of a model after it was created: a part of their names, and what to do before saving.
_CHANGES = (
    (r'parametrizations\.', 'call torch.nn.utils.parametrize.remove_parametrizations(module, name) for each of them'),
    (
        r'lora_|base_layer\.|base_model\.|modules_to_save\.',
        'merge the adapters first: model = peft_model.merge_and_unload()',
    ),
    (
        r'(^|\.)_orig_mod\.',
        'put the module back that was compiled, its _orig_mod, or compile in place: module.compile()',
    ),
    (r'(^|\.)module\.', 'put the module back that was wrapped, its .module'),
    (r'_mask$', 'make the pruning permanent first: torch.nn.utils.prune.remove(module, name)'),
    (r'_orig$', 'call torch.nn.utils.remove_spectral_norm(module, name) for each of them'),
    (r'_g$', 'call torch.nn.utils.remove_weight_norm(module, name) for each of them'),
    (r'(^|\.)total_(ops|params)$', "delete the profiler's buffers: del module.total_ops, module.total_params"),
)

# Layers that do nothing in evaluation: their rates are not part of a model's configuration.
_TRAINING_LAYERS = ('Identity', 'Dropout', 'Dropout2d', 'DropPath', 'DropBlock2d')


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> None:
    """Write a model to a folder that `create_model('local-dir:...', pretrained=True)` and plain timm load.

    That of a model around a module that is not timm's, `load_exits(module, directory)` loads.

    Weights of another dtype than float32 keep it in the file; timm, and `create_model`, make float32 of them unless
    told `dtype=`. What has no weights and is not in the configuration, as hooks, is not kept.

    All files are written beside the folder first and moved into it when they are whole; other files in the folder
    stay.

    Args:
        model: A `MultiExitModel`, with its policy and budgets, a `TruncatedModel`, or a timm model, which is written
            without exits.
        directory: The folder; created if it does not exist.
        data_config: Preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode; as far as it differs
            from the backbone's own configuration.
        label_names: Names of the classes, in order.

    Raises:
        CheckpointError: The model would not come back equal, since it was changed after it was created; or it contains
            NaN or inf. Nothing is written.
        InvalidTypeError: The model or the folder is of the wrong type.
        InvalidValueError: The names of the classes are not one per class.
        DiskError: The disk is full or not writable; the folder is as it was, or nothing loads it.
    """
    check_path('directory', directory)
    if data_config is not None:
        check_instance('data_config', data_config, dict)
    _check_model(model)
    if isinstance(model, MultiExitModel) and not _is_of_module(model):
        data_config = {'input_size': model.input_size, **(data_config or {})}
    with explain_disk_errors(directory, advice=RUN_AGAIN):
        write_model(model, Path(directory), data_config=data_config, label_names=label_names)


def write_model(
    model: nn.Module, directory: Path, *, data_config: dict[str, Any] | None, label_names: list[str] | None
) -> None:
    """Do `save_pretrained`; errors of the disk are raised as they come, for callers that know what to advise."""
    backbone: Any = model.backbone if isinstance(model, (MultiExitModel, TruncatedModel)) else model
    config = _describe_labels(model if isinstance(model, MultiExitModel) else backbone, label_names)
    section = _describe_exits(model)
    if section is not None:
        config[CONFIG_KEY] = section
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise DiskError(f'directory must be a folder, got the file {existing}.')
    # Beside the folder, or above it where nothing is there yet, so that a refusal leaves nothing.
    place = existing if existing != directory else directory.parent
    with tempfile.TemporaryDirectory(prefix=f'.{directory.name}-', dir=place) as temporary:
        path = Path(temporary, CONFIG_NAME)
        try:
            if _is_of_module(model):
                write_module_config(cast(MultiExitModel, model), path, config, data_config)
            else:
                save_config_for_hf(backbone, str(path), model_config=config, data_config=data_config)
        except (ValueError, TypeError, AssertionError, IndexError, KeyError) as error:
            raise InvalidValueError(
                f'The model cannot be described in a file: {one_line(error)}. Check data_config, label_names and the'
                ' keywords it was created with.'
            ) from error
        values = read_json(path)
        for name in _LABELS:
            values['pretrained_cfg'].pop(name, None)  # where timm keeps those of a loaded model; they go to the root
        # At the root alone, or transformers passes it twice.
        values.get('model_args', {}).pop('num_classes', None)
        if section and section.get('truncated') and section['exits']:
            values['architecture'] = f'{values["architecture"]} cut at exit {model.exit_idx}, for timm_multiexit alone'
        path.write_text(json.dumps(values, indent=2), encoding='utf-8')
        files = _collect_tensors(model)
        if not _is_of_module(model):
            _check_way_back(model, files, path, directory)
        _check_all_is_written(model)
        for name, tensors in files.items():
            _save_tensors(tensors, Path(temporary, name))
        directory.mkdir(parents=True, exist_ok=True)
        # config.json last: until then a reader sees an incomplete network, not a mixture that it accepts.
        (directory / CONFIG_NAME).unlink(missing_ok=True)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            shutil.move(path, directory / path.name)


def _check_model(model: Any) -> None:
    """Raise for what is not a model that timm made, with what to pass instead."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f'model must be a MultiExitModel or a timm model, got {brief(model)}.')
    check_whole(model, 'save_pretrained')
    for part, where in ((model, 'model'), (getattr(model, 'backbone', None), 'model.backbone')):
        kind = type(part).__name__
        if '_orig_mod' in getattr(part, '_modules', ()):
            raise InvalidTypeError(f'{where} must not be compiled: pass {where}._orig_mod, or compile it in place.')
        if isinstance(getattr(part, 'module', None), nn.Module) and 'Parallel' in kind:
            raise InvalidTypeError(f'{where} must not be wrapped in {kind}: use {where}.module.')
        if hasattr(part, 'merge_and_unload'):
            raise InvalidTypeError(
                f'{where} must not be a {kind}: use {where}.merge_and_unload(), which merges adapters.'
            )
    if any(isinstance(value, Tensor) and value.is_meta for value in model.state_dict().values()):
        raise StateError('The model must have data, got weights on the meta device.')
    backbone: Any = model.backbone if isinstance(model, (MultiExitModel, TruncatedModel)) else model
    cfg = getattr(backbone, 'pretrained_cfg', None)
    if not _is_of_module(model) and not (isinstance(cfg, Mapping) and 'architecture' in cfg):
        raise InvalidTypeError(
            f'model must be made by timm.create_model to be created anew from a file, got {type(backbone).__name__}:'
            ' torch.save(model.state_dict(), PATH) keeps its weights.'
        )


def _is_of_module(model: nn.Module) -> bool:
    """Return whether a model has exits on a module that is not timm's, which `load_exits` brings back."""
    return isinstance(model, MultiExitModel) and model.module_info is not None


def _describe_exits(model: nn.Module) -> dict[str, Any] | None:
    """Return what `config.json` says of exits, None for a plain timm model."""
    section: dict[str, Any] = {
        'format_version': FORMAT_VERSION,
        'library_version': __version__,
        'weights': EXITS_NAME,
        'exits': [],
    }
    if isinstance(model, TruncatedModel):
        section['exits'] = [] if model.spec is None else [model.spec.to_dict()]
        return section | {'truncated': {'architecture': model.pretrained_cfg['architecture'], 'exit': model.exit_idx}}
    if not isinstance(model, MultiExitModel):
        return None
    section['exits'] = [spec.to_dict() for spec in model.exits.specs]
    for name in ('policy', 'budgets', 'origin'):
        if getattr(model, name) is not None:
            section[name] = getattr(model, name).to_dict()
    return section


def _collect_tensors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file."""
    if isinstance(model, TruncatedModel):
        return {BACKBONE_NAME: model.state_dict() if model.spec else model.backbone.state_dict()}
    if not isinstance(model, MultiExitModel):
        return {BACKBONE_NAME: model.state_dict()}
    return {BACKBONE_NAME: model.backbone.state_dict(), EXITS_NAME: exit_tensors(model)}


def _check_all_is_written(model: nn.Module) -> None:
    """Raise for weights of the model itself, which are neither the backbone's nor those of the exits."""
    if isinstance(model, MultiExitModel):
        other = [key for key in model.state_dict() if not key.startswith(('backbone.', 'exits.'))]
        if other:
            raise CheckpointError(
                f'{type(model).__name__} must have weights in backbone and exits alone to be saved, got'
                f' {brief(other[0])}. Nothing was written: remove it, or torch.save(model.state_dict(), PATH).'
            )


def _check_way_back(model: nn.Module, files: Mapping[str, Mapping[str, Tensor]], draft: Path, directory: Path) -> None:
    """Raise unless the weights are those of the model that the configuration file `draft` describes."""
    given: dict[str, Any] = read_json(draft).get('model_args') or {}
    try:
        # Keywords that a file must not set are for whoever loads the folder to pass: here they make no difference.
        config = read_model_config(draft.parent, overridden=given)
    except CheckpointError as error:
        raise CheckpointError(f'The model would not come back: {error.__cause__ or error}') from error
    empty, expected = _describe_files(config, directory, given)
    for name, tensors in files.items():
        _check_equal(model, tensors, expected[name])
    _check_layers(model, empty)
    check_finite(model, 'The model')
    if isinstance(model, TruncatedModel) and model.spec is not None:
        _check_buffers(model, empty)


def _describe_files(
    config: ModelConfig, directory: Path, given: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Return the model that a configuration describes, on the meta device, and the tensors of each of its files."""
    empty: Any
    if config.truncated is not None and config.truncated.specs:
        empty = create_empty_truncated(config, directory, given)
        return empty, {BACKBONE_NAME: empty.state_dict()}
    if config.exits is None:
        empty = create_empty_architecture(config, directory, given)
        return empty, {BACKBONE_NAME: empty.state_dict()}
    empty = create_empty_model(config, directory, given)
    return empty, {BACKBONE_NAME: empty.backbone.state_dict(), EXITS_NAME: exit_tensors(empty)}


def _check_equal(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    unknown, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    other = sorted(
        key for key in tensors.keys() & expected.keys() if tuple(tensors[key].shape) != tuple(expected[key].shape)
    )
    other += [
        key
        for key in sorted(tensors.keys() & expected.keys())
        if tensors[key].is_floating_point() != expected[key].is_floating_point()
    ]
    if not (unknown or missing or other):
        return
    names = ', '.join(brief(key).strip("'") for key in (unknown or missing or other)[:2])
    steps = (step for pattern, step in _CHANGES for key in unknown if re.search(pattern, key))
    step = next(steps, 'torch.save(model.state_dict(), PATH) keeps its weights')
    raise CheckpointError(
        f'{type(model).__name__} was changed since it was created and would not come back:'
        f' {len(unknown)} weights are new, {len(missing)} are gone, {len(other)} have another shape or type ({names}).'
        f' Nothing was written: {step}.'
    )


def _check_layers(model: nn.Module, empty: nn.Module) -> None:
    """Raise for a layer without weights that was replaced by one of another kind."""
    created = dict(empty.named_modules())
    for name, module in model.named_modules():
        before = created.get(name)
        if before is None or type(module) is type(before) or module.state_dict():
            continue
        now, then = type(module).__name__, type(before).__name__
        is_layer = not any(module.children()) and not any(before.children())
        if is_layer and now not in _TRAINING_LAYERS and then not in _TRAINING_LAYERS:
            raise CheckpointError(
                f'{name} must be a {then}, as it was created, to come back, got {now}. Nothing was written:'
                ' torch.save(model.state_dict(), PATH) keeps the weights.'
            )


def _check_buffers(model: TruncatedModel, empty: nn.Module) -> None:
    """Raise unless the tables and masks that no file has are computed anew as they are."""
    empty.load_state_dict(model.state_dict(), assign=True)  # some of them ask for the device of the weights
    fill_unsaved_buffers(empty)
    computed = unsaved_buffers(empty)
    for name, buffer in unsaved_buffers(model).items():
        found = computed.get(name)
        if found is None or found.is_meta or not torch.equal(found.to(buffer.dtype), buffer):
            raise CheckpointError(
                f'{name} of the truncated model cannot be computed anew, so it would not come back. Nothing was'
                ' written: save the model that it was cut from, and truncate it after loading.'
            )


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
    write_text(path, json.dumps(values, indent=2) + '\n')


def hash_weights(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of the weights in a model folder, name of the file -> 64 hexadecimal digits."""
    paths = [Path(directory, name) for name in (BACKBONE_NAME, EXITS_NAME)]
    return {path.name: sha256(path) for path in paths if path.is_file()}
