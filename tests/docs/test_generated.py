"""The tables in the pages of the repository are those of their sources, and the FAQ shows the messages of the code."""

import ast
import functools
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from tests.support.pages import ROOT, blocks

SCRIPT = runpy.run_path(str(ROOT / "docs/generate.py"))
PAGES: tuple[Path, ...] = SCRIPT["PAGES"]
FAQ = "docs/faq.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_committed_tables_are_those_of_their_sources(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) > 1000 and "<!-- generated: " in text
    assert SCRIPT["generated"](page) == text, f"{page.name} is stale; run: {SCRIPT['COMMAND']}"


def test_claims_are_marked_that_were_changed_after_their_results(tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    shutil.copytree(ROOT / "docs/lectures", tmp_path / "lectures")
    saved = json.loads((ROOT / "docs/gallery/momentum.json").read_text(encoding="utf-8"))
    [claim] = saved["claims"]
    for recipe, mark in ((saved["recipe_hash"], ""), ("0" * 64, " (changed after results)")):
        (tmp_path / "gallery/momentum.json").write_text(json.dumps({**saved, "recipe_hash": recipe}))
        assert f"- **{claim['verdict'].capitalize()}{mark}:** " in SCRIPT["gallery"].claims(tmp_path)


def test_every_page_with_generated_parts_is_written_by_the_script() -> None:
    found = {page for page in (ROOT / "docs").rglob("*.md") if "<!-- generated: " in page.read_text(encoding="utf-8")}
    assert found == set(PAGES)


def test_every_recipe_is_a_topic_of_one_lecture() -> None:
    topics = [each for found in SCRIPT["lectures"].plan(ROOT / "docs").values() for each in found]
    recipes = [path.stem for path in (ROOT / "conf/experiment/lecture").glob("[!_]*.yaml")]
    assert sorted(each["recipe"] for each in topics if "recipe" in each) == sorted(recipes)
    assert len({each["sentence"] for each in topics}) == len(topics)
    without_preview = {each["recipe"] for each in topics if "recipe" in each and "quick" not in each}
    assert without_preview == {"parallel_comparison"}  # four GPUs


def test_every_exercise_has_a_command_and_a_folded_solution() -> None:
    page = (ROOT / "docs/lectures/exercises.md").read_text(encoding="utf-8")
    exercises = page.split("\n## ")[1:]
    assert len(exercises) >= 10
    for each in exercises:
        command, _, solution = each.partition("<details><summary>Solution</summary>\n\n")
        assert "```bash\ndlopt " in command and "```text\n" in solution and solution.rstrip().endswith("</details>")


def test_every_extra_has_its_purpose() -> None:
    extras = SCRIPT["extras"]
    assert extras.PURPOSES.keys() == extras.metadata()["optional-dependencies"].keys()


def test_the_address_of_the_repository_is_set_once_and_cited_or_nowhere() -> None:
    address = SCRIPT["extras"].repository()
    folders = [path for name in ("conf", "dlopt", "docs", "scripts") for path in (ROOT / name).rglob("*")]
    files = [
        path for path in [*ROOT.glob("*"), *folders] if path.suffix in (".md", ".py", ".yaml", ".toml", ".cff", "")
    ]
    sought = re.compile(r"github\.com/\w+/dlopt" if address is None else re.escape(address.removeprefix("https://")))
    lines = [
        (path.name, line)
        for path in files
        if path.is_file()
        for line in path.read_text(encoding="utf-8").splitlines()
        if sought.search(line)
    ]
    assert {name for name, _ in lines} == {"pyproject.toml", "CITATION.cff"}
    assert all(line.startswith("# ") == (address is None) for _, line in lines)


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in blocks("console")
        if block.page == FAQ and block.text[0] != "$"
        for line in block.text.splitlines()
    ],
)
def test_messages_of_the_faq_are_those_of_the_code(line: str) -> None:
    """`...` is a value; every part between two of them is in a string of the code."""
    for part in map(str.strip, line.removeprefix("dlopt: ").split("...")):
        assert any(part in each for each in strings()), part


@functools.cache
def strings() -> set[str]:
    """Returns the constants of the package's code; those of a message with values are separate."""
    return {
        node.value
        for path in (ROOT / "dlopt").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
