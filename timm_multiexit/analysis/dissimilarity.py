"""Figure 4: how unlike the representations of images are, before and after the linear layer of each classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.utils.text import exit_names

_PER_CLASS = 10  # images at least, or there would be too few pairs within classes
_MAX_CLASSES = 100  # of the matrix of classes that is written


def choose_samples(targets: Tensor, num: int, *, seed: int = 0) -> list[int]:
    """Return places of images sorted by class: as many of each class, and ten or more of each if possible.

    There are `num` images at most, 2 or more, of two classes at least. The choice depends on targets and seed alone, so
    it is the same for all runs.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    classes = targets.unique()
    count = min(len(classes), max(2, num // _PER_CLASS))
    chosen = classes[torch.randperm(len(classes), generator=generator)[:count]].sort().values.tolist()
    places = [order[targets[order] == label].tolist() for label in chosen]
    quotas = [num // count + (idx < num % count) for idx in range(count)]
    return [place for own, quota in zip(places, quotas) for place in sorted(own[:quota])]


def dissimilarity_matrix(vectors: Tensor) -> Tensor:
    """Return 1 - Pearson's correlation between each two rows, one per sample, [N, N] in 0 to 2; features are flattened.

    A sample whose numbers are all the same correlates with nothing: 1 to all others, 0 to itself.

    Source: Lee and Lee, arXiv 2104.00299, figure 4, after Kriegeskorte et al. 2008.

    >>> vectors = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0], [5.0, 5.0, 5.0]])
    >>> dissimilarity_matrix(vectors).round(decimals=6).tolist()[0]
    [0.0, 0.0, 2.0, 1.0]
    """
    rows = vectors.flatten(1).double()
    centered = rows - rows.mean(1, keepdim=True)
    norms = centered.norm(dim=1, keepdim=True)
    # What rounding leaves of equal numbers has no direction.
    is_flat = norms <= 1e-12 * rows.norm(dim=1, keepdim=True)
    unit = torch.where(is_flat, 0.0, centered / norms.clamp(min=torch.finfo(torch.float64).tiny))
    matrix = (1 - unit @ unit.T).clamp(0, 2)
    return matrix.fill_diagonal_(0)


def block_means(matrix: Tensor, targets: Tensor) -> dict[str, float | None]:
    """Return the means of a dissimilarity matrix [N, N] within and between classes, and `ratio`, between over within.

    A sample is not paired with itself. The larger the ratio, the clearer the classes. A mean without pairs is None, and
    so is a ratio without both means.

    >>> block_means(torch.tensor([[0.0, 0.2, 0.9], [0.2, 0.0, 0.7], [0.9, 0.7, 0.0]]), torch.tensor([0, 0, 1]))
    {'within': 0.2, 'between': 0.8, 'ratio': 4.0}
    """
    is_same = targets[:, None] == targets[None]
    others = ~torch.eye(len(targets), dtype=torch.bool)
    means = [matrix[mask].double().mean().item() if mask.any() else None for mask in (is_same & others, ~is_same)]
    within, between = (None if mean is None else round(mean, 6) for mean in means)
    return {
        'within': within,
        'between': between,
        'ratio': round(between / within, 6) if within and between is not None else None,
    }


def class_means(matrix: Tensor, targets: Tensor) -> Tensor:
    """Return the mean dissimilarity between each two classes that there are, [C, C], classes in order of their index.

    A sample of the matrix [N, N] is not paired with itself; a class of one sample has NaN to itself.
    """
    _, places = targets.unique(return_inverse=True)
    members = torch.nn.functional.one_hot(places).double()  # [N, C]
    counts = members.sum(0)
    pairs = counts[:, None] * counts[None] - counts.diag()
    return (members.T @ matrix.double().clone().fill_diagonal_(0) @ members) / pairs


def describe_dissimilarity(
    features: Sequence[Tensor], logits: Sequence[Tensor], targets: Tensor
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Return the numbers of the figure, and its matrices [N, N] by `before` and `after`, main last.

    `features`, [N, D_k], enter the linear layer of each classifier, `logits`, [N, C], leave it; samples are sorted by
    their targets, [N].
    """
    matrices = {
        'before': [dissimilarity_matrix(single) for single in features],
        'after': [dissimilarity_matrix(single) for single in logits],
    }
    names, classes = exit_names(len(logits) - 1), targets.unique()
    numbers: dict[str, Any] = {'num_samples': len(targets), 'classes': classes.tolist()}
    for side, found in matrices.items():
        numbers[side] = {name: block_means(matrix, targets) for name, matrix in zip(names, found)}
        if len(classes) <= _MAX_CLASSES:
            for name, matrix in zip(names, found):
                numbers[side][name]['class_means'] = class_means(matrix, targets).tolist()
    return numbers, matrices
