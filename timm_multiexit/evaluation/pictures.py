"""The picture of accuracy over cost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm_multiexit.utils.figures import COLORS, MARKERS, encode_png, gray_shades, legend_label, new_figure
from timm_multiexit.utils.text import macs_unit

# (MACs of an image, top-1 in percent)
Point = tuple[float, float]


class Line(NamedTuple):
    """Points of one label in the legend, joined in their order and drawn by matplotlib's `plot` with `style`.

    Names, if there are any, are written at the points.
    """

    points: Sequence[Point]
    label: str | None
    style: Mapping[str, Any]
    names: Sequence[str] = ()


def plot_accuracy_over_macs(
    lines: Sequence[Line],
    *,
    title: str = '',
    xlabel: str = 'mean cost of an image',
    width: float = 8,
    height: float = 6,
) -> Any:
    """Return a figure of top-1 accuracy over MACs, width and height in inches, with the unit added to `xlabel`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(width, height, title)
    axes = figure.subplots()
    scale, unit = macs_unit(max((macs for line in lines for macs, _ in line.points), default=0))
    for line in lines:
        places = [macs / scale for macs, _ in line.points]
        label = line.label and legend_label(line.label)
        axes.plot(places, [accuracy for _, accuracy in line.points], label=label, **line.style)
        # Names of policies fall away below their points, to the right, where neither the names of classifiers are nor
        # those of policies that are as accurate.
        is_policy = line.style.get('linestyle') == 'none'
        style: dict[str, Any] = {'xytext': (0, 9), 'ha': 'center'}
        if is_policy:
            style = {'xytext': (5, -7), 'ha': 'left', 'va': 'center', 'rotation': -35, 'rotation_mode': 'anchor'}
        for name, place, (_, accuracy) in zip(line.names, places, line.points):
            axes.annotate(name, (place, accuracy), textcoords='offset points', fontsize=8, **style)
    axes.set(xlabel=f'{xlabel}, {unit}', ylabel='top-1 accuracy, %')
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc='outside lower center', ncols=3)
    return figure


def draw_validation(rows: Sequence[Mapping[str, Any]], sections: Mapping[str, Any], title: str) -> bytes | None:
    """Return a PNG: cost and accuracy of classifiers, policies and static models; None without matplotlib.

    The rows are those of an `ExitTable`; of the sections of `Validation`, `curve`, `dynamic`, `compare` and `rivals`
    are drawn if present.
    """
    try:
        return encode_png(plot_accuracy_over_macs(validation_lines(rows, sections), title=title))
    except ImportError:
        return None


def validation_lines(rows: Sequence[Mapping[str, Any]], sections: Mapping[str, Any]) -> list[Line]:
    """Return what `draw_validation` draws: curves of policies, single classifiers, saved policies, single models.

    Classifiers are drawn twice: at what one costs alone, and at what it costs after all exits before it.
    """
    *classifiers, ensemble = rows
    main = classifiers[-1]
    lines = [
        Line(sorted(points), label, {'color': color, 'marker': '.', 'markersize': 4, 'linewidth': 1.5})
        for (label, points), color in zip(_curve_points(sections.get('curve')).items(), COLORS)
    ]
    rivals = sections.get('rivals') or {'rows': ()}
    if cascade := _curve_points((rivals.get('cascade') or {}).get('curve')).get(_SEARCH):
        style = {'color': COLORS[2], 'marker': 'x', 'markersize': 4, 'linewidth': 1.5}
        lines.append(Line(sorted(cascade), 'cascade of two models', style))
    names = ['main' if row is main else f'exit {row["exit_idx"]}' for row in classifiers]
    style = {'color': 'black', 'marker': 'o', 'linestyle': ':'}
    lines.append(Line([_place(row, 'fixed') for row in classifiers], 'one exit alone (exit_idx)', style, names))
    # Open and in grey, so that both show where they meet: exit 0 has nothing before it.
    style = {'color': '0.5', 'marker': 'o', 'markersize': 9, 'markerfacecolor': 'none', 'linestyle': '--'}
    lines.append(Line([_place(row, 'sequential') for row in classifiers], 'with all exits before it', style))
    saved = [row for row in sections.get('dynamic') or () if row.get('kind') in ('budget', 'max_drop')]
    if saved:
        style = {'color': COLORS[3], 'marker': 'D', 'markersize': 7, 'markeredgecolor': 'black', 'linestyle': 'none'}
        points = [(row['macs'], row['top-1']) for row in saved]
        lines.append(Line(points, 'policies that are saved', style, [row['policy'] for row in saved]))
    singles = {'ensemble of all': _place(ensemble, 'sequential')}
    singles |= {row['static model']: (1e9 * row['GMACs'], row['top-1']) for row in sections.get('compare', ())}
    singles |= {row['name']: (row['macs'], row['top-1']) for row in rivals['rows'] if row['kind'] == 'static'}
    for idx, ((label, point), color) in enumerate(zip(singles.items(), gray_shades(len(singles)))):
        style = {'color': color, 'marker': _SINGLES[idx % len(_SINGLES)]}
        lines.append(Line([point], label, {**style, 'markersize': 8, 'linestyle': 'none', 'markeredgecolor': 'black'}))
    return lines


_SEARCH = 'budgets, search'
_SINGLES = MARKERS.replace('o', '').replace('D', '')  # which classifiers and saved policies have


def _place(row: Mapping[str, Any], path: str) -> Point:
    return 1e9 * row[f'GMACs {path}'], row['top-1']


def _curve_points(curve: Mapping[str, Any] | None) -> dict[str, list[Point]]:
    """Return label -> points of the curves that were measured."""
    labels = {'solver': "budgets, MSDNet's solver", 'search': _SEARCH}
    points = curve['points'] if curve else []
    found = {
        label: [(point[name]['macs'], point[name]['top-1']) for point in points if point[name]]
        for name, label in labels.items()
    }
    return {label: line for label, line in found.items() if line}
