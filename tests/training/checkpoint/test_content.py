"""The one module that takes a checkpoint apart."""

import math
import re
from collections import OrderedDict, defaultdict
from fractions import Fraction
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlopt
from dlopt.basics.errors import RunError, UserError
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.checkpoint.content import Checkpoint, blamed, damage, is_checkpoint, unreadable
from tests.support.checkpoints import Quantized, state
from tests.support.runs import start
from tests.support.sizes import SMALL, without

# Keys that only a checkpoint has, and those of a config or a choice, too, of what is named like a checkpoint.
APART = re.compile(
    r"""\[["'](progress|ema|normalize|rng)["']\]|\.get\(["'](progress|rng)["']"""
    r"""|(state|states\[\S+\]|saved|checkpoint)\[["'](config|model|optimizer|schedule)["']\]"""
)


def test_one_module_takes_checkpoints_apart() -> None:
    package = Path(dlopt.__file__).parent
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if APART.search(path.read_text())}
    assert found == {"training/checkpoint/content.py", "training/loop.py"}  # the loop writes the state, and restores it


def test_the_evaluated_weights_are_the_average_if_there_is_one() -> None:
    weights, average = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
    both = Checkpoint({"model": weights, "ema": average})
    assert both.model is weights and both.evaluated_weights is average and both.merged_weights == average
    assert Checkpoint({"model": weights, "ema": None}).evaluated_weights is weights


def test_a_checkpoint_of_another_run_leaves_the_first_as_it_is() -> None:
    first = Checkpoint(state(1))
    other = Checkpoint(first.with_run_id("b"))
    assert (other.run_id, other.config["name"], first.run_id) == ("b", "try", "a")
    assert other.model is first.model


@pytest.mark.parametrize("content", [None, [], {}, {"model": {}}, {"format": 1, "model": {}}])
def test_other_files_are_no_checkpoints(content: object) -> None:
    assert not is_checkpoint(content)
    assert is_checkpoint({"format": 1, **state(1)})


WRONG: dict[tuple[str | int, ...], list[Any]] = {
    ("model",): [None, [1], {"a": {"b": torch.zeros(1)}}, {1: torch.zeros(1)}],
    ("model", "weight"): [None, "x", torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")],
    ("optimizer",): [None, 5],
    ("ema",): [3, [], {"weight": 1.0}],
    ("rng",): [None],
    ("config",): [None, [], 5, {1: 2}],
    ("config", "note"): [torch.zeros(1), b"", [0] * 200_000, reduce(lambda inner, _: [inner], range(200), 0)],
    ("progress",): [None, [], {}, {"epoch": 1}],
    ("progress", "step"): [None, "1", -1, 10**30, math.nan, torch.zeros(1)],
    ("progress", "best"): [None, {}, {"epoch": "1"}, {"epoch": None, "monitor": 3}],
    ("progress", "data"): [None, [], {"sample": [0]}, {"classes": [1]}, {"task": {"kind": "x"}}, {"identity": [1]}],
    ("normalize",): [None, {"scale": 1.0}],
}


@pytest.mark.parametrize("keys", WRONG)
def test_content_of_wrong_types_is_damage(keys: tuple[str, ...]) -> None:
    """Whoever writes a checkpoint can give it a right checksum."""
    assert damage({"format": 1, **state(1)}) is None
    for value in WRONG[keys]:
        content = state(1)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        found = damage(content)
        assert found is not None and found.startswith(str(keys[0])) and len(found) < 200, (value, found)


READABLE = [
    None, True, 1, 10**30, 1.5, 1j, "a", b"a", bytearray(b"a"), (1,), [1], {1}, {"a": 1}, OrderedDict(a=1),
    torch.Size([1]), torch.float32, torch.device("cpu"), torch.zeros(1), nn.Parameter(torch.zeros(1)),
]  # fmt: skip
UNREADABLE = [
    np.float64(1), np.int64(1), np.zeros(1), defaultdict(int), frozenset({1}), range(1), Path("a"), Fraction(1),
    Quantized(torch.zeros(1)),
]  # fmt: skip


@pytest.mark.parametrize("value", [*READABLE, *UNREADABLE], ids=lambda value: type(value).__name__)
def test_what_cannot_be_read_again_is_known_before_it_is_written(value: Any, tmp_path: Path) -> None:
    torch.save({"a": {"b": [1, value]}}, tmp_path / "a.pt")
    found = unreadable({"a": {"b": [1, value]}})
    if any(value is each for each in READABLE):
        assert found is None
        torch.load(tmp_path / "a.pt", weights_only=True)
        return
    assert found is not None and found.startswith("a.b.1 has the type ") and type(value).__name__ in found
    with pytest.raises(UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_a_run_ends_at_a_state_that_could_not_be_read_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), best=True)
    wrong = {
        r"optimizer.state.a has the type numpy.float64": {"optimizer": {"state": {"a": np.float64(1)}}},
        r"model.layer._extra_state: Input should be an instance of Tensor": {"model": {"layer._extra_state": 1}},
    }
    for message, part in wrong.items():
        with pytest.raises(RunError, match=f"last.pt could not be written: {message}"):
            checkpoints.save({**state(2), **part}, best=True)
    newest = checkpoints.load_newest()
    assert newest is not None and newest.step == 1


def test_an_error_of_its_parts_names_the_checkpoint() -> None:
    for error in (RuntimeError("size mismatch\n\tof x"), KeyError("a"), ValueError("\x1b[2J")):
        with pytest.raises(UserError, match="checkpoint=a: its content does not fit") as raised, blamed("checkpoint=a"):
            raise error
        assert str(raised.value).isprintable()
    for passed in (torch.OutOfMemoryError(), UserError("x")):
        with pytest.raises(type(passed)), blamed("a"):
            raise passed


def test_a_state_of_other_tensors_is_refused_after_the_first_update(tmp_path: Path) -> None:
    """Not by the first checkpoint, hours later."""
    keys = ["optimizer=tests.support.checkpoints.QuantizedMomentum", "optimizer.lr=0.1", "allow_packages=[tests]"]
    message = r"no checkpoint can hold the state of QuantizedMomentum: optimizer\.state\.0\.momentum has the type"
    with pytest.raises(RunError, match=message):
        start(tmp_path, *without(SMALL, "optimizer.lr"), *keys, "checkpoint.every_epochs=null")
    assert not (tmp_path / "metrics.jsonl").exists()
