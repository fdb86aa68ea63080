"""Generates the results of the optimizer benchmark from the file that comes with dlopt."""

from markup import block, code, text

from dlopt.lab.benchmark.results import load_reference
from dlopt.lab.benchmark.table import lines


def results() -> str:
    """The table that `dlopt benchmark` prints, and how its results were made."""
    found = load_reference("small")
    if found is None:
        return ""
    facts = found.facts
    commands = [each for each in str(facts["command"]).split("; ") if each]
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if key != "command")
    trials = sum(len(cell.records) for cell in found.cells.values())
    return "\n".join([
        block("text", lines(found)),
        f"{trials:,} trials, made by {' and '.join(map(code, commands))}, with {text(made)}.",
        "",
    ])  # fmt: skip
