"""Observers of the user's own."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import RunError, UserError
from tests.support.runs import at_update, metrics, result, same, start, terminate
from tests.support.sizes import SMALL
from tests.support.user_parts import CALLS

OWN = "tests.support.user_parts."
CASE = [*SMALL, "allow_packages=[tests]", "epochs=2"]
RECORDER = f"observers=[{{_target_: {OWN}Recorder}}]"


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[tuple[str, Any]]]:
    CALLS.clear()
    yield CALLS
    CALLS.clear()


def test_sees_updates_evaluations_and_the_end(tmp_path: Path) -> None:
    """The losses are those of the batches: weighted by their samples, they give the epoch's training loss."""
    summary = start(tmp_path / "run", *CASE, RECORDER)
    names = [name for name, _ in CALLS]
    assert names == [*["update"] * 4, "evaluation"] * 2 + ["end"]
    updates = [values for name, values in CALLS if name == "update"]
    assert [step for step, _, _ in updates] == list(range(1, 9))
    lines = metrics(tmp_path / "run")
    sizes = (25, 25, 25, 15)
    mean = sum(size * loss for size, (_, loss, _) in zip(sizes, updates, strict=False)) / 90
    assert mean == pytest.approx(lines[0]["train_loss"], rel=1e-6)
    assert [values["step"] for name, values in CALLS if name == "evaluation"] == [4, 8]
    assert CALLS[-1][1] == summary
    # It changes nothing: the dicts are copies.
    start(tmp_path / "plain", *CASE)
    assert [line["val_loss"] for line in lines] == [line["val_loss"] for line in metrics(tmp_path / "plain")]
    assert same(result(tmp_path / "run")["model"], result(tmp_path / "plain")["model"])


def test_several_in_their_order_and_within_an_epoch(tmp_path: Path) -> None:
    both = f"observers=[{{_target_: {OWN}Recorder, label: a}}, {{_target_: {OWN}Recorder, label: b}}]"
    start(tmp_path, *CASE, both, "evaluate.every_steps=2", "epochs=1")
    assert [name for name, _ in CALLS if "update" not in name] == [
        "aevaluation", "bevaluation", "aevaluation", "bevaluation", "aend", "bend",
    ]  # fmt: skip


def test_an_interrupted_run_ends_too(tmp_path: Path) -> None:
    with at_update(3, terminate):
        start(tmp_path, *CASE, RECORDER)
    assert (CALLS[-1][0], CALLS[-1][1]["status"]) == ("end", "interrupted")


@pytest.mark.parametrize("method", ["after_update", "after_evaluation", "at_end"])
def test_one_that_raises_ends_the_run_with_its_name(tmp_path: Path, method: str) -> None:
    message = f"observers.0: {OWN}Raises.{method} raised ValueError: no"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        start(tmp_path, *CASE, f"observers=[{{_target_: {OWN}Raises, method: {method}}}]")


@pytest.mark.parametrize(
    ("observers", "message"),
    [
        (f"[{{_target_: {OWN}Nothing}}]", f"observers.0._target_={OWN}Nothing: has none of the methods after_update("),
        (f"[{{_target_: {OWN}spread}}]", "observers.0.outputs: a value is required"),
        (f"[{{_target_: {OWN}WrongArguments}}]", "WrongArguments: at_end must take (summary)"),
        (f"[{{_target_: {OWN}CannotBeBuilt}}]", "CannotBeBuilt: raised OSError: no such device"),
        (f"[{{_target_: {OWN}Absent}}]", f"observers.0._target_={OWN}Absent: unknown callable"),
        ("[{_target_: elsewhere.Watch}]", "set allow_packages=[elsewhere] on the command line"),
        (f"[{{_target_: {OWN}Recorder, lable: a}}]", "observers.0.lable=a: unknown key"),
        ("[{label: a}]", "observers.0._target_=null: must be the dotted name of a callable"),
        ("[watch]", "observers.0=watch: must name a class: observers=[{_target_: mine.Watch}]"),
        ("watch", "observers=watch: "),
    ],
)
def test_refuses(tmp_path: Path, observers: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        start(tmp_path, *CASE, f"observers={observers}")
    assert "\n" not in str(error.value)
