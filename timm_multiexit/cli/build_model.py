"""Model and regime from command-line arguments."""

import logging
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.data.config import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import resolve_model_input_args
from torch import nn

from timm_multiexit.checkpoints.source import ModelSource, create_backbone
from timm_multiexit.checkpoints.timm_checkpoint import load_checkpoint, read_training_checkpoint, read_weights
from timm_multiexit.cli.build_training import create_train_loss
from timm_multiexit.evaluation.cascade import Cascade
from timm_multiexit.exits.backbone import classifier_names
from timm_multiexit.exits.cost import empty_images, find_dtype, meta_copy
from timm_multiexit.factory import create_model
from timm_multiexit.models.multi_exit import MultiExitModel, drop_labels
from timm_multiexit.training.regimes import Regime
from timm_multiexit.utils.checks import is_list
from timm_multiexit.utils.errors import (
    LIBRARY_ERRORS,
    CheckpointError,
    InvalidValueError,
    MissingFileError,
    MultiExitError,
    one_line,
)
from timm_multiexit.utils.text import format_macs

_logger = logging.getLogger(__name__)


def create_train_model(
    args: Namespace, source: ModelSource | None, *, num_classes: int | None = None, resume: Path | None = None
) -> Any:
    """Return the model that the flags name, with exits if they ask for some, and its weights loaded.

    `source` is what `find_source` returned for `--model` and `--model-kwargs`, `num_classes` those of the data if it
    says, and `resume` the checkpoint of a run to resume.
    """
    if args.fast_norm:
        set_fast_norm()
    try:
        model = _create_architecture(args, source, num_classes)
    except MultiExitError:
        raise
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(
            f'Cannot create {args.model}: {one_line(error)}. See the flags of the model and --model-kwargs.'
        ) from error
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    if args.split_bn:
        # Before the backbone is frozen and a run's checkpoint is loaded, which has the further norms too.
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if resume:
        _check_resumed(model, resume)
        load_checkpoint(model, resume, use_ema=False)
    if num_classes:
        _check_num_classes(args, model, num_classes, is_new=not resume)
    if args.grad_checkpointing:
        _set_grad_checkpointing(args, model)
    if not resume:
        _init_classifiers(args, model)
    return model


def _set_grad_checkpointing(args: Namespace, model: Any) -> None:
    try:
        model.set_grad_checkpointing(enable=True)
    except AssertionError as error:  # as timm's models say it
        raise InvalidValueError(f'--grad-checkpointing is not supported by {args.model}. Leave it out.') from error


def model_kwargs(args: Namespace, source: ModelSource | None) -> tuple[dict[str, Any], tuple[int, int, int] | None]:
    """Return what `timm.create_model` takes in training and evaluation alike, and the image size that costs are for."""
    kwargs = {
        'pretrained': args.pretrained,
        'num_classes': args.num_classes,
        'in_chans': args.in_chans or (args.input_size[0] if args.input_size else None),
        'global_pool': args.gp,
        **args.model_kwargs,
    }
    if (img_size := _find_img_size(args, source)) is not None:
        kwargs['img_size'] = img_size
    return kwargs, args.input_size or (args.img_size and (args.in_chans or 3, args.img_size, args.img_size))


def _find_img_size(args: Namespace, source: ModelSource | None) -> Any:
    """Return the size that a model must be made for, None where it takes any: most transformers are made for one."""
    name, given = args.model, dict(args.model_kwargs)
    if source is not None:
        # timm gets what was checked. A size that was saved with the model gives way to the one that is given here.
        config = source.config
        name, saved, cfg = config.architecture, dict(config.model_args), dict(config.pretrained_cfg)
        if saved.pop('img_size', None) is not None and given.get('img_size') is None:
            cfg['fixed_input_size'] = True
        given = {'pretrained_cfg': cfg, **saved, **given}
    try:
        return resolve_model_input_args(name, vars(args), **given).get('img_size')
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(
            f'Cannot create {args.model}: {one_line(error)}. Check the name, --img-size and --model-kwargs.'
        ) from error


def _check_num_classes(args: Namespace, model: Any, num_classes: int, *, is_new: bool) -> None:
    """Raise where the data has more classes than the model, and warn where a trained classifier has more."""
    if num_classes > model.num_classes:
        raise InvalidValueError(
            f'--num-classes must be at least {num_classes}, the classes of the data, got'
            f' {args.num_classes or f"a model of {model.num_classes}"}.'
        )
    if num_classes < model.num_classes and args.num_classes is None and is_new:
        _logger.warning(
            f'The model has {model.num_classes} classes and the data {num_classes}: add --num-classes {num_classes}'
            ' for a classifier of these alone.'
        )


def _create_architecture(args: Namespace, source: ModelSource | None, num_classes: int | None) -> Any:
    kwargs, size = model_kwargs(args, source)
    if args.num_classes is None and not args.pretrained:
        kwargs['num_classes'] = num_classes
    kwargs |= {'drop_rate': args.drop, 'drop_path_rate': args.drop_path, 'drop_block_rate': args.drop_block}
    kwargs |= {'bn_momentum': args.bn_momentum, 'bn_eps': args.bn_eps}
    if args.pretrained_path:
        if not os.path.isfile(args.pretrained_path):
            raise MissingFileError(f'--pretrained-path must be a file, got {args.pretrained_path}.')
        # -1 classes: not the file's, so that a classifier of another size is made anew.
        kwargs['pretrained_cfg_overlay'] = {'file': args.pretrained_path, 'num_classes': -1}
    if args.exits is None:
        return create_backbone(source or args.model, **kwargs)
    exits = None if _has_own_exits(args, source) and args.exits == 'auto' else args.exits
    heads = {'head': args.exit_head, 'head_widths': args.head_widths}
    with _errors_alone(create_model.__module__):  # its advice is to train the exits
        model = create_model(source or args.model, exits=exits, input_size=size, **heads, **kwargs)
    # Projectors that no loss reads would have no gradient, which distributed training takes for an error.
    if args.exit_projectors and create_train_loss(args).feature_weight > 0:
        model.add_projectors()
    return model


@contextmanager
def _errors_alone(name: str) -> Iterator[None]:
    """Let a module's logger say nothing below an error within the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _has_own_exits(args: Namespace, source: ModelSource | None) -> bool:
    """Return whether the model's folder or repository holds trained exits, which 'auto' then means."""
    return bool(args.pretrained and source is not None and source.config.exits)


def _check_resumed(model: nn.Module, path: Path) -> None:
    exits = (read_training_checkpoint(path).get('task_state') or {}).get('exits')
    if isinstance(model, MultiExitModel) and exits is None:
        raise CheckpointError(
            f'Cannot resume from {path}, a run without exits: start from its weights with'
            f' --initial-checkpoint {path}, or leave the exits out.'
        )


def _init_classifiers(args: Namespace, model: nn.Module) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    scale = 1.0 if args.head_init_scale is None else args.head_init_scale
    backbone = getattr(model, 'backbone', model)
    classifiers = [backbone.get_submodule(name) for name in classifier_names(backbone)]
    classifiers += [head.fc for head in getattr(model, 'exits', ())]
    with torch.no_grad():
        for classifier in classifiers:
            linear: Any = _last_linear(classifier)
            linear.weight.mul_(scale)
            if linear.bias is not None:
                linear.bias.mul_(scale)
                if args.head_init_bias is not None:
                    linear.bias.fill_(args.head_init_bias)


@torch.no_grad()
def check_takes_images(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raise if a model, still on the CPU, does not take images of (channels, height, width)."""
    try:
        meta_copy(model)(empty_images(model, input_size, 2))
        return
    except LIBRARY_ERRORS:
        pass  # a few models read their data, which is not there: asked again with data
    modes = [module.training for module in model.modules()]
    try:
        model.eval()(torch.zeros(2, *input_size, dtype=find_dtype(model)))
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(
            f'The model does not take images of {list(input_size)}: {one_line(error)}. Give another --img-size.'
        ) from error
    finally:
        for module, mode in zip(model.modules(), modes):
            module.training = mode


def place_model(args: Namespace, model: nn.Module, accelerator: Accelerator) -> Any:
    """Return the model on its device, its normalization layers synchronized if the flags say so."""
    if synchronizes_norms(args, accelerator):
        if accelerator.device.type == 'cpu':
            raise InvalidValueError('--sync-bn needs GPUs, torch has none for CPUs: leave it out.')
        model = convert_sync_batchnorm(model)
    model.to(device=accelerator.device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def synchronizes_norms(args: Namespace, accelerator: Accelerator) -> bool:
    """Return whether normalization layers see the batches of all processes, so that their statistics are the same."""
    return bool(args.sync_bn and accelerator.num_processes > 1)


def create_regime(args: Namespace, model: nn.Module, source: ModelSource | None) -> Regime:
    """Return what trains when.

    Fresh heads on a trained backbone first learn alone, or they would pull it away from its weights.
    """
    if not isinstance(model, MultiExitModel):
        return Regime()
    name = args.regime or 'joint'
    backbone_epochs = 0
    if name == 'mixed':
        backbone_epochs = args.epochs // 2 if args.backbone_epochs is None else args.backbone_epochs
    # timm replaces a classifier of other classes by a fresh one.
    is_other = args.pretrained and model.pretrained_cfg.get('num_classes') != model.num_classes
    has_fresh_classifier = bool(is_other and not args.initial_checkpoint)
    is_trained = bool(args.pretrained or args.initial_checkpoint or backbone_epochs)
    warmup = 0.0 if name == 'frozen' else args.head_warmup_epochs
    if warmup is None:
        has_own_heads = args.exits == 'auto' and _has_own_exits(args, source)
        path = args.initial_checkpoint
        has_trained_heads = has_own_heads or (
            path and any(re.match(r'(.*\.)?exits\.\d', key) for key in read_weights(path))
        )
        warmup = 1.0 if is_trained and (has_fresh_classifier or not has_trained_heads) else 0.0
    trains_classifier = has_fresh_classifier and not backbone_epochs
    return Regime(name, backbone_epochs, warmup, args.exit_warmup_epochs, trains_classifier=trains_classifier)


def keep_classes(model: MultiExitModel, labels: Sequence[int]) -> None:
    """Leave only some classes in all classifiers of a model, in the order of `labels`.

    Raises:
        InvalidValueError: A classifier does not end with a linear layer of one output per class.
    """
    classifiers = [model.backbone.get_submodule(name) for name in classifier_names(model.backbone)]
    places = torch.tensor(labels)
    for classifier in (*classifiers, *(head.fc for head in model.exits)):
        linear = _last_linear(classifier)
        if linear is None or len(linear.weight) != model.num_classes:
            raise InvalidValueError(
                f'--valid-labels does not go with the classifier of {type(model.backbone).__name__}.'
            )
        for name in ('weight', 'bias'):
            tensor = getattr(linear, name)
            if tensor is not None:
                setattr(linear, name, nn.Parameter(tensor.detach()[places.to(tensor.device)]))
        setattr(linear, 'out_features' if isinstance(linear, nn.Linear) else 'out_channels', len(labels))
    backbone: Any = model.backbone
    names: Any = model.pretrained_cfg.get('label_names')
    drop_labels(backbone)
    if is_list(names):
        backbone.pretrained_cfg['label_names'] = [names[label] for label in labels]
    backbone.num_classes = len(labels)


def _last_linear(classifier: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """Return the layer that gives the logits: some classifiers have a norm before it."""
    layers = [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else None


def split_name(text: str) -> tuple[str, str]:
    """Return model name and checkpoint of NAME[:CHECKPOINT]; '' for no checkpoint.

    >>> split_name('resnet18:last.pth.tar'), split_name('local-dir:runs/small'), split_name('resnet18.a1_in1k')
    (('resnet18', 'last.pth.tar'), ('local-dir:runs/small', ''), ('resnet18.a1_in1k', ''))
    """
    if text.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
        return text, ''
    name, _, checkpoint = text.partition(':')
    return name, checkpoint


def create_static(text: str, *, num_classes: int, in_chans: int = 3, flag: str = '--compare') -> MultiExitModel:
    """Return a trained plain timm model, without exits, on the CPU.

    `text` is a timm name, for its own weights; NAME:CHECKPOINT, for those of a file; `local-dir:FOLDER`; or
    `hf-hub:ORG/NAME`. It must have the classes of the model that it is compared with. Errors name the flag.
    """
    name, checkpoint = split_name(text)
    try:
        if checkpoint:
            backbone = create_backbone(name, num_classes=num_classes, in_chans=in_chans)
            load_checkpoint(backbone, checkpoint)
        else:
            backbone = create_backbone(name, pretrained=True)
    except MultiExitError as error:
        raise type(error)(f'{flag} {text}: {error}') from error
    except (*LIBRARY_ERRORS, KeyError, SafetensorError) as error:
        raise CheckpointError(f'{flag} {text}: cannot load the weights: {one_line(error)}.') from error
    if backbone.num_classes != num_classes:
        raise InvalidValueError(
            f'{flag} {text} must have the {num_classes} classes of the model, got {backbone.num_classes}.'
        )
    model = MultiExitModel(backbone, [])
    if model.in_chans != in_chans:
        raise InvalidValueError(f'{flag} {text} must take images of {in_chans} channels, got {model.in_chans}.')
    return model


def create_cascade(
    args: Namespace, given: Mapping[str, Any], model: MultiExitModel, data_config: Mapping[str, Any]
) -> Cascade:
    """Return the cascade of two models that `--compare-cascade` names, on the CPU.

    Args:
        args: The flags.
        given: The flags as they were given, without what a checkpoint remembers.
        model: The model that it is compared with.
        data_config: How images are prepared for that.

    Raises:
        MultiExitError: A model is unknown, has other classes, or takes images that are prepared in another way; or the
            first does not cost less than the second.
    """
    flag, input_size = '--compare-cascade', data_config['input_size']
    parts = []
    for name in args.compare_cascade:
        part = create_static(name, num_classes=model.num_classes, in_chans=input_size[0], flag=flag)
        own = resolve_data_config(dict(given), model=part)
        for key in own.keys() & data_config.keys():
            texts = [
                list(value) if isinstance(value, (list, tuple)) else value for value in (data_config[key], own[key])
            ]
            if texts[0] != texts[1]:
                raise InvalidValueError(
                    f"{flag} {name} must take images prepared as {args.model}'s, {key} {texts[0]}, got {texts[1]}. Name"
                    ' models prepared alike, or prepare all alike by --img-size, --crop-pct, --mean, --std and'
                    ' --interpolation.'
                )
        parts.append(part)
    cascade = Cascade(*parts)
    names = ','.join(args.compare_cascade)
    try:
        costs = cascade.costs(input_size)
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(
            f'{flag} {names}: cannot run on images {list(input_size)}: {one_line(error)}.'
        ) from error
    small, large = costs.heads[0], costs.paths[-1]
    if small >= large:
        hint = 'Swap them.' if small > large else 'Name a cheaper first model.'
        raise InvalidValueError(
            f'{flag} must be SMALL,LARGE, got {names} of {format_macs(small)} and {format_macs(large)}. {hint}'
        )
    return cascade
