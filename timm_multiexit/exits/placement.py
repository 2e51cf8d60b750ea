"""Placement of exits: which places of a backbone can be tapped, which are chosen, and how wide their heads are."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from timm_multiexit.exits.backbone import ModuleInfo, resolve_input_size
from timm_multiexit.exits.cost import Cost, CostMeter
from timm_multiexit.exits.heads import HEADS, ExitHead
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.exits.survey import ExitPoint, Survey, survey_backbone
from timm_multiexit.exits.taps import resolve_tap
from timm_multiexit.utils.checks import check_choice, is_list
from timm_multiexit.utils.errors import (
    LIBRARY_ERRORS,
    InvalidTypeError,
    InvalidValueError,
    MultiExitError,
    brief,
    is_integer,
    is_number,
    one_line,
)

_logger = logging.getLogger(__name__)

# A head of a type that offers several widths takes the widest one that costs at most this share of the backbone's
# MACs: less than half of what is allowed, since dynamic inference runs every head on the way.
HEAD_MACS_FRAC = 0.04

# ... and leaves the exit cheaper than main by this share of what the backbone has still ahead of it.
SPARED_FRAC = 0.5

ExitsArg = str | int | Sequence[int] | Sequence[str] | Sequence[float]


def place_exits(
    backbone: nn.Module,
    exits: ExitsArg = 'auto',
    *,
    head: str = 'conv',
    head_widths: Sequence[Sequence[int]] | None = None,
    input_size: tuple[int, int, int] | None = None,
    info: ModuleInfo | None = None,
) -> list[ExitSpec]:
    """Return where exits go and how wide their heads are, shallow to deep.

    Arguments and errors are those of `timm_multiexit.models.attach.attach_exits`; the backbone stays as it is. `info`
    is what is known of one that is not timm's.
    """
    check_choice('head', head, HEADS)
    if head_widths is not None and not (is_list(head_widths) and all(map(is_list, head_widths))):
        raise InvalidTypeError(
            f'head_widths must be a list with one list of integers per exit, got {brief(head_widths)}.'
        )
    input_size = resolve_input_size(backbone, input_size)
    model: Any = backbone
    preset = getattr(model, 'multiexit_preset', None)
    if isinstance(exits, str) and exits == 'auto' and preset is not None:
        exits = preset['exits']
        if head_widths is None and HEADS[head].is_paper:
            head_widths = preset['head_widths']
    shares = shares_of_macs(exits)
    survey = survey_places(backbone, None if shares else named_places(exits), input_size, info)
    num_classes = model.num_classes if info is None else info.num_classes
    if shares:
        # Widths that are given are the caller's to answer for.
        pays = partial(_pays, head=head, survey=survey, num_classes=num_classes) if head_widths is None else bool
        points: Sequence[ExitPoint] = _choose_by_shares(backbone, shares, survey, head, pays)
    else:
        points = _choose(backbone, exits, survey)
    if head_widths is not None:
        if len(head_widths) != len(points):
            raise InvalidValueError(f'head_widths must have one list per exit ({len(points)}), got {len(head_widths)}.')
        if isinstance(exits, (list, tuple)) and not _is_in_order(backbone, exits, shares, points, survey):
            raise InvalidValueError(
                f'exits must be in order, shallow to deep, where head_widths are given, got {brief(exits)}.'
            )
    return [
        _build_spec(point, head, survey, None if head_widths is None else tuple(head_widths[idx]), num_classes)
        for idx, point in enumerate(points)
    ]


def _is_in_order(
    backbone: nn.Module, exits: Sequence[Any], shares: list[float], points: Sequence[ExitPoint], survey: Survey
) -> bool:
    """Return whether a list of exits names these points in this order."""
    if shares:
        return list(map(float, exits)) == shares
    return [_pick(backbone, [item], survey)[0] for item in exits] == list(points)


def named_places(exits: Any) -> list[str]:
    """Return the names of modules among the `exits` of `attach_exits`."""
    return [item for item in exits if isinstance(item, str)] if isinstance(exits, (list, tuple)) else []


def shares_of_macs(exits: Any) -> list[float]:
    """Return the `exits` of `attach_exits` where they are shares of the backbone's MACs, rising; else an empty list.

    Raises:
        InvalidValueError: They are out of range, not all of them are shares, or two are the same.
    """
    items = list(exits) if isinstance(exits, (list, tuple)) else []
    shares = [item for item in items if isinstance(item, float) or (is_number(item) and not is_integer(item))]
    if not shares:
        return []
    if len(shares) < len(items):
        raise InvalidValueError(f"exits must be all shares of the backbone's MACs or none, got {brief(items)}.")
    if not all(is_number(share) and 0 < share < 1 for share in shares):
        raise InvalidValueError(f"exits must be shares of the backbone's MACs in (0, 1), got {brief(items)}.")
    if len(set(shares)) < len(shares):
        raise InvalidValueError(f'exits must name each place once, got {brief(items)}.')
    return sorted(map(float, shares))


def survey_places(
    backbone: nn.Module, names: Sequence[str] | None, input_size: tuple[int, int, int], info: ModuleInfo | None = None
) -> Survey:
    """Return what `survey_backbone` does; images that the backbone cannot take are an `InvalidValueError`."""
    try:
        return survey_backbone(backbone, names, input_size, info)
    except MultiExitError:
        raise
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(
            f'{type(backbone).__name__} cannot run on images {list(input_size)}: {one_line(error)}. Pass the'
            ' input_size=(channels, height, width) that it takes.'
        ) from error


def stage_points(backbone: nn.Module, survey: Survey) -> tuple[ExitPoint, ...]:
    """Return the stages that can have exits, shallow to deep; raise `InvalidValueError` unless there is one."""
    if not survey.stages:
        reasons = [f'{name}: {reason}' for name, reason in survey.rejected.items()] or ['it names none']
        more = f'; {len(reasons) - 1} more like it' if len(reasons) > 1 else ''
        raise InvalidValueError(
            f'{type(backbone).__name__} has no stage that exits can be attached to ({reasons[0]}{more}).'
        )
    return survey.stages


def _choose(backbone: nn.Module, exits: ExitsArg, survey: Survey) -> Sequence[ExitPoint]:
    """Return the points that `exits` means, shallow to deep."""
    # A backbone without stages has named places alone.
    stages = survey.stages if named_places(exits) else stage_points(backbone, survey)
    if isinstance(exits, (list, tuple)) and exits:
        return _pick(backbone, exits, survey)
    early = stages[:-1]
    if not early:
        raise InvalidValueError(
            f'{type(backbone).__name__} has one stage only ({stages[0].module}): name modules to tap.'
        )
    past_stem = early[1:] if len(early) >= 4 and not survey.is_isotropic else early
    if isinstance(exits, str) and exits == 'auto':
        if survey.is_isotropic and len(stages) > 4:
            return [stages[round(len(stages) * quarter / 4) - 1] for quarter in (1, 2, 3)]
        return past_stem
    if is_integer(exits):
        return _spread(exits, past_stem if 1 <= exits <= len(past_stem) else early, survey.total)
    raise InvalidValueError(f"exits must be 'auto', a number of exits or a list, got {brief(exits)}. {_legal(survey)}")


def _spread(count: int, early: Sequence[ExitPoint], total: Cost) -> list[ExitPoint]:
    """Return `count` points whose costs are nearest to an even division of the backbone's, from the deepest up."""
    if not 1 <= count <= len(early):
        raise InvalidValueError(
            f'The number of exits must be in [1, {len(early)}], the stages before the last of this backbone, got'
            f' {count}.'
        )
    chosen: list[ExitPoint] = []
    for step in reversed(range(count)):
        # Leave enough shallower points for the exits still to be placed.
        candidates = early[step : early.index(chosen[0])] if chosen else early[step:]
        target = total.macs * (step + 1) / (count + 1)
        chosen.insert(0, min(candidates, key=lambda point: abs(point.cost.macs - target)))
    return chosen


def _choose_by_shares(
    backbone: nn.Module, shares: Sequence[float], survey: Survey, head: str, pays: Callable[[ExitPoint], bool]
) -> list[ExitPoint]:
    """Return the points whose shares of the MACs are nearest to these, one for each, where an exit pays."""
    by_macs: dict[int, ExitPoint] = {}
    for point in survey.points:
        known = by_macs.get(point.cost.macs)
        if known is None or known.index is None:  # what costs nothing, a norm or pooling, belongs to what it ends
            by_macs[point.cost.macs] = point
    points = [point for macs, point in by_macs.items() if 0 < macs < survey.total.macs]
    while len(points) >= len(shares):
        chosen = _nearest(points, [share * survey.total.macs for share in shares])
        dear = [point for point in chosen if not pays(point)]
        if not dear:
            return chosen
        points = [point for point in points if point not in dear]
    places = [f'{point.module} ({point.cost.macs / survey.total.macs:.0%})' for point in points if pays(point)]
    listed = ', '.join(places[:10] + ['...'] * (len(places) > 10)) or 'none'
    raise InvalidValueError(
        f"exits must be at most {len(places)} shares for {type(backbone).__name__} with heads '{head}', got"
        f' {len(shares)}: the ends of its blocks where such an exit costs less than main are {listed}.'
    )


def _nearest(points: Sequence[ExitPoint], targets: Sequence[float]) -> list[ExitPoint]:
    """Return a point for each of the rising numbers of MACs, rising too, with the least sum of distances."""
    # Of the targets so far among the first 0, 1, 2, ... points: the sum, and the points.
    best: list[tuple[float, list[ExitPoint]]] = [(0.0, [])] * (len(points) + 1)
    for target in targets:
        longer: list[tuple[float, list[ExitPoint]]] = [(math.inf, [])]
        for (spent, chosen), point in zip(best, points):
            taken = spent + abs(point.cost.macs - target), [*chosen, point]
            longer.append(min(longer[-1], taken, key=itemgetter(0)))
        best = longer
    return best[-1][1]


def _pick(backbone: nn.Module, exits: Sequence[int] | Sequence[str], survey: Survey) -> list[ExitPoint]:
    """Return the points named by index or module, checked and in order of depth."""
    by_index = {point.index: point for point in survey.stages}
    by_name = {point.module: point for point in survey.points}
    chosen = []
    for item in exits:
        if isinstance(item, str):
            name = resolve_tap(backbone, item)
            point, reason = by_name.get(name), survey.rejected.get(name, '')
        elif is_integer(item):
            point, reason = by_index.get(item + survey.num_stages if item < 0 else item), ''
        else:
            raise InvalidValueError(f'exits must hold indices or module names, got {item!r}. {_legal(survey)}')
        if point is None:
            reason = f' ({reason})' if reason else ''
            raise InvalidValueError(f'{type(backbone).__name__} has no exit {item!r}{reason}. {_legal(survey)}')
        chosen.append(point)
    if len(set(chosen)) != len(chosen):
        raise InvalidValueError(f'exits must name each place once, got {list(exits)}.')
    return sorted(chosen, key=lambda point: point.cost.macs)


def _legal(survey: Survey) -> str:
    if not survey.stages:
        return 'Name modules of named_modules() that give maps or tokens.'
    return 'Its stages are ' + ', '.join(f'{p.index} ({p.module}, 1/{p.reduction})' for p in survey.stages) + '.'


def _build_spec(
    point: ExitPoint, head: str, survey: Survey, widths: tuple[int, ...] | None, num_classes: int
) -> ExitSpec:
    """Return the exit at a point, its widths given or found by the head's rule and the cost it may have."""
    halvings = _count_halvings(point, survey)
    kind = HEADS[head]
    spec = _to_spec(point, head)
    if widths is not None:
        most = kind.num_widths(halvings)
        # The paper's heads may end on a larger map than the last stage's.
        least = min(1, most) if kind.is_paper else most
        if not least <= len(widths) <= most:
            allowed = f'{most}' if least == most else f'{least} to {most}'
            raise InvalidValueError(
                f"A '{head}' head at {point.module} takes {allowed} widths, got {len(widths)}: {list(widths)}."
            )
        return replace(spec, widths=widths)
    candidates = kind.candidates(point.channels, survey.num_features, halvings)
    most_macs = min(HEAD_MACS_FRAC * survey.total.macs, SPARED_FRAC * (survey.total.macs - point.cost.macs))
    for widths in candidates:
        spec = replace(spec, widths=widths)
        if _head_macs(spec, point, num_classes) <= most_macs:
            return spec
    macs, total = _head_macs(spec, point, num_classes), survey.total.macs
    if len(candidates) == 1:  # a head of the paper has the width that it has
        if point.cost.macs + macs >= total:
            _logger.warning(
                f"The exit at {point.module} costs {100 * (point.cost.macs + macs) / total:.3g} % of main's MACs with a"
                f" '{head}' head, so leaving there saves nothing: take head='conv' (--exit-head conv) or other places."
            )
        return spec
    _logger.warning(
        f"The narrowest head at {point.module} costs {100 * macs / total:.3g} % of main's MACs, more than the"
        f' {100 * most_macs / total:.3g} % that are advised: choose other places or fewer exits by exits (--exits).'
    )
    return spec


def _to_spec(point: ExitPoint, head: str, widths: tuple[int, ...] = ()) -> ExitSpec:
    same = ('module', 'channels', 'reduction', 'layout', 'num_prefix_tokens', 'output')
    return ExitSpec(head=head, widths=widths, **{name: getattr(point, name) for name in same})


def _count_halvings(point: ExitPoint, survey: Survey) -> int:
    """Return how often a map is halved to the last one's size, 1 at least."""
    # The nearest count where sizes are not powers of two apart (299 pixels, say).
    return max(1, round(math.log2(point.size[0] / survey.last_size[0])))


def _pays(point: ExitPoint, *, head: str, survey: Survey, num_classes: int) -> bool:
    """Return whether the narrowest head at a point costs less than what leaving there spares."""
    candidates = HEADS[head].candidates(point.channels, survey.num_features, _count_halvings(point, survey))
    macs = _head_macs(_to_spec(point, head, candidates[-1]), point, num_classes)
    ahead = survey.total.macs - point.cost.macs
    return macs < ahead if len(candidates) == 1 else macs <= SPARED_FRAC * ahead


def _head_macs(spec: ExitSpec, point: ExitPoint, num_classes: int) -> int:
    with torch.device('meta'):
        head = ExitHead(spec.head, in_chans=spec.channels, widths=spec.widths, num_classes=num_classes).eval()
    with CostMeter(head) as meter:
        head(torch.empty(1, spec.channels, *point.size, device='meta'))
    return meter.read().macs
