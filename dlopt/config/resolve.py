"""Resolves composed and saved configs into plain dicts, and keeps secrets of the environment out of saved ones."""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, OmegaConfBaseException

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import flatten, is_below, load_yaml
from dlopt.basics.secrets import forget, has_hidden, is_secret_name, note, note_environment, redact, references
from dlopt.config.choices import Catalogue
from dlopt.config.keys import LABELS
from dlopt.config.older import of_today
from dlopt.config.overrides import key_of, value_of
from dlopt.config.packages import entries
from dlopt.config.parameters import show
from dlopt.config.schema import first_lines_of_data
from dlopt.config.trust import check_expansion, leaves
from dlopt.data.settings import REQUIRED

_TARGET = "._target_"
_IS_NAME = re.compile(r".*\._target_|name|data\.classes|hydra\.runtime\.choices\..*")
_RESOLVER = re.compile(r"\$\{\s*(?!oc\.env\s*:)[\w.]+\s*:")  # other than oc.env: it may change the value of a variable


def choices_of(config: DictConfig) -> dict[str, str]:
    """Maps each group to its choice: the name of a YAML file, or of the callable that an override puts in its place.

    Groups without a choice are left out.
    """
    choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    names = {str(k): str(v) for k, v in choices.items() if not str(k).startswith("hydra") and v is not None}
    typed = {key_of(line): value_of(line) for line in task_overrides(config) if key_of(line).endswith(_TARGET)}
    named = {key: str(value) for key, value in _set_by_recipe(config).items() if key.endswith(_TARGET)} | typed
    return names | {group: named[f"{group}{_TARGET}"] for group in names if f"{group}{_TARGET}" in named}


def task_overrides(config: DictConfig) -> list[str]:
    """Returns the overrides of a composed config as typed, except Hydra's.

    Read from the config as usual, `note=${x}` would be resolved.
    """
    lines: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return list(map(str, lines))


@contextlib.contextmanager
def interpolations_explained() -> Iterator[None]:
    """Turns the error of reading a value of a composed config that refers to a missing one into a `UserError`."""
    try:
        yield
    except InterpolationResolutionError as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{key}{explain_interpolation(error)}") from None


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """Says why a value cannot be resolved."""
    hint = "; for the text ${...} itself, write \\${...}" if isinstance(error, InterpolationKeyError) else ""
    return f"{first_lines(error)}{hint}"


def to_plain(config: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the config without Hydra's node as plain dicts and lists: (resolved, as it may be saved).

    The second keeps interpolations of environment variables (`${oc.env:TOKEN}`), so that no secret is written. Numbers
    (`${oc.decode:${oc.env:SLURM_ARRAY_TASK_ID}}`) are no secrets. Raises `UserError` for `???` and for broken
    interpolations.
    """
    raw: Any = OmegaConf.to_container(config, resolve=False)
    note_secrets(config, raw)
    task: DictConfig = pickle.loads(pickle.dumps(config))  # ten times faster than OmegaConf's own copy
    with open_dict(task):
        for key in ("hydra", *entries("dlopt.series")):  # `dlopt train` reads the keys of a series before
            raw.pop(key, None)
            task.pop(key, None)
    values = dict(leaves(raw))
    for key, value in values.items():
        if value == "???":
            group = key.partition(".")[0]
            choice = choices_of(config).get(group, "") if "hydra" in config else ""
            raise UserError(f"{key}: a value is required; set {key}=VALUE{_meaning(group, choice, key)}")
    lacking = [name for name in REQUIRED if name not in (raw.get("data") or REQUIRED)]
    if (
        lacking and "hydra" in config and (name := choices_of(config).get("data")) is not None
    ):  # not of `dlopt trajectory`
        data = raw["data"] if isinstance(raw["data"], dict) else {}
        own = train.get("_target_") if isinstance(train := data.get("train"), dict) else None
        begin = first_lines_of_data(own or data.get("_target_") or "mine.function", is_dataset=own is not None)
        raise UserError(f"data={name}: lacks {', '.join(lacking)}; {begin}")
    try:
        plain: Any = OmegaConf.to_container(task, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        unresolved = values.get(key.replace("[", ".").replace("]", ""))
        raise UserError(f"{key}={unresolved}: {explain_interpolation(error)}") from None
    except RecursionError:
        raise UserError("an interpolation ${...} refers to itself") from None
    for group, key in _former_keys(config):
        del plain[group][key], raw[group][key]
    hidden = _environment_values(plain, raw)
    _note_changed(plain, raw)
    return plain, {key: _redact(plain[key], raw[key], hidden, is_resolved=key not in LABELS) for key in raw}


def refuse_hidden(config: Mapping[str, Any], reason: str) -> None:
    """Raises `UserError` for a value whose URL has `***` in place of a password or token."""
    for key, value in flatten(config).items():
        if key not in LABELS and any(map(has_hidden, _texts(value))):
            raise UserError(f"{key}={redact(show(value))}: {reason}; set a variable, and type ${{oc.env:NAME}} for it")


def note_secrets(config: DictConfig, raw: Mapping[str, Any]) -> None:
    """Notes the secrets of a config (see `dlopt.basics.secrets`). `raw`: the config, unresolved, as a dict.

    What the config needs is no secret: its keys, choices, callables and name, and paths that are typed and exist. A
    secret with such a value is replaced only if the config refers to it.
    """
    flat = flatten(raw)
    texts = _texts(list(flat.values()))
    chosen = _texts([value for key, value in flat.items() if _IS_NAME.fullmatch(key)])
    public = [*flat, *(text for text in chosen if "${" not in text)]
    forget([*public, *(text for text in texts if os.path.sep in text and os.path.exists(text))])
    values = {name: os.environ.get(name, "") for text in texts for name in references(text)}
    note_environment(values, {name: value for name, value in values.items() if value not in "\n".join(public)})
    if "hydra" in config:
        note_environment(variables=job_variables(config))


def job_variables(config: DictConfig) -> dict[str, str]:
    """Returns the variables of the run's process (hydra.job.env_set). Raises `UserError`."""
    try:
        variables: Any = OmegaConf.to_container(config.hydra.job.env_set, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'hydra.job.env_set'}: {first_lines(error)}; set this variable") from None
    return {str(key): str(value) for key, value in variables.items()}


def _texts(value: Any) -> list[str]:
    """Returns the texts in nested mappings and lists."""
    if isinstance(value, Mapping):
        return _texts(list(value.values()))
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _note_changed(plain: Any, raw: Any) -> None:
    """Notes the values that other resolvers, such as oc.decode, make of environment variables."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            _note_changed(plain[key], value)
    elif isinstance(raw, list):
        for value, other in zip(plain, raw, strict=True):
            _note_changed(value, other)
    elif isinstance(raw, str) and _RESOLVER.search(raw) and (names := references(raw)):
        for text in _texts(plain) if any(name in os.environ for name in names) else []:
            note(text, raw, is_named=any(map(is_secret_name, names)))


def _meaning(group: str, choice: str, key: str) -> str:
    """Returns the comment of a key in the file of one of dlopt's choices, after a colon."""
    catalogue = Catalogue()
    keys = (each for found in catalogue.choices(group) if found.name == choice for each in catalogue.keys(found))
    return next((f": {each.comment}" for each in keys if each.name == key and each.comment), "")


def _set_by_recipe(config: DictConfig) -> dict[str, Any]:
    """Returns the keys below groups that the recipe (`experiment=...`) sets itself, with their values."""
    choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    name = choices.get("experiment")
    for source in config.hydra.runtime.config_sources if name is not None else ():
        path = os.path.join(source.path, "experiment", f"{name}.yaml")
        if os.path.isfile(path):
            return dict(leaves(load_yaml(Path(path)) or {}))
    return {}


def _former_keys(config: DictConfig) -> list[tuple[str, str]]:
    """Returns (group, key) of each key that belongs to a callable that `model._target_` replaces.

    The new callable inherits only the keys that all choices of the group have, and the keys that the command line
    and the recipe set with it. None in a saved config, which has no such keys.
    """
    typed = {*map(key_of, task_overrides(config)), *_set_by_recipe(config)} if "hydra" in config else set()
    names = sorted(key.removesuffix(_TARGET) for key in typed if key.endswith(_TARGET))
    if not names:
        return []
    from dlopt.config.run_config import GROUPS  # imports torch

    found = []
    for name in names:
        node, group = config.get(name), GROUPS.get(name)
        if group is not None and isinstance(node, DictConfig):
            kept = ("_target_", *group.common_names)
            keys = [str(key) for key in node if key not in kept]
            found += [(name, key) for key in keys if not any(is_below(each, (f"{name}.{key}",)) for each in typed)]
    return found


def show_config(config: DictConfig, part: str, package: str | None, *, resolve: bool) -> str:
    """Formats a composed config for --cfg: `part` is job, hydra or all; `package` selects a block. Raises `UserError`.

    The config of the job is the one that runs: without the keys of a replaced callable.
    """
    shown: DictConfig = pickle.loads(pickle.dumps(config))
    HydraConfig.instance().set_config(shown)
    with open_dict(shown):
        OmegaConf.set_readonly(shown.hydra, False)
        for group, key in _former_keys(config):
            del shown[group][key]
        for key in list(shown) if part != "all" else []:
            if (key == "hydra") != (part == "hydra"):
                del shown[key]
    selected = None if package == "_global_" else package
    node = shown if selected is None else OmegaConf.select(shown, selected)
    if node is None:
        raise UserError(f"--package={package}: no such block of the config")
    if not OmegaConf.is_config(node):
        return f"{node}\n"
    if resolve:
        OmegaConf.resolve(node)
    return ("" if selected is None else f"# @package {selected}\n") + OmegaConf.to_yaml(node)


def resolve_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves the environment variables in a saved config again, except in its labels. Raises `UserError`.

    The config may be one of an older version. `notify` is null, as only the command needs its variable.
    """
    saved = {key: None if key == "notify" else value for key, value in of_today(saved).items()}
    check_expansion({key: value for key, value in saved.items() if key not in LABELS})
    labels = {key: _escaped(saved[key]) for key in LABELS if key in saved}
    return to_plain(OmegaConf.create({**saved, **labels}))[0]


def _environment_values(plain: Any, raw: Any) -> set[str]:
    """Collects the resolved values of `${oc.env:...}` interpolations."""
    if isinstance(raw, dict):
        return set().union(*(_environment_values(plain[key], value) for key, value in raw.items()))
    if isinstance(raw, list):
        return set().union(*(_environment_values(value, other) for value, other in zip(plain, raw, strict=True)))
    is_secret = isinstance(raw, str) and "${oc.env:" in raw and not _is_number(plain) and str(plain)
    return {str(plain), *filter(None, _texts(plain))} if is_secret else set()


def _escaped(value: Any) -> Any:
    """Escapes the texts in a list, or one text, so that resolving them gives the same texts."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _redact(plain: Any, raw: Any, secrets: set[str], *, is_resolved: bool) -> Any:
    """Replaces resolved values by their interpolations in `raw` where they contain a secret.

    Interpolations of other keys count as well: `${data.root}` may refer to a key that holds a secret. A secret that is
    typed, or that a resolver of the user returns, becomes the interpolation of its variable. `is_resolved`: whether
    the value is resolved again when the config is read; what looks like an interpolation is then escaped.
    """
    if isinstance(raw, dict):
        return {key: _redact(plain[key], value, secrets, is_resolved=is_resolved) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_redact(*pair, secrets, is_resolved=is_resolved) for pair in zip(plain, raw, strict=True)]
    is_reference = isinstance(raw, str) and "${" in raw and not _is_number(plain)
    if is_reference and any(secret in str(plain) for secret in secrets):
        return redact(raw)  # the rest of the text may contain another secret
    if not isinstance(plain, str):
        return plain
    return redact(_escaped(plain) if is_resolved else plain)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def first_lines(error: Exception) -> str:
    """Returns the first lines of an error of Hydra or OmegaConf, without its technical ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    technical = r"(full_key|object_type|reference_type|Config search path):?|provider="
    lines = [line for line in lines if not re.match(technical, line)]
    return "; ".join(lines[:3])
