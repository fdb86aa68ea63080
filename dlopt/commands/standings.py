"""What a sweep ends with: its leaderboard, or the jobs of which none is better in everything."""

from collections.abc import Sequence
from typing import IO

from dlopt.analysis.leaderboard import Leaderboard, Row
from dlopt.tracking import layout
from dlopt.tracking.console import open_console
from dlopt.tracking.layout import Fitted, plain_table

_ROWS = 12
_WIDTH = 130  # in a file


def show_leaderboard(board: Leaderboard, test: str, *, all_tests: bool = False, stream: IO[str] | None = None) -> None:
    """The best rows, with the difference of the others to the first; the test figure of the first only, unless asked:
    whoever looks at all of them and picks one has chosen on the test set."""
    rows = [row for row in board.rows if row.value is not None]
    output, console, terminal = open_console(stream)
    console.width = console.width if terminal else _WIDTH
    if not rows:
        return
    is_paired = any(row.difference is not None and row.difference.low is not None for row in rows)
    title = (
        f"{board.figure.replace('_', ' ')}, {'the higher' if board.direction == 'maximize' else 'the lower'} the better"
    )
    table = plain_table(title)
    table.add_column("")
    table.add_column("configuration", overflow="fold")
    table.add_column("mean ± deviation" if is_paired else board.figure.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    if is_paired:
        table.add_column("difference to the first\n(95 % confidence)", justify="right", no_wrap=True)
    table.add_column("test", justify="right")
    for place, row in enumerate(rows[:_ROWS], 1):
        tested = row.statistic(test) if place == 1 or all_tests else None
        cells = [str(place), row.label, _spread(board.figure, row), _runs(row)]
        cells += [_difference(board.figure, row)] if is_paired else []
        table.add_row(*cells, "" if tested is None else layout.figure(test, tested.mean))
    with console.capture() as capture:
        console.print(Fitted(table))
    output.write("\n" + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    if len(rows) > _ROWS:
        output.write(f"... and {len(rows) - _ROWS} more\n")
    output.flush()


def _spread(figure: str, row: Row) -> str:
    assert row.value is not None
    mean = layout.figure(figure, row.value.mean)
    return mean if row.value.std is None else f"{mean} ± {layout.figure(figure, row.value.std)}"


def _runs(row: Row) -> str:
    count = 0 if row.value is None else row.value.count
    return str(count) if count == len(row.runs) else f"{count} of {len(row.runs)}"


def _difference(figure: str, row: Row) -> str:
    found = row.difference
    if found is None:
        return ""
    mean = _signed(figure, found.mean)
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{_signed(figure, found.low)}, {_signed(figure, found.high)}]"


def _signed(figure: str, value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{layout.figure(figure, abs(value))}"


def show_front(rows: Sequence[tuple[str, Sequence[float]]], figures: Sequence[str]) -> None:
    """What no other job beats in every objective."""
    output, console, terminal = open_console()
    console.width = console.width if terminal else _WIDTH
    table = plain_table("no other job is better in all of these")
    table.add_column("configuration", overflow="fold")
    for figure in figures:
        table.add_column(figure.replace("_", " "), justify="right")
    for label, values in rows:
        table.add_row(label, *(layout.figure(figure, value) for figure, value in zip(figures, values, strict=True)))
    with console.capture() as capture:
        console.print(Fitted(table))
    output.write("\n" + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    output.flush()
