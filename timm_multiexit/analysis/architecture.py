"""Figure 1: the network as a row of stages with its exits beside them; and accuracy over MACs."""

import math
from collections.abc import Mapping
from typing import Any

from timm_multiexit.exits.stages import stage_entries
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.figures import COLORS, draw_arrow, draw_box, new_figure
from timm_multiexit.utils.text import ENSEMBLE, exit_names, format_macs


def describe_architecture(model: MultiExitModel, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Return what the figure shows, for one image of `input_size` (channels, height, width).

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

    `top1` is in percent, shallow to deep, then the ensemble if there are exits, which runs everything and has no fixed
    path, see `evaluate`.
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


_STEP, _WIDTH, _HEIGHT = 3.0, 2.2, 1.5
_SIZE = (_WIDTH, _HEIGHT)


def draw_architecture(numbers: Mapping[str, Any], title: str) -> Any:
    """Return the stages of `describe_architecture` as a row of boxes, the exit after each below it, and MACs in all."""
    stages, exits = numbers['stages'], numbers['exits']
    columns = len(stages) + 2
    figure = new_figure(1.6 * columns, 4.2, title)
    axes = figure.subplots()
    axes.set(xlim=(-1.4, (columns - 1) * _STEP + 1.4), ylim=(-3.6, 1.2))
    axes.set_axis_off()
    channels, height, width = numbers['input_size']
    draw_box(axes, (0, 0), _SIZE, f'image\n{channels} x {height} x {width}', '0.9')
    for idx, stage in enumerate(stages, start=1):
        draw_arrow(axes, ((idx - 1) * _STEP + _WIDTH / 2, 0), (idx * _STEP - _WIDTH / 2, 0))
        draw_box(axes, (idx * _STEP, 0), _SIZE, describe_stage(stage), COLORS[5])
        if stage['exit'] is not None:
            draw_arrow(axes, (idx * _STEP, -_HEIGHT / 2), (idx * _STEP, -2.6 + _HEIGHT / 2))
            draw_box(axes, (idx * _STEP, -2.6), _SIZE, describe_exit(exits[stage['exit']]), COLORS[4])
    end = (len(stages) + 1) * _STEP
    draw_arrow(axes, (end - _STEP + _WIDTH / 2, 0), (end - _WIDTH / 2, 0))
    draw_box(axes, (end, 0), _SIZE, f'main\n{numbers["num_classes"]} classes', COLORS[4])
    return figure


def describe_stage(stage: Mapping[str, Any]) -> str:
    r"""Return what is written into the box of a stage.

    >>> describe_stage({'to': 'layer1', 'channels': 64, 'size': [8, 8], 'macs': 2_000_000, 'exit': 0})
    'to layer1\n64 x 8 x 8\n2.0 MMACs'
    """
    where = 'to the end' if stage['exit'] is None else f'to {stage["to"]}'
    shape = ' x '.join(map(str, [stage['channels'], *(stage['size'] or ())]))
    return f'{where}\n{shape}\n{format_macs(stage["macs"], ".1f")}'


def describe_exit(head: Mapping[str, Any]) -> str:
    """Return what is written into the box of an exit."""
    widths = '-'.join('pool' if width == 0 else str(width) for width in head['widths'])
    kind = f'{head["head"]} {widths}'.rstrip()
    return f'{head["name"]}\n{kind}\n{format_macs(head["macs"], ".1f")}'
