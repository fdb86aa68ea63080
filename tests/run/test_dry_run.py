"""Dry runs: what a run would need, and how long it takes if that is known."""

import json
from pathlib import Path

import pytest
import torch

from dlopt.config.compose import Composer
from dlopt.config.plan import plan
from dlopt.instruments.profiling import state_bytes
from dlopt.parallel.mode import Mode
from dlopt.run import dry_run
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from dlopt.training.progress import endless_batches
from tests.support.line import dlopt, refused

MLP = ("model=mlp", "model.widths=[16]", "threads=1", "tracking=[]")
PARALLEL = (*MLP, "optimizer=adamw", "epochs=3", "device=cuda")
ADAMW = "weights 4.79 KiB gradients 4.79 KiB state of AdamW 9.6 KiB"  # 1,226 parameters: 64 x 16 + 16 + 2 x 16 + 170
UNTIMED = "1 job; no job has ended to tell the time: dry_run=timed times an update"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ((*PARALLEL, "parallel=ddp", "parallel.processes=8"),
         ["processes 8 with a GPU each", "device cuda: no CUDA device here", "batch 64 samples 8 per process",
          "updates 21 per epoch 63 in all", f"memory {ADAMW} and activations: see `dlopt summary`", UNTIMED]),
        ((*PARALLEL, "parallel=fsdp", "parallel.processes=8", "parallel.shards=4", "accumulate=4", "ema=0.9"),
         ["batch 64 samples 8 per process 4 micro-batches", "weights 4.79 KiB gradients 4.79 KiB average 4.79 KiB",
          "per process weights 1.23 KiB gradients 1.23 KiB average 1.23 KiB state of AdamW 2.48 KiB"]),
        ((*PARALLEL, "parallel=fsdp", "parallel.processes=8", "optimizer=muon"), ["each process 1/8 of the model"]),
        ((*PARALLEL, "parallel=hybrid", "parallel.processes=8"), ["16 per process", "each process 1/2 of the model"]),
        ((*PARALLEL, "parallel=pipeline", "parallel.processes=4", "parallel.micro_batches=2"),
         ["batch 64 samples 64 per process 2 micro-batches", "about: the mode gives each process 1/4 of the model"]),
        ((*MLP, "parallel=ddp", "parallel.processes=3", "data.batch_size=10"), ["10 samples 2 to 4 per process"]),
        ((*MLP, "optimizer=lbfgs"), ["state of LBFGS unknown: it depends on values"]),
        ((*MLP, "optimizer.lr=auto"), ["rate optimizer.lr=auto: from a range test at the start", "state of SGD 4.79"]),
        ((*MLP, "scale_lr=sqrt"), ["scale_lr=sqrt: optimizer.lr times 0.5 = 0.05, for 64 samples instead of"]),
        ((*MLP, "accumulate={micro_batches: [1, 2], epochs: [5]}"), ["updates batches that grow 270 in all"]),
        ((*MLP, "data=cifar10", "data.root=here", "data.batch_size=full", "precision=bf16"),
         ["batch the training set", "updates unknown until the data are here: a dry run downloads nothing"]),
        (("model=vit", "adapt=lora", "threads=1"), ["(149,072 trainable)", "gradients 582 KiB"]),
        ((*MLP, "-m", "seed=0,1,2"), ["job 2: seed=2", "memory weights", "3 jobs; no job has ended"]),
        ((*MLP, "-m", "seed=0,1", "parallel=ddp", "hydra/launcher=slurm", "hydra.launcher.nodes=2",
          "hydra.launcher.tasks_per_node=2"), ["parallel ddp (4 processes)", "16 per process", "2 jobs, 2 at once"]),
    ],
)  # fmt: skip
def test_describes_a_run(words: tuple[str, ...], lines: list[str], tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", *words, "dry_run=true")
    assert result.code == 0, result.err
    assert result.out.startswith("dry run: nothing is trained\n") and not [*tmp_path.iterdir()]
    shown = " ".join(result.out.split())
    assert [line for line in lines if line not in shown] == [], result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel=fsdp", "parallel.processes=8", "parallel.shards=3"), "parallel.shards=3: must divide"),
        (("parallel=hybrid", "parallel.processes=7"), "3 x 2 = 6, but there are 7 processes"),
        (("parallel=fsdp", "parallel.processes=4", "optimizer=lbfgs"), "parallel=fsdp: LBFGS needs full tensors"),
        (("optimizer=bfgs", "optimizer.max_parameters=100"), "optimizer=bfgs: stores a matrix"),
        (("data=image_folder", "data.root=missing"), "data.root=missing: is missing"),
        (("dry_run=maybe",), "allowed: true | false | timed"),
    ],
)
def test_refuses_what_cannot_work(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, "train", *MLP, "dry_run=true", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_update_is_timed_on_a_device_that_exists(tmp_path: Path) -> None:
    assert "device=cuda: no CUDA device" in refused(tmp_path, "train", *MLP, "device=cuda", "dry_run=timed")
    words = (*MLP, "parallel=ddp", "parallel.processes=4", "dry_run=timed")
    last = dlopt(tmp_path, "train", *words).out.splitlines()[-1]
    assert last.startswith("1 job of about ") and " ms with 16 samples, timed in one process; start, comm" in last


def test_the_first_line_precedes_the_import_of_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_of(*_: object, **__: object) -> None:
        raise RuntimeError(capsys.readouterr().out)

    monkeypatch.setattr("dlopt.config.plan.checked", plan_of)
    from dlopt.commands.train import train

    with pytest.raises(RuntimeError, match=r"^dry run: nothing is trained\n$"):
        train([*MLP, "dry_run=true"])


def test_the_time_is_that_of_jobs_that_ended(tmp_path: Path) -> None:
    for number, (status, seconds) in enumerate((("finished", 40.0), ("stopped_early", 50.0), ("failed", 9.0))):
        folder = tmp_path / f"sweep/{number}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": status, "seconds": seconds}))
    result = dlopt(tmp_path, "train", "-m", *MLP, "seed=0,1,2,3", "hydra.sweep.dir=sweep", "dry_run=true")
    total = "4 jobs of about 45.0 s each: about 3:00 in total (as on average in 2 jobs that ended, without their start)"
    assert result.out.splitlines()[-1] == total, result.err


@pytest.mark.parametrize(
    ("jobs", "at_once", "seconds", "line"),
    [
        (6, 1, 2.16, "6 jobs of about 2.2 s each: about 13.2 s in total (x)"),
        (3, 2, 6.0, "3 jobs of about 6.0 s each, 2 at once: about 12.0 s in total (x)"),
        (32, 1, 72.4, "32 jobs of about 1:13 each: about 38:56 in total (x)"),
        (1, 1, 0.01, "1 job of about 0.1 s (x)"),
        (2, 16, 5.0, "2 jobs of about 5.0 s each, 2 at once: about 5.0 s in total (x)"),
        (3, 2, None, "3 jobs, 2 at once; no job has ended to tell the time: dry_run=timed times an update"),
    ],
)
def test_the_time_adds_up(jobs: int, at_once: int, seconds: float | None, line: str) -> None:
    assert dry_run.time_line(jobs, at_once, seconds, "x") == line


@pytest.mark.parametrize("optimizer", ["adopt", "muon", "distributed_shampoo", "sam", "schedule_free_adamw"])
def test_the_state_is_that_of_a_trained_optimizer(optimizer: str, tmp_path: Path) -> None:
    words = [*MLP, f"optimizer={optimizer}"]
    run_config = plan(Composer(words=words), words).run_config
    workload = dry_run._workload(run_config, Mode(torch.device("cpu")))
    assert workload is not None and all(parameter.is_meta for parameter in workload.module.parameters())
    state = dry_run._state(probe_trainer(workload, tmp_path).step.optimizer)
    trainer = probe_trainer(build_workload(run_config), tmp_path)
    batches = endless_batches(trainer.batches, trainer.progress)
    for number in range(3):
        trainer.run_update(next(batches), number)
    assert dry_run._bytes(state) == state_bytes(trainer.step.optimizer) > 0


def test_rows_are_sharded_as_by_chunks() -> None:
    tensors = [torch.empty(10, 3), torch.empty(7), torch.empty(())]
    most = sum(max(chunk.nbytes for chunk in each.chunk(4)) for each in tensors[:2]) + 4
    assert dry_run._rows_bytes(tensors, 4) == most == 4 * (3 * 3 + 2 + 1)
