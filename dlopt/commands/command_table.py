"""The table of commands: names only, imported when they are used. Whoever adds a command adds a line here.

`dlopt --help`, `dlopt COMMAND --help` and completion read the module that the line names. Other packages, the
laboratory among them, add theirs with the entry point `dlopt.commands`.
"""

from dlopt.config.packages import entries

COMMANDS = {  # name -> function(arguments) -> exit code
    "train": "dlopt.commands.train:train",
    "sweep": "dlopt.commands.sweep:sweep",
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
}


def of_packages() -> dict[str, str]:
    """Maps the commands of other packages to their functions; they replace none of dlopt's."""
    return {name: path for name, path in entries("dlopt.commands").items() if name not in COMMANDS}


def every_command() -> dict[str, str]:
    return {**COMMANDS, **of_packages()}
