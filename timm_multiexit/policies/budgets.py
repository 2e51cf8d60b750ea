"""Budgets: how one is written, what a policy gives, and the table of policies to choose from."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, NamedTuple, TypeGuard

from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_instance, is_list
from timm_multiexit.utils.errors import CheckpointError, InvalidTypeError, InvalidValueError, brief, is_number
from timm_multiexit.utils.text import exit_names, format_table, macs_unit

UNITS = ('MACs', 'ms')

_SCALES = {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}

_MAX_POINTS = 1000
_MAX_TEXT = 500  # characters

SIZES = (1e-9, 1e18)  # of costs that are not 0
_SLACK = 1e-9  # a budget that a point's cost was printed or computed as must reach it


def _is_size(value: Any) -> TypeGuard[float]:
    """Return whether this is a cost that all arithmetic here can work with; 0 is one."""
    return is_number(value) and (value == 0 or SIZES[0] <= value <= SIZES[1])


class Budget(NamedTuple):
    """A cost that a policy may have on average.

    Attributes:
        value: How much.
        unit: '%' of main's cost, 'MACs' or 'ms', per image.
    """

    value: float
    unit: str


def parse_budget(budget: str) -> Budget:
    """Return the budget that a text says.

    Args:
        budget: '60%' of main's cost, '1.2GMACs', '300MMACs' or '5ms'.

    Raises:
        InvalidValueError: Anything else; a bare number too, for it has no unit.

    >>> parse_budget('60%'), parse_budget('1.2GMACs')
    (Budget(value=60.0, unit='%'), Budget(value=1200000000.0, unit='MACs'))
    """
    # Digits of ASCII alone, and few of them.
    match = re.fullmatch(r'([0-9]{1,20}(?:\.[0-9]{0,20})?) ?(%|[kKMGT]?MACs|ms)', budget) if _is_text(budget) else None
    value, unit = (float(match[1]), match[2]) if match else (0.0, '')
    if value <= 0:
        raise InvalidValueError(
            "A budget must be a share of main's cost such as '60%', MACs such as '1.2GMACs' or '300MMACs', or a time"
            f" such as '5ms', per image and > 0, got {brief(budget)}."
        )
    return Budget(value * _SCALES[unit[:-4]], 'MACs') if unit.endswith('MACs') else Budget(value, unit)


def _simplify(result: Any, *names: str) -> None:
    """Make numpy's numbers Python's, which JSON can hold; others stay as they are."""
    for name in names:
        value = getattr(result, name)
        if not isinstance(value, (int, float, NoneType)) or type(value).__module__ == 'numpy':
            object.__setattr__(result, name, float(value))


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


@dataclass(frozen=True)
class PolicyResult:
    """A policy and what it was found to give on some data.

    Attributes:
        policy: The policy.
        accuracy: Top-1 in percent.
        shares: Share of the samples that leave at each classifier, main last.
        macs: Mean MACs per image; None if not known.
        ms: Mean time per image in milliseconds; None if not measured.

    Raises:
        InvalidTypeError: The policy is not an `ExitPolicy`, or the shares are not a list.
        InvalidValueError: A number out of range.
    """

    policy: ExitPolicy
    accuracy: float
    shares: tuple[float, ...]
    macs: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        check_instance('policy', self.policy, ExitPolicy)
        if not is_list(self.shares):
            raise InvalidTypeError(f'The shares of a policy must be a list of numbers, got {brief(self.shares)}.')
        object.__setattr__(self, 'shares', tuple(self.shares))
        if not is_number(self.accuracy) or not 0 <= self.accuracy <= 100:
            raise InvalidValueError(f'The accuracy of a policy must be in [0, 100], got {brief(self.accuracy)}.')
        shares_fit = len(self.shares) == len(self.policy.thresholds) + 1 and all(
            is_number(share) and 0 <= share <= 1 for share in self.shares
        )
        if not shares_fit or abs(sum(self.shares) - 1) > 1e-3:
            raise InvalidValueError(
                'The shares of a policy must be one number in [0, 1] per classifier, main last, with a sum of 1, got'
                f' {brief(list(self.shares))}.'
            )
        for name in ('macs', 'ms'):
            value = getattr(self, name)
            if value is not None and not _is_size(value):
                raise InvalidValueError(
                    f'The {name} of a policy must be in [1e-9, 1e18], 0 or None, got {brief(value)}.'
                )
        _simplify(self, 'accuracy', 'macs', 'ms')
        object.__setattr__(self, 'shares', tuple(float(share) for share in self.shares))

    def cost(self, unit: str) -> float | None:
        """Return the mean cost per image in 'MACs' or 'ms'; None if not known."""
        return self.macs if unit == 'MACs' else self.ms


@dataclass(frozen=True)
class BudgetTable:
    """Policies to choose from, found on held-out data, cheapest first.

    Where one unit is known, accuracy never falls as cost rises; with both, the best policies of each unit are there.

    Attributes:
        points: The policies with what they give.
        total_macs: MACs of main alone per image; None if only times are known.
        max_macs: MACs of main with all heads on the way: the most that a policy can spend.
        total_ms: Time of main alone per image in milliseconds; None if not measured.
        max_ms: Time of main with all heads on the way.
        measured_on: Hardware and batch size of the times.

    Raises:
        InvalidTypeError: The points are not a list of `PolicyResult`s.
        InvalidValueError: No point or more than 1000, points of different models, costs that are missing or not in
            order.
    """

    points: tuple[PolicyResult, ...]
    total_macs: float | None = None
    max_macs: float | None = None
    total_ms: float | None = None
    max_ms: float | None = None
    measured_on: str | None = None

    def __post_init__(self) -> None:
        if not is_list(self.points) or not all(isinstance(point, PolicyResult) for point in self.points):
            raise InvalidTypeError(f'The points of a table of budgets must be PolicyResults, got {brief(self.points)}.')
        object.__setattr__(self, 'points', tuple(self.points))
        if not 1 <= len(self.points) <= _MAX_POINTS:
            raise InvalidValueError(f'A table of budgets must have 1 to {_MAX_POINTS} points, got {len(self.points)}.')
        if len({len(point.shares) for point in self.points}) > 1:
            raise InvalidValueError('All policies of a table of budgets must have the same number of exits.')
        if self.measured_on is not None and not _is_text(self.measured_on):
            raise InvalidValueError(f'measured_on must be text of at most {_MAX_TEXT} characters.')
        for unit in UNITS:
            self._check_costs(unit)
        _simplify(self, 'total_macs', 'max_macs', 'total_ms', 'max_ms')
        if self.total_macs is None and self.total_ms is None:
            raise InvalidValueError('A table of budgets needs total_macs or total_ms, the cost of main alone.')
        costs = self._costs(self._main_unit)
        if costs != sorted(costs):
            raise InvalidValueError('The points of a table of budgets must be in order of cost, cheapest first.')

    def _check_costs(self, unit: str) -> None:
        total, largest = self._limits(unit)
        known = [cost is not None for cost in (total, largest, *(point.cost(unit) for point in self.points))]
        if any(known) != all(known):
            raise InvalidValueError(f'A table of budgets must have costs in {unit} everywhere or nowhere.')
        sizes_fit = _is_size(total) and _is_size(largest) and 0 < total <= largest * (1 + _SLACK)
        if known[0] and not sizes_fit:
            raise InvalidValueError(
                f'The costs of main alone and with all heads on the way must be in [1e-9, 1e18] {unit}, the second not'
                f' below the first, got {brief(total)} and {brief(largest)}.'
            )

    @property
    def _main_unit(self) -> str:
        return 'MACs' if self.total_macs is not None else 'ms'

    def _limits(self, unit: str) -> tuple[float | None, float | None]:
        """Return the cost of main alone, and the most that a policy can spend."""
        return (self.total_macs, self.max_macs) if unit == 'MACs' else (self.total_ms, self.max_ms)

    def _costs(self, unit: str) -> list[float]:
        """Return what each point costs, nothing where that is not known."""
        return [cost for cost in (point.cost(unit) for point in self.points) if cost is not None]

    def select(self, budget: str) -> PolicyResult:
        """Return the point with the best held-out accuracy within a budget; of equals the dearest.

        Args:
            budget: As `parse_budget` reads it, the mean per image. Shares are of main's MACs, of its time where
                only times are known.

        Raises:
            InvalidValueError: The budget is below the cheapest point, above all that a policy can spend, or a time
                where no times were measured.
        """
        value, asked = parse_budget(budget)
        unit = self._main_unit if asked == '%' else asked
        total, largest = self._limits(unit)
        costs = self._costs(unit)
        if total is None or largest is None:
            hint = 'calibrate with measured times' if unit == 'ms' else "use '%' or 'ms'"
            raise InvalidValueError(f'The table has no costs in {unit} for the budget {budget!r}: {hint}.')
        if asked == '%':
            value *= total / 100
        lowest = min(costs)
        if not lowest * (1 - _SLACK) <= value <= largest * (1 + _SLACK):
            wrong = 'below the cheapest policy' if value < lowest else 'more than any policy can spend'
            raise InvalidValueError(
                f'The budget must be {_show(lowest, asked, total, up=True)} to'
                f' {_show(largest, asked, total, up=False)}, got {budget}, which is {wrong}; main alone costs'
                f' {_show(total, asked, total, up=True)} and is run without a policy.'
            )
        best = self.best_within(value * (1 + _SLACK), unit)
        assert best is not None  # the cheapest is not above the budget
        return best

    def best_within(self, cost: float, unit: str = 'MACs') -> PolicyResult | None:
        """Return the point with the best held-out accuracy of those of at most this mean cost; None if there is none.

        Of equals the dearest: few images cannot tell policies apart that differ on fresh ones, where what may be spent
        helps.
        """
        known = [(each, point) for point in self.points if (each := point.cost(unit)) is not None and each <= cost]
        return max(known, key=lambda pair: (pair[1].accuracy, pair[0]))[1] if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        points = [vars(each) | {'policy': each.policy.to_dict(), 'shares': list(each.shares)} for each in self.points]
        return vars(self) | {'points': points}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'BudgetTable':
        """Return the table that `to_dict` wrote; what comes from a file is checked.

        Raises:
            CheckpointError: A key is missing or unknown, or a value is of the wrong type.
            InvalidValueError: A value is out of range.
        """
        _check_keys('A table of budgets', values, cls)
        points = values['points']
        if not isinstance(points, list) or len(points) > _MAX_POINTS:
            raise CheckpointError(f'The points of a table of budgets must be a list of at most {_MAX_POINTS}.')
        return cls(**{**values, 'points': tuple(_read_point(point) for point in points)})

    def __str__(self) -> str:
        unit, names = self._main_unit, exit_names(len(self.points[0].shares) - 1)
        total, rows = self._limits(unit)[0] or 1.0, []
        for point, cost in zip(self.points, self._costs(unit)):
            row: dict[str, float] = {'%': 100 * cost / total}
            row |= {} if point.macs is None else {'MACs': round(point.macs)}
            row |= {} if point.ms is None else {'ms': point.ms}
            row['top-1'] = float(point.accuracy)
            rows.append(row | {f'{name} %': 100.0 * share for name, share in zip(names, point.shares)})
        return format_table(rows)


def _check_keys(what: str, values: Any, kind: Any) -> None:
    keys = [field.name for field in fields(kind)]
    if not isinstance(values, Mapping) or set(values) != set(keys):
        raise CheckpointError(f'{what} must be an object with exactly the keys {", ".join(keys)}.')


def _read_point(values: Any) -> PolicyResult:
    _check_keys('A point of a table of budgets', values, PolicyResult)
    _check_keys('The policy of a table of budgets', values['policy'], ExitPolicy)
    if not isinstance(values['shares'], list):
        raise CheckpointError(f'The shares of a policy must be a list of numbers, got {brief(values["shares"])}.')
    return PolicyResult(**{**values, 'policy': ExitPolicy.from_dict(values['policy'])})


def _show(cost: float, unit: str, total: float, up: bool) -> str:
    """Return a cost as a budget that is allowed again: rounded up or down to four digits."""
    suffix, scale = unit, 1.0
    if unit == '%':
        scale = total / 100
    elif unit == 'MACs':
        scale, suffix = macs_unit(cost)
    value = cost / scale
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    rounded = (math.ceil(value / step - 1e-6) if up else math.floor(value / step + 1e-6)) * step
    return f'{rounded:.10g}{suffix}'
