"""Static models set beside a multi-exit one: other networks, on the same data, each prepared as it wants."""

import copy
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor, nn

from timm_multiexit.checkpoints.source import create_backbone
from timm_multiexit.checkpoints.timm_checkpoint import load_checkpoint
from timm_multiexit.data.loaders import create_eval_loader
from timm_multiexit.evaluation.metrics import ExitEvaluator
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import LIBRARY_ERRORS, MultiExitError, one_line
from timm_multiexit.utils.text import ENSEMBLE, format_table


def split_name(text: str) -> tuple[str, str]:
    """Return model name and checkpoint of NAME[:CHECKPOINT]; '' for none.

    >>> split_name('resnet18:last.pth.tar'), split_name('local-dir:runs/small'), split_name('resnet18.a1_in1k')
    (('resnet18', 'last.pth.tar'), ('local-dir:runs/small', ''), ('resnet18.a1_in1k', ''))
    """
    if text.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
        return text, ''
    name, _, checkpoint = text.partition(':')
    return name, checkpoint


def create_static(text: str, *, num_classes: int, in_chans: int = 3) -> MultiExitModel:
    """Return a trained plain timm model, without exits, on the CPU.

    Args:
        text: A timm name, whose own weights are loaded; NAME:CHECKPOINT, a file of its weights; `local-dir:FOLDER`;
            `hf-hub:ORG/NAME`.
        num_classes: Of the model that it is compared with.
        in_chans: Channels of the images.

    Raises:
        MultiExitError: There is no such model, its weights cannot be had, or it has other classes or channels.
    """
    name, checkpoint = split_name(text)
    try:
        if checkpoint:
            backbone = create_backbone(name, num_classes=num_classes, in_chans=in_chans)
            load_checkpoint(backbone, checkpoint)
        else:
            backbone = create_backbone(name, pretrained=True)
    except MultiExitError as error:
        raise MultiExitError(f'--compare {text}: {error}') from error
    except (*LIBRARY_ERRORS, KeyError, SafetensorError) as error:
        raise MultiExitError(f'--compare {text}: the weights cannot be had: {one_line(error)}.') from error
    if backbone.num_classes != num_classes:
        raise MultiExitError(
            f'--compare {text} has {backbone.num_classes} classes, allowed are the {num_classes} of the model.'
        )
    model = MultiExitModel(backbone, [])
    if model.in_chans != in_chans:
        raise MultiExitError(f'--compare {text} takes images of {model.in_chans} channels, allowed is {in_chans}.')
    return model


def compare(
    models: Mapping[str, MultiExitModel], args: Namespace, dataset: Any, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """Return one row per model: its name, the side of its images, params, GMACs, top-1 and top-5.

    Args:
        models: Name -> model; one is on the accelerator's device at a time.
        args: Of the command line; images are prepared by each model's own data configuration.
        dataset: What all are measured on; its transform stays.
        accelerator: Gives device and precision.
    """
    rows = []
    for name, model in models.items():
        data_config = resolve_data_config({}, model=model)
        loader = create_eval_loader(
            copy.copy(dataset),
            data_config=data_config,
            batch_size=args.batch_size,
            accelerator=accelerator,
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            uses_prefetcher=not args.no_prefetcher,
        )
        metrics = evaluate_loader(model.to(accelerator.device), loader, accelerator=accelerator).metrics['main']
        model.cpu()
        cost = model.cost(data_config['input_size'])[-1].fixed
        row = {'static model': name, 'image, px': data_config['input_size'][-1], 'params': cost.params}
        rows.append({**row, 'GMACs': cost.macs / 1e9, 'top-1': metrics['top1'], 'top-5': metrics['top5']})
    return rows


def evaluate_logits(
    logits: Sequence[Tensor],
    targets: Tensor,
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Return the metrics that `ExitEvaluator` gives for these logits.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices [N].
        batch_size: Samples that are looked at at a time.
    """
    evaluator = ExitEvaluator(len(logits) - 1)
    for target, *batch in zip(*(part.split(batch_size) for part in (targets, *logits))):
        evaluator.update(batch, target)
    return evaluator.compute()


@dataclass
class Evaluation:
    """What a pass over a data set found.

    Attributes:
        metrics: name -> {loss, top1, top5, ece}, or {loss, map, ...}, as `ExitEvaluator.compute` gives them.
        num_samples: Images counted, over all ranks.
        input_size: (channels, height, width) of the first batch.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_samples: int = 0
    input_size: tuple[int, int, int] = (0, 0, 0)


@torch.no_grad()
def evaluate_loader(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    channels_last: bool = False,
    multi_label: bool = False,
    threshold: float = 0.5,
) -> Evaluation:
    """Measure every classifier of a model, and the ensemble, on every sample once.

    Args:
        model: A `MultiExitModel`, or a plain model, which is main alone; not wrapped for distributed training.
        loader: Batches of images and class indices; in distributed runs this rank's share of them.
        device: Where to run; the accelerator's, else where the model is.
        accelerator: Gives precision and, with several processes, sums over all of them.
        channels_last: Give images to the model in that memory format.
        multi_label: Targets are [B, C] labels.
        threshold: Probability from which a label counts as predicted.

    Raises:
        MultiExitError: The loader gives no batch.
    """
    num_exits = len(model.exits) if hasattr(model, 'exits') else 0
    device = torch.device(device or (accelerator.device if accelerator else next(model.parameters()).device))
    evaluator = ExitEvaluator(
        num_exits,
        device=device,
        max_samples=evaluation_sample_limit(loader),
        multi_label=multi_label,
        threshold=threshold,
    )
    evaluation = Evaluation()
    dtype = next(model.parameters()).dtype
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        for images, target in loader:
            images, target = images.to(device, dtype), target.to(device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            evaluation.input_size = evaluation.input_size if any(evaluation.input_size) else tuple(images.shape[1:])
            with accelerator.autocast() if accelerator else nullcontext():
                logits = model(images, exits=True).logits if num_exits else (model(images),)
            evaluator.update(logits, target)
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode
    if not any(evaluation.input_size):
        raise MultiExitError('The data loader gives no batch, so there is nothing to evaluate.')
    distributed = accelerator is not None and accelerator.num_processes > 1
    evaluation.metrics = evaluator.compute(distributed)
    count = torch.tensor(evaluator.num_samples, device=device)
    evaluation.num_samples = int(accelerator.reduce(count) if distributed else count)
    return evaluation


# Metrics of `ExitEvaluator` as the table has them: one group for one label per image, one for several.
_METRIC_HEADERS = {
    'top1': 'top-1',
    'top5': 'top-5',
    'ece': 'ECE',
    'map': 'mAP',
    'micro_f1': 'micro-F1',
    'macro_f1': 'macro-F1',
    'sample_f1': 'sample-F1',
}


@dataclass(frozen=True)
class ExitTable:
    """What every classifier costs and how well it does; `str()` gives it as a table.

    Attributes:
        rows: One dict per classifier, shallow to deep, then the ensemble: exit, tap, params (of the path to the exit
            and its head), GMACs fixed, GMACs sequential, then in percent top-1, top-5 and ECE, or of several labels
            per image mAP, micro-F1, macro-F1 and sample-F1.
        num_samples: Images that were counted.
    """

    rows: tuple[dict[str, Any], ...]
    num_samples: int

    def __str__(self) -> str:
        return format_table(self.rows)


def evaluate(
    model: MultiExitModel,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    input_size: tuple[int, int, int] | None = None,
    multi_label: bool = False,
    threshold: float = 0.5,
) -> ExitTable:
    """Return accuracy and cost of every classifier and of their ensemble.

    Args:
        model: The model; it stays in the mode it is in after the call, and is in eval mode during it.
        loader: Batches of images [B, in_chans, H, W] and class indices [B], or labels [B, C] with `multi_label`.
        device: Where to run; where the model is if not given.
        input_size: (channels, height, width) that MACs are given for; that of the loader's first batch if not given.
        multi_label: An image has any number of classes.
        threshold: Probability from which a label counts as predicted, for the F1 of `multi_label`.
    """
    result = evaluate_loader(model, loader, device=device, multi_label=multi_label, threshold=threshold)
    return make_table(model, result.metrics, input_size=input_size or result.input_size, num_samples=result.num_samples)


def make_table(
    model: MultiExitModel,
    metrics: dict[str, dict[str, float]],
    *,
    input_size: tuple[int, int, int],
    num_samples: int,
) -> ExitTable:
    """Return the table of metrics that were measured (`ExitEvaluator.compute`) beside the costs."""
    costs = model.cost(input_size)
    taps = {f'exit{idx}': spec.module for idx, spec in enumerate(model.exits.specs)}
    rows = []
    for idx, (name, values) in enumerate(metrics.items()):
        # The ensemble runs everything, so it costs what main costs in sequence, and has no fixed path.
        cost = costs[min(idx, len(costs) - 1)]
        is_ensemble = name == ENSEMBLE
        rows.append(
            {
                'exit': name.removeprefix('exit'),
                'tap': taps.get(name, '-' if is_ensemble else 'classifier'),
                'params': cost.sequential.params if is_ensemble else cost.fixed.params,
                'GMACs fixed': None if is_ensemble else cost.fixed.macs / 1e9,
                'GMACs sequential': cost.sequential.macs / 1e9,
                **{header: values[key] for key, header in _METRIC_HEADERS.items() if key in values},
            }
        )
    return ExitTable(tuple(rows), num_samples)
