"""The headline and the tables of a model card, computed from metrics.json."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from timm_multiexit.evaluation.cascade import describe_pairs as describe_pairs
from timm_multiexit.publishing.results import (
    Row,
    add_row_keys,
    exit_rows,
    find_default,
    find_main,
    find_metric,
    measured_rows,
    policy_rows,
)
from timm_multiexit.utils.errors import is_number
from timm_multiexit.utils.markdown import code, escape, number, table

COSTS = ('exit', 'tap', 'params', 'GMACs fixed', 'GMACs sequential')
_POINTS = 1.0  # accuracy that a headline may lose against main


class _Trade(NamedTuple):
    """An exit or a policy compared with main: accuracy and share of the MACs in percent, gain in points."""

    row: Row
    accuracy: float
    gain: float
    percent: float

    def compare(self) -> str:
        """Return the gain in words."""
        if abs(self.gain) < 0.005:
            return 'level with main'
        return f'{abs(self.gain):.2f} points {"above" if self.gain > 0 else "below"} main'


def headline(metrics: Mapping[str, Any]) -> str:
    """Return one sentence on what early exits gain against main.

    It is about the cheapest policy that loses at most one point, or if all lose more, the one that loses least. If no
    policy costs less than main, it is about an exit, and if no exit does, about main.
    """
    metrics = add_row_keys(metrics)
    rows = metrics['rows']
    metric, main = find_metric(rows), find_main(rows)
    if metric is None or not is_number(main.get(metric)):
        return 'Its accuracy has not been measured.'
    exits = [
        _Trade(row, row[metric], row[metric] - main[metric], 100 * row['GMACs fixed'] / main['GMACs fixed'])
        for row in exit_rows(rows)
        if is_number(row.get(metric))
    ]
    policies = [
        _Trade(row, row['top-1'], row['top-1'] - main[metric], row['macs_percent'])
        for row in (policy_rows(metrics) if metric == 'top-1' else ())
    ]
    cheap_policies, cheap_exits = ([trade for trade in trades if trade.percent < 100] for trades in (policies, exits))
    if not cheap_policies and not cheap_exits:
        why = 'nothing that was measured costs fewer MACs' if policies or exits else 'its exits have not been measured'
        return f'Main has {main[metric]:.2f} % {metric}; {why}.'
    best = _choose(cheap_policies or cheap_exits)
    name = f'With {code(best.row["policy"])}' if cheap_policies else f'At exit {code(best.row["exit"])}'
    text = (
        f'{name} it has {best.accuracy:.2f} % {metric}, {best.compare()} ({main[metric]:.2f} %), at'
        f' {best.percent:.1f} % of its MACs'
    )
    ratio: Any = best.row.get('time_ratio')
    if is_number(ratio) and ratio > 0:
        text += f' and {1 / ratio:.2f} times its images/s'
    if cheap_policies and cheap_exits:
        first = cheap_exits[0]
        text += f'; exit {code(first.row["exit"])} alone is {first.compare()} at {first.percent:.1f} % of its MACs'
    return f'{text}.'


def _choose(trades: Sequence[_Trade]) -> _Trade:
    close = [trade for trade in trades if trade.gain >= -_POINTS]
    if close:
        return min(close, key=lambda trade: (trade.percent, -trade.gain))
    return min(trades, key=lambda trade: (-trade.gain, trade.percent))


def name_split(metrics: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    """Return split and name of the data set as far as they are known, each formatted by `show`."""
    dataset = metrics.get('dataset') or {}
    split = f'the {show(dataset["split"])} split' if dataset.get('split') else ''
    name = show(dataset['name']) if dataset.get('name') else ''
    return ' of '.join(part for part in (split, name) if part)


def describe_picture(metrics: Mapping[str, Any]) -> str:
    """Return the alternative text of the picture."""
    split = name_split(metrics, escape)
    exits = ', '.join(escape(row['exit']) for row in exit_rows(metrics['rows']))
    shown = [f'exits {exits} and main, each alone and with all exits before it', 'the ensemble of all exits']
    if any(row['kind'] in ('budget', 'max_drop') for row in policy_rows(metrics)):
        shown.insert(1, 'policies that are saved')
    if metrics.get('curve'):
        shown.insert(1, 'policies for budgets')
    if metrics.get('rivals'):
        shown.append('a cascade of two models')
    shown += [f'static {escape(row["static model"])}' for row in metrics.get('compare') or ()]
    return f'Top-1 accuracy against mean MACs of an image{f" on {split}" if split else ""}: {", ".join(shown)}'


def table_exits(metrics: Mapping[str, Any]) -> str:
    """Return the table of classifiers, with a row for main as timm runs it if its latency is known."""
    rows, ms = metrics['rows'], (metrics.get('latency') or {}).get('ms') or {}
    measured = dict.fromkeys(name for row in rows for name in row if name not in (*COSTS, 'exit_idx'))
    lines, speed = [], f'images/s at {number((metrics.get("latency") or {}).get("batch_size"))}'
    for row in rows:
        line = {'exit': code(row['exit']), 'at': code(row['tap']), 'params': number(row['params'])}
        line |= {name: number(row[name]) for name in ('GMACs fixed', 'GMACs sequential')}
        line |= {escape(name): number(row.get(name), 2) for name in measured}
        lines.append(line | {speed: number(_speed(ms.get(row['exit']), 1e3))})
    if is_number(ms.get('main in timm')):
        plain = lines[rows.index(find_main(rows))]
        plain = plain | {'exit': 'main in timm', speed: number(_speed(ms['main in timm'], 1e3))}
        lines.append(plain | {'GMACs sequential': '-'})
    return table(lines, left=('exit', 'at'))


def table_policies(metrics: Mapping[str, Any]) -> str:
    """Return the table of dynamic inference."""
    heads, default = _join(escape(row['exit']) for row in exit_rows(metrics['rows'])), find_default(metrics)
    lines = [
        {
            'policy': code(row['policy']) + (' (default)' if row is default else ''),
            'criterion': _name_criterion(row),
            'thresholds': _join('-' if value is None else number(value) for value in row.get('thresholds') or ()),
            f'leave at {heads} / main, %': _join(f'{100 * share:.1f}' for share in row.get('shares') or ()),
            'GMACs': number(row['macs'] / 1e9),
            '% of MACs': number(row['macs_percent'], 1),
            'top-1': number(row.get('top-1'), 2),
            'images/s, main = 1': number(_speed(row.get('time_ratio'), 1), 2),
        }
        for row in measured_rows(metrics)
    ]
    return table(lines, left=('policy', 'criterion'))


def _speed(time: Any, unit: float) -> float | None:
    """Return how many fit into a unit of time; None where the time is not known."""
    return unit / time if is_number(time) and time > 0 else None


def _join(values: Iterable[str]) -> str:
    return ' / '.join(values) or '-'


def _name_criterion(row: Row) -> str:
    if not row.get('criterion'):
        return '-'
    combine = f', {row["combine"]} of the exits so far' if row.get('combine') else ''
    return escape(f'{row["criterion"]}{combine}')


def table_statics(metrics: Mapping[str, Any]) -> str:
    """Return the table of static networks that were compared with main."""
    main = find_main(metrics['rows'])
    rows = [('main', {**main, 'image, px': metrics['input_size'][-1], 'GMACs': main['GMACs fixed']})]
    rows += [(code(row['static model']), row) for row in metrics['compare']]
    lines = [
        {
            'network': name,
            **{key: number(row.get(key)) for key in ('image, px', 'params', 'GMACs')},
            **{key: number(row.get(key), 2) for key in ('top-1', 'top-5')},
        }
        for name, row in rows
    ]
    return table(lines, left=('network',))


def table_networks(metrics: Mapping[str, Any]) -> str:
    """Return the table of this network's policies, the cascade's and static networks, with their speed if known."""
    rows = [row for row in metrics['rivals']['rows'] if is_number(row.get('macs')) and is_number(row.get('top-1'))]
    sizes = list(dict.fromkeys(size for row in rows for size in row.get('img/s') or {}))
    lines = [
        {
            'network': escape(row['name']) if row['kind'] == 'main' else code(row['name']),
            'kind': escape(row['kind']),
            'top-1': number(row['top-1'], 2),
            'GMACs': number(row['macs'] / 1e9),
            **{f'images/s at {escape(size)}': number((row.get('img/s') or {}).get(size)) for size in sizes},
        }
        for row in rows
    ]
    return table(lines, left=('network', 'kind'))


def sources_of_thresholds(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return what thresholds were chosen on ('' if not recorded) -> names of the policies."""
    policies = policy_rows(metrics)
    sources = dict.fromkeys(row.get('chosen_on') or '' for row in policies)
    return {
        source: ', '.join(code(row['policy']) for row in policies if (row.get('chosen_on') or '') == source)
        for source in sorted(sources, key=lambda source: not source)
    }


def table_weights(metrics: Mapping[str, Any]) -> str:
    """Return the table of weight files; '' for none."""
    rows = [{'file': code(name), 'SHA-256': code(value)} for name, value in (metrics.get('weights') or {}).items()]
    return table(rows, left=('file', 'SHA-256')) if rows else ''


def table_programs(metrics: Mapping[str, Any]) -> str:
    """Return the table of ONNX programs: sizes of each classifier's own, and accuracy before and after int8."""
    onnx = metrics['onnx']
    names = [row['exit'] for row in exit_rows(metrics['rows'])] + ['main']
    sizes, top1 = onnx.get('bytes') or {}, (onnx.get('int8') or {}).get('top1') or {}
    lines = []
    for idx, name in enumerate(names):
        line = {'exit': code(name)}
        for precision in ('fp32', 'int8'):
            fixed = (sizes.get(precision) or {}).get('fixed') or ()
            line[f'{precision}, kB'] = number(fixed[idx] / 1e3, 1) if idx < len(fixed) else '-'
        for precision in ('fp32', 'int8'):
            values = top1.get(precision) or ()
            line[f'top-1 {precision}'] = number(values[idx], 2) if idx < len(values) else '-'
        lines.append(line)
    return table(lines, left=('exit',))


def format_environment(environment: Mapping[str, Any] | None, precision: Any = None) -> str:
    """Return hardware, threads, precision, versions and commit in one line; '' for none."""
    values = {**(environment or {}), 'precision': precision}
    names = ('hardware', 'threads', 'precision', 'versions', 'commit')
    known = {name: escape(values[name]) for name in names if values.get(name)}
    if 'commit' in known:
        known['commit'] = f'timm_multiexit at {known["commit"]}'
    return '; '.join(known.values())
