"""Model, task and optimizer from command-line arguments."""

import logging
from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.models import load_state_dict, resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from timm_multiexit.checks import loss_kwargs
from timm_multiexit.config import MultiExitError
from timm_multiexit.cost import meta_copy
from timm_multiexit.distillation import KDConfig
from timm_multiexit.factory import create_model
from timm_multiexit.losses import create_loss
from timm_multiexit.model import MultiExitModel
from timm_multiexit.regimes import Regime, split_exit_groups
from timm_multiexit.sources import Source, create_backbone, find_source
from timm_multiexit.taps import classifier_names
from timm_multiexit.task import MultiExitTask
from timm_multiexit.training_checkpoint import load_checkpoint, read_training_checkpoint

# What timm and torch raise for keywords and numbers that they do not take, and for weights that are not to be had.
_REFUSALS = (TypeError, ValueError, AssertionError, IndexError, RuntimeError, OSError)
_logger = logging.getLogger(__name__)

_SQRT_SCALED = ('ada', 'lamb')  # optimizers whose rate timm scales with the root of the batch


def create_train_model(args: Namespace, num_classes: int | None, resume: Any = None) -> nn.Module:
    """Return the model that the flags name, with exits if they ask for some, and its weights loaded.

    Args:
        args: Arguments; `num_classes` is set to what the model has.
        num_classes: Of the data, None if it does not say.
        resume: Checkpoint of a run to go on with, None for a new one.

    Raises:
        MultiExitError: No such model or exits, weights that do not fit, or fewer classes than the data has.
    """
    if args.fast_norm:
        set_fast_norm()
    pin_model(args)
    try:
        model = _create_architecture(args)
    except MultiExitError:
        raise
    except _REFUSALS as error:
        raise MultiExitError(
            f'{args.model} cannot be made so: {_first_line(error)}. See the flags of the model and --model-kwargs.'
        ) from error
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    if args.split_bn:
        # Before the backbone is frozen and a run's checkpoint is loaded, which has the further norms too.
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if resume:
        _check_resumed(model, resume)
        load_checkpoint(model, resume, use_ema=False)
    args.num_classes = model.num_classes
    if num_classes and num_classes > args.num_classes:
        raise MultiExitError(f'The data has {num_classes} classes, the model {args.num_classes}: set --num-classes.')
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if not resume:
        _init_classifiers(args, model)
    return model


def pin_model(args: Namespace) -> Source | None:
    """Return the folder or repository that `--model` names; of the Hub it names its commit from then on.

    Raises:
        MultiExitError: There is no such model, or it says what it must not say.
    """
    source = find_source(args.model, **args.model_kwargs)
    if source is not None:
        args.model = source.name
    return source


def model_kwargs(args: Namespace) -> tuple[dict[str, Any], tuple[int, int, int] | None]:
    """Return what `timm.create_model` takes in training and evaluation alike, and the image size that costs are for."""
    kwargs = {
        'pretrained': args.pretrained,
        'num_classes': args.num_classes,
        'in_chans': args.in_chans or (args.input_size[0] if args.input_size else None),
        'global_pool': args.gp,
        **args.model_kwargs,
    }
    # Models made for one image size (transformers) must be told another.
    img_size = resolve_model_input_args(args.model, vars(args), **args.model_kwargs).get('img_size')
    if img_size is not None:
        kwargs['img_size'] = img_size
    return kwargs, args.input_size or (args.img_size and (args.in_chans or 3, args.img_size, args.img_size))


def _create_architecture(args: Namespace) -> nn.Module:
    kwargs, size = model_kwargs(args)
    kwargs |= {
        'drop_rate': args.drop,
        'drop_path_rate': args.drop_path,
        'drop_block_rate': args.drop_block,
        'bn_momentum': args.bn_momentum,
        'bn_eps': args.bn_eps,
    }
    if args.pretrained_path:
        # -1 classes: not the file's, so that a classifier of another size is made anew.
        kwargs['pretrained_cfg_overlay'] = {'file': args.pretrained_path, 'num_classes': -1}
    if args.exits is None:
        return create_backbone(args.model, **kwargs)
    exits = None if _has_own_exits(args) and args.exits == 'auto' else args.exits
    model = create_model(
        args.model, exits=exits, head=args.exit_head, head_widths=args.head_widths, input_size=size, **kwargs
    )
    # Projectors that no loss reads would have no gradient, which distributed training takes for an error.
    if args.exit_projectors and create_train_loss(args).feature_weight > 0:
        model.add_projectors()
    return model


def _has_own_exits(args: Namespace) -> bool:
    """Return whether the model's folder or repository holds trained exits, which 'auto' then means."""
    source = find_source(args.model, **args.model_kwargs) if args.pretrained else None
    return source is not None and bool(source.config.exits)


def _check_resumed(model: nn.Module, path: Any) -> None:
    exits = (read_training_checkpoint(path).get('task_state') or {}).get('exits')
    if isinstance(model, MultiExitModel) and exits is None:
        raise MultiExitError(
            f'{path} is of a run without exits, so it cannot be gone on with: start from its weights with'
            f' --initial-checkpoint {path}, or leave the exits out.'
        )


def _init_classifiers(args: Namespace, model: nn.Module) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    backbone = getattr(model, 'backbone', model)
    classifiers = [backbone.get_submodule(name) for name in classifier_names(backbone)]
    classifiers += [head.fc for head in getattr(model, 'exits', ())]
    with torch.no_grad():
        for classifier in classifiers:
            # Some have a norm before the linear layer.
            linear = [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
            if args.head_init_scale is not None:
                linear.weight.mul_(args.head_init_scale)
            if linear.bias is not None:
                linear.bias.mul_(1.0 if args.head_init_scale is None else args.head_init_scale)
                if args.head_init_bias is not None:
                    linear.bias.fill_(args.head_init_bias)


@torch.no_grad()
def check_image_size(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raise if a model does not take images of this size.

    Args:
        model: In any mode, still on the CPU.
        input_size: (channels, height, width).

    Raises:
        MultiExitError: It does not, the message has its own reason.
    """
    try:
        meta_copy(model).eval()(torch.empty(2, *input_size, device='meta'))
        return
    except _REFUSALS:
        pass  # a few models read their data, which is not there: asked again with data
    modes = [module.training for module in model.modules()]
    try:
        model.eval()(torch.zeros(2, *input_size, dtype=next(model.parameters()).dtype))
    except _REFUSALS as error:
        raise MultiExitError(
            f'The model does not take images of {list(input_size)}: {_first_line(error)}. Give another --img-size.'
        ) from error
    finally:
        for module, mode in zip(model.modules(), modes):
            module.training = mode


def place_model(args: Namespace, model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the model on its device, its normalization layers synchronized if the flags say so."""
    if args.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == 'cpu':
            raise MultiExitError('--sync-bn needs GPUs, torch has none for CPUs: leave it out.')
        args.dist_bn = ''
        model = convert_sync_batchnorm(model)
    model.to(device=accelerator.device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def _first_line(error: Exception) -> str:
    return ' '.join((str(error).splitlines() or [type(error).__name__])[0].split()).rstrip('.:') or type(error).__name__


def create_criterion(args: Namespace) -> nn.Module:
    """Return the task term: timm's loss for the flags."""
    return create_classification_loss(**loss_kwargs(args, args.num_classes))


def create_train_loss(args: Namespace) -> nn.Module:
    """Return the multi-exit loss that the flags name."""
    return create_loss(
        args.exit_loss,
        teacher=args.exit_teacher,
        output_loss=args.exit_output_loss,
        output_weight=args.exit_output_weight,
        feature_weight=args.exit_feature_weight,
        temperature=args.exit_temperature,
        exit_weights=args.exit_weights,
        criterion=create_criterion(args),
        multi_label=args.task == 'multilabel',
    )


def create_task(args: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Return the task: what is minimised in a step.

    Raises:
        MultiExitError: The teacher cannot be had, or flags contradict each other.
    """
    common = {'device': device, 'dtype': getattr(torch, args.model_dtype) if args.model_dtype else None}
    common['verbose'] = False
    teacher = args.kd_model_name
    source = find_source(teacher) if teacher else None
    try:
        if source is not None:
            teacher = source.create_backbone(pretrained=True).to(device=device, dtype=common['dtype'])
        return _create_task(args, model, teacher, common)
    except MultiExitError:
        raise
    except _REFUSALS as error:
        if not teacher:
            raise
        raise MultiExitError(f'--kd-model-name {args.kd_model_name} cannot teach so: {_first_line(error)}.') from error


def _create_task(
    args: Namespace, model: nn.Module, teacher: str | nn.Module | None, common: dict[str, Any]
) -> TrainingTask:
    weights = {'distill_loss_weight': args.distill_loss_weight, 'task_loss_weight': args.task_loss_weight}
    if isinstance(model, MultiExitModel):
        kd = KDConfig(**weights, temperature=args.kd_temperature) if teacher else None
        return MultiExitTask(model, create_train_loss(args), teacher=teacher, kd=kd, **common)
    if teacher:
        return _create_distillation_task(args, model, teacher, weights, common)
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(
            model, create_criterion(args), threshold=args.multilabel_threshold, **common
        )
    return ClassificationTask(model, create_criterion(args), **common)


def _create_distillation_task(args, model, teacher, weights, common) -> TrainingTask:
    common = {
        'student_model': model,
        'teacher_model': teacher,
        'criterion': create_criterion(args),
        **weights,
        **common,
    }
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim, **common
        )
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
    return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)


def create_regime(args: Namespace, model: nn.Module) -> Regime:
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
    is_other = args.pretrained and model.pretrained_cfg.get('num_classes') != args.num_classes
    has_fresh_classifier = bool(is_other and not args.initial_checkpoint)
    is_trained = bool(args.pretrained or args.pretrained_path or args.initial_checkpoint or backbone_epochs)
    if name == 'frozen' and not (is_trained or args.resume):
        _logger.warning('The backbone stays as it is, and it is not trained: add --pretrained or --initial-checkpoint.')
    warmup = 0.0 if name == 'frozen' else args.head_warmup_epochs
    if warmup is None:
        has_own_heads = args.exits == 'auto' and _has_own_exits(args)
        has_trained_heads = has_own_heads or _checkpoint_has_exits(args.initial_checkpoint)
        warmup = 1.0 if is_trained and (has_fresh_classifier or not has_trained_heads) else 0.0
    return Regime(
        name,
        backbone_epochs,
        warmup,
        args.exit_warmup_epochs,
        trains_classifier=has_fresh_classifier and not backbone_epochs,
    )


def _checkpoint_has_exits(path: str) -> bool:
    return bool(path) and any(key.startswith('exits.') for key in load_state_dict(path))


def create_train_optimizer(
    args: Namespace, model: nn.Module, batch_size: float, accelerator: Accelerator, regime: Regime
) -> torch.optim.Optimizer:
    """Return the optimizer, the heads in groups of their own; `args.lr` is set if it was not given.

    Args:
        args: Arguments.
        model: What is trained; frozen parameters are left out.
        batch_size: Mean batch size of one process.
        accelerator: Knows how many there are.
        regime: What trains when.

    Raises:
        MultiExitError: The optimizer does not take what the flags say.
    """
    if not args.lr:
        is_sqrt = any(name in args.opt.lower() for name in _SQRT_SCALED)
        args.lr_base_scale = args.lr_base_scale or ('sqrt' if is_sqrt else 'linear')
        ratio = batch_size * accelerator.num_processes * args.grad_accum_steps / args.lr_base_size
        args.lr = args.lr_base * (ratio**0.5 if args.lr_base_scale == 'sqrt' else ratio)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except _REFUSALS as error:
        raise MultiExitError(
            f'--opt {args.opt} cannot be made so: {_first_line(error)}. See its flags and --opt-kwargs.'
        ) from error
    split_exit_groups(optimizer, model, args.exit_lr_scale, trains_classifier=regime.trains_classifier)
    return optimizer


def prepare(task: TrainingTask, optimizer: torch.optim.Optimizer, accelerator: Accelerator, **ddp: Any) -> Any:
    """Wrap a task's model for its processes and precision, and return the wrapped optimizer.

    Args:
        task: Its `trainable_module` is replaced.
        optimizer: Of its parameters.
        accelerator: Wraps.
        **ddp: For `DistributedDataParallel`.
    """
    accelerator.ddp_handler = DistributedDataParallelKwargs(**ddp)
    task.trainable_module, prepared = accelerator.prepare(task.trainable_module, optimizer)
    return prepared
