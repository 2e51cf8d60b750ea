"""Cascades of two models without exits, the rival of early exits: the second answers where the first is unsure."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.evaluation.report import Calibration, report_curve
from timm_multiexit.evaluation.speed import make_plain
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.outputs import ExitOutputs
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.leaving import PolicyRun, check_answer
from timm_multiexit.policies.policy import ExitPolicy, Prediction
from timm_multiexit.utils.errors import InvalidValueError
from timm_multiexit.utils.text import format_table


class Cascade(nn.Module):
    """Two models without exits, a small and a large one of the same classes, asked like a model with one exit.

    The small one is the exit and the large one is main, so that policies, their search and their measurement are those
    of exits. An image costs the small model where it leaves, and both where it does not.

    Args:
        small: The model that is asked first.
        large: The model for what the first is unsure of.

    Raises:
        InvalidValueError: One has exits, or they have other classes.
    """

    def __init__(self, small: MultiExitModel, large: MultiExitModel):
        super().__init__()
        if len(small.exits) or len(large.exits):
            raise InvalidValueError('The models of a cascade must be without exits: pass MultiExitModel(backbone, []).')
        if small.num_classes != large.num_classes:
            raise InvalidValueError(
                f'The models of a cascade must have the same classes, got {small.num_classes} and {large.num_classes}.'
            )
        self.small, self.large = small, large

    def forward(self, images: Tensor, exits: bool = True) -> ExitOutputs:
        """Return the logits [B, C] of both models on all images [B, in_chans, H, W]; without features."""
        return ExitOutputs((self.small(images), self.large(images)), ())

    def costs(self, input_size: tuple[int, int, int]) -> StageCosts:
        """Return what leaving costs in MACs: the small model, or both; the large alone where the first is not used."""
        small, large = (model.cost(input_size)[-1].fixed.macs for model in (self.small, self.large))
        return StageCosts(paths=(0.0, large), heads=(small,))

    @torch.no_grad()
    def infer(self, images: Tensor, policy: ExitPolicy) -> Prediction:
        """Return the answers [B, C] and which model gave them, 0 or 1, [B]; the large one sees the unsure images alone.

        Args:
            images: [B, in_chans, H, W].
            policy: Who leaves after the small model, of one exit.
        """
        policy.check_exits(1)
        exit_idx = torch.ones(len(images), dtype=torch.int64, device=images.device)
        run = PolicyRun(policy)
        if not policy.used:
            answers = run.answer(1, self.large(images))
            check_answer(1, 1, answers)
            return Prediction(answers, exit_idx)
        answers = run.answer(0, self.small(images))
        leaves = policy.leaves(0, run.score(answers))
        rows = (~leaves).nonzero().squeeze(1)
        if len(rows):
            run.select(rows)
            answers = answers.index_copy(0, rows, run.answer(1, self.large(images[rows])))
        check_answer(1, 1, answers)
        return Prediction(answers, exit_idx - leaves.long())


class Rival(NamedTuple):
    """A cascade on the images of a validation.

    Attributes:
        meter: Its logits on the reported images.
        table: Policies for all budgets, searched for on the images that thresholds are chosen on.
        curve: As `report_curve` gives it.
    """

    meter: PolicyMeter
    table: BudgetTable
    curve: dict[str, Any]


def measure_cascade(
    costs: StageCosts, meter: PolicyMeter, calibration: Calibration, *, criterion: str, combine: str | None
) -> Rival:
    """Return what a cascade is worth by the search that the network's own exits have."""
    logits, targets = calibration.collected.logits, calibration.collected.targets
    table = search_budgets(
        logits, targets, costs, criterion=criterion, temperatures=fit_temperatures(logits, targets), combine=combine
    )
    return Rival(meter, table, report_curve(meter, calibration, costs, table))


def match_policies(
    own: Mapping[str, ExitPolicy], own_meter: PolicyMeter, rival: Rival
) -> dict[str, tuple[str, ExitPolicy]]:
    """Return for each policy of the network a name and the cascade's best policy of at most its mean MACs.

    Both means are of the images that thresholds are chosen on, which `own_meter` measures. Where even the small model
    alone costs more there is none.
    """
    found = {}
    for name, policy in own.items():
        point = rival.table.best_within((own_meter.measure(policy).macs or 0.0) * (1 + 1e-6))
        if point is not None:
            found[name] = (f'cascade, MACs of {name}', point.policy)
    return found


def compare_curves(curve: Mapping[str, Any], rival: Rival) -> list[dict[str, Any]]:
    """Return for each budget of the network's own curve its result and the cascade's; None where that has none.

    Budgets are mean MACs on the images that thresholds are chosen on; top-1 and MACs are those of the reported images.
    """
    pairs = []
    for point in curve['points']:
        best = rival.table.best_within(point['budget_macs'] * (1 + 1e-6))
        own = point['search']
        if own is not None:
            other = best and rival.meter.measure(best.policy)
            pairs.append(
                {
                    'budget_macs': point['budget_macs'],
                    'own': {'top-1': own['top-1'], 'macs': own['macs']},
                    'cascade': other and {'top-1': other.accuracy, 'macs': other.macs},
                }
            )
    return pairs


def list_networks(
    main: Mapping[str, Any],
    sections: Mapping[str, Any],
    own: Mapping[str, ExitPolicy],
    matched: Mapping[str, tuple[str, ExitPolicy]],
    rival: Rival,
    names: tuple[str, str],
) -> list[dict[str, Any]]:
    """Return one row for each that is compared: kind, name, top-1 in percent and mean MACs; of policies what they are.

    Args:
        main: The row of main in the network's table.
        sections: Those of the validation: the results of its policies, and static models.
        own: Its policies.
        matched: What `match_policies` gave.
        rival: The cascade.
        names: Of the cascade's models.
    """
    dynamic = {row['policy']: row for row in sections.get('dynamic', ())}
    rows = [{'kind': 'main', 'name': 'main', 'top-1': main['top-1'], 'macs': 1e9 * main['GMACs fixed']}]
    for name in own:
        kept = {key: dynamic[name][key] for key in ('thresholds', 'shares', 'top-1', 'macs')}
        rows.append({'kind': 'own', 'name': name, **kept})
        if name in matched:
            result = rival.meter.measure(matched[name][1])
            values = {'thresholds': list(result.policy.thresholds), 'shares': list(result.shares)}
            values |= {'top-1': result.accuracy, 'macs': result.macs}
            rows.append({'kind': 'cascade', 'name': matched[name][0], **values})
    for name, thresholds in zip(names, (0.0, None)):
        result = rival.meter.measure(ExitPolicy('confidence', (thresholds,)))
        rows.append({'kind': 'static', 'name': name, 'top-1': result.accuracy, 'macs': result.macs})
    for row in sections.get('compare', ()):
        if row['static model'] not in names:
            values = {'top-1': row['top-1'], 'macs': 1e9 * row['GMACs']}
            rows.append({'kind': 'static', 'name': row['static model'], **values})
    return rows


def create_variants(
    model: MultiExitModel,
    cascade: Cascade,
    names: tuple[str, str],
    own: Mapping[str, ExitPolicy],
    matched: Mapping[str, tuple[str, ExitPolicy]],
    statics: Mapping[str, MultiExitModel],
    images: Tensor,
) -> tuple[dict[str, Callable[[Tensor], object]], dict[str, Tensor]]:
    """Return what `time_networks` takes: name -> what runs a batch, and name -> the images of its size.

    Names are those of `list_networks`.
    """
    variants: dict[str, Callable[[Tensor], object]] = {'main': make_plain(model)}
    for name, policy in own.items():
        variants[name] = partial(model.infer, policy=policy)
    for name, policy in matched.values():
        variants[name] = partial(cascade.infer, policy=policy)
    variants |= dict(zip(names, (cascade.small, cascade.large)))
    sized = dict.fromkeys(variants, images)
    for name, static in statics.items():
        if name not in names:
            size = resolve_data_config({}, model=static)['input_size'][1:]
            variants[name] = static.to(images.device).eval()
            # Values do not change the time.
            sized[name] = F.interpolate(images, size).to(next(static.parameters()).dtype)
    return variants, sized


def format_networks(section: Mapping[str, Any], split: str) -> str:
    """Return the networks side by side as a table, and the two curves in a sentence."""
    lines, total = [], section['rows'][0]['macs']
    for row in section['rows']:
        line = {'network': row['name'], 'top-1': row['top-1'], 'GMACs': row['macs'] / 1e9}
        line['% of main'] = 100 * row['macs'] / total
        lines.append(line | {f'img/s at {size}': value for size, value in (row.get('img/s') or {}).items()})
    cascade, timing = section['cascade'], section.get('timing')
    text = (
        f'This network and others on the {split} split:\n\n{format_table(lines)}\n\n'
        f'Cascade: {cascade["small"]} first, {cascade["large"]} for the unsure. Thresholds of all are chosen on'
        f' {cascade["chosen_on"]}.\n{describe_pairs(cascade["pairs"])}'
    )
    if timing:
        text += f'\nImages per second: in turns, medians of {timing["rounds"]} rounds on {timing["device"]}.'
    return text


def describe_pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return one sentence on own exits against the cascade at equal budgets.

    Several budgets may be met by the same two policies, which are one comparison.

    >>> low, high = {'top-1': 70.0, 'macs': 9.0}, {'top-1': 71.0, 'macs': 9.0}
    >>> describe_pairs([{'own': low, 'cascade': high}] * 2).partition(';')[0]
    'At 2 equal budgets, own exits match or beat the cascade at 0, in 0 of 1 pairs of policies'
    """
    both = [pair for pair in pairs if pair['cascade'] is not None]
    better = [pair for pair in both if pair['own']['top-1'] >= pair['cascade']['top-1']]
    num_better, num_pairs = (
        len({tuple(pair[who][key] for who in ('own', 'cascade') for key in ('top-1', 'macs')) for pair in found})
        for found in (better, both)
    )
    return (
        f'At {len(both)} equal budgets, own exits match or beat the cascade at {len(better)}, in {num_better} of'
        f' {num_pairs} pairs of policies; {len(pairs) - len(both)} more budgets are below the cost of the small model.'
    )
