"""Evaluate all exits of a model, choose thresholds on other images, and report what the policies do on these."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_multiexit.calibration.logits import LogitSet, collect_logits
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts, describe_times
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import calibrate, check_wishes, search_budgets
from timm_multiexit.evaluation.cascade import (
    Cascade,
    compare_curves,
    create_variants,
    format_networks,
    list_networks,
    match_policies,
    measure_cascade,
)
from timm_multiexit.evaluation.exit_table import (
    CreateLoader,
    ExitTable,
    evaluate_loader,
    evaluate_logits,
    evaluate_static,
    make_table,
)
from timm_multiexit.evaluation.report import (
    Calibration,
    describe_result,
    format_curve,
    format_dynamic,
    format_latency,
    format_order,
    note_better_exits,
    report_curve,
    report_order,
)
from timm_multiexit.evaluation.speed import time_exits, time_networks, time_policies
from timm_multiexit.models.multi_exit import MultiExitModel, check_model
from timm_multiexit.policies.budgets import BudgetTable, parse_budget
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_int, is_list
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, brief
from timm_multiexit.utils.text import format_table

_logger = logging.getLogger(__name__)


_MAX_BYTES = 4 * 2**30  # of logits that no question needs


@dataclass(frozen=True)
class ValidationData:
    """The images of a validation.

    Attributes:
        split: Name of the split that is reported.
        dataset: Its images.
        config: timm's data configuration.
        create_loader: Creates the loaders of all images.
        load_timed: Loads the batch [B, C, H, W] that is timed, of mixed classes, on the model's device.
        calibration: Data set that thresholds are chosen on, and its description; None for no such images.
        check_shared: Called with how many of the images that thresholds are chosen on are among those reported, and
            how many there are; raises if that are too many.
        channels_last: Memory format of all images.
    """

    split: str
    dataset: Any
    config: Mapping[str, Any]
    create_loader: CreateLoader
    load_timed: Callable[[], Tensor]
    calibration: tuple[Any, str] | None = None
    check_shared: Callable[[int, int], None] = lambda num_shared, num: None
    channels_last: bool = False


@dataclass(frozen=True)
class Questions:
    """What is measured beside the table of all classifiers.

    Attributes:
        policies: Name -> policy to measure as it is.
        budgets: Mean costs per image to choose policies for, see `parse_budget`.
        max_drop: Choose the cheapest policy that loses at most this share of accuracy; None for none.
        delta: Probability that `max_drop` is exceeded.
        criterion: Key of `CRITERIA`, of the policies that are chosen.
        combine: As in `ExitPolicy`, of the policies that are chosen.
        time_rounds: How often policies and main are timed; 0 for no times.
        needs_logits: Measure dynamic inference whatever memory the logits take.

    Raises:
        InvalidTypeError: A policy, a budget or a number is of another type.
        InvalidValueError: A number is out of range, or the criterion or `combine` unknown.
    """

    policies: Mapping[str, ExitPolicy] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()
    max_drop: float | None = None
    delta: float = 0.1
    criterion: str = 'confidence'
    combine: str | None = None
    time_rounds: int = 5
    needs_logits: bool = False

    def __post_init__(self) -> None:
        wrong = [value for value in self.policies.values() if not isinstance(value, ExitPolicy)]
        if wrong:
            raise InvalidTypeError(f'policies must be ExitPolicies by name, got {brief(wrong[0])}.')
        if not is_list(self.budgets):
            raise InvalidTypeError(f"budgets must be a list of texts such as '60%', got {brief(self.budgets)}.")
        for budget in self.budgets:
            parse_budget(budget)
        if self.max_drop is not None:
            check_wishes(None, self.max_drop, self.delta, self.criterion, self.combine)
        ExitPolicy(self.criterion, combine=self.combine)
        object.__setattr__(self, 'time_rounds', check_int('time_rounds', self.time_rounds, 0))


@dataclass
class Validation:
    """The results of a validation.

    Attributes:
        table: Of every classifier.
        sections: JSON-ready: failure_auroc, overthinking, monotonicity, curve, calibrated_on, dynamic, timing, latency,
            compare and rivals, as far as they were measured.
        policy: The policy chosen for the first budget, else for the bounded drop; None if none was chosen.
        budgets: All policies that were found on the calibration images.
    """

    table: ExitTable
    sections: dict[str, Any] = field(default_factory=dict)
    policy: ExitPolicy | None = None
    budgets: BudgetTable | None = None


class _NamedPolicy(NamedTuple):
    """A policy that is measured, and why: its kind is 'threshold', 'budget', 'max_drop' or 'own'."""

    policy: ExitPolicy
    kind: str
    chosen_on: str | None = None
    budget: str | None = None


class Validator:
    """Evaluates a model on the images of a split.

    Logits are collected once per split, see `LogitSet` for the memory they take; everything but times is computed
    from them.

    Args:
        model: The model, on its device and in eval mode.
        data: The images.
        questions: What to measure.
        accelerator: Device, precision and processes.
        name: The model in the heading.
        show: Called with each section of the report as text as soon as it is measured.

    Raises:
        InvalidValueError: A question needs images to choose thresholds on, and `data` has no such images.
    """

    def __init__(
        self,
        model: MultiExitModel,
        data: ValidationData,
        questions: Questions,
        *,
        accelerator: Accelerator,
        name: str = 'Model',
        show: Callable[[str], None] = lambda text: None,
    ):
        if data.calibration is None and (questions.max_drop is not None or (questions.budgets and not model.budgets)):
            raise InvalidValueError('Budgets and max_drop need images to choose thresholds on: see ValidationData.')
        self.model, self.data, self.questions = check_model(model), data, questions
        self.accelerator, self.name, self.show = accelerator, name, show
        self.costs = StageCosts.from_exit_costs(model.cost(data.config['input_size']))
        self._calibration: Calibration | None = None
        self._times: StageCosts | None = None
        self._policies: dict[str, _NamedPolicy] = {}

    def run(self) -> Validation:
        """Return the results; with several processes, and for a model without exits, the table alone."""
        data = self.data
        loader = data.create_loader(data.dataset, data.config)
        if not self._keeps_logits():
            found = evaluate_loader(self.model, loader, accelerator=self.accelerator, channels_last=data.channels_last)
            return self._begin(found.metrics, found.num_samples)
        self._measure_times()
        reported = self._collect(loader)
        validation = self._begin(evaluate_logits(reported.logits, reported.targets), len(reported.targets))
        order = report_order(reported)
        self._add(validation, format_order(order), **order)
        meter = PolicyMeter(reported.logits, reported.targets, self.costs)
        self._add_policies(validation, meter, self._calibrate(reported))
        return validation

    def compare(self, validation: Validation, statics: Mapping[str, MultiExitModel]) -> None:
        """Add models without exits, by name, evaluated on the same images."""
        data = self.data
        rows = evaluate_static(statics, data.dataset, create_loader=data.create_loader, accelerator=self.accelerator)
        self._add(validation, f'Static models on the {data.split} split:\n\n{format_table(rows)}', compare=rows)

    def compare_cascade(
        self,
        validation: Validation,
        cascade: Cascade,
        names: tuple[str, str],
        *,
        statics: Mapping[str, MultiExitModel] | None = None,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        """Add a cascade of two models beside the policies that were measured, and the models of `compare`.

        Args:
            validation: What `run` returned, and `compare` has added the `statics` to.
            cascade: On the model's device, in eval mode; images are prepared for it as for the model.
            names: Of its models.
            statics: Those of `compare`.
            batch_sizes: Sizes to measure images per second at; none for no times.

        Raises:
            InvalidValueError: There are no images to choose thresholds on.
        """
        if self._calibration is None or self.data.calibration is None:
            raise InvalidValueError('A cascade needs images to choose thresholds on: see ValidationData.')
        config, own = self.data.config, {name: named.policy for name, named in self._policies.items()}
        source, chosen_on = self._calibration.source, self._calibration.collected
        held_out, reported = (
            self._collect(self.data.create_loader(dataset, config), cascade)
            for dataset in (self.data.calibration[0], self.data.dataset)
        )
        costs = cascade.costs(config['input_size'])
        meter = PolicyMeter(reported.logits, reported.targets, costs)
        asked = self.questions
        rival = measure_cascade(
            costs, meter, Calibration(held_out, source), criterion=asked.criterion, combine=asked.combine
        )
        matched = match_policies(own, PolicyMeter(chosen_on.logits, chosen_on.targets, self.costs), rival)
        section: dict[str, Any] = {
            'rows': list_networks(validation.table.rows[-2], validation.sections, own, matched, rival, names),
            'cascade': {
                **dict(zip(('small', 'large'), names)),
                'chosen_on': source,
                'curve': rival.curve,
                'pairs': compare_curves(validation.sections['curve'], rival),
            },
        }
        if batch_sizes and asked.time_rounds:
            images = self._load_timed()
            sizes = [size for size in batch_sizes if size <= len(images)] or [len(images)]
            if sizes != list(batch_sizes):
                _logger.warning(f'Times are of batches of {sizes}, the {self.data.split} split has no larger ones.')
            found = time_networks(
                *create_variants(self.model, cascade, names, own, matched, statics or {}, images),
                sizes,
                rounds=asked.time_rounds,
                accelerator=self.accelerator,
            )
            section['rows'] = [row | {'img/s': found[row['name']]} for row in section['rows']]
            timing = {'rounds': asked.time_rounds, 'device': str(images.device)}
            section['timing'] = {'batch_sizes': sizes, **timing}
        self._add(validation, format_networks(section, self.data.split), rivals=section)

    def _measure_times(self) -> None:
        """Measure what budgets in ms are checked against before the evaluation, and chosen by after it."""
        budgets = [budget for budget in self.questions.budgets if parse_budget(budget).unit == 'ms']
        if budgets and self.data.calibration is not None:
            with self.accelerator.autocast():
                self._times = self.model.measure_times(self._load_timed())
            for budget in budgets:
                self._times.check_budget(budget)

    def _keeps_logits(self) -> bool:
        """Return whether dynamic inference is reported."""
        if not len(self.model.exits) or self.accelerator.num_processes > 1:
            return False
        if self.questions.needs_logits or not hasattr(self.data.dataset, '__len__'):
            return True
        size = 4 * len(self.data.dataset) * self.model.num_classes * (len(self.model.exits) + 1)
        if size > _MAX_BYTES:
            _logger.info(
                f'Dynamic inference is not measured: its logits take {size / 2**30:.0f} GB of memory. Name a policy, a'
                ' budget or calibration images to measure it.'
            )
        return size <= _MAX_BYTES

    def _collect(self, loader: Iterable[Any], model: nn.Module | None = None) -> LogitSet:
        return collect_logits(
            model or self.model, loader, accelerator=self.accelerator, channels_last=self.data.channels_last
        )

    def _load_timed(self) -> Tensor:
        """Return the batch that is timed, as the model takes it."""
        images = self.data.load_timed().to(next(self.model.parameters()).dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.data.channels_last else images

    def _begin(self, metrics: dict[str, dict[str, float]], num_samples: int) -> Validation:
        """Return the table alone, and show it."""
        table = make_table(self.model, metrics, input_size=self.data.config['input_size'], num_samples=num_samples)
        self.show(f'{self.name} on the {self.data.split} split, {num_samples} images:\n\n{table}')
        return Validation(table)

    def _add(self, validation: Validation, text: str, **sections: Any) -> None:
        """Add sections and show their text."""
        validation.sections |= sections
        self.show(text)

    def _calibrate(self, reported: LogitSet) -> Calibration | None:
        """Return what thresholds are chosen on, preprocessed like the reported images, without augmentation."""
        if self.data.calibration is None:
            return None
        dataset, source = self.data.calibration
        collected = self._collect(self.data.create_loader(dataset, self.data.config))
        num_shared, num = collected.count_shared(reported), len(collected.targets)
        self.data.check_shared(num_shared, num)
        if num_shared:
            _logger.warning(f'{num_shared} of {num} images that thresholds are chosen on are among those reported.')
        return Calibration(collected, source)

    def _add_policies(self, validation: Validation, meter: PolicyMeter, calibration: Calibration | None) -> None:
        """Add the budgeted curve and the results of all policies."""
        asked, images = self.questions, None
        has_policies = asked.policies or asked.budgets or asked.max_drop is not None or self.model.policy is not None
        if self._times is not None or (asked.time_rounds and has_policies):
            images = self._load_timed()
        self._calibration = calibration
        if calibration is not None:
            validation.budgets = self._search(calibration, images)
            curve = report_curve(meter, calibration, self.costs, validation.budgets)
            text = format_curve(curve, self.data.split, self.costs.total)
            self._add(validation, text, curve=curve, calibrated_on=calibration.source)
        policies = self._find_policies(calibration, validation.budgets or self.model.budgets)
        chosen = [named.policy for named in policies.values() if named.kind in ('budget', 'max_drop')]
        validation.policy = chosen[0] if chosen else None
        self._policies = policies
        if policies:
            self._add_dynamic(validation, meter, policies, images)

    def _search(self, calibration: Calibration, images: Tensor | None) -> BudgetTable:
        """Return policies for all budgets; in ms too if the images were timed."""
        logits, targets = calibration.collected.logits, calibration.collected.targets
        return search_budgets(
            logits,
            targets,
            self.costs,
            criterion=self.questions.criterion,
            temperatures=fit_temperatures(logits, targets),
            combine=self.questions.combine,
            times=self._times,
            measured_on=None if images is None or self._times is None else describe_times(images),
        )

    def _find_policies(self, calibration: Calibration | None, budgets: BudgetTable | None) -> dict[str, _NamedPolicy]:
        """Return name -> policy of all that is asked, of nothing else the model's own."""
        asked = self.questions
        found = {name: _NamedPolicy(policy, 'threshold') for name, policy in asked.policies.items()}
        source = calibration.source if calibration else 'what the model was calibrated on'
        if budgets is not None:
            for budget in asked.budgets:
                found[f'budget {budget}'] = _NamedPolicy(budgets.select(budget).policy, 'budget', source, budget)
        if asked.max_drop is not None and calibration is not None:
            policy = self._bound_drop(calibration, asked.max_drop)
            found[f'max drop {asked.max_drop:g}'] = _NamedPolicy(policy, 'max_drop', source)
        if not found and self.model.policy is not None:
            found["the model's own"] = _NamedPolicy(self.model.policy, 'own')
        return found

    def _bound_drop(self, calibration: Calibration, max_drop: float) -> ExitPolicy:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            policy = calibrate(
                calibration.collected.logits,
                calibration.collected.targets,
                self.costs,
                max_drop=max_drop,
                delta=self.questions.delta,
                criterion=self.questions.criterion,
                combine=self.questions.combine,
            )
        for warning in caught:
            _logger.warning(str(warning.message))
        return policy

    def _add_dynamic(
        self, validation: Validation, meter: PolicyMeter, policies: Mapping[str, _NamedPolicy], images: Tensor | None
    ) -> None:
        """Add accuracy and cost of policies, and their times if there are images to time."""
        total, main = self.costs.total, validation.table.rows[-2]
        rows: list[dict[str, Any]] = []
        for name, macs in (('main', total), ('all exits', self.costs.largest)):
            row = {'policy': name, 'kind': 'reference', 'budget': None, 'top-1': main['top-1'], 'macs': macs}
            rows.append(row | {'macs_percent': 100 * macs / total})
        for name, (policy, kind, source, budget) in policies.items():
            row = {'policy': name, 'kind': kind, 'budget': budget, 'chosen_on': source}
            rows.append(row | describe_result(meter.measure(policy), total))
        notes = ''.join(f'\n{note}' for note in note_better_exits(rows, validation.table.rows[:-2]))
        rounds = self.questions.time_rounds
        if not rounds or images is None:
            self._add(validation, format_dynamic(rows, self.data.split, None) + notes, dynamic=rows)
            return
        bare = {name: named.policy for name, named in policies.items()}
        times = time_policies(self.model, images, bare, rounds=rounds, accelerator=self.accelerator)
        rows = [row | times[row['policy']] for row in rows]
        timing = {'images': len(images), 'rounds': rounds, 'device': str(images.device)}
        self._add(validation, format_dynamic(rows, self.data.split, timing) + notes, dynamic=rows, timing=timing)
        latency = time_exits(self.model, images, rounds=rounds, accelerator=self.accelerator)
        self._add(validation, format_latency(latency), latency=latency)
