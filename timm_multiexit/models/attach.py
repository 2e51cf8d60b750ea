"""Attaching exits: a backbone becomes a multi-exit model."""

from collections.abc import Sequence

from torch import nn

from timm_multiexit.exits.backbone import ClassifierArg, check_backbone, describe_module
from timm_multiexit.exits.placement import ExitsArg, named_places, place_exits, shares_of_macs
from timm_multiexit.exits.stages import stage_entries
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.timm_surface import TimmSurface
from timm_multiexit.utils.checks import check_number
from timm_multiexit.utils.errors import InvalidValueError, is_number


def attach_exits(
    backbone: nn.Module,
    exits: ExitsArg = 'auto',
    *,
    head: str = 'conv',
    head_widths: Sequence[Sequence[int]] | None = None,
    drop_rate: float | None = None,
    input_size: tuple[int, int, int] | None = None,
    classifier: ClassifierArg | None = None,
    num_classes: int | None = None,
) -> MultiExitModel:
    """Return a model that owns the backbone and fresh heads at the chosen places.

    Args:
        backbone: A timm classification model, or any module that gives logits [B, C] of images [B, channels, height,
            width], with `exits` by name and `input_size`.
        exits: 'auto' for all stages before the last, without the stem where three or more remain, and of a backbone of
            one resolution three, at a quarter, half and three quarters of its depth; the CIFAR networks of this
            package have their paper's places and, with head='paper' or 'bottleneck', widths. An int for that many of
            them, spread evenly in cost, the stem only if there are not enough others; a list of ints for indices into
            `feature_info`; a list of strings for module names; a list of floats in (0, 1) for shares of the
            backbone's MACs, each at the end of the nearest block.
        head: 'conv', narrow and cheap; 'paper', the paper's widths, so that features can be distilled; 'bottleneck',
            of the same widths, with a bottleneck in place of each convolution; 'linear', norm, pooling and a linear
            layer.
        head_widths: Output channels of the convolutions, one list per exit, in place of the head's own rule.
        drop_rate: Dropout probability of the heads; the backbone's if not given.
        input_size: (channels, height, width) that costs, and so the widths of 'conv' heads, are computed for; the
            backbone's own if not given, which only timm's models have.
        classifier: Name of the module that makes the logits, or names where there are several; of a module that is not
            timm's, where a forward does not show it.
        num_classes: Width of the logits, likewise.

    Raises:
        InvalidTypeError: The backbone is not a module, or another argument of the wrong type.
        InvalidValueError: The backbone has no such stages, the exit or head does not exist, the widths do not fit, or
            the backbone is wrapped, has exits or does not take images of `input_size`.

    >>> import timm
    >>> model = attach_exits(timm.create_model('resnet18', num_classes=10))
    >>> [spec.module for spec in model.exits.specs]
    ['layer1.1', 'layer2.1', 'layer3.1']

    Of a module of one's own the places are named:

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> model = attach_exits(net.append(nn.Linear(9, 4)), ['1'], input_size=(3, 32, 32))
    >>> model.num_classes, model.get_classifier()
    (4, Linear(in_features=9, out_features=4, bias=True))
    """
    check_attachable(backbone)
    drop_rate = find_drop_rate(backbone, drop_rate)
    if not named_places(exits) and not shares_of_macs(exits):
        stage_entries(backbone)
    info = describe_module(backbone, classifier=classifier, num_classes=num_classes, input_size=input_size)
    specs = place_exits(backbone, exits, head=head, head_widths=head_widths, input_size=input_size, info=info)
    if info is not None:
        classifier, num_classes = info.classifiers, info.num_classes
    return MultiExitModel(
        backbone, specs, drop_rate=drop_rate, input_size=input_size, classifier=classifier, num_classes=num_classes
    )


def find_drop_rate(backbone: nn.Module, drop_rate: float | None) -> float:
    """Return the dropout probability of the heads: what is given, checked, or else the backbone's."""
    if drop_rate is not None:
        return check_number('drop_rate', drop_rate, 0, 1)
    # Of a module that is not timm's these can be anything.
    rates = [getattr(backbone, 'drop_rate', None), getattr(getattr(backbone, 'head_drop', None), 'p', None)]
    return float(next((rate for rate in rates if is_number(rate)), 0.0))


def check_attachable(backbone: nn.Module) -> None:
    """Raise for what exits cannot be attached to as it is: see `check_backbone`, or it has exits."""
    check_backbone(backbone)
    owner = next((module for module in backbone.modules() if isinstance(module, TimmSurface)), None)
    if owner is None:
        return
    if isinstance(backbone, MultiExitModel):
        hint = 'attach exits to its .backbone'
    elif owner is backbone:
        hint = 'attach exits to a new backbone'
    else:
        hint = f'it has a {type(owner).__name__} inside'
    raise InvalidValueError(f'backbone must be a model without exits, got a {type(backbone).__name__}: {hint}.')
