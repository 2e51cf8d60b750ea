"""What training minimises, from command-line arguments: criterion, loss and task."""

from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.data import FastCollateMixup, Mixup
from timm.data.target_transforms import MultiLabelTarget
from timm.loss import create_classification_loss
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

from timm_multiexit.checkpoints.source import find_source
from timm_multiexit.cli.flags.train_rules import is_mixing, loss_kwargs
from timm_multiexit.data.datasets import check_classes, create_checked_dataset
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.losses.multi_exit_loss import create_loss
from timm_multiexit.losses.teachers import KDConfig
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.training.regimes import Regime, split_exit_groups
from timm_multiexit.training.task import MultiExitTask
from timm_multiexit.utils.errors import LIBRARY_ERRORS, MultiExitError, one_line

_SQRT_SCALED = ('ada', 'lamb')  # optimizers whose rate timm scales with the root of the batch


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
    except LIBRARY_ERRORS as error:
        raise MultiExitError(
            f'--opt {args.opt} cannot be made so: {one_line(error)}. See its flags and --opt-kwargs.'
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


def create_datasets(args: Namespace) -> tuple[tuple[Any, Any, Any], int | None]:
    """Return the data sets for training, for choosing the epoch and for the final table, and the number of classes.

    The last two data sets may be None, and so may be the number, where the data does not say. With `--val-from-train`
    the epoch is chosen on training images held out, and `--val-split` is for the final table.

    Raises:
        MultiExitError: Data that cannot be had, or splits that do not fit each other.
    """
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    common = {
        'root': args.data_dir,
        'class_map': args.class_map,
        'download': args.dataset_download,
        'batch_size': args.batch_size,
        'input_img_mode': args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        'input_key': args.input_key,
        'target_key': args.target_key,
        'target_format': args.target_format if args.task == 'multilabel' else None,
        'trust_remote_code': args.dataset_trust_remote_code,
        'bad_images': args.bad_images,
        'cache': args.cache_images,
    }
    training = {
        'split': args.train_split,
        'is_training': True,
        'seed': args.seed,
        'repeats': args.epoch_repeats,
        'num_samples': args.train_num_samples,
    }
    val_samples = {'num_samples': args.val_num_samples}
    train = create_checked_dataset(args.dataset, **training, **common)
    val = test = None
    if args.val_split:
        val = create_checked_dataset(args.dataset, split=args.val_split, **val_samples, **common)
    if args.test_split:
        test = create_checked_dataset(args.dataset, split=args.test_split, **val_samples, **common)
    test = test or val
    for other in (val, test):
        num_classes = check_classes(train, other)
    _check_distinct(args, train, val)
    if args.val_from_train:
        train, val = hold_out(train, args.val_from_train, seed=args.seed)
    return (train, val, test), num_classes


def _check_distinct(args: Namespace, train: Any, val: Any) -> None:
    """Raise where timm found no folders of splits, and took the whole folder for both."""
    roots = [getattr(getattr(dataset, 'reader', None), 'root', None) for dataset in (train, val)]
    if not args.dataset and roots[0] and roots[0] == roots[1] and args.train_split != args.val_split:
        raise MultiExitError(
            f"{args.data_dir} has no folders of splits, so '{args.val_split}' would be the training images again: make"
            f" {args.train_split}/ and {args.val_split}/, or give --val-split ''."
        )


def encode_targets(args: Namespace, datasets: tuple) -> None:
    """Let multi-label data sets give their targets as [C] vectors, once the number of classes is known."""
    if args.task == 'multilabel':
        for dataset in datasets:
            if dataset is not None:
                dataset.target_transform = MultiLabelTarget(args.num_classes, dense=args.target_format == 'multihot')


def _create_mixing(args: Namespace) -> tuple[FastCollateMixup | None, Mixup | None]:
    if not is_mixing(args):
        return None, None
    mixer = (Mixup if args.no_prefetcher else FastCollateMixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=args.task == 'multilabel',
    )
    return (None, mixer) if args.no_prefetcher else (mixer, None)


def _augmentation(args: Namespace) -> dict[str, Any]:
    same = 'no_aug train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob'.split()
    return {
        **{name: getattr(args, name) for name in same},
        'grayscale_prob': args.grayscale_prob or 0.0,
        'gaussian_blur_prob': args.gaussian_blur_prob or 0.0,
        'auto_augment': args.aa,
        're_prob': args.reprob,
        're_mode': args.remode,
        're_count': args.recount,
        're_split': args.resplit,
        'num_aug_repeats': args.aug_repeats,
        'num_aug_splits': args.aug_splits,
    }


def _scheduled_sizes(args: Namespace) -> dict[str, Any]:
    if args.train_img_sizes is None:
        return {}
    is_progressive = args.train_size_schedule == 'progressive'
    return {
        'input_size_choices': args.train_img_sizes,
        'batch_size_choices': args.train_batch_sizes,
        'batch_choice_weights': args.train_size_probs,
        'batch_choice_seed': args.seed,
        'batch_choice_schedule': args.train_size_schedule,
        'batch_schedule_epochs': args.epochs if is_progressive else None,
        'batch_schedule_spread': args.train_size_schedule_spread,
        'batch_schedule_random_mix': args.train_size_random_mix,
        'num_batches': args.train_batches_per_epoch,
    }


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
    except LIBRARY_ERRORS as error:
        if not teacher:
            raise
        raise MultiExitError(f'--kd-model-name {args.kd_model_name} cannot teach so: {one_line(error)}.') from error


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
