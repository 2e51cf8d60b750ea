"""Figures 3 and 5: accuracy over the epochs, how near main comes to the ensemble, and how fast and stable runs are."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from timm_multiexit.utils.text import ENSEMBLE


def read_curve(rows: Sequence[Mapping[str, float]], metric: str = 'top1') -> dict[str, list]:
    """Return the accuracy of main, and where there are exits of the ensemble, after each epoch that was evaluated.

    `rows` are those of `summary.csv`; epochs whose number is missing or not finite are left out.

    Returns:
        `epochs` trained, from 1, `main` and `ensemble` in percent; the last one is empty without exits.
    """
    main, ensemble = f'eval_{metric}', f'eval_{ENSEMBLE}_{metric}'
    has_exits = any(ensemble in row for row in rows)
    needed = (main, ensemble) if has_exits else (main,)
    rows = [row for row in rows if all(math.isfinite(row.get(key, math.nan)) for key in needed)]
    return {
        'epochs': [int(row['epoch']) + 1 for row in rows],
        'main': [row[main] for row in rows],
        'ensemble': [row[ensemble] for row in rows] if has_exits else [],
    }


def epochs_to_reach(epochs: Sequence[int], values: Sequence[float], target: float) -> int | None:
    """Return the epochs until the values first reach the target; None if they never do.

    >>> epochs_to_reach([1, 2, 3], [50.0, 70.0, 60.0], 65.0)
    2
    """
    return next((epoch for epoch, value in zip(epochs, values) if value >= target), None)


def epochs_to_keep(epochs: Sequence[int], values: Sequence[float], target: float) -> int | None:
    """Return the epochs from which on the values never fall below the target; None if the last one is below.

    >>> epochs_to_keep([1, 2, 3, 4], [70.0, 60.0, 66.0, 65.0], 65.0)
    3
    """
    kept = None
    for epoch, value in zip(reversed(epochs), reversed(values)):
        if value < target:
            break
        kept = epoch
    return kept


def instability(values: Sequence[float]) -> float | None:
    """Return the standard deviation of the changes from one evaluation to the next, over the last half of them.

    It is that of the changes themselves (divided by their number), so a steady rise counts nothing. None with fewer
    than two changes in that half, which is rounded up.

    >>> instability([0.0, 9.0, 10.0, 12.0, 12.0])  # changes 9, 1, 2, 0: the last half are 2 and 0
    1.0
    """
    changes = [after - before for before, after in zip(values, values[1:])]
    last = changes[len(changes) // 2 :]
    return statistics.pstdev(last) if len(last) > 1 else None


def describe_curve(curve: Mapping[str, list], target: float | None) -> dict[str, Any]:
    """Return a run's curve, as `read_curve` returns it, with its numbers.

    `target` is the final accuracy of the reference's main, in percent; None for no reference.

    Returns:
        The curve, and `gap` (ensemble less main, per epoch, in points), `final_gap`, `mean_gap` (of the last half),
        `final_main`, `instability` (in points) and, with a target, `epochs_to_reach` and `epochs_to_keep`; None where
        a value does not exist.
    """
    epochs, main = curve['epochs'], curve['main']
    gap = [ensemble - own for ensemble, own in zip(curve['ensemble'], main)]
    against = {}
    if target is not None:
        against['epochs_to_reach'] = epochs_to_reach(epochs, main, target)
        against['epochs_to_keep'] = epochs_to_keep(epochs, main, target)
    return {
        **curve,
        **against,
        'gap': gap,
        'final_gap': gap[-1] if gap else None,
        'mean_gap': statistics.fmean(gap[len(gap) // 2 :]) if gap else None,
        'final_main': main[-1] if main else None,
        'instability': instability(main),
    }
