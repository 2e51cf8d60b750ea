"""Distances of students to the outputs of a teacher, and in which precision they are computed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError

# Names of the output distances, and the weight that each has where none is given. The authors' script of the EED paper
# has these for 'kl' and 'mse'; the divergences are multiplied by T^2 besides.
OUTPUT_WEIGHTS = {'kl': 0.1, 'mse': 1.0, 'bernoulli': 0.1}


def output_distance(kind: str, students: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return how far each student's outputs are from the teacher's, [S], averaged over the batch.

    Args:
        kind: 'kl', T^2 * KL(softmax(t / T) || softmax(s / T)), summed over classes; 'bernoulli', the same of
            independent classes, T^2 * KL(sigmoid(t / T) || sigmoid(s / T)), averaged over classes; or 'mse',
            (t - s)^2 averaged over classes.
        students: Logits s, [S, B, C].
        teacher: Logits t, [B, C].
        temperature: T; 'mse' has none.
    """
    if kind == 'mse':
        return (students - teacher).square().mean((1, 2))
    students, teacher = students / temperature, teacher / temperature
    if kind == 'kl':
        log_student, log_teacher = F.log_softmax(students, dim=-1), F.log_softmax(teacher, dim=-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)  # [S, B]
    else:
        yes = F.logsigmoid(teacher).exp() * (F.logsigmoid(teacher) - F.logsigmoid(students))
        no = F.logsigmoid(-teacher).exp() * (F.logsigmoid(-teacher) - F.logsigmoid(-students))
        divergence = (yes + no).mean(-1)  # [S, B]
    return divergence.mean(-1) * temperature**2


def scale_rows(rows: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """Return each of the rows [K+1] times its factor."""
    if all(factor == 1.0 for factor in factors):
        return rows
    # A tensor of the factors would be copied to the device at every call; Python numbers are not.
    return torch.stack([factor * rows[idx] for idx, factor in enumerate(factors)])


def checked_logits(outputs: Any) -> Sequence[torch.Tensor]:
    """Return the logits of all classifiers, or raise if they are missing or their shapes differ."""
    logits = getattr(outputs, 'logits', None)
    if not isinstance(logits, (tuple, list)) or not logits:
        raise InvalidTypeError(
            f'outputs must have a tuple of logits, got type {type(outputs).__name__}. Call the model with exits=True.'
        )
    if any(tensor.shape != logits[0].shape for tensor in logits):
        shapes = ', '.join(str(list(tensor.shape)) for tensor in logits)
        raise InvalidValueError(
            f'Logits must have one shape [B, C] for all classifiers, got {shapes}. Give every exit the same batch and'
            ' num_classes as main.'
        )
    return logits


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float tensor in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    # Not asked of torch.amp.is_autocast_available, which torch.compile does not trace in torch 2.8.
    return nullcontext() if device_type == 'meta' else torch.autocast(device_type, enabled=False)
