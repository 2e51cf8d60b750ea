"""The picture of accuracy over cost."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

# (MACs of an image, top-1 in percent)
Point = tuple[float, float]

# Told apart in grey and by colour-blind readers: blue, orange, green, pink of Okabe and Ito.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7')

_MARKERS = 'sD^vP*X<>hp'


def draw_accuracy_vs_macs(
    *,
    exits: Mapping[str, Point],
    curves: Mapping[str, Sequence[Point]] | None = None,
    singles: Mapping[str, Point] | None = None,
    title: str = '',
) -> bytes | None:
    """Return a PNG: what each classifier, policy and other model reaches at which cost; None without matplotlib.

    Args:
        exits: Classifier -> where it is, shallow to deep, main last.
        curves: Label -> points of policies; joined in order of cost, and drawn as they are: a curve may fall.
        singles: Label -> a model that stands for itself: the ensemble, the plain backbone, static models.
        title: Heading of the figure.
    """
    try:
        figure = make_figure(exits, curves or {}, singles or {}, title)
    except ImportError:
        return None
    content = BytesIO()
    figure.savefig(content, dpi=150, format='png')
    return content.getvalue()


def make_figure(
    exits: Mapping[str, Point], curves: Mapping[str, Sequence[Point]], singles: Mapping[str, Point], title: str
) -> Any:
    """Return the figure that `draw_accuracy_vs_macs` writes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [*exits.values(), *singles.values(), *(point for curve in curves.values() for point in curve)]
    scale, unit = _choose_unit(max((macs for macs, _ in points), default=0))
    for (label, curve), color in zip(curves.items(), _COLORS):
        axes.plot(*_columns(sorted(curve), scale), color=color, label=label, marker='.', markersize=4, linewidth=1.5)
    axes.plot(
        *_columns(exits.values(), scale), color='black', marker='o', linestyle=':', label='one classifier for all'
    )
    for name, (macs, accuracy) in exits.items():
        axes.annotate(
            name, (macs / scale, accuracy), xytext=(0, 7), textcoords='offset points', fontsize=8, ha='center'
        )
    for idx, (label, point) in enumerate(singles.items()):
        style = dict(marker=_MARKERS[idx % len(_MARKERS)], markersize=8, linestyle='none', markeredgecolor='black')
        axes.plot(*_columns([point], scale), label=label, color=_gray(idx, len(singles)), **style)
    axes.set(xlabel=f'mean cost of an image, {unit}', ylabel='top-1 accuracy, %', title=title)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc='outside lower center', ncols=3)
    return figure


def _columns(points: Sequence[Point], scale: float) -> tuple[list[float], list[float]]:
    return [macs / scale for macs, _ in points], [accuracy for _, accuracy in points]


def _choose_unit(largest: float) -> tuple[float, str]:
    return (1e9, 'GMACs') if largest >= 1e9 else (1e6, 'MMACs')


def _gray(idx: int, count: int) -> str:
    return str(0.9 * idx / max(count - 1, 1) + 0.05)
