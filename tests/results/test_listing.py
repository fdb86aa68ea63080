"""What `dlopt runs` selects, and in which order; tests/commands/test_runs.py shows the printed list."""

from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.results.listing import Query
from tests.support.folders import make_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, lr in enumerate((0.1, 0.3, 0.2)):
        make_run(tmp_path / str(i), lr=lr, accuracies=(0.5 + lr,))
    return tmp_path


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        (None, "012"),
        ("optimizer.lr", "021"),
        ("val_accuracy", "120"),  # the best first
        ("best_val_accuracy", "120"),
        ("val_loss", "120"),
    ],
)
def test_order(folder: Path, sort: str | None, expected: str) -> None:
    found, damaged = Query([folder], [], sort=sort).find()
    assert "".join(each.path.name for each in found) == expected and damaged == []
    assert [each.path.name for each in Query([folder], [], sort=sort, limit=2).find()[0]] == [*expected[:2]]


def test_numbers_come_before_texts_and_runs_without_a_value_last(tmp_path: Path) -> None:
    for name, config in {"absent": {}, "text": {"x": "a"}, "three": {"x": 3}, "minus": {"x": -1}}.items():
        make_run(tmp_path / name, config=config)
    found, _ = Query([tmp_path], [], sort="x").find()
    assert [each.path.name for each in found] == ["minus", "three", "text", "absent"]


@pytest.mark.parametrize("columns", [None, [], ["optimizer.lr"], ["val_loss", "status", "tags"]])
def test_columns_that_a_run_has_are_accepted(folder: Path, columns: list[str] | None) -> None:
    assert len(Query([folder], [], columns=columns).find()[0]) == 3


@pytest.mark.parametrize(
    ("sort", "columns", "message"),
    [
        (None, ["foo"], "columns=foo: unknown key; "),
        (None, ["optimizer.lr", "foo"], "columns=foo: unknown key; "),
        ("foo", None, "sort=foo: unknown key; "),
        ("foo", ["foo"], "sort=foo: unknown key; "),
        ("optimizer.lr", ["optimizer.lr", "foo"], "columns=foo: unknown key; "),
    ],
)
def test_names_the_key_that_no_run_has(folder: Path, sort: str | None, columns: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Query([folder], [], sort=sort, columns=columns).find()
