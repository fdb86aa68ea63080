"""Composes configs with Hydra's public functions, and finds the override at fault if that fails."""

import contextlib
import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
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

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.folders import refuse_url
from dlopt.basics.interruption import signals_deferred
from dlopt.basics.names import Names
from dlopt.basics.plain_values import check_yaml, flatten, load_yaml
from dlopt.config import validation_sets
from dlopt.config.choices import CONFIG_NAME, config_folder, search, version_base
from dlopt.config.config_dir import ConfigDir
from dlopt.config.flags import register_plugins
from dlopt.config.mistakes import check_overrides, explain_override
from dlopt.config.overrides import group_of, is_hydra, is_set, key_of, parse_overrides, text_of
from dlopt.config.packages import entries
from dlopt.config.pretrained import pretrained_overrides
from dlopt.config.recall import has_remembered, recall, replace_choices
from dlopt.config.resolve import first_lines, note_secrets
from dlopt.config.synonyms import choice_names
from dlopt.config.trust import check_expansion, check_hydra
from dlopt.config.typed import (
    CommandLine,
    describe_launcher,
    file_options,
    guarded,
    guarded_of_override,
    refuse_untyped,
)

# AssertionError: Hydra asserts that an interpolated choice is a string. OSError: a name is too long for a file.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, AssertionError, OSError)


class Composer:
    """Composes configs of one `--config-name` and `--config-dir`, from memory where that is possible.

    `words`: of the command line, or the overrides that a program passes. Only what they set may name packages to trust,
    environment variables, launchers, ...: see `dlopt.config.typed`.
    """

    def __init__(
        self, config_name: str | None = None, config_dir: str | None = None, words: Iterable[str] = ()
    ) -> None:
        self.config_name = config_name or CONFIG_NAME
        self.config_dir = config_dir
        self.command_line = CommandLine(tuple(words))
        self.more_keys: set[str] = set()  # of the command, to suggest
        folder = None if config_dir is None else Path(config_dir)
        self._own_files = None if folder is None else ConfigDir(folder, self.config_name)
        if self._own_files is not None:
            self._refuse_search_path(self._own_files.primary)
        register_plugins()
        token = search.set(folder)
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

    def with_words(self, *words: str) -> "Composer":
        """Returns this composer with more words of the command line: of the command itself, or within another word."""
        composer = copy.copy(self)
        composer.command_line = self.command_line.adding(*words)
        return composer

    def compose(self, overrides: Iterable[str | Override], multirun: bool = False) -> DictConfig:
        """Composes a config, Hydra's own node included. Raises `UserError`, which explains the override at fault."""
        parsed = self._with_callables(self.parse(overrides))
        parsed = [_forced(each) if _has_new_keys(each) or _is_of_validation_set(each) else each for each in parsed]
        check_overrides(parsed, self, multirun)
        self.refuse_untyped(parsed)
        # A signal waits: Hydra's and OmegaConf's clean-up turns its exception into an AssertionError, or drops it.
        with signals_deferred():
            return self._composed(parsed, multirun)

    def parse(self, overrides: Iterable[str | Override]) -> list[Override]:
        """Parses overrides. Raises `UserError`, which names the group for a choice without one (`resnet20`)."""
        overrides = list(overrides)
        for each in overrides:
            if isinstance(each, str) and "=" not in each:
                groups = self._groups_of(each)
                if groups:
                    raise UserError(f"{each}: an override is group=choice; did you mean {groups[0]}={each}?")
        return parse_overrides(overrides, self)

    # -- what only the command line may set

    def refuse_untyped(self, overrides: Iterable[Override]) -> None:
        """Raises `UserError` for an override that sets what only the command line may, and is not of the command line.

        Hydra imports the packages of `hydra.searchpath` while it composes: overrides are checked before.
        """
        for override in overrides:
            for values in guarded_of_override(override):
                refuse_untyped(values, self.command_line)

    def check_origin(self, config: DictConfig) -> None:
        """Raises `UserError` for a value of a composed config that a file sets, but only the command line may."""
        raw: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        refuse_untyped(guarded(raw, installed), self.command_line)
        file_options(config, self.command_line, installed)

    def describe_launcher(self, config: DictConfig) -> str:
        """Returns who has set what of the launcher, for the header of a sweep; "" if nothing but the choice is set."""
        return describe_launcher(config, self.command_line, installed)

    def _refuse_search_path(self, primary: Path) -> None:
        """Raises `UserError` for a primary config of --config-dir with a search path."""
        found = None
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):  # Hydra explains them
            config = OmegaConf.create(check_yaml(primary).decode())  # read as Hydra reads it
            found = OmegaConf.select(config, "hydra.searchpath")
        if found is not None:
            paths = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
            refuse_untyped({"hydra.searchpath": paths}, self.command_line)

    # -- callables in place of choices

    def _with_callables(self, overrides: Iterable[Override]) -> list[Override]:
        """Replaces `optimizer=mine.optim.X` by the choice `custom` with this callable.

        The signature of the callable defines the keys of the group, so no key needs a plus sign.
        """
        chosen: list[Override] = []
        blocks: tuple[str, ...] = ()  # of the callables: optimizer.
        overrides = list(overrides)
        last = {override.key_or_group: number for number, override in enumerate(overrides)}
        for number, override in enumerate(overrides):
            key = self._callable_key(override)
            if key is None:
                chosen.append(override)
            elif number == last[override.key_or_group]:  # otherwise a later choice of the group replaces it
                chosen += self.parse([f"{override.key_or_group}=custom", f"{key}={override.value()}"])
                blocks = (*blocks, key.removesuffix("_target_"))
        replaced = []
        for override in chosen:
            is_of_callable = override.key_or_group.startswith(blocks) and not override.is_sweep_override()
            if is_of_callable and override.type is OverrideType.CHANGE:
                replaced.append(_forced(override))
            else:
                replaced.append(override)
        return replaced

    def _callable_key(self, override: Override) -> str | None:
        """Returns the key for the callable that an override names in place of a choice; None if it names none."""
        group, value = override.key_or_group, override.value()
        is_plain = override.type is OverrideType.CHANGE and override.package is None
        if not is_plain or not isinstance(value, str):
            return None
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) is None:  # pkg.module.Class
            return None
        if group == "data" and os.path.exists(value):  # data=patients.csv: explained with the unknown choices
            return None
        takes_callables = (config_folder() / group / "custom.yaml").is_file()
        if not takes_callables or value in self.choices(group):
            return None
        return "data.train._target_" if group == "data" else f"{group}._target_"

    # -- composing

    def _composed(self, parsed: list[Override], multirun: bool) -> DictConfig:
        """Composes and checks a config; turns errors into `UserError`."""
        config = None
        try:
            config = self._compose(parsed, multirun)
            raw: Any = OmegaConf.to_container(config, resolve=False)
            check_expansion(raw)
            note_secrets(config, raw)
            check_hydra(config, raw["hydra"])
            if self.config_dir is not None or raw["hydra"]["searchpath"]:  # else all files are dlopt's, or of packages
                self.check_origin(config)
            more = [] if multirun else pretrained_overrides(config, parsed)
            if more:
                config = self._compose([*parsed, *self.parse(more)])
            validation_sets.complete(config, self._data_of)
            return config
        except RecursionError:
            folder = "" if self.config_dir is None else f"--config-dir={self.config_dir}: "
            raise UserError(
                f"{folder}a config file is nested too deeply, or includes itself through its defaults list"
            ) from None
        except _COMPOSITION_ERRORS as error:
            found = self._explain(parsed, error, multirun) if config is None else UserError(first_lines(error))
            raise found from None
        except yaml.YAMLError as error:
            raise UserError(f"a config file is not valid YAML: {' '.join(str(error).split())}") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"a config file cannot be read: {first_lines(error)}") from None

    def _data_of(self, choice: str, key: str) -> DictConfig:
        """Returns the block of a choice of the group data with its default values. `key`: of the choice, for errors."""
        self.names("data", key).check(choice)
        return self._compose(self.parse([f"data={choice}"])).data

    def _compose(self, overrides: list[Override], multirun: bool = False) -> DictConfig:
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        config = self._recall(overrides, mode) or self._load(overrides, mode)
        form = config.hydra.job.config.override_dirname
        lines = []
        for override in overrides:
            # Without `resume`, so that a run or sweep whose folder has this name finds it again.
            is_named = not is_hydra(override) and key_of(override) != "resume"
            if is_named and override.key_or_group not in form.exclude_keys:
                lines.append(text_of(override))
        config.hydra.job.override_dirname = form.item_sep.join(sorted(lines)).replace("=", form.kv_sep)
        return config

    def _recall(self, overrides: list[Override], mode: RunMode) -> DictConfig | None:
        """Returns the config from memory; None if only Hydra can compose it, or explain what is wrong."""
        choices: list[Override] = []  # select files
        values: list[Override] = []
        for override in overrides:
            if override.is_sweep_override():
                continue
            if self._is_choice(override):
                choices.append(override)
            else:
                values.append(override)
        if self._own_files is not None:
            self._own_files.check_choices(choices)
        lines = tuple(map(text_of, choices))
        if self._are_shipped(choices):  # the mode concerns missing files only
            config = recall(values, lambda: self._load_or_replace(choices), (self.config_name, *lines))
        else:
            config = recall(values, lambda: self._load(choices, mode), (self, mode, *lines))
        if config is None:
            return None
        config.hydra.overrides.hydra = [text_of(each) for each in overrides if each.is_hydra_override()]
        config.hydra.overrides.task = [text_of(each) for each in overrides if not each.is_hydra_override()]
        return config

    def _are_shipped(self, choices: Iterable[Override]) -> bool:
        """Returns whether all choices are files of dlopt.

        Files of other folders may have defaults lists that depend on the environment or the time.
        """
        if self.config_dir is not None:
            return False
        return all((config_folder() / each.key_or_group / f"{each.value()}.yaml").is_file() for each in choices)

    def _load_or_replace(self, choices: list[Override]) -> DictConfig:
        """Composes dlopt's own choices; after the first time, by putting them into the default config if possible."""
        typed: dict[str, str] = {}
        for each in choices:
            is_plain = each.type is OverrideType.CHANGE and each.package is None
            if is_plain and not each.is_hydra_override():
                typed[each.key_or_group] = str(each.value())
        are_all_plain = 0 < len(typed) == len(choices)
        if self.config_name == CONFIG_NAME and are_all_plain and has_remembered():
            config = recall([], lambda: self._load([], RunMode.RUN), (CONFIG_NAME,))
            assert config is not None  # it has no search path
            if replace_choices(config, typed, config_folder() / f"{CONFIG_NAME}.yaml"):
                return config
        return self._load(choices, RunMode.RUN)

    def _load(self, overrides: list[Override], mode: RunMode) -> DictConfig:
        return self._loader.load_configuration(self.config_name, list(map(text_of, overrides)), mode, from_shell=False)

    # -- the override at fault

    def _explain(self, overrides: list[Override], error: Exception, multirun: bool) -> UserError:
        """Explains a composition error by the override at fault: the last of the shortest list that fails."""
        groups = self.groups()
        # Groups first, as Hydra applies them.
        choices = [each for each in overrides if each.key_or_group in groups]
        ordered = [*choices, *(each for each in overrides if each.key_or_group not in groups)]
        first = len(choices) if self._can_compose(choices, multirun) else 0
        config = DictConfig({})
        fault, count = error, len(ordered)  # unless fewer of them fail
        for length in range(first, len(ordered)):
            try:
                config = self._compose(ordered[:length], multirun)
            except _COMPOSITION_ERRORS as earlier:
                fault, count = earlier, length
                break
        if count > 0:
            wrong = ordered[count - 1]
            return explain_override(wrong, config, fault, self)
        if self.config_name != CONFIG_NAME and "primary config" in str(fault):
            return FileError(f"--config-name={self.config_name}: no such file in dlopt's folder or in --config-dir")
        return UserError(first_lines(fault))  # a config file is at fault

    def _can_compose(self, overrides: list[Override], multirun: bool) -> bool:
        try:
            self._compose(overrides, multirun)
        except _COMPOSITION_ERRORS:
            return False
        return True

    # -- groups and choices

    def groups(self) -> list[str]:
        return [name for name in self._listed("", ObjectType.GROUP) if name != "hydra"]

    def choices(self, group: str) -> list[str]:
        """Returns the names of a group's choices, including those in subfolders (`lecture/capacity`)."""
        names = self._options(group)
        for folder in self._listed(group, ObjectType.GROUP):
            names += [f"{folder}/{name}" for name in self.choices(f"{group}/{folder}")]
        return names

    def names(self, group: str, key: str = "") -> Names:
        """Returns the names of a group's choices. `key`: what is typed for the group, if not its name."""
        return choice_names(group, self.choices(group), key)

    def get_group_options(self, group: str, results_filter: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Lists the choices of a group for glob(*): without `custom`, which needs a callable."""
        return [name for name in self._options(group, results_filter) if name != "custom"]

    def _groups_of(self, choice: str) -> list[str]:
        """Returns the groups that have a choice, the recipes last."""
        groups = sorted(self.groups(), key=lambda group: group == "experiment")
        return [group for group in groups if choice in self.choices(group)]

    def _is_choice(self, override: Override) -> bool:
        parent, _, name = override.key_or_group.rpartition("/")
        is_group = name in self._listed(parent, ObjectType.GROUP)
        return is_group and not isinstance(override.value(), dict)

    def _options(self, group: str, results_filter: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Lists the files in the folder of a group without fragments, whose names start with an underscore."""
        return [name for name in self._listed(group, results_filter) if not name.startswith("_")]

    def _list(self, group: str, kind: ObjectType) -> list[str]:
        """Lists a folder of all sources, as Hydra's loader does, which copies all registered configs for each."""
        names: set[str] = set()
        for source in self._loader.get_sources():
            if source.is_group(group):
                names.update(source.list(group, kind))
        return sorted(names)


@functools.cache
def _installed_composer() -> Composer:
    return Composer()


def installed(block: str, choice: str) -> Iterator[Mapping[str, Any]]:
    """Yields the settings of a group of Hydra, `hydra.launcher`, as dlopt, Hydra and installed packages define them.

    Those of the choice; of a choice in the user's folder, which may include any of them, those of all choices.
    """
    group = block.replace(".", "/")
    if (shipped := config_folder() / group / f"{choice}.yaml").is_file():  # composing takes longer
        yield flatten(load_yaml(shipped), block)
        return
    composer = _installed_composer()
    names = composer.get_group_options(group)
    for name in [choice] if choice in names else names:
        with contextlib.suppress(UserError, *_COMPOSITION_ERRORS):
            config = composer._compose(composer.parse([f"{group}={name}"]))
            hydra: Any = OmegaConf.to_container(config.hydra, resolve=False, enum_to_str=True)
            yield flatten(hydra[group.partition("/")[2]], block)


def _has_new_keys(override: Override) -> bool:
    """Returns whether an override sets a key to a block with a callable, or a key of a series, which may be labels."""
    value = override.value()
    if not isinstance(value, dict) or override.type is not OverrideType.CHANGE:
        return False
    return "_target_" in value or group_of(override) in entries("dlopt.series")


def _is_of_validation_set(override: Override) -> bool:
    """Returns whether an override sets a key of a named validation set, which it may be the first to name."""
    is_key = override.key_or_group.startswith(f"{validation_sets.KEY}.")
    return is_key and override.type is OverrideType.CHANGE and not override.is_sweep_override()


def _forced(override: Override) -> Override:
    """Returns the override with `++`.

    A component given as a block then replaces one that is not set: data.test={_target_:mine.Dataset,count:17}.
    """
    return replace(override, type=OverrideType.FORCE_ADD, input_line=f"++{override.input_line}")


def typed_folder(config: DictConfig, key: str, overrides: Iterable[str | Override]) -> tuple[Path, bool]:
    """Returns the folder in `key` (hydra.run.dir or hydra.sweep.dir) and whether the command line sets it.

    Raises `UserError` for an empty path and for a URL.
    """
    path = OmegaConf.select(config, key)
    if not path or not str(path).strip():
        raise UserError(f"{key}={'null' if path is None else path}: must be the path of a folder")
    refuse_url(str(path), key)
    return Path(os.path.expanduser(str(path))).absolute(), is_set(key, overrides)
