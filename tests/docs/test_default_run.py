"""docs/examples/default_run.py is `dlopt train` without arguments: its losses and accuracies are equal, bit for bit."""

import ast
import json
import runpy
from pathlib import Path

import torch

from tests.support.line import dlopt
from tests.support.pages import ROOT

PATH = ROOT / "docs/examples/default_run.py"
ALLOWED = ("dlopt.models", "dlopt.data", "dlopt.basics.random")
EPOCHS = 2


def test_losses_equal_those_of_dlopt_train(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        history, tested = runpy.run_path(str(PATH))["run"](EPOCHS)
    finally:
        torch.set_num_threads(threads)
    # No key changes what the run computes, but its length: the first two say on what, the others only save time.
    keys = ("device=cpu", "threads=1", "tracking=[]", "checkpoint.every_epochs=null", "hydra.run.dir=run")
    done = dlopt(tmp_path, "train", f"epochs={EPOCHS}", *keys)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert history == [{name: row[name] for name in metrics} for row, metrics in zip(rows, history, strict=True)]
    assert {*history[0]} == {"epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert tested == {name: summary[name] for name in ("test_loss", "test_accuracy")}


def test_script_is_short_and_imports_only_parts() -> None:
    source = PATH.read_text()
    assert len(source.splitlines()) <= 150
    modules = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
    }  # fmt: skip
    ours = {name for name in modules if name.partition(".")[0] == "dlopt"}
    assert ours and all(name.startswith(ALLOWED) for name in ours)
    assert {name.partition(".")[0] for name in modules} == {"copy", "math", "torch", "dlopt"}
