"""Tables of results in Markdown: accuracy of every classifier, paired differences, and how both were measured."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

from evidence.differences import (
    MIN_PAIRS,
    baselines,
    cross_entropy_of,
    describe_difference,
    is_taught_by_ensemble,
    paired,
    pairs_to_resolve,
    precision_flags,
    top1,
)
from evidence.plan import Plan
from evidence.results import flags_that_matter, split_precision
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError
from timm_multiexit.utils.markdown import code, escape, table
from timm_multiexit.utils.text import ENSEMBLE

START, END = '<!-- evidence -->', '<!-- /evidence -->'


def format_group(results: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """Return the two tables of one protocol, data set and network.

    Args:
        results: Of that group alone.
        methods: All methods, in the order of the rows.

    Raises:
        CheckpointError: Results of one group are not of the same images or flags beyond the plan's.
    """
    _check_comparable(results)
    present = [method for method in methods if any(result['method'] == method for result in results)]
    rows = [_accuracy_row(method, [result for result in results if result['method'] == method]) for method in present]
    names = sorted({name for row in rows for name in row if name.isdecimal()}, key=int)
    order = ['method', 'n', *names, 'main', ENSEMBLE, 'main ECE']
    rows = [{_header(name): row.get(name, '-') for name in order} for row in rows]
    differences = [
        {
            'difference': f'{code(method)} - {code(baseline)}',
            'n': str(len(paired(results, method, baseline, 'main'))),
            **{
                _header(name): describe_difference(paired(results, method, baseline, name))
                for name in (*names, 'main', ENSEMBLE)
            },
            'to resolve main': _describe_effort(results, method, baseline),
        }
        for method in present
        for baseline in baselines(method, present)
        if paired(results, method, baseline, 'main')
    ]
    parts = [table(rows, left=('method',))]
    curves = [_curve_row(method, results) for method in present]
    if all(len(row) > 1 for row in curves):
        parts.append(table(curves, left=('method',)))
    if differences:
        parts.append(table(differences, left=('difference',)))
    if note := _describe_warmups(results, names):
        parts.append(note)
    return '\n\n'.join(parts)


def chose_warmup(result: dict[str, Any]) -> bool:
    """Return whether a run's epoch is one in which its heads warmed up: nothing distils, and losses do not differ."""
    flags, epoch = result['flags'], result['selection'].get('epoch')
    is_frozen = flags.get('freeze-backbone') or flags.get('regime') == 'frozen'
    warms_up = flags.get('pretrained') and 'exits' in flags and not is_frozen
    return epoch is not None and epoch + 1 <= flags.get('head-warmup-epochs', 1.0 if warms_up else 0.0)


def _describe_warmups(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Return which runs chose an epoch of the warm-up, and what they had at the end; '' for none."""
    ends = []
    for result in filter(chose_warmup, results):
        last = result['validation'][-1]
        columns = {_header(name): f'eval_exit{name}_top1' for name in names} | {'main': 'eval_top1'}
        found = ', '.join(f'{name} {last[key]:.2f}' for name, key in columns.items() if key in last)
        ends.append(f'{code(result["method"])} {result["seed"]}: {found}')
    if not ends:
        return ''
    return (
        'Seeds whose chosen epoch is one in which heads warmed up, so that losses do not differ there; at the end, on'
        f' the images that chose: {"; ".join(ends)}.'
    )


def _describe_effort(results: Sequence[dict[str, Any]], method: str, baseline: str) -> str:
    """Return how many more pairs of runs a difference that is not resolved takes, and their minutes."""
    differences = paired(results, method, baseline, 'main')
    if not describe_difference(differences).endswith('not resolved'):
        return '-'
    missing = pairs_to_resolve(differences) - len(differences)
    both = [statistics.median(r['seconds'] for r in results if r['method'] == name) for name in (method, baseline)]
    return f'{missing} more pair{"" if missing == 1 else "s"}, {missing * sum(both) / 60:,.0f} minutes'


def _curve_row(method: str, results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return how main of a method learns, means over seeds; without curves in the results, the method alone.

    Accuracies are of the images that the epoch is chosen on, but for the augmented training images of the last epoch.
    """
    curves = {_pair_of(result): _evaluated(result) for result in results if result['method'] == method}
    row = {'method': code(method)}
    if not all(curves.values()):
        return row
    fits = [curve[-1]['train_main_top1'] for curve in curves.values() if 'train_main_top1' in curve[-1]]
    row['main at the end, training images'] = _mean_and_sd(fits) if len(fits) == len(curves) else '-'
    changes = [
        statistics.stdev(after['eval_top1'] - before['eval_top1'] for before, after in zip(curve, curve[1:]))
        for curve in curves.values()
        if len(curve) > 2
    ]
    row['sd of changes between epochs'] = f'{statistics.fmean(changes):.2f}' if changes else '-'
    rival = cross_entropy_of(method)
    ends = {_pair_of(r): _evaluated(r)[-1]['eval_top1'] for r in results if r['method'] == rival and _evaluated(r)}
    reached = [
        next((values['epoch'] + 1 for values in curve if values['eval_top1'] >= ends[pair]), None)
        for pair, curve in curves.items()
        if pair in ends
    ]
    found = [epoch for epoch in reached if epoch is not None]
    row["epochs to ce's end"] = f'{statistics.fmean(found):.1f}' if found else '-'
    if found and len(found) < len(reached):
        row["epochs to ce's end"] += f', {len(found)} of {len(reached)} runs'
    return row


def _evaluated(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the epochs of a run that were evaluated: with --val-interval not all are."""
    return [values for values in result.get('validation', ()) if 'eval_top1' in values]


def _pair_of(result: dict[str, Any]) -> tuple[int, str]:
    """Return what two runs must share to be compared one by one."""
    return result['seed'], precision_flags(result)


def _header(name: str) -> str:
    return f'exit {name}' if name.isdecimal() else {ENSEMBLE: 'ensemble'}.get(name, name)


def _accuracy_row(method: str, results: Sequence[dict[str, Any]]) -> dict[str, str]:
    values: dict[str, list[float]] = {}
    for result in results:
        for name, accuracy in top1(result).items():
            values.setdefault(name, []).append(accuracy)
    row = {'method': code(method), 'n': str(len(results))}
    row |= {name: _mean_and_sd(numbers) for name, numbers in values.items()}
    errors = [r['ECE'] for result in results for r in result['classifiers'] if r['exit'] == 'main' and 'ECE' in r]
    if len(errors) == len(results):
        row['main ECE'] = f'{statistics.fmean(errors):.3f}'
    return row


def _mean_and_sd(numbers: Sequence[float]) -> str:
    mean = f'{statistics.fmean(numbers):.2f}'
    return mean if len(numbers) == 1 else f'{mean} ± {statistics.stdev(numbers):.2f}'


def _shared_extra(result: dict[str, Any]) -> list[str]:
    """Return what all results of a table must have been given alike."""
    return split_precision(flags_that_matter(result.get('extra', ())))[0]


def _check_comparable(results: Sequence[dict[str, Any]]) -> None:
    for key in ('split', 'num_samples', 'extra'):
        seen = {str(_shared_extra(result) if key == 'extra' else result.get(key)): result['name'] for result in results}
        if len(seen) > 1:
            raise CheckpointError(
                f'Results of one table differ in {key}: '
                + ', '.join(f'{name} has {value}' for value, name in sorted(seen.items())[:3])
                + '. Remove those that do not belong, and run them again.'
            )


def format_tables(plans: Sequence[Plan], results: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """Return Markdown: for every group of the plans a heading, its tables, how it was measured, what is missing.

    The last line names the plans of which nothing has been measured.

    Args:
        plans: In order.
        results: Of `hub/experiments/results`.
        methods: All methods, in order.

    Raises:
        CheckpointError: Results of one table do not fit together.
    """
    by_name = {result['name']: result for result in results}
    parts, waiting = [], []
    for plan in plans:
        num_done = sum(run.name in by_name for run in plan.runs)
        if not num_done:
            waiting.append(f'{code(plan.name)} ({len(plan.runs)} runs)')
            continue
        parts.append(f'**{escape(plan.title)}** {num_done} of the {len(plan.runs)} runs of plan {code(plan.name)}.')
        for group in dict.fromkeys(run.group for run in plan.runs):
            runs = [run for run in plan.runs if run.group == group]
            done = [by_name[run.name] for run in runs if run.name in by_name]
            if not done:
                continue
            protocol, data, network = group
            parts.append(f'{code(network)} on {code(data)}, protocol {code(protocol)}: {_describe(done)}')
            parts.append(format_group(done, methods))
            missing: dict[str, list[str]] = {}
            for run in (run for run in runs if run.name not in by_name):
                missing.setdefault(run.method, []).append(str(run.seed))
            if missing:
                seeds = [f'{code(method)} {", ".join(found)}' for method, found in missing.items()]
                parts.append(f'Planned and missing, seeds of: {"; ".join(seeds)}.')
    if waiting:
        parts.append(f'Plans that have not been run: {", ".join(waiting)}.')
    return '\n\n'.join(parts) + '\n'


def format_summary(plans: Sequence[Plan], results: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: what ensembles that teach change, against plain and against cross-entropy alone.

    Main, and the first exit against cross-entropy. One row for each group and method of which enough pairs of runs have
    been measured, without runs that chose an epoch in which heads warmed up.

    Args:
        plans: In order.
        results: Of `hub/experiments/results`.
    """
    by_name = {result['name']: result for result in results}
    rows = []
    for plan in plans:
        for group in dict.fromkeys(run.group for run in plan.runs):
            done = [by_name[run.name] for run in plan.runs if run.group == group and run.name in by_name]
            done = [result for result in done if not chose_warmup(result)]
            methods = list(dict.fromkeys(result['method'] for result in done))
            for method in methods:
                # Of two that begin alike the later, which is nearer to the method.
                rivals = {name.split('-')[0]: name for name in baselines(method, methods)}
                if is_taught_by_ensemble(method) and {'plain', 'ce'} <= rivals.keys():
                    pairs = {name: paired(done, method, rivals[name], 'main') for name in ('plain', 'ce')}
                    if min(map(len, pairs.values())) < MIN_PAIRS:
                        continue
                    plain = [top1(result)['main'] for result in done if result['method'] == rivals['plain']]
                    rows.append(
                        {
                            'network, images, protocol': ', '.join(code(group[k]) for k in (2, 1, 0)),
                            'plain': _mean_and_sd(plain),
                            'method': code(method),
                            'n': ', '.join(dict.fromkeys(str(len(pair)) for pair in pairs.values())),
                            'main - plain': describe_difference(pairs['plain']),
                            'main - ce': describe_difference(pairs['ce']),
                            'exit 0 - ce': describe_difference(paired(done, method, rivals['ce'], '0')),
                        }
                    )
    return table(rows, left=('network, images, protocol', 'method')) + '\n'


def _describe(results: Sequence[dict[str, Any]]) -> str:
    """Return how results were measured, in words."""
    first = results[0]
    selections: dict[tuple[str, str, bool], list[str]] = {}
    for r in results:
        selection = (str(r['selection']['by']), r['selection']['on'], r['selection']['is_reported_split'])
        selections.setdefault(selection, []).append(r['method'])
    text = f'top-1 in percent on {first["num_samples"]:,} images of {escape(first["split"])}, mean ± standard deviation'
    text += ' over n seeds; differences of runs of the same seed, mean ± half of the 95 % interval. '
    for (by, on, is_reported), methods in sorted(selections.items()):
        named = f' of {", ".join(map(code, dict.fromkeys(methods)))}' if len(selections) > 1 else ''
        text += f'Epoch{named} chosen by {escape(by)} on {escape(on)}{", the reported images" if is_reported else ""}. '
    for key in ('commit', 'hardware', 'threads', 'versions'):
        # Rows of one thread were once written in the plural.
        values = sorted({re.sub(r'^1 torch threads$', '1 torch thread', str(result[key])) for result in results})
        text += f'{key.capitalize()}: {"; ".join(map(escape, values))}. '
    if shared := split_precision(first.get('extra', ()))[0]:
        text += f'All with {code(" ".join(shared))}. '
    for precision in sorted({precision_flags(result) for result in results} - {''}):
        seeds = [result['seed'] for result in results if precision_flags(result) == precision]
        count, named = len(seeds), ', '.join(map(str, sorted(set(seeds))))
        runs = f'{count} run{"" if count == 1 else "s"} (seeds {named})'
        text += f'{runs} with {code(precision)}, which no pair mixes with others. '
    minutes = statistics.fmean(result['seconds'] for result in results) / 60
    return text + f'{minutes:.1f} minutes a run.'


def place_in(text: str, tables: str) -> str:
    r"""Return a Markdown file's text with the tables between its two comments.

    Raises:
        InvalidValueError: The comments are not there, once each and in order.

    >>> place_in(f'a\n{START}\nold\n{END}\nb', 'new\n').split('\n')
    ['a', '<!-- evidence -->', 'new', '<!-- /evidence -->', 'b']
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InvalidValueError(f'The file must have {START} and {END} once each, in this order.')
    return f'{text[: text.index(START)]}{START}\n{tables}{text[text.index(END) :]}'
