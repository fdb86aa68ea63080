"""Leaves the files of plots nearly empty: drawing takes most of the time of a test of something else.

Tests marked `drawn` look at pictures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

_save, _lay_out = Figure.savefig, Figure.draw_without_rendering
_draws = True


@contextmanager
def drawing(draws: bool) -> Iterator[None]:
    """Draws what is saved within, or not."""
    global _draws
    before, _draws = _draws, draws
    yield
    _draws = before


def _savefig(figure: Figure, file: Any, **keys: Any) -> None:
    if _draws:
        _save(figure, file, **keys)
    elif not isinstance(file, PdfPages):  # a page less
        file.write(b"not drawn")


def _draw_without_rendering(figure: Figure) -> None:
    if _draws:
        _lay_out(figure)


def install() -> None:
    Figure.savefig = _savefig  # type: ignore[assignment,method-assign]
    Figure.draw_without_rendering = _draw_without_rendering  # type: ignore[method-assign]
