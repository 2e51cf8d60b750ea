"""The ways to ask a multi-exit model for less than everything: sample by sample, step by step, or by a deadline."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.calibration.calibrate import calibrate
from timm_multiexit.calibration.logits import collect_logits
from timm_multiexit.calibration.stage_costs import StageCosts, describe_times, measure_stages
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.inference.anytime import OwnThread
from timm_multiexit.inference.deadline import TimeBook, learn_times, predict
from timm_multiexit.inference.routing import Route, find_leaving
from timm_multiexit.models.timm_surface import TimmSurface
from timm_multiexit.policies.budgets import BudgetTable, parse_budget
from timm_multiexit.policies.policy import ExitPolicy, Prediction
from timm_multiexit.utils.errors import MultiExitError, brief

MAX_MS = 1e9  # a deadline of eleven days


class DynamicInference(TimmSurface):
    """What `MultiExitModel` answers with fewer exits than all.

    Attributes:
        policy: Where samples leave when `infer` is not told; None until the model is calibrated or it is set.
        budgets: The policies that calibration found for many budgets; None until then.
    """

    policy: ExitPolicy | None = None
    budgets: BudgetTable | None = None

    def _forget_inference(self) -> None:
        """Forget what was learnt about exits that have changed."""
        self.policy, self.budgets = None, None
        self._can_leave: tuple[bool, ...] | None = None
        self._time_book = TimeBook()

    def infer(
        self,
        x: Tensor,
        policy: ExitPolicy | None = None,
        *,
        threshold: float | Sequence[float | None] | None = None,
        budget: str | None = None,
        bucket_sizes: Sequence[int] | None = None,
    ) -> Prediction:
        """Return one answer per image; an image that an exit is sure of leaves the batch there.

        The answers are those of `apply_policy` on the logits of all exits. Without policy, threshold and budget the
        model's own policy says where to leave. Runs without gradients.

        Args:
            x: Images, [B, in_chans, H, W].
            policy: Who leaves where.
            threshold: Least confidence (largest probability) to leave with, in [0, 1], for all exits or one for each;
                None for an exit that is not used.
            budget: Mean cost of an image, of those that `calibrate` found: '60%' of the plain backbone's MACs,
                '1.2GMACs', or '5ms' where times were measured.
            bucket_sizes: Batch sizes to go on with, rising. What is left of the batch is filled up to the next of
                them, so that compiled blocks meet few shapes. None for any size.

        Returns:
            The answers [B, C] and the exit [B] of each image, in input order.

        Raises:
            MultiExitError: More or less than one way to decide is given, it does not fit the exits, the batch is empty,
                an exit gives NaN, or the model is in training mode.
        """
        self._check_inference(x)
        policy = self._choose_policy(policy, threshold, budget)
        policy.check_exits(len(self.exits))
        route = Route(
            policy,
            lambda idx, tensor: self._run_head(idx, tensor, x)[0],
            can_leave=self.routing,
            bucket_sizes=_check_bucket_sizes(bucket_sizes),
        )
        with torch.no_grad():
            route.begin(len(x), x.device)
            return route.finish(self._taps.visit(self.backbone, x, route.visit))

    def _choose_policy(self, policy: Any, threshold: Any, budget: Any) -> ExitPolicy:
        given = [value for value in (policy, threshold, budget) if value is not None]
        if len(given) > 1:
            raise MultiExitError('policy, threshold and budget exclude each other: give one of them.')
        if threshold is not None:
            threshold = threshold.tolist() if isinstance(threshold, Tensor) else threshold
            is_one = isinstance(threshold, (Real, str))
            return ExitPolicy('confidence', (threshold,) * len(self.exits) if is_one else tuple(threshold))
        if budget is not None:
            if self.budgets is None:
                raise MultiExitError(
                    f'No policy is known for a budget of {budget!r}: model.calibrate(loader, budget=...) on'
                    ' held-out data first.'
                )
            return self.budgets.select(budget).policy
        policy = self.policy if policy is None else policy
        if not isinstance(policy, ExitPolicy):
            what = 'infer needs to know where to leave' if policy is None else f'The policy is {policy!r}'
            raise MultiExitError(
                f'{what}: give an ExitPolicy, threshold=0.9, or budget="60%" after model.calibrate(loader, ...).'
            )
        return policy

    def _check_inference(self, x: Tensor) -> None:
        if self.training:
            raise MultiExitError('The model is in training mode, its answers would depend on the batch: model.eval().')
        if self.num_classes < 2:
            raise MultiExitError(f'The model has {self.num_classes} classes, allowed are 2 or more.')
        if not isinstance(x, Tensor) or x.ndim != 4 or 0 in x.shape:
            kind = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise MultiExitError(f'Images are {kind}, allowed is a tensor [B, {self.in_chans}, H, W] of 1 or more.')

    @property
    def routing(self) -> tuple[bool, ...]:
        """For each exit, whether images can leave the batch there, found by a few forwards at the first call.

        Where they cannot, since more than the tapped tensor goes on from there, an image that has decided stays in the
        batch to the next exit where it can leave, or until all have decided.
        """
        if self.training:
            raise MultiExitError('The model is in training mode, a try-out would change its statistics: model.eval().')
        if self._can_leave is None:
            self._can_leave = find_leaving(self.backbone, self._taps, self.input_size)
        return self._can_leave

    def anytime(self, x: Tensor) -> OwnThread:
        """Yield (exit, logits [B, C]) of each exit as soon as it is known, main last as the number of exits.

        The forward waits in the meantime; leaving the loop ends it, and the rest is not computed. Other calls of the
        model may come in between. Runs without gradients.

        Args:
            x: Images, [B, in_chans, H, W].

        Raises:
            MultiExitError: The batch is empty, the model is in training mode, or a loop that began in another thread
                is continued.
        """
        self._check_inference(x)
        return OwnThread(self._step(x))

    def _step(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        def read(idx: int, tensor: Tensor) -> tuple[int, Tensor]:
            return idx, self._run_head(idx, tensor, x)[0]

        output = yield from self._taps.step(self.backbone, x, read)
        yield len(self.exits), output

    def predict(self, x: Tensor, *, deadline_ms: float) -> Prediction:
        """Return the deepest answer that is known before the deadline, of one exit for the whole batch.

        How long each part takes is learnt by measuring, for each shape of input: the first call with a shape runs a few
        forwards for that before its time begins, every call adds what it sees. A later exit is tried only if it is
        reckoned to be in time; if it is late nevertheless, an earlier answer counts. If not even the first exit can be
        in time it is the answer, as the earliest there is. Runs without gradients.

        Args:
            x: Images, [B, in_chans, H, W].
            deadline_ms: Milliseconds from the call, above 0.

        Raises:
            MultiExitError: The deadline is not above 0, the batch is empty, or the model is in training mode.
        """
        self._check_inference(x)
        if isinstance(deadline_ms, bool) or not isinstance(deadline_ms, Real) or not 0 < deadline_ms <= MAX_MS:
            raise MultiExitError(
                f'deadline_ms is {brief(deadline_ms)}, allowed are milliseconds above 0 to {MAX_MS:g}.'
            )

        def run_head(idx: int, tensor: Tensor) -> Tensor:
            return self._run_head(idx, tensor, x)[0]

        with torch.no_grad():
            times = self._time_book.find(x)
            if times is None:
                times = learn_times(self.backbone, self._taps, x, run_head=run_head)
                self._time_book.keep(x, times)
            return predict(self.backbone, self._taps, x, times, deadline_ms=deadline_ms, run_head=run_head)

    def calibrate(
        self,
        loader: Iterable,
        *,
        budget: str | None = None,
        max_drop: float | None = None,
        delta: float = 0.1,
        criterion: str = 'confidence',
        combine: str | None = None,
        measures_time: bool = False,
    ) -> ExitPolicy:
        """Find where to leave, on held-out data, and keep it as `policy`, and what it is for all budgets as `budgets`.

        Temperatures are fitted for every classifier. The data must be neither what the model was trained on, or it
        would be too sure of itself, nor what results are reported on.

        Args:
            loader: Batches of images and class indices, in the order that they are there.
            budget: Mean cost of an image, '60%' of the plain backbone's MACs, '1.2GMACs', or '5ms' on this machine.
            max_drop: In place of a budget: the share of accuracy, in (0, 1), that may be lost against main, 0.01 for a
                point; the cheapest policy that is known to lose no more with probability 1 - `delta`.
            delta: See `max_drop`.
            criterion: See `ExitPolicy`.
            combine: See `ExitPolicy`.
            measures_time: Find policies for budgets in milliseconds too; implied by such a budget. They are of this
                machine, per image, at the batch size of the loader.

        Returns:
            The policy.

        Raises:
            MultiExitError: Not one of `budget` and `max_drop`, a number out of range, a budget that cannot be met, an
                empty loader, logits that are NaN, or the model is in training mode.
        """
        if (budget is None) == (max_drop is None):
            raise MultiExitError('Give one of budget, as budget="60%", and max_drop, as max_drop=0.01.')
        measures_time |= budget is not None and parse_budget(budget).unit == 'ms'
        collected = collect_logits(self, loader)
        logits, targets = collected.logits, collected.targets
        costs, times = StageCosts.from_exit_costs(self.cost(collected.input_size)), {}
        if measures_time:
            images = collected.first_batch
            times['times'] = self.measure_costs(images)
            times['measured_on'] = describe_times(images)
        budgets = search_budgets(
            logits,
            targets,
            costs,
            criterion=criterion,
            temperatures=fit_temperatures(logits, targets),
            combine=combine,
            **times,
        )
        if budget is not None:
            policy = budgets.select(budget).policy
        else:
            policy = calibrate(
                logits, targets, costs, max_drop=max_drop, delta=delta, criterion=criterion, combine=combine
            )
        self.policy, self.budgets = policy, budgets
        return policy

    def measure_costs(self, images: Tensor, rounds: int = 10) -> StageCosts:
        """Return what each part of the model takes on this machine, in milliseconds per image.

        Args:
            images: A batch [B, in_chans, H, W] of the size that is asked for in use.
            rounds: Turns of each part, of whose times the median counts.
        """
        self._check_inference(images)
        return measure_stages(
            self.backbone,
            self._taps,
            images,
            run_head=lambda idx, tensor: self._run_head(idx, tensor, images)[0],
            rounds=rounds,
        )


def _check_bucket_sizes(sizes: Sequence[int] | None) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes or ())
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise MultiExitError(f'bucket_sizes are {list(sizes)}, allowed are batch sizes from 1.')
    return tuple(sorted(sizes))
