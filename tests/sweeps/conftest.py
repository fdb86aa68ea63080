"""Fixtures of the tests of sweeps."""

import os
from pathlib import Path

import pytest

from tests.sweeps.fake_slurm import WriteTool


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the list of submitted sweeps out of the user's home, and PYTHONPATH out of what a submission prints."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def write_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WriteTool:
    """Writes shell scripts that are found before programs of the machine."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def write(name: str, lines: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tools / name).chmod(0o755)

    return write
