"""What a backbone offers: one forward of a data-free copy tells where it can be tapped, and what that costs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_multiexit.config import MultiExitError
from timm_multiexit.cost import Cost, CostMeter, meta_copy
from timm_multiexit.heads import combine_features
from timm_multiexit.taps import Taps, classifier_names, resolve_tap


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
        rejected: Module name -> why none can be attached there.
        num_stages: Entries of `feature_info`.
        num_features: Width of main's features.
        total: Cost of the whole backbone.
    """

    points: tuple[ExitPoint, ...]
    rejected: dict[str, str]
    num_stages: int
    num_features: int
    total: Cost

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


def _renamed(pattern: str, replacement: str | Callable[[re.Match], str]) -> Callable[[list[dict]], list[dict]]:
    return lambda entries: [{**entry, 'module': re.sub(pattern, replacement, entry['module'])} for entry in entries]


def _coat_stages(entries: list[dict]) -> list[dict]:
    return [{'module': f'serial_blocks{idx}', 'reduction': 2 ** (idx + 1)} for idx in range(1, 5)]


def _aligned_xception_stages(entries: list[dict]) -> list[dict]:
    # The block of the layer that is named ends at the next stage's reduction.
    return [
        {**entry, 'module': re.sub(r'\.stack\..*', '', entry['module']), 'reduction': following['reduction']}
        for entry, following in zip(entries, [*entries[1:], entries[-1]])
    ]


# Families whose `feature_info` (timm 1.0.31) names modules that are not there, are not called, or lie beside a
# shortcut that has the whole batch, and where to look.
_STAGE_FIXES: dict[str, Callable[[list[dict]], list[dict]]] = {
    'CoaT': _coat_stages,  # names a ModuleList, and for some the parallel blocks at the end three times
    'Gemma4VitClassifier': _renamed(r'^blocks\.', 'encoder.blocks.'),  # names as inside the encoder it wraps
    'HighResolutionNet': lambda entries: _renamed('^stem$', 'act1')(_renamed('^stage1$', 'layer1')(entries)),  # no such
    'MobileNetV5': _renamed('^bn1$', 'conv_stem'),  # the norm is inside the stem
    'MultiScaleVit': _renamed(r'^block\.', 'stages.'),  # no such module
    'Twins': _renamed(r'^block\.', 'blocks.'),  # no such module
    # names the activation that the next block starts with
    'Xception': _renamed(r'^block(\d+)\.rep\.0$', lambda match: f'block{int(match[1]) - 1}'),
    'XceptionAligned': _aligned_xception_stages,  # names layers inside the blocks
}


def stage_entries(backbone: nn.Module) -> list[dict]:
    """Return the backbone's stages as `feature_info` has them, mended where its family needs that.

    Raises:
        MultiExitError: It names none.
    """
    info = getattr(backbone, 'feature_info', None)
    entries = info.info if hasattr(info, 'info') else info
    if not entries or not all(isinstance(entry, dict) and 'module' in entry for entry in entries):
        raise MultiExitError(
            f'{type(backbone).__name__} names no stages (feature_info), so no exits can be attached:'
            ' allowed are timm classification models with stages.'
        )
    return _STAGE_FIXES.get(type(backbone).__name__, list)(list(entries))


@torch.inference_mode(False)  # inference tensors have no version to tell a change in place by
@torch.no_grad()
def survey_backbone(backbone: nn.Module, names: Sequence[str], input_size: tuple[int, int, int]) -> Survey:
    """Run a data-free copy once with a tap at every stage and every named module.

    Args:
        backbone: A timm classification model; it stays as it is.
        names: Further modules.
        input_size: (channels, height, width) of an image.

    Raises:
        MultiExitError: It has no stages, no classifier, or no module of such a name.
    """
    entries = stage_entries(backbone)
    modules = dict(backbone.named_modules())
    _check_names(backbone, names, modules, entries)
    stages: dict[str, int] = {}
    for idx, entry in enumerate(entries):
        if entry['module'] in modules and entry['module']:
            stages.setdefault(resolve_tap(backbone, entry['module']), idx)
    taps_at = list(dict.fromkeys([*stages, *(resolve_tap(backbone, name) for name in names)]))
    taps = Taps(taps_at, classifier_names(backbone), outputs=[None] * len(taps_at))
    arrivals, output, total = _run(backbone, taps, input_size)
    points, rejected = [], {}
    is_channels_last = _is_channels_last(
        arrivals, [entries[stages[name]] if name in stages else {} for name in taps_at]
    )
    for idx, name in enumerate(taps_at):
        index = stages.get(name)
        entry = {} if index is None else entries[index]
        point = _read_point(name, index, {**entry, 'last': is_channels_last}, arrivals.get(idx, []), input_size)
        if isinstance(point, str):
            rejected[name] = point
        else:
            points.append(point)
    points.sort(key=lambda point: point.cost.macs)
    entering = [arrival[0].output for idx, arrival in arrivals.items() if idx >= len(taps_at)]
    if not entering and backbone.num_classes == 0:
        entering = [output]
    if not entering:
        raise MultiExitError(f'{type(backbone).__name__} does not call its classifier {", ".join(taps.classifiers)}.')
    return Survey(tuple(points), rejected, len(entries), combine_features(entering).shape[1], total)


def _check_names(backbone: nn.Module, names: Sequence[str], modules: dict, entries: list[dict]) -> None:
    unknown = [name for name in names if name not in modules or not name]
    if unknown:
        near = get_close_matches(unknown[0], modules, n=3)
        hint = f', nearest are {", ".join(near)}' if near else ''
        stages = ', '.join(entry['module'] for entry in entries)
        raise MultiExitError(f"{type(backbone).__name__} has no module '{unknown[0]}'{hint}; its stages are {stages}.")


def _run(
    backbone: nn.Module,
    taps: Taps,
    input_size: tuple[int, int, int],
) -> tuple[dict[int, list[_Arrival]], Tensor, Cost]:
    copy = meta_copy(backbone)
    meter = CostMeter(copy)
    arrivals: dict[int, list[_Arrival]] = {}

    def note(idx: int, output: Any) -> None:
        versions = [tensor._version for tensor in _tensors(output)]
        arrivals.setdefault(idx, []).append(_Arrival(output, versions, meter.read()))

    with meter:
        output = taps.visit(copy, torch.empty(1, *input_size, device='meta'), note)
    return arrivals, output, meter.read()


def _is_channels_last(arrivals: dict[int, list[_Arrival]], entries: list[dict]) -> bool:
    """Return whether maps are NHWC, by those of which `feature_info` leaves no doubt."""
    for idx, entry in enumerate(entries):
        for arrival in arrivals.get(idx, []):
            for tensor in _tensors(arrival.output):
                is_channels = [size == entry.get('num_chs') for size in tensor.shape]
                if tensor.ndim == 4 and is_channels[1] != is_channels[3]:
                    return is_channels[3]
    return False


def _tensors(output: Any) -> list[Tensor]:
    items = output if isinstance(output, (tuple, list)) else [output]
    return [item for item in items if isinstance(item, Tensor)]


def _read_point(
    name: str,
    index: int | None,
    entry: dict,
    arrivals: list[_Arrival],
    input_size: tuple[int, int, int],
) -> ExitPoint | str:
    """Return the exit point that a module's output is, or why it is none."""
    if len(arrivals) != 1:
        return 'its module is not called in the forward' if not arrivals else 'its module is called more than once'
    output, versions, cost = arrivals[0]
    if [tensor._version for tensor in _tensors(output)] != versions:
        return 'the layer after it changes its output in place, tap that one'
    items = output if isinstance(output, (tuple, list)) else [output]
    found = []
    for idx, item in enumerate(items):
        layout = _read_layout(item, entry, input_size) if isinstance(item, Tensor) else None
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


def _read_layout(
    tensor: Tensor,
    entry: dict,
    input_size: tuple[int, int, int],
) -> tuple[str, int, int, tuple[int, int]] | None:
    """Return layout, prefix tokens, channels and (height, width) of a tensor, None if it is no map."""
    if tensor.shape[0] != 1:  # not one row per image: the inner tokens of TNT
        return None
    if tensor.ndim == 4:
        # `feature_info` tells the channels; without it, the two equal (or nearest) sides are height and width.
        channels = entry.get('num_chs')
        last = tensor.shape[3] == channels and (tensor.shape[1] != channels or entry['last'])
        if channels is None or channels not in (tensor.shape[1], tensor.shape[3]):
            aspect = input_size[1] / input_size[2]
            last = abs(tensor.shape[1] / tensor.shape[2] - aspect) < abs(tensor.shape[2] / tensor.shape[3] - aspect)
        if last:
            return 'NHWC', 0, tensor.shape[3], (tensor.shape[1], tensor.shape[2])
        return 'NCHW', 0, tensor.shape[1], (tensor.shape[2], tensor.shape[3])
    if tensor.ndim == 3:
        grid = _find_grid(tensor.shape[1], entry.get('reduction'), input_size)
        if grid:
            return 'NLC', tensor.shape[1] - grid[0] * grid[1], tensor.shape[2], grid
    return None


def _find_grid(length: int, reduction: int | None, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """Return height and width of the grid at the end of so many tokens, at most 16 of them in front of it."""
    _, height, width = input_size
    reductions = [reduction] if reduction else []
    # Else from the count: the largest grid of the image's aspect that fits.
    reductions += [height / rows for rows in range(int((length * height / width) ** 0.5) + 1, 0, -1)]
    for pixels in reductions:
        for grid in ((-(-height // pixels), -(-width // pixels)), (height // pixels, width // pixels)):
            grid = (int(grid[0]), int(grid[1]))
            if 0 <= length - grid[0] * grid[1] <= 16 and min(grid) > 0:
                return grid
    return None
