"""Fixtures of the tests of sweeps."""

import os
from pathlib import Path

import pytest

from tests.sweeps.fake_slurm import WriteTool


@pytest.fixture
def write_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WriteTool:
    """Writes shell scripts that are found before programs of the machine, among them srun, which submitit looks for."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(name: str, lines: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)

    write("srun", "exit 1")
    return write
