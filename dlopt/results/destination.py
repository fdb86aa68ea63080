"""Where `dlopt report` writes: the files of a folder, or a single one, and their formats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlopt.basics.errors import UserError
from dlopt.basics.folders import inside, refuse_url
from dlopt.basics.names import Names

Format = Literal["html", "csv", "latex", "markdown", "pdf", "png", "svg"]
SUFFIXES: Mapping[str, Format] = {
    ".html": "html", ".csv": "csv", ".tex": "latex", ".md": "markdown", ".pdf": "pdf", ".png": "png", ".svg": "svg",
}  # fmt: skip
_DEFAULT: Sequence[Format] = ("html", "csv", "png")
PICTURES: Sequence[Format] = ("pdf", "png", "svg")


@dataclass(frozen=True)
class Destination:
    """Files to write: a folder with several of them, or a single one."""

    path: Path
    formats: Sequence[Format]
    is_file: bool
    plot: str | None

    @property
    def page(self) -> Path | None:
        """The folder of the HTML page that can be served."""
        return None if self.is_file or "html" not in self.formats else self.path


def destination(
    folder: Path, output: str | None, formats: Format | Sequence[Format] | None, plot: str | None
) -> Destination:
    """Returns where the report is written, by default `folder`/report. Raises `UserError`.

    `output`: a file if its suffix is one of `SUFFIXES`, a folder if it exists as one, has no suffix or ends in a slash.
    """
    if plot is not None:
        from dlopt.results.plots import PLOTS  # with NumPy, which the help of the report does not need

        Names("plot", PLOTS, prefix="plot=").check(plot)
    chosen: Sequence[Format] | None = (formats,) if isinstance(formats, str) else formats
    if chosen is not None and not chosen:
        raise UserError("format=[]: needs at least one format")
    path = inside(folder, "report", str(folder)) if output is None else Path(output)
    if output is not None:
        refuse_url(output, "output")
    is_file = output is not None and not output.endswith("/") and path.suffix != "" and not path.is_dir()
    if is_file:
        found = SUFFIXES.get(path.suffix.lower())
        if found is None:
            allowed = ", ".join(SUFFIXES)
            raise UserError(f"output={output}: unknown format; allowed: {allowed}, or a folder: output={output}/")
        if chosen is not None and tuple(chosen) != (found,):
            raise UserError(f"output={output}: a {path.suffix} file, but format={','.join(chosen)}; leave out format")
        chosen = (found,)
    chosen = _DEFAULT if chosen is None else tuple(dict.fromkeys(chosen))
    if plot is not None and not set(chosen) & set(PICTURES):
        raise UserError(f"plot={plot}: needs a format of plots, such as format=pdf or output=FILE.pdf")
    return Destination(path, chosen, is_file, plot)
