"""Budgets: what leaving costs, how a budget is written, and the table of policies to choose from."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import MultiExitError, brief, is_number
from timm_multiexit.utils.text import exit_names, format_table

UNITS = ('MACs', 'ms')

_SCALES = {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}

_MAX_POINTS = 1000

_MAX_TEXT = 500  # characters

_SIZES = (1e-9, 1e18)  # of costs that are not 0

_SLACK = 1e-9  # a budget that a point's cost was printed or computed as must reach it


def _is_size(value: Any) -> bool:
    """Return whether this is a cost that all arithmetic here can work with; 0 is one."""
    return is_number(value) and (value == 0 or _SIZES[0] <= value <= _SIZES[1])


class Budget(NamedTuple):
    """A cost that a policy may have on average.

    Attributes:
        value: How much.
        unit: '%' of the plain backbone, 'MACs' or 'ms', per image.
    """

    value: float
    unit: str


def parse_budget(budget: str) -> Budget:
    """Return the budget that a text says.

    Args:
        budget: '60%' of the plain backbone, '1.2GMACs', '300MMACs' or '5ms'.

    Raises:
        MultiExitError: Anything else; a bare number too, for it has no unit.

    >>> parse_budget('60%'), parse_budget('1.2GMACs')
    (Budget(value=60.0, unit='%'), Budget(value=1200000000.0, unit='MACs'))
    """
    # Digits of ASCII alone, and few of them.
    match = re.fullmatch(r'([0-9]{1,20}(?:\.[0-9]{0,20})?) ?(%|[kKMGT]?MACs|ms)', budget) if _is_text(budget) else None
    value = float(match[1]) if match else 0.0
    if value <= 0:
        raise MultiExitError(
            f"The budget is {brief(budget)}, allowed are a share of the plain backbone such as '60%', MACs such as"
            " '1.2GMACs' or '300MMACs', and a time such as '5ms', per image and above 0."
        )
    unit = match[2]
    return Budget(value * _SCALES[unit[:-4]], 'MACs') if unit.endswith('MACs') else Budget(value, unit)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


@dataclass(frozen=True)
class BudgetPoint:
    """A policy and what it was found to give on held-out data.

    Attributes:
        policy: The policy.
        accuracy: Top-1 in percent.
        shares: Share of the samples that leave at each classifier, main last.
        macs: Mean MACs per image; None if not known.
        ms: Mean time per image in milliseconds; None if not measured.

    Raises:
        MultiExitError: A number out of range.
    """

    policy: ExitPolicy
    accuracy: float
    shares: tuple[float, ...]
    macs: float | None = None
    ms: float | None = None

    def __post_init__(self):
        object.__setattr__(self, 'shares', tuple(self.shares))
        if not is_number(self.accuracy) or not 0 <= self.accuracy <= 100:
            raise MultiExitError(f'The accuracy of a policy is {brief(self.accuracy)}, allowed are 0 to 100.')
        shares_fit = len(self.shares) == len(self.policy.thresholds) + 1 and all(
            is_number(share) and 0 <= share <= 1 for share in self.shares
        )
        if not shares_fit or abs(sum(self.shares) - 1) > 1e-3:
            raise MultiExitError(
                f'The shares of a policy are {brief(list(self.shares))}, allowed is one number from 0 to 1 per'
                ' classifier, main last, 1 together.'
            )
        for name in ('macs', 'ms'):
            value = getattr(self, name)
            if value is not None and not _is_size(value):
                raise MultiExitError(
                    f'The {name} of a policy are {brief(value)}, allowed are numbers from 1e-9 to 1e18, 0 and None.'
                )

    def cost(self, unit: str) -> float | None:
        """Return the mean cost per image in 'MACs' or 'ms'; None if not known."""
        return self.macs if unit == 'MACs' else self.ms


@dataclass(frozen=True)
class BudgetTable:
    """Policies to choose from, found on held-out data, cheapest first.

    Where one unit is known, accuracy rises with the cost; with both, the best policies of each unit are there.

    Attributes:
        points: The policies with what they give.
        total_macs: MACs of the plain backbone per image; None if only times are known.
        max_macs: MACs of main with all heads on the way: the most that a policy can spend.
        total_ms: Time of the plain backbone per image in milliseconds; None if not measured.
        max_ms: Time of main with all heads on the way.
        measured_on: Hardware and batch size of the times.

    Raises:
        MultiExitError: No point or more than 1000, points of different models, costs that are missing or in disorder.
    """

    points: tuple[BudgetPoint, ...]
    total_macs: float | None = None
    max_macs: float | None = None
    total_ms: float | None = None
    max_ms: float | None = None
    measured_on: str | None = None

    def __post_init__(self):
        object.__setattr__(self, 'points', tuple(self.points))
        if not 1 <= len(self.points) <= _MAX_POINTS:
            raise MultiExitError(f'A table of budgets has {len(self.points)} points, allowed are 1 to {_MAX_POINTS}.')
        if len({len(point.shares) for point in self.points}) > 1:
            raise MultiExitError('A table of budgets has policies of different numbers of exits, allowed is one model.')
        if self.measured_on is not None and not _is_text(self.measured_on):
            raise MultiExitError(f'measured_on of a table of budgets must be text of at most {_MAX_TEXT} characters.')
        for unit in UNITS:
            self._check_costs(unit)
        if self.total_macs is None and self.total_ms is None:
            raise MultiExitError('A table of budgets needs total_macs or total_ms, the cost of the plain backbone.')
        costs = [point.cost(self._main_unit) for point in self.points]
        if costs != sorted(costs):
            raise MultiExitError('The points of a table of budgets are in disorder, allowed is cheapest first.')

    def _check_costs(self, unit: str) -> None:
        total, largest = self._total(unit), self._largest(unit)
        known = [cost is not None for cost in (total, largest, *(point.cost(unit) for point in self.points))]
        if any(known) != all(known):
            raise MultiExitError(f'A table of budgets has costs in {unit} in some places, allowed is in all or none.')
        sizes_fit = known[0] and _is_size(total) and _is_size(largest) and 0 < total <= largest * (1 + _SLACK)
        if known[0] and not sizes_fit:
            raise MultiExitError(
                f'The plain backbone costs {brief(total)} {unit} and all heads with it {brief(largest)}, allowed are'
                ' numbers from 1e-9 to 1e18, the second not less than the first.'
            )

    @property
    def _main_unit(self) -> str:
        return 'MACs' if self.total_macs is not None else 'ms'

    def _total(self, unit: str) -> float | None:
        return self.total_macs if unit == 'MACs' else self.total_ms

    def _largest(self, unit: str) -> float | None:
        return self.max_macs if unit == 'MACs' else self.max_ms

    def select(self, budget: str) -> BudgetPoint:
        """Return the point with the best held-out accuracy within a budget; of equals the cheapest.

        Args:
            budget: As `parse_budget` reads it, the mean per image. Shares of the backbone are of its MACs, of its time
                where only times are known.

        Raises:
            MultiExitError: The budget is below the cheapest point, above all that a policy can spend, or a time where
                no times were measured.
        """
        value, asked = parse_budget(budget)
        unit = self._main_unit if asked == '%' else asked
        total, largest = self._total(unit), self._largest(unit)
        if total is None:
            hint = 'calibrate with measured times' if unit == 'ms' else "give '%' or 'ms'"
            raise MultiExitError(f'The budget is {budget!r}, the table has no costs in {unit}: {hint}.')
        if asked == '%':
            value *= total / 100
        lowest = min(point.cost(unit) for point in self.points)
        if not lowest * (1 - _SLACK) <= value <= largest * (1 + _SLACK):
            wrong = 'below the cheapest policy' if value < lowest else 'more than any can spend'
            raise MultiExitError(
                f'The budget {budget} is {wrong},'
                f' allowed are {_show(lowest, asked, total, up=True)} to {_show(largest, asked, total, up=False)}; the'
                f' plain network costs {_show(total, asked, total, up=True)} and is run without a policy.'
            )
        within = [point for point in self.points if point.cost(unit) <= value * (1 + _SLACK)]
        return min(within, key=lambda point: (-point.accuracy, point.cost(unit)))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        points = [
            vars(point) | {'policy': point.policy.to_dict(), 'shares': list(point.shares)} for point in self.points
        ]
        return vars(self) | {'points': points}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'BudgetTable':
        """Return the table that `to_dict` wrote; what comes from a file is checked.

        Raises:
            MultiExitError: A key is missing or unknown, or a value is of the wrong kind or out of range.
        """
        _check_keys('A table of budgets', values, cls)
        points = values['points']
        if not isinstance(points, list) or len(points) > _MAX_POINTS:
            raise MultiExitError(f'The points of a table of budgets must be a list of at most {_MAX_POINTS}.')
        return cls(**{**values, 'points': tuple(_read_point(point) for point in points)})

    def __str__(self) -> str:
        unit, names = self._main_unit, exit_names(len(self.points[0].shares) - 1)
        rows = []
        for point in self.points:
            row = {'%': 100 * point.cost(unit) / self._total(unit), 'MACs': point.macs, 'ms': point.ms}
            row |= {'top-1': float(point.accuracy)} | {
                f'{name} %': 100.0 * share for name, share in zip(names, point.shares)
            }
            rows.append({key: value for key, value in row.items() if key not in UNITS or value is not None})
        return format_table([row | ({'MACs': round(row['MACs'])} if 'MACs' in row else {}) for row in rows])


def _check_keys(what: str, values: Any, kind: type) -> None:
    keys = [field.name for field in fields(kind)]
    if not isinstance(values, Mapping) or set(values) != set(keys):
        raise MultiExitError(f'{what} must be an object with the keys {", ".join(keys)}, no fewer and no more.')


def _read_point(values: Any) -> BudgetPoint:
    _check_keys('A point of a table of budgets', values, BudgetPoint)
    _check_keys('The policy of a table of budgets', values['policy'], ExitPolicy)
    if not isinstance(values['shares'], list):
        raise MultiExitError(f'The shares of a policy are {brief(values["shares"])}, allowed is a list of numbers.')
    return BudgetPoint(**{**values, 'policy': ExitPolicy.from_dict(values['policy'])})


def _show(cost: float, unit: str, total: float, up: bool) -> str:
    """Return a cost as a budget that is allowed again: rounded up or down to four digits."""
    suffix, scale = unit, 1.0
    if unit == '%':
        scale = total / 100
    elif unit == 'MACs':
        suffix, scale = next(
            ((f'{name}MACs', size) for name, size in (('G', 1e9), ('M', 1e6)) if cost >= size), ('MACs', 1.0)
        )
    value = cost / scale
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    rounded = (math.ceil(value / step - 1e-6) if up else math.floor(value / step + 1e-6)) * step
    return f'{rounded:.10g}{suffix}'
