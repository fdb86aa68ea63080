"""`dlopt train`: its help and its flags. `train_start` starts what they request, which takes Hydra and pydantic."""

import contextlib
from argparse import Namespace

from dlopt.basics.errors import DONE, UserError
from dlopt.commands.shared.document import document_only
from dlopt.config.flags import parse_arguments

USAGE = """\
Train a model, or run a sweep with -m

Usage: dlopt train [group=choice] [key=value] [flags]

Examples:
  dlopt train model=mlp optimizer=adamw epochs=5
  dlopt train -m optimizer.lr=0.01,0.03,0.1 seeds=3
  dlopt train -m 'rates=zip(optimizer=[sgd,adamw],optimizer.lr=[0.1,0.001])' # keys that change together
  dlopt train -m optimizer=sgd,adamw space=benchmark trials=5                # each optimizer with its own ranges
  dlopt train resume=auto
"""


def train(arguments: list[str]) -> int:
    """Runs `dlopt train` with the given arguments; returns the exit code. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help:
        print(help_page(arguments), end="")
        return DONE
    _check_flags(parsed)
    from dlopt.commands.train_start import start

    with document_only() if parsed.json else contextlib.nullcontext() as show:
        return start(parsed, show)


def help_page(arguments: list[str]) -> str:
    """Returns the help, with the choices of --config-dir. Raises `UserError`."""
    from dlopt.commands.options import tables_of_train

    return USAGE + tables_of_train(parse_arguments(arguments).config_dir)


def _check_flags(parsed: Namespace) -> None:
    for names in (("run", "multirun", "cfg", "info"), ("json", "cfg"), ("json", "info"), ("json", "hydra_help")):
        typed = [f"--{name.replace('_', '-')}" for name in names if getattr(parsed, name)]
        if len(typed) > 1:
            raise UserError(f"{' with '.join(typed)}: only one of them may be set")
    for name in ("resolve", "package"):
        if getattr(parsed, name) and not parsed.cfg:
            raise UserError(f"--{name}: needs --cfg")
