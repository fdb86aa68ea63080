"""Common behaviour of all distributed modes: ranks stop and fail together, and runs resume in any other mode."""

import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import RunError
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint.checkpoints import load
from tests.support.equality import compare, metric_values, resume_run, run_distributed
from tests.support.modes import FILTER, MESH, PIPELINE, SPATIAL, SYNC, SYNC_DDP, SYNC_FSDP
from tests.support.ranks import run_ranks
from tests.support.runs import at_update, metrics, resume, start, terminate
from tests.support.sizes import MLP, RESNET

MODES = {"fsdp": SYNC_FSDP, "pipeline": PIPELINE, "filter": FILTER, "ddp": SYNC_DDP, "spatial": SPATIAL}
CASE = [*MLP, "augmentation=crop_flip", "data.batch_size=35", "epochs=6", "ema=0.9", "decay_norm_and_bias=false"]
FREEZE = 'optimizer.groups=[{match: "layer1.*", freeze: true}]'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "modes"),
    [
        (
            2,
            [
                *((accumulate, mode) for accumulate in (1, 3) for mode in (SYNC_DDP, SYNC_FSDP)),
                *((3, [*PIPELINE, f"parallel.schedule={schedule}"]) for schedule in ("1f1b", "gpipe")),
                (1, FILTER),
                (1, SPATIAL),
            ],
        ),
        (4, [(3, [*MESH, SYNC])]),
    ],
    ids=["2", "4"],
)
def test_many_steps(tmp_path: Path, processes: int, modes: list[tuple[int, list[str]]]) -> None:
    cases = {}
    for accumulate, mode in modes:
        case = [*RESNET, "data.batch_size=35", f"accumulate={accumulate}", "steps=25"]
        cases[f"{accumulate}-{'-'.join(mode)}"] = (case, mode)
    compare(tmp_path, processes, cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mode", "share"),
    [([*MLP, "epochs=8"], SYNC_FSDP, 0.7), ([*RESNET, "accumulate=2", "epochs=3"], PIPELINE, 1.0)],
    ids=["fsdp", "pipeline"],
)
def test_low_precision_trains(tmp_path: Path, case: list[str], mode: list[str], share: float) -> None:
    case = [*case, "model.dropout=0", "data.batch_size=32", "precision=bf16"]
    run_distributed(2, tmp_path, {"run": (case, mode)})
    start(tmp_path / "single", *case)
    losses, single = ([line["train_loss"] for line in metrics(tmp_path / run)] for run in ("run", "single"))
    assert losses == pytest.approx(single, rel=0.05)
    assert losses[-1] < share * losses[0]


def resume_in_all_modes(folder: str) -> None:
    """Called on all ranks: resumes and interrupts the run of a single process in all modes, one after the other."""
    rank = int(os.environ["DLOPT_RANK"])
    for number, overrides_of_mode in enumerate(MODES.values()):
        # Only rank 1 gets the stop request, and never in the last update of an epoch, whose evaluation could stop, too.
        with at_update(4 + 3 * number, terminate if rank == 1 else lambda: None):
            summary = resume_run(Path(folder), *CASE, *overrides_of_mode)
        # One update later: the stop flag is synchronized with the next loss.
        assert (summary["status"], summary["steps"]) == ("interrupted", 5 + 3 * number)


def structure(state: Any) -> Any:
    """Returns names, shapes and types in order, without the options for update kernels, which depend on the mode."""
    if isinstance(state, torch.Tensor):
        return tuple(state.shape), state.dtype
    if isinstance(state, dict):
        return [(key, structure(value)) for key, value in state.items() if key not in ("fused", "foreach")]
    return [structure(each) for each in state] if isinstance(state, list) else type(state)


def test_runs_resume_from_mode_to_mode(tmp_path: Path) -> None:
    uninterrupted, run = tmp_path / "whole", tmp_path / "run"
    start(uninterrupted, *CASE)
    with at_update(3, terminate):
        start(run, *CASE)
    before = load(run / "checkpoints/last.pt").state
    run_ranks("tests.parallel.test_modes:resume_in_all_modes", 2, tmp_path, str(run))
    after = load(run / "checkpoints/last.pt").state
    for part in ("model", "optimizer", "ema", "normalize"):
        assert structure(after[part]) == structure(before[part])
    resume(run, *CASE)
    for a, b in zip(metrics(uninterrupted), metrics(run), strict=True):
        assert metric_values(b) == pytest.approx(metric_values(a), rel=1e-9)
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == [3, *range(5, 5 + 3 * len(MODES), 3)]
    one, other = (load(folder / "checkpoints/last.pt").state for folder in (uninterrupted, run))
    for name, value in one["ema"].items():
        torch.testing.assert_close(other["ema"][name], value, rtol=1e-9, atol=1e-12)


def run_to_all_ends(folder: str) -> None:
    """Called on all ranks: prints how runs end."""
    for mode, overrides_of_mode in MODES.items():
        lines = [*MLP, "data.batch_size=32", "epochs=9", *overrides_of_mode]
        early = start(
            Path(folder) / mode / "early", *lines, "stopping=early", "stopping.patience=2", "stopping.min_delta=9"
        )
        results: dict[str, Any] = {"mode": mode, "early": [early["status"], early["epochs"], early["best_val_loss"]]}
        rendezvous.leave()
        tolerance = start(Path(folder) / mode / "tolerance", *lines, "stopping=tolerance", "stopping.tolerance=1e3")
        results["tolerance"] = [tolerance["status"], tolerance["steps"]]
        rendezvous.leave()
        frozen = start(Path(folder) / mode / "frozen", *lines, FREEZE, "steps=2")
        results["frozen"] = frozen["test_loss"]
        rendezvous.leave()
        try:
            start(Path(folder) / mode / "diverged", *lines, "optimizer.lr=1e160")
        except RunError as error:
            results["diverged"] = str(error)
            traceback.clear_frames(error.__traceback__)
        rendezvous.leave()
        print("results:", json.dumps(results))


@pytest.mark.slow
def test_all_ranks_end_together(tmp_path: Path) -> None:
    outputs = run_ranks("tests.parallel.test_modes:run_to_all_ends", 2, tmp_path, str(tmp_path))
    outputs_by_rank = [
        [line.partition("results: ")[2] for line in output.splitlines() if "results: " in line] for output in outputs
    ]
    lines = ["data.batch_size=32", "epochs=9"]
    single_frozen = start(tmp_path / "frozen", *MLP, *lines, FREEZE, "steps=2")
    single_tolerance = start(tmp_path / "tolerance", *MLP, *lines, "stopping=tolerance", "stopping.tolerance=1e3")
    for mode, *ranks in zip(MODES, *outputs_by_rank, strict=True):
        for each in map(json.loads, ranks):
            assert each["mode"] == mode
            assert each["early"] == [*json.loads(ranks[0])["early"]] and each["early"][:2] == ["stopped_early", 3]
            assert each["tolerance"] == [single_tolerance["status"], single_tolerance["steps"]]
            assert each["frozen"] == pytest.approx(single_frozen["test_loss"], rel=1e-9)
            assert "not finite" in each["diverged"] or "became" in each["diverged"]
            assert each["diverged"].partition("(")[0] == json.loads(ranks[0])["diverged"].partition("(")[0]
