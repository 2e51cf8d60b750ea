"""What training minimises, from command-line arguments: criterion, loss and task."""

from argparse import Namespace
from typing import Any

import torch
from timm.loss import create_classification_loss
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
from timm_multiexit.distillation import KDConfig
from timm_multiexit.losses import create_loss
from timm_multiexit.model import MultiExitModel
from timm_multiexit.refusals import REFUSALS, one_line
from timm_multiexit.sources import find_source
from timm_multiexit.task import MultiExitTask


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
    except REFUSALS as error:
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
