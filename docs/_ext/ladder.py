"""Generates the results of the ladder of model sizes from docs/ladder/NAME/results.json."""

from pathlib import Path

from markup import code, table, text

from dlopt.files import read_json
from dlopt.lab.ladder.findings import findings
from dlopt.lab.ladder.ladder import RESULTS, LadderRequest, read_ladder
from dlopt.lab.ladder.results import collect
from dlopt.lab.ladder.table import tables


def results(docs: Path, name: str) -> str:
    """The tables of a ladder, what it shows, and how it was made."""
    folder = docs / "ladder" / name
    ladder = read_ladder(folder)
    if ladder is None:
        return ""
    found = collect(LadderRequest(folder, ladder))
    facts = (read_json(folder / RESULTS) or {})["facts"]  # of the machine that trained
    made = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    shown = []
    for each in tables(found):
        cells = [[code(first), *map(text, rest)] for first, *rest in each.rows]
        shown += [f"{text(each.title)}:", "", table(each.heads, cells)]
    return "\n".join([
        *shown,
        *(f"- {text(each.text)}" for each in findings(found)),
        "",
        f"Made by {code(facts['command'])}, with {text(made)}.",
    ])  # fmt: skip
