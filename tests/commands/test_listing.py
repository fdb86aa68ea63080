import importlib
import sys
from pathlib import Path

import pytest

from dlopt.commands.command_table import every_command
from dlopt.commands.listing import sections, summary
from dlopt.commands.shared.text_columns import fitted

COMMANDS = every_command()


@pytest.mark.parametrize("path", COMMANDS.values(), ids=COMMANDS)
def test_the_line_of_a_command_is_the_first_of_its_help(path: str) -> None:
    module = importlib.import_module(path.partition(":")[0])
    assert summary(path) == module.USAGE.splitlines()[0] != ""


def test_a_section_per_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/inner").mkdir(parents=True)
    for name in ("__init__", "inner/__init__"):  # not imported
        (tmp_path / f"mine/{name}.py").write_text("raise RuntimeError")
    (tmp_path / "mine/inner/weights.py").write_text('USAGE = """Print weights\n\nUsage: ..."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    for name in [each for each in sys.modules if each.partition(".")[0] == "mine"]:  # of the tests of other pages
        monkeypatch.delitem(sys.modules, name)
    commands = {"train": COMMANDS["train"], "weights": "mine.inner.weights:run", "scaling": COMMANDS["scaling"]}
    commands |= {"gone": "mine.gone:run", "absent": "nowhere:run"}
    assert sections(commands).splitlines() == [
        "Commands:",
        "  train    Train a model, or run a sweep with -m",
        "",
        "Package mine:",
        "  weights  Print weights",
        "  gone",
        "",
        "Laboratory:",
        "  scaling  Benchmark parallel modes, the network or devices, or simulate a cluster",
        "",
        "Package nowhere:",
        "  absent",
    ]
    assert "mine" not in sys.modules


def test_lines_are_as_wide_as_the_terminal() -> None:
    lines = fitted(sections(COMMANDS), 60).splitlines()
    assert max(map(len, lines)) <= 60 and sum(line.startswith(" " * 15) for line in lines) > 3
