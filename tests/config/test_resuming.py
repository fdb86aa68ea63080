"""Which run is resumed, and the command that says so."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.files import write_yaml
from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.config.overrides import single_values, with_folder
from dlopt.config.plan import plan
from dlopt.config.resuming import differences, how_to_resume, newest_unfinished, refuse_other_config, with_smaller_lr

LINE = ("model=mlp", "threads=1", "tracking=[]")


def config(*lines: str) -> dict[str, Any]:
    return dict(plan(Composer(), [*LINE, *lines]).saved)


def interrupted(folder: Path, saved: dict[str, Any], *typed: str) -> RunFolder:
    folder.mkdir(parents=True)
    write_yaml(folder / "config.yaml", saved)
    write_yaml(folder / "overrides.yaml", [*LINE, *typed])
    (folder / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["epochs=200"], "01"),  # equal, though the newest one matches too
        (["epochs=400"], "02"),
        (["epochs=200", "device=cpu", "data.workers=0"], "01"),  # the same length before the newest
        (["epochs=400", "check=step"], "03"),
        (["epochs=300"], "02"),  # the same other keys before the newest
        (["epochs=200", "tags=[a]"], "01"),
        (["epochs=200", "seed=1"], None),
    ],
)
def test_an_equal_config_first(typed: list[str], expected: str | None, tmp_path: Path) -> None:
    for name, lines in {"01": ["epochs=200"], "02": ["epochs=400"], "03": ["epochs=400", "check=step"]}.items():
        interrupted(tmp_path / f"2026-01-{name}_00-00-00", config(*lines), *lines)
    found = newest_unfinished(tmp_path, config(*typed))
    assert (found.path.name[8:10] if found else None) == expected


@pytest.mark.parametrize(
    "name", ["plain", "a b", "it's", 'a "b"', "a,b", "(x)", "a=b", "[1,2]", "größe", "1e3", "{a:b}"]
)
@pytest.mark.parametrize("typed", [[], ["hydra.run.dir=elsewhere"], ["output='a b'", "resume=auto"]])
def test_the_command_names_the_folder(
    name: str, typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues this run, from any folder, whatever other runs of this config there are."""
    run = interrupted(tmp_path / name, {}, "note='a b'", *typed)
    monkeypatch.chdir("/")
    words = shlex.split(how_to_resume(run).removeprefix("resume with: "))
    assert words[:2] == ["dlopt", "train"]
    values = single_values(Composer().parse(with_folder(words[2:], multirun=False)))
    assert Path(values["hydra.run.dir"]) == tmp_path / name and values["resume"] == "auto"
    assert [word for word in words if word.startswith("note")] == ["note='a b'"]


def test_the_words_for_a_job_name_its_sweep(tmp_path: Path) -> None:
    write_yaml(tmp_path / "sweep.yaml", [["seed=1"], ["seed=2"]])
    assert how_to_resume(interrupted(tmp_path / "1", {})) == (
        f"add output={tmp_path} resume=auto to the command of the sweep"
    )


@pytest.mark.parametrize(
    ("optimizer", "has_checkpoint", "expected"),
    [
        ({"lr": 0.1}, True, "from its last checkpoint with half the rate: {line} init_from={last} optimizer.lr=0.05"),
        ({"lr": 3}, False, "again with half the rate: {line} init_from=x.pt optimizer.lr=1.5"),
        ({"lr": None, "base": {"lr": 2}}, False, "again with half the rate: {line} init_from=x.pt optimizer.lr=1"),
        ({"lr": "auto"}, False, ""),
    ],
)
def test_the_command_with_a_smaller_rate(
    optimizer: dict[str, Any], has_checkpoint: bool, expected: str, tmp_path: Path
) -> None:
    run = interrupted(tmp_path / "run", {"optimizer": optimizer}, "optimizer.lr=9", "init_from=x.pt", "output=run")
    last = run.checkpoints / "last.pt"
    if has_checkpoint:
        run.checkpoints.mkdir()
        last.touch()
    line = "dlopt train model=mlp threads=1 'tracking=[]'"
    assert with_smaller_lr(run) == (expected and f"; to start {expected.format(line=line, last=last)}")


def test_files_may_move_if_the_data_are_identified() -> None:
    old, new = ({"data": {"file": file, "target": "y"}} for file in ("a.csv", "b/a.csv"))
    with pytest.raises(UserError, match=r"another config \(data\.file: saved a\.csv, now b/a\.csv\)"):
        refuse_other_config(old, new, "RUN", [])
    refuse_other_config(old, new, "RUN", [], has_identity=True)
    refuse_other_config(old, {"data": {"file": str(Path("a.csv").absolute()), "target": "y"}}, "RUN", [])
    with pytest.raises(UserError, match=r"another config \(data\.target: saved y, now z\)"):
        refuse_other_config(old, {"data": {"file": "b/a.csv", "target": "z"}}, "RUN", [], has_identity=True)


def test_runs_from_before_a_test_split_of_all_data() -> None:
    """Only tables and texts had the key, but so had validation sets of them."""
    new = config()
    old = {**new, "data": {key: value for key, value in new["data"].items() if key != "test_split"}}
    old |= {"validation": {"x": {"data": "table", "test_split": 0.0}}}
    new |= {"validation": {"x": {"data": "table"}}}
    assert not differences(old, new) and not differences(new, old)
    split = {**new, "data": {**new["data"], "test_split": 0.2}}
    assert differences(old, split) == {"data.test_split": (0.0, 0.2)}
