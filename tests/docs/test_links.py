"""Every link between the pages resolves. The build of the site checks that every page is in its navigation."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.pages import PAGES, ROOT, anchors, prose


def links(page: Path) -> list[str]:
    return [unquote(target) for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        assert not re.match(r"\w+:", link), link
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


def test_pictures_are_shown_somewhere() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    pictures = {*(ROOT / "docs").rglob("*.png"), *(ROOT / "docs/gallery").glob("*.svg")}
    copies = {path for path in pictures if path.suffix == ".svg" and path.with_suffix(".png") in pictures}
    assert pictures - copies <= shown


def test_the_readme_is_no_longer_than_a_reader_wants() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 250
