import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.line import run


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """Returns what the shell reads for a command line."""

    def completed(line: str, shell: str) -> str:
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert run(f"-sc query={shell}") == 0
        return capsys.readouterr().out

    return completed


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dlopt pre", ["predict"]),
        ("dlopt nothing ", []),
        ("dlopt options opt", ["optimizer"]),
        ("dlopt template sc", ["schema"]),
        ("dlopt train --config-d", ["--config-dir"]),
        ("dlopt train -m tria", ["trials="]),
        ("dlopt find-lr up", ["updates="]),
        ("dlopt find-lr sched", []),  # a key of `dlopt train` that find-lr does not read
        ("dlopt find-lr dec", ["decay_norm_and_bias="]),  # which it reads; not the group `decay`
        ("dlopt eval init_from=x.pt model=resnet5", ["model=resnet50", "model=resnet56"]),
        ("dlopt eval checkpoint=", ["checkpoint=runs/"]),
        ("dlopt sample pr", ["prompt=", "precision="]),
        ("dlopt report r", ["runs/"]),
        ("dlopt runs --p", ["--paths"]),
        ("dlopt verify pa", ["paper="]),
        ("dlopt ladder optimizer=adamw optimizer.e", ["optimizer.eps="]),
        ("dlopt judge outputs/train/DATE mar", ["margin="]),
    ],
)
def test_completes_what_the_command_declares(
    typed: str,
    expected: list[str],
    complete: Callable[[str, str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete(typed, "bash").split() == expected


def test_fish_takes_one_completion_per_line(complete: Callable[[str, str], str]) -> None:
    assert complete("dlopt s", "fish") == "sweep\nsample\nsummary\nshow-batch\nscaling\n"
    assert complete("dlopt s", "zsh") == "sweep sample summary show-batch scaling\n"


@pytest.mark.parametrize(("typed", "slow"), [("dlopt tr", "hydra"), ("dlopt options opt", "pydantic")])
def test_needs_no_slow_import(typed: str, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from dlopt.cli import find; complete, words = find(['-sc', 'query=bash']); complete(words)"
    code += f"; print({slow!r} in sys.modules)"
    monkeypatch.setenv("COMP_LINE", typed)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
