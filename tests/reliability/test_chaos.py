"""A short chaos campaign."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sends signals to process groups")
def test_no_data_is_lost_except_in_the_controls(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/chaos.py", "--short", "--only", "kills,controls,damage,signals,folders,calls"]
    done = subprocess.run([*command, "--json", str(tmp_path / "rows.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert sum(row["times"] for row in rows) > 50
    assert all(row["lost"] == (row["times"] if row["expected"] else 0) for row in rows)
