"""Figure 2: where classifiers agree, by what they predict and by whether they are right."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.utils.errors import DataError
from timm_multiexit.utils.text import ENSEMBLE, exit_names

_MAX_CLASSES = 100  # of a confusion matrix that is written and drawn
_NUM_PAIRS = 10


def predict_classes(logits: Sequence[Tensor]) -> Tensor:
    """Return the classes that classifiers of logits [N, C] predict, and then their ensemble, the mean, [K + 1, N]."""
    mean = sum(logits[1:], logits[0]) / len(logits)
    return torch.stack([single.argmax(-1) for single in (*logits, mean)])


def agreement_matrix(predictions: Tensor) -> Tensor:
    """Return the share of images for which each two rows of predictions [K, N] are the same class, [K, K] in 0 to 1.

    >>> agreement_matrix(torch.tensor([[0, 1, 2, 2], [0, 1, 1, 1]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    return torch.stack([row.eq(predictions).double().mean(-1) for row in predictions])


def outcome_confusion(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the shares of images by whether each two rows of predictions [K, N] are right, [K, K, 2, 2] in 0 to 1.

    Entry [i, j, a, b] is the share for which classifier i is right (a = 0) or wrong (a = 1) and j is b; `targets` are
    class indices, [N].

    >>> outcome_confusion(torch.tensor([[0, 1, 2, 2], [0, 0, 2, 0]]), torch.tensor([0, 1, 2, 0]))[0, 1].tolist()
    [[0.5, 0.25], [0.25, 0.0]]
    """
    is_right = predictions.eq(targets)
    sides = torch.stack([is_right, ~is_right], 1).double()  # [K, 2, N]
    return torch.einsum('ian,jbn->ijab', sides, sides) / len(targets)


def prediction_confusion(rows: Tensor, columns: Tensor, num_classes: int) -> Tensor:
    """Return the shares of images by what two classifiers predict, [C, C] in 0 to 1, of their class indices, [N].

    >>> prediction_confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2).tolist()
    [[0.25, 0.25], [0.0, 0.5]]
    """
    counts = torch.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).double() / len(rows)


def frequent_pairs(rows: Tensor, columns: Tensor, num: int = _NUM_PAIRS) -> list[tuple[int, int, float]]:
    """Return the most frequent different predictions of two classifiers: (class, other class, share of all images).

    >>> frequent_pairs(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 2, 1]), 1)
    [(0, 1, 0.5)]
    """
    pairs = torch.stack([rows, columns], 1)[rows != columns]
    found, counts = pairs.unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:num]
    return [(*found[idx].tolist(), counts[idx].item() / len(rows)) for idx in order]


def describe_agreement(logits: Sequence[Tensor], targets: Tensor) -> dict[str, Any]:
    """Return the numbers of the figure, of one tensor of logits [N, C] per classifier, main last, and targets [N].

    Returns:
        `classifiers` (the ensemble last), `same_prediction` [K, K], `outcomes` [K, K, 2, 2], and against main of every
        exit `frequent_pairs` (class of the exit, class of main, share) and, up to 100 classes, `confusions` [C, C] with
        the exit in rows.

    Raises:
        DataError: A target is not a class of the network.
    """
    num_exits, num_classes = len(logits) - 1, logits[-1].shape[1]
    if targets.min() < 0 or targets.max() >= num_classes:
        raise DataError(
            f'Targets must be in [0, {num_classes - 1}], the classes of the network, got {targets.min()} to'
            f' {targets.max()}. Give the data that it was trained on.'
        )
    predictions = predict_classes(logits)
    main = predictions[num_exits]
    exits = dict(zip(exit_names(num_exits)[:-1], predictions))
    confusions = {}
    if num_classes <= _MAX_CLASSES:
        confusions = {name: prediction_confusion(row, main, num_classes).tolist() for name, row in exits.items()}
    return {
        'classifiers': [*exit_names(num_exits), ENSEMBLE],
        'same_prediction': agreement_matrix(predictions).tolist(),
        'outcomes': outcome_confusion(predictions, targets).tolist(),
        'frequent_pairs': {name: frequent_pairs(row, main) for name, row in exits.items()},
        'confusions': confusions,
    }
