"""What a model card says of results: the headline and the tables, made of metrics.json."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from timm_multiexit.utils.errors import is_number
from timm_multiexit.utils.markdown import bullets, code, escape, number, table

COSTS = ('exit', 'tap', 'params', 'GMACs fixed', 'GMACs sequential')

REFERENCES = ('plain timm', 'all exits')  # rows of `dynamic` that are no policy

# What a card compares by, the first that was measured.
MAIN_METRICS = ('top-1', 'mAP')

_POINTS = 1.0  # what a headline may lose against main


class _Trade(NamedTuple):
    """What a row gives against plain timm.

    Attributes:
        row: Of an exit or of a policy.
        accuracy: In percent.
        gain: In points.
        percent: Of the MACs.
    """

    row: Mapping[str, Any]
    accuracy: float
    gain: float
    percent: float

    def compare(self) -> str:
        """Return the gain in words."""
        if abs(self.gain) < 0.005:
            return 'level with plain timm'
        return f'{abs(self.gain):.2f} points {"above" if self.gain > 0 else "below"} plain timm'


def headline(metrics: Mapping[str, Any]) -> str:
    """Return in one sentence what answering early is worth, against plain timm, which is what main answers.

    It is about the policy that costs least of those that lose no more than one point; if all lose more, about the one
    that loses least. Where no policy costs less than main, it is about an exit, and where no exit does, about main.

    Args:
        metrics: Contents of metrics.json.
    """
    rows = metrics['rows']
    metric, main = find_metric(rows), find_main(rows)
    if metric is None or not is_number(main.get(metric)):
        return 'How accurate it is has not been measured.'
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
    ratio = best.row.get('time_ratio')
    if is_number(ratio) and ratio > 0:
        text += f' and in {100 * ratio:.1f} % of its time'
    if cheap_policies and cheap_exits:
        first = cheap_exits[0]
        text += f'; exit {code(first.row["exit"])} alone is {first.compare()} at {first.percent:.1f} % of its MACs'
    return f'{text}.'


def _choose(trades: Sequence[_Trade]) -> _Trade:
    close = [trade for trade in trades if trade.gain >= -_POINTS]
    if close:
        return min(close, key=lambda trade: (trade.percent, -trade.gain))
    return min(trades, key=lambda trade: (-trade.gain, trade.percent))


def exit_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the early exits, which are called by their numbers."""
    return [row for row in rows if str(row['exit']).isdecimal()]


def find_main(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row of main."""
    return next((row for row in rows if row['exit'] == 'main'), None)


def policy_rows(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of policies whose accuracy and cost are known, without those of plain timm and all exits."""
    return [row for row in _measured_rows(metrics) if row['policy'] not in REFERENCES]


def find_default(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the row of the policy that the checkpoint has as its own; None where that is not known."""
    return next((row for row in policy_rows(metrics) if row.get('is_default') is True), None)


def _measured_rows(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    needed = ('top-1', 'macs', 'macs_percent')
    return [row for row in metrics.get('dynamic') or () if all(is_number(row.get(name)) for name in needed)]


def find_metric(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the metric that a card compares by; None where nothing was measured."""
    return next((name for name in MAIN_METRICS if any(is_number(row.get(name)) for row in rows)), None)


def describe_picture(metrics: Mapping[str, Any]) -> str:
    """Return in words what the picture shows, for those who do not see it."""
    rows, split = metrics['rows'], _name_split(metrics.get('dataset') or {}, escape)
    exits = ', '.join(escape(row['exit']) for row in exit_rows(rows))
    shown = [f'exits {exits} and main', 'the ensemble of all exits', 'plain timm']
    if metrics.get('curve'):
        shown.insert(1, 'policies for budgets')
    shown += [f'static {escape(row["static model"])}' for row in metrics.get('compare') or ()]
    return f'Top-1 accuracy against mean MACs of an image{f" on {split}" if split else ""}: {", ".join(shown)}'


def describe_results(metrics: Mapping[str, Any]) -> list[str]:
    """Return the parts of the sections of tables: exits, dynamic inference, static networks; what there is."""
    return [*_describe_exits(metrics), *_describe_policies(metrics), *_describe_statics(metrics)]


def _describe_exits(metrics: Mapping[str, Any]) -> list[str]:
    """Return the parts of the section on exits: one row per classifier, and what the numbers are of."""
    rows, latency = metrics['rows'], metrics.get('latency') or {}
    ms = latency.get('ms') or {}
    measured = dict.fromkeys(name for row in rows for name in row if name not in (*COSTS, 'exit_idx'))
    lines = []
    for row in rows:
        line = {'exit': code(row['exit']), 'at': code(row['tap']), 'params': number(row['params'])}
        line |= {name: number(row[name]) for name in ('GMACs fixed', 'GMACs sequential')}
        line |= {escape(name): number(row.get(name), 2) for name in measured}
        lines.append(line | {'p50, ms': number(ms.get(row['exit']))})
    if is_number(ms.get('plain timm')):
        plain = lines[rows.index(find_main(rows))] | {'exit': 'plain timm', 'p50, ms': number(ms['plain timm'])}
        lines.append(plain | {'GMACs sequential': '-'})
    text = (
        'Exits count from 0, shallow to deep; `main` is the classifier of plain timm, `ens` the mean of all logits.'
        ' *Fixed* is the path to an exit and its own head, which is what `exit_idx=k` runs; *sequential* has all heads'
        ' on the way too.'
    )
    if 'ECE' in measured:
        text += ' ECE is the calibration error with 15 bins.'
    if ms:
        text += (
            f' Latency is the median of {number(latency.get("rounds"))} rounds with a batch of'
            f' {number(latency.get("batch_size"))} on {code(latency.get("device"))}.'
        )
    return ['## Exits', table(lines, left=('exit', 'at')), text, _describe_data(metrics)]


def _describe_data(metrics: Mapping[str, Any]) -> str:
    """Return what accuracies are of and what everything was measured on."""
    lines, dataset = [], metrics.get('dataset') or {}
    if find_metric(metrics['rows']):
        count = f'{number(dataset["num_samples"])} images' if dataset.get('num_samples') else ''
        places = ', '.join(part for part in (_name_split(dataset, code), count) if part)
        where = f', on {places}' if places else ''
        seed = (metrics.get('training') or {}).get('seed')
        run = 'one run' if seed is None else f'one run (seed {number(seed)})'
        lines.append(f'Accuracies are in percent{where}; {run}, no spread is known.')
    epoch = metrics.get('epoch') or {}
    if epoch.get('best') is not None:
        text = f'Epoch {number(epoch["best"])} of {number(epoch.get("epochs"))}'
        if epoch.get('chosen_by'):
            text += f', chosen by {code(epoch["chosen_by"])}'
        if epoch.get('chosen_on'):
            text += f', on {escape(epoch["chosen_on"])}'
        if epoch.get('is_reported_split'):
            text += ': **the very split that is reported**, so the numbers are too good'
        lines.append(f'{text}.')
    environment = describe_environment({'precision': metrics.get('precision'), **(metrics.get('environment') or {})})
    if environment:
        lines.append(f'Measured on {environment}.')
    return bullets(lines)


def _name_split(dataset: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    """Return the split and the name of a data set as far as they are known, each shown so."""
    split = f'the {show(dataset["split"])} split' if dataset.get('split') else ''
    name = show(dataset['name']) if dataset.get('name') else ''
    return ' of '.join(part for part in (split, name) if part)


def describe_environment(environment: Mapping[str, Any]) -> str:
    """Return hardware, threads, precision, versions and commit in one line; '' for none."""
    names = ('hardware', 'threads', 'precision', 'versions', 'commit')
    known = {name: escape(environment[name]) for name in names if environment.get(name)}
    if 'commit' in known:
        known['commit'] = f'timm_multiexit at {known["commit"]}'
    return '; '.join(known.values())


def _describe_policies(metrics: Mapping[str, Any]) -> list[str]:
    """Return the parts of the section on dynamic inference; none where no policy was measured."""
    policies = policy_rows(metrics)
    if not policies:
        return []
    heads, default = _join(escape(row['exit']) for row in exit_rows(metrics['rows'])), find_default(metrics)
    lines = [
        {
            'policy': code(row['policy']) + (' (default)' if row is default else ''),
            'criterion': _describe_criterion(row),
            'thresholds': _join('-' if value is None else number(value) for value in row.get('thresholds') or ()),
            f'leave at {heads} / main, %': _join(f'{100 * share:.1f}' for share in row.get('shares') or ()),
            'GMACs': number(row['macs'] / 1e9),
            '% of MACs': number(row['macs_percent'], 1),
            'top-1': number(row.get('top-1'), 2),
            'time ratio': number(row.get('time_ratio')),
        }
        for row in _measured_rows(metrics)
    ]
    return [
        '## Dynamic inference',
        'An image that an exit is sure of leaves the network there. MACs are means per image.',
        table(lines, left=('policy', 'criterion')),
        bullets(_note_policies(metrics, policies)),
    ]


def _join(values: Iterable[str]) -> str:
    return ' / '.join(values) or '-'


def _describe_criterion(row: Mapping[str, Any]) -> str:
    if not row.get('criterion'):
        return '-'
    combine = f', {row["combine"]} of the exits so far' if row.get('combine') else ''
    return escape(f'{row["criterion"]}{combine}')


def _note_policies(metrics: Mapping[str, Any], policies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the notes under the table of policies."""
    lines, default = [], find_default(metrics)
    if default:
        lines.append(f'`model.infer(x)` uses the default policy, {code(default["policy"])}.')
    for source in dict.fromkeys(row['chosen_on'] for row in policies if row.get('chosen_on')):
        names = ', '.join(code(row['policy']) for row in policies if row.get('chosen_on') == source)
        reported = '; the numbers are of the split above' if (metrics.get('dataset') or {}).get('split') else ''
        lines.append(f'Thresholds of {names} were chosen on {escape(source)}{reported}.')
    given = ', '.join(code(row['policy']) for row in policies if not row.get('chosen_on'))
    if given:
        lines.append(f'Where thresholds of {given} come from is not recorded.')
    timing = metrics.get('timing')
    if timing:
        # The medians of images/s are not those of the ratios, so plain timm's alone is shown.
        speeds = (row.get('img/s') for row in _measured_rows(metrics) if row['policy'] == 'plain timm')
        speed = ''.join(f' ({number(speed)} images/s)' for speed in speeds if is_number(speed))
        lines.append(
            f'Time ratios: medians of {number(timing.get("rounds"))} rounds, in each of which all take a batch of'
            f' {number(timing.get("images"))} images on {code(timing.get("device"))} in turns; the ratio is to the time'
            f' of plain timm{speed} in the same round, below 1 is faster.'
        )
    over = metrics.get('overthinking')
    if over:
        lines.append(
            f'Right at an exit and wrong at main: {number(over.get("lost"), 2)} % of the images; the reverse:'
            f' {number(over.get("gained"), 2)} %; right at some classifier: {number(over.get("right_somewhere"), 2)} %.'
        )
    return lines


def _describe_statics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the parts of the section on other networks; none where there are none."""
    if not metrics.get('compare'):
        return []
    main = find_main(metrics['rows'])
    rows = [
        {'network': 'main of this one', 'image, px': number(metrics['input_size'][-1]), **_describe_static(main)},
        *(
            {
                'network': code(row['static model']),
                'image, px': number(row.get('image, px')),
                **_describe_static(row | {'GMACs fixed': row.get('GMACs')}),
            }
            for row in metrics['compare']
        ),
    ]
    return ['## Static networks on the same images', table(rows, left=('network',))]


def _describe_static(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        'params': number(row.get('params')),
        'GMACs': number(row.get('GMACs fixed')),
        **{name: number(row.get(name), 2) for name in ('top-1', 'top-5')},
    }
