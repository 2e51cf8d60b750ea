"""Teachers: which classifiers teach and how they are weighed, and the distances of students to a teacher."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F

from timm_multiexit.config import MultiExitError

# Names of the output distances, and the weight that each has where none is given. The authors' script of the EED paper
# has these for 'kl' and 'mse'; the divergences are multiplied by T^2 besides.
OUTPUT_WEIGHTS = {'kl': 0.1, 'mse': 1.0, 'bernoulli': 0.1}


@dataclass(frozen=True)
class DepthWeights:
    """Weights that come from the depth of a classifier; the defaults weigh all alike.

    Attributes:
        teacher: Weights of the classifiers that teach, divided by their sum before use. A number b above 0 gives
            classifier i the weight b^i, 0 is the shallowest exit; a sequence has one number of 0 or more for each
            classifier that teaches, in the order in which the teacher names them ('all': shallow to deep).
        balance: The number a above 0. A classifier with j deeper ones has 2 - a^j as factor of its task term and a^j
            as factor of its output distance, so that with a > 1 the shallow ones learn more from the teacher and less
            from the labels; main has 1 and 1.

    Raises:
        MultiExitError: A number is out of range.

    Example:
        >>> [round(factor, 4) for factor in DepthWeights(balance=1.15).output_factors(4)]
        [1.5209, 1.3225, 1.15, 1.0]
        >>> [round(factor, 4) for factor in DepthWeights(balance=1.15).task_factors(4)]
        [0.4791, 0.6775, 0.85, 1.0]
    """

    teacher: float | Sequence[float] = 1.0
    balance: float = 1.0

    def __post_init__(self):
        if isinstance(self.teacher, Iterable):
            weights = checked_weights('DepthWeights.teacher', self.teacher)
            if sum(weights) == 0:
                raise MultiExitError(
                    f'DepthWeights.teacher is {list(weights)}, allowed are weights with a sum above 0;'
                    ' give at least one classifier a weight.'
                )
        else:
            weights = checked_number('DepthWeights.teacher', self.teacher, is_positive=True)
        object.__setattr__(self, 'teacher', weights)
        object.__setattr__(self, 'balance', checked_number('DepthWeights.balance', self.balance, is_positive=True))

    def output_factors(self, count: int) -> list[float]:
        """Return a^j for each of `count` classifiers, shallow to deep, main last."""
        return [self.balance**j for j in reversed(range(count))]

    def task_factors(self, count: int) -> list[float]:
        """Return 2 - a^j for each of `count` classifiers, shallow to deep, main last.

        Raises:
            MultiExitError: One is not above 0: that classifier would be rewarded for wrong answers.
        """
        factors = [2 - factor for factor in self.output_factors(count)]
        if min(factors) <= 0:
            most = math.ceil(math.log(2) / math.log(self.balance))
            raise MultiExitError(
                f'DepthWeights.balance is {self.balance} and gives the task term of the shallowest of {count}'
                f' classifiers the factor {min(factors):.4f} (2 - {self.balance}^{count - 1}), allowed are factors'
                f' above 0; use at most {most - 1} exits or a balance below {2 ** (1 / (count - 1)):.4f}.'
            )
        return factors


@dataclass(frozen=True)
class KDConfig:
    """How an outside teacher is weighed; names, defaults and the three modes are those of timm's scripts.

    Attributes:
        task_loss_weight: Factor of the task terms, None for 1.
        distill_loss_weight: Factor of the distances to the outside teacher; None is 1 when `task_loss_weight` is None
            too, else 1 - `task_loss_weight`.
        temperature: T of these distances, above 0.

    Raises:
        MultiExitError: A number is out of range.

    Example:
        >>> KDConfig().factors, KDConfig(task_loss_weight=0.25).factors, KDConfig(distill_loss_weight=3.0).factors
        ((1.0, 1.0), (0.25, 0.75), (1.0, 3.0))
    """

    task_loss_weight: float | None = None
    distill_loss_weight: float | None = None
    temperature: float = 4.0

    def __post_init__(self):
        for name in ('task_loss_weight', 'distill_loss_weight'):
            if getattr(self, name) is not None:
                checked_number(name, getattr(self, name))
        checked_number('temperature of the outside teacher', self.temperature, is_positive=True)
        if self.factors[1] < 0:
            raise MultiExitError(
                f'task_loss_weight is {self.task_loss_weight} and leaves {self.factors[1]:g} for the outside teacher;'
                ' give 0 to 1, or distill_loss_weight besides.'
            )

    @property
    def factors(self) -> tuple[float, float]:
        """The factors of the task terms and of the distances to the outside teacher."""
        task, distill = self.task_loss_weight, self.distill_loss_weight
        if distill is None:
            distill = 1.0 if task is None else 1.0 - task
        return (1.0 if task is None else float(task)), float(distill)


def checked_teacher(teacher: str | Sequence[int] | None) -> str | tuple[int, ...] | None:
    """Return the teacher that a user names, with a list as tuple.

    Args:
        teacher: None, 'main', 'all', or 0-based indices of classifiers; main is -1.

    Raises:
        MultiExitError: It is something else.
    """
    if teacher is None or (isinstance(teacher, str) and teacher in ('main', 'all')):
        return teacher
    is_list = isinstance(teacher, Sequence) and not isinstance(teacher, str)
    if not is_list or not teacher or not all(isinstance(idx, int) and not isinstance(idx, bool) for idx in teacher):
        raise MultiExitError(
            f"teacher is {teacher!r}, allowed are None, 'main', 'all' or a list of classifiers such as [0, -1];"
            ' name classifiers by 0-based index, shallow to deep, main is -1.'
        )
    return tuple(teacher)


def resolve_teacher(teacher: str | tuple[int, ...], weights: DepthWeights, count: int) -> dict[int, float]:
    """Return the classifiers that teach, as index from 0 -> weight, shallow to deep; the weights sum to 1.

    Args:
        teacher: As `checked_teacher` returns it, not None.
        weights: Gives their weights.
        count: Number of classifiers, main included.

    Raises:
        MultiExitError: A classifier is not there or is named twice, or there are not as many weights.

    Example:
        >>> resolve_teacher((-1, 0), DepthWeights(3.0), 2), resolve_teacher((-1, 0), DepthWeights([3.0, 1.0]), 2)
        ({0: 0.25, 1: 0.75}, {0: 0.25, 1: 0.75})
    """
    indices = {'all': tuple(range(count)), 'main': (-1,)}.get(teacher, teacher)
    if not all(-count <= idx < count for idx in indices):
        raise MultiExitError(
            f'teacher is {list(indices)}, but the model has {count} classifiers;'
            f' name them by 0 to {count - 1} (main), or from the end by -1 (main) to {-count}.'
        )
    members = [idx % count for idx in indices]
    if len(set(members)) < len(members):
        raise MultiExitError(
            f'teacher is {list(indices)} and names a classifier of this model twice;'
            f' name each once (main is -1 and {count - 1}).'
        )
    numbers = weights.teacher
    if isinstance(numbers, float):
        numbers = tuple(numbers**idx for idx in members)
    if len(numbers) != len(members):
        raise MultiExitError(
            f'DepthWeights.teacher has {len(numbers)} weights, but {len(members)} classifiers teach'
            f' (teacher is {teacher!r}); give one for each, or one number b for b^i.'
        )
    total = sum(numbers)
    return {idx: number / total for idx, number in sorted(zip(members, numbers))}


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


def checked_number(name: str, value: float, is_positive: bool = False) -> float:
    """Return a finite number of 0 or more, or above 0, as float.

    Args:
        name: What it is called in the message.
        value: The number.
        is_positive: 0 is not allowed.

    Raises:
        MultiExitError: It is something else.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (is_positive and value == 0):
        allowed = 'above 0' if is_positive else 'of 0 or more'
        raise MultiExitError(f'{name} is {value!r}, allowed is a finite number {allowed}; change it.')
    return float(value)


def checked_weights(name: str, weights: Iterable[float]) -> tuple[float, ...]:
    """Return a list of finite numbers of 0 or more as floats.

    Args:
        name: What it is called in the message.
        weights: The numbers.

    Raises:
        MultiExitError: It is something else.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise MultiExitError(
            f'{name} is {weights!r}, allowed is a list with one number for each classifier;'
            ' give them exits shallow to deep, then main.'
        )
    return tuple(checked_number(f'{name}[{idx}]', weight) for idx, weight in enumerate(weights))


def checked_logits(outputs: Any) -> Sequence[torch.Tensor]:
    """Return the logits of all classifiers.

    Args:
        outputs: What a model returns with `exits=True`.

    Raises:
        MultiExitError: There are none, or their shapes differ.
    """
    logits = getattr(outputs, 'logits', None)
    if not isinstance(logits, (tuple, list)) or not logits:
        raise MultiExitError(
            f'Outputs of type {type(outputs).__name__} have no tuple of logits, allowed is what a multi-exit model'
            ' returns for all its exits; call the model with exits=True.'
        )
    if any(tensor.shape != logits[0].shape for tensor in logits):
        shapes = ', '.join(str(list(tensor.shape)) for tensor in logits)
        raise MultiExitError(
            f'Logits have the shapes {shapes}, allowed is one shape [B, C] for all classifiers;'
            ' give every exit the same batch and num_classes as main.'
        )
    return logits


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float tensor in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def full_precision(device_type: str) -> AbstractContextManager:
    """Return a context without autocast."""
    # Not asked of torch.amp.is_autocast_available, which torch.compile does not trace in torch 2.8.
    return nullcontext() if device_type == 'meta' else torch.autocast(device_type, enabled=False)
