"""Attaching exits: a backbone becomes a multi-exit model."""

from collections.abc import Sequence

from torch import nn

from timm_multiexit.exits.placement import ExitsArg, place_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.checks import check_instance, check_number


def attach_exits(
    backbone: nn.Module,
    exits: ExitsArg = 'auto',
    *,
    head: str = 'conv',
    head_widths: Sequence[Sequence[int]] | None = None,
    drop_rate: float | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> MultiExitModel:
    """Return a model that owns the backbone and fresh heads at the chosen places.

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
        input_size: (channels, height, width) that costs, and so the widths of 'conv' heads, are computed for; the
            backbone's own if not given.

    Raises:
        InvalidTypeError: An argument is of the wrong type.
        InvalidValueError: The backbone has no such stages, the exit or head does not exist, the widths do not fit, or
            the backbone does not take images of `input_size`.

    >>> import timm
    >>> model = attach_exits(timm.create_model('resnet18', num_classes=10))
    >>> [spec.module for spec in model.exits.specs]
    ['layer1.1', 'layer2.1', 'layer3.1']
    """
    check_instance('backbone', backbone, nn.Module, hint='create_model makes a model of a name.')
    if drop_rate is not None:
        drop_rate = check_number('drop_rate', drop_rate, 0, 1)
    specs = place_exits(backbone, exits, head=head, head_widths=head_widths, input_size=input_size)
    if drop_rate is None:
        drop_rate = float(getattr(backbone, 'drop_rate', 0.0) or 0.0)
    return MultiExitModel(backbone, specs, drop_rate=drop_rate, input_size=input_size)
