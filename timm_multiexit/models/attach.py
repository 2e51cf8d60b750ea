"""Attach."""

from collections.abc import Sequence

from torch import nn

from timm_multiexit.exits.heads import HEADS
from timm_multiexit.exits.placement import ExitsArg, _build_spec, _choose, _input_size, _named
from timm_multiexit.exits.survey import survey_backbone
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import MultiExitError


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
        backbone: A timm classification model.
        exits: 'auto' for all stages before the last, without the stem where three or more remain, and of a backbone of
            one resolution three, at a quarter, half and three quarters of its depth; the CIFAR networks of this
            package have their paper's places and, with head='paper' or 'bottleneck', widths. An int for that many of
            them, spread evenly in cost, the stem only if there are not enough others; a list of ints for indices into
            `feature_info`; a list of strings for module names.
        head: 'conv', narrow and cheap; 'paper', the paper's widths, so that features can be distilled; 'bottleneck',
            of the same widths, with a bottleneck in place of each convolution; 'linear', norm, pooling and a linear
            layer.
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
    preset = getattr(backbone, 'multiexit_preset', None)
    if exits == 'auto' and preset is not None:
        exits = preset['exits']
        if head_widths is None and HEADS[head].is_paper:
            head_widths = preset['head_widths']
    survey = survey_backbone(backbone, _named(exits), input_size)
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
