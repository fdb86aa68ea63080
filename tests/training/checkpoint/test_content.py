"""The one module that takes a checkpoint apart, and its defaults for checkpoints of an older dlopt."""

import re
from pathlib import Path

import pytest
import torch

import dlopt
from dlopt.training.checkpoint.content import Checkpoint, is_checkpoint
from tests.support.checkpoints import state

# Keys that only a checkpoint has, and those of a config or a choice, too, of what is named like a checkpoint.
APART = re.compile(
    r"""\[["'](progress|ema|normalize|rng)["']\]|\.get\(["'](progress|rng)["']"""
    r"""|(state|states\[\S+\]|saved|checkpoint)\[["'](config|model|optimizer|schedule)["']\]"""
)


def test_one_module_takes_checkpoints_apart() -> None:
    package = Path(dlopt.__file__).parent
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if APART.search(path.read_text())}
    assert found == {"training/checkpoint/content.py", "training/loop.py"}  # the loop writes the state, and restores it


def test_an_older_checkpoint_lacks_what_it_did_not_know() -> None:
    old = Checkpoint(state(3, best_epoch=2))
    assert (old.run_id, old.found_lr, old.data, old.identity, old.tokenizer) == (None, None, {}, None, None)
    assert not old.is_identified
    assert (old.evaluated_epoch, old.best_epoch, old.step) == (3, 2, 3), "it evaluated at the end of epochs only"


def test_the_evaluated_weights_are_the_average_if_there_is_one() -> None:
    weights, average = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
    both = Checkpoint({"model": weights, "ema": average})
    assert both.model is weights and both.evaluated_weights is average and both.merged_weights == average
    assert Checkpoint({"model": weights, "ema": None}).evaluated_weights is weights


def test_a_checkpoint_of_another_run_leaves_the_first_as_it_is() -> None:
    first = Checkpoint(state(1))
    other = Checkpoint(first.with_run_id("b"))
    assert (other.run_id, other.config["name"], first.run_id) == ("b", "try", None)
    assert other.model is first.model


@pytest.mark.parametrize("content", [None, [], {}, {"model": {}}, {"format": 1, "model": {}}])
def test_other_files_are_no_checkpoints(content: object) -> None:
    assert not is_checkpoint(content)
    assert is_checkpoint({"format": 1, **state(1)})
