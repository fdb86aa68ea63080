"""The `dlopt` command: dispatches to the sub-commands and maps errors to exit codes.

Imports torch lazily, so that `--help`, `--version` and shell completion are fast.
"""

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TextIO, cast

from dlopt._version import __version__
from dlopt.basics.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    USER_ERROR,
    ReportedError,
    RunError,
    UserError,
    disk_failure,
    refused_path,
)
from dlopt.basics.interruption import (
    Interrupted,
    end_on_signals,
    end_with,
    flush_streams,
    leave_closed_terminal,
    print_message,
)
from dlopt.basics.terminal_controls import TerminalStream, drop_bad_size
from dlopt.commands.command_table import COMMANDS, every_command
from dlopt.config.packages import entries

_HELP = {"-h", "--help", "--hel", "--he"}  # argparse accepts unambiguous abbreviations

SYNONYMS = {  # names of other tools -> arguments of dlopt
    "fit": "train", "run": "train", "tune": "train -m",
    "search": "train -m hydra/sweeper=dlopt_optuna", "test": "eval", "validate": "eval", "evaluate": "eval",
    "infer": "predict", "generate": "sample", "list": "runs", "ls": "runs", "plot": "report", "leaderboard": "report",
    "lr-find": "find-lr", "config": "train --cfg job", "completion": "train -sc install=bash",
}  # fmt: skip

_USAGE = f"""\
dlopt {__version__}: an experiment runner for deep-network optimization

Usage: dlopt COMMAND [group=choice] [key=value]

%s
Examples:
  dlopt train optimizer=adamw schedule=cosine_warmup epochs=20
  dlopt train -m optimizer.lr=0.01,0.1 seed=0,1,2      # a run per combination
  dlopt train resume=auto                              # the newest unfinished run
  dlopt train from=outputs/train/DATE optimizer.lr=1   # its config, one key changed

Use `dlopt COMMAND --help` for the keys of a command. --json prints one JSON document on stdout.
Shell completion: eval "$(dlopt train -sc install=bash)"
"""


def main() -> None:
    """Entry point of the `dlopt` command: runs the command of `sys.argv`, and prints its error in one line."""
    end_on_signals()
    code, failure = DONE, None
    has_document = "--json" in sys.argv[1:]
    with contextlib.ExitStack() as stack:
        try:
            _open_streams()
            if has_document:
                from dlopt.commands.shared.document import document_only, end_document

                stack.enter_context(document_only())
                end_on_signals(end_document)
            command, arguments = find(sys.argv[1:])
            code = command(arguments)
        except (Exception, KeyboardInterrupt) as error:
            found = _ending(error)
            if found is None and not has_document:
                raise
            code, message = found or (FAILED, "")
            failure = None if code == DONE else error
            if message:
                print_message(message)
        except SystemExit as end:
            if not has_document:
                raise
            code = end.code if isinstance(end.code, int) else FAILED * bool(end.code)
        end_with(code)
        if has_document:
            end_document(code, failure)
    flush_streams()
    sys.exit(code)


def _ending(error: Exception | KeyboardInterrupt) -> tuple[int, str] | None:
    """Returns the exit code of an error and the line to print ("" for none); None for a bug."""
    if isinstance(error, UserError | RunError | ReportedError):
        return error.code, "" if isinstance(error, ReportedError) else str(error)
    if isinstance(error, KeyboardInterrupt):
        return error.code if isinstance(error, Interrupted) else INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, BrokenPipeError) and leave_closed_terminal():
        return DONE, ""  # `dlopt ... | head` has read what it wanted
    if isinstance(error, OSError):
        if (refused := refused_path(error)) is not None:  # of the command line
            return USER_ERROR, refused
        if (message := disk_failure(error)) is not None:
            return FAILED, message
    return None


def _open_streams() -> None:
    """Redirects closed standard streams (`<&- >&-`, some cron daemons) to /dev/null, keeps texts from controlling the
    terminal, and drops a COLUMNS or LINES that is no size.

    Otherwise the next opened files get descriptors 0 to 2, and a library that writes to stderr corrupts them.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() returns the lowest free descriptor, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(descriptor, mode))
    if sys.stdout.isatty():
        sys.stdout = cast(TextIO, TerminalStream(sys.stdout))
    drop_bad_size()


Command = Callable[[list[str]], int]


def find(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Returns the function of a command line, and its arguments. Raises `UserError`."""
    arguments = list(arguments)
    if arguments[:1] == ["help"] and len(arguments) > 1:  # dlopt help train
        arguments[:2] = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from dlopt.commands.listing import sections

        return partial(_print, _USAGE % sections(every_command())), []
    if arguments[0] in ("-V", "--version"):
        return _print_version, []
    for index, argument in enumerate(arguments):  # before or, as in Hydra, after the sub-command
        if argument in ("-sc", "--shell-completion"):
            from dlopt.commands.completion import complete

            return complete, list(arguments[index:])
    name = arguments[0] if arguments[0] in COMMANDS else arguments[0].replace("_", "-")  # find_lr is find-lr
    commands = COMMANDS
    if name not in commands:
        from dlopt.basics.names import Names  # with dataclasses, which a known command need not load

        commands = every_command()
        renamed = {**SYNONYMS, **entries("dlopt.renamed")}
        forms = {old: f"dlopt {new}" for old, new in renamed.items()}
        Names("command", commands, "dlopt --help", forms=forms).check(name)
    path, _, function = commands[name].partition(":")
    module = importlib.import_module(path)
    if _HELP & set(arguments[1:]) and hasattr(module, "USAGE"):
        if hasattr(module, "help_page"):  # that of `train` depends on --config-dir
            return partial(_print, module.help_page(arguments[1:])), []
        from dlopt.commands.shared.usage import usage

        return partial(_print, usage(module)), []
    command: Command = getattr(module, function)
    return command, list(arguments[1:])


def _print_version(_: list[str]) -> int:
    print(f"dlopt {__version__}")
    return DONE


def _print(text: str, _: list[str]) -> int:
    from dlopt.basics.emphasis import print_emphasized
    from dlopt.commands.shared.text_columns import fitted

    print_emphasized(fitted(text, shutil.get_terminal_size().columns))
    return DONE
