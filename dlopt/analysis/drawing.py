"""What all pictures share: panels, distinguishable colours and dashes, titles, legends, and files."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart by colour-blind readers; without their yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST = len(COLOURS) * len(DASHES)
"""Curves that can be told apart."""


def figure(width: float, height: float, title: str = "", *, fontsize: float = 11) -> "Figure":
    """An empty figure of so many inches, whose panels get their places when it is drawn."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(title, fontsize=fontsize)
    return made


def plain(*panels: "Axes", **grid: Any) -> None:
    """A light grid below the curves, and no box around them. `grid`: as `Axes.grid` takes it."""
    for axes in panels:
        axes.grid(**{"color": "0.9"} | grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def style(i: int, *, dash: int | None = None, **more: Any) -> dict[str, Any]:
    """Colour and dashes of the curve i. `dash`: number of its dashes, where not i."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[(i if dash is None else dash) % len(DASHES)]} | more


def spelled(metric: str) -> str:
    """val_accuracy -> validation accuracy."""
    words = metric.replace("_", " ").replace("lr", "learning rate")
    return words.replace("val ", "validation ").replace("train ", "training ")


def headed(title: str, subtitle: str, width: int = 90) -> str:
    """A title with its subtitle below, in lines of `width` letters."""
    return "\n".join([title, *textwrap.wrap(subtitle, width)])


def legend_below(made: "Figure", axes: "Axes", columns: int, **options: Any) -> None:
    """The curves of one panel, below all; the samples are long enough to show dashes."""
    options = {"frameon": False, "handlelength": 3.5, "ncols": columns} | options
    handles, labels = axes.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", **options)


def whole_numbers(*panels: "Axes") -> None:
    """Ticks of the x-axis at whole numbers only."""
    for axes in panels:
        axes.locator_params("x", integer=True)


def logarithmic(*panels: "Axes") -> None:
    """A logarithmic y-axis with numbers as one types them: 0.6 and 1e-05, where matplotlib writes 6 x 10^-1.

    What is not positive is left out. Plain text is also drawn in a fraction of the time of mathematics.
    """
    from matplotlib.ticker import LogFormatter

    class Typed(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    for axes in panels:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(Typed())
        axes.yaxis.set_minor_formatter(Typed(labelOnlyBase=False))


def powers_of_two(axes: "Axes", ticks: "list[int]", **options: Any) -> None:
    """A logarithmic x-axis with just these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], **options)
    axes.minorticks_off()


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
