"""What packages add: entry points of installed ones, and of those that come with dlopt."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest

from dlopt import lab
from dlopt.basics.roles import Role
from dlopt.commands.command_table import COMMANDS, every_command
from dlopt.config import packages
from dlopt.config.keys import role_of
from tests.support.line import run

INSTALLED = EntryPoints(
    EntryPoint(name, value, group)
    for name, value, group in (
        ("weights", "mine:weights", "dlopt.commands"),
        ("train", "mine:train", "dlopt.commands"),
        ("scaling", "mine:scaling", "dlopt.commands"),
        ("ladder_of_mine", "mine:climb", "dlopt.series"),
        ("notes", "mine:notes", "dlopt.reports"),
    )
)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packages, "_installed", lambda: INSTALLED)
    caches = (packages.entries, role_of)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_installed_packages_add_commands_and_replace_none(capsys: pytest.CaptureFixture[str]) -> None:
    commands = every_command()
    assert commands["weights"] == "mine:weights"
    assert commands["train"] == COMMANDS["train"]
    assert commands["scaling"] == lab.ENTRY_POINTS["dlopt.commands"]["scaling"]
    run("--help")
    text = capsys.readouterr().out
    assert "\n\nPackage mine:\n  weights" in text and "\nLaboratory:\n  benchmark " in text


def test_a_key_of_a_recipe_belongs_to_no_run() -> None:
    assert role_of("ladder_of_mine.rungs") is role_of("comparison") is Role.COMMAND
    assert packages.series_of({"ladder_of_mine": {}, "comparison": None}) == "ladder_of_mine"
    assert packages.series_of({"seed": 0, "comparison": None}) is None


def test_entries_of_the_laboratory_lead_to_functions() -> None:
    for group, entries in lab.ENTRY_POINTS.items():
        if group == "dlopt.renamed":
            assert {*entries.values()} <= every_command().keys() and not entries.keys() & every_command().keys()
            continue
        for value in entries.values():
            found = packages.function(value) if ":" in value else packages.importlib.import_module(value)
            assert callable(found) or isinstance(found, ModuleType), (group, value)


def test_the_laboratory_has_a_folder_of_configs() -> None:
    assert Path(str(lab.__file__)).parent.joinpath("conf").is_dir()
