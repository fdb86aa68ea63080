"""Hydra's flags of `dlopt train` and the other commands that compose a config; what Hydra's main prints for them."""

import importlib
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from dlopt._version import ROOT, __version__
from dlopt.basics.errors import USER_ERROR, FileError, UserError
from dlopt.config.choices import CONFIG_NAME, config_folder, version_base
from dlopt.config.overrides import parts_of, quoted
from dlopt.config.settings import SWITCHES
from dlopt.config.synonyms import for_flag

if TYPE_CHECKING:
    from omegaconf import DictConfig

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def parse_arguments(arguments: list[str]) -> Namespace:
    """Parses overrides and Hydra's flags (-m, --cfg, --config-dir, ...), in any order. Raises `UserError`."""
    parser = _parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    arguments = [
        _normal(each, following, flags) for each, following in zip(arguments, [*arguments[1:], ""], strict=False)
    ]

    def refuse(message: str) -> NoReturn:
        raise UserError(for_flag(arguments, flags) or f"{message}; `dlopt train --help` lists the flags")

    parser.error = refuse  # type: ignore[method-assign]
    parsed: Namespace = parser.parse_intermixed_args(arguments)
    parsed.overrides = [quoted(line) for line in parsed.overrides]
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported, since it executes the contents of a pickle file")
    if parsed.config_path is not None:
        raise UserError(f"--config-path={parsed.config_path}: not supported; add a config folder with --config-dir")
    try:
        if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
            raise FileError(f"--config-dir={parsed.config_dir}: no such folder")
    except OSError as error:
        raise UserError(f"--config-dir={parsed.config_dir}: {error.strerror}") from None
    return parsed


def _parser() -> ArgumentParser:
    """Returns a parser of the flags of Hydra 1.3, which has no public parser. The help lists the flags with a text."""
    parser = ArgumentParser(prog="dlopt", add_help=False)
    add = parser.add_argument
    add("overrides", nargs="*")
    sweep = "run a sweep, one run per combination: optimizer.lr=0.1,0.01 seed=0,1"
    add("-m", "--multirun", action="store_true", help=sweep)
    add("-c", "--cfg", metavar="job", choices=["job", "hydra", "all"], help="print the composed config and exit")
    files = "print which file each part of the config comes from; --info config: the complete config"
    add("-i", "--info", metavar="defaults", const="all", nargs="?", choices=INFO, help=files)
    folder = "folder with your own choices: DIR/optimizer/mine.yaml is optimizer=mine"
    add("-cd", "--config-dir", metavar="DIR", help=folder)
    add("-cn", "--config-name", metavar="NAME", help="primary config (default: train)")
    document = "print one JSON document on stdout: the result of the run or the sweep; progress goes to stderr"
    add("--json", action="store_true", help=document)
    add("--hydra-help", action="store_true", help="list the other flags of Hydra")
    for flags in (("-h", "--help"), ("--resolve",), ("-r", "--run"), ("-sc", "--shell-completion")):
        add(*flags, action="store_true")
    for flags in (("-p", "--package"), ("-cp", "--config-path"), ("--experimental-rerun",)):
        add(*flags)
    add("--version", action="version", version=f"dlopt {__version__}")
    return parser


def _normal(argument: str, following: str, flags: list[str]) -> str:
    """Returns a flag as Hydra spells it, `--config-dir` for `--config_dir`, and `--dry-run` as `dry_run=true`."""
    name, value = parts_of(argument)
    if not name.startswith("--") or name in flags:
        return argument
    if (dashed := name.replace("_", "-")) in flags:
        return dashed if name == argument else f"{dashed}={value}"
    key = name.removeprefix("--").replace("-", "_")
    is_switch = key in SWITCHES and name == argument and following not in ("true", "false")
    return f"{key}=true" if is_switch else argument


def documented_flags() -> list[tuple[str, str]]:
    """Returns the flags that the help of `dlopt train` lists, with their values, and a line on each."""
    actions = [action for action in _parser()._actions if action.help]
    return [
        (" ".join([", ".join(each.option_strings), str(each.metavar or "")]).strip(), str(each.help))
        for each in actions
    ]


def flags() -> list[str]:
    """Returns the long names of these flags."""
    return [each for action in _parser()._actions if action.help for each in action.option_strings if each[:2] == "--"]


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

    register_plugins()
    logging.raiseExceptions = False  # Hydra prints through logging: a closed pipe (`| head`) must not be an error
    main = hydra.main(**version_base(), config_path=str(config_folder()), config_name=CONFIG_NAME)
    former, sys.argv = sys.argv, [sys.argv[0], *arguments]
    # From Python 3.14 on, argparse checks the help of a flag when it is added; one of Hydra's is not a string yet.
    ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]  # hides the inherited method
    try:
        main(task or (lambda config: None))()  # requires a task, but does not call it when it only prints
    finally:
        del ArgumentParser._check_help  # type: ignore[attr-defined]
        sys.argv = former


def register_plugins() -> None:
    """Registers dlopt's sweeper, launchers and config folders with Hydra.

    Hydra instantiates plug-ins of the namespace package `hydra_plugins` only, so dlopt/sweeps/hydra_plugins joins its
    path.
    """
    from hydra.core.plugins import Plugins

    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no other plug-in is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    folder = str(ROOT / "sweeps/hydra_plugins")
    if folder not in namespace.__path__:
        namespace.__path__.append(folder)
    plugins = Plugins.instance()  # scans the namespace on first use only, so register explicitly
    for plugin in importlib.import_module("hydra_plugins.dlopt_sweeps").PLUGINS:
        plugins.register(plugin)
