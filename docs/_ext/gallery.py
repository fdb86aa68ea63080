"""Generates the gallery, and the table of claims, from the lecture recipes and their results in docs/gallery."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from markup import block, code, table, text
from reference import CATALOGUE

from dlopt.config.choices import Choice
from dlopt.config.parameters import show
from dlopt.lab.comparison.frozen import CHANGED, is_changed
from dlopt.lab.comparison.labels import axis_label, scale

FOLDER = "lecture/"


def lectures(docs: Path) -> str:
    """A section per lecture recipe: the picture, the command, what to see, what varies, what to change."""
    found = [choice for choice in CATALOGUE.choices("experiment") if choice.name.startswith(FOLDER)]
    return "\n".join(_section(choice, docs) for choice in found)


def _section(choice: Choice, docs: Path) -> str:
    recipe: dict[str, Any] = yaml.safe_load(choice.path.read_text(encoding="utf-8"))
    comparison = recipe.get("comparison") or {}
    name = choice.name.removeprefix(FOLDER)
    lines = [f"## {text(choice.description)}", ""]
    if (docs / "gallery" / f"{name}.png").exists():
        lines += [f"![{text(comparison.get('title', name))}](gallery/{name}.png)", ""]
        if (docs / "gallery" / f"{name}.svg").exists():
            lines += [f"[As SVG](gallery/{name}.svg)", ""]
    elif comparison:
        lines += ["Run the command to draw the picture.", ""]
    else:
        lines += ["Run the command, then `dlopt report` on its folder, to draw the curves.", ""]
    command = command_of(choice)
    lines += [block("bash", [command])]
    if "see" in comparison:
        lines += [f"**What to see:** {text(' '.join(comparison['see'].split()))}", ""]
    for claim in results(docs, name):
        said = f"{text(claim['claim'])}. {text(claim['outcome'])}{_limits(claim)}"
        lines += [f"- **{claim['verdict'].capitalize()}{changed(claim)}:** {said}"]
    lines += ["", *_published(docs, name)]
    notes = [line for line in choice.header[1:] if line.strip() != command]
    lines += [_notes(notes), "", *_varied(recipe, comparison), ""]
    lines += [f"**What to change:** {', '.join(code(each) for each in _own(recipe))}", ""]
    lines += [f"Recipe: [{code(f'conf/experiment/{choice.name}.yaml')}](../conf/experiment/{choice.name}.yaml)", ""]
    return "\n".join(lines)


def _published(docs: Path, name: str) -> list[str]:
    """Formats a table of the published values beside the results of a recipe, with the rank correlation."""
    path = docs / "gallery" / f"{name}.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not (published := saved.get("published")):
        return []
    metric = next(key for key in saved["rows"][0] if key not in ("variant", "at"))
    factor, rows = scale(metric), []
    for row, (point, value) in zip(saved["rows"], published["values"].items(), strict=True):
        values = row[metric]
        numbers = fmean(values), min(values), max(values)
        mean, low, high = (f"{factor * each:.{2 if factor > 1 else 4}f}" for each in numbers)
        rows.append((text(point), f"{factor * value:.4g}", f"{mean} ({low} to {high})"))
    [axis] = saved["rows"][0]["at"]
    here = f"here: {axis_label(metric)}, {saved['rows'][0]['variant']}, mean and range over {len(saved['seeds'])} seeds"
    correlation = f"Rank correlation of both columns (Spearman): {published['rank_correlation']:.2f}."
    columns = (text(axis), text(", ".join(published["label"].splitlines())), text(here))
    return [table(columns, rows), "", correlation, ""]


def claims(docs: Path) -> str:
    """Formats a table of all claims and their verdicts below the numbers of verdicts; the gallery has the outcomes."""
    rows, missing = [], []
    verdicts: Counter[str] = Counter()
    sets: dict[str, list[tuple[str, str]]] = {}  # first seed -> verdicts in the gallery and with fresh seeds
    for choice in CATALOGUE.choices("experiment"):
        if not choice.name.startswith(FOLDER):
            continue
        name = choice.name.removeprefix(FOLDER)
        found = results(docs, name)
        recipe = yaml.safe_load(choice.path.read_text(encoding="utf-8"))
        link = f"[{name}](gallery.md#{anchor(choice.description)})"
        if recipe["comparison"].get("claims") and not found:
            missing.append(link)
        fresh = fresh_verdicts(docs, name)
        for claim in found:
            again = {first: new[claim["claim"]] for first, new in fresh.items() if claim["claim"] in new}
            for first, verdict in again.items():
                sets.setdefault(first, []).append((claim["verdict"], verdict))
            verdicts[claim["verdict"]] += 1
            verdict = f"**{claim['verdict']}**{changed(claim)}"
            rows.append((text(claim["claim"]), verdict, _agreement(claim["verdict"], again), link))
    counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    columns = ("Claim", "Verdict", "Same with new seeds", "Recipe and outcome")
    lines = [f"{len(rows)} claims: {counted}.", "", *_sets(sets), table(columns, rows), ""]
    if missing:
        lines.append(f"Not recorded here, because they take long or need other machines: {', '.join(missing)}.")
    return "\n".join(lines)


def fresh_verdicts(docs: Path, name: str) -> dict[str, dict[str, str]]:
    """Returns first seed -> claim -> verdict for each set of fresh seeds with the claims of the results."""
    path, found = docs / "gallery" / f"{name}.json", {}
    hash_ = json.loads(path.read_text(encoding="utf-8"))["claims_hash"] if path.exists() else None
    for each in (docs / "gallery" / "fresh").glob("*.json"):
        recipe = json.loads(each.read_text(encoding="utf-8")).get(name)
        if recipe and recipe["claims_hash"] == hash_:
            found[each.stem] = recipe["verdicts"]
    return found


def _agreement(verdict: str, again: dict[str, str]) -> str:
    """Formats in how many sets of fresh seeds the verdict is the same, and the other verdicts."""
    others = [f"{again[first]} with seeds from {first}" for first in sorted(again, key=int) if again[first] != verdict]
    return "; ".join([f"{len(again) - len(others)} of {len(again)}", *others]) if again else ""


def _sets(sets: dict[str, list[tuple[str, str]]]) -> Iterable[str]:
    """Yields a line per set of fresh seeds, and one for all: how many verdicts are the same, and how many reversed."""
    named = {f"Seeds from {first} on": found for first, found in sorted(sets.items(), key=lambda item: int(item[0]))}
    if len(sets) > 1:
        named["Together"] = [pair for found in sets.values() for pair in found]
    for name, found in named.items():
        same = sum(old == new for old, new in found)
        turned = sum({old, new} == {"supported", "contradicted"} for old, new in found)
        share = f"{same} of {len(found)} verdicts are the same ({100 * same / len(found):.1f} %)"
        yield f"- {name}: {share}; reversed (supported to contradicted, or back): {turned}."
    if named:
        yield ""


def results(docs: Path, name: str) -> list[dict[str, Any]]:
    """Returns the claims in the results of a recipe, with verdicts; none if the gallery has no results of it.

    `changed`: whether the recipe's claims are no longer those of the results.
    """
    path = docs / "gallery" / f"{name}.json"
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    return [{**claim, "changed": is_changed(saved)} for claim in saved["claims"]]


def changed(claim: dict[str, Any]) -> str:
    return f" ({CHANGED})" if claim["changed"] else ""


def anchor(heading: str) -> str:
    """Returns the anchor of a heading, as Sphinx and the usual hosts of repositories name it."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def _limits(claim: dict[str, Any]) -> str:
    return f" Not for: {text(claim['when_not'])}." if claim["when_not"] else ""


def command_of(choice: Choice) -> str:
    """The command in the header of the file, which names required keys too."""
    commands = [line.strip() for line in choice.header if line.strip().startswith("dlopt train ")]
    return commands[0] if commands else f"dlopt train experiment={choice.name}"


def _notes(lines: list[str]) -> str:
    """Prose as a paragraph; aligned columns, lists and further commands as they are in the file."""
    if any(re.search(r"\S {2,}\S|^\s*- |^ {2,}", line) for line in lines):
        return block("text", lines)
    return text(" ".join(line.strip() for line in lines).replace("Its picture says what to see.", "").strip())


def _varied(recipe: dict[str, Any], comparison: dict[str, Any]) -> Iterable[str]:
    """The axes of the comparison or sweep."""
    variants = [(text(str(name)), " ".join(map(code, lines))) for name, lines in comparison.get("variants", {}).items()]
    yield table(("Variant", "Overrides"), variants)
    swept = comparison.get("along") or recipe.get("hydra", {}).get("sweeper", {}).get("params", {})
    yield table(("Swept", "Values"), [(code(key), _values(values)) for key, values in swept.items()])


def _values(values: Any) -> str:
    if isinstance(values, dict):  # labelled points, of several keys each
        return "; ".join(f"{text(str(name))}: {' '.join(map(code, lines))}" for name, lines in values.items())
    return code(", ".join(map(str, values)) if isinstance(values, list) else str(values))


def _own(recipe: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """The keys that the recipe itself sets, as they are typed."""
    for key, value in recipe.items():
        if prefix or key not in ("defaults", "comparison", "hydra", "name"):
            if isinstance(value, dict):
                yield from _own(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={show(value)}".replace(", ", ",")
