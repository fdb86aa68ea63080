"""Hydra's flags on the command line."""

import argparse
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.flags import _parser, parse_arguments, show_info


@pytest.fixture
def checked_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the help of a flag when it is added, as argparse does from Python 3.14 on."""
    container: Any = argparse._ActionsContainer
    add = container.add_argument

    def add_argument(self: Any, *names: str, **keys: Any) -> argparse.Action:
        action: argparse.Action = add(self, *names, **keys)
        self._check_help(action)
        return action

    def check_help(self: Any, action: argparse.Action) -> None:
        if action.help:
            assert "%" not in action.help  # a TypeError where it is not a string

    monkeypatch.setattr(container, "add_argument", add_argument)
    monkeypatch.setattr(container, "_check_help", check_help, raising=False)


def test_hydra_main_accepts_its_lazy_help(checked_help: None, capsys: pytest.CaptureFixture[str]) -> None:
    show_info(parse_arguments(["--info", "defaults", "model=mlp"]))
    assert "model/mlp" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    with pytest.raises((TypeError, ValueError)):
        parser.add_argument("--lazy", help=object())  # type: ignore[arg-type]  # the check is there again


def test_flags_are_hydras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = set[str]()
    add = argparse.ArgumentParser.add_argument

    def note(self: Any, *names: str, **keys: Any) -> argparse.Action:
        flags.update(name for name in names if name.startswith("-"))
        return add(self, *names, **keys)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", note)
    show_info(parse_arguments(["--info", "searchpath"]))
    own = {name for action in _parser()._actions for name in action.option_strings}
    assert flags == own


def test_parses_flags_between_overrides() -> None:
    parsed = parse_arguments(["--cfg", "job", "model=mlp", "-m", "name=größe"])
    assert parsed.multirun and parsed.cfg == "job" and parsed.overrides == ["model=mlp", "name='größe'"]


def test_flags_take_dashes_and_underscores() -> None:
    for flag in ("--dry-run", "--dry_run"):
        assert parse_arguments(["model=mlp", flag]).overrides == ["dry_run=true", "model=mlp"][::-1]
    for flag in ("--config-name", "--config_name"):
        assert parse_arguments([f"{flag}=trajectory"]).config_name == "trajectory"
        assert parse_arguments([flag, "trajectory"]).config_name == "trajectory"
    for words in (["--dry-run=true"], ["--dry-run", "false"], ["--epochs"]):  # keys have no dashes
        with pytest.raises(UserError, match="without dashes"):
            parse_arguments(words)
