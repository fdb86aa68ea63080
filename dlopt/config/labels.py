"""Tags and note of a run: they describe the run for its readers, and change nothing that it computes."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dlopt.config.overrides import is_typed
from dlopt.errors import UserError
from dlopt.folders import RunFolder

LABELS = ("tags", "note")
"""The keys."""

_TAG = re.compile(r"\w[\w.+-]*")


def check_tags(tags: Iterable[str]) -> None:
    """Raises `UserError` for a tag that a condition of `dlopt runs` could not name."""
    for tag in tags:
        if not _TAG.fullmatch(tag):
            raise UserError(f"tags=[{tag}]: not a tag; allowed: letters, digits, and after the first also _ . + -")


def kept(folder: RunFolder, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the labels that a run has and keeps when it is resumed with `overrides`: those not typed again.

    `dlopt runs tag` may have changed them since the run started.
    """
    saved, before = folder.config() or {}, folder.history()
    new = [line for line in overrides if line not in before]
    return {key: saved[key] for key in LABELS if key in saved and not is_typed(key, new)}
