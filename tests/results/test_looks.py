"""Seeds that are added after a reader has seen the table: the next verdict says so, and spends less."""

import json
import os
from pathlib import Path

import pytest

from dlopt.results.looks import LOOKS
from dlopt.results.ranking import of_folder
from tests.support.folders import make_run
from tests.support.line import SMALL, dlopt

VALUES = {1.0: (0.90, 0.91, 0.92, 0.911), 2.0: (0.89, 0.915, 0.9, 0.887), 3.0: (0.2, 0.21, 0.225, 0.2)}


def add(folder: Path, seed: int) -> None:
    for lr, values in VALUES.items():
        make_run(folder / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=(0.1, values[seed]))


def verdict(folder: Path, *words: str) -> str:
    found = dlopt(folder, "report", ".", "--json", *words)
    assert found.code == 0, found.err
    return str(json.loads(found.out)["verdict"])


def test_a_report_after_a_report_with_fewer_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        add(tmp_path, seed)
        said = verdict(tmp_path)
        assert (tmp_path / LOOKS).exists() == (seed == 2), "fewer seeds decide nothing"
    assert "looks" not in said and verdict(tmp_path) == said, "the same table again is no second look"
    add(tmp_path, 3)
    added = verdict(tmp_path)
    assert added.startswith("verdict: lr=1 is better than lr=3 (95 % for the whole table and all looks at it)")
    assert added.endswith("seeds were added after a look at 3, so this one has 0.5 of the 5 % of errors")
    assert verdict(tmp_path) == added
    assert len(json.loads((tmp_path / LOOKS).read_text())["looks"]) == 2


def test_looks_at_a_folder_below_count(tmp_path: Path) -> None:
    for seed in range(3):
        add(tmp_path / "sweep", seed)
    verdict(tmp_path / "sweep")
    for seed in range(3, 4):
        add(tmp_path / "more", seed)
    assert "after a look at 3" in verdict(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "{", '{"looks": 3}', '{"looks": [3, {"a": "b"}]}', "[" * 10_000])
def test_a_damaged_file_is_no_look(tmp_path: Path, content: str) -> None:
    for seed in range(3):
        add(tmp_path, seed)
    (tmp_path / LOOKS).write_text(content)
    assert "looks" not in verdict(tmp_path)
    assert "looks" in json.loads((tmp_path / LOOKS).read_text())


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_of_others_has_a_report(tmp_path: Path) -> None:
    for seed in range(3):
        add(tmp_path, seed)
    tmp_path.chmod(0o555)
    try:
        assert verdict(tmp_path).startswith("verdict: ")
    finally:
        tmp_path.chmod(0o755)


def test_the_end_of_a_sweep_is_a_look(tmp_path: Path) -> None:
    line = ["train", "-m", *SMALL, "tracking=[]", "hydra.sweep.dir=s", "optimizer.lr=0.01,0.1"]
    first = dlopt(tmp_path, *line, "seed=0,1,2")
    assert first.code == 0 and "verdict: " in first.out and "looks" not in first.out
    assert of_folder(tmp_path / "s").board.comparison.seen == []
    for number, lr in enumerate((0.01, 0.1)):
        dlopt(tmp_path, "train", *SMALL, "tracking=[]", f"optimizer.lr={lr}", "seed=3", f"hydra.run.dir=s/more{number}")
    assert of_folder(tmp_path / "s").board.comparison.seen == [3]
