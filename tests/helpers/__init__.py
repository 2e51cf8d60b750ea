"""What tests of several folders share."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


def cases(table, slow=()):
    """Return a table of cases, id -> value or values, as pytest takes them; those named in `slow` are slow tests."""
    assert set(slow) <= set(table)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), id=name, marks=[pytest.mark.slow] * (name in slow)
        )
        for name, value in table.items()
    ]


def enliven(model):
    """Move what timm starts at zero or one (last norms, layer scale, BN statistics), so that every layer counts."""
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim < 2:
                param.add_(torch.rand_like(param) * 0.4 - 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def write_images(root, num_train=12):
    generator = np.random.RandomState(0)
    for split, counts in (('train', (num_train, num_train)), ('val', (5, 6))):
        for label, (name, count) in enumerate(zip(('cat', 'dog'), counts)):
            (root / split / name).mkdir(parents=True)
            for idx in range(count):
                pixels = generator.randint(0, 80, (40, 40, 3)).astype('uint8')
                pixels[:, :, label] += 150
                Image.fromarray(pixels).save(root / split / name / f'{idx}.jpg')
    return root
