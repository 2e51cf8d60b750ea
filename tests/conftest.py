"""Fixtures of all tests: seeded, one thread, small models with lively weights."""

import pytest
import timm
import torch
from torch import nn

from timm_multiexit.attach import attach_exits

# Two busy cores make a second OpenMP thread wait more than it works: 30 times slower, measured.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _enliven(model):
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


@pytest.fixture
def make_backbone():
    """Return a function that makes a plain timm model of ten classes."""

    def make(name='test_resnet', *, num_classes=10, **kwargs):
        return _enliven(timm.create_model(name, num_classes=num_classes, **kwargs))

    return make


@pytest.fixture
def make_model(make_backbone):
    """Return a function that makes a multi-exit model; keywords go to `attach_exits`."""

    def make(name='test_resnet', exits='auto', *, num_classes=10, input_size=(3, 64, 64), **kwargs):
        backbone = make_backbone(name, num_classes=num_classes)
        return _enliven(attach_exits(backbone, exits, input_size=input_size, **kwargs))

    return make
