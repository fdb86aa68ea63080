"""What every mode that splits the model promises: it stops, fails and resumes as one run, in whatever mode."""

import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.errors import RunError
from dlopt.parallel import rendezvous
from dlopt.training.checkpoint import Checkpoints, load
from dlopt.training.trainer import Run, train
from tests.parallel.equality import MLP, metric_values
from tests.parallel.ranks import run_ranks
from tests.training.runs import at_update, experiment, metrics, resume, start, terminate

FSDP = ["parallel=fsdp", "parallel.unit_parameters=100", "parallel.sync_batchnorm=true"]
PIPELINE = ["parallel=pipeline"]
MODES = {
    "fsdp": FSDP,
    "pipeline": PIPELINE,
    "filter": ["parallel=filter"],
    "ddp": ["parallel=ddp", "parallel.sync_batchnorm=true"],
    "spatial": ["parallel=spatial"],
}
CASE = [*MLP, "augmentation=crop_flip", "data.batch_size=35", "epochs=6", "ema=0.9", "decay_norm_and_bias=false"]
FREEZE = 'optimizer.groups=[{match: "layer1.*", freeze: true}]'


def go_on(folder: Path, *overrides: str) -> dict[str, Any]:
    """In each rank: the run in `folder`, whose checkpoint rank 0 reads."""
    main = os.environ["DLOPT_RANK"] == "0"
    state = Checkpoints(folder / "checkpoints").load_newest() if main else None
    return train(Run(experiment(*overrides), folder, state), console=False)


def passed_on(folder: str) -> None:
    """In each rank: a run that one process has left goes through the modes, and is left by the last of them."""
    rank = int(os.environ["DLOPT_RANK"])
    for number, own in enumerate(MODES.values()):
        # Only one of them is asked, and not at the end of an epoch, whose evaluation may be stopped, too.
        with at_update(4 + 3 * number, terminate if rank == 1 else lambda: None):
            summary = go_on(Path(folder), *CASE, *own)
        assert (summary["status"], summary["steps"]) == ("interrupted", 5 + 3 * number)  # told with the next loss
        rendezvous.leave()


def structure(state: Any) -> Any:
    """Names, shapes and types, in their order; not which kernels do the update, which each mode chooses for itself."""
    if isinstance(state, torch.Tensor):
        return tuple(state.shape), state.dtype
    if isinstance(state, dict):
        return [(key, structure(value)) for key, value in state.items() if key not in ("fused", "foreach")]
    return [structure(each) for each in state] if isinstance(state, list) else type(state)


def test_a_run_passes_from_mode_to_mode(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    start(whole, *CASE)
    with at_update(3, terminate):
        start(run, *CASE)
    before = load(run / "checkpoints/last.pt")
    run_ranks("tests.parallel.test_modes:passed_on", 2, tmp_path, str(run))
    after = load(run / "checkpoints/last.pt")
    for part in ("model", "optimizer", "ema", "normalize"):
        assert structure(after[part]) == structure(before[part])
    resume(run, *CASE)
    for a, b in zip(metrics(whole), metrics(run), strict=True):
        assert metric_values(b) == pytest.approx(metric_values(a), rel=1e-9)
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == [3, *range(5, 5 + 3 * len(MODES), 3)]
    one, other = (load(folder / "checkpoints/last.pt") for folder in (whole, run))
    for name, value in one["ema"].items():
        torch.testing.assert_close(other["ema"][name], value, rtol=1e-9, atol=1e-12)


def ends(folder: str) -> None:
    """In each rank: how runs end, printed."""
    for mode, own in MODES.items():
        lines = [*MLP, "data.batch_size=32", "epochs=9", *own]
        early = start(
            Path(folder) / mode / "early", *lines, "stopping=early", "stopping.patience=2", "stopping.min_delta=9"
        )
        found: dict[str, Any] = {"mode": mode, "early": [early["status"], early["epochs"], early["best_val_loss"]]}
        rendezvous.leave()
        small = start(Path(folder) / mode / "moved", *lines, "stopping=tolerance", "stopping.tolerance=1e3")
        found["tolerance"] = [small["status"], small["steps"]]
        rendezvous.leave()
        frozen = start(Path(folder) / mode / "frozen", *lines, FREEZE, "steps=2")
        found["frozen"] = frozen["test_loss"]
        rendezvous.leave()
        try:
            start(Path(folder) / mode / "diverged", *lines, "optimizer.lr=1e160")
        except RunError as error:
            found["diverged"] = str(error)
            traceback.clear_frames(error.__traceback__)
        rendezvous.leave()
        print("found:", json.dumps(found))


@pytest.mark.slow
def test_all_ranks_end_together(tmp_path: Path) -> None:
    outputs = run_ranks("tests.parallel.test_modes:ends", 2, tmp_path, str(tmp_path))
    told = [[line.partition("found: ")[2] for line in output.splitlines() if "found: " in line] for output in outputs]
    lines = ["data.batch_size=32", "epochs=9"]
    single = start(tmp_path / "frozen", *MLP, *lines, FREEZE, "steps=2")
    rule = start(tmp_path / "moved", *MLP, *lines, "stopping=tolerance", "stopping.tolerance=1e3")
    for mode, *ranks in zip(MODES, *told, strict=True):
        for each in map(json.loads, ranks):
            assert each["mode"] == mode
            assert each["early"] == [*json.loads(ranks[0])["early"]] and each["early"][:2] == ["stopped_early", 3]
            assert each["tolerance"] == [rule["status"], rule["steps"]]
            assert each["frozen"] == pytest.approx(single["test_loss"], rel=1e-9)
            assert "not finite" in each["diverged"] or "became" in each["diverged"]
            assert each["diverged"].partition("(")[0] == json.loads(ranks[0])["diverged"].partition("(")[0]
