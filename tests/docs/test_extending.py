"""What docs/extending.md shows is what works."""

import re
import sys
from pathlib import Path

import pytest

from tests.commands.line import SMALL, dlopt, refused

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text()
LINE = ["train", "--config-dir", "myconf", "optimizer=signum", "allow_packages=[mine]", *SMALL, "tracking=[]"]


def block(language: str, after: str) -> str:
    """The first block of that language behind `after`."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE[PAGE.index(after) :], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's package and config folder, as the page writes them."""
    for name, text in {
        "mine/__init__.py": "",
        "mine/optim.py": block("python", "`mine/optim.py`"),
        "myconf/optimizer/signum.yaml": block("yaml", "`myconf/optimizer/signum.yaml`"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine.optim"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_an_optimizer_of_the_users(folder: Path) -> None:
    result = dlopt(folder, *LINE, "optimizer.lr=0.01", "epochs=2")
    assert result.code == 0, result.err
    assert "finished" in result.out


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("optimizer.lr=-1", "greater than 0"),
        ("optimizer.lrr=1", "did you mean optimizer.lr"),
        ("optimizer.momentum=1.5", "1.5"),
    ],
)
def test_its_keys_are_checked_like_all_others(folder: Path, typed: str, told: str) -> None:
    message = refused(folder, *LINE, typed)
    assert typed in message and told in message


def test_it_is_not_called_unless_the_package_is_trusted(folder: Path) -> None:
    message = refused(folder, *(each for each in LINE if "allow" not in each))
    assert "mine.optim.Signum" in message and "allow_packages=[mine]" in message
