"""What a run trains with, from command-line arguments: data, loss, task and optimizer."""

from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup
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

from timm_multiexit.checkpoints.source import explain_weights, find_source
from timm_multiexit.cli.flags.train_rules import is_mixing, loss_kwargs
from timm_multiexit.data.datasets import (
    check_classes,
    choose_image_mode,
    class_names,
    class_to_idx,
    create_checked_dataset,
)
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.data.loaders import create_eval_loader, create_train_loader
from timm_multiexit.evaluation.exit_table import CreateLoader
from timm_multiexit.evaluation.stamp import name_dataset
from timm_multiexit.losses.multi_exit_loss import MultiExitLoss, create_loss
from timm_multiexit.losses.teachers import KDConfig
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.training.regimes import Regime, split_exit_groups
from timm_multiexit.training.run import RunData
from timm_multiexit.training.task import MultiExitTask, check_auxiliary
from timm_multiexit.utils.errors import LIBRARY_ERRORS, DataError, InvalidValueError, MultiExitError, one_line

_SQRT_SCALED = ('ada', 'lamb')  # optimizers whose rate timm scales with the root of the batch


def resolve_lr(args: Namespace, batch_size: float, num_processes: int) -> tuple[float, str]:
    """Return the learning rate, and how it follows the batch: --lr, or --lr-base scaled as timm does.

    `batch_size` is the mean of one process.
    """
    if args.lr is not None:
        return args.lr, args.lr_base_scale
    is_sqrt = any(name in args.opt.lower() for name in _SQRT_SCALED)
    scale = args.lr_base_scale or ('sqrt' if is_sqrt else 'linear')
    ratio = batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio), scale


def create_train_optimizer(args: Namespace, model: nn.Module, regime: Regime, *, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer, with the heads in groups of their own; frozen parameters are left out."""
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args) | {'lr': lr}, **args.opt_kwargs)
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(
            f'Cannot create --opt {args.opt}: {one_line(error)}. See its flags and --opt-kwargs.'
        ) from error
    if args.sched == 'none':
        # It is timm's schedules that multiply the rates by those of --layer-decay.
        for group in optimizer.param_groups:
            group['lr'] *= group.pop('lr_scale', 1.0)
    split_exit_groups(optimizer, model, args.exit_lr_scale, trains_classifier=regime.trains_classifier)
    return optimizer


def create_datasets(args: Namespace) -> tuple[tuple[Any, Any, Any], int | None]:
    """Return the data sets for training, for choosing the epoch and for the final table, and the number of classes.

    The last two data sets may be None, and so may be the number, where the data does not say. With `--val-from-train`
    the epoch is chosen on training images held out, and `--val-split` is for the final table.
    """
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    common = {
        **{name: getattr(args, name) for name in ('class_map', 'batch_size', 'input_key', 'target_key', 'bad_images')},
        'root': args.data_dir,
        'download': args.dataset_download,
        'input_img_mode': choose_image_mode(args.input_img_mode, in_chans),
        'target_format': args.target_format if args.task == 'multilabel' else None,
        'trust_remote_code': args.dataset_trust_remote_code,
        'cache': args.cache_images,
    }
    train = create_checked_dataset(
        args.dataset,
        split=args.train_split,
        is_training=True,
        seed=args.seed,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
        **common,
    )
    val, test = (
        create_checked_dataset(args.dataset, split=split, num_samples=args.val_num_samples, **common) if split else None
        for split in (args.val_split, args.test_split)
    )
    test = test or val
    for other in (val, test):
        num_classes = check_classes(train, other)
    _check_distinct(args, train, val)
    if num_classes == 1 and args.num_classes in (None, 1):
        raise DataError(
            f'The data has one class, {list(class_to_idx(train) or ())[0]!r}: there is nothing to tell apart.'
        )
    if args.val_from_train:
        train, val = hold_out(train, args.val_from_train, seed=args.seed)
    return (train, val, test), num_classes


def _check_distinct(args: Namespace, train: Any, val: Any) -> None:
    """Raise where timm found no folders of splits, and took the whole folder for both."""
    roots = [getattr(getattr(dataset, 'reader', None), 'root', None) for dataset in (train, val)]
    if not args.dataset and roots[0] and roots[0] == roots[1] and args.train_split != args.val_split:
        raise DataError(
            f"{args.data_dir} has no folders of splits, so '{args.val_split}' would be the training images again: make"
            f" {args.train_split}/ and {args.val_split}/, or give --val-split ''."
        )


def create_run_data(
    args: Namespace,
    datasets: tuple[Any, Any, Any],
    data_config: dict[str, Any],
    accelerator: Accelerator,
    *,
    num_classes: int,
) -> tuple[RunData, Mixup | None]:
    """Return the loaders and labels of a run, and the function that mixes training batches if the loader does not.

    Multi-label data sets then give their targets as [C] vectors.
    """
    if args.task == 'multilabel':
        for dataset in datasets:
            if dataset is not None:
                dataset.target_transform = MultiLabelTarget(num_classes, dense=args.target_format == 'multihot')
    train, val, test = datasets
    create_loader = loader_creator(args, accelerator)
    train_loader, mixup_fn = create_train_loader(
        train,
        seed=args.seed,
        augmentation=_augmentation(args),
        sizes=_scheduled_sizes(args),
        mixing=_mixing(args, num_classes),
        mixup_off_epoch=args.mixup_off_epoch,
        interpolation='' if args.no_aug else args.train_interpolation,
        crop_padding=args.crop_padding,
        multi_epochs=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        data_config=data_config,
        accelerator=accelerator,
        **loader_options(args) | {'batch_size': args.batch_size},
    )
    val_loader, test_loader = (
        None if dataset is None else create_loader(dataset, data_config) for dataset in (val, test)
    )
    held_out = f'{args.val_from_train} images held out of {args.train_split}'
    data = RunData(
        train_loader=train_loader,
        val_loader=val_loader,
        test_loader=test_loader,
        data_config=data_config,
        label_names=class_names(train, num_classes),
        name=name_dataset(args.dataset, args.data_dir),
        split=args.test_split or args.val_split,
        chosen_on=held_out if args.val_from_train else args.val_split,
        is_held_out=bool(args.val_from_train),
    )
    return data, mixup_fn


def loader_options(args: Namespace) -> dict[str, Any]:
    """Return the keywords of `create_eval_loader` that the flags of both scripts name."""
    return {
        'batch_size': getattr(args, 'validation_batch_size', None) or args.batch_size,
        'num_workers': args.workers,
        'pin_memory': args.pin_mem,
        'uses_prefetcher': not args.no_prefetcher,
        'dtype': getattr(torch, getattr(args, 'model_dtype', None) or 'float32'),
    }


def loader_creator(args: Namespace, accelerator: Accelerator) -> CreateLoader:
    """Return what creates a loader of a data set for evaluation."""

    def create_loader(dataset: Any, data_config: Mapping[str, Any]) -> Any:
        return create_eval_loader(dataset, data_config=data_config, accelerator=accelerator, **loader_options(args))

    return create_loader


def _mixing(args: Namespace, num_classes: int) -> dict[str, Any] | None:
    if not is_mixing(args):
        return None
    return {
        'mixup_alpha': args.mixup,
        'cutmix_alpha': args.cutmix,
        'cutmix_minmax': args.cutmix_minmax,
        'prob': args.mixup_prob,
        'switch_prob': args.mixup_switch_prob,
        'mode': args.mixup_mode,
        'label_smoothing': args.smoothing,
        'num_classes': num_classes,
        'multi_label': args.task == 'multilabel',
    }


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


def _scheduled_sizes(args: Namespace) -> dict[str, Any] | None:
    if args.train_img_sizes is None:
        return None
    return {
        'input_size_choices': args.train_img_sizes,
        'batch_size_choices': args.train_batch_sizes,
        'batch_choice_weights': args.train_size_probs,
        'batch_choice_seed': args.seed,
        'batch_choice_schedule': args.train_size_schedule,
        'batch_schedule_epochs': args.epochs if args.train_size_schedule == 'progressive' else None,
        'batch_schedule_spread': args.train_size_schedule_spread,
        'batch_schedule_random_mix': args.train_size_random_mix,
        'num_batches': args.train_batches_per_epoch,
    }


def create_criterion(args: Namespace, num_classes: int | None = None) -> nn.Module:
    """Return the task term: timm's loss for the flags, its weights of classes checked against `num_classes`."""
    return create_classification_loss(**loss_kwargs(args, num_classes))


def create_train_loss(args: Namespace, num_classes: int | None = None) -> MultiExitLoss:
    """Return the multi-exit loss that the flags name; see `create_criterion`."""
    return create_loss(
        args.exit_loss,
        teacher=args.exit_teacher,
        output_loss=args.exit_output_loss,
        output_weight=args.exit_output_weight,
        feature_weight=args.exit_feature_weight,
        temperature=args.exit_temperature,
        exit_weights=args.exit_weights,
        teacher_weights=args.exit_teacher_weights,
        survivors=args.exit_survivors,
        criterion=create_criterion(args, num_classes),
        multi_label=args.task == 'multilabel',
    )


def create_task(args: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Return the task: what is minimised in a step."""
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    teacher = args.kd_model_name
    source = find_source(teacher) if teacher else None
    try:
        if source is not None:
            teacher = source.create_backbone(pretrained=True).to(device=device, dtype=dtype)
        with explain_weights(teacher) if isinstance(teacher, str) else nullcontext():
            return _create_task(args, model, teacher, {'device': device, 'dtype': dtype, 'verbose': False})
    except MultiExitError:
        raise
    except LIBRARY_ERRORS as error:
        if not teacher:
            raise
        raise InvalidValueError(f'Cannot use --kd-model-name {args.kd_model_name}: {one_line(error)}.') from error


def _create_task(args: Namespace, model: Any, teacher: str | nn.Module | None, common: dict[str, Any]) -> TrainingTask:
    weights = {'distill_loss_weight': args.distill_loss_weight, 'task_loss_weight': args.task_loss_weight}
    kd = KDConfig(**weights, temperature=args.kd_temperature) if teacher else None  # checked for timm's tasks too
    if isinstance(model, MultiExitModel):
        return MultiExitTask(model, create_train_loss(args, model.num_classes), teacher=teacher, kd=kd, **common)
    check_auxiliary(model)
    criterion = create_criterion(args, model.num_classes)
    if teacher:
        common |= {'student_model': model, 'teacher_model': teacher, 'criterion': criterion, **weights}
        return _create_distillation_task(args, common)
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(model, criterion, threshold=args.multilabel_threshold, **common)
    return ClassificationTask(model, criterion, **common)


def _create_distillation_task(args: Namespace, common: dict[str, Any]) -> TrainingTask:
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim, **common
        )
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
    return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
