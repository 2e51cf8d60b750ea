"""What a backbone offers: one forward of a data-free copy tells where it can be tapped, and what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_multiexit.exits.backbone import (
    ModuleInfo,
    check_width,
    classifier_names,
    nearest_names,
    run_empty,
    scan_module,
)
from timm_multiexit.exits.cost import Cost, CostMeter, empty_images, meta_copy
from timm_multiexit.exits.layouts import combine_features, fit_layouts, read_layout
from timm_multiexit.exits.stages import Entries, find_block_ends, stage_entries
from timm_multiexit.exits.taps import Taps, resolve_tap
from timm_multiexit.utils.errors import InvalidValueError


@dataclass(frozen=True)
class ExitPoint:
    """A place where an exit can be attached.

    Attributes:
        index: Index in the backbone's `feature_info`; None for a module that is named otherwise.
        module: Name of the module to tap.
        channels: Channels of its map or tokens.
        reduction: Input pixels per pixel (or token) along one side.
        size: Height and width of the map.
        cost: MACs and parameters up to here.
        layout: 'NCHW', 'NHWC' or 'NLC' (tokens).
        num_prefix_tokens: Tokens in front of the grid, of 'NLC'.
        output: Which of the module's outputs this is.
    """

    index: int | None
    module: str
    channels: int
    reduction: int
    size: tuple[int, int]
    cost: Cost
    layout: str = 'NCHW'
    num_prefix_tokens: int = 0
    output: int = 0


@dataclass(frozen=True)
class Survey:
    """What one forward tells.

    Attributes:
        points: Where an exit can be attached, shallow to deep.
        rejected: Module name -> why no exit can be attached there.
        num_stages: Entries of `feature_info`.
        num_features: Width of main's features.
        total: Cost of the whole backbone.
        last_size: Height and width of its last map.
    """

    points: tuple[ExitPoint, ...]
    rejected: dict[str, str]
    num_stages: int
    num_features: int
    total: Cost
    last_size: tuple[int, int] = (1, 1)

    @property
    def stages(self) -> tuple[ExitPoint, ...]:
        """The points that `feature_info` names."""
        return tuple(point for point in self.points if point.index is not None)

    @property
    def is_isotropic(self) -> bool:
        """Whether all stages are of one resolution."""
        return len({point.size for point in self.stages}) == 1


class _Arrival(NamedTuple):
    output: Any
    versions: list[int]
    cost: Cost


@torch.inference_mode(False)  # inference tensors have no version to tell a change in place by
@torch.no_grad()
def survey_backbone(
    backbone: nn.Module, names: Sequence[str] | None, input_size: tuple[int, int, int], info: ModuleInfo | None = None
) -> Survey:
    """Run a data-free copy once with a tap at every stage and every named module.

    Args:
        backbone: A classification model; it stays as it is.
        names: Further modules; None for those at which its blocks end.
        input_size: (channels, height, width) of an image.
        info: What is known of a model that is not timm's.

    Raises:
        InvalidValueError: It has no classifier, no module of such a name, no stages where no names are given, or it
            does not run without data.
    """
    entries, names = _find_places(backbone, names, input_size)
    modules = dict(backbone.named_modules())
    stages: dict[str, int] = {}
    for idx, entry in enumerate(entries):
        if entry['module'] in modules and entry['module']:
            stages.setdefault(resolve_tap(backbone, entry['module']), idx)
    taps_at = list(dict.fromkeys([*stages, *(resolve_tap(backbone, name) for name in names)]))
    taps = Taps(taps_at, classifier_names(backbone, info), outputs=[None] * len(taps_at))
    arrivals, output, total = _run(backbone, taps, input_size)
    if info is not None:
        check_width(backbone, output, info)
    points, rejected = [], {}
    known = [entries[stages[name]] if name in stages else {} for name in taps_at]
    last = _is_channels_last(arrivals, known, input_size)
    if last is None and any(tensor.ndim == 4 for idx in range(len(known)) for tensor in _arrived(arrivals, idx)):
        last = _try_larger(backbone, taps, input_size)
    for idx, name in enumerate(taps_at):
        entry = {**known[idx], 'last': last}
        point = _read_point(name, stages.get(name), entry, arrivals.get(idx, []), input_size)
        if isinstance(point, str):
            rejected[name] = point
        else:
            points.append(point)
    points.sort(key=lambda point: point.cost.macs)
    entering = [arrival[0].output for idx, arrival in arrivals.items() if idx >= len(taps_at)]
    if not entering and info is None and getattr(backbone, 'num_classes', None) == 0:
        entering = [output]
    if not entering:
        raise InvalidValueError(
            f'{type(backbone).__name__} does not call its classifier {", ".join(taps.classifiers)}, or not with its'
            ' input as first argument.'
        )
    staged = [point.size for point in points if point.index is not None]
    last_size = (1, 1)
    if staged or names:
        last_size = staged[-1] if staged else _find_last_size(backbone, input_size)
    return Survey(tuple(points), rejected, len(entries), combine_features(entering).shape[1], total, last_size)


def _find_last_size(backbone: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Return height and width of the last map that modules with parameters give, before it is pooled."""
    for call in reversed(scan_module(backbone, input_size).calls):
        for tensor in _tensors(call.output):
            layout = read_layout(tensor, {'last': False}, input_size)
            if layout and layout[3] != (1, 1):
                return layout[3]
    return 1, 1


def _find_places(
    backbone: nn.Module, names: Sequence[str] | None, input_size: tuple[int, int, int]
) -> tuple[Entries, Sequence[str]]:
    """Return the stages, and the named modules, checked, or those at which blocks end."""
    entries = stage_entries(backbone, is_needed=names is not None and not names)
    if names is None:
        return entries, find_block_ends(backbone, entries, input_size)
    modules = dict(backbone.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown:
        stages = ', '.join(entry['module'] for entry in entries)
        more = f'; its stages are {stages}' if stages else ''
        hint = nearest_names(unknown[0], modules)
        raise InvalidValueError(f"{type(backbone).__name__} has no module '{unknown[0]}'{hint}{more}.")
    return entries, names


def _run(
    backbone: nn.Module, taps: Taps, input_size: tuple[int, int, int]
) -> tuple[dict[int, list[_Arrival]], Tensor | None, Cost]:
    copy = meta_copy(backbone)
    meter = CostMeter(copy)
    arrivals: dict[int, list[_Arrival]] = {}

    def note(idx: int, output: Any) -> None:
        versions = [tensor._version for tensor in _tensors(output)]
        arrivals.setdefault(idx, []).append(_Arrival(output, versions, meter.read()))

    with meter:
        output = run_empty(backbone, copy, taps, empty_images(backbone, input_size), note)
    return arrivals, output, meter.read()


def _is_channels_last(
    arrivals: dict[int, list[_Arrival]], entries: Entries, input_size: tuple[int, int, int]
) -> bool | None:
    """Return whether maps are NHWC, by those of which `feature_info`, else the shape, leaves no doubt; None if none."""
    for idx, entry in enumerate(entries):
        for tensor in _arrived(arrivals, idx):
            is_channels = [size == entry.get('num_chs') for size in tensor.shape]
            if tensor.ndim == 4 and is_channels[1] != is_channels[3]:
                return is_channels[3]
    for idx in range(len(entries)):
        for tensor in _arrived(arrivals, idx):
            if tensor.ndim == 4 and not _is_ambiguous(tensor, input_size):
                fits_last, fits_first = fit_layouts(tensor.shape, input_size)
                return fits_last < fits_first
    return None


def _arrived(arrivals: dict[int, list[_Arrival]], idx: int) -> list[Tensor]:
    return [tensor for arrival in arrivals.get(idx, []) for tensor in _tensors(arrival.output)]


def _try_larger(backbone: nn.Module, taps: Taps, input_size: tuple[int, int, int]) -> bool | None:
    """Return whether maps are NHWC, by which sides grow with the image; None if it takes no other size."""
    channels, height, width = input_size
    larger = channels, 2 * height, 2 * width
    try:
        arrivals, _, _ = _run(backbone, taps, larger)
    except Exception:  # backbones raise all kinds of errors for sizes that they do not take
        return None
    return _is_channels_last(arrivals, [{} for _ in taps.names], larger)


def _is_ambiguous(tensor: Tensor, input_size: tuple[int, int, int]) -> bool:
    """Whether a map has as many channels as rows and columns, so that its shape does not tell which is which."""
    fits_last, fits_first = fit_layouts(tensor.shape, input_size)
    return fits_last == fits_first


def _tensors(output: Any) -> list[Tensor]:
    items = output if isinstance(output, (tuple, list)) else [output]
    return [item for item in items if isinstance(item, Tensor)]


def _read_point(
    name: str, index: int | None, entry: Mapping[str, Any], arrivals: list[_Arrival], input_size: tuple[int, int, int]
) -> ExitPoint | str:
    """Return the exit point that a module's output is, or why it cannot be one."""
    if len(arrivals) != 1:
        return 'its module is not called in the forward' if not arrivals else 'its module is called more than once'
    output, versions, cost = arrivals[0]
    if [tensor._version for tensor in _tensors(output)] != versions:
        return 'the layer after it changes its output in place, tap that one'
    items = output if isinstance(output, (tuple, list)) else [output]
    if entry['last'] is None and 'num_chs' not in entry:
        doubtful = [item for item in _tensors(output) if item.ndim == 4 and _is_ambiguous(item, input_size)]
        if doubtful:
            return f'its output {list(doubtful[0].shape)} may be [B, C, H, W] or [B, H, W, C], tap another module'
    found = []
    for idx, item in enumerate(items):
        layout = read_layout(item, entry, input_size) if isinstance(item, Tensor) else None
        if layout:
            kind, num_prefix_tokens, channels, size = layout
            reduction = entry.get('reduction') or max(1, round(input_size[-1] / size[-1]))
            found.append(ExitPoint(index, name, channels, reduction, size, cost, kind, num_prefix_tokens, idx))
    if not found:
        kinds = ', '.join(str(list(item.shape)) for item in _tensors(output)) or type(output).__name__
        return f'its output {kinds} is neither a map nor a grid of tokens'
    # Of several, the one of the stage's own resolution (branches of HRNet, CrossViT), else the first.
    expected = -(-input_size[-1] // entry['reduction']) if 'reduction' in entry else None
    return next((point for point in found if point.size[-1] == expected), found[0])
