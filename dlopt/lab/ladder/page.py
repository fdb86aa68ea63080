"""Writes the results of a ladder: results.json, a self-contained HTML page, and its figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt._version import __version__
from dlopt.lab import report
from dlopt.lab.ladder.analysis import FEWEST, RESAMPLES
from dlopt.lab.ladder.arms import RUNGS as DECAY_RUNGS
from dlopt.lab.ladder.figures import draw
from dlopt.lab.ladder.findings import findings
from dlopt.lab.ladder.ladder import RESULTS
from dlopt.lab.ladder.rates import FITTED, GRID, LIMIT, SPACING
from dlopt.lab.ladder.results import Results, to_json
from dlopt.lab.ladder.table import tables
from dlopt.results.page import render

_DESCRIPTIONS = {
    "loss": "Loss at the end of training against compute, with the fitted laws",
    "speed_up": "Speed-up over the baseline against the number of parameters",
    "rates": "Best learning rates of the searched rungs, and their fits",
}


def write(results: Results, folder: Path) -> list[Path]:
    """Writes results.json, index.html and figures/NAME.png, .pdf and .svg; returns their paths. Raises OSError."""
    figures = draw(results)
    pictures = {name: report.picture(figure) for name, figure in figures.items()}
    texts = {RESULTS: to_json(results), "index.html": page(results, pictures)}
    return report.write(folder, texts, figures, ("png", "pdf", "svg"))


def page(results: Results, pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders the page; `pictures`: `source` and `width` by the figure's name."""
    facts = {key: value for key, value in results.facts.items() if key != "command"}
    return render(
        "page.html", Path(__file__).parent,
        title=f"Optimizers on a ladder of sizes: {results.ladder.family}", version=__version__, style=report.style(),
        script=None, results=results, facts=facts, rules=vars(results.ladder.rules), tables=tables(results),
        findings=findings(results), pictures=pictures, descriptions=_DESCRIPTIONS, resamples=RESAMPLES, fewest=FEWEST,
        grid=len(GRID), fitted=FITTED, spacing=f"{SPACING:.2f}", limit=f"{SPACING ** (LIMIT / 2):.0f}",
        decay_rungs=DECAY_RUNGS,
    )  # fmt: skip
