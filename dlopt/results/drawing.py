"""Shared plotting helpers: figures, distinguishable line styles, axes, legends, files."""

import contextlib
import io
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.basics.files import write_atomically
from dlopt.metrics.shown import axis_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Okabe & Ito 2008, distinguishable for colour-blind readers; without their yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_CURVES = len(COLOURS) * len(DASHES)
"""Number of distinguishable line styles."""
# TrueType fonts, because publishers refuse Type 3; equal figures give equal files.
FILE_STYLE: Any = {"pdf.fonttype": 42, "svg.hashsalt": "dlopt"}
METADATA: Mapping[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def figure(width: float, height: float, title: str = "", *, fontsize: float = 11) -> "Figure":
    """Creates an empty figure (size in inches) with constrained layout."""
    import_matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(title, fontsize=fontsize)
    return made


def import_matplotlib() -> None:
    """Imports matplotlib without a `matplotlibrc` of the current folder: it may be of others, and names programs."""
    if "matplotlib" not in sys.modules:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # the current folder was removed
                stack.enter_context(contextlib.chdir("/"))
            import matplotlib  # noqa: F401


def clean_axes(*panels: "Axes", **grid: Any) -> None:
    """Draws a light grid below the curves and removes the top and right spines. `grid`: options of `Axes.grid`."""
    for axes in panels:
        axes.grid(**{"color": "0.9"} | grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def style(i: int, *, dash: int | None = None, **more: Any) -> dict[str, Any]:
    """Returns colour and line style of curve i. `dash`: index of the line style if not i."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[(i if dash is None else dash) % len(DASHES)]} | more


_LABELS = {  # metrics and keys whose names do not explain themselves
    "val_error": "validation error",
    "optimizer.lr": "learning rate",
    "optimizer.weight_decay": "weight decay",
    "init.std": "standard deviation of the initial weights",
    "model.dropout": "dropout probability",
    "model.degree": "degree of the polynomial",
    "model.widths": "hidden units",
    "data.subset": "training samples",
}


def metric_label(metric: str) -> str:
    """Returns the axis label of a metric: val_accuracy -> validation accuracy."""
    return _LABELS.get(metric) or axis_label(metric)


def literal(text: str) -> str:
    """Escapes a text for matplotlib: no mathtext, and not hidden from legends."""
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")


def label(name: str) -> str:
    """Returns the label of a metric or a config key: optimizer.lr -> learning rate, data.batch_size -> batch size."""
    if name in _LABELS or "." not in name:
        return metric_label(name)
    group, _, key = name.rpartition(".")
    is_clear = group in ("data", "optimizer", "model", "schedule")
    return (key if is_clear else f"{group} {key}").replace("_", " ")


def shades(*colours: str) -> "Colormap":
    """Returns a colour map between these colours."""
    from matplotlib.colors import LinearSegmentedColormap

    # A list: matplotlib 3.8 takes a tuple of two as a colour and its opacity.
    return LinearSegmentedColormap.from_list("", list(colours))


def title_with_subtitle(title: str, subtitle: str, width: int = 90) -> str:
    """Appends a subtitle, wrapped at `width` characters."""
    return "\n".join([title, *textwrap.wrap(subtitle, width)])


def legend_below(made: "Figure", axes: "Axes", columns: int, **options: Any) -> None:
    """Puts the legend of one panel below all panels, with handles long enough to show dashes."""
    options = {"frameon": False, "handlelength": 3.5, "ncols": columns} | options
    handles, labels = axes.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", **options)


def integer_ticks(*panels: "Axes") -> None:
    """Restricts the ticks of the x-axis to integers."""
    for axes in panels:
        axes.locator_params("x", integer=True, min_n_ticks=1)


def logarithmic(*panels: "Axes", axis: Literal["x", "y"] = "y") -> None:
    """Makes an axis logarithmic with plain tick labels: 0.6 and 1e-05, not 6 x 10^-1; masks values <= 0.

    Call it after plotting: a panel without positive values stays linear, because matplotlib refuses to draw it. Plain
    text also renders much faster than mathtext.
    """
    from matplotlib.ticker import LogFormatter

    class PlainFormatter(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    for axes in panels:
        is_x = axis == "x"
        if math.isfinite(axes.dataLim.minposx if is_x else axes.dataLim.minposy):
            (axes.set_xscale if is_x else axes.set_yscale)("log", nonpositive="mask")
            ticks = axes.xaxis if is_x else axes.yaxis
            ticks.set_major_formatter(PlainFormatter())
            ticks.set_minor_formatter(PlainFormatter(labelOnlyBase=False))


def spans_decades(losses: Sequence[float]) -> bool:
    """Returns whether positive losses span more than a factor of 100, which needs a logarithmic axis."""
    return bool(losses) and min(losses) > 0 and max(losses) > 100 * min(losses)


def powers_of_two(axes: "Axes", ticks: "list[int]", **options: Any) -> None:
    """Makes the x-axis logarithmic with exactly these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], **options)
    axes.minorticks_off()


def encoded(figure: "Figure", form: str, *, dpi: int = 150) -> bytes:
    """Returns the content of a file: png, pdf or svg."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(FILE_STYLE):
        figure.savefig(file, format=form, dpi=dpi, metadata=METADATA.get(form))
    return file.getvalue()


def fix_layout(figure: "Figure") -> None:
    """Computes the layout, which takes as long as drawing, once for several files."""
    import matplotlib

    figure.draw_without_rendering()
    with matplotlib.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)  # not "none", with which matplotlib draws twice for each file


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes `name`.png and `name`.svg into the folder."""
    fix_layout(figure)
    paths = [folder / f"{name}.{form}" for form in ("png", "svg")]
    for path in paths:
        write_atomically(path, encoded(figure, path.suffix[1:]))
    return paths
