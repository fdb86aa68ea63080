"""Reads claims with their verdicts, and detects claims that were changed after their results.

A comparison writes claims.json before its first run: the recipe, and a hash of its claims. comparison.json has
the same entries. If the hash of the recipe now differs, the verdicts belong to other claims, margins or grids.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlopt.basics.plain_values import load_yaml
from dlopt.config.choices import config_folder
from dlopt.extend import Record, Section, Table, read_json, short_path

RESULTS = "comparison.json"
_MAX_BYTES = 1 << 26  # of that file: 50 runs have 0.03 MB
FROZEN = "claims.json"
_TIME = re.compile(r"\d+ runs, ([^:]*? (?:s|minutes?)\b(?: on \w+ cores?)?)")
CHANGED = "changed after results"
_HASHED: Mapping[str, Any] = {"before": {}, "variants": {}, "along": {}, "choose": None, "claims": []}  # with defaults


@dataclass(frozen=True)
class ClaimResult:
    """A claim of a comparison in `folder` with its verdict; `changed`: after the results."""

    folder: Path
    claim: str
    verdict: str
    outcome: str
    changed: bool

    @property
    def mark(self) -> str:
        """The verdict, and whether the claim was changed."""
        return f"{self.verdict}, {CHANGED}" if self.changed else self.verdict


def claims_hash(comparison: Mapping[str, Any]) -> str:
    """Returns the hash of a comparison's claims, margins, variants and grid, without comments, order and presentation.

    Seeds do not count: the same claims may be tested with other seeds.
    """
    content = {key: _normal(comparison.get(key, default)) for key, default in _HASHED.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _normal(value: Any) -> Any:
    """Returns the form that equal settings share: 1.0 for 1, one space for any white space, no key without a value."""
    if isinstance(value, Mapping):
        return {str(key): _normal(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_normal(each) for each in value]
    if isinstance(value, str):
        return " ".join(value.split())
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def recipe_path(experiment: str, config_dir: str | None) -> Path:
    """Returns the file of an experiment: in the folder given by --config-dir if it has one, or in dlopt's."""
    folders = [*([] if config_dir is None else [Path(config_dir)]), config_folder()]
    paths = [folder / "experiment" / f"{experiment}.yaml" for folder in folders]
    return next((path for path in paths if path.is_file()), paths[-1])


def stated_time(header: Sequence[str]) -> str:
    """Returns the time that the header of a recipe states: "about 80 s on one core" of "150 runs, about ..."; or ""."""
    found = _TIME.search(" ".join(header))
    return found[1] if found else ""


def recipe_hash(experiment: str, config_dir: str | None) -> str | None:
    """Returns the hash of the claims in an experiment's file as it is now; None if there is none to read."""
    try:
        content = load_yaml(recipe_path(experiment, config_dir))
    except (OSError, ValueError):
        return None
    comparison = content.get("comparison") if isinstance(content, dict) else None
    return claims_hash(comparison) if isinstance(comparison, dict) else None


def is_changed(results: Mapping[str, Any]) -> bool:
    """Returns whether the claims in the contents of comparison.json were changed after its runs.

    False if a recipe is missing here.
    """
    if results.get("changed_after_results") is True:
        return True
    recipe, folder, saved = (results.get(key) for key in ("recipe", "config_dir", "recipe_hash"))
    if not isinstance(recipe, str) or not isinstance(saved, str):
        return False
    now = recipe_hash(recipe, folder if isinstance(folder, str) else None)
    return now is not None and now != saved


def read_claims(folder: Path) -> list[ClaimResult]:
    """Reads the claims of the comparison in `folder`; none if it has no results.

    Run folders are untrusted: entries of other types are left out.
    """
    results = read_json(folder / RESULTS, _MAX_BYTES) or {}
    entries = results.get("claims")
    changed, found = is_changed(results), []
    for each in entries if isinstance(entries, list) else []:
        texts = [each.get(key) for key in ("claim", "verdict", "outcome")] if isinstance(each, dict) else []
        if len(texts) == 3 and all(isinstance(text, str) for text in texts):
            claim, verdict, outcome = map(str, texts)
            found.append(ClaimResult(folder, claim, verdict, outcome, changed))
    return found


def section(records: Iterable[Record]) -> Section | None:
    """Returns what `dlopt report` shows of the comparisons to which runs belong; None if they have no claims."""
    folders = dict.fromkeys(record.path.parent for record in records)
    claims = [claim for folder in folders for claim in read_claims(folder)]
    rows = [[each.claim, each.mark, each.outcome, short_path(each.folder)] for each in claims]
    table = Table(["claim", "verdict", "outcome", "folder"], rows, texts=4)
    return Section("Claims", table, claims_lines(claims)) if claims else None


def claims_lines(claims: Sequence[ClaimResult]) -> list[str]:
    """Returns a line per claim for the terminal, and what to do about changed ones."""
    lines = [f"{each.mark}: {each.claim}" for each in claims]
    changed = dict.fromkeys(short_path(each.folder) for each in claims if each.changed)
    return [*lines, *(f"{folder}: {rerun_hint()}" for folder in changed)]


def rerun_hint() -> str:
    return f"claims, margins or grid {CHANGED}; run the comparison again, in a new folder"
