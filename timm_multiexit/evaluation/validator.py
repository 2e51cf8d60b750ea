"""What `validate.py` does: evaluate all exits, choose thresholds on other data, and report what they do here."""

import hashlib
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_data_config

from timm_multiexit.calibration.calibrate import calibrate
from timm_multiexit.calibration.logits import LogitSet, collect_logits
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts, describe_times
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.checkpoints.save import hash_weights, save_policy
from timm_multiexit.cli.flags.validate_args import (
    asked_flags,
    asks_for_policies,
    check_budgets,
    check_outputs,
    check_preparation,
    check_validate_args,
    find_own_folder,
    given_policy,
    picture_path,
    policy_path,
)
from timm_multiexit.cli.validate_data import (
    check_other_images,
    create_calibration_split,
    create_split,
    load_mixed_batch,
)
from timm_multiexit.data.datasets import check_classes
from timm_multiexit.data.loaders import create_eval_loader
from timm_multiexit.evaluation.evaluate import (
    ExitTable,
    compare,
    create_static,
    evaluate_loader,
    evaluate_logits,
    make_table,
)
from timm_multiexit.evaluation.pictures import draw_accuracy_vs_macs
from timm_multiexit.evaluation.report import (
    Calibration,
    curve_points,
    describe_result,
    format_curve,
    format_dynamic,
    format_latency,
    format_order,
    report_curve,
    report_order,
    short_name,
)
from timm_multiexit.evaluation.speed import time_exits, time_policies
from timm_multiexit.evaluation.stamp import describe_inputs
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.budgets import BudgetTable, parse_budget
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_output
from timm_multiexit.utils.text import format_table

_logger = logging.getLogger(__name__)


_MAX_UNASKED_BYTES = 4 * 2**30  # of logits that no flag asked for

_MAX_TWICE = 0.05  # share of images that may be in two splits: CIFAR-100 and ImageNet have a few


@dataclass
class Validation:
    """What was found.

    Attributes:
        table: Of every classifier.
        sections: JSON-ready: dataset, input_size, preparation, precision, weights, picture, calibrated_on, curve,
            dynamic, timing, latency, failure_auroc, overthinking, monotonicity, compare; what there is.
        show: Is given the same for people, each part as soon as it is there.
    """

    table: ExitTable
    sections: dict[str, Any] = field(default_factory=dict)
    show: Callable[[str], None] = lambda text: None

    def add(self, text: str, **sections: Any) -> None:
        """Add sections and show their text."""
        self.sections |= sections
        self.show(text)


class Validator:
    """Evaluates a model as the command line says.

    Logits are collected once per split, see `LogitSet` for the memory they take; all but times is reckoned from them.

    Args:
        args: Of the command line, with `data_dir`, `dataset` and `split` resolved.
        model: The model, on its device and in eval mode.
        accelerator: Gives device, precision and processes.
        show: Is given each part of the report as text as soon as it is there; what fails later does not lose it.

    Raises:
        MultiExitError: The data cannot be had, flags do not fit model or data, or results cannot be written.
    """

    def __init__(
        self,
        args: Namespace,
        model: MultiExitModel,
        accelerator: Accelerator,
        *,
        show: Callable[[str], None] = lambda text: None,
    ):
        self.args, self.model, self.accelerator, self.show = args, model, accelerator, show
        self.data_config = resolve_data_config(vars(args), model=model)
        self.input_size = self.data_config['input_size']
        check_validate_args(args, model, accelerator.num_processes)
        check_preparation(args, model, self.data_config)
        self.described = self._describe()  # now, since a run that goes on trains new weights into its folder
        self.dataset = create_split(args, args.split, self.input_size[0])
        num_classes = check_classes(self.dataset, None)
        if num_classes and num_classes > model.num_classes:
            raise MultiExitError(
                f'The data has {num_classes} classes, the model {model.num_classes}: set --num-classes.'
            )
        self.calibration_split = create_calibration_split(args, self.dataset, self.input_size[0])
        self.statics = {
            name: create_static(name, num_classes=model.num_classes, in_chans=self.input_size[0])
            for name in args.compare
        }
        self.costs = StageCosts.from_exit_costs(model.cost(self.input_size))
        check_budgets(args, model, self.costs)
        check_outputs(args)

    def run(self) -> Validation:
        """Return the report; in several processes, and for a model without exits, the table alone."""
        loader = create_eval_loader(self.args, self.dataset, self.data_config, self.accelerator)
        if not self._keeps_logits():
            evaluation = self._evaluate(loader)
            return self._begin(evaluation.metrics, evaluation.num_samples)
        reported = self._collect(loader)
        metrics = evaluate_logits(reported.logits, reported.targets)
        validation = self._begin(metrics, len(reported.targets))
        sections = report_order(reported)
        validation.add(format_order(sections), **sections)
        meter = PolicyMeter(reported.logits, reported.targets, self.costs)
        calibration = self._calibrate(reported)
        self._add_policies(validation, meter, calibration)
        self._add_comparison(validation)
        self._draw(validation)
        return validation

    def _keeps_logits(self) -> bool:
        """Return whether dynamic inference is reported."""
        if not len(self.model.exits) or self.accelerator.num_processes > 1:
            return False
        if asked_flags(self.args) or not hasattr(self.dataset, '__len__'):
            return True
        size = 4 * len(self.dataset) * self.model.num_classes * (len(self.model.exits) + 1)
        if size > _MAX_UNASKED_BYTES:
            _logger.info(
                f'Dynamic inference is left out: it takes {size / 2**30:.0f} GB of memory, ask for it with a flag.'
            )
        return size <= _MAX_UNASKED_BYTES

    def _evaluate(self, loader: Any) -> Any:
        return evaluate_loader(self.model, loader, accelerator=self.accelerator, channels_last=self.args.channels_last)

    def _collect(self, loader: Any) -> LogitSet:
        return collect_logits(self.model, loader, accelerator=self.accelerator, channels_last=self.args.channels_last)

    def _begin(self, metrics: dict[str, dict[str, float]], num_samples: int) -> Validation:
        """Return a report of the table alone, and show it."""
        table = make_table(self.model, metrics, input_size=self.input_size, num_samples=num_samples)
        self.show(f'{self.args.model} on the {self.args.split} split, {num_samples} images:\n\n{table}')
        return Validation(table, dict(self.described), show=self.show)

    def _describe(self) -> dict[str, Any]:
        """Return what is evaluated on what; without the weights where nothing is written that is of them."""
        args = self.args
        is_written = args.save_policy or (args.results_file and args.results_format == 'json')
        folder = find_own_folder(args, self.model) if is_written and self.accelerator.is_main_process else None
        return describe_inputs(args, self.model, self.data_config, folder)

    def _calibrate(self, reported: LogitSet) -> Calibration | None:
        """Return what thresholds are chosen on, prepared like the reported images, without augmentation."""
        if self.calibration_split is None:
            return None
        dataset, source = self.calibration_split
        loader = create_eval_loader(self.args, dataset, self.data_config, self.accelerator)
        collected = self._collect(loader)
        num_shared, num = collected.count_shared(reported), len(collected.targets)
        check_other_images(self.args, num_shared, num, num_by_chance=_MAX_TWICE * num)
        if num_shared:
            _logger.warning(f'{num_shared} of {num} images that thresholds are chosen on are among those reported.')
        return Calibration(collected, source)

    def _add_policies(self, validation: Validation, meter: PolicyMeter, calibration: Calibration | None) -> None:
        """Add the budgeted curve, and what the policies that were asked for do."""
        images = None
        needs_times = any(parse_budget(budget).unit == 'ms' for budget in self.args.budget)
        if needs_times or (self.args.time_rounds and asks_for_policies(self.args, self.model)):
            images = load_mixed_batch(self.args, self.dataset, self.data_config, self.accelerator)
            images = images.to(next(self.model.parameters()).dtype)
            if self.args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
        table = None
        if calibration is not None:
            table = self._search(calibration, images if needs_times else None)
            curve = report_curve(meter, calibration, self.costs, table)
            text = format_curve(curve, self.args.split, self.costs.total)
            validation.add(text, curve=curve, calibrated_on=calibration.source)
        elif not self.args.budget:
            validation.add('No budgets: give --calib-split NAME or --calib-from-train N to choose thresholds on.')
        policies = self._find_policies(calibration, table)
        if policies:
            self._add_dynamic(validation, meter, policies, images)
        if self.args.save_policy:
            self._save_policy(table, policies)

    def _search(self, calibration: Calibration, images: torch.Tensor | None) -> BudgetTable:
        """Return policies for all budgets; in ms too if there are images to time."""
        logits, targets = calibration.collected.logits, calibration.collected.targets
        times = {}
        if images is not None:
            with self.accelerator.autocast():
                times['times'] = self.model.measure_costs(images)
            times['measured_on'] = describe_times(images)
        return search_budgets(
            logits,
            targets,
            self.costs,
            criterion=self.args.criterion,
            temperatures=fit_temperatures(logits, targets),
            combine=self.args.combine,
            **times,
        )

    def _find_policies(
        self, calibration: Calibration | None, table: BudgetTable | None
    ) -> dict[str, tuple[ExitPolicy, str | None]]:
        """Return name -> policy, and what its thresholds are chosen on, of those that the flags name."""
        args, found = self.args, {}
        if args.threshold is not None:
            policy = given_policy(args, len(self.model.exits))
            text = ','.join('none' if value is None else f'{value:g}' for value in args.threshold)
            found[f'threshold {text}'] = (policy, None)
        source = calibration.source if calibration else 'what the model was calibrated on'
        for budget in args.budget:
            found[f'budget {budget}'] = ((table or self.model.budgets).select(budget).policy, source)
        if args.max_drop is not None:
            policy = self._bound_drop(calibration)
            found[f'max drop {args.max_drop:g}'] = (policy, source)
        if not found and self.model.policy is not None:
            found["the model's own"] = (self.model.policy, None)
        return found

    def _bound_drop(self, calibration: Calibration) -> ExitPolicy:
        args = self.args
        delta = {} if args.delta is None else {'delta': args.delta}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            policy = calibrate(
                calibration.collected.logits,
                calibration.collected.targets,
                self.costs,
                max_drop=args.max_drop,
                criterion=args.criterion,
                combine=args.combine,
                **delta,
            )
        for warning in caught:
            _logger.warning(str(warning.message))
        return policy

    def _add_dynamic(
        self,
        validation: Validation,
        meter: PolicyMeter,
        policies: dict[str, tuple[ExitPolicy, str | None]],
        images: torch.Tensor | None,
    ) -> None:
        total = self.costs.total
        main = validation.table.rows[-2]
        rows = [
            {'policy': name, 'top-1': main['top-1'], 'macs': macs, 'macs_percent': 100 * macs / total}
            for name, macs in (('plain timm', total), ('all exits', self.costs.largest))
        ]
        rows += [
            {'policy': name, 'chosen_on': source, **describe_result(meter.measure(policy), total)}
            for name, (policy, source) in policies.items()
        ]
        timing = None
        if self.args.time_rounds:
            bare = {name: policy for name, (policy, _) in policies.items()}
            times = time_policies(self.model, images, bare, rounds=self.args.time_rounds, accelerator=self.accelerator)
            rows = [row | times[row['policy']] for row in rows]
            timing = {'images': len(images), 'rounds': self.args.time_rounds, 'device': str(images.device)}
        validation.add(
            format_dynamic(rows, self.args.split, timing), dynamic=rows, **({'timing': timing} if timing else {})
        )
        if self.args.time_rounds:
            latency = time_exits(self.model, images, rounds=self.args.time_rounds, accelerator=self.accelerator)
            validation.add(format_latency(latency), latency=latency)

    def _save_policy(self, table: BudgetTable, policies: dict[str, tuple[ExitPolicy, str | None]]) -> None:
        """Write the first budget's policy, else that of the bounded drop, and the table beside the weights."""
        args, path = self.args, policy_path(self.args)
        name = f'budget {args.budget[0]}' if args.budget else f'max drop {args.max_drop:g}'
        policy, source = policies[name]
        if hash_weights(path.parent) != self.described['weights']:
            raise MultiExitError(
                f'{path.parent} got other weights in the meantime, which the policy is not for: nothing is saved, run'
                ' validate.py again.'
            )
        save_policy(path.parent, policy, table)
        self.show(
            f'{path} has the policy of {name} and a table of {len(table.points)} budgets, chosen on {source}:'
            f" create_model('{args.model}', pretrained=True).policy"
        )

    def _add_comparison(self, validation: Validation) -> None:
        if self.statics:
            rows = compare(self.statics, self.args, self.dataset, self.accelerator)
            validation.add(f'Static models on the {self.args.split} split:\n\n{format_table(rows)}', compare=rows)

    def _draw(self, validation: Validation) -> None:
        args, path = self.args, picture_path(self.args)
        if path is None:
            return
        *exits, ensemble = [
            (row['exit'], (1e9 * row['GMACs sequential'], row['top-1'])) for row in validation.table.rows
        ]
        names = {str(idx): f'exit {idx}' for idx in range(len(self.model.exits))}
        main = validation.table.rows[-2]
        singles = {'plain backbone': (1e9 * main['GMACs fixed'], main['top-1']), 'ensemble of all': ensemble[1]}
        singles |= {
            row['static model']: (1e9 * row['GMACs'], row['top-1']) for row in validation.sections.get('compare', ())
        }
        picture = draw_accuracy_vs_macs(
            exits={names.get(name, name): point for name, point in exits},
            curves=curve_points(validation.sections.get('curve')),
            singles=singles,
            title=f'{short_name(args.model)}, {args.split} split, {validation.table.num_samples} images',
        )
        if picture is not None:
            write_output(path, picture)
            place = os.path.relpath(path, Path(args.results_file or path).parent)
            validation.sections['picture'] = {'path': place, 'sha256': hashlib.sha256(picture).hexdigest()}
            _logger.info(f'{path} shows accuracy over MACs.')
