"""A folder of YAML files for Hydra, parsed by libyaml and only when a file has changed.

Equivalent to Hydra's source for `file://`, which parses some thirty files for each config with PyYAML's own parser.
"""

import functools
import os
import re
import stat
from contextvars import ContextVar
from typing import Any

import yaml
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader  # no public name: the types of values, and no duplicate keys

reads: ContextVar["Reads | None"] = ContextVar("reads", default=None)
"""Notes the reads of the composition in progress, if any."""

_HEADER = 512  # characters in which Hydra looks for `# @package`
_RESOLVER = re.compile(r"\$\{[\w.]+:")  # ${oc.env:NAME}, ${now:...}; ${group} refers to another choice


class Reads:
    """The files and folders that a config depends on, with their state when they were read."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}
        self.is_repeatable = True  # False: a defaults list depends on the environment or on the time

    def note(self, path: str) -> None:
        self._states.setdefault(path, _state(path))

    def are_current(self) -> bool:
        return all(_state(path) == state for path, state in self._states.items())


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
    @staticmethod
    def scheme() -> str:
        return "dlopt"

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._noted(self._normalize_file_name(config_path))
        state = _state(path)
        if state is None:
            raise ConfigLoadError(f"Config not found : {path}")
        header, content = _load(path, state)
        noted = reads.get()
        if noted is not None and isinstance(content, dict) and _RESOLVER.search(str(content.get("defaults"))):
            noted.is_repeatable = False
        config = OmegaConf.create() if content is None else OmegaConf.create(content)
        package = self._get_header_dict(header)
        return ConfigResult(config=config, path=self.full_path(), provider=self.provider, header=package)

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
def _load(path: str, state: object) -> tuple[str, Any]:
    """Returns the first characters of a file and its content, which the caller must not change."""
    with open(path, encoding="utf-8") as file:
        header = file.read(_HEADER)
        file.seek(0)
        content = yaml.load(file, Loader=_loader())
    if not isinstance(content, list | dict | str | None):
        raise OSError(f"Invalid loaded object type: {type(content).__name__}")
    return header, content


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
