"""Composing with Hydra, as `dlopt train` will: the same search path, the same overrides, before Hydra's main runs."""

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dlopt
from dlopt.config.schema import show
from dlopt.errors import UserError

CONFIG_NAME = "train"


def config_folder() -> Path:
    """The shipped YAML files: inside the installed package, or beside it in a checkout."""
    installed = Path(dlopt.__file__).parent / "conf"
    return installed if installed.is_dir() else installed.parents[1] / "conf"


def parse_arguments(arguments: list[str]) -> Namespace:
    """Hydra's own command line: overrides and flags such as -m, --cfg, --config-dir."""
    parsed: Namespace = get_args_parser().parse_args(arguments)
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not offered, since it runs whatever a pickle file says")
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UserError(f"--config-dir={parsed.config_dir}: there is no such folder")
    return parsed


class Composer:
    """Composes the configs of one command line."""

    def __init__(self, config_name: str | None = None, config_dir: str | None = None) -> None:
        self.config_name = config_name or CONFIG_NAME
        setbase("1.3")
        path = create_config_search_path(str(config_folder()))
        if config_dir is not None:
            folder = f"file://{Path(config_dir).resolve()}"
            path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
        GlobalHydra.instance().clear()
        self.hydra = Hydra.create_main_hydra2(CONFIG_NAME, path)
        GlobalHydra.instance().clear()  # Hydra's own main wants to be the first

    def parse(self, overrides: list[str]) -> list[Override]:
        try:
            return OverridesParser.create(self.hydra.config_loader).parse_overrides(overrides)
        except HydraException as error:
            raise UserError(_first_lines(error)) from None

    def compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        """The composed config with Hydra's own node. Every way in which typed overrides can be wrong is explained."""
        parsed = self.parse(overrides)
        self._refuse_what_hydra_accepts(parsed, multirun)
        try:
            return self._compose(overrides, multirun)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(self._explain(parsed, error)) from None
        except yaml.YAMLError as error:
            raise UserError(f"a config file is no valid YAML: {' '.join(str(error).split())}") from None
        except (UnicodeDecodeError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"a config file cannot be read: {_first_lines(error)}") from None

    def _compose(self, overrides: list[str], multirun: bool = False) -> DictConfig:
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        return self.hydra.compose_config(
            config_name=self.config_name, overrides=overrides, run_mode=mode, from_shell=True
        )

    def groups(self) -> list[str]:
        listed = self.hydra.config_loader.list_groups("")
        return [name for name in listed if name != "hydra"]

    def choices(self, group: str) -> list[str]:
        found = self.hydra.config_loader.get_group_options(group, ObjectType.CONFIG)
        return [name for name in found if not name.startswith("_")]

    def _refuse_what_hydra_accepts(self, overrides: Iterable[Override], multirun: bool) -> None:
        groups = self.groups()
        for override in overrides:
            key, value = override.get_key_element(), override.value()
            plain = key.lstrip("+~")
            if override.is_sweep_override() and not multirun and not plain.startswith("hydra."):
                raise UserError(
                    f"{override.input_line}: several values need -m (one run each); a list is written [a,b]"
                )
            if plain in groups and not override.is_delete() and not override.is_sweep_override():
                if not isinstance(value, str):
                    raise UserError(f"{plain}={_show(value)}: {self._choose(plain)}")
            if plain in groups and override.is_delete():
                raise UserError(f"{override.input_line}: {self._choose(plain)}")
            if plain.startswith("hydra.") and plain.split(".")[-1] == "_target_":
                raise UserError(f"{override.input_line}: no _target_ of Hydra's own config can be set from here")

    def _choose(self, group: str, typed: str = "") -> str:
        choices = self.choices(group)
        close = get_close_matches(typed.lower(), choices, n=1, cutoff=0.5)
        hint = f"did you mean {group}={close[0]}? " if close else ""
        return f"{hint}choices: {', '.join(choices)}"

    def _explain(self, overrides: list[Override], error: Exception) -> str:
        """Finds the override at fault by adding them one by one: groups first, as Hydra does, then keys."""
        groups = self.groups()
        chosen = [o for o in overrides if o.get_key_element().lstrip("+~") in groups]
        typed = [o for o in overrides if o not in chosen]
        accepted: list[str] = []
        for override in (*chosen, *typed):
            line = override.input_line
            assert line is not None
            try:
                self._compose([*accepted, line])
            except (HydraException, OmegaConfBaseException) as fault:
                key = override.get_key_element().lstrip("+~")
                if key in groups and isinstance(override.value(), str):
                    if override.value() not in self.choices(key):
                        return f"{line}: there is no such choice; {self._choose(key, override.value())}"
                    return f"{line}: {_first_lines(fault)}"
                return self._explain_key(line, key, accepted, fault)
            accepted.append(line)
        return _first_lines(error)

    def _explain_key(self, line: str, key: str, accepted: list[str], fault: Exception) -> str:
        if "is not in struct" in str(fault) or "Could not override" in str(fault) or "Could not delete" in str(fault):
            parent, _, name = key.rpartition(".")
            try:
                node = OmegaConf.select(self._compose(accepted), parent) if parent else self._compose(accepted)
            except (HydraException, OmegaConfBaseException):
                node = None
            if isinstance(node, DictConfig):
                names = [str(each) for each in node if each not in ("_target_", "hydra")]
                close = get_close_matches(name, names, n=1, cutoff=0.6)
                prefix = f"{parent}." if parent else ""
                hint = f"did you mean {prefix}{close[0]}? " if close else _elsewhere(name, self._compose(accepted))
                return f"{line}: there is no key {key}; {hint}allowed: {', '.join(names)}"
        return f"{line}: {_first_lines(fault)}"


def _elsewhere(name: str, config: DictConfig) -> str:
    """`lr=1` for `optimizer.lr=1`: a key of that name (or nearly) one level down."""
    places = {
        key: f"{group}.{key}"
        for group, node in config.items_ex(resolve=False)
        if isinstance(node, DictConfig) and group != "hydra"
        for key in node
    }
    close = get_close_matches(name, list(places), n=1, cutoff=0.6)
    return f"did you mean {places[close[0]]}? " if close else ""


def to_plain(config: DictConfig, typed: Iterable[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task's part as plain dicts and lists: resolved, and as it may be saved.

    What came from the environment (`${oc.env:TOKEN}`) stays an interpolation in the second. Raises `UserError` for `???`,
    for broken interpolations, and for packages that a file instead of a person wants trusted (`typed`: the command
    line's overrides; None: that was seen to before).
    """
    task = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    missing = sorted(OmegaConf.missing_keys(task))
    if missing:
        raise UserError(f"{missing[0]}: a value is needed; type {missing[0]}=...")
    try:
        plain = OmegaConf.to_container(task, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', None)}: {_first_lines(error)}") from None
    except RecursionError:
        raise UserError("an interpolation ${...} refers to itself") from None
    raw = OmegaConf.to_container(task, resolve=False)
    assert isinstance(plain, dict) and isinstance(raw, dict)
    if typed is not None:
        _check_trust(plain, typed)
    return plain, _without(plain, raw, _from_environment(plain, raw))


def resolve_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with its interpolations of the environment resolved again. Raises `UserError`."""
    return to_plain(OmegaConf.create(dict(saved)), None)[0]


def _from_environment(plain: Any, raw: Any) -> set[str]:
    """The texts that interpolations of the environment became."""
    if isinstance(raw, dict):
        return set().union(*(_from_environment(plain[key], value) for key, value in raw.items()))
    if isinstance(raw, list):
        return set().union(*(_from_environment(value, other) for value, other in zip(plain, raw, strict=True)))
    return {str(plain)} if isinstance(raw, str) and "${oc.env:" in raw and str(plain) else set()


def _without(plain: Any, raw: Any, secrets: set[str]) -> Any:
    if isinstance(raw, dict):
        return {key: _without(plain[key], value, secrets) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_without(value, other, secrets) for value, other in zip(plain, raw, strict=True)]
    hidden = isinstance(raw, str) and "${" in raw and any(secret in str(plain) for secret in secrets)
    return raw if hidden else plain


def _check_trust(plain: Mapping[Any, Any], typed: Iterable[str]) -> None:
    """Which packages are trusted is for the person at the keyboard to say, not for a file."""
    if plain.get("allow_packages") and not any(line.startswith("allow_packages=") for line in typed):
        raise UserError(
            f"allow_packages={show(plain['allow_packages'])}: stands in a config file; it has to be typed on the command line"
        )


def _show(value: Any) -> str:
    return "null" if value is None else "true" if value is True else "false" if value is False else str(value)


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"(full_key|object_type|reference_type):?", line)]
    return "; ".join(lines[:3])
