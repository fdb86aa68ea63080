"""Turns a notebook into a page: its text, its code and its outputs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markup import block


def page(notebook: str, name: str, pictures: Path, address: str) -> str:
    """Returns a notebook (JSON) as Markdown; writes its plots (SVG) to `pictures`, which pages find at `address`."""
    parts = []
    for number, cell in enumerate(json.loads(notebook)["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(block("python", source.splitlines()))
        for kind, content in _outputs(cell):
            if kind == "text":
                parts.append(block("text", content.rstrip().splitlines()))
                continue
            file = pictures / f"{name}-{number}.svg"
            pictures.mkdir(exist_ok=True)
            file.write_text(content, encoding="utf-8")
            parts.append(f"![Plot drawn by the code above]({address}/{file.name})")
    return "\n\n".join(parts) + "\n"


def _outputs(cell: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/svg+xml" in data:
            yield "svg", "".join(data["image/svg+xml"])
        elif "text" in output or "text/plain" in data:
            yield "text", "".join(output.get("text") or data["text/plain"])
