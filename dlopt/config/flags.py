"""Hydra's flags of `dlopt train` and the other commands that compose a config; what Hydra's main prints for them."""

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dlopt._version import __version__
from dlopt.basics.errors import USER_ERROR, UserError
from dlopt.config.choices import CONFIG_NAME, VERSION_BASE, config_folder
from dlopt.config.overrides import quoted
from dlopt.config.synonyms import for_flag

if TYPE_CHECKING:
    from omegaconf import DictConfig

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def parse_arguments(arguments: list[str]) -> Namespace:
    """Parses overrides and Hydra's flags (-m, --cfg, --config-dir, ...), in any order. Raises `UserError`."""
    parser = _parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> NoReturn:
        raise UserError(for_flag(arguments, flags) or f"{message}; `dlopt train --help` lists the flags")

    parser.error = refuse  # type: ignore[method-assign]
    parsed: Namespace = parser.parse_intermixed_args(arguments)
    parsed.overrides = [quoted(line) for line in parsed.overrides]
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported, since it executes the contents of a pickle file")
    if parsed.config_path is not None:
        raise UserError(f"--config-path={parsed.config_path}: not supported; add a config folder with --config-dir")
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UserError(f"--config-dir={parsed.config_dir}: no such folder")
    return parsed


def _parser() -> ArgumentParser:
    """Returns a parser of the flags of Hydra 1.3, which has no public one; `dlopt train --help` explains them."""
    parser = ArgumentParser(prog="dlopt", add_help=False)
    parser.add_argument("overrides", nargs="*")
    for flags in (
        ("--help", "-h"), ("--hydra-help",), ("--resolve",), ("--run", "-r"), ("--multirun", "-m"),
        ("--shell-completion", "-sc"),
    ):  # fmt: skip
        parser.add_argument(*flags, action="store_true")
    for flags in (
        ("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd"),
        ("--experimental-rerun",),
    ):  # fmt: skip
        parser.add_argument(*flags)
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--info", "-i", const="all", nargs="?", choices=INFO)
    parser.add_argument("--version", action="version", version=f"dlopt {__version__}")
    return parser


def show_info(parsed: Namespace, files: Iterable[str] = ()) -> None:
    """Prints what --info or --hydra-help requests, through Hydra's main. `files`: the flags that name config files."""
    flags = ["--hydra-help"] if parsed.hydra_help else ["--info", parsed.info]
    try:
        hydra_main([*flags, *files, *parsed.overrides])
    except SystemExit as end:
        sys.exit(USER_ERROR if end.code == 1 else end.code)


def hydra_main(arguments: list[str], task: "Callable[[DictConfig], Any] | None" = None) -> None:
    """Calls Hydra's main, which prints information and completions, and runs sweeps of other packages.

    May raise SystemExit. `task` runs a job of a sweep.
    """
    import hydra

    from dlopt.config.compose import register_plugins

    register_plugins()
    logging.raiseExceptions = False  # Hydra prints through logging: a closed pipe (`| head`) must not be an error
    main = hydra.main(version_base=VERSION_BASE, config_path=str(config_folder()), config_name=CONFIG_NAME)
    former, sys.argv = sys.argv, [sys.argv[0], *arguments]
    # From Python 3.14 on, argparse checks the help of a flag when it is added; one of Hydra's is not a string yet.
    ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]  # hides the inherited method
    try:
        main(task or (lambda config: None))()  # requires a task, but does not call it when it only prints
    finally:
        del ArgumentParser._check_help  # type: ignore[attr-defined]
        sys.argv = former
