"""Tensors and lines of figures, for tests of the analysis."""

import torch


def labels(text):
    return torch.tensor([int(item) for item in text])


def random_logits(count=3, num=40, classes=5):
    return [torch.randn(num, classes) for _ in range(count)]


def line_data(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
