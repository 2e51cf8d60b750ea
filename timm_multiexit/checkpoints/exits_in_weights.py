"""Exits from the names and shapes of their weights alone, for files that do not say where they are."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_multiexit.checkpoints.architecture import PREFIX, TRAINING_ONLY, exit_tensors, without
from timm_multiexit.exits.cost import meta_copy
from timm_multiexit.exits.placement import place_exits
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError

_logger = logging.getLogger(__name__)

_Shapes = Mapping[str, tuple[int, ...]]


def find_specs(backbone: nn.Module, state: Mapping[str, Tensor], path: Any) -> list[ExitSpec]:
    """Return the exits whose weights are in a state dict, an empty list without any.

    Heads and widths are read from the shapes; the places are those of 'auto', or of that number of exits, whichever has
    the channels that the heads take.

    Raises:
        CheckpointError: They are at other places, or of another kind.
    """
    shapes = _shapes_by_exit(without(state, *TRAINING_ONLY))
    if not shapes:
        return []
    heads = {_find_head(part) for part in shapes.values()}
    if sorted(shapes) == list(range(len(shapes))) and len(heads) == 1:
        head = heads.pop()
        widths = [_find_widths(head, shapes[idx]) for idx in range(len(shapes))]
        for exits in ('auto', len(shapes)):
            specs = _place(backbone, exits, head, widths)
            if specs and _head_shapes(backbone, specs) == shapes:
                places = ', '.join(spec.module for spec in specs)
                _logger.warning(
                    f'{path} does not say where its exits are: taken at {places}, where heads of these shapes fit. Give'
                    ' --exits if it was trained with others.'
                )
                return specs
    raise CheckpointError(
        f'{path} has weights of {len(shapes)} exits and does not say where they are: give --exits, --exit-head and'
        ' --head-widths that it was trained with.'
    )


def _shapes_by_exit(state: Mapping[str, Tensor]) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return the shapes of each exit's weights under their names in the head."""
    shapes: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, tensor in state.items():
        if match := re.fullmatch(rf'(?:.*\.)?{re.escape(PREFIX)}(\d+)\.((?:convs|fc)\..+)', key):
            shapes[int(match[1])][match[2]] = tuple(tensor.shape)
    return dict(shapes)


def _find_head(shapes: _Shapes) -> str:
    if 'convs.weight' in shapes:
        return 'linear'
    if any(re.match(r'convs\.\d+\.\d+\.', key) for key in shapes):
        return 'bottleneck'
    kernels = {shape[-1] for key, shape in shapes.items() if key.endswith('.conv.weight')}
    return 'paper' if kernels == {3} else 'conv'


def _find_widths(head: str, shapes: _Shapes) -> list[int]:
    """Return the output channels of the head's convolutions, 0 for a pooling between two."""
    widths: dict[int, int] = {}
    for key, shape in shapes.items():
        if match := re.match(r'convs\.(\d+)\..*(conv|conv_pw)\.weight$', key):
            widths[int(match[1])] = shape[0]
    found = [widths.get(idx, 0) for idx in range(max(widths, default=-1) + 1)]
    # Where the map already has the first width a convolution for it is left out.
    narrow = shapes.get('convs.0.conv_dw.weight') if head == 'conv' else None
    return found if narrow is None else [narrow[0], *found]


def _place(backbone: nn.Module, exits: str | int, head: str, widths: list[list[int]]) -> list[ExitSpec]:
    try:
        return place_exits(backbone, exits, head=head, head_widths=widths if any(widths) else None)
    except InvalidValueError:
        return []


def _head_shapes(backbone: nn.Module, specs: list[ExitSpec]) -> dict[int, dict[str, tuple[int, ...]]]:
    with torch.device('meta'):
        return _shapes_by_exit(exit_tensors(MultiExitModel(meta_copy(backbone), specs)))
