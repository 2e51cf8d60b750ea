"""Who leaves where, on logits that are kept; and what such logits and their targets must be."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.policies.policy import CRITERIA, ExitPolicy, Prediction
from timm_multiexit.utils.checks import check_instance, is_list
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError


class PolicyRun:
    """A policy at work on a batch, exit by exit. Samples may leave the batch between two exits."""

    def __init__(self, policy: ExitPolicy):
        self.policy = policy
        self._num_seen = 0
        self._total: Tensor | None = None
        self._predicted: Tensor | None = None
        self._streak: Tensor | None = None

    def answer(self, idx: int, logits: Tensor) -> Tensor:
        """Return what a classifier with these logits [N, C] answers, [N, C] in float32 or better.

        The classifiers come in order, the used ones alone; main is the number of exits.
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
        if self._predicted is None or self._streak is None:
            streak = torch.zeros_like(largest)
        else:
            streak = torch.where(predicted == self._predicted, self._streak + 1, 0)
        self._predicted, self._streak = predicted, streak
        return torch.where(largest.isfinite(), streak, torch.nan)

    def select(self, rows: Tensor) -> None:
        """Continue with some of the samples that were left, by place, [N'] int64; a place may come several times."""
        for name in ('_total', '_predicted', '_streak'):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, state.index_select(0, rows))


def walk(policy: ExitPolicy, logits: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (classifier, answer [N, C], score [N]) of the used exits and of main, whose score is None."""
    check_logits(logits)
    policy.check_exits(len(logits) - 1)
    run = PolicyRun(policy)
    for idx in policy.used:
        answer = run.answer(idx, logits[idx])
        yield idx, answer, run.score(answer)
    yield len(logits) - 1, run.answer(len(logits) - 1, logits[-1]), None


def assign(
    policy: ExitPolicy, visits: Iterable[tuple[int, Tensor, Tensor | None]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (classifier, its values, which samples leave there [N] bool); each sample leaves once.

    The visits are what `walk` gives, perhaps with other values of the samples [N, ...] in place of the answers.
    """
    here: Tensor | None = None
    for idx, values, score in visits:
        here = torch.ones_like(values[:, 0] if values.ndim > 1 else values, dtype=torch.bool) if here is None else here
        leaves = here if score is None else here & policy.leaves(idx, score)
        here = here & ~leaves
        yield idx, values, leaves


def apply_policy(policy: ExitPolicy, logits: Sequence[Tensor]) -> Prediction:
    """Return what a policy answers where all classifiers have been run on all samples: the simulation.

    Args:
        policy: The policy.
        logits: One [N, C] tensor per classifier, main last.

    Raises:
        InvalidTypeError: It is not an `ExitPolicy`, or the logits are not a list of float tensors.
        InvalidValueError: The policy is for another number of exits, the logits are NaN, empty or of different shapes.

    >>> early, main = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    >>> apply_policy(ExitPolicy('confidence', (0.9,)), [early, main])
    Prediction(logits=tensor([[3., 0.],
            [0., 2.]]), exit_idx=tensor([0, 1]))
    """
    check_instance('policy', policy, ExitPolicy)
    logits = list(logits) if isinstance(logits, Iterator) else logits
    left = [(idx, answer[leaves], leaves) for idx, answer, leaves in assign(policy, walk(policy, logits))]
    _, first, leaves = left[0]
    answers, exit_idx = first.new_zeros(len(leaves), first.shape[1]), torch.zeros_like(leaves, dtype=torch.int64)
    for idx, answer, leaves in left:
        answers[leaves], exit_idx[leaves] = answer, idx
    return Prediction(answers, exit_idx)


def check_logits(logits: Sequence[Tensor]) -> None:
    """Raise unless these are finite logits of several classifiers for the same samples.

    Minus infinity is allowed for some classes: those that are masked out.

    Raises:
        InvalidTypeError: They are not a list of float tensors.
        InvalidValueError: They are too few, empty, NaN or of different shapes.
    """
    wrong = next((single for single in logits if not _is_float(single)), None) if is_list(logits) else logits
    if wrong is not None:
        what = str(wrong.dtype) if isinstance(wrong, Tensor) else type(wrong).__name__
        kind = f'{type(logits).__name__} with {what}' if is_list(logits) else what
        hint = ' Pass outputs.logits.' if hasattr(logits, 'logits') else ''
        raise InvalidTypeError(
            f'logits must be a list of float tensors, one per classifier, main last, got {kind}.{hint}'
        )
    shapes = sorted({tuple(single.shape) for single in logits})
    if len(logits) < 2 or len(shapes) != 1 or len(shapes[0]) != 2:
        raise InvalidValueError(
            'logits must be of two or more classifiers, main last, and of one shape [samples, classes], got'
            f' {len(logits)} of shapes {[list(shape) for shape in shapes]}.'
        )
    if shapes[0][0] == 0 or shapes[0][1] < 2:
        raise InvalidValueError(
            f'logits must be of 1 or more samples and 2 or more classes, got the shape {list(shapes[0])}.'
        )
    for idx, single in enumerate(logits):
        wrong = ~single.amax(-1).isfinite()  # NaN is the largest
        if wrong.any():
            name = 'main' if idx == len(logits) - 1 else f'exit {idx}'
            raise InvalidValueError(
                f'The logits of {name} are NaN or infinite for {int(wrong.sum())} of {len(single)} samples: no policy'
                ' can decide on them, check the weights and the input.'
            )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def raise_if_nan(idx: int, num_exits: int, num_wrong: int, num: int) -> None:
    """Raise `InvalidValueError` if a classifier, main is the number of exits, gives NaN for some of `num` images."""
    if num_wrong:
        name = 'Main' if idx == num_exits else f'Exit {idx}'
        raise InvalidValueError(
            f'{name} gives NaN or infinite logits for {num_wrong} of {num} images: check the weights and the input.'
        )


def check_answer(idx: int, num_exits: int, logits: Tensor, *, waits: bool = False) -> None:
    """Raise `InvalidValueError` if a classifier's logits [N, C] cannot be an answer; see `raise_if_nan`.

    What is on an accelerator is only looked at if it `waits`: the host would have to.
    """
    if not waits and logits.device.type != 'cpu':
        return
    raise_if_nan(idx, num_exits, int((~logits.amax(-1).isfinite()).sum()), len(logits))  # NaN is the largest


def checked_data(logits: Sequence[Tensor], targets: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return logits in float32 or better and targets in int64, on the CPU.

    Raises:
        InvalidValueError: As `check_logits`; or the targets are not one class index for each sample.
    """
    check_logits(logits)
    num, num_classes = logits[0].shape
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != (num,):
        kind = f'{list(targets.shape)} of {targets.dtype}' if isinstance(targets, Tensor) else type(targets).__name__
        raise InvalidValueError(f'targets must be a tensor [{num}] of class indices, one per sample, got {kind}.')
    targets = targets.detach().cpu().long()
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise InvalidValueError(
            f'targets must be in [0, {num_classes - 1}] for logits of {num_classes} classes, got'
            f' {int(targets.min())} to {int(targets.max())}.'
        )
    logits = [single.detach().cpu() for single in logits]
    return [single if single.dtype == torch.float64 else single.float() for single in logits], targets


def check_targets(logits: Sequence[Tensor], targets: Tensor) -> None:
    """Raise `InvalidValueError` unless these are logits as `check_logits` wants them and a target for each sample."""
    check_logits(logits)
    if targets.shape != logits[-1].shape[:1]:
        raise InvalidValueError(
            f'targets must be [{len(logits[-1])}], one class index per sample of logits {list(logits[-1].shape)}, got'
            f' {list(targets.shape)}.'
        )
