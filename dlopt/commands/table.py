"""The table of commands: names only, imported when they are used. Whoever adds a command adds a line here.

`dlopt --help`, `dlopt COMMAND --help` and completion read the module that the line names.

An installed package adds its own with the entry point `dlopt.commands`: `weights = "mine.commands:weights"`.
"""

import importlib
from collections.abc import Callable
from typing import Any

COMMANDS = {  # name -> function(arguments) -> exit code
    "train": "dlopt.commands.train:train",
    "find-lr": "dlopt.commands.find_lr:find_lr",
    "eval": "dlopt.commands.eval:evaluate",
    "predict": "dlopt.commands.predict:predict",
    "sample": "dlopt.commands.sample:sample",
    "export": "dlopt.commands.export:export",
    "consolidate": "dlopt.commands.consolidate:consolidate",
    "runs": "dlopt.commands.runs:runs",
    "report": "dlopt.commands.report:report",
    "options": "dlopt.commands.options:options",
    "summary": "dlopt.commands.summary:summary",
    "show-batch": "dlopt.commands.show_batch:show_batch",
    "template": "dlopt.commands.template:template",
    "grid": "dlopt.commands.grid:print_job",
    # The laboratory
    "trajectory": "dlopt.lab.trajectory.command:trajectory",
    "diagnose": "dlopt.lab.diagnosis.command:diagnose",
    "bench": "dlopt.lab.bench.command:bench",
    "benchmark": "dlopt.lab.benchmark.command:benchmark",
    "ladder": "dlopt.lab.ladder.command:ladder",
}
SERIES = {  # key of a recipe -> function(composer, flags, config) -> exit code, which `dlopt train` calls for it
    "comparison": "dlopt.lab.comparison.command:compare",
}


def of_other_packages() -> dict[str, str]:
    """Maps the commands of installed packages, by the entry point `dlopt.commands`; they replace none of dlopt's."""
    from importlib.metadata import entry_points  # slow to import

    found = {entry.name: entry.value for entry in entry_points(group="dlopt.commands")}
    return {name: found[name] for name in sorted(found) if name not in COMMANDS}


def function(path: str) -> Callable[..., Any]:
    """Imports what a line of the table names."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
