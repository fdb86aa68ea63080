"""Hydra's flags on the command line."""

import argparse
from typing import Any

import pytest

from dlopt.config.compose import parse_arguments, show_config
from dlopt.config.loader import get_args_parser


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


def test_lazy_help_of_hydra_is_accepted(checked_help: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((TypeError, ValueError)):
        get_args_parser()
    parsed = parse_arguments(["--cfg", "job", "model=mlp", "-m"])
    assert parsed.multirun and parsed.overrides == ["model=mlp"]
    show_config(parse_arguments(["--cfg", "job", "--package", "model", "model=mlp"]))
    assert "_target_: dlopt.models.mlp" in capsys.readouterr().out
    with pytest.raises((TypeError, ValueError)):
        get_args_parser()  # the check is there again
