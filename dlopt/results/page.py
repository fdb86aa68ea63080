"""Renders the report as a self-contained HTML page, and serves it locally.

Run folders are untrusted: the templates escape all text, their data is JSON in a non-script element, and the script
inserts it only as text. The CSP allows only the inline script and style, by hash.
"""

import base64
import contextlib
import gzip
import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dlopt._version import __version__
from dlopt.basics.folders import short_path
from dlopt.basics.formats import printable
from dlopt.basics.plain_values import read_regular
from dlopt.basics.secrets import redact
from dlopt.metrics.names import in_words
from dlopt.results.columns import counts_text, published_table
from dlopt.results.page_data import page_data
from dlopt.results.ranking import Ranking, importance
from dlopt.results.setting import setting_text
from dlopt.results.tables import Bold, Section

FOLDER = Path(__file__).with_name("page")
SCRIPTS = (
    "base.js",
    "series.js",
    "filters.js",
    "leaderboard.js",
    "charts.js",
    "versus.js",
    "curves.js",
    "plots.js",
    "tests.js",
    "run.js",
    "main.js",
)
_LARGEST_PLAIN = 300_000  # characters of JSON; more is compressed
_TYPES = {".html": "text/html; charset=utf-8", ".csv": "text/csv; charset=utf-8", ".png": "image/png"}
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}


def page(
    ranking: Ranking,
    *,
    title: str,
    made: str,
    target: float | None,
    test: bool,
    refresh: float | None,
    sections: Sequence[Section] = (),
) -> str:
    """Renders the HTML page of a report."""
    content = page_data(ranking, target=target, test=test, refresh=refresh, sections=sections)
    tests = [run["test"] for row in content["rows"] for run in row["runs"] if "test" in run]
    data, encoding = _embedded(content)
    script = "\n".join(["(async () => {", '"use strict";', *map(read_text, SCRIPTS), "})();"])
    return render(
        "report.html", FOLDER,
        title=title, made=made, refresh=refresh, version=__version__,
        headline=ranking.headline, setting=setting_text(ranking), counts=counts_text(ranking),
        samples=sum(len(each["most_wrong"]) for each in tests),
        published=published_table(ranking),
        sections=sections,
        importance=importance(ranking), damaged=ranking.damaged,
        metric=in_words(ranking.by), configurations=len(ranking.ranked),
        style=Markup(read_text("page.css")), script=Markup(script), data=Markup(data), encoding=encoding,
    )  # fmt: skip


def render(template: str, folder: Path, **values: Any) -> str:
    """Renders a template of `folder`, or of the report: all text is printable; in HTML, all but `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, FOLDER]),
        autoescape=lambda name: not str(name).endswith(".txt"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(csp_hash=_csp_hash, short_path=short_path)
    return environment.get_template(template).render(values)


def _finalize(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup("<b>{}</b>").format(printable(value)) if isinstance(value, Bold) else printable(value)


def read_text(name: str) -> str:
    """Reads a file of the page's folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """Returns the hash of an inline element for the Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embedded(data: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the data as text, and its media type: large data is compressed, after secrets are removed from it."""
    content = redact(_escaped_json(data))
    if len(content) <= _LARGEST_PLAIN:
        return content, "application/json"
    return base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode(), "application/gzip"


def _escaped_json(data: Mapping[str, Any]) -> str:
    """Returns JSON without characters that could close its HTML element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
                content = read_regular(path, sys.maxsize)
            except (OSError, ValueError):
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
