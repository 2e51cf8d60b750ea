"""Heads that learn from the images that reach them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def survivor_weights(logits: Sequence[Tensor]) -> list[Tensor]:
    """Return for each classifier how much each image counts there: by its chance to arrive.

    An image leaves at the first exit j whose confidence c_j, the largest probability, reaches the threshold. What
    the threshold will be is not known in training; of all in [0, 1], drawn evenly, an image is still there at exit k
    with

        r_k = 1 - max over j < k of c_j

    and counts w_k = r_k / mean over the batch of r_k, so that the weights of a classifier have a mean of 1 and its
    learning rate means the same. The first exit sees all images, w_0 = 1. Each process divides by the mean of its own
    part of a batch, as it does for the loss.

    Args:
        logits: z, one [B, C] float tensor for each exit, shallow to deep; further classifiers may follow.

    Returns:
        One [B] tensor for each.

    Source: heads trained on the survivors of a cascade with a frozen backbone are the idea of CalexNet, Aperstein and
        Apartsin, arXiv 2509.08318; the weights here are ours.

    >>> exits = [torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.zeros(2, 2)]  # the second image is sure at once
    >>> [weights.round(decimals=3).tolist() for weights in survivor_weights(exits)]
    [[1.0, 1.0], [2.0, 0.0]]
    """
    log_left = torch.zeros_like(logits[0][:, 0])  # log of 1 - c, the probability of all other classes
    weights = [torch.ones_like(log_left)]
    for tensor in logits[:-1]:
        log_probs = F.log_softmax(tensor, -1)
        others = log_probs.scatter(-1, log_probs.argmax(-1, keepdim=True), -torch.inf)
        log_left = torch.minimum(log_left, others.logsumexp(-1))
        # Divided in logarithms: of images that all are sure the differences count.
        weights.append(torch.softmax(log_left, 0) * len(log_left))
    return weights


def weigh_survivors(tensors: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of the same values whose gradients are multiplied by the weights of the images, but for main's.

    A loss that is a mean over the images has then the gradient of the weighted mean, whatever loss it is.

    Args:
        tensors: Logits or features, one [B, N] float tensor for each classifier, shallow to deep, main last.
        logits: As for `survivor_weights`, main's too.
    """
    *exits, main = tensors
    weights = survivor_weights([tensor.detach() for tensor in logits[: len(exits)]])
    weighed = []
    for tensor, weight in zip(exits, weights):
        fixed = tensor.detach()
        moved = fixed + weight.unsqueeze(-1) * (tensor - fixed)
        weighed.append(torch.where(fixed.isfinite(), moved, fixed))  # classes that are masked out are minus infinity
    return [*weighed, main]
