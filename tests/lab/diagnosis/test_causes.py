"""The typed line of a diagnosis mends the planted cause, and nothing false is said without one."""

import shlex
from pathlib import Path

import pytest

from tests.support.line import dlopt

COMMON = "threads=1 device=cpu eigenvalues=0 data.subset=300"
MLP = "model=mlp model.norm=none model.widths=[32,32]"
TANH = f"{MLP} model.activation=tanh init=xavier_normal optimizer=sgd"
RESNET = "model=resnet20 model.width=4 optimizer=momentum"
DEEP = f"{MLP.replace('[32,32]', '[32,32,32,32,32,32,32,32]')} optimizer=sgd optimizer.lr=0.1"
SITUATIONS = {
    "rate 10x": (f"{MLP} optimizer=sgd optimizer.lr=1.7", "optimizer.lr=1.7 is too high", "optimizer.lr="),
    "rate 100x": (f"{MLP} optimizer=sgd optimizer.lr=17", "optimizer.lr=17 is too high", "optimizer.lr="),
    "rate 1000x, tanh": (f"{TANH} optimizer.lr=300", "optimizer.lr=300 is too high", "optimizer.lr="),
    "rate 1000x, ResNet": (f"{RESNET} optimizer.lr=300", "optimizer.lr=300 is too high", "optimizer.lr="),
    "rate 1000x, AdamW": (f"{MLP} optimizer=adamw optimizer.lr=3", "optimizer.lr=3 is too high", "optimizer.lr="),
    "inputs": (f"{MLP} optimizer=sgd normalize=none", "the inputs have mean 7", "normalize=standardize"),
    "init 10x": (f"{MLP} optimizer=sgd optimizer.lr=0.1 init=normal init.std=1.5", "at the start", "init="),
    "init 0.1x": (f"{DEEP} init=normal init.std=0.02", "layer1.linear is vanishing", "init=kaiming_normal"),
    "saturated": (
        f"{MLP} model.activation=tanh init=normal init.std=2 optimizer=sgd", "is saturated", "init=xavier_normal",
    ),
    "depth": (f"{DEEP} model.activation=sigmoid", "layer1.linear is vanishing", "init=xavier_normal"),
}  # fmt: skip
FAST = ("rate 100x", "inputs", "init 10x")


def first_lines(folder: Path, line: str) -> tuple[str, str, str]:
    """Returns which layers, why, and what to type."""
    result = dlopt(folder, "diagnose", *shlex.split(line), "output=x")
    assert (result.code, result.err) == (0, ""), result.err
    which, why, what = [each for each in result.out.splitlines() if each][:3]
    return which, why, what


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SITUATIONS])
def test_the_typed_line_mends_the_cause(name: str, tmp_path: Path) -> None:
    line, reason, change = SITUATIONS[name]
    which, why, what = first_lines(tmp_path, f"{line} {COMMON}")
    assert not which.startswith("healthy") and reason in why
    for _ in range(2 if name == "depth" else 1):  # which needs a normalization, too
        typed = what.removeprefix("type: dlopt diagnose ")
        assert change in typed and typed != what
        which, _, what = first_lines(tmp_path, typed)
        change = "model.norm=batch"
    assert which == f"healthy: all {which.split()[2]} layers, before and after 20 updates"


@pytest.mark.parametrize("line", ["optimizer=sgd optimizer.lr=0.1 data.label_noise=0.5", "optimizer=adamw"])
def test_nothing_is_blamed_in_a_network_that_learns_or_cannot(line: str, tmp_path: Path) -> None:
    which, _, what = first_lines(tmp_path, f"{MLP} {line} {COMMON}")
    assert which == "healthy: all 3 layers, before and after 20 updates" and what.startswith("if it does not learn")
