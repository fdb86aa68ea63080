"""The results that come with dlopt, made by `dlopt benchmark ... full=true`; reference/TIER.json."""

from pathlib import Path

from dlopt.analysis.benchmark.results import Results, read

FOLDER = Path(__file__).with_name("reference")


def load_reference(tier: str) -> Results | None:
    """Returns the shipped results of a tier; None if there are none. Raises `UserError` for a damaged file."""
    path = FOLDER / f"{tier}.json"
    return read(path) if path.is_file() else None
