"""Attaching exits: which places of a backbone can be tapped, which are chosen, and how wide their heads are."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_multiexit.config import ExitSpec, MultiExitError
from timm_multiexit.cost import Cost, CostMeter, meta_copy
from timm_multiexit.heads import HEADS, ExitHead
from timm_multiexit.model import MultiExitModel, classifier_name
from timm_multiexit.taps import Taps, resolve_tap

_logger = logging.getLogger(__name__)

# A head of a type that offers several widths takes the widest one that costs at most this share of the backbone's
# MACs: less than half of what is allowed, since dynamic inference runs every head on the way.
HEAD_MACS_FRAC = 0.04
# ... and leaves the exit cheaper than the plain network by this share of what the backbone has still ahead of it.
SPARED_FRAC = 0.5

ExitsArg = str | int | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class ExitPoint:
    """A place where an exit can be attached.

    Attributes:
        index: Index in the backbone's `feature_info`; None for a module that is named otherwise.
        module: Name of the module to tap.
        channels: Channels of its NCHW map.
        reduction: Input pixels per pixel of the map along one side.
        size: Height and width of the map.
        cost: MACs and parameters up to here.
    """

    index: int | None
    module: str
    channels: int
    reduction: int
    size: tuple[int, int]
    cost: Cost


class _Arrival(NamedTuple):
    tensor: Tensor
    version: int
    cost: Cost


@dataclass(frozen=True)
class _Survey:
    """What one forward of a data-free copy of the backbone tells."""

    points: tuple[ExitPoint, ...]
    rejected: dict[str, str]
    num_features: int
    total: Cost


def attach_exits(
    backbone: nn.Module,
    exits: ExitsArg = 'auto',
    *,
    head: str = 'conv',
    head_widths: Sequence[Sequence[int]] | None = None,
    drop_rate: float | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> MultiExitModel:
    """Return a model that owns the backbone and fresh heads at the places asked for.

    Args:
        backbone: A timm classification model whose stages give NCHW maps.
        exits: 'auto' for all stages before the last, without the stem where three or more remain; an int for that
            many of them, spread evenly in cost, the stem only if there are not enough others; a list of ints for
            indices into `feature_info`; a list of strings for module names.
        head: 'conv', narrow and cheap; 'paper', the paper's widths, so that features can be distilled; 'linear',
            norm, pooling and a linear layer.
        head_widths: Output channels of the convolutions, one list per exit, in place of the head's own rule.
        drop_rate: Dropout probability of the heads; the backbone's if not given.
        input_size: (channels, height, width) that costs, and so the widths of 'conv' heads, are reckoned for; the
            backbone's own if not given.

    Raises:
        MultiExitError: The backbone has no such stages, there is no such exit or head, or the widths do not fit.

    >>> import timm
    >>> model = attach_exits(timm.create_model('resnet18', num_classes=10))
    >>> [spec.module for spec in model.exits.specs]
    ['layer1.1', 'layer2.1', 'layer3.1']
    """
    if head not in HEADS:
        raise MultiExitError(f"Unknown head '{head}', allowed are {', '.join(HEADS)}.")
    input_size = _input_size(backbone, input_size)
    survey = _survey(backbone, _named(exits), input_size)
    points = _choose(backbone, exits, survey)
    if head_widths is not None and len(head_widths) != len(points):
        raise MultiExitError(f'{len(head_widths)} lists of head widths for {len(points)} exits, give one per exit.')
    specs = [
        _build_spec(point, head, survey, None if head_widths is None else tuple(head_widths[idx]), backbone.num_classes)
        for idx, point in enumerate(points)
    ]
    if drop_rate is None:
        drop_rate = float(getattr(backbone, 'drop_rate', 0.0) or 0.0)
    return MultiExitModel(backbone, specs, drop_rate=drop_rate, input_size=input_size)


def exit_points(backbone: nn.Module, input_size: tuple[int, int, int] | None = None) -> tuple[ExitPoint, ...]:
    """Return the places that `feature_info` names where an exit can be attached, shallow to deep.

    Args:
        backbone: A timm classification model.
        input_size: (channels, height, width) that costs are reckoned for; the backbone's own if not given.

    Raises:
        MultiExitError: The backbone has no stages that give NCHW maps.
    """
    return _stage_points(backbone, _survey(backbone, (), _input_size(backbone, input_size)))


def _input_size(backbone: nn.Module, input_size: Sequence[int] | None) -> tuple[int, int, int]:
    return tuple(input_size or get_model_input_config(backbone)['input_size'])


def _named(exits: ExitsArg) -> tuple[str, ...]:
    return tuple(item for item in exits if isinstance(item, str)) if isinstance(exits, (list, tuple)) else ()


@torch.inference_mode(False)  # inference tensors have no version to tell a change in place by
@torch.no_grad()
def _survey(backbone: nn.Module, names: Sequence[str], input_size: tuple[int, int, int]) -> _Survey:
    """Run a data-free copy once with a tap at every stage and every named module."""
    stages = _stages(backbone)
    modules = dict(backbone.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown:
        near = get_close_matches(unknown[0], modules, n=3)
        hint = f', nearest are {", ".join(near)}' if near else ''
        raise MultiExitError(
            f"{type(backbone).__name__} has no module '{unknown[0]}'{hint}; its stages are {', '.join(stages)}."
        )
    indices = {resolve_tap(backbone, stage): idx for idx, stage in enumerate(stages) if stage in modules}
    taps = Taps(
        list(dict.fromkeys([*indices, *(resolve_tap(backbone, name) for name in names)])),
        classifier=classifier_name(backbone),
    )
    copy = meta_copy(backbone)
    meter = CostMeter(copy)
    arrivals: dict[int, list[_Arrival]] = {}

    def note(idx: int, tensor: Tensor) -> None:
        arrivals.setdefault(idx, []).append(_Arrival(tensor, getattr(tensor, '_version', 0), meter.read()))

    with meter:
        taps.visit(copy, torch.empty(1, *input_size, device='meta'), note)
    total = meter.read()
    features = [arrival.tensor for arrival in arrivals.get(len(taps.names), [])]
    if len(features) != 1 or not isinstance(features[0], Tensor):
        raise MultiExitError(
            f'{type(backbone).__name__} does not call its classifier {taps.classifier!r} once, on a tensor.'
        )
    points, rejected = [], {}
    for idx, name in enumerate(taps.names):
        index = indices.get(name)
        entry = {} if index is None else list(stages.values())[index]
        reason = _unfit(arrivals.get(idx, []), entry.get('num_chs'))
        if reason:
            rejected[name] = reason
            continue
        tensor, _, cost = arrivals[idx][0]
        points.append(
            ExitPoint(
                index=index,
                module=name,
                channels=tensor.shape[1],
                reduction=entry.get('reduction') or max(1, round(input_size[-1] / tensor.shape[-1])),
                size=tuple(tensor.shape[-2:]),
                cost=cost,
            )
        )
    points.sort(key=lambda point: point.cost.macs)
    return _Survey(tuple(points), rejected, features[0].flatten(1).shape[1], total)


def _stages(backbone: nn.Module) -> dict[str, dict]:
    """Return module name -> entry of `feature_info`, shallow to deep."""
    info = getattr(backbone, 'feature_info', None)
    entries = info.info if hasattr(info, 'info') else info
    if not entries or not all(isinstance(entry, dict) and 'module' in entry for entry in entries):
        raise MultiExitError(
            f'{type(backbone).__name__} names no stages (feature_info), so no exits can be attached:'
            ' allowed are timm classification models with stages.'
        )
    return {entry['module']: entry for entry in entries}


def _unfit(arrivals: list[_Arrival], channels: int | None) -> str | None:
    """Return why a place cannot be tapped, None if it can."""
    if len(arrivals) != 1:
        return 'its module is not called in the forward' if not arrivals else 'its module is called more than once'
    tensor, version, _ = arrivals[0]
    if not isinstance(tensor, Tensor) or tensor.ndim != 4:
        kind = f'a tensor {list(tensor.shape)}' if isinstance(tensor, Tensor) else f'a {type(tensor).__name__}'
        return f'it gives {kind}, not an NCHW map'
    if channels is not None and tensor.shape[1] != channels:
        return f'it gives {list(tensor.shape)}, not an NCHW map of {channels} channels'
    if tensor._version != version:
        return 'the layer after it changes its output in place, tap that one'
    return None


def _stage_points(backbone: nn.Module, survey: _Survey) -> tuple[ExitPoint, ...]:
    stages = tuple(point for point in survey.points if point.index is not None)
    if not stages:
        reasons = [f'{name}: {reason}' for name, reason in survey.rejected.items()] or ['none is named']
        more = f'; {len(reasons) - 1} more like it' if len(reasons) > 1 else ''
        raise MultiExitError(
            f'{type(backbone).__name__} has no stage that exits can be attached to ({reasons[0]}{more}).'
        )
    return stages


def _choose(backbone: nn.Module, exits: ExitsArg, survey: _Survey) -> Sequence[ExitPoint]:
    """Return the points that `exits` means, shallow to deep."""
    stages = _stage_points(backbone, survey)
    early = stages[:-1]
    if isinstance(exits, bool):
        raise MultiExitError(f"exits is {exits}, allowed are 'auto', a number of exits, or a list.")
    if not early and not isinstance(exits, (list, tuple)):
        raise MultiExitError(f'{type(backbone).__name__} has one stage only ({stages[0].module}): name modules to tap.')
    past_stem = early[1:] if len(early) >= 4 else early
    if exits == 'auto':
        return past_stem
    if isinstance(exits, int):
        return _spread(exits, past_stem if 1 <= exits <= len(past_stem) else early, survey.total)
    if isinstance(exits, (list, tuple)) and exits:
        return _pick(backbone, exits, survey)
    raise MultiExitError(f"exits is {exits!r}, allowed are 'auto', a number of exits, or a list. {_legal(survey)}")


def _spread(count: int, early: Sequence[ExitPoint], total: Cost) -> list[ExitPoint]:
    """Return `count` points whose costs are nearest to an even division of the backbone's, from the deepest up."""
    if not 1 <= count <= len(early):
        raise MultiExitError(
            f'{count} exits asked for, this backbone has room for 1 to {len(early)} before its last stage.'
        )
    chosen: list[ExitPoint] = []
    for step in reversed(range(count)):
        # Leave enough shallower points for the exits still to be placed.
        candidates = early[step : early.index(chosen[0])] if chosen else early[step:]
        target = total.macs * (step + 1) / (count + 1)
        chosen.insert(0, min(candidates, key=lambda point: abs(point.cost.macs - target)))
    return chosen


def _pick(backbone: nn.Module, exits: Sequence[int] | Sequence[str], survey: _Survey) -> list[ExitPoint]:
    """Return the points named by index or module, checked and in order of depth."""
    by_index = {point.index: point for point in survey.points if point.index is not None}
    by_name = {point.module: point for point in survey.points}
    num_stages = len(_stages(backbone))
    chosen = []
    for item in exits:
        if isinstance(item, str):
            name = resolve_tap(backbone, item)
            point, reason = by_name.get(name), survey.rejected.get(name, '')
        elif isinstance(item, int) and not isinstance(item, bool):
            point, reason = by_index.get(item + num_stages if item < 0 else item), ''
        else:
            raise MultiExitError(f'exits holds {item!r}, allowed are indices or module names. {_legal(survey)}')
        if point is None:
            reason = f' ({reason})' if reason else ''
            raise MultiExitError(f'{type(backbone).__name__} has no exit {item!r}{reason}. {_legal(survey)}')
        chosen.append(point)
    if len(set(chosen)) != len(chosen):
        raise MultiExitError(f'exits names a place twice: {list(exits)}.')
    return sorted(chosen, key=lambda point: point.cost.macs)


def _legal(survey: _Survey) -> str:
    points = [point for point in survey.points if point.index is not None]
    return 'Allowed are ' + ', '.join(f'{point.index} ({point.module}, 1/{point.reduction})' for point in points) + '.'


def _build_spec(
    point: ExitPoint,
    head: str,
    survey: _Survey,
    widths: tuple[int, ...] | None,
    num_classes: int,
) -> ExitSpec:
    """Return the exit at a point, its widths given or found by the head's rule and the cost it may have."""
    last = [other for other in survey.points if other.index is not None][-1]
    # The nearest count where sizes are not powers of two apart (299 pixels, say).
    halvings = max(1, round(math.log2(point.size[0] / last.size[0])))
    kind = HEADS[head]
    spec = ExitSpec(module=point.module, channels=point.channels, reduction=point.reduction, head=head)
    if widths is not None:
        if len(widths) != kind.num_widths(halvings):
            raise MultiExitError(
                f"A '{head}' head at {point.module} takes {kind.num_widths(halvings)} widths, {len(widths)} were given:"
                f' {list(widths)}.'
            )
        return replace(spec, widths=widths)
    candidates = kind.candidates(point.channels, survey.num_features, halvings)
    allowed = min(
        HEAD_MACS_FRAC * survey.total.macs,
        SPARED_FRAC * (survey.total.macs - point.cost.macs),
    )
    for widths in candidates[:-1]:
        if _head_macs(replace(spec, widths=widths), point, num_classes) <= allowed:
            return replace(spec, widths=widths)
    spec = replace(spec, widths=candidates[-1])
    if kind.num_widths(1) and len(candidates) > 1 and _head_macs(spec, point, num_classes) > allowed:
        _logger.warning(
            f'No head at {point.module} is within {HEAD_MACS_FRAC:.0%} of the MACs; the narrowest, {spec.widths}, is taken.'
        )
    return spec


def _head_macs(spec: ExitSpec, point: ExitPoint, num_classes: int) -> int:
    with torch.device('meta'):
        head = ExitHead(spec.head, in_chans=spec.channels, widths=spec.widths, num_classes=num_classes).eval()
    with CostMeter(head) as meter:
        head(torch.empty(1, spec.channels, *point.size, device='meta'))
    return meter.read().macs
