"""What the reports of the benchmark and of the ladder share: sentences from templates, tables, pictures and files."""

import base64
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.console import Console

from dlopt.basics.folders import inside
from dlopt.extend import Table, write_atomically
from dlopt.results import drawing
from dlopt.results.page import read_text, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 100  # characters; more is hard to read
_WARNING = "warning: "


@dataclass(frozen=True)
class Observation:
    """A sentence; `is_warning`: something to mend or to keep in mind, instead of a result."""

    text: str
    is_warning: bool = False


def sentences(template: Path, **values: Any) -> list[str]:
    """Renders a template of text; returns its printable lines. An indented line continues the line before."""
    text = re.sub(r"\n+ +", " ", render(template.name, template.parent, **values))
    return [" ".join(each.split()) for each in text.splitlines() if each.strip()]


def observations(template: Path, **values: Any) -> list[Observation]:
    """Renders a template of findings; lines that begin with "warning: " are warnings."""
    texts = sentences(template, **values)
    return [Observation(each.removeprefix(_WARNING), each.startswith(_WARNING)) for each in texts]


def wrapped(texts: Sequence[str | Observation], width: int) -> list[str]:
    """Returns the lines of sentences or findings on a terminal of this width."""
    lines = []
    for each in texts:
        text = each if isinstance(each, str) else _WARNING * each.is_warning + each.text
        lines += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def rendered(table: Table, width: int) -> list[str]:
    """Returns the lines of a table on a terminal of this width."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, highlight=False, markup=False, color_system=None, force_jupyter=False
    )  # a notebook would show what is printed to a file
    console.print(table.grid())
    return file.getvalue().rstrip("\n").split("\n")


def style() -> Markup:
    """Returns the style of pages with figures."""
    return Markup(read_text("page.css") + Path(__file__).with_name("page.css").read_text(encoding="utf-8"))


def picture(figure: "Figure") -> dict[str, Any]:
    """Returns `source` and `width` of a figure on the page, as SVG."""
    drawing.fix_layout(figure)
    patches = figure.patch, *(axes.patch for axes in figure.axes)
    white = [patch for patch in patches if tuple(patch.get_facecolor()[:3]) == (1.0, 1.0, 1.0)]
    for patch in white:  # transparent on dark pages
        patch.set_alpha(0)
    svg = drawing.encoded(figure, "svg")
    for patch in white:
        patch.set_alpha(1)
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return {"source": source, "width": f"{96 * figure.get_figwidth():.0f}"}


def write(
    folder: Path, texts: Mapping[str, str], figures: Mapping[str, "Figure"], formats: Sequence[str]
) -> list[Path]:
    """Writes `texts` by file name, and figures/NAME.FORMAT; returns the paths. Raises OSError and `UserError`."""
    inside(folder, "figures", str(folder)).mkdir(parents=True, exist_ok=True)
    written: dict[Path, bytes | str] = {folder / name: text for name, text in texts.items()}
    for name, figure in figures.items():
        written |= {folder / "figures" / f"{name}.{form}": drawing.encoded(figure, form) for form in formats}
    for path, content in written.items():
        write_atomically(path, content)
    return [*written]
