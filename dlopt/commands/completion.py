"""Shell completion behind a sub-command: Hydra completes overrides, and knows nothing of `train` before them."""

import os
import sys

from dlopt.cli import commands
from dlopt.commands.hydra_main import nothing, run_hydra


def complete(arguments: list[str]) -> int:
    """Answers `-sc install=bash`, `-sc uninstall=...`, and the shell's `-sc query=bash` (COMP_LINE, COMP_POINT)."""
    line = os.environ.get("COMP_LINE")
    if line is not None:
        words = line.split(" ")
        point = int(os.environ.get("COMP_POINT", len(line)))
        if len(line[:point].split(" ")) <= 2:
            typed = words[1] if len(words) > 1 else ""
            print(" ".join(name for name in commands() if name.startswith(typed)), file=sys.stdout)
            return 0
        cut = len(words[1]) + 1
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
        os.environ["COMP_POINT"] = str(point - cut)
    run_hydra(arguments, nothing)
    return 0
