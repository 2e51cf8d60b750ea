"""What can be said of timm's models without their weights: what heads cost, and which models take exits."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_text

POPULAR = tuple(
    """
    resnet18 resnet50 resnet10t mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0
    convnext_tiny regnety_008 densenet121 vgg19_bn ghostnet_100 repvit_m1 fastvit_t8 swin_tiny_patch4_window7_224
    vit_small_patch16_224 vit_tiny_patch16_224 deit_tiny_patch16_224 mobilevit_s hgnetv2_b0
    """.split()
)


_LINE_END = ',\n  '


def create_backbone(name: str) -> nn.Module:
    """Return a timm model, with a classifier if it has none by default."""
    backbone: nn.Module = timm.create_model(name)
    return backbone if backbone.num_classes else timm.create_model(name, num_classes=1000)


def create_empty_model(name: str) -> MultiExitModel:
    """Return a model with exits whose tensors hold no data."""
    with torch.device('meta'):
        backbone = create_backbone(name)
    return attach_exits(backbone)


def count_heads(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return for each model what its exits cost, in percent of the backbone's MACs."""
    rows = []
    for name in names:
        *costs, main_cost = create_empty_model(name).cost()
        total = main_cost.fixed.macs
        rows.append(
            {
                'model': name,
                'GMACs': total / 1e9,
                'heads, % of MACs': ' '.join(f'{100 * cost.head.macs / total:.1f}' for cost in costs),
                'fixed, % of MACs': ' '.join(f'{100 * cost.fixed.macs / total:.0f}' for cost in costs),
                'sequential, %': f'{100 * main_cost.sequential.macs / total:.1f}',
            }
        )
    return rows


def look_at_model(name: str) -> dict[str, Any]:
    """Return the row of a model: its family, what its stages give and what exits cost, or why it takes none.

    `heads` and `fixed` are the MACs of each exit's head alone, and of its answer, as shares of the backbone's.
    """
    with torch.device('meta'):
        backbone = create_backbone(name)
    row: dict[str, Any] = {'model': name, 'family': type(backbone).__name__}
    try:
        model = attach_exits(backbone)
    except MultiExitError as error:
        return row | {'reason': str(error)}
    *costs, main = model.cost()
    return row | {
        'px': model.input_size[-1],
        'layout': ' and '.join(sorted({spec.layout for spec in model.exits.specs})),
        'exits': len(costs),
        'heads': [round(cost.head.macs / main.fixed.macs, 5) for cost in costs],
        'fixed': [round(cost.fixed.macs / main.fixed.macs, 4) for cost in costs],
    }


def try_family(family: str) -> dict[str, Any]:
    """Return at which exits of a family's smallest member samples can leave the batch, found by trying."""
    from tests.helpers.families import make_small

    torch.manual_seed(0)
    model = make_small(family)
    return {
        'family': family,
        'model': model.pretrained_cfg['architecture'],
        'px': model.input_size[-1],
        'can_leave': list(model.can_leave),
    }


def measure_coverage(
    names: Sequence[str], families: Sequence[str], path: Path, *, again: bool, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Look at models and try families, write the rows as JSON to a path now and then, and return what is written.

    Rows that are in the file stay, and are not made anew unless `again`.
    """
    content: dict[str, Any] = {'models': [], 'families': []}
    if path.is_file():
        content = json.loads(path.read_text(encoding='utf-8'))
    models = {row['model']: row for row in content['models']}
    tried = {row['family']: row for row in content['families']}

    def write() -> dict[str, Any]:
        stamp = describe_environment() | {'timm': timm.__version__}
        rows = {'models': [models[key] for key in sorted(models)], 'families': [tried[key] for key in sorted(tried)]}
        # A row a line.
        parts = [f' {json.dumps(key)}: {json.dumps(value)}' for key, value in stamp.items()]
        parts += [f' "{key}": [\n  {_LINE_END.join(map(json.dumps, value))}\n ]' for key, value in rows.items()]
        write_text(path, '{\n' + ',\n'.join(parts) + '\n}\n')
        return stamp | rows

    for count, name in enumerate(names if again else [name for name in names if name not in models], 1):
        models[name] = look_at_model(name)
        if 'reason' in models[name]:
            show(f'{name}: {models[name]["reason"]}')
        if count % 50 == 0:
            write()
            show(f'{count} models')
    for family in families if again else [family for family in families if family not in tried]:
        tried[family] = try_family(family)
        show(f'{family}: samples can leave at {tried[family]["can_leave"]}')
    return write()
