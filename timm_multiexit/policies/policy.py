"""Policies: which exit answers for which sample. Pure functions on logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from timm_multiexit.utils.errors import CheckpointError, InvalidTypeError, InvalidValueError, brief, is_number


class Prediction(NamedTuple):
    """What a policy answers for a batch.

    Attributes:
        logits: [B, C] float tensor, the answer of each sample in input order: logits of the exit it left at, divided
            by that exit's temperature, or the combination of the exits it saw.
        exit_idx: [B] int64 tensor, the exit that each sample left at; main is the number of exits.
    """

    logits: Tensor
    exit_idx: Tensor


# torch.export.save writes a NamedTuple only under a registered name, for which it has no public call (torch 2.15).
_register_namedtuple(Prediction, serialized_type_name='timm_multiexit.Prediction')


def _confidence(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


def _entropy(logits: Tensor) -> Tensor:
    # Rounding takes equal logits above 1, where a threshold of 1 must let everything leave.
    return (torch.special.entr(logits.softmax(-1)).sum(-1) / math.log(logits.shape[-1])).clamp(max=1)


def _margin(logits: Tensor) -> Tensor:
    first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


class Criterion(NamedTuple):
    """One row of `CRITERIA`.

    Attributes:
        score: Logits [N, C] -> scores [N]; None for patience, whose score counts exits.
        leaves_at_least: A sample leaves where its score is at least the threshold; otherwise at most.
    """

    score: Callable[[Tensor], Tensor] | None
    leaves_at_least: bool


# Shares of one, but for patience, whose threshold is a number of exits.
CRITERIA: dict[str, Criterion] = {
    'confidence': Criterion(_confidence, True),  # largest probability: Huang et al., 2018 (MSDNet)
    'entropy': Criterion(_entropy, False),  # of its largest value, log C: Teerapittayanon et al., 2016 (BranchyNet)
    'margin': Criterion(_margin, True),  # largest probability less the second
    'patience': Criterion(None, True),  # exits that agreed with the one before, without a break: Zhou et al., 2020
}

COMBINATIONS = ('mean', 'geometric')
TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class ExitPolicy:
    """The rule that says where a sample leaves: at the first exit whose score passes its threshold, else at main.

    Attributes:
        criterion: Key of `CRITERIA`. A sample leaves where its 'confidence' (largest probability) or its 'margin'
            (largest less second) is at least the threshold, where its 'entropy' (as a share of the largest, log C) is
            at most the threshold, or where 'patience' counts so many exits in a row that agreed with the one before.
        thresholds: One per exit, shallow to deep, without main: in [0, 1], of patience 1, 2, ...; None for an exit
            that is not used, neither run nor charged.
        temperatures: One per classifier, main last, above 0; logits are divided by them. Empty for none.
        combine: What answers: None, the exit alone; 'mean', the mean of the logits of the used exits so far;
            'geometric', the normalized geometric mean of their probabilities. Scores are of what answers.

    Raises:
        InvalidTypeError: Thresholds or temperatures are not a tuple or list.
        InvalidValueError: Unknown criterion or combination, or a number out of range.

    >>> ExitPolicy('confidence', (0.9, None, 0.8)).used
    (0, 2)
    """

    criterion: str = 'confidence'
    thresholds: tuple[float | None, ...] = ()
    temperatures: tuple[float, ...] = ()
    combine: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, str) or self.criterion not in CRITERIA:
            raise InvalidValueError(f'criterion must be one of {", ".join(CRITERIA)}, got {brief(self.criterion)}.')
        if self.combine is not None and not (isinstance(self.combine, str) and self.combine in COMBINATIONS):
            raise InvalidValueError(f'combine must be None, {" or ".join(COMBINATIONS)}, got {brief(self.combine)}.')
        for name in ('thresholds', 'temperatures'):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise InvalidTypeError(f'{name} must be a sequence of numbers, got {brief(getattr(self, name))}.')
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for threshold in self.thresholds:
            self._check_threshold(threshold)
        # JSON cannot hold numpy's numbers.
        kind = int if self.criterion == 'patience' else float
        thresholds = (None if threshold is None else kind(threshold) for threshold in self.thresholds)
        object.__setattr__(self, 'thresholds', tuple(thresholds))
        for value in self.temperatures:
            if not is_number(value) or not TEMPERATURES[0] <= value <= TEMPERATURES[1]:
                raise InvalidValueError(f'A temperature must be in [0.01, 100], got {brief(value)}.')
        object.__setattr__(self, 'temperatures', tuple(float(value) for value in self.temperatures))
        if self.temperatures and len(self.temperatures) != len(self.thresholds) + 1:
            raise InvalidValueError(
                f'temperatures must be empty or have {len(self.thresholds) + 1} values, one per exit and one for main,'
                f' got {len(self.temperatures)}.'
            )

    def _check_threshold(self, threshold: Any) -> None:
        is_count = self.criterion == 'patience'
        least, most = (1, 1000) if is_count else (0, 1)
        is_allowed = threshold is None or (is_number(threshold) and least <= threshold <= most)
        if not is_allowed or (is_count and threshold is not None and threshold != int(threshold)):
            raise InvalidValueError(
                f"A threshold of '{self.criterion}' must be {'an integer ' if is_count else ''}in [{least}, {most}], or"
                f' None for an exit that is not used, got {brief(threshold)}.'
            )

    @property
    def used(self) -> tuple[int, ...]:
        """The exits that are run on the way, without main."""
        return tuple(idx for idx, threshold in enumerate(self.thresholds) if threshold is not None)

    @property
    def is_memoryless(self) -> bool:
        """Whether what an exit answers, and its score, do not depend on the exits before it."""
        return self.combine is None and self.criterion != 'patience'

    def leaves(self, idx: int, score: Tensor) -> Tensor:
        """Return which samples leave at exit `idx`, which must be used, [N] bool, by their scores [N]."""
        threshold: Any = self.thresholds[idx]
        is_enough: Tensor = score >= threshold if CRITERIA[self.criterion].leaves_at_least else score <= threshold
        return is_enough

    def check_exits(self, num_exits: int) -> None:
        """Raise `InvalidValueError` unless there is one threshold for each of so many exits."""
        if len(self.thresholds) != num_exits:
            raise InvalidValueError(
                f'The policy must have one threshold for each of the {num_exits} exits of the model, got'
                f' {len(self.thresholds)}. Main has none; use None for an exit that is not used.'
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as JSON-ready values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ExitPolicy':
        """Return the policy that `to_dict` wrote.

        Raises:
            CheckpointError: A field is missing, or `values` is not a mapping.
            InvalidValueError: A field is out of range.
        """
        if not isinstance(values, dict) or not {'criterion', 'thresholds'} <= set(values):
            raise CheckpointError('A policy must be an object with the keys criterion and thresholds.')
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
