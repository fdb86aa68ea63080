"""Output in a terminal of 60 columns."""

import re
from pathlib import Path

import pytest

from tests.support.folders import make_run
from tests.support.line import SMALL
from tests.support.terminal import in_terminal, plain

NET = [key for key in SMALL if not key.startswith(("epochs=", "tracking="))]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for i, (optimizer, lr) in enumerate((o, lr) for o in ("sgd", "adamw") for lr in (0.01, 0.1)):
        make_run(tmp_path / "outputs/night" / str(i), optimizer=optimizer, lr=lr, accuracies=(0.2, 0.1 * (i + 1)))
    return tmp_path


def test_lists_and_reports(outputs: Path) -> None:
    for command in (["runs"], ["report", "outputs/night"]):
        code, shown = in_terminal(outputs, 60, *command)
        text = plain(shown)
        assert code == 0, text
        checked = [line for line in text.splitlines() if not line.startswith("best: dlopt")]  # to be copied
        assert "…" not in text and [line for line in checked if len(line.rstrip()) > 60] == []
        words = " ".join(text.split())
        assert all(figure in words for figure in ("adamw", "0.01", "40.00 %", "30.00 %")), text


def test_summary(tmp_path: Path) -> None:
    code, shown = in_terminal(tmp_path, 60, "summary", "model=resnet20", "input_shape=[3,32,32]", "classes=10")
    words = " ".join(plain(shown).split())
    assert code == 0 and "…" not in shown
    assert "kind Conv2d output 16x32x32 parameters 432 MACs 442,368" in words


def test_train(tmp_path: Path) -> None:
    code, shown = in_terminal(tmp_path, 60, "train", *SMALL, "tracking=[]", "hydra.run.dir=run", NO_COLOR="1")
    assert code == 0, shown
    text = plain(shown)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown), "colours"
    assert all(len(line.rstrip()) <= 60 for line in text.splitlines())
    assert re.search(r"^epoch +.*val loss +val acc", text, re.MULTILINE) and re.search(r"^ *2/2 ", text, re.MULTILINE)
    assert "run folder: run" in text


def test_text_is_wrapped_between_words(tmp_path: Path) -> None:
    code, shown = in_terminal(tmp_path, 60, "find-lr", *NET, "max_lr=1", "output=out")
    assert code == 0, shown
    text, _, command = plain(shown).partition("next:")
    assert all(line == line.strip() and len(line) <= 60 for line in map(str.rstrip, text.splitlines()))
    assert "the loss" in " ".join(text.split()), shown
    assert "  dlopt train " in command  # whole, to be copied


def test_refusals_are_wrapped_between_words(tmp_path: Path) -> None:
    code, shown = in_terminal(tmp_path, 60, "train", "modl=mlp", "optimzer=adamw", "data.batch_size=0")
    lines = [line.rstrip() for line in plain(shown).splitlines()]
    assert code == 2 and "    `dlopt train --help` lists all" in lines
    assert "    to 1; allowed: an integer >= 1 and <= 16777216 | full" in lines
