"""Writes the topics of a lecture: what happens, how long it takes, the command, what to look at, the verdicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from gallery import FOLDER, anchor, changed, command_of, results
from markup import block, text
from reference import CATALOGUE

from dlopt.config.choices import Choice
from dlopt.lab.comparison.frozen import stated_time

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
        for topic in found:
            name = topic["name"]
            lines.append(
                f"   - [{text(name)}]({lecture}.md#{anchor(name)}): {text(topic['sentence'].removesuffix('.'))}"
            )
    return "\n".join(lines)


def _choice(topic: Topic) -> Choice:
    name = f"{FOLDER}{topic['recipe']}"
    return next(choice for choice in CATALOGUE.choices("experiment") if choice.name == name)


def _topic(docs: Path, topic: Topic) -> str:
    if "recipe" in topic:
        parts = _recipe(docs, topic, _choice(topic))
    else:
        first = f"{text(topic['sentence'])} About {topic['time']}:"
        parts = [first, "", block("bash", [topic["command"]]), *_picture(docs, topic.get("picture"), topic["title"])]
    more = [text(topic["more"]) if "](" not in topic["more"] else topic["more"], ""] if "more" in topic else []
    return "\n".join([f"## {text(topic['name'])}", "", *parts, *more])


def _recipe(docs: Path, topic: Topic, choice: Choice) -> list[str]:
    """Returns the lines of a recipe: what happens, time, command, picture, what to see, verdicts, link to numbers."""
    name, command = topic["recipe"], command_of(choice)
    time = stated_time(choice.header) or "days, on four GPUs"
    if "quick" in topic:
        time += f", or about {topic['quick']} s with `{QUICK}`"
    see = " ".join(yaml.safe_load(choice.path.read_text(encoding="utf-8"))["comparison"]["see"].split())
    found = results(docs, name)
    verdicts = [f"- **{each['verdict'].capitalize()}{changed(each)}:** {text(each['claim'])}." for each in found]
    link = f"../gallery.md#{anchor(choice.description)}"
    return [
        f"{text(topic['sentence'])} {time[:1].upper()}{time[1:]}:",
        "",
        block("bash", [command, *([f"{command} {QUICK}"] if "quick" in topic else [])]),
        *_picture(docs, name, choice.description),
        f"**What to see:** {text(see)}",
        "",
        *(["Not recorded here.", ""] if not verdicts else [*verdicts, ""]),
        f"[Numbers and what to change]({link}).",
        "",
    ]


def _picture(docs: Path, name: str | None, description: str) -> list[str]:
    if name is None or not (docs / "gallery" / f"{name}.png").exists():
        return []
    return [f"![{text(description)}](../gallery/{name}.png)", ""]
