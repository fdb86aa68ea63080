"""Shell completion: sub-commands and checkpoints here, overrides by Hydra, which does not know sub-commands."""

import contextlib
import glob
import importlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dlopt.basics.errors import UserError
from dlopt.config.overrides import key_of, value_of


def complete(arguments: list[str], commands: Mapping[str, str]) -> int:
    """Handles `-sc install=bash`, `-sc uninstall=...`, and the shell's `-sc query=bash` (COMP_LINE, COMP_POINT).

    Raises `UserError` for anything else.
    """
    action = [argument for argument in arguments if argument not in ("-sc", "--shell-completion")]
    if len(action) != 1 or not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", action[0]):
        raise UserError(f"{' '.join(['-sc', *action])}: use -sc install=SHELL (or uninstall); bash, zsh or fish")
    if not action[0].startswith("query="):
        from dlopt.config.flags import hydra_main  # slow to import; other completions do not need Hydra

        hydra_main(arguments)
        return 0
    line = os.environ.get("COMP_LINE")
    if line is None:
        raise UserError(f"-sc {action[0]}: only for shells, which set COMP_LINE")
    line = line[: int(os.environ.get("COMP_POINT", len(line)))]
    program, *words = re.split(r" +", line)
    print(" ".join(_candidates(program, words or [""], arguments, commands)))
    return 0


def _candidates(program: str, words: list[str], arguments: list[str], commands: Mapping[str, str]) -> list[str]:
    """Returns the completions of the last of `words`, the arguments of the program."""
    command, prefix = words[0], words[-1]
    if len(words) == 1:
        candidates = [*commands]
    elif command == "options":
        from dlopt.config.choices import Catalogue

        candidates = list(Catalogue().groups())
    elif command == "template":
        from dlopt.commands.template import TEMPLATES

        candidates = list(TEMPLATES)
    elif "=" in prefix and key_of(prefix) == "checkpoint" and command != "train":
        candidates = _checkpoints(prefix)
    elif command == "train" or command not in commands:
        return _overrides(" ".join([program, *words[1:]]), prefix, arguments)
    else:
        from dlopt.commands.shared.usage import typed_words  # slow to import

        own = [*typed_words(importlib.import_module(commands[command].partition(":")[0]))]
        if command in ("report", "runs"):
            candidates = [*own, *glob.glob(glob.escape(prefix) + "*/")]
        elif "checkpoint=" in own and command not in ("diagnose", "trajectory"):
            candidates = own
        else:
            candidates = [*own, *_overrides(" ".join([program, *words[1:]]), prefix, arguments)]
    return [candidate for candidate in dict.fromkeys(candidates) if candidate.startswith(prefix)]


def _overrides(line: str, prefix: str, arguments: list[str]) -> list[str]:
    """Returns Hydra's completions, without fragments of choices and `_target_`, unless `prefix` has an underscore."""
    from dlopt.config.flags import hydra_main

    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        hydra_main(arguments)
    words = output.getvalue().split()
    return [word for word in words if not re.search(r"[.=/]_[^.=/]*=?$", word) or re.search(r"[.=/]_[^.=/]*$", prefix)]


def _checkpoints(prefix: str) -> list[str]:
    paths = [Path(match) for match in glob.glob(glob.escape(value_of(prefix)) + "*")]
    return [f"checkpoint={p}/" if p.is_dir() else f"checkpoint={p}" for p in paths if p.is_dir() or p.suffix == ".pt"]
