"""Hydra's view of the folders that installed packages bring along."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dlopt.config.extensions import extensions


class Extensions(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for extension in extensions():
            search_path.append(f"dlopt-{extension.package}", f"file://{extension.folder}")
