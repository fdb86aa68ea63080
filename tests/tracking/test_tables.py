"""Tables at any width: whole words, nothing cut, and records where there is no room for columns."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from dlopt.tracking.layout import Fitted, plain_table


def shown(width: int) -> list[str]:
    table = plain_table("runs")
    table.add_column("run", overflow="fold")
    table.add_column("best epoch", justify="right")
    table.add_column("val accuracy", justify="right")
    table.add_column("note")
    table.add_row("outputs/train/2026-01-01_12-00-00", "12", Text("97.57 ± 1.47 %"), "")
    table.add_row("outputs/b", "3", Text("9.10 %"), "failed")
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(Fitted(table))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_with_room_every_cell_and_head_has_one_line() -> None:
    assert shown(90) == [
        "runs",
        "run                                 best epoch     val accuracy   note",
        "────────────────────────────────────────────────────────────────────────",
        "outputs/train/2026-01-01_12-00-00           12   97.57 ± 1.47 %",
        "outputs/b                                    3           9.10 %   failed",
    ]


def test_a_folding_column_gives_way_first() -> None:
    lines = shown(60)
    assert [line for line in lines if "97.57 ± 1.47 %" in line] and [line for line in lines if "failed" in line]
    assert all(len(line) <= 60 for line in lines)
    assert lines[4].split()[0] + lines[5].strip() == "outputs/train/2026-01-01_12-00-00"


@pytest.mark.parametrize("width", [20, 40, 45])
def test_without_room_each_row_becomes_a_record(width: int) -> None:
    lines = shown(width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    for figure in ("best epoch 12", "val accuracy 97.57 ± 1.47 %", "best epoch 3", "note failed"):
        assert figure in text
    assert "…" not in text and text.count("note") == 1  # an empty cell is left out


def test_columns_are_as_narrow_as_their_longest_word() -> None:
    widths = [width for width in range(20, 90) if len(shown(width)) in (5, 6, 7) and "best" in shown(width)[1]]
    assert min(widths) <= 55
