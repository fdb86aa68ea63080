"""Config files from memory.

Hydra reads and parses some thirty files for each new selection of choices, which takes most of the 250 ms of a
composition. The files of dlopt and of Hydra do not change while a process runs, so each of them is read once.
"""

import copy
import pickle
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource

_results: dict[tuple[str, str], bytes] = {}  # (URL of the folder, path in it) -> pickled ConfigResult
_is_there: dict[tuple[str, str], bool] = {}


class RememberedSource(ConfigSource):
    """A source of Hydra that reads each file once in a process, for all composers.

    A file that is missing from a folder, but not from a package, is looked for again.
    """

    def __init__(self, source: ConfigSource) -> None:
        self.provider, self.path, self._source = source.provider, source.path, source
        self.scheme = source.scheme  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> "RememberedSource":
        return copy.copy(self)  # for each composition, of a source that does not change

    @staticmethod
    def scheme() -> str:
        raise NotImplementedError  # that of the wrapped source

    def load_config(self, config_path: str) -> ConfigResult:
        key = self.full_path(), config_path
        if key not in _results:
            _results[key] = pickle.dumps(self._source.load_config(config_path))
        result: ConfigResult = pickle.loads(_results[key])  # Hydra removes its defaults list from it
        return result

    def is_config(self, config_path: str) -> bool:
        key = self.full_path(), config_path
        if not _is_there.get(key) and not (key in _is_there and self.scheme() == "pkg"):
            _is_there[key] = self._source.is_config(config_path)
        return _is_there[key]

    def is_group(self, config_path: str) -> bool:
        return self._source.is_group(config_path)

    def available(self) -> bool:
        return self._source.available()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return self._source.list(config_path, results_filter)
