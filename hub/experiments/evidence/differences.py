"""Paired differences between methods: which methods are compared, on which runs, and how sure the difference is."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import t

from evidence.results import split_precision

# Half-width of a 95 % interval around 0, in points of accuracy, above which a difference is not resolved.
RESOLUTION = 0.5
# Two differences can be equal by chance, and their interval nothing.
MIN_PAIRS = 3

_BASELINES = ('ce', 'phuong', 'byot')
_ENSEMBLES = ('eed', 'beed')
_DISTANCES = ('kl', 'mse')

# Endings of methods that have other heads or other places, or whose backbone or its norms stay, all their rivals alike.
_HEADS = ('narrow', 'bottleneck', 'quarters')
_REGIMES = ('frozen', 'fixednorms')


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the mean of paired differences and the half-width of its 95 % interval; infinite for a single pair.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)  # 4.303 * 1 / sqrt(3)
    (2.0, 2.484)
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return mean, math.inf
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


def describe_difference(differences: Sequence[float]) -> str:
    """Return what paired differences say, in points.

    >>> describe_difference([0.5, 0.6, 0.55]), describe_difference([0.0, 2.0]), describe_difference([1.0])
    ('+0.55 ± 0.12, above 0', '+1.00 ± 12.71, not resolved', '+1.00, one pair')
    >>> describe_difference([0.1, -0.1, 0.0])
    '+0.00 ± 0.25, no difference seen'
    >>> describe_difference([])
    '-'
    """
    if not differences:
        return '-'
    mean, half = interval(differences)
    if math.isinf(half):
        return f'{mean:+.2f}, one pair'
    if len(differences) < MIN_PAIRS:
        reading = 'not resolved'
    elif abs(mean) > half:
        reading = 'above 0' if mean > 0 else 'below 0'
    else:
        reading = 'not resolved' if half > RESOLUTION else 'no difference seen'
    return f'{round(mean, 2) + 0.0:+.2f} ± {half:.2f}, {reading}'  # -0.0 + 0.0 is 0.0


def pairs_to_resolve(differences: Sequence[float]) -> int:
    """Return the number of pairs whose 95 % interval would have half of `RESOLUTION`, if they scatter like these.

    >>> pairs_to_resolve([0.0, 1.0, 2.0])  # n = 18: t = 2.110, 2.110 * 1 / sqrt(18) = 0.497
    18
    """
    deviation = statistics.stdev(differences)
    count = max(len(differences), MIN_PAIRS)
    while float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count) > RESOLUTION:
        count += 1
    return count


def top1(result: dict[str, Any]) -> dict[str, float]:
    """Return classifier -> top-1 in percent; a network without exits has main alone."""
    return {row['exit']: row['top-1'] for row in result['classifiers'] if row.get('top-1') is not None}


def baselines(method: str, present: Iterable[str]) -> list[str]:
    """Return the methods that a method is compared with, out of those present.

    A method is compared with the plain network, a variant with what it varies; one that ensembles teach with its
    rivals too, which have the same heads and, with a distance of outputs, the same one.

    >>> baselines('eed-mse-features', ['plain', 'ce', 'ce-narrow', 'phuong-kl', 'phuong-mse', 'byot-mse', 'eed-mse'])
    ['plain', 'ce', 'phuong-mse', 'byot-mse', 'eed-mse']
    >>> baselines('ce-bottleneck', ['plain', 'ce', 'ce-bottleneck']), baselines('ce', ['plain', 'ce'])
    (['plain', 'ce'], ['plain'])
    >>> baselines('eed-kl-quarters-frozen', ['plain', 'ce-quarters', 'ce-quarters-frozen', 'eed-kl-quarters'])
    ['plain', 'ce-quarters-frozen', 'eed-kl-quarters']
    >>> baselines('eed-kl-quarters-fixednorms', ['plain', 'plain-fixednorms', 'ce-quarters', 'ce-quarters-fixednorms'])
    ['plain', 'plain-fixednorms', 'ce-quarters-fixednorms']
    """
    parts = method.split('-')
    distance = next((part for part in parts if part in _DISTANCES), '')
    heads, regime, ending = (_ending(method, words) for words in (_HEADS, _REGIMES, _HEADS + _REGIMES))
    loss = f'{parts[0]}-{distance}' if distance else parts[0]
    wanted = {loss, f'{loss}{heads}', f'{loss}{ending}', 'plain', f'plain{regime}'} - {method}
    if is_taught_by_ensemble(method):
        rivals = (*_BASELINES, 'eed') if parts[0] == 'beed' else _BASELINES
        wanted |= {f'{name}{outputs}{ending}' for name in rivals for outputs in ('', f'-{distance}')}
    return [name for name in present if name in wanted]


def is_taught_by_ensemble(method: str) -> bool:
    """Return whether classifiers learn from an ensemble, which is what the tables are about."""
    return method.split('-')[0] in _ENSEMBLES


def cross_entropy_of(method: str) -> str:
    """Return the method with the same heads and the same regime in which nothing distils.

    >>> cross_entropy_of('eed-kl-quarters-frozen'), cross_entropy_of('eed-mse')
    ('ce-quarters-frozen', 'ce')
    """
    return f'ce{_ending(method, _HEADS + _REGIMES)}'


def _ending(method: str, words: Sequence[str]) -> str:
    return ''.join(f'-{part}' for part in method.split('-') if part in words)


def paired(results: Iterable[dict[str, Any]], method: str, baseline: str, classifier: str) -> list[float]:
    """Return the differences in top-1 of two methods' runs of the same seed and precision, in order of seeds."""
    found: dict[str, dict[tuple[int, str], float]] = {method: {}, baseline: {}}
    for result in results:
        if result['method'] in found and classifier in top1(result):
            found[result['method']][result['seed'], precision_flags(result)] = top1(result)[classifier]
    ours, theirs = found[method], found[baseline]
    return [ours[pair] - theirs[pair] for pair in sorted(ours.keys() & theirs.keys())]


def precision_flags(result: dict[str, Any]) -> str:
    """Return the flags of mixed precision that were given for this run, and not for all by the recipe."""
    return ' '.join(split_precision(result.get('extra', ()))[1])
