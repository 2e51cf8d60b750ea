"""What all figures share: a canvas without a window, colours, axes and PNG files; the only user of matplotlib."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

# Okabe and Ito: told apart by colour-blind readers.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')

MARKERS = 'osD^vP*X<>hp'
MATPLOTLIB_MISSING = 'matplotlib is not installed. Install it with pip install "timm-multiexit[plots]".'
_DASHES = ('-', '--', ':', '-.')


def new_figure(width: float, height: float, title: str = '') -> Any:
    """Return an empty figure of so many inches, without pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MATPLOTLIB_MISSING) from error

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def encode_png(figure: Any) -> bytes:
    """Return a figure as a PNG of 150 pixels per inch; texts, which have names in them, are drawn as they are.

    Between two dollar signs matplotlib would read formulas, and raise for other text.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    content = BytesIO()
    with rc_context({'text.parse_math': False}):  # for texts that are made while it is drawn
        for text in figure.findobj(Text):
            text.set_parse_math(False)
            text.set_text(drawable(text.get_text()))
        figure.savefig(content, dpi=150, format='png')
    return content.getvalue()


def drawable(name: str) -> str:
    r"""Return a name with question marks for what is not Unicode, as names of files may be; matplotlib raises for it.

    >>> drawable('caf\udce9')
    'caf?'
    """
    return name.encode(errors='replace').decode()


def legend_label(name: str) -> str:
    """Return a name for the legend, from which matplotlib leaves those out that begin with an underscore.

    >>> legend_label('_run'), legend_label('run')
    (' _run', 'run')
    """
    return f' {name}' if name.startswith('_') else name


def line_style(idx: int) -> dict[str, Any]:
    """Return colour and dashes of the idx-th line; they repeat after 28."""
    return {'color': COLORS[idx % len(COLORS)], 'linestyle': _DASHES[idx // len(COLORS) % len(_DASHES)]}


def depth_shades(count: int) -> list[Any]:
    """Return one colour per classifier, light for the shallowest to dark for the deepest.

    Viridis darkens evenly, so the order shows in grey too; its lightest fifth is too pale on white.
    """
    from matplotlib import colormaps

    return [colormaps['viridis'](0.8 * (1 - idx / max(count - 1, 1))) for idx in range(count)]


def gray_shades(count: int) -> list[str]:
    """Return greys from dark to light.

    >>> gray_shades(1)
    ['0.05']
    """
    return [str(0.9 * idx / max(count - 1, 1) + 0.05) for idx in range(count)]


def show_epochs(axes: Any) -> None:
    """Give the axes whole epochs and a grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel='epochs trained')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.grid(alpha=0.3)


def annotate_cells(axes: Any, matrix: Sequence[Sequence[float]]) -> None:
    """Write a matrix of shares into its cells, in percent, light on dark."""
    highest = max(max(row) for row in matrix) or 1.0
    for y, row in enumerate(matrix):
        for x, share in enumerate(row):
            color = 'white' if share > 0.55 * highest else 'black'
            axes.text(x, y, f'{100 * share:.1f}', ha='center', va='center', color=color, fontsize=9)


def draw_box(axes: Any, center: tuple[float, float], size: tuple[float, float], text: str, color: str) -> None:
    """Draw a box with rounded corners and text in it."""
    from matplotlib.patches import FancyBboxPatch

    (x, y), (width, height) = center, size
    corner, shape = (x - width / 2, y - height / 2), 'round,pad=0,rounding_size=0.15'
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=color, edgecolor='black', alpha=0.6))
    axes.text(x, y, text, ha='center', va='center', fontsize=8)


def draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow from one place to another."""
    axes.annotate('', xy=end, xytext=start, arrowprops={'arrowstyle': '->', 'color': 'black'})
