"""Generates the gallery, and the list of claims, from the lecture recipes and their results in docs/gallery."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from markup import block, code, table, text
from reference import CATALOGUE

from dlopt.config.choices import Choice
from dlopt.lab.comparison.frozen import CHANGED, is_changed
from dlopt.lab.comparison.intervals import average
from dlopt.lab.comparison.labels import axis_label, scale

FOLDER = "lecture/"
Topic = Mapping[str, Any]


def plan(docs: Path) -> dict[str, list[Topic]]:
    """Reads docs/lectures/lectures.yaml: lecture -> topics, in order."""
    found: dict[str, list[Topic]] = yaml.safe_load((docs / "lectures/lectures.yaml").read_text(encoding="utf-8"))
    return found


def title(docs: Path, lecture: str) -> str:
    """Returns the heading of the page of a lecture."""
    return (docs / "lectures" / f"{lecture}.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def recipes(docs: Path, lecture: str) -> dict[str, Topic]:
    """Returns recipe -> topic of the topics of a lecture that have a recipe."""
    return {topic["recipe"]: topic for topic in plan(docs)[lecture] if "recipe" in topic}


def choice_of(recipe: str) -> Choice:
    return next(choice for choice in CATALOGUE.choices("experiment") if choice.name == f"{FOLDER}{recipe}")


def lectures(docs: Path) -> str:
    """A section per lecture recipe: the picture, what the lecture says, the command, where the rest is."""
    topics = {name: (lecture, topic) for lecture in plan(docs) for name, topic in recipes(docs, lecture).items()}
    return "\n".join(_section(docs, name, *topics[name]) for name in sorted(topics))


def _section(docs: Path, name: str, lecture: str, topic: Topic) -> str:
    choice = choice_of(name)
    comparison = yaml.safe_load(choice.path.read_text(encoding="utf-8"))["comparison"]
    lines = [f"## {text(choice.description)}", ""]
    links = [f"[What to see]({_place(lecture, topic)})", f"[recipe](../conf/experiment/{choice.name}.yaml)"]
    if results(docs, name):
        links.insert(1, f"[results](claims.md#{name})")
    if (docs / "gallery" / f"{name}.png").exists():
        lines += [f"![{text(comparison.get('title', name))}](gallery/{name}.png)", ""]
        links.append(f"[SVG](gallery/{name}.svg)")
    else:
        lines += ["Run the command to draw the picture.", ""]
    lines += [text(topic["sentence"]), "", block("bash", [command_of(choice)]), ", ".join(links), ""]
    return "\n".join(lines)


def _place(lecture: str, topic: Topic) -> str:
    return f"lectures/{lecture}.md#{anchor(topic['name'])}"


def _published(docs: Path, name: str) -> list[str]:
    """Formats a table of the published values beside the results of a recipe, with the rank correlation."""
    path = docs / "gallery" / f"{name}.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not (published := saved.get("published")):
        return []
    metric = next(key for key in saved["rows"][0] if key not in ("variant", "at"))
    factor, rows = scale(metric), []
    for row, (point, value) in zip(saved["rows"], published["values"].items(), strict=True):
        found = average(row[metric], is_ratio=True)  # as in the picture: the claims have factors
        numbers = found.middle, found.low, found.high
        middle, low, high = (f"{factor * each:.{2 if factor > 1 else 4}f}" for each in numbers)
        rows.append((text(point), f"{factor * value:.4g}", f"{middle} ({low} to {high})"))
    [axis] = saved["rows"][0]["at"]
    here = f"here: {axis_label(metric)}, {saved['rows'][0]['variant']}, {found.label(len(saved['seeds']))}"
    correlation = f"Rank correlation of both columns (Spearman): {published['rank_correlation']:.2f}."
    columns = (text(axis), text(", ".join(published["label"].splitlines())), text(here))
    return [table(columns, rows), "", correlation, ""]


def claims(docs: Path) -> str:
    """How many claims have which verdict; then, by lecture and recipe, each claim with its verdict and outcome."""
    lines = []
    verdicts: Counter[str] = Counter()
    sets: dict[str, list[tuple[str, str]]] = {}  # first seed -> verdicts in the gallery and with fresh seeds
    for lecture in plan(docs):
        lines += [f"## {title(docs, lecture)}", ""]
        for name, topic in recipes(docs, lecture).items():
            found, fresh = results(docs, name), fresh_verdicts(docs, name)
            if not found:
                continue
            link = f"[{text(topic['name'])}]({_place(lecture, topic)})"
            lines += [f"### {code(name)}", "", f"{link}{_seeds(docs, fresh)}", ""]
            for claim in found:
                again = {first: new[claim["claim"]] for first, new in fresh.items() if claim["claim"] in new}
                for first, verdict in again.items():
                    sets.setdefault(first, []).append((claim["verdict"], verdict))
                verdicts[claim["verdict"]] += 1
                lines.append(_claim(claim, again))
            lines += ["", *_published(docs, name)]
    counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return "\n".join([f"{verdicts.total()} claims: {counted}.", "", *_sets(sets), *lines])


def _seeds(docs: Path, fresh: Mapping[str, Any]) -> str:
    """Names the sets of fresh seeds of a recipe, if it has not been run with all of them."""
    if fresh.keys() == {each.stem for each in (docs / "gallery/fresh").glob("*.json")}:
        return ""
    return f" (new seeds: {', '.join(f'from {first}' for first in sorted(fresh, key=int)) or 'none'})"


def _claim(claim: Mapping[str, Any], again: Mapping[str, str]) -> str:
    """Formats a claim with its verdict and outcome, and the other verdicts with new seeds."""
    limits = f" Not for: {text(claim['when_not'])}." if claim["when_not"] else ""
    others: dict[str, list[str]] = {}  # verdict -> first seeds of the sets that have it
    for first in sorted(again, key=int):
        if again[first] != claim["verdict"]:
            others.setdefault(again[first], []).append(first)
    differing = "".join(f" But {verdict} with seeds from {', '.join(firsts)}." for verdict, firsts in others.items())
    verdict = f"**{claim['verdict'].capitalize()}{changed(claim)}:**"
    return f"- {verdict} {text(claim['claim'])}. {text(claim['outcome'])}{limits}{differing}"


def fresh_verdicts(docs: Path, name: str) -> dict[str, dict[str, str]]:
    """Returns first seed -> claim -> verdict for each set of fresh seeds with the claims of the results."""
    path, found = docs / "gallery" / f"{name}.json", {}
    hash_ = json.loads(path.read_text(encoding="utf-8"))["claims_hash"] if path.exists() else None
    for each in (docs / "gallery" / "fresh").glob("*.json"):
        recipe = json.loads(each.read_text(encoding="utf-8")).get(name)
        if recipe and recipe["claims_hash"] == hash_:
            found[each.stem] = recipe["verdicts"]
    return found


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


def command_of(choice: Choice) -> str:
    """The command in the header of the file, which names required keys too."""
    commands = [line.strip() for line in choice.header if line.strip().startswith("dlopt train ")]
    return commands[0] if commands else f"dlopt train experiment={choice.name}"
