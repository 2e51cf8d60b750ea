"""Figure 1: the network as a row of stages with its exits beside them; and accuracy over MACs."""

import math
from collections.abc import Mapping
from typing import Any

from timm_multiexit.config import MultiExitError
from timm_multiexit.metrics import ENSEMBLE, exit_names
from timm_multiexit.model import MultiExitModel
from timm_multiexit.survey import stage_entries


def describe_architecture(model: MultiExitModel, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Return what the figure shows, for one image.

    Args:
        model: The network.
        input_size: (channels, height, width).

    Returns:
        `stages`: from one tap to the next, the last one to the end with main's classifier: `to` (tap), `channels` and
        `size` (height, width) there, `macs`, and the index of the `exit` that follows, None at the end; `exits`:
        `name`, `tap`, `head`, `widths`, `macs` and `params` of the head alone; and the `input_size`. Sides are those
        that the reductions give, rounded up.
    """
    costs = model.cost(input_size)
    paths = [cost.fixed.macs - cost.head.macs for cost in costs]
    specs = model.exits.specs
    places = [(spec.module, spec.channels, spec.reduction) for spec in specs] + [_last_place(model)]
    stages = [
        {
            'to': module,
            'channels': channels,
            'size': None if reduction is None else [math.ceil(side / reduction) for side in input_size[1:]],
            'macs': path - before,
            'exit': idx if idx < len(specs) else None,
        }
        for idx, ((module, channels, reduction), path, before) in enumerate(zip(places, paths, [0, *paths]))
    ]
    exits = [
        {
            'name': name,
            'tap': spec.module,
            'head': spec.head,
            'widths': list(spec.widths),
            'macs': cost.head.macs,
            'params': cost.head.params,
        }
        for name, spec, cost in zip(exit_names(len(specs)), specs, costs)
    ]
    return {'input_size': list(input_size), 'num_classes': model.num_classes, 'stages': stages, 'exits': exits}


def _last_place(model: MultiExitModel) -> tuple[str, int, int | None]:
    try:
        reduction = stage_entries(model.backbone)[-1].get('reduction')
    except MultiExitError:  # exits at modules that the user named
        reduction = None
    return 'main', model.num_features, reduction


def accuracy_over_macs(
    model: MultiExitModel, top1: Mapping[str, float], input_size: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Return MACs of one image, `fixed` and `sequential`, and top-1 of every classifier and the ensemble.

    The ensemble runs everything and has no fixed path, see `evaluate`.

    Args:
        model: The network.
        top1: Classifier -> top-1 in percent, shallow to deep, then the ensemble if there are exits.
        input_size: (channels, height, width).
    """
    costs = model.cost(input_size)
    return [
        {
            'classifier': name,
            'fixed': None if name == ENSEMBLE else costs[idx].fixed.macs,
            'sequential': costs[min(idx, len(costs) - 1)].sequential.macs,
            'top1': value,
        }
        for idx, (name, value) in enumerate(top1.items())
    ]
