"""Writes the topics of a lecture: what the lecture says, the command, the picture, the verdicts, the time."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from gallery import FOLDER, anchor, changed, command_of, results
from markup import block, text
from reference import CATALOGUE

from dlopt.config.choices import Choice

Topic = Mapping[str, Any]
QUICK = "comparison.quick=true"


def plan(docs: Path) -> dict[str, list[Topic]]:
    """Reads docs/lectures/lectures.yaml: lecture -> topics, in order."""
    found: dict[str, list[Topic]] = yaml.safe_load((docs / "lectures/lectures.yaml").read_text(encoding="utf-8"))
    return found


def topics(docs: Path, lecture: str) -> str:
    return "\n".join(_topic(docs, each) for each in plan(docs)[lecture])


def overview(docs: Path) -> str:
    """A list of the lectures with their topics."""
    lines = []
    for lecture, found in plan(docs).items():
        heading = (docs / "lectures" / f"{lecture}.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"1. [{heading}]({lecture}.md)")
        lines += [f"   - [{text(each)}]({lecture}.md#{anchor(each)})" for each in map(_heading, found)]
    return "\n".join(lines)


def _heading(topic: Topic) -> str:
    return str(topic["sentence"]).removesuffix(".")


def _choice(topic: Topic) -> Choice:
    name = f"{FOLDER}{topic['recipe']}"
    return next(choice for choice in CATALOGUE.choices("experiment") if choice.name == name)


def _topic(docs: Path, topic: Topic) -> str:
    if "recipe" in topic:
        parts = _recipe(docs, topic, _choice(topic))
    else:
        parts = [block("bash", [topic["command"]]), *_picture(docs, topic.get("picture"), topic["title"])]
    more = [text(topic["more"]) if "](" not in topic["more"] else topic["more"], ""] if "more" in topic else []
    return "\n".join([f"## {text(_heading(topic))}", "", *parts, *more])


def _recipe(docs: Path, topic: Topic, choice: Choice) -> list[str]:
    """Returns the lines of a recipe: command, picture, verdicts, time, link to its numbers."""
    name, command = topic["recipe"], command_of(choice)
    times = [_duration(choice.header) or "days, on four GPUs"]
    if "quick" in topic:
        times.append(f"about {topic['quick']} s with `{QUICK}`")
    found = results(docs, name)
    verdicts = [f"- **{each['verdict'].capitalize()}{changed(each)}:** {text(each['claim'])}." for each in found]
    link = f"../gallery.md#{anchor(choice.description)}"
    return [
        f"{text(choice.description)}:",
        "",
        block("bash", [command, *([f"{command} {QUICK}"] if "quick" in topic else [])]),
        *_picture(docs, name, choice.description),
        *(["Not recorded here.", ""] if not verdicts else [*verdicts, ""]),
        f"Time: {', '.join(times)}. [What to see, numbers, what to change]({link}).",
        "",
    ]


def _picture(docs: Path, name: str | None, description: str) -> list[str]:
    if name is None or not (docs / "gallery" / f"{name}.png").exists():
        return []
    return [f"![{text(description)}](../gallery/{name}.png)", ""]


def _duration(header: Sequence[str]) -> str:
    """Returns the time that the header of a recipe states: "about 30 s on one core"."""
    found = re.search(r"\d+ runs, ([^:.]*? (?:s|minutes?)\b(?: on \w+ cores?)?)", " ".join(header))
    return found[1] if found else ""
