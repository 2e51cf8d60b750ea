"""`create_model` and `evaluate`: what most users need."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch

from timm_multiexit.attach import ExitsArg, attach_exits
from timm_multiexit.config import MultiExitError
from timm_multiexit.engine import evaluate_loader
from timm_multiexit.licenses import Origin, find_origin
from timm_multiexit.metrics import ENSEMBLE, format_table
from timm_multiexit.model import MultiExitModel
from timm_multiexit.sources import Source, find_source

_logger = logging.getLogger(__name__)

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


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    exits: ExitsArg | None = None,
    head: str = 'conv',
    head_widths: Sequence[Sequence[int]] | None = None,
    input_size: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> MultiExitModel:
    """Return a timm model with exits.

    Args:
        model_name: A timm name, with or without a tag; `hf-hub:ORG/NAME[@REVISION]`, a repository of the Hugging Face
            Hub; or `local-dir:` and a folder that training or `save_pretrained` wrote.
        pretrained: Load weights: timm's into the backbone, the exits staying fresh; a folder's or a repository's into
            all of it, and with them its policy and budgets.
        exits: See `attach_exits`. None for the exits that folder or repository have, else 'auto'.
        head: Type of fresh heads: 'conv', 'paper', 'bottleneck' or 'linear'.
        head_widths: Widths of fresh heads, see `attach_exits`.
        input_size: (channels, height, width) that the costs of fresh exits are reckoned for.
        **kwargs: Every other keyword of `timm.create_model`: num_classes, in_chans, drop_rate, ...

    Raises:
        MultiExitError: Unknown model, no such exits, or a folder or repository that does not hold what it should, or
            holds what it must not: see `load_pretrained`.

    >>> model = create_model('resnet18', exits=[1, 2], num_classes=10)
    >>> model(torch.randn(2, 3, 64, 64), exit_idx=0).shape
    torch.Size([2, 10])
    """
    if kwargs.get('features_only'):
        raise MultiExitError('features_only has no classifier to exit from: leave it out, or use timm.create_model.')
    source = find_source(model_name, **kwargs)
    if source is not None and source.config.exits is not None and exits is None:
        model = source.create_model(pretrained=pretrained, **kwargs)
        model.origin = _find_origin(model, source, pretrained, kwargs)
        return model
    if input_size is not None:
        kwargs.setdefault('in_chans', input_size[0])
    if source is None:
        backbone = timm.create_model(model_name, pretrained=pretrained, **kwargs)
    else:
        backbone = source.create_backbone(pretrained=pretrained, **kwargs)
    model = attach_exits(
        backbone,
        'auto' if exits is None else exits,
        head=head,
        head_widths=head_widths,
        drop_rate=kwargs.get('drop_rate'),
        input_size=input_size,
    )
    model.origin = _find_origin(model, source, pretrained, kwargs)
    if pretrained:
        _logger.warning(f'{model_name} is trained, its {len(model.exits)} exits are not: train them before use.')
    return model


def _find_origin(model: MultiExitModel, source: Source | None, pretrained: bool, kwargs: dict[str, Any]) -> Origin:
    """Return what the weights of a model that was just made started from."""
    has_file = bool(kwargs.get('checkpoint_path'))
    if source is None or has_file or not pretrained:
        return find_origin(model.pretrained_cfg, pretrained=pretrained, has_file=has_file)
    if source.repo_id:
        return Origin(source.repo_id, source.config.pretrained_cfg.get('license'))
    return source.config.origin or Origin('a folder')


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
