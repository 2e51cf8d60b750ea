"""Logits made by hand or at random."""

import torch


def of_probabilities(*rows):
    """Return float64 logits whose softmax is these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def make_logits(num=200, num_classes=7, num_exits=3):
    """Return logits that agree with the targets more and more, and targets."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(num_classes, (num,), generator=generator)
    truth = torch.nn.functional.one_hot(targets, num_classes).float()
    logits = [
        torch.randn(num, num_classes, generator=generator) * 1.5 + idx * 1.2 * truth for idx in range(num_exits + 1)
    ]
    return logits, targets
