"""The report as one HTML page that needs nothing else: styles, script and data stand in it.

What comes from run folders is JSON in an element that is no script; the script only ever sets it as text. The page's
own policy lets nothing run or load but these very lines, which it names by their hashes.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = ("base.js", "leaderboard.js", "curves.js", "plots.js", "main.js")


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
