"""What the runs of a report trained, in one line."""

import json
from pathlib import Path

from dlopt.results.setting import setting_text
from tests.support.folders import make_run, table

DATA = {
    "identity": {"train": {"samples": 1438}, "test": {"samples": 359}},
    "validation": {"count": 144, "unit": "images"},
}


def describe(run: Path, **environment: object) -> None:
    """Adds to the environment of a run."""
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | environment))


def test_one_line_from_the_files_of_the_runs(tmp_path: Path) -> None:
    for seed, day in enumerate(("2026-11-30", "2026-12-01")):
        run = make_run(tmp_path / str(seed), seed=seed, accuracies=(0.5,))
        describe(run, data=DATA, processor="AMD EPYC", gpu=None)
        (run / "train.log").write_text(f"{day} 05:34:10,184 INFO    starts\n")
    assert setting_text(table(tmp_path)) == (
        "digits (1,294 train, 144 val, 359 test) · mlp, 1,000 parameters · 1 epoch · AMD EPYC · "
        "dlopt 0.1.0 at commit cccccccc · 2026-11-30 to 2026-12-01"
    )


def test_counts_what_differs_and_leaves_out_what_is_unknown(tmp_path: Path) -> None:
    make_run(tmp_path / "0", config={"steps": 500, "data.subset": 100})
    run = make_run(tmp_path / "1", lr=0.2)
    describe(run, data={"identity": {"train": "?"}, "validation": 3}, dlopt=7, processor=["x"])
    assert setting_text(table(tmp_path)) == "2 data sets · mlp, 1,000 parameters · 2 lengths · 2 versions"


def test_the_device_is_the_gpu_unless_the_run_was_on_the_cpu(tmp_path: Path) -> None:
    for number, device in enumerate(("auto", "cpu")):
        run = make_run(tmp_path / device, lr=number + 1.0, config={"device": device})
        describe(run, processor="AMD EPYC", gpu="NVIDIA H100")
    assert " · 2 devices · " in setting_text(table(tmp_path))
    assert "NVIDIA H100" in setting_text(table(tmp_path / "auto"))
    assert "AMD EPYC" in setting_text(table(tmp_path / "cpu"))
