"""Renders the report as a self-contained HTML page and a CSV table, and serves it locally.

Charts are drawn by uPlot (unmodified files of its npm package, with their version, in page/vendor).
Run folders are untrusted: their data is JSON in a non-script element, and the script inserts it only as text. The CSP
allows only the inline script and style, by hash.

Shows test metrics only for the first row unless `test` is true, because comparing them would select on the test set.
"""

import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import dlopt
from dlopt.results.leaderboard import Difference, Statistic, direction_of, student_t
from dlopt.results.ranking import (
    Configuration,
    Ranking,
    against_published,
    command,
    command_from,
    default_spread,
    importance,
    recipe_label,
    sensitivities,
    time_to_target,
    tolerance_text,
)
from dlopt.results.reading import ENDED, Record, brief, is_number, number_in, printable, short_key, text
from dlopt.tracking.layout import short_path

SCRIPTS = ("base.js", "leaderboard.js", "charts.js", "curves.js", "plots.js", "main.js")
FIRST = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "accuracy_gap", "gap")
_COST = ("epochs", "steps", "seconds", "parameters")
_TEST = ("test_accuracy", "test_loss")
_AXES = ("epoch", "step", "seconds")
_POINTS = 400_000  # values of curves per page; curves are thinned above it
_FEWEST_POINTS = 12
_TYPES = {".html": "text/html; charset=utf-8", ".csv": "text/csv; charset=utf-8", ".png": "image/png"}
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}


def page(data: Mapping[str, Any]) -> str:
    """Renders the HTML page for `data` (see `page_data`)."""
    style = read_text("vendor/uPlot.min.css") + read_text("page.css")
    library = f"/*\n{read_text('vendor/uPlot.LICENSE')}*/\n{read_text('vendor/uPlot.iife.min.js')}"
    script = "\n".join(["(() => {", '"use strict";', library, *map(read_text, SCRIPTS), "})();"])
    body = f"""{read_text("body.html")}\
<script type="application/json" id="data">{_escaped_json(data)}</script>
<script>{script}</script>"""
    return document(html.escape(str(data["title"])), style, body, f"script-src '{_csp_hash(script)}'; ")


def document(title: str, style: str, body: str, script_policy: str = "") -> str:
    """Returns an HTML page that loads nothing; `title` and `body` are HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src '{_csp_hash(style)}'; {script_policy}base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def read_text(name: str) -> str:
    """Reads a file of the page's folder."""
    return (files("dlopt.results") / "page").joinpath(*name.split("/")).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """Returns the hash of an inline element for the Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _escaped_json(data: Mapping[str, Any]) -> str:
    """Returns JSON without characters that could close its HTML element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- CSV and JSON


def columns(table: Ranking) -> list[str]:
    """Returns the metrics of the leaderboard: the ranking metric, validation and training metrics, costs."""
    known = {name for record in table.records for name in record.metrics}
    # Omit costs that are equal for all ended runs; failed runs cost less in any case.
    ended = [record.metrics for record in table.records if record.status in ENDED]
    costs = [name for name in _COST if len({metrics.get(name) for metrics in ended}) > 1]
    return list(dict.fromkeys([*(name for name in (table.by, *FIRST) if name in known), *costs]))


def test_columns(table: Ranking) -> list[str]:
    return [name for name in _TEST if any(name in record.metrics for record in table.records)]


def summary_csv(table: Ranking, target: float | None, *, test: bool) -> str:
    """Renders a CSV line per configuration, with means and sample standard deviations over seeds."""
    metrics, tests = columns(table), test_columns(table)
    # The epochs of the config and those that were run are two columns.
    header = ["rank", *(f"config.{key}" if key in metrics else key for key in table.keys), "runs", "ended", "failed"]
    header += [f"{name}{end}" for name in (*metrics, *tests) for end in ("", "_std")]
    header += ["difference", "difference_low", "difference_high", "pairs"]
    known = {id(result.row): result for result in against_published(table)}
    header += ["test_error_percent", "published_error_percent"] if known else []
    header += [] if target is None else ["target", "reached", "steps_to_target", "seconds_to_target"]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*header, "folders", "command"])
    for rank, row in enumerate(table.rows, 1):
        visible = metrics + (tests if test or rank == 1 else [])
        cells: list[Any] = [rank, *(text(row.values[key]) if key in row.values else "" for key in table.keys)]
        cells += [len(row.runs), sum(run.has_ended for run in row.runs), row.failed]
        for name in (*metrics, *tests):
            cells += _mean_and_std(row.statistic(name) if name in visible else None)
        cells += _listed(row.difference) or [""] * 4
        if known:
            reference = known.get(id(row))
            cells += [reference and reference.measured and reference.measured.mean, reference and reference.published]
        if target is not None:
            reached = time_to_target(row, table.by, target)
            cells += [target, reached.count, _mean_and_std(reached.steps)[0], _mean_and_std(reached.seconds)[0]]
        cells += [" ".join(short_path(run.path) for run in row.runs), row.command or ""]
        writer.writerow([_cell(cell) for cell in cells])
    return output.getvalue()


def _mean_and_std(statistic: Statistic | None) -> list[float | None]:
    return [None, None] if statistic is None else [statistic.mean, statistic.std]


def _cell(value: Any) -> Any:
    """Quotes text that a spreadsheet would evaluate as a formula."""
    if not isinstance(value, str):
        return "" if value is None else value
    value = printable(value)
    is_formula = value[:1] in ("=", "+", "-", "@") and number_in(value) is None
    return f"'{value}" if is_formula else value


def page_data(
    table: Ranking, *, title: str, made: str, target: float | None, test: bool, refresh: float | None
) -> dict[str, Any]:
    """Returns the JSON data of the page's script."""
    metrics, tests = columns(table), test_columns(table)
    row_of = {run.path: i for i, row in enumerate(table.rows) for run in row.runs}
    distinct = {run.path for row in table.rows for run in row.distinct}
    curves = _curves(table.records)
    values = sum(len(record.history) for record in table.records) * (len(curves) + len(_AXES))
    step = max(values / _POINTS, 1.0)  # evaluated epochs per plotted point
    importances = importance(table)
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
            [
                printable(recipe_label(item, table)), _listed(item.measured), item.published,
                item.row.count("test_accuracy"),
            ]
            for item in against_published(table)
        ],
        "spread": default_spread(table),
        "t": [student_t(0.95, n) for n in range(1, 31)],
        "rows": [
            _row(row, metrics, tests if test or i == 0 else ()) for i, row in enumerate(table.rows)
        ],
        "runs": [
            {**_run(record, row_of[record.path], curves, step, table.by), "repeats": record.path not in distinct}
            for record in table.records
        ],
        "importance": None if importances is None else {
            "missing": importances.missing,
            "explained": importances.explained,
            "keys": list(importances.fractions.items()),
            "configurations": len(table.ranked),
        },
        "tolerance": tolerance_text(table),
        "sensitivity": [
            {
                "name": printable(item.optimizer),
                "points": [[lr, value.mean, row] for lr, value, row in item.points],
                "best": [[lr, value.mean, value.std, value.count] for lr, value in item.best],
                "good": item.good,
                "failed": list(item.failed),
            }
            for item in sensitivities(table)
        ],
        "damaged": [[printable(short_path(item.path)), printable(item.reason)] for item in table.damaged],
    }  # fmt: skip


def _row(row: Configuration, metrics: Sequence[str], tests: Sequence[str]) -> dict[str, Any]:
    return {
        "id": str(row.runs[0].path),
        "label": row.label,
        "values": {key: _value(value) for key, value in row.values.items()},
        "metrics": {name: values for name in metrics if (values := _listed(row.statistic(name))) is not None},
        "difference": _listed(row.difference),
        "test": {name: _listed(row.statistic(name)) for name in tests} if tests else None,
        "failed": row.failed,
        "command": row.command,
    }


def _listed(values: Statistic | Difference | None) -> list[float | None] | None:
    """Returns [mean, std, count] or [mean, low, high, count]."""
    return None if values is None else list(vars(values).values())


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
            name: [float(f"{line[name]:.6g}") if name in line else None for line in lines] for name in (*_AXES, *curves)
        },
    }


def _curves(records: Sequence[Record]) -> list[str]:
    """Returns the metrics logged per epoch, those of `FIRST` first."""
    names = dict.fromkeys(name for i in (0, -1) for record in records if record.history for name in record.history[i])
    ordered = dict.fromkeys([*(name for name in FIRST if name in names), *names])
    return [name for name in ordered if name not in _AXES]


def _thinned(lines: Sequence[Mapping[str, float]], step: float, by: str) -> Iterable[Mapping[str, float]]:
    """Thins a curve to evenly spaced epochs, and keeps every new best epoch so that the time to target stays exact."""
    count = max(round(len(lines) / step), _FEWEST_POINTS)
    if len(lines) <= count:
        return lines
    indices = {round(i * (len(lines) - 1) / (count - 1)) for i in range(count)}
    best, sign = math.inf, 1 if direction_of(by) == "minimize" else -1
    for i, line in enumerate(lines):
        if by in line and sign * line[by] < best:
            best = sign * line[by]
            indices.add(i)
    return [lines[i] for i in sorted(indices)]


# -- local server: read-only, loopback only, only the report's files


@contextlib.contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serves the files directly in `folder`; yields the page's address."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        server_version = "dlopt"
        sys_version = ""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "")
            if host not in (f"127.0.0.1:{self.server.server_port}", f"localhost:{self.server.server_port}"):  # type: ignore[attr-defined]
                return self.send_error(403)  # DNS rebinding: a foreign host name that resolves to this machine
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
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
