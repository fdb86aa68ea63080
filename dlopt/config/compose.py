"""Composes configs by Hydra's public functions, explains what is wrong with a command line, and enters Hydra's main.

The only module that imports Hydra's internals, for two things without a public name: its argument parser, because
`dlopt train` takes Hydra's flags, and the list of callbacks without which other people's launchers start no job.
"""

import contextlib
import importlib
import itertools
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, env_override
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dlopt
from dlopt.config.choices import config_dir as searched
from dlopt.config.choices import config_folder
from dlopt.config.schema import show
from dlopt.config.trust import check_hydra, leaves
from dlopt.errors import UserError
from dlopt.plain import check_yaml

CONFIG_NAME = "train"
_VERSION_BASE = "1.3"


def parse_arguments(arguments: list[str]) -> Namespace:
    """Parses Hydra's command line: overrides and flags such as -m, --cfg, --config-dir, in any order."""
    parser = get_args_parser()
    parser.error = _refuse_flags  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest == "version":
            action.version = f"dlopt {dlopt.__version__}"  # type: ignore[attr-defined]
    parsed: Namespace = parser.parse_intermixed_args(arguments)
    parsed.overrides = [_quoted(line) for line in parsed.overrides]
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not offered, since it runs whatever a pickle file says")
    if parsed.config_path is not None:
        raise UserError(f"--config-path={parsed.config_path}: not offered; --config-dir adds a folder to dlopt's own")
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UserError(f"--config-dir={parsed.config_dir}: there is no such folder")
    return parsed


def _quoted(line: str) -> str:
    """Quotes a plain value with letters that Hydra's grammar does not know: name=größe."""
    key, equals, value = line.partition("=")
    is_plain = equals and value.isprintable() and not re.search(r"""['"\[\]{}(),$\\]""", value)
    return line if value.isascii() or not is_plain else f"{key}='{value}'"


def _refuse_flags(message: str) -> NoReturn:
    raise UserError(f"{message}; `dlopt train --help` shows what is allowed")


def show_config(parsed: Namespace) -> None:
    """Has Hydra's main print what --cfg, --info or --hydra-help asks for."""
    flags = [f"--{name.replace('_', '-')}" for name in ("hydra_help", "resolve") if getattr(parsed, name)]
    for name in ("cfg", "package", "info", "config_name", "config_dir"):
        value = getattr(parsed, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", value]
    hydra_main([*flags, *parsed.overrides])


def hydra_main(arguments: list[str]) -> None:
    """Enters Hydra's main for what it alone prints: configs and completions. It may raise SystemExit."""
    _offer_plugins()
    logging.raiseExceptions = False  # Hydra prints through logging: a closed pipe (`| head`) is no error
    former, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(version_base=_VERSION_BASE, config_path=str(config_folder()), config_name=CONFIG_NAME)(_no_job)()
    finally:
        sys.argv = former


def _no_job(config: DictConfig) -> None:
    """The task that Hydra's main requires; it is not called when Hydra only prints."""


class Composer:
    """Composes the configs of one command line."""

    def __init__(self, config_name: str | None = None, config_dir: str | None = None) -> None:
        self.config_name = config_name or CONFIG_NAME
        self.config_dir = config_dir
        if config_dir is not None:
            _check_files(Path(config_dir))
        _offer_plugins()
        token = searched.set(None if config_dir is None else Path(config_dir))
        try:
            with _as_global(None):
                initialize_config_dir(str(config_folder()), job_name=CONFIG_NAME, version_base=_VERSION_BASE)
                self._hydra = GlobalHydra.instance().hydra
                self.loader = GlobalHydra.instance().config_loader()
                self._context = HydraContext(self.loader, Callbacks())  # no callbacks: they would be code
        finally:
            searched.reset(token)

    def parse(self, overrides: list[str]) -> list[Override]:
        return parse_overrides(overrides, self.loader)

    def compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        """Composes a config with Hydra's own node. Explains every way in which typed overrides can be wrong."""
        parsed = self.parse(overrides)
        self._refuse_what_hydra_accepts(parsed, multirun)
        try:
            config = self._compose(overrides, multirun)
            check_hydra(config, overrides)
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(self._explain(parsed, error, multirun)) from None
        except yaml.YAMLError as error:
            raise UserError(f"a config file is no valid YAML: {' '.join(str(error).split())}") from None
        except (UnicodeDecodeError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self._undecodable()} cannot be read: {_first_lines(error)}") from None

    def _compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        if multirun:  # of a sweep as a whole: `compose` knows single runs only
            return self.loader.load_configuration(self.config_name, overrides, RunMode.MULTIRUN)
        with _as_global(self._hydra):
            return compose(self.config_name, overrides, return_hydra_config=True)

    def launcher(self, config: DictConfig, task: Callable[[DictConfig], Any]) -> Any:
        """Builds the launcher that a composed sweep names."""
        return Plugins.instance().instantiate_launcher(hydra_context=self._context, task_function=task, config=config)

    def sweep(self, config: DictConfig, folder: Path, task: Callable[[DictConfig], Any]) -> Any:
        """Runs a composed sweep in `folder` by its sweeper and launcher; returns what the sweeper returns."""
        path = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        OmegaConf.update(config, "hydra.sweep.dir", str(folder))
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{path}'")  # with which every job is composed
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        plugins = Plugins.instance()
        sweeper = plugins.instantiate_sweeper(hydra_context=self._context, task_function=task, config=config)
        typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        return sweeper.sweep(typed)

    def groups(self) -> list[str]:
        return [name for name in self.loader.list_groups("") if name != "hydra"]

    def choices(self, group: str) -> list[str]:
        """The names of a group's files, those in folders below it included (`lecture/capacity`)."""
        options = self.loader.get_group_options
        found = [name for name in options(group, ObjectType.CONFIG) if not name.startswith("_")]
        for folder in options(group, ObjectType.GROUP):
            found += [f"{folder}/{name}" for name in self.choices(f"{group}/{folder}")]
        return found

    def _refuse_what_hydra_accepts(self, overrides: Iterable[Override], multirun: bool) -> None:
        groups = self.groups()
        for override in overrides:
            line, key, value = override.input_line, override.get_key_element(), override.value()
            plain = key.lstrip("+~")
            if not plain:
                raise UserError(f"{line}: an override is key=value or group=choice")
            if override.is_sweep_override():
                if not multirun and not plain.startswith("hydra."):
                    raise UserError(f"{line}: several values need -m (one run each); a list is written [a,b]")
                continue
            if override.is_delete() and not plain.startswith("hydra"):
                hint = self._choose(plain) if plain in groups else "set it, to null where that is allowed"
                raise UserError(f"{line}: nothing can be left out; {hint}")
            if plain in groups and not isinstance(value, str):
                raise UserError(f"{plain}={show(value)}: one of the choices is needed; {self._choose(plain)}")
            if plain in groups and str(value).split("/")[-1].startswith("_"):  # a fragment
                raise UserError(f"{line}: there is no such choice; {self._choose(plain, str(value))}")
            if value == {}:
                raise UserError(f"{line}: an empty block changes nothing; set its keys one by one")

    def _undecodable(self) -> str:
        """The file of --config-dir that is no text; Hydra does not say which."""
        for path in () if self.config_dir is None else sorted(Path(self.config_dir).rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return str(path)
        return "a config file"

    def _choose(self, group: str, typed: str = "") -> str:
        choices = self.choices(group)
        close = get_close_matches(typed.lower(), choices, n=1, cutoff=0.6)
        hint = f"did you mean {group}={close[0]}? " if close else ""
        return f"{hint}choices: {', '.join(choices)}"

    def _explain(self, overrides: list[Override], error: Exception, multirun: bool) -> str:
        """Finds the override at fault by adding them one by one: groups first, as Hydra does, then keys."""
        groups = self.groups()
        chosen = [o for o in overrides if o.get_key_element().lstrip("+~") in groups]
        typed = [o for o in overrides if o not in chosen]
        accepted: list[str] = []
        fault = self._fault(accepted, multirun)
        if fault is not None:
            return self._explain_files(fault)
        for override in (*chosen, *typed):
            line = override.input_line
            assert line is not None
            fault = self._fault([*accepted, line], multirun)
            if fault is not None:
                return self._explain_override(override, line, accepted, fault, multirun)
            accepted.append(line)
        return _first_lines(error)

    def _fault(self, overrides: list[str], multirun: bool) -> Exception | None:
        try:
            self._compose(overrides, multirun)
        except (HydraException, OmegaConfBaseException) as error:
            return error
        return None

    def _explain_files(self, fault: Exception) -> str:
        """What is wrong whatever is typed: the primary config, or what it pulls in."""
        if self.config_name != CONFIG_NAME and "primary config" in str(fault):
            return f"--config-name={self.config_name}: there is no such file in dlopt's folder or in --config-dir"
        return _first_lines(fault)

    def _explain_override(
        self, override: Override, line: str, accepted: list[str], fault: Exception, multirun: bool
    ) -> str:
        key, value = override.get_key_element().lstrip("+~"), override.value()
        if key in self.groups() and isinstance(value, str):
            if value not in self.choices(key):
                if key == "data" and Path(value).expanduser().is_dir():
                    return f"{line}: a folder is not a choice; for its images: data=image_folder data.root={value}"
                return f"{line}: there is no such choice; {self._choose(key, value)}"
            return f"{line}: {_first_lines(fault)}"
        if key.startswith("hydra/sweeper/"):
            return f"{line}: only a search has this; add hydra/sweeper=dlopt_optuna"
        if "/" in key or "@" in key:
            return f"{line}: {_first_lines(fault)}"
        parent, _, name = key.rpartition(".")
        config = self._compose(accepted, multirun)
        node = OmegaConf.select(config, parent, throw_on_resolution_failure=False) if parent else config
        if not isinstance(node, DictConfig):
            group, _, rest = key.partition(".")
            names = [str(each) for each in config]
            if group in names:
                return f"{line}: there is no key {key}, since {parent} holds a value and no keys"
            close = get_close_matches(group.lower(), names, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}.{rest}? " if close else ""
            return f"{line}: there is no group {group}; {hint}groups: {', '.join(self.groups())}"
        names = [str(each) for each in node if each not in ("_target_", "hydra")]
        if name in names:  # the key is there, but not those that its value brings
            is_new = "Could not override" in str(fault)
            hint = f"; a new key is typed with a plus sign: +{key}.KEY=VALUE" if is_new else ""
            return f"{line}: {_first_lines(fault)}{hint}"
        close = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
        prefix = f"{parent}." if parent else ""
        hint = f"did you mean {prefix}{close[0]}? " if close else "" if parent else _elsewhere(name, config)
        if not hint and parent in self.groups():
            hint = _with_key(parent, name, self.choices(parent))
        return f"{line}: there is no key {key}; {hint}allowed: {', '.join(names) or 'none'}"


def parse_overrides(lines: Iterable[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parses overrides; `loader` lists the choices for glob(*). Raises `UserError`."""
    parser = OverridesParser.create(loader)
    parsed = []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except HydraException:
            raise UserError(_explain_grammar(line)) from None
    return parsed


@contextlib.contextmanager
def _as_global(own: Any) -> Iterator[None]:
    """Lets Hydra's functions work on `own`. A notebook may use Hydra too: what it has initialized comes back."""
    state = GlobalHydra.instance()
    former, state.hydra = state.hydra, own
    try:
        yield
    finally:
        state.hydra = former


def _offer_plugins() -> None:
    """Registers dlopt's sweeper, launchers and config folders with Hydra.

    It builds plug-ins of the namespace package `hydra_plugins` only, which dlopt/hydra_plugins therefore joins.
    """
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no other plug-in is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    folder = str(Path(dlopt.__file__).with_name("hydra_plugins"))
    if folder not in namespace.__path__:
        namespace.__path__.append(folder)
    plugins = Plugins.instance()  # scans the namespace, unless it was used before in this process
    for each in importlib.import_module("hydra_plugins.dlopt_sweeps").PLUGINS:
        plugins.register(each)


def grid(overrides: Iterable[Override]) -> list[list[str]]:
    """Returns the overrides of each combination of the listed values, in the order of Hydra's own sweeper.

    Raises `UserError` for values that cannot be listed.
    """
    lists: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            lists[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            lists[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise UserError(f"{override.input_line}: a grid lists its values; hydra/sweeper=dlopt_optuna draws them")
    return [list(each) for each in itertools.product(*lists.values())]


def typed_folder(config: DictConfig, key: str, overrides: Iterable[str]) -> tuple[Path, bool]:
    """The folder that `key` (hydra.run.dir or hydra.sweep.dir) names, and whether it was typed. Raises `UserError`."""
    path = OmegaConf.select(config, key)
    if not path or not str(path).strip():
        raise UserError(f"{key}={'null' if path is None else path}: the path of a folder is needed")
    return Path(str(path)).absolute(), is_typed(key, overrides)


@contextlib.contextmanager
def job_environment(config: DictConfig, folder: Path) -> Iterator[None]:
    """Sets what the config says of the process: its logging, hydra.job.env_set, hydra.job.chdir. Raises `UserError`."""
    config.hydra.runtime.output_dir = str(folder)
    try:
        configure_log(config.hydra.job_logging, config.hydra.verbose)
    except (ValueError, OSError) as error:
        raise UserError(f"hydra.job_logging: {_first_lines(error)}") from None
    place = contextlib.chdir(folder) if config.hydra.job.chdir else contextlib.nullcontext()
    with env_override(config.hydra.job.env_set), place:
        yield


def _check_files(folder: Path) -> None:
    """Raises `UserError` for files that Hydra would find in `folder` and that are too large for a config."""
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    inner = [path for group in (*groups, "hydra") for path in (folder / group).rglob("*.yaml")]
    for path in sorted([*folder.glob("*.yaml"), *inner]):
        try:
            check_yaml(path)
        except ValueError as error:
            raise UserError(f"--config-dir={folder}: {path.relative_to(folder)} {error}") from None
        except OSError as error:
            raise UserError(f"--config-dir={folder}: {path.relative_to(folder)} cannot be read: {error}") from None


def _explain_grammar(line: str) -> str:
    """What is wrong with an override that Hydra's grammar does not take."""
    key, equals, value = line.partition("=")
    if not equals and not key.startswith("~"):
        return f"{line}: an override is key=value or group=choice"
    if not re.fullmatch(r"[+~]{0,2}[\w/-]+([.@][\w/-]+)*", key):
        return f"{line}: {key!r} is no name of a key or a group; an override is key=value or group=choice"
    quoted = f"{key}='{value}'"
    return f"{line!r}: this value has to be quoted for Hydra, once more than for the shell: {quoted!r}"


def _with_key(group: str, name: str, choices: Iterable[str]) -> str:
    """Which other choices of the group set a key of that name."""
    files = {choice: config_folder() / group / f"{choice}.yaml" for choice in choices}
    found = [
        choice for choice, path in files.items() if path.exists() and name in (yaml.safe_load(path.read_text()) or {})
    ]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"{group}={','.join(found[:8])}{more} {'has' if len(found) == 1 else 'have'} it; " if found else ""


def _elsewhere(name: str, config: DictConfig) -> str:
    """`lr=1` for `optimizer.lr=1`: a key of that name (or nearly) one level down."""
    places = {
        str(key): f"{group!s}.{key!s}"
        for group, node in config.items_ex(resolve=False)
        if isinstance(node, DictConfig) and group != "hydra"
        for key in node
        if key != "_target_"
    }
    close = get_close_matches(name.lower(), list(places), n=1, cutoff=0.6)
    return f"did you mean {places[close[0]]}? " if close else ""


def choices_of(config: DictConfig) -> dict[str, str]:
    """Maps each group to the name of the YAML file that was chosen."""
    chosen: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    return {str(k): str(v) for k, v in chosen.items() if not str(k).startswith("hydra") and v is not None}


def to_plain(config: DictConfig, typed: Iterable[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the task's part as plain dicts and lists: resolved, and as it may be saved.

    In the second, what came from the environment (`${oc.env:TOKEN}`) stays an interpolation. Raises `UserError` for
    `???`, for broken interpolations, and for `allow_packages` that a file sets instead of the command line (`typed`:
    its overrides; None: already checked).
    """
    raw: Any = OmegaConf.to_container(config, resolve=False)
    for key in ("hydra", "comparison"):  # the latter is for commands.compare alone
        raw.pop(key, None)
    task, values = OmegaConf.create(raw), dict(leaves(raw))
    for key, value in values.items():
        if value == "???":
            raise UserError(f"{key}: a value is needed; type {key}=...")
    try:
        plain: Any = OmegaConf.to_container(task, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        typed_value = values.get(key.replace("[", ".").replace("]", ""))
        raise UserError(f"{key}={typed_value}: {_first_lines(error)}") from None
    except RecursionError:
        raise UserError("an interpolation ${...} refers to itself") from None
    if typed is not None and plain.get("allow_packages") and not is_typed("allow_packages", typed):
        names = show(plain["allow_packages"])
        raise UserError(f"allow_packages={names}: stands in a config file; it has to be typed on the command line")
    return plain, _without(plain, raw, _from_environment(plain, raw))


def resolve_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves a saved config's interpolations of the environment again. Raises `UserError`."""
    return to_plain(OmegaConf.create(dict(saved)), None)[0]


def _from_environment(plain: Any, raw: Any) -> set[str]:
    """The texts that interpolations of the environment became."""
    if isinstance(raw, dict):
        return set().union(*(_from_environment(plain[key], value) for key, value in raw.items()))
    if isinstance(raw, list):
        return set().union(*(_from_environment(value, other) for value, other in zip(plain, raw, strict=True)))
    return {str(plain)} if isinstance(raw, str) and "${oc.env:" in raw and str(plain) else set()


def _without(plain: Any, raw: Any, secrets: set[str]) -> Any:
    """`plain`, with the interpolations of `raw` wherever their value holds one of the secrets."""
    if isinstance(raw, dict):
        return {key: _without(plain[key], value, secrets) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_without(value, other, secrets) for value, other in zip(plain, raw, strict=True)]
    hidden = isinstance(raw, str) and "${" in raw and any(secret in str(plain) for secret in secrets)
    return raw if hidden else plain


def is_typed(key: str, overrides: Iterable[str]) -> bool:
    """Whether the command line sets the key."""
    return any(line.lstrip("+").startswith(f"{key}=") for line in overrides)


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"(full_key|object_type|reference_type):?", line)]
    return "; ".join(lines[:3])
