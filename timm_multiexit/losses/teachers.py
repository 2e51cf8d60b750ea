"""Teachers: which classifiers teach, and how they are weighed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_multiexit.utils.errors import InvalidValueError, checked_number, checked_weights, is_integer

# How the classifiers of a teacher are weighed: all alike (or by `DepthWeights`), or by `follow_skill`.
TEACHER_WEIGHTS = ('equal', 'skill')

# Of `follow_skill`: its rate, not tuned, and what it shares out evenly at every step, so that a classifier that was
# poor at first can come back.
SKILL_RATE = 0.3
SKILL_SHARE = 0.001


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
        InvalidValueError: A number is out of range.

    Example:
        >>> [round(factor, 4) for factor in DepthWeights(balance=1.15).output_factors(4)]
        [1.5209, 1.3225, 1.15, 1.0]
        >>> [round(factor, 4) for factor in DepthWeights(balance=1.15).task_factors(4)]
        [0.4791, 0.6775, 0.85, 1.0]
    """

    teacher: float | Sequence[float] = 1.0
    balance: float = 1.0

    def __post_init__(self) -> None:
        weights: float | tuple[float, ...]
        if isinstance(self.teacher, Iterable):
            weights = checked_weights('DepthWeights.teacher', self.teacher)
            if sum(weights) == 0:
                raise InvalidValueError(
                    f'DepthWeights.teacher must have a sum > 0, got {list(weights)}. Give at least one classifier a'
                    ' weight.'
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
            InvalidValueError: One is not above 0: that classifier would be rewarded for wrong answers.
        """
        factors = [2 - factor for factor in self.output_factors(count)]
        if min(factors) <= 0:
            most = math.ceil(math.log(2) / math.log(self.balance))
            raise InvalidValueError(
                f'DepthWeights.balance is {self.balance} and gives the task term of the shallowest of {count}'
                f' classifiers the factor {min(factors):.4f} (2 - {self.balance}^{count - 1}), which must be > 0. Use'
                f' at most {most - 1} exits or a balance below {2 ** (1 / (count - 1)):.4f}.'
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
        InvalidValueError: A number is out of range.

    Example:
        >>> KDConfig().factors, KDConfig(task_loss_weight=0.25).factors, KDConfig(distill_loss_weight=3.0).factors
        ((1.0, 1.0), (0.25, 0.75), (1.0, 3.0))
    """

    task_loss_weight: float | None = None
    distill_loss_weight: float | None = None
    temperature: float = 4.0

    def __post_init__(self) -> None:
        for name in ('task_loss_weight', 'distill_loss_weight'):
            if getattr(self, name) is not None:
                checked_number(name, getattr(self, name))
        checked_number('temperature of the outside teacher', self.temperature, is_positive=True)
        if self.factors[1] < 0:
            raise InvalidValueError(
                f'task_loss_weight must be in [0, 1] without distill_loss_weight, got {self.task_loss_weight}, which'
                f' leaves {self.factors[1]:g} for the outside teacher.'
            )

    @property
    def factors(self) -> tuple[float, float]:
        """The factors of the task terms and of the distances to the outside teacher."""
        task, distill = self.task_loss_weight, self.distill_loss_weight
        if distill is None:
            distill = 1.0 if task is None else 1.0 - task
        return (1.0 if task is None else float(task)), float(distill)


def checked_teacher(teacher: str | Sequence[int] | None) -> str | tuple[int, ...] | None:
    """Return the teacher that a user names: None, 'main', 'all', or 0-based indices of classifiers as tuple."""
    if teacher is None or (isinstance(teacher, str) and teacher in ('main', 'all')):
        return teacher
    indices = tuple(teacher) if isinstance(teacher, Sequence) and not isinstance(teacher, str) else ()
    if not indices or not all(map(is_integer, indices)):
        raise InvalidValueError(
            f"teacher must be None, 'main', 'all' or a list of classifiers such as [0, -1], got {teacher!r}. Name"
            ' classifiers by 0-based index, shallow to deep; main is -1.'
        )
    return tuple(map(int, indices))


def resolve_teacher(teacher: str | tuple[int, ...], weights: DepthWeights, count: int) -> dict[int, float]:
    """Return who of `count` classifiers teaches, as index from 0 -> weight, shallow to deep; the weights sum to 1.

    Raises:
        InvalidValueError: A classifier is not there or is named twice, or there are not as many weights.

    >>> resolve_teacher((-1, 0), DepthWeights(3.0), 2), resolve_teacher((-1, 0), DepthWeights([3.0, 1.0]), 2)
    ({0: 0.25, 1: 0.75}, {0: 0.25, 1: 0.75})
    """
    indices = {'all': tuple(range(count)), 'main': (-1,)}[teacher] if isinstance(teacher, str) else teacher
    if not all(-count <= idx < count for idx in indices):
        raise InvalidValueError(
            f'teacher must name classifiers by 0 to {count - 1} (main), or from the end by -1 (main) to {-count},'
            f' since the model has {count} classifiers, got {list(indices)}.'
        )
    members = [idx % count for idx in indices]
    if len(set(members)) < len(members):
        raise InvalidValueError(
            f'teacher must name each classifier once, got {list(indices)}, which names one twice (main is -1 and'
            f' {count - 1}).'
        )
    base = weights.teacher
    numbers = tuple(base) if isinstance(base, Sequence) else tuple(base**idx for idx in members)
    if len(numbers) != len(members):
        raise InvalidValueError(
            f'DepthWeights.teacher has {len(numbers)} weights, but {len(members)} classifiers teach'
            f' (teacher is {teacher!r}). Give one for each, or one number b for b^i.'
        )
    total = sum(numbers)
    return {idx: number / total for idx, number in sorted(zip(members, numbers))}


@torch.no_grad()
def skill_gradient(weights: Tensor, logits: Tensor, target: Tensor, *, multi_label: bool = False) -> Tensor:
    """Return the gradient of a teacher's cross-entropy by the weights of its classifiers, [M].

    The teacher's cross-entropy L(w) = CE(sum_i w_i z_i, y) is convex in the weights w, and where one of them is 1 it is
    that of this classifier alone:

        g_i = dL/dw_i = mean over the batch of z_i . (softmax(sum_j w_j z_j) - y)

    Under distributed training g is averaged over all processes.

    Args:
        weights: w, [M] float, above 0, with a sum of 1.
        logits: z, [M, B, C] float.
        target: Class indices [B] of any integer type, or probabilities [B, C] float.
        multi_label: Classes do not exclude each other: binary cross-entropy averaged over classes, with sigmoid.
    """
    mean = (weights.view(-1, 1, 1) * logits).sum(0)  # [B, C]; not a product of matrices, which may be in TF32
    if target.ndim == 1:
        is_labeled = target >= 0  # the others cross-entropy leaves out: its ignore_index is below 0
        target = F.one_hot(target.long().clamp(min=0), mean.shape[-1])
    else:
        is_labeled = torch.ones_like(target[:, 0], dtype=torch.bool)
    errors = (mean.sigmoid() if multi_label else mean.softmax(-1)) - target.to(mean.dtype)
    gradient = ((logits * errors).sum(-1) * is_labeled).sum(-1) / is_labeled.sum().clamp(min=1)  # [M]
    gradient = gradient / (mean.shape[-1] if multi_label else 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
        gradient = gradient / torch.distributed.get_world_size()
    return gradient


def follow_skill(weights: Tensor, gradient: Tensor) -> Tensor:
    """Return the weights of a teacher's classifiers after an update: less for those that make its answer worse.

    One step of exponentiated gradient goes down the teacher's cross-entropy within the simplex, and a small share e is
    spread evenly:

        w_i <- (1 - e) * w_i exp(-r g_i) / sum_j w_j exp(-r g_j) + e / M,    r = 0.3, e = 0.001, M classifiers

    Over a run the mean cross-entropy of a teacher weighed so comes down to that of the best fixed weights, which is at
    most that of the best single classifier and at most that of the even mean. Weights stay as they are where g is not
    finite.

    Args:
        weights: w, [M] float, above 0, with a sum of 1.
        gradient: g, [M] float, see `skill_gradient`.

    Source: Kivinen and Warmuth, Exponentiated Gradient versus Gradient Descent for Linear Predictors, 1997; the even
        share is that of Herbster and Warmuth, Tracking the Best Expert, 1998.

    >>> right, wrong = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> even = torch.tensor([0.5, 0.5])
    >>> follow_skill(even, skill_gradient(even, torch.stack([right, wrong]), torch.tensor([0])))
    tensor([0.7683, 0.2317])
    """
    moved = torch.softmax(weights.log() - SKILL_RATE * gradient, 0)
    moved = (1 - SKILL_SHARE) * moved + SKILL_SHARE / len(weights)
    return torch.where(gradient.isfinite().all(), moved, weights)
