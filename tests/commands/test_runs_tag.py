"""Tags and notes of runs: `dlopt train tags=[...]`, `dlopt runs tag`, conditions, columns."""

from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from dlopt import open_run
from dlopt.basics.folders import RunFolder
from dlopt.commands.runs_tag import edit
from tests.support.folders import make_run
from tests.support.line import SMALL, dlopt, entries, refused
from tests.support.terminal import in_terminal, plain

RUNS = ("a", "b", "old")


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Run `a` has tags and a note, `b` has none, `old` is of a version without these keys."""
    make_run(tmp_path / "outputs/a", lr=0.1, config={"tags": ["base", "paper-2"], "note": "lower lr"})
    make_run(tmp_path / "outputs/b", lr=0.2, config={"tags": [], "note": None})
    make_run(tmp_path / "outputs/old", lr=0.3)
    return tmp_path


def found(folder: Path, *conditions: str) -> list[str]:
    return [Path(line).name for line in dlopt(folder, "runs", *conditions, "--paths").out.splitlines()]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("tags=base", ["a"]),
        ("tags=paper*", ["a"]),
        ("tags!=base", ["b", "old"]),
        ("tags=[base,paper-2]", ["a"]),
        ("tags=other", []),
        ("note=*lr", ["a"]),
    ],
)
def test_conditions(outputs: Path, condition: str, expected: list[str]) -> None:
    assert found(outputs, condition) == expected


def test_columns(outputs: Path) -> None:
    header, *lines = (line.split("\t") for line in dlopt(outputs, "runs").out.splitlines())
    shown = [dict(zip(header, line, strict=True)) for line in lines]
    assert [each["tags"] for each in shown] == ["[base,paper-2]", "[]", ""]
    assert [each["note"] for each in shown] == ["lower lr", "", ""]
    _, text = in_terminal(outputs, 120, "runs")
    assert "base,paper-2" in plain(text) and "lower lr" in plain(text)
    assert "tags" not in dlopt(outputs, "runs", "outputs/b").out


def test_tag_adds_and_removes(outputs: Path) -> None:
    result = dlopt(outputs, "runs", "tag", "outputs/a", "outputs/old", "good", "base")
    assert (result.code, result.err) == (0, "")
    assert result.out == "outputs/a: tags=[base,paper-2,good] note=lower lr\noutputs/old: tags=[good,base]\n"
    assert found(outputs, "tags=good") == ["a", "old"]
    result = dlopt(outputs, "runs", "tag", "outputs/a", "base", "paper-2", "--remove", "note=")
    assert result.out == "outputs/a: tags=[good]\n"
    assert dlopt(outputs, "runs", "tag", "outputs/b", "note=größe, 2").out == "outputs/b: tags=[] note=größe, 2\n"
    assert open_run(outputs / "outputs/b").note == "größe, 2"


def test_commands_at_once_lose_no_tag(outputs: Path) -> None:
    def add(tag: str) -> None:
        edit([outputs / "outputs/a"], [tag])

    processes = [get_context("fork").Process(target=add, args=(f"t{number}",), daemon=True) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert {f"t{number}" for number in range(8)} < {*open_run(outputs / "outputs/a").tags}


@pytest.mark.parametrize("tags", ["abc", 3, {"a": 1}, None])
def test_what_is_no_list_of_tags_is_replaced(outputs: Path, tags: object) -> None:
    """In a config.yaml that was edited by hand."""
    path = outputs / "outputs/a/config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"tags": tags}))
    assert dlopt(outputs, "runs", "tag", "outputs/a", "x").out == "outputs/a: tags=[x] note=lower lr\n"


def test_tag_changes_nothing_else(outputs: Path) -> None:
    before = {name: (outputs / f"outputs/{name}/config.yaml").read_bytes() for name in RUNS}
    files = entries(outputs)
    for name in RUNS:
        dlopt(outputs, "runs", "tag", f"outputs/{name}", "x", "note=y")
        after = RunFolder(outputs / "outputs" / name).config()
        assert after == {**yaml.safe_load(before[name]), "tags": [*(["base", "paper-2"] if name == "a" else []), "x"],
                         "note": "y"}  # fmt: skip
    assert entries(outputs) == files


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("nowhere good", "nowhere: no such folder; runs tag needs"),
        ("outputs/a", "needs tags to add, or note=TEXT"),
        ("outputs/a --remove", "needs tags"),
        ("outputs/a [x]", "tags=[[x]]: not a tag; allowed: letters, digits"),
        ("outputs/a x,y", "tags=[x,y]: not a tag"),
        ("outputs/a good --al", "--al: unknown flag"),
        ("outputs/a outputs good", "outputs: config.yaml is missing; nothing was changed"),
        ("outputs/a outputs/damaged good", "outputs/damaged: summary.json is damaged; nothing was changed"),
    ],
)
def test_refused(outputs: Path, typed: str, message: str) -> None:
    make_run(outputs / "outputs/damaged")
    (outputs / "outputs/damaged/summary.json").write_text("{")
    configs = {path: path.read_bytes() for path in outputs.glob("outputs/*/config.yaml")}
    assert message in refused(outputs, "runs", "tag", *typed.split())
    assert configs == {path: path.read_bytes() for path in configs}


@pytest.mark.parametrize("value", ["[a b]", "[-a]", "['a,b']", "[a/b]", "[true]"])
def test_train_refuses_tags_that_no_condition_can_name(tmp_path: Path, value: str) -> None:
    assert refused(tmp_path, "train", *SMALL, f"tags={value}").startswith("dlopt: tags=")


def test_a_note_is_any_text(tmp_path: Path) -> None:
    note = "lower lr=0.1, größe: see [1] (Smith: 'cyclical')"
    assert dlopt(tmp_path, "train", *SMALL, f"note={note}", "hydra.run.dir=run").code == 0
    assert open_run(tmp_path / "run").note == note
    assert dlopt(tmp_path, "train", "from=run", "note=null", "hydra.run.dir=again").code == 0
    assert open_run(tmp_path / "again").note is None


def test_resuming_keeps_the_tags_unless_others_are_typed(tmp_path: Path) -> None:
    """Tags are no part of the config that has to be equal; a repeated command does not undo `dlopt runs tag`."""

    def train(*typed: str) -> int:
        return dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run", *typed).code

    def labels() -> tuple[tuple[str, ...], str | None]:
        run = open_run(tmp_path / "run")
        return run.tags, run.note

    assert train("tags=[first]", "max_time=1e-9") == 75
    assert labels() == (("first",), None)
    dlopt(tmp_path, "runs", "tag", "run", "second", "note=later")
    assert train("tags=[first]", "max_time=1e-9", "resume=auto") == 75
    assert labels() == (("first", "second"), "later")
    assert train("max_time=1e-9", "resume=auto") == 75
    assert labels() == (("first", "second"), "later")
    assert train("tags=[third]", "resume=auto") == 0
    assert labels() == (("third",), "later")
    fresh = dlopt(tmp_path, "train", "from=run", "hydra.run.dir=fresh")
    assert fresh.code == 0, fresh.err
    assert open_run(tmp_path / "fresh").tags == ()  # another run
