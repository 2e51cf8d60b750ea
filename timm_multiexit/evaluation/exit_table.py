"""Accuracy and cost of every classifier of a model, and of other models on the same images."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.data.config import resolve_data_config
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor, nn

from timm_multiexit.data.batches import LabelCheck, read_batches
from timm_multiexit.evaluation.metrics import ExitEvaluator
from timm_multiexit.models.dynamic import check_same_classes
from timm_multiexit.models.multi_exit import MultiExitModel, check_model
from timm_multiexit.models.sharding import run_in_step
from timm_multiexit.utils.checks import check_image_size
from timm_multiexit.utils.errors import DataError, InvalidValueError
from timm_multiexit.utils.text import ENSEMBLE, format_table

# (data set, timm's data configuration) -> batches of images and class indices, every image once and in order
CreateLoader = Callable[[Any, Mapping[str, Any]], Iterable[Any]]


def evaluate_logits(logits: Sequence[Tensor], targets: Tensor, batch_size: int = 256) -> dict[str, dict[str, float]]:
    """Return the metrics of `ExitEvaluator` for logits, one [N, C] tensor per classifier, and class indices [N]."""
    evaluator = ExitEvaluator(len(logits) - 1)
    for target, *batch in zip(*(torch.split(part, batch_size) for part in (targets, *logits))):
        evaluator.update(batch, target)
    return evaluator.compute()


@dataclass
class Evaluation:
    """Result of one pass over a data set.

    Attributes:
        metrics: name -> {loss, top1, top5, ece}, or {loss, map, ...}, see `ExitEvaluator.compute`.
        num_samples: Images counted, over all ranks.
        input_size: (channels, height, width) of the first batch; zeros in a process that has none.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_samples: int = 0
    input_size: tuple[int, int, int] = (0, 0, 0)


@torch.no_grad()
def evaluate_loader(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    accelerator: Accelerator | None = None,
    channels_last: bool = False,
    multi_label: bool = False,
    threshold: float = 0.5,
) -> Evaluation:
    """Evaluate every classifier of a model, and the ensemble, on every sample once.

    Args:
        model: A `MultiExitModel`, or a plain model, which has main alone; not wrapped for distributed training.
        loader: Batches of images and class indices, see `timm_multiexit.data.batches`; in distributed runs this rank's
            share of them.
        accelerator: Device, precision, and the processes to sum over; without it all is as the model is.
        channels_last: Memory format of the images.
        multi_label: Targets are [B, C] labels.
        threshold: Probability from which a label counts as predicted.

    Raises:
        InvalidTypeError: It is not a loader.
        DataError: The loaders of all processes are empty, or one gives something else.
    """
    num_exits = len(model.exits) if isinstance(model, MultiExitModel) else 0
    device = accelerator.device if accelerator else next(model.parameters()).device
    limit = evaluation_sample_limit(loader)
    evaluator = ExitEvaluator(num_exits, device=device, max_samples=limit, multi_label=multi_label, threshold=threshold)
    evaluation, labels = Evaluation(), LabelCheck()
    dtype = next(model.parameters()).dtype
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        images: Tensor | None = None
        for batch in run_in_step(read_batches(loader, multi_label=multi_label), model, device):
            if batch is not None:
                images = batch[0].to(device, dtype)
            elif images is None:  # this process has none at all, but a part of the weights
                images = torch.zeros(1, *_find_input_size(model), device=device, dtype=dtype)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast() if accelerator else nullcontext():
                logits = model(images, exits=True).logits if num_exits else (model(images),)
            if batch is None:
                continue  # the others' forward, in which this process has to take part
            if not any(evaluation.input_size):
                channels, height, width = images.shape[1:]
                evaluation.input_size = channels, height, width
            target = batch[1]
            target = target if multi_label else labels.add(target, logits[-1].shape[-1])
            evaluator.update(logits, target.to(device))
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode
    labels.finish()
    evaluation.num_samples = evaluator.num_samples
    distributed = accelerator is not None and accelerator.num_processes > 1
    evaluation.metrics = evaluator.compute(distributed)
    if accelerator is not None and distributed:
        evaluation.num_samples = int(accelerator.reduce(torch.tensor(evaluator.num_samples, device=device)))
    if not evaluation.num_samples:  # of one process alone there may be none, and the others wait for its sums
        raise DataError('The data loader is empty, so there is nothing to evaluate.')
    return evaluation


def _find_input_size(model: nn.Module) -> tuple[int, int, int]:
    size: tuple[int, int, int] = (
        model.input_size if isinstance(model, MultiExitModel) else resolve_data_config({}, model=model)['input_size']
    )
    return size


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
    """Cost and accuracy of every classifier; `str()` formats it as a table.

    Attributes:
        rows: One dict per classifier, shallow to deep, then the ensemble: exit (its name), exit_idx (0, 1, ..., 'main'
            or 'ens'), tap, params (of the path to the exit and its head), GMACs fixed, GMACs sequential, then in
            percent top-1, top-5 and ECE, or of several labels per image mAP, micro-F1, macro-F1 and sample-F1.
        num_samples: Images that were counted.
    """

    rows: tuple[dict[str, Any], ...]
    num_samples: int

    def __str__(self) -> str:
        return format_table([{key: value for key, value in row.items() if key != 'exit_idx'} for row in self.rows])


def evaluate(
    model: MultiExitModel,
    loader: Iterable[Any],
    *,
    input_size: tuple[int, int, int] | None = None,
    multi_label: bool = False,
    threshold: float = 0.5,
) -> ExitTable:
    """Return accuracy and cost of every classifier and of their ensemble.

    Args:
        model: The model; put in eval mode during the call, and back in its own mode after it.
        loader: Batches of images [B, in_chans, H, W] and class indices [B], or labels [B, C] with `multi_label`; see
            `timm_multiexit.data.batches`.
        input_size: (channels, height, width) that MACs are computed for; default: that of the loader's first batch.
        multi_label: Targets are [B, C] labels.
        threshold: Probability from which a label counts as predicted, for the F1 of `multi_label`.

    Raises:
        InvalidTypeError: It is not a `MultiExitModel`, or not a loader.
        InvalidValueError: The input size or the threshold is out of range, or a classifier gives NaN.
        StateError: Main has other classes than the exits.
        DataError: The loader is empty, or gives something else; see `timm_multiexit.data.batches`.
    """
    check_model(model)
    check_same_classes(model)
    if input_size is not None:
        input_size = check_image_size('input_size', input_size, model.in_chans)
    result = evaluate_loader(model, loader, multi_label=multi_label, threshold=threshold)
    for name, metrics in result.metrics.items():
        if math.isnan(metrics['loss']) or math.isnan(metrics.get('ece', 0.0)):
            raise InvalidValueError(f'{name} gives NaN or infinite logits: check the weights and the images.')
    return make_table(model, result.metrics, input_size=input_size or result.input_size, num_samples=result.num_samples)


def make_table(
    model: MultiExitModel, metrics: dict[str, dict[str, float]], *, input_size: tuple[int, int, int], num_samples: int
) -> ExitTable:
    """Return the table of a model's costs at an input size (channels, height, width), and of its metrics."""
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
                'exit_idx': idx if name in taps else name,
                'tap': taps.get(name, '-' if is_ensemble else 'classifier'),
                'params': cost.sequential.params if is_ensemble else cost.fixed.params,
                'GMACs fixed': None if is_ensemble else cost.fixed.macs / 1e9,
                'GMACs sequential': cost.sequential.macs / 1e9,
                **{header: values[key] for key, header in _METRIC_HEADERS.items() if key in values},
            }
        )
    return ExitTable(tuple(rows), num_samples)


def evaluate_static(
    models: Mapping[str, MultiExitModel], dataset: Any, *, create_loader: CreateLoader, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """Return one row per model: its name, the side of its images, params, GMACs, top-1 and top-5.

    One model at a time is on the accelerator's device. Each has loaders of its own data configuration; the transform
    of the data set stays.
    """
    rows = []
    for name, model in models.items():
        data_config = resolve_data_config({}, model=model)
        loader = create_loader(copy.copy(dataset), data_config)
        metrics = evaluate_loader(model.to(accelerator.device), loader, accelerator=accelerator).metrics['main']
        model.cpu()
        cost = model.cost(data_config['input_size'])[-1].fixed
        row = {'static model': name, 'image, px': data_config['input_size'][-1], 'params': cost.params}
        rows.append({**row, 'GMACs': cost.macs / 1e9, 'top-1': metrics['top1'], 'top-5': metrics['top5']})
    return rows
