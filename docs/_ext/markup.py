"""Writes MyST Markdown: escaped text, tables, code blocks, docstrings."""

import inspect
import re
from collections.abc import Sequence


def text(plain: str) -> str:
    """Escapes everything that Markdown would interpret, except code between backticks."""
    parts = plain.split("`") if plain.count("`") % 2 == 0 else [plain.replace("`", "'")]
    return "".join(code(part) if i % 2 else _escaped(part) for i, part in enumerate(parts))


def code(plain: str) -> str:
    """Sets a value in a code span; an empty one stays empty."""
    fence = "``" if "`" in plain else "`"
    return f"{fence}{plain}{fence}" if plain.strip() else ""


def block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown cells; without rows, nothing."""
    if not rows:
        return ""
    # Within a table `\|` is a literal bar, also in code spans. Text has its bars escaped already.
    cells = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row] for row in rows]
    lines = [list(heads), ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def docstring(target: object) -> str:
    """The docstring as Markdown. Indented parts, such as `Args:`, become text blocks."""
    written = getattr(target, "__doc__", None) or ""
    if written.startswith(f"{getattr(target, '__name__', '')}("):  # generated for a dataclass
        return ""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(written)) if written.strip() else []
    return "\n\n".join(
        block("text", each.splitlines()) if re.search(r"^\s", each, re.MULTILINE) else text(each) for each in paragraphs
    )


def _escaped(plain: str) -> str:
    return re.sub(r"([\\*_{}\[\]<>|#~&!$])", r"\\\1", plain)
