"""Whether the flags of `validate.py` for dynamic inference fit the model, the processes and each other."""

from argparse import Namespace
from importlib.util import find_spec

from timm_multiexit.budgets import parse_budget
from timm_multiexit.config import MultiExitError
from timm_multiexit.model import MultiExitModel
from timm_multiexit.policy import ExitPolicy
from timm_multiexit.ranges import option_name

_ASKING = ('threshold', 'budget', 'max_drop', 'calib_split', 'calib_from_train', 'compare', 'plot')


def asked_flags(args: Namespace) -> list[str]:
    """Return the flags of dynamic inference that were given."""
    return [option_name(dest) for dest in _ASKING if getattr(args, dest) not in (None, [], '')]


def asks_for_policies(args: Namespace, model: MultiExitModel) -> bool:
    """Return whether there are policies to measure."""
    asked = args.threshold is not None or args.budget or args.max_drop is not None
    return bool(asked or model.policy is not None)


def given_policy(args: Namespace, num_exits: int) -> ExitPolicy:
    """Return the policy of `--threshold`.

    Raises:
        MultiExitError: A threshold is out of range, or there is another number of them than exits.
    """
    thresholds = args.threshold * num_exits if len(args.threshold) == 1 else args.threshold
    policy = ExitPolicy(args.criterion, tuple(thresholds), combine=args.combine)
    policy.check_exits(num_exits)
    return policy


def check_flags(args: Namespace, model: MultiExitModel, num_processes: int) -> None:
    """Raise where flags of dynamic inference do not fit the model, the processes or each other.

    Raises:
        MultiExitError: One line with the flag.
    """
    asked = asked_flags(args)
    if asked and num_processes > 1:
        raise MultiExitError(
            f'{asked[0]} needs all logits in one process: start validate.py without accelerate launch.'
        )
    if asked and not len(model.exits):
        raise MultiExitError(f'{asked[0]} needs a model with exits, {args.model} has none: see --exits.')
    if args.threshold is not None:
        given_policy(args, len(model.exits))
    _check_numbers(args)
    has_data = args.calib_split is not None or args.calib_from_train is not None
    if args.calib_split is not None and args.calib_from_train is not None:
        raise MultiExitError('--calib-split and --calib-from-train exclude each other: give one of them.')
    for budget in args.budget:
        parse_budget(budget)
    where = 'give --calib-split NAME or --calib-from-train N to choose thresholds on'
    if args.budget and not has_data and model.budgets is None:
        raise MultiExitError(f'--budget {args.budget[0]} needs data to keep it on: {where}.')
    if args.max_drop is not None and not has_data:
        raise MultiExitError(f'--max-drop {args.max_drop} needs data to prove it on: {where}.')
    if (args.criterion != 'confidence' or args.combine) and not has_data and args.threshold is None:
        name = '--combine' if args.combine else '--criterion'
        raise MultiExitError(f'{name} is of no effect without thresholds: give --threshold, or {where}.')
    if args.plot and find_spec('matplotlib') is None:
        raise MultiExitError('--plot needs matplotlib, which is not installed: pip install matplotlib.')


def _check_numbers(args: Namespace) -> None:
    for dest, is_right, allowed in (
        ('max_drop', lambda number: 0 < number < 1, 'numbers above 0 and below 1: 0.01 is a point of accuracy'),
        ('delta', lambda number: 0 < number < 1, 'numbers above 0 and below 1'),
        ('time_rounds', lambda number: number >= 0, 'integers from 0'),
        ('calib_from_train', lambda number: number >= 1, 'integers from 1'),
        ('seed', lambda number: 0 <= number < 2**32, 'integers from 0 to 4294967295'),
    ):
        number = getattr(args, dest)
        if number is not None and not is_right(number):
            raise MultiExitError(f'{option_name(dest)} is {number}, allowed are {allowed}.')
