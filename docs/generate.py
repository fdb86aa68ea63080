"""Writes the generated parts of the pages that are read in the repository, too: claims, results, reference, lectures.

    .venv/bin/python docs/generate.py

They are between `<!-- generated: NAME -->` and `<!-- end -->`. The sources are pyproject.toml, the recipes in
conf/experiment/lecture with their results in docs/gallery, docs/lectures/lectures.yaml, docs/ladder, docs/judge,
docs/verify, and the benchmark results that come with dlopt; those of the reference are the code and conf/. Run it after
a change of one of them; a test compares the pages with their sources. Sphinx generates the pages of single commands and
groups.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
COMMAND = ".venv/bin/python docs/generate.py"
sys.path[:0] = [str(ROOT), str(DOCS / "_ext")]

import benchmark  # noqa: E402
import conflicts  # noqa: E402
import extras  # noqa: E402
import gallery  # noqa: E402
import judge  # noqa: E402
import ladder  # noqa: E402
import lectures  # noqa: E402
import modes  # noqa: E402
import reference  # noqa: E402
import verified  # noqa: E402

LECTURES = list(lectures.plan(DOCS))
PARTS: dict[str, Callable[[], str]] = {
    "benchmark": benchmark.results,
    "commands": reference.commands_table,
    "groups": reference.choices_table,
    "settings": reference.settings,
    "metrics": reference.metrics,
    "conflicts": conflicts.table_of_conflicts,
    "claims": lambda: gallery.claims(DOCS),
    "extras": extras.extras,
    "judge": lambda: judge.evidence(DOCS / "judge"),
    "judge_simulations": lambda: judge.simulations(DOCS / "judge"),
    "ladder": lambda: ladder.ladder(DOCS / "ladder/gpt"),
    "ladder_decay": lambda: ladder.ladder(DOCS / "ladder/gpt_decay"),
    "self_tuning": benchmark.self_tuning,
    "lectures": lambda: gallery.lectures(DOCS),
    "modes": modes.table_of_modes,
    "versions": extras.versions,
    "verified": lambda: verified.matrix(DOCS / "verify"),
    "overview": lambda: lectures.overview(DOCS),
    **{f"lecture_{name}": partial(lectures.topics, DOCS, name) for name in LECTURES},
}
PAGES = (
    *(DOCS / f"{name}.md" for name in ("claims", "gallery", "quickstart", "results", "tried", "verified")),
    *(DOCS / "reference" / f"{name}.md" for name in ("commands", "conflicts", "groups", "metrics", "settings")),
    DOCS / "howto" / "judge.md",
    DOCS / "howto" / "parallel.md",
    *(DOCS / "lectures" / f"{name}.md" for name in ("index", *LECTURES)),
)


def generated(page: Path) -> str:
    """Returns the text of a page with its generated parts as they should be."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{PARTS[found[2]]().strip()}\n\n<!-- end -->"

    return re.sub(
        r"(<!-- generated: (\w+) -->).*?<!-- end -->", fill, page.read_text(encoding="utf-8"), flags=re.DOTALL
    )


def main() -> None:
    for page in PAGES:
        text = generated(page)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
