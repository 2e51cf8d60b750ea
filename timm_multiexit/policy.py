"""Policies: which exit answers for which sample. Pure functions on logits."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from timm_multiexit.config import MultiExitError, brief


class Prediction(NamedTuple):
    """What a policy answers for a batch.

    Attributes:
        logits: [B, C] float tensor, the answer of each sample in input order: logits of the exit it left at, divided
            by that exit's temperature, or the combination of the exits it saw.
        exit_idx: [B] int64 tensor, the exit that each sample left at; main is the number of exits.
    """

    logits: Tensor
    exit_idx: Tensor


# torch.export.save writes a NamedTuple only under a registered name; there is no public call for it (torch 2.15).
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
        MultiExitError: Unknown criterion or combination, or a number out of range.

    >>> ExitPolicy('confidence', (0.9, None, 0.8)).used
    (0, 2)
    """

    criterion: str = 'confidence'
    thresholds: tuple[float | None, ...] = ()
    temperatures: tuple[float, ...] = ()
    combine: str | None = None

    def __post_init__(self):
        if not isinstance(self.criterion, str) or self.criterion not in CRITERIA:
            raise MultiExitError(f'Unknown criterion {brief(self.criterion)}, allowed are {", ".join(CRITERIA)}.')
        if self.combine not in (None, *COMBINATIONS):
            raise MultiExitError(
                f'Unknown combination {brief(self.combine)}, allowed are None, {" and ".join(COMBINATIONS)}.'
            )
        for name in ('thresholds', 'temperatures'):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise MultiExitError(f'{name} are {brief(getattr(self, name))}, allowed is a sequence, one per exit.')
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for threshold in self.thresholds:
            self._check_threshold(threshold)
        # numpy's numbers are none of JSON's.
        kind = int if self.criterion == 'patience' else float
        thresholds = (None if threshold is None else kind(threshold) for threshold in self.thresholds)
        object.__setattr__(self, 'thresholds', tuple(thresholds))
        for value in self.temperatures:
            if not is_number(value) or not TEMPERATURES[0] <= value <= TEMPERATURES[1]:
                raise MultiExitError(f'A temperature is {brief(value)}, allowed are numbers from 0.01 to 100.')
        if self.temperatures and len(self.temperatures) != len(self.thresholds) + 1:
            raise MultiExitError(
                f'{len(self.temperatures)} temperatures with {len(self.thresholds)} thresholds, allowed is one per exit'
                ' and one for main, or none.'
            )

    def _check_threshold(self, threshold: Any) -> None:
        if threshold is None:
            return
        if self.criterion == 'patience':
            if not is_number(threshold) or threshold != int(threshold) or not 1 <= threshold <= 1000:
                raise MultiExitError(
                    f'A threshold is {brief(threshold)}, patience allows 1, 2, ... or None (exit not used).'
                )
        elif not is_number(threshold) or not 0 <= threshold <= 1:
            raise MultiExitError(
                f'A threshold is {brief(threshold)}, {self.criterion} allows numbers from 0 to 1, or None (exit not'
                ' used).'
            )

    @property
    def used(self) -> tuple[int, ...]:
        """The exits that are run on the way, without main."""
        return tuple(idx for idx, threshold in enumerate(self.thresholds) if threshold is not None)

    def leaves(self, idx: int, score: Tensor) -> Tensor:
        """Return which samples leave at exit `idx`, [N] bool, by their scores [N]."""
        threshold = self.thresholds[idx]
        return score >= threshold if CRITERIA[self.criterion].leaves_at_least else score <= threshold

    def check_exits(self, num_exits: int) -> None:
        """Raise `MultiExitError` unless there is one threshold for each of so many exits."""
        if len(self.thresholds) != num_exits:
            raise MultiExitError(
                f'The policy has {len(self.thresholds)} thresholds, the model {num_exits} exits: give one per exit,'
                ' without main, None for an exit that is not used.'
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as JSON-ready values."""
        return {
            'criterion': self.criterion,
            'thresholds': list(self.thresholds),
            'temperatures': list(self.temperatures),
            'combine': self.combine,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ExitPolicy':
        """Return the policy that `to_dict` wrote.

        Raises:
            MultiExitError: A field is missing or out of range, or `values` is no mapping.
        """
        if not isinstance(values, dict) or not {'criterion', 'thresholds'} <= set(values):
            raise MultiExitError('A policy must be an object with the keys criterion and thresholds.')
        known = ('criterion', 'thresholds', 'temperatures', 'combine')
        return cls(**{name: values[name] for name in known if name in values})


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, numpy's included; no bool."""
    # Compared, since isfinite fails on an integer beyond floats; NaN and infinity are not within.
    return isinstance(value, Real) and not isinstance(value, bool) and -1e300 <= value <= 1e300


class PolicyRun:
    """A policy at work on a batch, exit by exit. Samples may leave the batch between two exits.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: ExitPolicy):
        self.policy = policy
        self._num_seen = 0
        self._total: Tensor | None = None
        self._predicted: Tensor | None = None
        self._streak: Tensor | None = None

    def answer(self, idx: int, logits: Tensor) -> Tensor:
        """Return what is answered at a classifier, [N, C] in float32 or better.

        Args:
            idx: The classifier, main is the number of exits; in order, the used ones alone.
            logits: Its logits [N, C] of the samples that are left.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.policy.temperatures:
            logits = logits / self.policy.temperatures[idx]
        if self.policy.combine is None:
            return logits
        if self.policy.combine == 'geometric':
            logits = logits.log_softmax(-1)
        self._total = logits if self._total is None else self._total + logits
        self._num_seen += 1
        return self._total / self._num_seen

    def score(self, answer: Tensor) -> Tensor:
        """Return the score [N] of what `answer` gave; NaN where the answer is NaN."""
        score = CRITERIA[self.policy.criterion].score
        if score is not None:
            return score(answer)
        largest, predicted = answer.max(-1)
        if self._predicted is None:
            self._streak = torch.zeros_like(largest)
        else:
            self._streak = torch.where(predicted == self._predicted, self._streak + 1, 0)
        self._predicted = predicted
        return torch.where(largest.isfinite(), self._streak, torch.nan)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the samples.

        Args:
            rows: Their places among those that were left, [N'] int64; a place may come several times.
        """
        for name in ('_total', '_predicted', '_streak'):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, state.index_select(0, rows))


def walk(policy: ExitPolicy, logits: Sequence[Tensor]) -> Iterable[tuple[int, Tensor, Tensor | None]]:
    """Yield (classifier, answer [N, C], score [N]) of the used exits and of main, whose score is None.

    Args:
        policy: The policy.
        logits: One [N, C] tensor per classifier, main last.
    """
    check_logits(logits)
    policy.check_exits(len(logits) - 1)
    run = PolicyRun(policy)
    for idx in policy.used:
        answer = run.answer(idx, logits[idx])
        yield idx, answer, run.score(answer)
    yield len(logits) - 1, run.answer(len(logits) - 1, logits[-1]), None


def apply_policy(policy: ExitPolicy, logits: Sequence[Tensor]) -> Prediction:
    """Return what a policy answers where all classifiers have been run on all samples: the simulation.

    Args:
        policy: The policy.
        logits: One [N, C] tensor per classifier, main last.

    Raises:
        MultiExitError: The policy is for another number of exits, the logits are NaN, empty or of different shapes.

    >>> early, main = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    >>> apply_policy(ExitPolicy('confidence', (0.9,)), [early, main])
    Prediction(logits=tensor([[3., 0.],
            [0., 2.]]), exit_idx=tensor([0, 1]))
    """
    answers, exit_idx = None, None
    for idx, answer, score in walk(policy, logits):
        if answers is None:
            answers, exit_idx = torch.zeros_like(answer), answer.new_full(answer.shape[:1], -1, dtype=torch.int64)
        leaves = exit_idx < 0
        if score is not None:
            leaves = leaves & policy.leaves(idx, score)
        answers[leaves], exit_idx[leaves] = answer[leaves], idx
    return Prediction(answers, exit_idx)


def check_logits(logits: Sequence[Tensor]) -> None:
    """Raise `MultiExitError` unless these are finite logits of several classifiers for the same samples.

    Minus infinity is allowed for some classes: those that are masked out.
    """
    shapes = sorted({tuple(single.shape) for single in logits})
    if len(logits) < 2 or len(shapes) != 1 or len(shapes[0]) != 2:
        raise MultiExitError(
            f'Logits of {len(logits)} classifiers have the shapes {[list(shape) for shape in shapes]}, allowed are two'
            ' or more of one shape [samples, classes], main last.'
        )
    if shapes[0][0] == 0 or shapes[0][1] < 2:
        raise MultiExitError(
            f'Logits have the shape {list(shapes[0])}, allowed are 1 or more samples of 2 or more classes.'
        )
    for idx, single in enumerate(logits):
        wrong = ~single.amax(-1).isfinite()  # NaN is the largest
        if wrong.any():
            name = 'main' if idx == len(logits) - 1 else f'exit {idx}'
            raise MultiExitError(
                f'The logits of {name} are NaN or infinite for {int(wrong.sum())} of {len(single)} samples: no policy'
                ' can decide on them, see the weights and the input.'
            )
