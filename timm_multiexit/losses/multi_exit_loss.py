"""Losses of multi-exit training: a task term for each classifier, and the pull of a teacher made of classifiers."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from timm_multiexit.losses.distances import (
    OUTPUT_WEIGHTS,
    checked_logits,
    full_precision,
    output_distance,
    scale_rows,
    upcast,
)
from timm_multiexit.losses.survivors import weigh_survivors
from timm_multiexit.losses.teachers import (
    TEACHER_WEIGHTS,
    DepthWeights,
    KDConfig,
    checked_teacher,
    follow_skill,
    resolve_teacher,
    skill_gradient,
)
from timm_multiexit.utils.checks import check_choice, check_instance
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, brief, checked_number, checked_weights

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
    # BEED, Lee and Lee 2022 (ACCV): a teacher that leans to the deep classifiers, and shallow classifiers that lean to
    # the teacher, for at most five classifiers. The numbers are those of hjdw2/BEED, which has four classifiers and
    # distils features too, maps that are not pooled with a weight of 0.1; off here for the reason above.
    'beed': {
        'teacher': 'all',
        'output_weight': 1.0,
        'feature_weight': 0.0,
        'depth_weights': DepthWeights(teacher=1.6, balance=1.15),
    },
}


class LossTerms(NamedTuple):
    """The loss and its detached parts, one value per classifier [K+1], with all factors except `exit_weights`.

    `loss` is exactly `(exit_weights * (task + output_distance + feature_distance + kd_distance)).sum()`.

    Attributes:
        loss: Scalar with gradient.
        task: Task terms.
        output_distance: Distances to the outputs of the teacher; zero where a classifier has none.
        feature_distance: Distances to the features of the teacher; zero where a classifier has none.
        kd_distance: Distances to an outside teacher; None without one.
    """

    loss: torch.Tensor
    task: torch.Tensor
    output_distance: torch.Tensor
    feature_distance: torch.Tensor
    kd_distance: torch.Tensor | None = None


class MultiExitLoss(nn.Module):
    """The sum over classifiers of a task term and of the distances to a teacher's outputs and features.

    For classifier k of K exits and main, with j = K - k deeper ones:

        loss = sum_k exit_weights[k] * (task_k + output_k + feature_k + kd_k)
        task_k = (2 - a^j) * criterion(z_k, target)            a: depth_weights.balance, 1 if not given
        output_k = distill_scale * output_weight * a^j * D(mean_i b_i z_i, z_k)    b: depth_weights.teacher, or skill
        feature_k = distill_scale * feature_weight * mean((mean_i b_i f_i - f_k)^2)
        kd_k = T_kd^2 * KL(outside teacher || z_k), weighed as `KDConfig` says; see `terms`

    The teacher is the detached weighted mean of the logits z (and features f) of the classifiers that `teacher` names.
    Every classifier is a student, members of the teacher too; only main is not its own student when it teaches alone.
    All is computed in float32 at least, whatever the inputs' precision and the surrounding autocast; float64 stays.

    Args:
        teacher: None (no distillation), 'main', 'all', or the indices of the classifiers whose mean teaches: 0-based,
            shallow to deep, main is -1 or the number of exits.
        output_loss: The distance D of teacher logits t and student logits s, averaged over the batch: 'kl',
            T^2 * KL(softmax(t / T) || softmax(s / T)) summed over classes; 'mse', the squared difference averaged over
            classes; 'bernoulli', T^2 * KL(sigmoid(t / T) || sigmoid(s / T)) averaged over classes.
        output_weight: Factor of the output distance, at least 0; None stands for 1.0 with 'mse', else for 0.1.
        feature_weight: Factor of the feature distance, at least 0; 0 leaves features unread.
        temperature: T of 'kl' and 'bernoulli', above 0; 'mse' has none.
        exit_weights: One factor for each classifier, exits shallow to deep, then main, at least 0: it multiplies all
            terms of that classifier. None stands for ones.
        depth_weights: Weights of the classifiers in the teacher, and of the terms of each classifier; None for equal.
        teacher_weights: 'equal', b as `depth_weights` says; or 'skill': b starts even, and in training mode follows
            after each update what `follow_skill` says, so that a weak classifier does not pull a strong one down.
        survivors: Let each exit but the first learn from the images that arrive there, for heads on a backbone that is
            frozen: see `weigh_survivors`. Main's terms, and all values, stay those of all images.
        criterion: The task term: (logits [B, C], target) -> scalar. None stands for cross-entropy with targets
            [B] of class indices or [B, C] of probabilities; with `multi_label`, for binary cross-entropy averaged over
            batch and classes with targets [B, C] in 0 to 1.
        multi_label: True when classes do not exclude each other.

    Attributes:
        distill_scale: Factor of the output and feature distances (not of an outside teacher's), a float that a
            training loop may set at every step, e.g. 0 to 1 during a warm-up. At 0 the distances are still computed,
            so that projectors get a gradient, of zero, as distributed training wants.
        num_skill_calls: After how many calls b moves, by the mean of their gradients; a training loop that accumulates
            gradients sets it to the number of batches of an update.
        skill: With 'skill' the weights b [M] of the classifiers that teach, shallow to deep; None before the first
            call.

    Raises:
        InvalidValueError: An argument is out of range, or arguments contradict each other.
        InvalidTypeError: An argument is of the wrong type.

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
        >>> terms.output_distance
        tensor([1., 1.])
        >>> [round(value, 4) for value in terms.task.tolist()]
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
        depth_weights: DepthWeights | None = None,
        teacher_weights: str = 'equal',
        survivors: bool = False,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        multi_label: bool = False,
    ):
        super().__init__()
        if not isinstance(output_loss, str) or output_loss not in OUTPUT_WEIGHTS:
            raise InvalidValueError(f"output_loss must be 'kl', 'mse' or 'bernoulli', got {output_loss!r}.")
        if not isinstance(depth_weights, DepthWeights | None):
            raise InvalidTypeError(f'depth_weights must be a DepthWeights or None, got {depth_weights!r}.')
        if criterion is not None and not callable(criterion):
            raise InvalidTypeError(
                f'criterion must be a callable (logits, target) -> scalar or None, got {criterion!r}.'
            )
        self.teacher = checked_teacher(teacher)
        self.output_loss = output_loss
        if output_weight is None:
            output_weight = 0.0 if teacher is None else OUTPUT_WEIGHTS[output_loss]
        self.output_weight = checked_number('output_weight', output_weight)
        self.feature_weight = checked_number('feature_weight', feature_weight)
        self.temperature = checked_number('temperature', temperature, is_positive=True)
        self.exit_weights = None if exit_weights is None else checked_weights('exit_weights', exit_weights)
        self.depth_weights = depth_weights or DepthWeights()
        self.teacher_weights = check_choice('teacher_weights', teacher_weights, TEACHER_WEIGHTS)
        self.survivors = check_instance('survivors', survivors, bool)
        self.skill: torch.Tensor | None
        self.register_buffer('skill', None, persistent=False)
        self.criterion = criterion or (_binary_cross_entropy if multi_label else F.cross_entropy)
        self.multi_label = bool(multi_label)
        self.distill_scale = 1.0
        self.num_skill_calls = 1
        self._skill_gradients: list[torch.Tensor] = []
        self._check_combination()

    def _check_combination(self) -> None:
        settings = [(name, getattr(self, name)) for name in ('output_weight', 'feature_weight')]
        if self.depth_weights != DepthWeights():
            settings.append(('depth_weights', self.depth_weights))
        for name, value in settings:
            if self.teacher is None and value:
                raise InvalidValueError(
                    f"{name} is {value} but the loss has no teacher. Name one (teacher='main', 'all' or a list of"
                    f" classifiers; the losses 'phuong', 'byot', 'eed' and 'beed' have one) or leave {name} out."
                )
        if self.teacher_weights == 'skill':
            self._check_skill()
        if self.survivors and self.multi_label:
            raise InvalidValueError(
                'survivors must be False with multi_label, got True: confidence, by which images leave, needs classes'
                ' that exclude each other.'
            )
        if self.multi_label and self.teacher is not None and self.output_loss == 'kl':
            raise InvalidValueError(
                "output_loss must be 'mse' or 'bernoulli' with multi_label, got 'kl', whose softmax needs classes that"
                ' exclude each other.'
            )

    def _check_skill(self) -> None:
        if self.teacher is None or self.teacher == 'main' or (self.teacher != 'all' and len(self.teacher) == 1):
            raise InvalidValueError(
                f"teacher_weights must be 'equal' for a teacher of less than two classifiers, got 'skill' with"
                f" {self.teacher!r}. Let several teach: teacher='all', or [0, -1]."
            )
        if self.depth_weights.teacher != 1.0:
            raise InvalidValueError(
                f"teacher_weights must be 'equal' with weights by depth, got 'skill' with {self.depth_weights}. Leave"
                ' one of them out.'
            )

    def forward(self, outputs: Any, target: torch.Tensor) -> torch.Tensor:
        """Return the total loss, a scalar with gradient; see `terms` for arguments and errors."""
        return self.terms(outputs, target).loss

    def terms(
        self, outputs: Any, target: torch.Tensor, outside: torch.Tensor | None = None, kd: KDConfig | None = None
    ) -> LossTerms:
        """Return the loss and its parts.

        Args:
            outputs: What a model returns with `exits=True`: `logits`, one [B, C] float tensor per classifier, shallow
                to deep, main last; and, read only with a feature weight above 0, `features`, one [B, D] float tensor
                per classifier. What a distilled model returns in training has `tokens` besides, the logits of main's
                two classifiers; they are read with an outside teacher alone.
            target: What the criterion takes; as a rule [B] int64 class indices or [B, C] float probabilities.
            outside: Logits [B, C] of a teacher that is not a part of the model, or None. Every classifier is its
                student, by the 'kl' of the outputs, or by 'bernoulli' with `multi_label`. With `tokens` main's task
                term is of the first of them and this distance of the last; its other terms are of main's logits.
            kd: How the outside teacher is weighed; None for timm's defaults.

        Raises:
            InvalidTypeError: Outputs without logits.
            InvalidValueError: Logits of unequal shapes, features missing or of unequal widths, settings that do not
                fit the number of classifiers, a criterion without a scalar, or an outside teacher of another shape.
        """
        logits = checked_logits(outputs)
        count = len(logits)
        self.check_count(count)
        task_factor, kd_factor = (kd or KDConfig()).factors if outside is not None else (1.0, 0.0)
        with full_precision(logits[0].device.type):
            logits = [upcast(tensor) for tensor in logits]
            if self.survivors:
                logits = weigh_survivors(logits, logits)
            tokens = getattr(outputs, 'tokens', None) if outside is not None else None
            own, taught = ([*logits[:-1], upcast(tokens[idx])] if tokens else logits for idx in (0, -1))
            task = self._task_rows(own, target)  # [K+1]
            parts = [
                scale_rows(task, [task_factor * factor for factor in self.depth_weights.task_factors(count)]),
                self._output_rows(torch.stack(logits)) if self.output_weight > 0 else torch.zeros_like(task),
                self._feature_rows(outputs, count) if self.feature_weight > 0 else torch.zeros_like(task),
            ]
            if outside is not None:
                parts.append(kd_factor * self._outside_rows(torch.stack(taught), outside, kd or KDConfig()))
            rows = scale_rows(sum(parts[1:], parts[0]), self.exit_weights or [1.0] * count)
            if self.teacher_weights == 'skill' and self.training:
                self._update_skill(torch.stack(logits), target)
        return LossTerms(rows.sum(), *(part.detach() for part in parts))

    def set_skill(self, weights: Sequence[float]) -> None:
        """Continue with the weights of an earlier run.

        Raises:
            InvalidValueError: They are not numbers above 0 with a sum of 1.
        """
        numbers = checked_weights('skill', weights)
        if not numbers or min(numbers) <= 0 or abs(sum(numbers) - 1) > 1e-3:
            raise InvalidValueError(f'skill must be numbers > 0 with a sum of 1, got {brief(list(numbers))}.')
        self.skill = torch.tensor(numbers)

    def _update_skill(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        members = self._members(len(logits))
        taught = torch.stack([logits[idx] for idx in members]).detach()
        weights = self._skill_of(taught)
        self._skill_gradients.append(skill_gradient(weights, taught, target, multi_label=self.multi_label))
        if len(self._skill_gradients) >= self.num_skill_calls:
            self.step_skill()

    def step_skill(self) -> None:
        """Move b by the calls since it last moved, where an update has fewer of them than `num_skill_calls`."""
        if self._skill_gradients:
            gradient = torch.stack(self._skill_gradients).mean(0)
            self.skill = follow_skill(self._skill_of(gradient), gradient)
            self._skill_gradients = []

    def _skill_of(self, members: torch.Tensor) -> torch.Tensor:
        """Return the weights of the teacher's classifiers, even ones at first; `members` [M, ...] has a row of each."""
        if self.skill is None:
            return torch.full((len(members),), 1 / len(members), dtype=members.dtype, device=members.device)
        if len(self.skill) != len(members):
            raise InvalidValueError(
                f'skill has {len(self.skill)} weights, but {len(members)} classifiers teach (teacher is'
                f' {self.teacher!r}). Give one for each.'
            )
        return self.skill.to(members)

    def _members(self, count: int) -> dict[int, float]:
        assert self.teacher is not None  # a weight above 0 has one
        return resolve_teacher(self.teacher, self.depth_weights, count)

    def check_count(self, count: int) -> None:
        """Raise if the settings do not fit a model's number of classifiers, exits and main.

        Raises:
            InvalidValueError: A wrong number of exit weights or of the teacher's weights, a teacher that the model does
                not have, or a balance that turns a task term negative.

        Example:
            >>> create_loss('beed').check_count(5)
        """
        if self.exit_weights is not None and len(self.exit_weights) != count:
            raise InvalidValueError(
                f'exit_weights has {len(self.exit_weights)} values, but the model has {count} classifiers'
                f' ({count - 1} exits and main). Give one for each, exits shallow to deep, then main.'
            )
        self.depth_weights.task_factors(count)
        if self.teacher is not None:
            resolve_teacher(self.teacher, self.depth_weights, count)

    def check_features(self, widths: Sequence[int]) -> None:
        """Raise if features are distilled and not all of one width.

        Args:
            widths: Number of features of each classifier, exits shallow to deep, then main.

        Raises:
            InvalidValueError: `feature_weight` is above 0 and an exit's width is not main's.

        Example:
            >>> MultiExitLoss('all').check_features([64, 512])  # no feature distillation: any width will do
            >>> MultiExitLoss('all', feature_weight=1.0).check_features([512, 512])
        """
        if self.feature_weight == 0 or len(set(widths)) <= 1:
            return
        *exits, main = widths
        others = ', '.join(f'exit {exit_idx} has {width}' for exit_idx, width in enumerate(exits) if width != main)
        raise InvalidValueError(
            f'Feature distillation needs features of one width, but {others} and main has {main}.'
            " Use head='paper' (--exit-head paper), projectors (--exit-projectors), or feature_weight 0."
        )

    def extra_repr(self) -> str:
        """Return the settings that `print` shows."""
        names = ['teacher', 'output_loss', 'output_weight', 'feature_weight', 'temperature', 'exit_weights']
        names += ['depth_weights'] if self.depth_weights != DepthWeights() else []
        names += ['teacher_weights'] if self.teacher_weights != 'equal' else []
        names += ['survivors'] if self.survivors else []
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names)

    def _split(self, stacked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the students [S, B, N], S at most K+1, and the detached teacher [B, N] of stacked [K+1, B, N]."""
        members = self._members(len(stacked))
        fixed = stacked.detach()
        if list(members) == [len(stacked) - 1]:
            return stacked[:-1], fixed[-1]
        if self.teacher_weights == 'skill':
            taught = torch.stack([fixed[idx] for idx in members])  # [M, B, N]
            return stacked, (self._skill_of(taught).view(-1, *[1] * (taught.ndim - 1)) * taught).sum(0)
        # No tensor of indices or weights, which would be copied to the device at every call.
        first, *others = (weight * fixed[idx] for idx, weight in members.items())
        return stacked, sum(others, first)

    def _task_rows(self, logits: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        if not isinstance(target, torch.Tensor) or target.ndim not in (1, 2) or len(target) != len(logits[0]):
            what = list(target.shape) if isinstance(target, torch.Tensor) else brief(target)
            raise InvalidValueError(
                f'target must have one row for each of {len(logits[0])} samples, class indices [B] or scores [B, C],'
                f' got {what}.'
            )
        target = target.to(logits[0].dtype) if target.is_floating_point() or target.ndim == 2 else target.long()
        rows = [self.criterion(tensor, target) for tensor in logits]
        if any(row.dim() != 0 for row in rows):
            raise InvalidValueError(
                f'criterion must return a scalar, got a tensor of shape {list(rows[0].shape)}. Use one that averages'
                " over the batch (reduction='mean')."
            )
        return torch.stack(rows)

    def _output_rows(self, logits: torch.Tensor) -> torch.Tensor:
        rows = output_distance(self.output_loss, *self._split(logits), self.temperature)
        rows = F.pad(self.output_weight * rows, (0, len(logits) - len(rows)))  # [K+1]
        return scale_rows(rows, self.depth_weights.output_factors(len(logits))) * self.distill_scale

    def _outside_rows(self, logits: torch.Tensor, outside: torch.Tensor, kd: KDConfig) -> torch.Tensor:
        if outside.shape != logits[0].shape:
            raise InvalidValueError(
                f"Logits of the outside teacher must have the model's shape {list(logits[0].shape)}, got"
                f' {list(outside.shape)}. Use a teacher of the same classes.'
            )
        kind = 'bernoulli' if self.multi_label else 'kl'
        return output_distance(kind, logits, outside.detach().to(logits.dtype), kd.temperature)

    def _feature_rows(self, outputs: Any, count: int) -> torch.Tensor:
        features = getattr(outputs, 'features', None)
        if features is None or len(features) != count or any(tensor is None for tensor in features):
            raise InvalidValueError(
                f'Feature distillation needs the features of all {count} classifiers, but outputs.features lacks them.'
                ' Call the model with exits=True, or use feature_weight 0.'
            )
        self.check_features([tensor.shape[-1] for tensor in features])
        features = [upcast(tensor) for tensor in features]
        if self.survivors:
            features = weigh_survivors(features, [upcast(tensor) for tensor in outputs.logits])
        students, teacher = self._split(torch.stack(features))
        rows = (students - teacher).square().mean((1, 2))
        return F.pad(self.feature_weight * rows, (0, count - len(rows))) * self.distill_scale  # [K+1]


def create_loss(name: str, **overrides: Any) -> MultiExitLoss:
    """Return the loss of a named method.

    Args:
        name: Key of `LOSSES`: 'ce', 'phuong', 'byot', 'eed' or 'beed'.
        **overrides: Keyword arguments of `MultiExitLoss` in place of the row's; one that is None is left out, so that
            a command-line flag left unset keeps the method's value.

    Raises:
        InvalidTypeError: An argument does not exist.
        InvalidValueError: The name is unknown, or the arguments contradict the method.

    Example:
        >>> create_loss('eed', output_loss='mse', temperature=None)
        MultiExitLoss(teacher='all', output_loss='mse', output_weight=1.0, feature_weight=0.0, temperature=3.0, \
exit_weights=None)
    """
    if not isinstance(name, str) or name not in LOSSES:
        nearest = get_close_matches(str(name).lower(), LOSSES, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else 'timm_multiexit.losses.LOSSES describes them.'
        raise InvalidValueError(f'loss must be one of {", ".join(sorted(LOSSES))}, got {name!r}; {hint}')
    names = list(signature(MultiExitLoss).parameters)
    unknown = [key for key in overrides if key not in names]
    if unknown:
        raise InvalidTypeError(f"create_loss has no argument '{unknown[0]}', the arguments are {', '.join(names)}.")
    given = {key: value for key, value in overrides.items() if value is not None}
    return MultiExitLoss(**{**LOSSES[name], **given})


def _binary_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
