"""What all pictures share: colours and dashes that can be told apart, and how they are written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart by colour-blind readers; without their yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MOST = len(COLOURS) * len(DASHES)
"""Curves that can be told apart."""


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes `name`.png and `name`.svg into the folder."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
