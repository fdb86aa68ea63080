"""Shell completion after a sub-command: Hydra completes overrides, and does not know the `train` before them."""

import contextlib
import glob
import io
import os
import re
from pathlib import Path

from dlopt.errors import UserError


def complete(arguments: list[str], commands: list[str]) -> int:
    """Answers `-sc install=bash`, `-sc uninstall=...`, and the shell's `-sc query=bash` (COMP_LINE, COMP_POINT).

    Raises `UserError` for anything else.
    """
    action = [each for each in arguments if each not in ("-sc", "--shell-completion")]
    if len(action) != 1 or not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", action[0]):
        shown = " ".join(action) or "nothing"
        raise UserError(f"-sc {shown}: allowed: install=SHELL, uninstall=SHELL; SHELL is bash, zsh or fish")
    if not action[0].startswith("query="):
        _hydra_main(arguments)
        return 0
    line = os.environ.get("COMP_LINE")
    if line is None:
        raise UserError(f"-sc {action[0]}: this is for the shell, which sets COMP_LINE")
    line = line[: int(os.environ.get("COMP_POINT", len(line)))]
    program, *words = re.split(r" +", line)
    print(" ".join(_candidates(program, words or [""], arguments, commands)))
    return 0


def _candidates(program: str, words: list[str], arguments: list[str], commands: list[str]) -> list[str]:
    """What the last of `words`, which stand behind the program's name, can become."""
    command, typed = words[0], words[-1]
    if len(words) == 1:
        found = commands
    elif command == "options":
        from dlopt.config.choices import Catalogue

        found = list(Catalogue().groups())
    elif command in ("report", "runs"):
        found = glob.glob(glob.escape(typed) + "*/")
    elif command in ("eval", "predict", "export", "consolidate"):
        found = _checkpoints(typed) if typed.startswith("checkpoint=") else ["checkpoint="]
    else:
        return _overrides(" ".join([program, *words[1:]]), typed, arguments)
    return [each for each in found if each.startswith(typed)]


def _overrides(line: str, typed: str, arguments: list[str]) -> list[str]:
    """Hydra's proposals, but for fragments of choices and for `_target_`, whose names start with `_`."""
    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        _hydra_main(arguments)
    found = output.getvalue().split()
    return [each for each in found if not re.search(r"[.=/]_[^.=/]*=?$", each) or re.search(r"[.=/]_[^.=/]*$", typed)]


def _hydra_main(arguments: list[str]) -> None:
    from dlopt.config.compose import hydra_main  # other completions need no Hydra

    hydra_main(arguments)


def _checkpoints(typed: str) -> list[str]:
    start = typed.removeprefix("checkpoint=")
    paths = [Path(each) for each in glob.glob(glob.escape(start) + "*")]
    return [f"checkpoint={p}/" if p.is_dir() else f"checkpoint={p}" for p in paths if p.is_dir() or p.suffix == ".pt"]
