"""Code blocks, headings and links of the project's pages: README and the like, and docs/ without the reference."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "docs/reference"
PAGES = sorted([*ROOT.glob("*.md"), *(page for page in (ROOT / "docs").rglob("*.md") if GENERATED not in page.parents)])


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            if language in languages:
                found.append(Block(str(page.relative_to(ROOT)), language, text))
    return found


def block_after(page: str, language: str, start: str) -> str:
    """Returns the first code block of `language` after the text `start` in a page."""
    text = (ROOT / page).read_text()
    found = re.search(rf"^```{language}\n(.*?)^```", text[text.index(start) :], re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page}: no {language} block after {start}"
    return found[1]


def prose(page: Path) -> str:
    """Returns the text without code blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings, as the usual hosts name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = [re.sub(r"[^\w\- ]", "", head).strip().lower() for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    found: set[str] = set()
    for name in (head.replace(" ", "-") for head in heads):
        found.add(name if name not in found else f"{name}-1")
    return found
