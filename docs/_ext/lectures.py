"""Writes the topics of a lecture: what happens, how long it takes, the command, what to look at, the verdicts."""

from pathlib import Path

import yaml
from gallery import Topic, anchor, changed, choice_of, command_of, plan, results, title
from markup import block, text

from dlopt.config.choices import Choice
from dlopt.lab.comparison.frozen import stated_time

QUICK = "comparison.quick=true"


def topics(docs: Path, lecture: str) -> str:
    return "\n".join(_topic(docs, each) for each in plan(docs)[lecture])


def overview(docs: Path) -> str:
    """A list of the lectures with their topics."""
    lines = []
    for lecture, found in plan(docs).items():
        lines.append(f"1. [{title(docs, lecture)}]({lecture}.md)")
        for topic in found:
            name = topic["name"]
            lines.append(
                f"   - [{text(name)}]({lecture}.md#{anchor(name)}): {text(topic['sentence'].removesuffix('.'))}"
            )
    return "\n".join(lines)


def _topic(docs: Path, topic: Topic) -> str:
    if "recipe" in topic:
        parts = _recipe(docs, topic, choice_of(topic["recipe"]))
    else:
        first = f"{text(topic['sentence'])} About {topic['time']}:"
        parts = [first, "", block("bash", [topic["command"]]), *_picture(docs, topic.get("picture"), topic["title"])]
    more = [text(topic["more"]) if "](" not in topic["more"] else topic["more"], ""] if "more" in topic else []
    return "\n".join([f"## {text(topic['name'])}", "", *parts, *more])


def _recipe(docs: Path, topic: Topic, choice: Choice) -> list[str]:
    """Returns the lines of a recipe: what happens, time, command, picture, what to see, verdicts, links."""
    name, command = topic["recipe"], command_of(choice)
    time = stated_time(choice.header) or "days, on four GPUs"
    if "quick" in topic:
        time += f", or about {topic['quick']} s with `{QUICK}`"
    see = " ".join(yaml.safe_load(choice.path.read_text(encoding="utf-8"))["comparison"]["see"].split())
    found = results(docs, name)
    verdicts = [f"- **{each['verdict'].capitalize()}{changed(each)}:** {text(each['claim'])}." for each in found]
    recipe = f"../../conf/experiment/{choice.name}.yaml"
    return [
        f"{text(topic['sentence'])} {time[:1].upper()}{time[1:]}:",
        "",
        block("bash", [command, *([f"{command} {QUICK}"] if "quick" in topic else [])]),
        *_picture(docs, name, choice.description),
        f"**What to see:** {text(see)}",
        "",
        *(["Not recorded here.", ""] if not verdicts else [*verdicts, ""]),
        f"[Results](../claims.md#{name}), [recipe]({recipe})" if verdicts else f"[Recipe]({recipe})",
        "",
    ]


def _picture(docs: Path, name: str | None, description: str) -> list[str]:
    if name is None or not (docs / "gallery" / f"{name}.png").exists():
        return []
    return [f"![{text(description)}](../gallery/{name}.png)", ""]
