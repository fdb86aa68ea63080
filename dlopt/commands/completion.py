"""Shell completion: commands, their own keys and checkpoints here; the keys of `dlopt train` by Hydra.

What a command takes is read from its module: its own keys and flags, and the keys of `dlopt train`, from the tables of
its help (`dlopt.commands.shared.usage`); anything else from its function `complete(words)`, if there is one. `words`
are the arguments up to the cursor; the function returns what may replace the last one.
"""

import contextlib
import glob
import importlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from dlopt.basics.errors import UserError
from dlopt.commands.command_table import COMMANDS, every_command
from dlopt.config.overrides import SWEEP_WORDS, key_of, value_of


def complete(arguments: list[str]) -> int:
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
    _, *words = re.split(r" +", line)
    separator = "\n" if action[0] == "query=fish" else " "
    print(separator.join(_candidates(words or [""])))
    return 0


def _candidates(words: list[str]) -> list[str]:
    """Returns the completions of the last of `words`, the arguments of the program."""
    command, prefix = words[0], words[-1]
    commands = COMMANDS if command in COMMANDS else every_command()
    if len(words) == 1:
        candidates = [*commands]
    elif command not in commands:
        candidates = []
    elif command == "train":  # completed without its module, whose import would take half a second
        sweeps = [f"{word}=" for word in SWEEP_WORDS] if {"-m", "--multirun"} & {*words} else []
        candidates = [*sweeps, *keys_of_train(words[1:])]
    elif "=" in prefix and key_of(prefix) == "checkpoint":
        candidates = _checkpoints(prefix)
    else:
        module = importlib.import_module(commands[command].partition(":")[0])
        candidates = [*module.complete(words[1:])] if hasattr(module, "complete") else []
        if hasattr(module, "USAGE"):
            candidates += _declared(module, words[1:])
    return [candidate for candidate in dict.fromkeys(candidates) if candidate.startswith(prefix)]


def _declared(module: ModuleType, words: list[str]) -> list[str]:
    """Returns the keys and flags that the help of a command lists."""
    from dlopt.basics.plain_values import is_below  # slow to import; not needed for the names of commands
    from dlopt.commands.shared.usage import reads_of, typed_words

    def is_read(word: str) -> bool:  # `model=mlp`, `model.`, `hydra/`: one of the keys, or below or above one
        key = key_of(word).rstrip(".")
        return is_below(key, reads) or any(is_below(read, [key]) for read in reads)

    typed, reads = key_of(words[-1]), reads_of(module)
    if not is_below(typed, reads) and not any(read.startswith(typed) for read in reads):
        return [*typed_words(module)]  # without Hydra, which takes a while
    return [*typed_words(module), *filter(is_read, keys_of_train(words))]


def keys_of_train(words: Sequence[str]) -> list[str]:
    """Completes a flag, group, choice or key of `dlopt train`. A command that takes them all has it as its `complete`.

    Leaves out fragments of choices and `_target_`, unless the last word has an underscore.
    """
    from dlopt.config.flags import flags, hydra_main

    prefix, line = words[-1], " ".join(["dlopt", *words])
    if prefix.startswith("-"):
        return flags()
    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        hydra_main(["-sc", "query=bash"])
    found = output.getvalue().split()
    return [word for word in found if not re.search(r"[.=/]_[^.=/]*=?$", word) or re.search(r"[.=/]_[^.=/]*$", prefix)]


def folders(words: Sequence[str]) -> list[str]:
    """Completes the path of a folder."""
    return glob.glob(glob.escape(words[-1]) + "*/")


def _checkpoints(prefix: str) -> list[str]:
    paths = [Path(match) for match in glob.glob(glob.escape(value_of(prefix)) + "*")]
    return [f"checkpoint={p}/" if p.is_dir() else f"checkpoint={p}" for p in paths if p.is_dir() or p.suffix == ".pt"]
