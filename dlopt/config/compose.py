"""Composes configs with Hydra's public functions, and explains errors in overrides."""

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.basics.errors import UserError, shorten, suggest
from dlopt.basics.folders import refuse_url
from dlopt.basics.interruption import signals_deferred
from dlopt.basics.plain_values import check_yaml, flatten, is_below, join
from dlopt.config.choices import CONFIG_NAME, Catalogue, Choice, config_folder, config_folders, search, version_base
from dlopt.config.flags import register_plugins
from dlopt.config.overrides import (
    SWEEP_WORDS,
    group_of,
    is_hydra,
    is_typed,
    key_of,
    parse_overrides,
    text_of,
    value_of,
)
from dlopt.config.packages import entries
from dlopt.config.pretrained import pretrained_overrides
from dlopt.config.recall import has_remembered, recall, replace_choices
from dlopt.config.resolve import first_lines, note_secrets
from dlopt.config.schema import show
from dlopt.config.synonyms import for_choice, for_key
from dlopt.config.trust import check_expansion, check_hydra

# AssertionError: Hydra asserts that an interpolated choice is a string. OSError: a name is too long for a file.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, AssertionError, OSError)


class Composer:
    """Composes configs of one `--config-name` and `--config-dir`, from memory where that is possible."""

    def __init__(self, config_name: str | None = None, config_dir: str | None = None) -> None:
        self.config_name = config_name or CONFIG_NAME
        self.config_dir = config_dir
        self.more_keys: set[str] = set()  # of the command, to suggest
        self._checked: set[Path] = set()  # files of the folder
        if config_dir is not None:
            _check_reachable(Path(config_dir), _config_files(Path(config_dir)), self._checked)
        register_plugins()
        token = search.set(None if config_dir is None else Path(config_dir))
        state = GlobalHydra.instance()
        former, state.hydra = state.hydra, None  # a notebook may also use Hydra
        try:
            initialize_config_dir(str(config_folder()), job_name=CONFIG_NAME, **version_base())
            self._loader = state.config_loader()
        finally:
            state.hydra = former
            search.reset(token)
        self._listed = functools.cache(self._list)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of the command line that name config files."""
        name = () if self.config_name == CONFIG_NAME else (f"--config-name={self.config_name}",)
        return name if self.config_dir is None else (f"--config-dir={Path(self.config_dir).absolute()}", *name)

    def parse(self, overrides: Iterable[str | Override]) -> list[Override]:
        overrides = list(overrides)
        for each in overrides:
            if isinstance(each, str) and "=" not in each and (found := self._groups_of(each)):
                raise UserError(f"{each}: an override is group=choice; did you mean {found[0]}={each}?")
        return parse_overrides(overrides, self)

    def _groups_of(self, choice: str) -> list[str]:
        """Returns the groups that have a choice, the recipes last."""
        groups = sorted(self.groups(), key=lambda group: group == "experiment")
        return [group for group in groups if choice in self.choices(group)]

    def _list(self, group: str, kind: ObjectType) -> list[str]:
        """Lists a folder of all sources, as Hydra's loader does, which copies all registered configs for each."""
        sources = [source for source in self._loader.get_sources() if source.is_group(group)]
        return sorted({name for source in sources for name in source.list(group, kind)})

    def get_group_options(self, group: str, results_filter: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Lists the choices of a group for glob(*): without `custom`, which needs a callable."""
        return [name for name in self._options(group, results_filter) if name != "custom"]

    def compose(self, overrides: Iterable[str | Override], multirun: bool = False) -> DictConfig:
        """Composes a config, Hydra's own node included. Raises `UserError`, which explains the override at fault."""
        parsed = [_forced(each) if _has_new_keys(each) else each for each in self._with_callables(overrides)]
        self._check_overrides(parsed, multirun)
        # A signal waits: Hydra's and OmegaConf's clean-up turns its exception into an AssertionError, or drops it.
        with signals_deferred():
            return self._composed(parsed, multirun)

    def _with_callables(self, overrides: Iterable[str | Override]) -> list[Override]:
        """Parses overrides, with `optimizer=mine.optim.X` as the choice `custom` with this callable.

        The signature of the callable defines the keys of the group, so no key needs a plus sign.
        """
        parsed, blocks = [], tuple[str, ...]()
        for override in self.parse(overrides):
            if (key := self._callable_key(override)) is None:
                parsed.append(override)
                continue
            parsed += self.parse([f"{override.key_or_group}=custom", f"{key}={override.value()}"])
            blocks = (*blocks, key.removesuffix("_target_"))
        is_new = [each.key_or_group.startswith(blocks) and not each.is_sweep_override() for each in parsed]
        changes = [each.type is OverrideType.CHANGE for each in parsed]
        return [_forced(each) if all(of) else each for each, *of in zip(parsed, is_new, changes, strict=True)]

    def _callable_key(self, override: Override) -> str | None:
        """Returns the key for the callable that an override names in place of a choice; None if it names none."""
        group, value = override.key_or_group, override.value()
        is_name = isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value)
        is_plain = override.type is OverrideType.CHANGE and override.package is None
        if not (is_name and is_plain and (config_folder() / group / "custom.yaml").is_file()):
            return None
        if value in self.choices(group):
            return None
        return "data.train._target_" if group == "data" else f"{group}._target_"

    def _composed(self, parsed: list[Override], multirun: bool) -> DictConfig:
        config = None
        try:
            config = self._compose(parsed, multirun)
            raw: Any = OmegaConf.to_container(config, resolve=False)
            check_expansion(raw)
            note_secrets(config, raw)
            check_hydra(config, raw["hydra"], [text_of(each) for each in parsed])
            if not multirun and (more := pretrained_overrides(config, parsed)):
                config = self._compose([*parsed, *self.parse(more)])
            return config
        except RecursionError:
            folder = "" if self.config_dir is None else f"--config-dir={self.config_dir}: "
            raise UserError(
                f"{folder}a config file is nested too deeply, or includes itself through its defaults list"
            ) from None
        except _COMPOSITION_ERRORS as error:
            reason = self._explain(parsed, error, multirun) if config is None else first_lines(error)
            raise UserError(reason) from None
        except yaml.YAMLError as error:
            raise UserError(f"a config file is not valid YAML: {' '.join(str(error).split())}") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"a config file cannot be read: {first_lines(error)}") from None

    def _compose(self, overrides: list[Override], multirun: bool = False) -> DictConfig:
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        config = self._recall(overrides, mode) or self._load(overrides, mode)
        # Without `resume`, so that a run or sweep whose folder has this name finds it again.
        form = config.hydra.job.config.override_dirname
        named = [each for each in overrides if not is_hydra(each) and key_of(each) != "resume"]
        lines = sorted(text_of(each) for each in named if each.key_or_group not in form.exclude_keys)
        config.hydra.job.override_dirname = form.item_sep.join(lines).replace("=", form.kv_sep)
        return config

    def _load(self, overrides: list[Override], mode: RunMode) -> DictConfig:
        return self._loader.load_configuration(self.config_name, list(map(text_of, overrides)), mode, from_shell=False)

    def _recall(self, overrides: list[Override], mode: RunMode) -> DictConfig | None:
        """Returns the config from memory; None if only Hydra can compose it, or explain what is wrong."""
        set_now = [each for each in overrides if not each.is_sweep_override()]
        choices = [each for each in set_now if self._is_choice(each)]
        values = [each for each in set_now if not self._is_choice(each)]
        # Files of other folders may have defaults lists that depend on the environment or the time.
        files = [config_folder() / each.key_or_group / f"{each.value()}.yaml" for each in choices]
        if self.config_dir is not None:
            folder = Path(self.config_dir)
            typed = [(each.key_or_group, name) for each in choices for name in _names(each.value())]
            paths = [folder / group / f"{name}.yaml" for group, name in typed]
            unchecked = [path for path in paths if path not in self._checked and path.is_file()]
            _check_reachable(folder, unchecked, self._checked)
        lines = tuple(map(text_of, choices))
        if self.config_dir is None and all(file.is_file() for file in files):  # the mode concerns missing files only
            config = recall(values, lambda: self._load_or_replace(choices), (self.config_name, *lines))
        else:
            config = recall(values, lambda: self._load(choices, mode), (self, mode, *lines))
        if config is not None:
            config.hydra.overrides.hydra = [text_of(each) for each in overrides if each.is_hydra_override()]
            config.hydra.overrides.task = [text_of(each) for each in overrides if not each.is_hydra_override()]
        return config

    def _load_or_replace(self, choices: list[Override]) -> DictConfig:
        """Composes dlopt's own choices; after the first time, by putting them into the default config if possible."""
        plain = [each for each in choices if each.type is OverrideType.CHANGE and each.package is None]
        typed = {each.key_or_group: str(each.value()) for each in plain if not each.is_hydra_override()}
        if self.config_name == CONFIG_NAME and len(typed) == len(choices) > 0 and has_remembered():
            config = recall([], lambda: self._load([], RunMode.RUN), (CONFIG_NAME,))
            assert config is not None  # it has no search path
            if replace_choices(config, typed, config_folder() / f"{CONFIG_NAME}.yaml"):
                return config
        return self._load(choices, RunMode.RUN)

    def _is_choice(self, override: Override) -> bool:
        parent, _, name = override.key_or_group.rpartition("/")
        is_group = name in self._listed(parent, ObjectType.GROUP)
        return is_group and not isinstance(override.value(), dict)

    def groups(self) -> list[str]:
        return [name for name in self._listed("", ObjectType.GROUP) if name != "hydra"]

    def choices(self, group: str) -> list[str]:
        """Returns the names of a group's choices, including those in subfolders (`lecture/capacity`)."""
        names = self._options(group)
        for folder in self._listed(group, ObjectType.GROUP):
            names += [f"{folder}/{name}" for name in self.choices(f"{group}/{folder}")]
        return names

    def _options(self, group: str, results_filter: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Lists the files in the folder of a group without fragments, whose names start with an underscore."""
        return [name for name in self._listed(group, results_filter) if not name.startswith("_")]

    def _check_overrides(self, overrides: Iterable[Override], multirun: bool) -> None:
        """Raises `UserError` for overrides that Hydra accepts but that are certainly mistakes."""
        groups = self.groups()
        for override in overrides:
            line, key, value = text_of(override), override.key_or_group, override.value()
            if not key:
                raise UserError(f"{line}: an override is key=value or group=choice")
            if key in SWEEP_WORDS:
                raise UserError(f"{line}: only sweeps have this word; add -m to `dlopt train`")
            if override.is_sweep_override():
                if key.startswith(("hydra.", "hydra/")):
                    raise UserError(f"{line}: one value is needed, for all jobs; write a list as [a,b]")
                if not multirun:
                    raise UserError(f"{line}: several values need -m (one run each); for a list, write [a,b]")
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

    def _suggest(self, group: str, choice: str = "") -> str:
        names = self.choices(group)
        if group.startswith("hydra/"):
            names = [name for name in names if "/" not in name]  # hydra/sweeper/sampler is a separate group
        if inside := [name for name in names if choice and name.startswith(f"{choice}/")]:
            example = f"{group}={inside[0]}"
            return f"a folder of choices, such as {example}; `dlopt options '{group}={choice}/*'` lists them"
        hint = for_choice(group, choice)
        return hint or suggest(choice, names, f"dlopt options {group}", prefix=f"{group}=", title="choices")

    def _explain(self, overrides: list[Override], error: Exception, multirun: bool) -> str:
        """Explains a composition error by the override at fault: the last of the shortest list that fails."""
        groups = self.groups()
        # Groups first, as Hydra applies them.
        ordered = sorted(overrides, key=lambda override: override.key_or_group not in groups)
        choices = [each for each in ordered if each.key_or_group in groups]
        config, count, fault = DictConfig({}), 0, error
        try:
            for count in range(len(choices) if self._can_compose(choices, multirun) else 0, len(ordered)):
                config = self._compose(ordered[:count], multirun)
            count = len(ordered)  # all of them fail with `error`
        except _COMPOSITION_ERRORS as earlier:
            fault = earlier
        if count > 0:
            wrong = ordered[count - 1]
            return f"{text_of(wrong)}: {self._explain_override(wrong, config, fault)}"
        if self.config_name != CONFIG_NAME and "primary config" in str(fault):
            return f"--config-name={self.config_name}: no such file in dlopt's folder or in --config-dir"
        return first_lines(fault)  # a config file is at fault

    def _can_compose(self, overrides: list[Override], multirun: bool) -> bool:
        try:
            self._compose(overrides, multirun)
        except _COMPOSITION_ERRORS:
            return False
        return True

    def _explain_override(self, override: Override, config: DictConfig, error: Exception) -> str:
        """Describes the error in `override`; `config` is composed without it."""
        line, key, value = text_of(override), override.key_or_group, override.value()
        typed = value_of(override)
        choices = self.choices(key) if key in self.groups() or key.startswith("hydra/") else []
        if choices and value not in choices:
            if key == "data" and os.path.isdir(os.path.expanduser(str(value))):
                return f"a folder is not a choice; for its images: data=image_folder data.root={value}"
            return f"unknown choice; {self._suggest(key, str(value))}"
        if key.startswith("hydra/sweeper/"):
            return "only searches have this group; add hydra/sweeper=dlopt_optuna"
        if "/" in key or "@" in key or choices:
            return first_lines(error)
        parent, name, node = key, "", None
        while node is None:  # explain the first part of the key that does not exist
            parent, _, name = parent.rpartition(".")
            node = OmegaConf.select(config, parent, throw_on_resolution_failure=False) if parent else config
        full = join(parent, name)
        rest = key.removeprefix(full)
        if not isinstance(node, DictConfig) or (rest and name in node):
            return f"unknown key; {full if isinstance(node, DictConfig) else parent} holds a value, not keys"
        names = [str(each) for each in node if each not in ("_target_", "hydra")]
        if name in names and override.is_add():
            return f"this key exists; set it without the plus sign: {key}={typed}"
        block = OmegaConf.select(config, full, throw_on_resolution_failure=False)
        if not rest and isinstance(block, DictConfig):
            keys = ", ".join(str(each) for each in block if each != "_target_")
            return f"this is a block of keys ({keys}); set them one by one"
        if name in names:  # the key exists; a key inside its value does not
            is_new = "Could not override" in str(error)
            hint = f"; add a new key with a plus sign: +{key}.KEY=VALUE" if is_new else ""
            return f"{first_lines(error)}{hint}"
        last = key.rpartition(".")[2] if rest and name.lower() not in names else key  # trainer.max_epochs
        if hint := for_key(last, typed):
            return f"unknown key; {hint}"
        return f"unknown key; {self._suggest_keys(line, config, node, parent, name, rest)}"

    def _suggest_keys(self, line: str, config: DictConfig, node: DictConfig, parent: str, name: str, rest: str) -> str:
        """Says what to type for an unknown key `parent.name` followed by `rest`; `node` is the block at `parent`."""
        names = [str(each) for each in node if each not in ("_target_", "hydra")]
        names += [] if parent else sorted(self.more_keys)
        keys = {each: f"{join(parent, each)}{rest}" for each in names}
        if not parent:  # optimizer.lr for lrr
            inner = [each.split(".") for each in flatten(OmegaConf.to_container(config, resolve=False))]
            in_group = [path for path in inner if len(path) == 2 and path[0] != "hydra" and path[1] != "_target_"]
            keys = {path[1]: ".".join(path) for path in in_group} | keys
        close = get_close_matches(name.lower(), keys, n=1, cutoff=0.6)
        hint = f"did you mean {keys[close[0]]}? " if close else ""
        is_group, target = parent in self.groups(), str(node.get("_target_"))
        of_all = {
            key.name for key in Catalogue().keys(Choice("", CONFIG_NAME, config_folder() / f"{CONFIG_NAME}.yaml"))
        }
        names.sort(key=lambda each: is_group and join(parent, each) in of_all)  # the choice's own keys first
        if is_group and not is_below(target, ("dlopt", "torch", "torchvision", "None")):
            return f"{hint}the file of this choice does not list it: add it there, or type +{line}"
        if is_group:
            hint = _suggest_choices(parent, name, self.config_dir) or hint
        if names:
            command = f"dlopt options {parent}" if is_group else "dlopt train --help"
            return f"{hint}allowed: {shorten(name, names, command)}"
        if target.startswith("dlopt."):
            return f"{hint}the chosen {parent} has no keys"
        return f"add a new key with a plus sign: +{line}"


def typed_folder(config: DictConfig, key: str, overrides: Iterable[str | Override]) -> tuple[Path, bool]:
    """Returns the folder in `key` (hydra.run.dir or hydra.sweep.dir) and whether the command line sets it.

    Raises `UserError` for an empty path and for a URL.
    """
    path = OmegaConf.select(config, key)
    if not path or not str(path).strip():
        raise UserError(f"{key}={'null' if path is None else path}: must be the path of a folder")
    refuse_url(str(path), key)
    return Path(os.path.expanduser(str(path))).absolute(), is_typed(key, overrides)


def _has_new_keys(override: Override) -> bool:
    """Returns whether an override sets a key to a block with a callable, or a key of a series, which may be labels."""
    value = override.value()
    if not isinstance(value, dict) or override.type is not OverrideType.CHANGE:
        return False
    return "_target_" in value or group_of(override) in entries("dlopt.series")


def _forced(override: Override) -> Override:
    """Returns the override with `++`.

    A component given as a block then replaces one that is not set: data.test={_target_:mine.Dataset,count:17}.
    """
    return replace(override, type=OverrideType.FORCE_ADD, input_line=f"++{override.input_line}")


def _config_files(folder: Path) -> list[Path]:
    """Returns the YAML files below `folder` that Hydra lists: at the top and in the groups' folders."""
    groups = {path.name for place in config_folders() for path in place.iterdir() if path.is_dir()}
    group_files = [path for group in groups for path in (folder / group).rglob("*.yaml")]
    return sorted([*folder.glob("*.yaml"), *group_files], reverse=True)  # the last one is checked first


def _check_reachable(folder: Path, waiting: list[Path], seen: set[Path]) -> None:
    """Raises `UserError` for files of `folder` that are too large for a config, or hidden by one of dlopt's.

    Checks the waiting files, and those to which their defaults lists lead; adds them to `seen`.
    """
    seen.update(waiting)
    while waiting:
        path = waiting.pop()
        name = os.path.relpath(path, folder)
        shown = f"--config-dir={folder}: {name}"
        try:
            text = check_yaml(path).decode()
        except (ValueError, OSError) as error:  # includes UnicodeDecodeError
            reason = f"cannot be read: {error}" if isinstance(error, OSError) else error
            raise UserError(f"{shown} {reason}") from None
        for entry in _defaults(text):
            if ".." in entry.split("/"):
                raise UserError(f"{shown} has {entry!r} in its defaults list; move this file into the folder")
            place = folder if entry.startswith("/") else path.parent
            other = place / f"{entry.strip('/').removesuffix('.yaml')}.yaml"
            if other not in seen and other.is_file():
                seen.add(other)
                waiting.append(other)
        shipped = [place / name for place in config_folders() if (place / name).is_file()]
        if shipped and shipped[0].read_bytes() != path.read_bytes():  # Hydra would use dlopt's
            raise UserError(f"{shown} is also a file of dlopt; rename it")


def _names(value: Any) -> list[str]:
    """Returns the names of a choice, which may be several: `+group=[a,b]`."""
    return [str(each) for each in (value if isinstance(value, list) else [value])]


def _defaults(text: str) -> list[str]:
    """Returns the configs that the defaults list of a file names, as paths: optimizer/adamw, /optimizer/adamw."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:  # Hydra reports it, if it reads the file
        return []
    entries = content.get("defaults") if isinstance(content, dict) else None
    found = []
    for entry in entries if isinstance(entries, list) else []:
        for key, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            group = (str(key).split() or [""])[-1].partition("@")[0] if key else ""  # "override /optimizer@teacher"
            names = [name.partition("@")[0] for name in _names(value)]
            found += [f"{group}/{name}" if group else name for name in names]
    return found


def _suggest_choices(group: str, name: str, config_dir: str | None) -> str:
    """Names the choices of the group that have the key `name`."""
    catalogue = Catalogue(config_dir)
    key = f"{group.replace('/', '.')}.{name}"
    choices = catalogue.choices(group)
    having = [choice.name for choice in choices if any(each.name == key for each in catalogue.keys(choice))]
    more = f" and {len(having) - 8} more" if len(having) > 8 else ""
    return f"{group}={','.join(having[:8])}{more} {'has' if len(having) == 1 else 'have'} it; " if having else ""
