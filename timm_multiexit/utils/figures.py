"""What all pictures share: a figure without a window, colours, and the way to a PNG."""

from io import BytesIO
from typing import Any

# Okabe and Ito: told apart by colour-blind readers.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')

_STYLES = ('-', '--', ':', '-.')

MARKERS = 'osD^vP*X'


def new_figure(width: float, height: float, title: str = '') -> Any:
    """Return a figure of so many inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def style(idx: int) -> dict[str, Any]:
    """Return colour and line of the idx-th run; they repeat after 28."""
    return {'color': COLORS[idx % len(COLORS)], 'linestyle': _STYLES[idx // len(COLORS) % len(_STYLES)]}


def encode_png(figure: Any) -> bytes:
    """Return the figure as a PNG of 150 pixels per inch."""
    content = BytesIO()
    figure.savefig(content, dpi=150, format='png')
    return content.getvalue()


def depth_shades(count: int) -> list[Any]:
    """Return one colour per classifier, light for the shallowest to dark for the deepest.

    Viridis darkens evenly, so the order shows in grey too; its lightest fifth is too pale on white.
    """
    from matplotlib import colormaps

    return [colormaps['viridis'](0.8 * (1 - idx / max(count - 1, 1))) for idx in range(count)]


def show_epochs(axes: Any) -> None:
    """Give the axes whole epochs and a grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel='epochs trained')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.grid(alpha=0.3)


def annotate_cells(axes: Any, matrix: list[list[float]], text: str = '{:.1f}', fontsize: float = 9) -> None:
    """Write the numbers of a matrix of shares into its cells, in percent, light on dark."""
    highest = max(max(row) for row in matrix) or 1.0
    for y, row in enumerate(matrix):
        for x, share in enumerate(row):
            color = 'white' if share > 0.55 * highest else 'black'
            axes.text(x, y, text.format(100 * share), ha='center', va='center', color=color, fontsize=fontsize)
