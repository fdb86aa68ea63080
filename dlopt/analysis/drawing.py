"""What all pictures share: colours and dashes that can be told apart, and how they are written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart by colour-blind readers; without their yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MOST = len(COLOURS) * len(DASHES)
"""Curves that can be told apart."""


def logarithmic(axes: "Axes") -> None:
    """A logarithmic y-axis with numbers as one types them: 0.6 and 1e-05, where matplotlib writes 6 x 10^-1.

    What is not positive is left out. Plain text is also drawn in a fraction of the time of mathematics.
    """
    from matplotlib.ticker import LogFormatter

    class Typed(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(Typed())
    axes.yaxis.set_minor_formatter(Typed(labelOnlyBase=False))


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes `name`.png and `name`.svg into the folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.draw_without_rendering()  # finds the layout, once for both: it takes as long as drawing
    figure.set_layout_engine("none")
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(str(paths[0]))
    FigureCanvasSVG(figure).print_svg(str(paths[1]))
    return paths
