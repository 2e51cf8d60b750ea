"""What a multi-exit model answers beside its logits: sample by sample, step by step, by a deadline."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from timm_multiexit.calibration.logits import collect_logits
from timm_multiexit.calibration.stage_costs import StageCosts, describe_times, measure_stages
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import calibrate, check_wishes, search_budgets
from timm_multiexit.inference.anytime import OwnThread
from timm_multiexit.inference.deadline import learn_times, predict_by_deadline
from timm_multiexit.inference.routing import Route, find_leaving
from timm_multiexit.models.sharding import check_whole
from timm_multiexit.policies.budgets import parse_budget
from timm_multiexit.policies.leaving import check_answer
from timm_multiexit.policies.policy import ExitPolicy, Prediction
from timm_multiexit.utils.checks import check_images, check_int, check_ints, is_list
from timm_multiexit.utils.environment import on_cpu
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, StateError, brief, is_number

if TYPE_CHECKING:
    from timm_multiexit.models.multi_exit import MultiExitModel

MAX_MS = 1e9  # a deadline of eleven days


def run_policy(
    model: MultiExitModel, x: Tensor, policy: Any, threshold: Any, budget: Any, bucket_sizes: Any
) -> Prediction:
    """Do `MultiExitModel.infer`."""
    _check_input(model, x)
    policy = _choose_policy(model, policy, threshold, budget)
    policy.check_exits(len(model.exits))
    sizes = _check_bucket_sizes(bucket_sizes)
    can_leave = model._can_leave or try_leaving(model, x.shape[1:])
    route = Route(policy, model._head_runner(x.shape[-2:]), can_leave=can_leave, bucket_sizes=sizes)
    with torch.no_grad():
        route.begin(len(x), x.device)
        return route.finish(model._taps.visit(model.backbone, x, route.visit))


def _choose_policy(model: MultiExitModel, policy: Any, threshold: Any, budget: Any) -> ExitPolicy:
    given = [value for value in (policy, threshold, budget) if value is not None]
    if len(given) > 1:
        raise InvalidValueError('policy, threshold and budget are mutually exclusive: pass one of them.')
    if threshold is not None:
        threshold = threshold.tolist() if hasattr(threshold, 'tolist') else threshold
        is_one = not is_list(threshold)
        return ExitPolicy('confidence', (threshold,) * len(model.exits) if is_one else tuple(threshold))
    if budget is not None:
        parse_budget(budget)
        if model.budgets is None:
            raise StateError(
                f'The model has no table of budgets to look up {budget!r} in: call model.calibrate(loader, budget=...)'
                ' on held-out data first.'
            )
        return model.budgets.select(budget).policy
    policy = model.policy if policy is None else policy
    if not isinstance(policy, ExitPolicy):
        what = 'The model has no policy' if policy is None else f'policy must be an ExitPolicy, got {brief(policy)}'
        raise InvalidValueError(
            f'{what}: pass an ExitPolicy, threshold=0.9, or budget="60%" after model.calibrate(loader, ...).'
        )
    return policy


def _check_input(model: MultiExitModel, x: Tensor) -> None:
    if model.training:
        raise StateError(
            'The model is in training mode, so its answers would depend on the batch: call model.eval() first.'
        )
    check_whole(model, 'Dynamic inference')
    if model.num_classes < 2:
        raise StateError(f'The model must have 2 or more classes, got {model.num_classes}.')
    check_same_classes(model)
    check_images(x, model.in_chans, model.backbone)


def check_same_classes(model: MultiExitModel) -> None:
    """Raise `StateError` where main's classifier was replaced by one of other classes than the exits have."""
    mains = [model.backbone.get_submodule(name) for name in model._taps.classifiers]
    widths = [head.fc.out_features for head in model.exits if isinstance(head.fc, torch.nn.Linear)]
    widths += [main.out_features for main in mains if isinstance(main, torch.nn.Linear)]
    if len(set(widths)) > 1:
        raise StateError(
            f'Exits and main must have the same classes, got {widths}, main last. Call'
            f' model.reset_classifier({widths[-1]}), not that of its backbone.'
        )


def _check_bucket_sizes(sizes: Sequence[int] | int | None) -> tuple[int, ...]:
    sizes = () if sizes is None else sizes
    return tuple(sorted(check_ints('bucket_sizes', sizes if is_list(sizes) else (sizes,), 1)))


def try_leaving(model: MultiExitModel, input_size: Sequence[int] | None = None) -> tuple[bool, ...]:
    """Return for each exit whether images can leave the batch there, found by a few forwards at the first call.

    They are of images of the caller's size where there are any: the model's own may be what a file says.
    """
    if model.training:
        raise StateError(
            'The model is in training mode, and a trial forward would change its statistics: call model.eval() first.'
        )
    check_whole(model, 'Dynamic inference')
    if model._can_leave is None:
        model._can_leave = find_leaving(model.backbone, model._taps, input_size or model.input_size)
    return model._can_leave


def step_exits(model: MultiExitModel, x: Tensor) -> OwnThread:
    """Do `MultiExitModel.anytime`."""
    _check_input(model, x)
    run_head, num_exits = model._head_runner(x.shape[-2:]), len(model.exits)

    def step() -> Generator[tuple[int, Tensor], None, None]:
        def answer(idx: int, tensor: Tensor) -> tuple[int, Tensor]:
            logits = run_head(idx, tensor)
            check_answer(idx, num_exits, logits)
            return idx, logits

        output = yield from model._taps.step(model.backbone, x, answer)
        check_answer(num_exits, num_exits, output)
        yield num_exits, output

    taps, num_classes = model._taps, model.num_classes

    def check() -> None:
        if model.training or model._taps is not taps or model.num_classes != num_classes:
            raise StateError(
                'The model was changed (its exits, classes or mode) since this iteration over the exits began: begin'
                ' a new one.'
            )

    return OwnThread(step(), check)


def predict_in_time(model: MultiExitModel, x: Tensor, deadline_ms: float) -> Prediction:
    """Do `MultiExitModel.predict`."""
    called = time.perf_counter()
    _check_input(model, x)
    if not is_number(deadline_ms) or not 0 < deadline_ms <= MAX_MS:
        error = InvalidValueError if isinstance(deadline_ms, Real) else InvalidTypeError
        raise error(f'deadline_ms must be > 0 and <= {MAX_MS:g}, got {brief(deadline_ms)}.')
    run_head = model._head_runner(x.shape[-2:])
    with torch.no_grad():
        times = model._time_book.find(x)
        if times is None:
            times = learn_times(model.backbone, model._taps, x, run_head=run_head)
            model._time_book.keep(x, times)
            called = time.perf_counter()
        end = called + deadline_ms / 1e3
        return predict_by_deadline(model.backbone, model._taps, x, times, end=end, run_head=run_head)


def calibrate_model(
    model: MultiExitModel,
    loader: Iterable[Any],
    budget: str | None,
    max_drop: float | None,
    delta: float | None,
    criterion: str,
    combine: str | None,
    measures_time: bool,
) -> ExitPolicy:
    """Do `MultiExitModel.calibrate`."""
    check_whole(model, 'Calibration')
    needs_times = check_wishes(budget, max_drop, delta, criterion, combine)
    measures_time = measures_time or needs_times
    collected = collect_logits(model, loader)
    logits, targets, images = collected.logits, collected.targets, collected.first_batch
    costs = StageCosts.from_exit_costs(model.cost(collected.input_size))
    times = measure_model_times(model, images) if measures_time else None
    with on_cpu():
        budgets = search_budgets(
            logits,
            targets,
            costs,
            criterion=criterion,
            temperatures=fit_temperatures(logits, targets),
            combine=combine,
            times=times,
            measured_on=describe_times(images) if measures_time else None,
        )
    if budget is not None:
        policy = budgets.select(budget).policy
    else:
        policy = calibrate(logits, targets, costs, max_drop=max_drop, delta=delta, criterion=criterion, combine=combine)
    model.policy, model.budgets = policy, budgets
    return policy


def measure_model_times(model: MultiExitModel, images: Tensor, rounds: int = 10) -> StageCosts:
    """Do `MultiExitModel.measure_times`."""
    _check_input(model, images)
    rounds = check_int('rounds', rounds, 1)
    run_head = model._head_runner(images.shape[-2:])
    return measure_stages(model.backbone, model._taps, images, run_head=run_head, rounds=rounds)
