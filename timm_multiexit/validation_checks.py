"""Whether the flags of `validate.py` fit the model, the processes and each other, and its results can be written."""

from argparse import Namespace
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from timm_multiexit.budgets import BudgetPoint, BudgetTable, StageCosts, parse_budget
from timm_multiexit.config import MultiExitError
from timm_multiexit.model import MultiExitModel
from timm_multiexit.policy import ExitPolicy
from timm_multiexit.ranges import option_name

PICTURE_NAME = 'accuracy_vs_macs.png'
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
    _check_effect(args, has_data, where)
    if args.plot and find_spec('matplotlib') is None:
        raise MultiExitError('--plot needs matplotlib, which is not installed: pip install matplotlib.')


def _check_effect(args: Namespace, has_data: bool, where: str) -> None:
    """Raise for a flag that would change nothing."""
    if (args.criterion != 'confidence' or args.combine) and not has_data and args.threshold is None:
        name = '--combine' if args.combine else '--criterion'
        raise MultiExitError(f'{name} is of no effect without thresholds: give --threshold, or {where}.')
    if args.delta is not None and args.max_drop is None:
        raise MultiExitError('--delta is of no effect without --max-drop: give --max-drop F, or leave it out.')
    for dest in ('seed', 'train_split'):
        if getattr(args, dest) is not None and args.calib_from_train is None:
            name = option_name(dest)
            raise MultiExitError(
                f'{name} is of no effect without --calib-from-train: give --calib-from-train N, or leave it out.'
            )


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


def check_budgets(args: Namespace, model: MultiExitModel, costs: StageCosts) -> None:
    """Raise for a budget that no policy can meet; where thresholds are chosen anew, more may turn out to be too low.

    Args:
        args: Of the command line.
        model: Its own table of budgets says it all where no data is given to choose thresholds on.
        costs: Of its exits, in MACs.

    Raises:
        MultiExitError: One line with what is allowed.
    """
    table = model.budgets
    if args.calib_split is not None or args.calib_from_train is not None:
        num_exits = len(costs.heads)
        lowest = min([*(costs.paths[idx] + costs.heads[idx] for idx in range(num_exits)), costs.total])
        unused = ExitPolicy(args.criterion, (None,) * num_exits)
        point = BudgetPoint(unused, 0.0, (0.0,) * num_exits + (1.0,), macs=lowest)
        table = BudgetTable((point,), total_macs=costs.total, max_macs=costs.largest)
    for budget in args.budget:
        if table is not model.budgets and parse_budget(budget).unit == 'ms':
            continue
        table.select(budget)


def picture_path(args: Namespace) -> Path | None:
    """Return where the picture goes; None if nobody asked for files."""
    if args.plot:
        return Path(args.plot)
    return Path(args.results_file).with_name(PICTURE_NAME) if args.results_file else None


def check_outputs(args: Namespace) -> None:
    """Raise where a result could not be written, so that this is known before the evaluation; makes the folders.

    Raises:
        MultiExitError: One line with the path.
    """
    if not args.results_file and not args.plot:
        return
    paths = [Path(args.results_file)] if args.results_file else []
    paths.append(picture_path(args))
    if len({path.absolute() for path in paths}) < len(paths):
        raise MultiExitError(f'{paths[0]} is the name of the picture too: give --results-file another one.')
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_folder = path.is_dir()
            if not is_folder:
                _draft(path).touch()
                _draft(path).unlink()
        except OSError as error:
            raise MultiExitError(f'{path} cannot be written: {_reason(error)}. Give another path.') from error
        if is_folder:
            raise MultiExitError(f'{path} is a folder, allowed is the path of a file: give one in it.')


def write_output(path: Path, content: bytes) -> None:
    """Write a result, whole or not at all.

    Raises:
        MultiExitError: The disk is full or cannot be written.
    """
    try:
        _draft(path).write_bytes(content)
        _draft(path).replace(path)
    except OSError as error:
        with suppress(OSError):
            _draft(path).unlink(missing_ok=True)
        raise MultiExitError(
            f'{path} could not be written: {_reason(error)}. What was found is printed above; make room or give another'
            ' path.'
        ) from error


def _draft(path: Path) -> Path:
    return path.with_name(f'.{path.name}.tmp')


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
