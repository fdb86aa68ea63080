"""The documentation site builds without warnings and without a network, and every link within it resolves."""

import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

import dlopt
from dlopt.commands.command_table import every_command
from dlopt.commands.options import choices_of, every_group
from dlopt.config.choices import Catalogue, config_folder
from tests.support.browser import NEEDS_BROWSER, chromium, narrow
from tests.support.pages import ROOT

CATALOGUE = Catalogue()
UNTYPED = {"hydra.sweeper._recursive_", "hydra.sweeper.params", "hydra.sweeper.n_trials"}  # read by Hydra itself
pytestmark = pytest.mark.slow  # the build
_LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@dataclass
class _Page(HTMLParser):
    """What a page loads, links to, and can be linked at."""

    loaded: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag in _LOADING and _LOADING[tag] in values:
            self.loaded.append(values[_LOADING[tag]])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])

    def handle_data(self, data: str) -> None:
        self.text += data


@functools.cache
def parsed(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Workers of pytest-xdist share it: the first one builds."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    html, log = folder / "site", folder / "site.log"
    with (folder / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "site-trees")]
            command = [sys.executable, "-m", "sphinx", *options, "docs", str(html)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            log.write_text(done.stderr if done.returncode else "")
    assert not log.read_text(), log.read_text()
    return html


def pages(site: Path) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    assert len(found) > len(every_command()) + len(every_group(CATALOGUE))
    return found


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in pages(site):
        for address in parsed(page).loaded:
            assert not urlsplit(address).netloc and not urlsplit(address).scheme, f"{page.name}: {address}"
            assert (page.parent / unquote(urlsplit(address).path)).exists(), f"{page.name}: {address}"
    for sheet in site.rglob("*.css"):
        remote = re.findall(r"(?:@import\s*|url\()\s*['\"]?(?:https?:)?//[^)'\"]*", sheet.read_text(encoding="utf-8"))
        assert not remote, f"{sheet.name}: {remote}"


def test_local_links_lead_to_pages_and_headings(site: Path) -> None:
    for page in pages(site):
        for link in parsed(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "mailto"), link
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_relative_to(site.resolve()) and target.is_file(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in parsed(target).ids, f"{page.relative_to(site)}: {link}"


def test_every_command_has_a_page(site: Path) -> None:
    for name in every_command():
        assert f"dlopt {name} " in parsed(site / f"reference/commands/{name}.html").text
    assert "checkpoint=PATH" in parsed(site / "reference/commands/eval.html").text


def test_every_public_name_has_a_section(site: Path) -> None:
    page = parsed(site / "reference/python.html")
    for name in dlopt.__all__:
        assert name == "__version__" or f"dlopt-{name.replace('_', '-')}" in page.ids or f"dlopt{name}" in page.ids
    assert "dlopt.open_run(path: str | PathLike[str]) -> Run" in page.text and "model-predict" in str(page.ids)
    notebook = parsed(site / "tutorials/pandas.html")
    assert "dlopt.sweep(" in notebook.text and any(address.endswith(".svg") for address in notebook.loaded)


def test_every_choice_has_a_section_with_its_keys(site: Path) -> None:
    for group in every_group(CATALOGUE):
        name = group.replace("/", "-")
        page = parsed(site / f"reference/groups/{name}.html")
        for choice in choices_of(CATALOGUE, group):
            label = f"choice-{name}-{choice.name}".replace("/", "-").replace("_", "-").lower()
            assert label in page.ids, f"{group}={choice.name}"
            missing = [key.name for key in CATALOGUE.keys(choice) if key.name not in page.text]
            assert not missing, f"{group}={choice.name}: {missing}"


def test_types_and_ranges_are_those_of_the_signatures(site: Path) -> None:
    rows = table_rows(site / "reference/groups/optimizer.html")
    assert ("optimizer.lr", "0.001", "a number > 0", "learning rate") in rows
    assert any(row[:3] == ("optimizer.nesterov", "false", "true | false") for row in rows)
    nested = table_rows(site / "reference/groups/augmentation.html")
    assert any(row[0] == "augmentation.operations.0.padding" and "an integer" in row[2] for row in nested)


def test_every_key_of_a_choice_has_a_type(site: Path) -> None:
    for group in every_group(CATALOGUE).keys() - {"experiment", "task"}:  # no choice of a task has keys
        rows = table_rows(site / f"reference/groups/{group.replace('/', '-')}.html")
        assert {row[0] for row in rows if not row[2]} <= UNTYPED, group


def test_every_key_of_a_run_is_listed(site: Path) -> None:
    rows = table_rows(site / "reference/settings.html")
    found = {row[0].split(".")[0]: row for row in rows}
    written = re.findall(r"^(\w+):", (config_folder() / "train.yaml").read_text(), re.MULTILINE)
    assert set(written) - {"defaults", "hydra"} == found.keys()
    assert not [row for row in rows if not row[2]]
    assert found["epochs"][1:3] == ("20", "an integer >= 1 | a time > 0 (90s, 5min, 1.5h)")


def test_the_gallery_shows_every_lecture(site: Path) -> None:
    page = parsed(site / "gallery.html")
    for path in (config_folder() / "experiment/lecture").glob("[!_]*.yaml"):
        assert f"dlopt train experiment=lecture/{path.stem}" in page.text
        picture = ROOT / "docs/gallery" / f"{path.stem}.png"
        assert any(address.endswith(f"/{picture.name}") for address in page.loaded) == picture.exists()
        assert any(link.endswith(f"{path.stem}.yaml") for link in page.links)


def test_the_page_of_claims_has_every_recorded_claim_with_its_verdict(site: Path) -> None:
    page = parsed(site / "claims.html")
    for path in (ROOT / "docs/gallery").glob("*.json"):
        assert path.stem.replace("_", "-") in page.ids
        for claim in json.loads(path.read_text())["claims"]:
            assert f"{claim['verdict'].capitalize()}: {claim['claim'].replace('`', '')}. " in page.text, claim


@NEEDS_BROWSER
def test_tables_sort_by_the_numbers_of_a_column(site: Path, browser: Any) -> None:
    browser.get((site / "results.html").as_uri())
    head = next(each for each in browser.find_elements("css selector", "th button") if each.text == "Score in time")
    rows = "[...arguments[0].closest('table').tBodies[0].rows]"
    column = f"return {rows}.map((row) => parseFloat(row.cells[arguments[0].closest('th').cellIndex].textContent))"
    given = browser.execute_script(column, head)
    for reverse in (False, True):
        browser.execute_script("arguments[0].click()", head)
        assert browser.execute_script(column, head) == sorted(given, reverse=reverse) != given


@NEEDS_BROWSER
@pytest.mark.parametrize("name", ["index", "claims", "gallery", "faq", "coming_from", "results", "reference/settings"])
def test_pages_are_as_wide_as_a_phone(site: Path, browser: Any, name: str) -> None:
    narrow(browser)
    browser.get((site / f"{name}.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390  # tables scroll in themselves
    commands = "return Math.max(0, ...[...document.querySelectorAll('.highlight-bash pre')].map((e) => e.scrollWidth))"
    assert browser.execute_script(commands) <= 390  # commands break


@NEEDS_BROWSER
@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("early stopping", "howto/stop_and_clip.html"),
        ("resume", "howto/resume.html"),
        ("muon", "reference/groups/optimizer.html"),
        ("lightning", "coming_from.html"),
    ],
)
def test_search_finds_the_page_of_a_term_first(site: Path, browser: Any, query: str, page: str) -> None:
    browser.get(f"{(site / 'search.html').as_uri()}?q={quote(query)}")
    deadline = time.monotonic() + 30
    while not (found := browser.find_elements("css selector", "#search-results li a")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found[0].get_attribute("href").partition("#")[0].partition("?")[0].endswith(f"/{page}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_pages_link_to_the_repository_and_their_source_if_there_is_one(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project.get("urls", {}).get("Repository")
    links = parsed(site / "faq.html").links
    expected = {repository, f"{repository}/issues", f"{repository}/edit/main/docs/faq.md"} if repository else set()
    assert {link for link in links if repository is None and "/edit/" in link} == set() and expected <= {*links}
    assert not [link for link in parsed(site / "reference/python.html").links if "/edit/" in link]  # generated


def test_overviews_link_to_the_pages_of_the_site(site: Path) -> None:
    assert "commands/train.html" in parsed(site / "reference/commands.html").links
    assert "groups/optimizer.html" in parsed(site / "reference/groups.html").links
    assert "toctree" not in parsed(site / "index.html").text


def table_rows(path: Path) -> list[tuple[str, ...]]:
    """The text of the cells of every row of four."""
    written = path.read_text(encoding="utf-8")
    found = []
    for row in re.findall(r"<tr class=\"row-\w+\">(.*?)</tr>", written, re.DOTALL):
        cells = re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
        if len(cells) == 4:
            found.append(tuple(_plain(cell) for cell in cells))
    assert found
    return found


def _plain(cell: str) -> str:
    page = _Page()
    page.feed(cell)
    return page.text.strip()
