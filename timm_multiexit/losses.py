"""Losses of multi-exit training: a task term for each classifier, and the pull of a teacher made of classifiers."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_multiexit.config import MultiExitError

# One row for each method. The names mean the forms that the EED paper (arXiv 2104.00299) compares; where an original
# differs, the row says so. Every row can be changed by the keyword arguments of `create_loss`.
LOSSES: dict[str, dict[str, Any]] = {
    # BranchyNet, Teerapittayanon et al. 2016: equation 2 of the EED paper, cross-entropies alone.
    'ce': {'teacher': None},
    # Phuong and Lampert 2019: equation 3, main's outputs teach the exits. Their code weighs the two terms 1 - C and
    # C * T^2 with C = 0.5, scales the whole by the number of exits, and raises T from 1 by 5 % whenever the teacher's
    # mean confidence is above 0.5.
    'phuong': {'teacher': 'main'},
    # Be Your Own Teacher, Zhang et al. 2019: equations 3 and 4, main's outputs and features teach the exits. The codes
    # for it differ: one weighs cross-entropy 0.7, outputs 0.3 without T^2 and features 0.03 through linear adapters,
    # leaving out the features of the shallowest exit; another sums the feature error, hence its weight of 1e-6.
    'byot': {'teacher': 'main', 'feature_weight': 1.0},
    # Exit-Ensemble Distillation, Lee and Lee 2021: equations 5 to 8, all teach all. The feature ensemble (weight 1 in
    # the paper) is off because it needs exits as wide as main: `head='paper'` with `feature_weight=1.0` turns it on.
    'eed': {'teacher': 'all', 'feature_weight': 0.0},
}

# The KL pull is multiplied by T^2 besides; both are the values of the authors' script.
_OUTPUT_WEIGHTS = {'kl': 0.1, 'mse': 1.0}


class MultiExitLoss(nn.Module):
    """The sum over classifiers of a task term and of the distances to a teacher's outputs and features.

    The teacher is the detached mean of the logits (and features) of the classifiers that `teacher` names. Every
    classifier is a student, members of the teacher too; only main is not its own student when it teaches alone. All is
    computed in float32 at least, whatever the inputs' precision and the surrounding autocast; float64 stays float64.

    Output distances, for teacher logits t and student logits s: 'kl' is T^2 * KL(softmax(t / T) || softmax(s / T)),
    summed over classes and averaged over the batch; 'mse' is the squared difference of t and s averaged over batch and
    classes. Feature distance: the squared difference averaged over batch and features.

    Args:
        teacher: None (no distillation), 'main', 'all', or the indices of the classifiers whose mean teaches: 0-based,
            shallow to deep, main is -1 or the number of exits.
        output_loss: Distance between outputs, 'kl' or 'mse'.
        output_weight: Factor of the output distance, at least 0; None stands for 0.1 with 'kl' and 1.0 with 'mse'.
        feature_weight: Factor of the feature distance, at least 0; 0 leaves features unread.
        temperature: T of 'kl', above 0; 'mse' has none.
        exit_weights: One factor for each classifier, exits shallow to deep, then main, at least 0: it multiplies all
            terms of that classifier. None stands for ones.
        criterion: The task term: (logits [B, C], target) -> scalar. None stands for cross-entropy with targets
            [B] of class indices or [B, C] of probabilities; with `multi_label`, for binary cross-entropy averaged over
            batch and classes with targets [B, C] in 0 to 1.
        multi_label: True when classes do not exclude each other.

    Raises:
        MultiExitError: An argument is out of range, or arguments contradict each other.

    Source:
        arXiv 2104.00299, equations 2 to 8 and Table IV (teachers). The authors' script takes the soft cross-entropy
        for the KL divergence, a difference of the teacher's entropy, which has no gradient; and it masks feature
        errors where both features are not positive, which changes nothing after ReLU.

    Example:
        >>> from types import SimpleNamespace
        >>> exit_logits, main_logits = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])
        >>> outputs = SimpleNamespace(logits=(exit_logits, main_logits), features=None)
        >>> loss_fn = MultiExitLoss('all', 'mse')  # the teacher's logits are [[1.0, 1.0]]
        >>> terms = loss_fn.terms(outputs, torch.tensor([1]))
        >>> terms['output']
        tensor([1., 1.])
        >>> [round(value, 4) for value in terms['task'].tolist()]
        [0.1269, 2.1269]
        >>> round(loss_fn(outputs, torch.tensor([1])).item(), 4)
        4.2539
    """

    def __init__(
        self,
        teacher: str | Sequence[int] | None = None,
        output_loss: str = 'kl',
        *,
        output_weight: float | None = None,
        feature_weight: float = 0.0,
        temperature: float = 3.0,
        exit_weights: Sequence[float] | None = None,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        multi_label: bool = False,
    ):
        """Keep the settings, which the class describes."""
        super().__init__()
        if output_loss not in _OUTPUT_WEIGHTS:
            raise MultiExitError(f"output_loss is {output_loss!r}, allowed are 'kl' and 'mse'; choose one of them.")
        self.teacher = _checked_teacher(teacher)
        self.output_loss = output_loss
        if output_weight is None:
            output_weight = 0.0 if teacher is None else _OUTPUT_WEIGHTS[output_loss]
        self.output_weight = _checked_number('output_weight', output_weight)
        self.feature_weight = _checked_number('feature_weight', feature_weight)
        self.temperature = _checked_number('temperature', temperature, is_positive=True)
        self.exit_weights = None if exit_weights is None else _checked_exit_weights(exit_weights)
        if criterion is not None and not callable(criterion):
            raise MultiExitError(
                f'criterion is {criterion!r}, allowed is a callable (logits, target) -> scalar or None.'
            )
        self.criterion = criterion or (_binary_cross_entropy if multi_label else F.cross_entropy)
        self.multi_label = bool(multi_label)
        self._check_combination()

    def _check_combination(self) -> None:
        for name in ('output_weight', 'feature_weight'):
            if self.teacher is None and getattr(self, name) > 0:
                raise MultiExitError(
                    f"{name} is {getattr(self, name)} but there is no teacher; name one (teacher='main', 'all' or a"
                    f" list of classifiers; the losses 'phuong', 'byot' and 'eed' have one) or leave {name} out."
                )
        if self.multi_label and self.teacher is not None and self.output_loss == 'kl':
            raise MultiExitError(
                "output_loss is 'kl' with multi_label, but its softmax needs classes that exclude each other;"
                " use output_loss='mse'."
            )

    def forward(self, outputs: Any, target: torch.Tensor) -> torch.Tensor:
        """Return the total loss, a scalar with gradient.

        Args:
            outputs: See `terms`.
            target: See `terms`.

        Raises:
            MultiExitError: See `terms`.
        """
        return self.terms(outputs, target)['loss']

    def terms(self, outputs: Any, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the total and its parts, for logs.

        Args:
            outputs: What a model returns with `exits=True`: `logits`, one [B, C] float tensor per classifier, shallow
                to deep, main last; and, read only with a feature weight above 0, `features`, one [B, D] float tensor
                per classifier.
            target: What the criterion takes; as a rule [B] int64 class indices or [B, C] float probabilities.

        Returns:
            'loss', a scalar with gradient, and the detached 'task', 'output' and 'feature', each [K+1], one value per
            classifier with its own factor (`output_weight` and T^2, `feature_weight`) in it; zero where a classifier
            has no such term. 'loss' is exactly `(exit_weights * (task + output + feature)).sum()`.

        Raises:
            MultiExitError: Outputs without logits or with unequal shapes, features missing or of unequal widths, a
                teacher that the model does not have, a wrong number of exit weights, or a criterion without a scalar.
        """
        logits = _checked_logits(outputs)
        self._check_count(len(logits))
        with _full_precision(logits[0].device.type):
            logits = [_upcast(tensor) for tensor in logits]
            task = self._task_rows(logits, target)  # [K+1]
            output, feature = torch.zeros_like(task), torch.zeros_like(task)
            if self.output_weight > 0:
                output = self._output_rows(torch.stack(logits))
            if self.feature_weight > 0:
                feature = self._feature_rows(outputs, len(logits))
            rows = task + output + feature
            if self.exit_weights is not None:
                # A tensor of the weights would be copied to the device at every call; Python numbers are not.
                rows = torch.stack([weight * rows[idx] for idx, weight in enumerate(self.exit_weights)])
            total = rows.sum()
        return {'loss': total, 'task': task.detach(), 'output': output.detach(), 'feature': feature.detach()}

    def check_features(self, widths: Sequence[int]) -> None:
        """Raise if features are distilled and not all of one width.

        Args:
            widths: Number of features of each classifier, exits shallow to deep, then main.

        Raises:
            MultiExitError: `feature_weight` is above 0 and an exit's width is not main's.

        Example:
            >>> MultiExitLoss('all').check_features([64, 512])  # no feature distillation: any width will do
            >>> MultiExitLoss('all', feature_weight=1.0).check_features([512, 512])
        """
        if self.feature_weight == 0 or len(set(widths)) <= 1:
            return
        *exits, main = widths
        others = ', '.join(f'exit {exit_idx} has {width}' for exit_idx, width in enumerate(exits) if width != main)
        raise MultiExitError(
            f'Feature distillation needs features of one width, but {others} and main has {main};'
            " use head='paper' (--exit-head paper), projectors (--exit-projectors), or feature_weight 0."
        )

    def extra_repr(self) -> str:
        """Return the settings that `print` shows."""
        names = ('teacher', 'output_loss', 'output_weight', 'feature_weight', 'temperature', 'exit_weights')
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names)

    def _check_count(self, count: int) -> None:
        if self.exit_weights is not None and len(self.exit_weights) != count:
            raise MultiExitError(
                f'exit_weights has {len(self.exit_weights)} values, but the model has {count} classifiers'
                f' ({count - 1} exits and main); give one for each, exits shallow to deep, then main.'
            )

    def _members(self, count: int) -> tuple[int, ...]:
        """Return the teacher's classifiers as rising indices from 0 to count - 1."""
        if self.teacher == 'all':
            return tuple(range(count))
        indices = (-1,) if self.teacher == 'main' else self.teacher
        if not all(-count <= idx < count for idx in indices):
            raise MultiExitError(
                f'teacher is {list(indices)}, but the model has {count} classifiers;'
                f' name them by 0 to {count - 1} (main), or from the end by -1 (main) to {-count}.'
            )
        members = tuple(sorted({idx % count for idx in indices}))
        if len(members) < len(indices):
            raise MultiExitError(
                f'teacher is {list(indices)} and names a classifier of this model twice;'
                f' name each once (main is -1 and {count - 1}).'
            )
        return members

    def _split(self, stacked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the students [S, B, N], S at most K+1, and the detached teacher [B, N] of stacked [K+1, B, N]."""
        count = len(stacked)
        members = self._members(count)
        fixed = stacked.detach()
        if members == (count - 1,):
            return stacked[:-1], fixed[-1]
        if len(members) < count:
            # Not fixed[list]: its index tensor would be copied to the device at every call.
            fixed = torch.stack([fixed[idx] for idx in members])
        return stacked, fixed.mean(0)

    def _task_rows(self, logits: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        if target.is_floating_point():
            target = target.to(logits[0].dtype)
        rows = [self.criterion(tensor, target) for tensor in logits]
        if any(row.dim() != 0 for row in rows):
            raise MultiExitError(
                f'criterion returned a tensor of shape {list(rows[0].shape)}, allowed is a scalar;'
                " use a criterion that averages over the batch (reduction='mean')."
            )
        return torch.stack(rows)

    def _output_rows(self, logits: torch.Tensor) -> torch.Tensor:
        students, teacher = self._split(logits)
        if self.output_loss == 'mse':
            rows = (students - teacher).square().mean((1, 2))
        else:
            log_student = F.log_softmax(students / self.temperature, dim=-1)
            log_teacher = F.log_softmax(teacher / self.temperature, dim=-1)
            divergence = log_teacher.exp() * (log_teacher - log_student)  # [S, B, C]
            rows = divergence.sum(-1).mean(-1) * self.temperature**2
        return F.pad(self.output_weight * rows, (0, len(logits) - len(rows)))  # [K+1]

    def _feature_rows(self, outputs: Any, count: int) -> torch.Tensor:
        features = getattr(outputs, 'features', None)
        if features is None or len(features) != count or any(tensor is None for tensor in features):
            raise MultiExitError(
                f'Feature distillation needs the features of all {count} classifiers, but outputs.features lacks them;'
                ' call the model with exits=True, or use feature_weight 0.'
            )
        self.check_features([tensor.shape[-1] for tensor in features])
        students, teacher = self._split(torch.stack([_upcast(tensor) for tensor in features]))
        rows = (students - teacher).square().mean((1, 2))
        return F.pad(self.feature_weight * rows, (0, count - len(rows)))  # [K+1]


def create_loss(name: str, **overrides: Any) -> MultiExitLoss:
    """Return the loss of a named method.

    Args:
        name: Key of `LOSSES`: 'ce', 'phuong', 'byot' or 'eed'.
        **overrides: Keyword arguments of `MultiExitLoss` in place of the row's; one that is None is left out, so that
            a command-line flag left unset keeps the method's value.

    Raises:
        MultiExitError: The name is unknown, or the arguments contradict the method.

    Example:
        >>> create_loss('eed', output_loss='mse', temperature=None)
        MultiExitLoss(teacher='all', output_loss='mse', output_weight=1.0, feature_weight=0.0, temperature=3.0, \
exit_weights=None)
    """
    if not isinstance(name, str) or name not in LOSSES:
        nearest = get_close_matches(str(name).lower(), LOSSES, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else 'timm_multiexit.losses.LOSSES describes them.'
        raise MultiExitError(f'Unknown loss {name!r}, allowed are {", ".join(sorted(LOSSES))}; {hint}')
    given = {key: value for key, value in overrides.items() if value is not None}
    return MultiExitLoss(**{**LOSSES[name], **given})


def _checked_number(name: str, value: float, is_positive: bool = False) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (is_positive and value == 0):
        allowed = 'above 0' if is_positive else 'of 0 or more'
        raise MultiExitError(f'{name} is {value!r}, allowed is a finite number {allowed}; change it.')
    return float(value)


def _checked_exit_weights(exit_weights: Sequence[float]) -> tuple[float, ...]:
    if isinstance(exit_weights, str) or not isinstance(exit_weights, Iterable):
        raise MultiExitError(
            f'exit_weights is {exit_weights!r}, allowed is a list with one number for each classifier;'
            ' give them exits shallow to deep, then main.'
        )
    return tuple(_checked_number(f'exit_weights[{idx}]', weight) for idx, weight in enumerate(exit_weights))


def _checked_teacher(teacher: str | Sequence[int] | None) -> str | tuple[int, ...] | None:
    if teacher is None or (isinstance(teacher, str) and teacher in ('main', 'all')):
        return teacher
    is_list = isinstance(teacher, Sequence) and not isinstance(teacher, str)
    if not is_list or not teacher or not all(isinstance(idx, int) and not isinstance(idx, bool) for idx in teacher):
        raise MultiExitError(
            f"teacher is {teacher!r}, allowed are None, 'main', 'all' or a list of classifiers such as [0, -1];"
            ' name classifiers by 0-based index, shallow to deep, main is -1.'
        )
    return tuple(teacher)


def _checked_logits(outputs: Any) -> Sequence[torch.Tensor]:
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


def _binary_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _full_precision(device_type: str) -> AbstractContextManager:
    # Not asked of torch.amp.is_autocast_available, which torch.compile does not trace in torch 2.8.
    return nullcontext() if device_type == 'meta' else torch.autocast(device_type, enabled=False)
