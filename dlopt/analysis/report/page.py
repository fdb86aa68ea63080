"""The report as files for a browser: one page that needs nothing else, a table for spreadsheets, and a local server.

The page holds its styles, script and data. What comes from run folders is JSON in an element that is no script, and the
script only ever sets it as text. The page's content security policy allows only the inline script and style, by hash.

Test metrics are given for the first row only, unless `test` is true: whoever sees all of them chooses by them.
"""

import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import dlopt
from dlopt.analysis.leaderboard import Statistic, direction_of, student_t
from dlopt.analysis.report.reading import ENDED, Record, brief, is_number, number_in, printable, text
from dlopt.analysis.report.table import (
    Configuration,
    Table,
    against_published,
    command,
    command_from,
    importance,
    name_of,
    sensitivities,
    short_key,
    time_to_target,
)
from dlopt.tracking.layout import short_path

SCRIPTS = ("base.js", "leaderboard.js", "curves.js", "plots.js", "main.js")
FIRST = ("val_accuracy", "val_loss", "train_accuracy", "train_loss")
_COST = ("epochs", "steps", "seconds", "parameters")
_TEST = ("test_accuracy", "test_loss")
_AXES = ("epoch", "step", "seconds")
_POINTS = 400_000  # metrics of curves in one page; beyond, curves are thinned
_FEWEST_POINTS = 12
_TYPES = {".html": "text/html; charset=utf-8", ".csv": "text/csv; charset=utf-8", ".png": "image/png"}  # served
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}


def page(data: Mapping[str, Any]) -> str:
    """The page that shows `data` (see `page_data`)."""
    folder = files("dlopt.analysis.report") / "page"
    style = (folder / "page.css").read_text(encoding="utf-8")
    parts = [(folder / name).read_text(encoding="utf-8") for name in SCRIPTS]
    script = "\n".join(["(() => {", '"use strict";', *parts, "})();"])
    values = {
        "title": html.escape(str(data["title"])),
        "style": style,
        "script": script,
        "style-hash": _digest(style),
        "script-hash": _digest(script),
        "data": _json(data),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w-]+)\}\}", lambda found: values[found[1]], template)


def _digest(text: str) -> str:
    """As a Content-Security-Policy names what stands inline."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Mapping[str, Any]) -> str:
    """JSON in which nothing can end the element that holds it."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- the table as plain values


def columns(table: Table) -> list[str]:
    """The metrics of a leaderboard: the one that ranks, validation and training, cost."""
    known = {name for record in table.records for name in record.metrics}
    names = [name for name in dict.fromkeys([table.by, *FIRST]) if name in known]
    # A cost that all runs share says nothing in a table; failed ones have come less far.
    ended = [record.metrics for record in table.records if record.status in ENDED]
    return names + [name for name in _COST if len({metrics.get(name) for metrics in ended}) > 1]


def test_columns(table: Table) -> list[str]:
    known = {name for record in table.records for name in record.metrics}
    return [name for name in _TEST if name in known]


def summary_csv(table: Table, target: float | None, *, test: bool) -> str:
    """A line per configuration. Figures as fractions; means, deviations (of a sample) and counts over seeds."""
    metrics, tests = columns(table), test_columns(table)
    head = ["rank", *table.keys, "runs", "ended", "failed"]
    head += [f"{name}{end}" for name in (*metrics, *tests) for end in ("", "_std")]
    head += ["difference", "difference_low", "difference_high", "pairs"]
    known = {id(each.row): each for each in against_published(table)}
    head += ["test_error_percent", "published_error_percent"] if known else []
    head += [] if target is None else ["target", "reached", "steps_to_target", "seconds_to_target"]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*head, "folders", "command"])
    for rank, row in enumerate(table.rows, 1):
        shown = metrics + (tests if test or rank == 1 else [])
        cells: list[Any] = [rank, *(text(row.values[key]) if key in row.values else "" for key in table.keys)]
        cells += [len(row.runs), sum(run.has_ended for run in row.row.runs), row.row.failed]
        for name in (*metrics, *tests):
            cells += _pair(row.statistic(name) if name in shown else None)
        gap = row.difference
        cells += ["", "", "", ""] if gap is None else [gap.mean, gap.low, gap.high, gap.count]
        if known:
            beside = known.get(id(row))
            cells += [beside and beside.measured and beside.measured.mean, beside and beside.published]
        if target is not None:
            reached = time_to_target(row, table.by, target)
            cells += [target, reached.count, _pair(reached.steps)[0], _pair(reached.seconds)[0]]
        cells += [" ".join(short_path(run.path) for run in row.runs), row.command or ""]
        writer.writerow([_cell(cell) for cell in cells])
    return output.getvalue()


def _pair(found: Statistic | None) -> list[float | None]:
    return [None, None] if found is None else [found.mean, found.std]


def _cell(value: Any) -> Any:
    """Texts that a spreadsheet would take for a formula get a quote in front."""
    if not isinstance(value, str):
        return "" if value is None else value
    value = printable(value)
    is_formula = value[:1] in ("=", "+", "-", "@") and number_in(value) is None
    return f"'{value}" if is_formula else value


def page_data(
    table: Table, *, title: str, made: str, target: float | None, test: bool, refresh: float | None
) -> dict[str, Any]:
    """What the page's script reads; JSON."""
    metrics, tests = columns(table), test_columns(table)
    row_of = {run.path: i for i, row in enumerate(table.rows) for run in row.runs}
    curves = _curves(table.records)
    values = sum(len(record.history) for record in table.records) * (len(curves) + len(_AXES))
    step = max(values / _POINTS, 1.0)  # evaluated epochs per one that the page shows
    shares = importance(table)
    return {
        "title": printable(title),
        "made": made,
        "version": dlopt.__version__,
        "refresh": refresh,
        "by": table.by,
        "lower": table.lower,
        "keys": list(table.keys),
        "short": {key: short_key(key, table.keys) for key in table.keys},
        "metrics": metrics,
        "curves": curves,
        "counts": table.counts(),
        "target": target,
        "allTests": test,
        "published": [
            [printable(name_of(each, table)), _triple(each.measured), each.published]
            for each in against_published(table)
        ],
        "t": [student_t(0.95, n) for n in range(1, 31)],
        "rows": [
            _row(row, table, metrics, tests if test or i == 0 else (), target) for i, row in enumerate(table.rows)
        ],
        "runs": [_run(record, row_of[record.path], curves, step, table.by) for record in table.records],
        "importance": None if shares is None else {
            "missing": shares.missing,
            "keys": list(shares.shares.items()),
            "configurations": len(table.ranked),
        },
        "sensitivity": [
            {
                "name": printable(each.optimizer),
                "points": [[lr, value.mean, row] for lr, value, row in each.points],
                "best": [[lr, value.mean, value.std, value.count] for lr, value in each.best],
                "good": each.good,
                "tolerance": each.tolerance,
                "failed": list(each.failed),
            }
            for each in sensitivities(table)
        ],
        "damaged": [[printable(short_path(each.path)), printable(each.reason)] for each in table.damaged],
    }  # fmt: skip


def _row(
    row: Configuration, table: Table, metrics: Sequence[str], tests: Sequence[str], target: float | None
) -> dict[str, Any]:
    gap = row.difference
    reached = None if target is None else time_to_target(row, table.by, target)
    return {
        "id": str(row.runs[0].path),
        "label": row.label,
        "values": {key: _value(value) for key, value in row.values.items()},
        "metrics": {name: found for name in metrics if (found := _triple(row.statistic(name))) is not None},
        "difference": None if gap is None else [gap.mean, gap.low, gap.high, gap.count],
        "test": {name: _triple(row.statistic(name)) for name in tests} if tests else None,
        "failed": row.row.failed,
        "command": row.command,
        "reached": None if reached is None else [reached.count, *_pair(reached.steps), *_pair(reached.seconds)],
    }


def _triple(found: Statistic | None) -> list[float | None] | None:
    return None if found is None else [found.mean, found.std, found.count]


def _value(value: Any) -> Any:
    return value if is_number(value) else printable(brief(value))


def _run(record: Record, row: int, curves: Sequence[str], step: float, by: str) -> dict[str, Any]:
    lines = _thinned(record.history, step, by)
    return {
        "path": printable(short_path(record.path)),
        "row": row,
        "seed": _value(record.config.get("seed")),
        "status": record.status,
        "reason": None if record.reason is None else printable(record.reason),
        "label": record.path.name,
        "metrics": {k: v for k, v in record.metrics.items() if k != "processes" and not k.startswith("test_")},
        "command": command(record),
        "from": command_from(record),
        "commit": None if record.commit is None else printable(record.commit),
        "curve": {
            name: [float(f"{line[name]:.6g}") if name in line else None for line in lines]
            for name in (*_AXES, *curves)
        },
    }


def _curves(records: Sequence[Record]) -> list[str]:
    """Names of curves: what every part logs per epoch."""
    names = dict.fromkeys(name for i in (0, -1) for record in records if record.history for name in record.history[i])
    first = [name for name in FIRST if name in names]
    return [*first, *(name for name in names if name not in (*first, *_AXES))]


def _thinned(lines: Sequence[Mapping[str, float]], step: float, by: str) -> Iterable[Mapping[str, float]]:
    """Evenly spread ones, the first and the last, and each that is better than all before: time to target is exact."""
    count = max(round(len(lines) / step), _FEWEST_POINTS)
    if len(lines) <= count:
        return lines
    kept = {round(i * (len(lines) - 1) / (count - 1)) for i in range(count)}
    best = None
    sign = 1 if direction_of(by) == "minimize" else -1
    for i, line in enumerate(lines):
        value = line.get(by)
        if value is not None and (best is None or sign * value < best):
            best = sign * value
            kept.add(i)
    return [lines[i] for i in sorted(kept)]


# -- the folder for a browser on this machine: loopback only, these files only, reading only


@contextlib.contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serves the files that stand in `folder` itself; gives the page's address."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        server_version = "dlopt"
        sys_version = ""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "")
            if host not in (f"127.0.0.1:{self.server.server_port}", f"localhost:{self.server.server_port}"):  # type: ignore[attr-defined]
                return self.send_error(403)  # a foreign name that points here
            name = self.path.partition("?")[0].removeprefix("/") or "index.html"
            path = folder / name
            if "/" in name or "\\" in name or path.suffix not in _TYPES or path.is_symlink():
                return self.send_error(404)
            try:
                content = path.read_bytes()
            except OSError:
                return self.send_error(404)
            self.send_response(200)
            headers = {"Content-Type": _TYPES[path.suffix], "Content-Length": str(len(content))} | _HEADERS
            for each in headers.items():
                self.send_header(*each)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
