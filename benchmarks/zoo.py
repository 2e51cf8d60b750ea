"""What can be said of timm's models without their weights: what heads cost, and which models take exits."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import timm
import torch

from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import MultiExitError

POPULAR = tuple(
    """
    resnet18 resnet50 resnet10t mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0
    convnext_tiny regnety_008 densenet121 vgg19_bn ghostnet_100 repvit_m1 fastvit_t8 swin_tiny_patch4_window7_224
    vit_small_patch16_224 vit_tiny_patch16_224 deit_tiny_patch16_224 mobilevit_s hgnetv2_b0
    """.split()
)


def create_empty_model(name: str) -> MultiExitModel:
    """Return a model with exits whose tensors hold no data."""
    with torch.device('meta'):
        backbone = timm.create_model(name)
        if backbone.num_classes == 0:
            backbone = timm.create_model(name, num_classes=1000)
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


def count_layouts(names: Iterable[str]) -> tuple[Counter[str], dict[str, str]]:
    """Return how many models take exits, by what their stages give, and why the others do not."""
    kinds: Counter[str] = Counter()
    refused = {}
    for name in names:
        try:
            specs = create_empty_model(name).exits.specs
        except MultiExitError as error:
            refused[name] = str(error)
            continue
        kinds[' and '.join(sorted({spec.layout for spec in specs}))] += 1
    return kinds, refused
