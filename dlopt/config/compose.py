"""Composes configs with Hydra's public functions, and explains errors in overrides.

Two things have no public name in Hydra and come from `loader.py`: its argument parser, because `dlopt train` takes
Hydra's flags, and its callbacks object, without which third-party launchers start no job.
"""

import contextlib
import functools
import importlib
import itertools
import logging
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, env_override
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dlopt
from dlopt.config.choices import config_dir as searched_config_dir
from dlopt.config.choices import config_folder
from dlopt.config.grammar import explain_grammar, quoted
from dlopt.config.loader import Callbacks, RememberingLoader, YamlFolder, get_args_parser, parse_override
from dlopt.config.pretrained import pretrained_overrides
from dlopt.config.resolve import first_lines, is_typed
from dlopt.config.schema import show
from dlopt.config.synonyms import for_choice, for_flag, for_key
from dlopt.config.trust import check_expansion, check_hydra
from dlopt.errors import USER_ERROR, UserError, shorten, suggest
from dlopt.folders import SHELL_FOLDER, refuse_url
from dlopt.plain import check_yaml

CONFIG_NAME = "train"
_VERSION_BASE = "1.3"
# AssertionError: Hydra asserts that an interpolated choice is a string.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, AssertionError)


def parse_arguments(arguments: list[str]) -> Namespace:
    """Parses Hydra's command line: overrides and flags such as -m, --cfg, --config-dir, in any order."""
    with _lazy_help():
        parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    parser.error = functools.partial(_raise_flag_error, arguments, flags)  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest == "version":
            action.version = f"dlopt {dlopt.__version__}"  # type: ignore[attr-defined]
    parsed: Namespace = parser.parse_intermixed_args(arguments)
    parsed.overrides = [quoted(line) for line in parsed.overrides]
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported, since it executes the contents of a pickle file")
    if parsed.config_path is not None:
        raise UserError(f"--config-path={parsed.config_path}: not supported; add a config folder with --config-dir")
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UserError(f"--config-dir={parsed.config_dir}: no such folder")
    return parsed


@contextlib.contextmanager
def _lazy_help() -> Iterator[None]:
    """Lets Hydra add a flag whose help is not a string yet.

    From Python 3.14 on, argparse checks the help of a flag when it is added; Hydra's parser cannot be built then.
    """
    if not hasattr(ArgumentParser, "_check_help"):
        yield
        return
    ArgumentParser._check_help = lambda self, action: None  # hides the inherited method
    try:
        yield
    finally:
        del ArgumentParser._check_help


def _raise_flag_error(arguments: list[str], flags: list[str], message: str) -> NoReturn:
    raise UserError(for_flag(arguments, flags) or f"{message}; `dlopt train --help` lists the flags")


def show_config(parsed: Namespace) -> None:
    """Prints what --cfg, --info or --hydra-help requests, through Hydra's main."""
    flags = [f"--{name.replace('_', '-')}" for name in ("hydra_help", "resolve") if getattr(parsed, name)]
    for name in ("cfg", "package", "info", "config_name", "config_dir"):
        value = getattr(parsed, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", value]
    try:
        hydra_main([*flags, *parsed.overrides])
    except SystemExit as end:  # of an unknown --package, which Hydra reports
        sys.exit(USER_ERROR if end.code == 1 else end.code)


def hydra_main(arguments: list[str]) -> None:
    """Calls Hydra's main, which alone prints configs and completions. It may raise SystemExit."""
    _register_plugins()
    logging.raiseExceptions = False  # Hydra prints through logging: a closed pipe (`| head`) must not be an error
    former, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        with _lazy_help():
            hydra.main(version_base=_VERSION_BASE, config_path=str(config_folder()), config_name=CONFIG_NAME)(_no_job)()
    finally:
        sys.argv = former


def _no_job(config: DictConfig) -> None:
    """Does nothing: Hydra's main requires a task, which it does not call when it only prints."""


class Composer:
    """Composes configs of one `--config-name` and `--config-dir`."""

    def __init__(self, config_name: str | None = None, config_dir: str | None = None) -> None:
        self.config_name = config_name or CONFIG_NAME
        self.config_dir = config_dir
        self.more_keys: set[str] = set()  # of the command, to suggest
        if config_dir is not None:
            _check_files(Path(config_dir))
        _register_plugins()
        token = searched_config_dir.set(None if config_dir is None else Path(config_dir))
        try:
            with _global_hydra(None):
                initialize_config_dir(str(config_folder()), job_name=CONFIG_NAME, version_base=_VERSION_BASE)
                self.loader = RememberingLoader.extend(GlobalHydra.instance().config_loader())
                composing: Any = GlobalHydra.instance().hydra
                composing.config_loader = self.loader
                self._hydra = composing
                # Empty: callbacks named in a config would run code before it is checked.
                self._context = HydraContext(self.loader, Callbacks())
        finally:
            searched_config_dir.reset(token)

    def parse(self, overrides: list[str]) -> list[Override]:
        return parse_overrides(overrides, self.loader)

    def compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        """Composes a config, Hydra's own node included. Raises `UserError`, which explains the override at fault."""
        parsed = self.parse(overrides)
        self._check_overrides(parsed, multirun)
        try:
            config = self._compose(overrides, multirun)
            raw: Any = OmegaConf.to_container(config, resolve=False)
            check_expansion(raw)
            check_hydra(config, overrides)
            if not multirun and (more := pretrained_overrides(config, parsed)):
                config = self._compose([*overrides, *more])
            return config
        except RecursionError:
            folder = "" if self.config_dir is None else f"--config-dir={self.config_dir}: "
            raise UserError(
                f"{folder}a config file is nested too deeply, or includes itself through its defaults list"
            ) from None
        except _COMPOSITION_ERRORS as error:
            raise UserError(self._explain(parsed, error, multirun)) from None
        except yaml.YAMLError as error:
            raise UserError(f"a config file is not valid YAML: {' '.join(str(error).split())}") from None
        except (UnicodeDecodeError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self._undecodable_file()} cannot be read: {first_lines(error)}") from None

    def _compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        if multirun:  # Hydra's public `compose` does not support sweeps
            return self.loader.load_configuration(self.config_name, overrides, RunMode.MULTIRUN)
        with _global_hydra(self._hydra):
            return compose(self.config_name, overrides, return_hydra_config=True)

    def launcher(self, config: DictConfig, task: Callable[[DictConfig], Any]) -> Any:
        """Builds the launcher of a composed sweep."""
        return Plugins.instance().instantiate_launcher(hydra_context=self._context, task_function=task, config=config)

    def sweep(self, config: DictConfig, folder: Path, task: Callable[[DictConfig], Any]) -> Any:
        """Runs a composed sweep in `folder` with its sweeper and launcher; returns the sweeper's result."""
        path = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        OmegaConf.update(config, "hydra.sweep.dir", str(folder))
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{path}'")  # every job is composed with these overrides
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        plugins = Plugins.instance()
        sweeper = plugins.instantiate_sweeper(hydra_context=self._context, task_function=task, config=config)
        overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        return sweeper.sweep(overrides)

    def groups(self) -> list[str]:
        not_for_runs = ("hydra", "benchmark")  # the latter has the files of `dlopt benchmark`
        return [name for name in self.loader.list_groups("") if name not in not_for_runs]

    def choices(self, group: str) -> list[str]:
        """Returns the names of a group's choices, including those in subfolders (`lecture/capacity`)."""
        options = self.loader.get_group_options
        names = options(group, ObjectType.CONFIG)
        for folder in options(group, ObjectType.GROUP):
            names += [f"{folder}/{name}" for name in self.choices(f"{group}/{folder}")]
        return names

    def _check_overrides(self, overrides: Iterable[Override], multirun: bool) -> None:
        """Raises `UserError` for overrides that Hydra accepts but that are certainly mistakes."""
        groups = self.groups()
        for override in overrides:
            line, value = override.input_line, override.value()
            key = override.get_key_element().lstrip("+~")
            if not key:
                raise UserError(f"{line}: an override is key=value or group=choice")
            if override.is_sweep_override():
                if key.startswith(("hydra.", "hydra/")):
                    raise UserError(f"{line}: one value is needed, for all jobs; write a list as [a,b]")
                if not multirun:
                    raise UserError(f"{line}: several values need -m (one run each); write a list as [a,b]")
                continue
            if key == "hydra":
                raise UserError(f"{line}: a block of keys; set them one by one: hydra.run.dir=FOLDER")
            if key == "hydra.job.env_copy":
                raise UserError(f"{line}: not needed, because jobs inherit the environment")
            if override.is_delete() and not key.startswith("hydra"):
                hint = self._suggest(key) if key in groups else "set a value (null where allowed)"
                raise UserError(f"{line}: keys and groups cannot be deleted; {hint}")
            if key in groups and not isinstance(value, str):
                hint = for_choice(key, show(value)) or self._suggest(key)
                raise UserError(f"{key}={show(value)}: must be one of the choices; {hint}")
            if key in groups and str(value).split("/")[-1].startswith("_"):  # a fragment
                raise UserError(f"{line}: unknown choice; {self._suggest(key, str(value))}")
            if value == {}:
                raise UserError(f"{line}: an empty block changes nothing; set its keys one by one")

    def _undecodable_file(self) -> str:
        """Finds the file in --config-dir that is not UTF-8; Hydra does not name it."""
        for path in () if self.config_dir is None else sorted(Path(self.config_dir).rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return str(path)
        return "a config file"

    def _suggest(self, group: str, choice: str = "") -> str:
        names = self.choices(group)
        if group.startswith("hydra/"):
            names = [name for name in names if "/" not in name]  # hydra/sweeper/sampler is a group of its own
        hint = for_choice(group, choice)
        return hint or suggest(choice, names, f"dlopt options {group}", prefix=f"{group}=", title="choices")

    def _explain(self, overrides: list[Override], error: Exception, multirun: bool) -> str:
        """Explains a composition error by the override at fault: the last of the shortest list that fails."""
        groups = self.groups()
        # Groups first, as Hydra applies them.
        ordered = sorted(overrides, key=lambda override: override.get_key_element().lstrip("+~") not in groups)
        lines = [str(override.input_line) for override in ordered]

        @functools.cache
        def compose_first(count: int) -> DictConfig | Exception:
            try:
                return self._compose(lines[:count], multirun)
            except _COMPOSITION_ERRORS as error:
                return error

        # Bisection: with an override at fault, every longer list fails as well.
        count = bisect_left(range(len(lines) + 1), True, key=lambda count: isinstance(compose_first(count), Exception))
        if count > len(lines):
            return first_lines(error)
        error_at_fault = compose_first(count)
        assert isinstance(error_at_fault, Exception)
        if count == 0:  # a config file is at fault
            if self.config_name != CONFIG_NAME and "primary config" in str(error_at_fault):
                return f"--config-name={self.config_name}: no such file in dlopt's folder or in --config-dir"
            return first_lines(error_at_fault)
        config = compose_first(count - 1)
        assert isinstance(config, DictConfig)
        return self._explain_override(ordered[count - 1], lines[count - 1], config, error_at_fault)

    def _explain_override(self, override: Override, line: str, config: DictConfig, error: Exception) -> str:
        """Explains the error of `override`; `config` is composed without it."""
        key, value = override.get_key_element().lstrip("+~"), override.value()
        typed = line.partition("=")[2]
        if key in self.groups() and isinstance(value, str):
            if value not in self.choices(key):
                if key == "data" and Path(value).expanduser().is_dir():
                    return f"{line}: a folder is not a choice; for its images: data=image_folder data.root={value}"
                return f"{line}: unknown choice; {self._suggest(key, value)}"
            return f"{line}: {first_lines(error)}"
        if key.startswith("hydra/") and (names := self.choices(key)) and value not in names:
            return f"{line}: unknown choice; {self._suggest(key, str(value))}"
        if key.startswith("hydra/sweeper/"):
            return f"{line}: only searches have this group; add hydra/sweeper=dlopt_optuna"
        if "/" in key or "@" in key:
            return f"{line}: {first_lines(error)}"
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent, throw_on_resolution_failure=False) if parent else config
        while node is None and "." in parent:  # explain the first part of the key that does not exist
            parent, _, name = parent.rpartition(".")
            node = OmegaConf.select(config, parent, throw_on_resolution_failure=False)
        if not isinstance(node, DictConfig):
            group, _, rest = key.partition(".")
            names = [str(name) for name in config]
            if group in names:
                return f"{line}: unknown key; {parent} holds a value, not keys"
            if group.lower() not in names and (hint := for_key(name, typed)):  # trainer.max_epochs
                return f"{line}: unknown key; {hint}"
            close = get_close_matches(group.lower(), names, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}.{rest}? " if close else ""
            return f"{line}: unknown group; {hint}groups: {shorten(group, self.groups(), 'dlopt options')}"
        names = [str(name) for name in node if name not in ("_target_", "hydra")]
        if name in names and override.is_add():
            return f"{line}: this key exists; set it without the plus sign: {key}={typed}"
        if name in names:  # the key exists; a key inside its value does not
            is_new = "Could not override" in str(error)
            hint = f"; add a new key with a plus sign: +{key}.KEY=VALUE" if is_new else ""
            return f"{line}: {first_lines(error)}{hint}"
        if hint := for_key(key, typed):
            return f"{line}: unknown key; {hint}"
        names += [] if parent else sorted(self.more_keys)
        close = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
        prefix = f"{parent}." if parent else ""
        hint = f"did you mean {prefix}{close[0]}? " if close else "" if parent else _suggest_in_groups(name, config)
        if not hint and parent in self.groups():
            hint = _suggest_choices(parent, name, self.choices(parent))
        if not names and str(node.get("_target_")).startswith("dlopt."):
            return f"{line}: unknown key; {hint}the chosen {parent} has no keys"
        if not names:
            return f"{line}: unknown key; add a new key with a plus sign: +{line}"
        command = f"dlopt options {parent}" if parent in self.groups() else "dlopt train --help"
        return f"{line}: unknown key; {hint}allowed: {shorten(name, names, command)}"


def parse_overrides(lines: Iterable[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parses overrides. `loader` provides the choices for glob(*). Raises `UserError`."""
    lines, parsed = list(lines), []
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        try:
            parsed.append(parse_override(line, loader))
        except HydraException:
            raise UserError(explain_grammar(line, following)) from None
    return parsed


@contextlib.contextmanager
def _global_hydra(hydra_instance: Any) -> Iterator[None]:
    """Makes `hydra_instance` the global one, and restores the former: a notebook may use Hydra as well."""
    state = GlobalHydra.instance()
    former, state.hydra = state.hydra, hydra_instance
    try:
        yield
    finally:
        state.hydra = former


def _register_plugins() -> None:
    """Registers dlopt's sweeper, launchers and config folders with Hydra.

    Hydra instantiates plug-ins of the namespace package `hydra_plugins` only, so dlopt/hydra_plugins joins its path.
    """
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no other plug-in is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    folder = str(Path(dlopt.__file__).with_name("hydra_plugins"))
    if folder not in namespace.__path__:
        namespace.__path__.append(folder)
    plugins = Plugins.instance()  # scans the namespace on first use only, so register explicitly
    for plugin in (*importlib.import_module("hydra_plugins.dlopt_sweeps").PLUGINS, YamlFolder):
        plugins.register(plugin)


def listed_values(override: Override) -> list[str]:
    """Returns the values of a list, range or glob as on the command line. Raises `UserError` for duplicates.

    The order of shuffle(...) is random but always the same: a sweep lists its values several times, when it is checked,
    run and resumed, and in every task of a job array.
    """
    values = list(override.sweep_string_iterator())
    if len(set(values)) < len(values):
        raise UserError(f"{override.input_line}: duplicate value in the list")
    if getattr(override.value(), "shuffle", False):
        values.sort()
        random.Random(0).shuffle(values)
    return values


def listed(override: Override) -> str:
    """Returns the override with its values spelled out, in the order of `listed_values`."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={','.join(listed_values(override))}"


def grid(overrides: Iterable[Override]) -> list[list[str]]:
    """Returns the overrides of every combination of the listed values, in the order of Hydra's own sweeper.

    Raises `UserError` for continuous ranges and duplicate values.
    """
    lists: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            lists[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            lists[key] = [f"{key}={value}" for value in listed_values(override)]
        else:
            raise UserError(
                f"{override.input_line}: a grid needs listed values; to sample, add hydra/sweeper=dlopt_optuna"
            )
    return [list(combination) for combination in itertools.product(*lists.values())]


def typed_folder(config: DictConfig, key: str, overrides: Iterable[str]) -> tuple[Path, bool]:
    """Returns the folder in `key` (hydra.run.dir or hydra.sweep.dir) and whether the command line sets it.

    Raises `UserError` for an empty path and for a URL.
    """
    path = OmegaConf.select(config, key)
    if not path or not str(path).strip():
        raise UserError(f"{key}={'null' if path is None else path}: must be the path of a folder")
    refuse_url(str(path), key)
    return Path(os.path.expanduser(str(path))).absolute(), is_typed(key, overrides)


@contextlib.contextmanager
def job_environment(config: DictConfig, folder: Path) -> Iterator[None]:
    """Applies hydra.job_logging, and hydra.job.env_set and hydra.job.chdir until it exits. Raises `UserError`."""
    config.hydra.runtime.output_dir = str(folder)
    try:
        configure_log(config.hydra.job_logging, config.hydra.verbose)
    except (ValueError, OSError) as error:
        raise UserError(f"hydra.job_logging: {first_lines(error)}") from None
    working_directory = contextlib.chdir(folder) if config.hydra.job.chdir else contextlib.nullcontext()
    with env_override({**config.hydra.job.env_set, SHELL_FOLDER: os.getcwd()}), working_directory:
        yield


def _check_files(folder: Path) -> None:
    """Raises `UserError` for YAML files below `folder` that are too large for a config, or hidden by one of dlopt's.

    Looks only where Hydra looks: at the top and in the groups' folders.
    """
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    group_files = [path for group in (*groups, "hydra") for path in (folder / group).rglob("*.yaml")]
    for path in sorted([*folder.glob("*.yaml"), *group_files]):
        try:
            check_yaml(path)
        except ValueError as error:
            raise UserError(f"--config-dir={folder}: {path.relative_to(folder)} {error}") from None
        except OSError as error:
            raise UserError(f"--config-dir={folder}: {path.relative_to(folder)} cannot be read: {error}") from None
        own = config_folder() / path.relative_to(folder)
        if own.is_file() and own.read_bytes() != path.read_bytes():  # Hydra would use dlopt's
            raise UserError(f"--config-dir={folder}: {path.relative_to(folder)} is also a file of dlopt; rename it")


def _suggest_choices(group: str, name: str, choices: Iterable[str]) -> str:
    """Names the choices of the group that have the key `name`."""
    files = {choice: config_folder() / group / f"{choice}.yaml" for choice in choices}
    having = [
        choice for choice, path in files.items() if path.exists() and name in (yaml.safe_load(path.read_text()) or {})
    ]
    more = f" and {len(having) - 8} more" if len(having) > 8 else ""
    return f"{group}={','.join(having[:8])}{more} {'has' if len(having) == 1 else 'have'} it; " if having else ""


def _suggest_in_groups(name: str, config: DictConfig) -> str:
    """Suggests `optimizer.lr` for `lr`: a key with this name, or a similar one, inside a group."""
    dotted = {
        str(key): f"{group!s}.{key!s}"
        for group, node in config.items_ex(resolve=False)
        if isinstance(node, DictConfig) and group != "hydra"
        for key in node
        if key != "_target_"
    }
    close = get_close_matches(name.lower(), list(dotted), n=1, cutoff=0.6)
    return f"did you mean {dotted[close[0]]}? " if close else ""
