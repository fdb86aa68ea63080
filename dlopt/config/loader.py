"""A loader for Hydra that composes each selection of files once.

Hydra merges some thirty files key by key, which takes 0.06 s. A sweep composes every job twice, and most jobs select
the same files: they differ only in values, which this loader sets in a copy.

The only module that imports Hydra's internals. It extends Hydra's loader, whose public interface has no step between
merging the files and setting the values. Its folders of YAML files are parsed by libyaml, and only when a file has
changed.
"""

import copy
import functools
import itertools
import os
import pickle
import re
import stat
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import hydra.conf
import yaml
from hydra._internal import defaults_list as hydras_defaults
from hydra._internal.callbacks import Callbacks as Callbacks  # of `Composer`
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra._internal.utils import get_args_parser as get_args_parser  # of `parse_arguments`
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader  # no public name: the types of values, and no duplicate keys

reads: ContextVar["Reads | None"] = ContextVar("reads", default=None)
"""Notes the reads of the composition in progress, if any."""

_HEADER = 512  # characters in which Hydra looks for `# @package`
_RESOLVER = re.compile(r"\$\{[\w.]+:")  # ${oc.env:NAME}, ${now:...}; ${group} refers to another choice
_MOST = 200  # remembered configs, of some 30 kB each


class Reads:
    """What a config depends on: files and folders, with their state when they were read, and registered configs."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}
        self._stored = _stored()
        self.is_repeatable = True  # False: a defaults list depends on the environment or on the time

    def note(self, path: str) -> None:
        self._states.setdefault(path, _state(path))

    def are_current(self) -> bool:
        stored = _stored()
        is_same = len(stored) == len(self._stored) and all(a is b for a, b in zip(stored, self._stored, strict=True))
        return is_same and all(_state(path) == state for path, state in self._states.items())


def _stored() -> tuple[ConfigNode, ...]:
    """Returns the configs that packages have registered with Hydra."""

    def nodes(folder: dict[str, Any]) -> Iterator[ConfigNode]:
        for entry in folder.values():
            yield from nodes(entry) if isinstance(entry, dict) else (entry,)

    return tuple(nodes(ConfigStore.instance().repo))


def _state(path: str) -> Any:
    """Returns what differs when a file has changed; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


class YamlFolder(ConfigSource):
    """A folder of YAML files. Hydra's source for `file://` parses some thirty files for each config, with PyYAML."""

    @staticmethod
    def scheme() -> str:
        return "dlopt"

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._noted(self._normalize_file_name(config_path))
        state = _state(path)
        if state is None:
            raise ConfigLoadError(f"Config not found : {path}")
        header, content, is_repeatable = _load(path, state)
        if (noted := reads.get()) is not None and not is_repeatable:
            noted.is_repeatable = False
        package = self._get_header_dict(header)
        return ConfigResult(config=pickle.loads(content), path=self.full_path(), provider=self.provider, header=package)

    def available(self) -> bool:
        return self.is_group("")

    def is_group(self, config_path: str) -> bool:
        return os.path.isdir(self._noted(config_path))

    def is_config(self, config_path: str) -> bool:
        return os.path.isfile(self._noted(self._normalize_file_name(config_path)))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        names: set[str] = set()
        with os.scandir(os.path.join(self.path, config_path)) as entries:
            for entry in entries:
                if entry.is_dir():
                    if results_filter in (None, ObjectType.GROUP) and entry.name != "__pycache__":
                        names.add(entry.name)
                elif entry.name.endswith(".yaml") and results_filter in (None, ObjectType.CONFIG):
                    names.add(entry.name.removesuffix(".yaml"))
        return sorted(names)

    def _noted(self, name: str) -> str:
        path = os.path.join(self.path, name)
        if (noted := reads.get()) is not None:
            noted.note(path)
        return path


@functools.lru_cache(maxsize=1000)
def _load(path: str, state: object) -> tuple[str, bytes, bool]:
    """Returns the first characters of a file, its config, pickled, and whether its defaults list is always the same."""
    with open(path, encoding="utf-8") as file:
        header = file.read(_HEADER)
        file.seek(0)
        content = yaml.load(file, Loader=_loader())
    if not isinstance(content, list | dict | str | None):
        raise OSError(f"Invalid loaded object type: {type(content).__name__}")
    is_repeatable = not (isinstance(content, dict) and _RESOLVER.search(str(content.get("defaults"))))
    return header, pickle.dumps(OmegaConf.create({} if content is None else content)), is_repeatable


@functools.cache
def _loader() -> Any:
    """Returns OmegaConf's loader, with libyaml's parser where PyYAML has been built with it."""
    omegaconf_loader: Any = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return omegaconf_loader
    parser: Any = yaml.CSafeLoader.__bases__[0]  # libyaml's

    def initialize(self: Any, stream: Any) -> None:
        parser.__init__(self, stream)
        yaml.constructor.SafeConstructor.__init__(self)
        yaml.resolver.Resolver.__init__(self)

    return type("Loader", (parser, omegaconf_loader), {"__init__": initialize})


def parse_override(line: str, loader: ConfigLoader | None = None) -> Override:
    """Parses a line; every job of a sweep has nearly the same. `loader` provides the choices for glob(*)."""
    override = copy.copy(_parse(line))
    override.config_loader = loader
    return override


@functools.lru_cache(maxsize=1000)
def _parse(line: str) -> Override:
    [override] = OverridesParser.create().parse_overrides([line])
    return override


def _known_choices(overrides: Overrides, defaults_list: list[InputDefault], self_added: bool) -> DictConfig:
    """Returns the choices so far, for the entries of a defaults list that refer to them (`optimizer: ${model}`).

    Hydra also collects them for files without such entries, which takes a quarter of the time of a composition.
    """
    if not any(default.is_interpolation() for default in defaults_list):
        return OmegaConf.create({})
    return _create_known_choices(overrides, defaults_list, self_added)


_create_known_choices = hydras_defaults._create_interpolation_map
hydras_defaults._create_interpolation_map = _known_choices


class _Merged(ResultDefault):
    """An entry of a defaults list with the merged config of several files."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config_path="hydra")
        self.config = config


class _Repository(ConfigRepository):
    """Hydra's repository, whose copies share the registered configs: Hydra copies it for each composition (4 ms)."""

    def __init__(self, path: ConfigSearchPath) -> None:
        super().__init__(path)
        self._path = path

    def __deepcopy__(self, memo: object) -> "_Repository":
        return _Repository(self._path)


# By choices: a config, pickled, which is copied ten times faster than the config itself, and what it depends on.
_remembered: dict[tuple[Any, ...], tuple[bytes, Reads]] = {}
# By Hydra's own configs, each pickled: these configs merged, also pickled.
_merged: dict[tuple[bytes, ...], bytes] = {}


class RememberingLoader(ConfigLoaderImpl):
    """Hydra's loader, with a memory of the configs that choices alone determine."""

    @classmethod
    def extend(cls, loader: ConfigLoader) -> "RememberingLoader":
        """Returns a loader for the same search path, whose folders notice changed files."""
        path = loader.get_search_path()
        for element in path.get_path():
            folder = element.path.removeprefix("file://")
            if folder == "pkg://hydra.conf":
                folder = str(Path(hydra.conf.__file__).parent)
            if "://" not in folder:
                element.path = f"{YamlFolder.scheme()}://{os.path.abspath(folder)}"
        return cls(path)

    def __init__(self, path: ConfigSearchPath) -> None:
        super().__init__(path)
        self.repository = _Repository(path)

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        compose = functools.partial(super()._load_configuration_impl, config_name, run_mode=run_mode)
        parsed = [parse_override(line) for line in overrides]
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        choices = [str(override.input_line) for override in parsed if self._is_choice(override)]
        values = [each for each in parsed if not each.is_sweep_override() and not self._is_choice(each)]
        # Other folders may have other groups and choices.
        is_elsewhere = any(override.key_or_group == "hydra.searchpath" for override in values)
        config = None if is_elsewhere else self._recall((config_name, *choices, run_mode), lambda: compose(choices))
        if config is None or config.hydra.searchpath:
            return compose(overrides, validate_sweep_overrides=False)
        # As in the method of the base class, which has seen the choices only.
        try:
            self._apply_overrides_to_config(values, config)
        except ValueError as error:  # a key inside a list, which takes indices: tracking.wandb=true
            raise ConfigCompositionException(str(error)) from error
        of_hydra = [override for override in parsed if override.is_hydra_override()]
        of_task = [override for override in parsed if not override.is_hydra_override()]
        config.hydra.overrides.hydra.extend([override.input_line for override in of_hydra])
        config.hydra.overrides.task.extend([override.input_line for override in of_task])
        with open_dict(config.hydra):
            for name in config.hydra.job.env_copy:
                config.hydra.job.env_set[name] = os.environ[name]
        config.hydra.runtime.cwd = os.getcwd()
        # Without `resume`, so that a run or sweep whose folder has this name finds it again.
        named = [override for override in of_task if override.get_key_element() != "resume"]
        config.hydra.job.override_dirname = get_overrides_dirname(named, **config.hydra.job.config.override_dirname)
        return config

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        """Merges Hydra's own files once: they come first, and are the same for almost all choices."""
        compose = super()._compose_config_from_defaults_list
        first = list(itertools.takewhile(lambda default: str(default.config_path).startswith("hydra/"), defaults))
        key = tuple(pickle.dumps((default.package, repo.load_config(str(default.config_path)))) for default in first)
        if key not in _merged:
            _merged[key] = pickle.dumps(compose(first, repo))
        return compose([_Merged(pickle.loads(_merged[key])), *defaults[len(first) :]], repo)

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        if isinstance(default, _Merged):
            return ConfigResult(config=default.config, path="", provider="", header={})
        return super()._load_single_config(default, repo)

    def get_group_options(
        self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG, *arguments: Any, **keywords: Any
    ) -> list[str]:
        """Lists the choices of a group, also for glob(*): without fragments, whose names start with an underscore."""
        if arguments or keywords:  # a config or overrides, which may extend the search path
            names = super().get_group_options(group_name, results_filter, *arguments, **keywords)
        else:  # without the base class's copy of the repository, which takes 4 ms
            names = self.repository.get_group_options(group_name, results_filter)
        return [name for name in names if not name.startswith("_")]

    def _is_choice(self, override: Override) -> bool:
        if override.is_sweep_override() or isinstance(override.value(), dict):
            return False
        return bool(self.repository.group_exists(override.key_or_group))

    def _recall(self, choices: tuple[Any, ...], compose: Callable[[], DictConfig]) -> DictConfig:
        """Returns a copy of the remembered config, which `compose` makes where there is none or a file has changed."""
        key = (*((element.provider, element.path) for element in self.config_search_path.get_path()), *choices)
        remembered = _remembered.pop(key, None)
        if remembered is None or not remembered[1].are_current():
            files = Reads()
            token = reads.set(files)
            try:
                config = compose()
            finally:
                reads.reset(token)
            config.hydra.overrides.hydra.clear()
            config.hydra.overrides.task.clear()
            if not files.is_repeatable:
                return config
            remembered = pickle.dumps(config), files
        _remembered[key] = remembered  # the newest one last
        if len(_remembered) > _MOST:
            del _remembered[next(iter(_remembered))]
        copied: DictConfig = pickle.loads(remembered[0])
        return copied
