"""A command of another package, as the page on extending dlopt shows it."""

from pathlib import Path

import pytest

from tests.support.pages import block_after
from tests.support.theirs import dlopt

REPORTS = """
from dlopt.extend import Section, Table


def notes(records):
    return Section("Notes", Table(["runs"], [[str(len(records))]]), [f"notes on {len(records)} run"])
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/reports.py").write_text(REPORTS)
    (tmp_path / "mine/commands.py").write_text(block_after("docs/extending.md", "python", "`mine/commands.py`"))
    metadata = tmp_path / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        block_after("docs/extending.md", "toml", "## Add a command")
        .replace("project.entry-points.", "")
        .replace('"', "")
        + "[dlopt.reports]\nnotes = mine.reports:notes\n"
    )
    return tmp_path


def test_a_command_of_another_package(installed: Path) -> None:
    listed = dlopt(installed, "--help").stdout
    assert "Package mine:\n  weights      Print the largest parameters of a checkpoint, by their norms\n" in listed
    assert "  top=N            parameters to print (default: 5)" in dlopt(installed, "weights", "--help").stdout
    trained = dlopt(installed, "train", "model=mlp", "data.subset=40", "epochs=1", "hydra.run.dir=run", "tracking=[]")
    assert trained.returncode == 0, trained.stderr
    printed = dlopt(installed, "weights", "checkpoint=run", "top=2")
    assert printed.returncode == 0 and len(printed.stdout.splitlines()) == 2, printed.stderr
    refused = dlopt(installed, "weights", "checkpoint=run", "top=0")
    assert refused.returncode == 2 and "top=0" in refused.stderr and refused.stderr.count("\n") == 1
    reported = dlopt(installed, "report", "run", "format=html")
    assert "notes on 1 run\n" in reported.stdout, reported.stderr
    assert '<section id="notes"><h2>Notes</h2>' in (installed / "run/report/index.html").read_text()
