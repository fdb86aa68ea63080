"""Tests of `from=RUN at=LENGTHS`: each branch equals the straight run of its length, bit for bit."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.config.overrides import with_folder
from dlopt.schedules import Horizon
from dlopt.sweeps import sweep as sweeps
from dlopt.sweeps.branches import begin, branched
from dlopt.sweeps.jobs import Job
from dlopt.sweeps.matching import distance_of_jobs
from dlopt.training.checkpoint.checkpoints import Checkpoints, load_of_run
from dlopt.training.progress import TrainingRun
from tests.support.line import dlopt, refused
from tests.support.runs import metrics, result, run_job, same, timeless
from tests.support.sizes import SMALL

# 4 updates per epoch.
PARTS = [
    *SMALL, "model.dropout=0.3", "augmentation=crop_flip", "optimizer.momentum=0.9", "checkpoint.every_steps=1",
    "checkpoint.keep=100",
]  # fmt: skip
# The cooldown of N epochs is the last quarter of its 4 N - 4 updates after the warmup.
WSD = ["schedule=wsd", "schedule.warmup_steps=4", "schedule.decay_fraction=0.25"]


STEMS = {
    "stem": [*WSD, "epochs=5"],
    "tail": [*WSD, "ema=tail", "epochs=5"],
    "steps": [*WSD, "steps=17"],
    "short": [*WSD, "data.batch_size=5", "steps=14"],  # of 18 updates an epoch
    "constant": ["schedule=constant", "schedule.warmup_steps=4", "epochs=4"],
    "cosine": ["schedule=cosine", "epochs=3"],
    "fraction": ["schedule=wsd", "epochs=3"],
    "few": [*WSD, "epochs=3", "checkpoint.keep=1"],
}


def train(folder: Path, *overrides: str) -> Path:
    """Returns the folder of a run of the command."""
    ended = dlopt(folder.parent, "train", *PARTS, *overrides, f"output={folder}")
    assert ended.code == 0, ended
    return folder


@pytest.fixture(scope="module")
def stem_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains each stem once, when a test first needs it."""
    folder = tmp_path_factory.mktemp("stems")
    return functools.cache(lambda name: train(folder / name, *STEMS[name]))


def jobs_of(folder: Path, *words: str) -> list[Job]:
    """Returns the jobs of a sweep of branches, with their checkpoints in their folders."""
    composer = Composer()
    request = sweeps.request(composer, branched(composer, with_folder([*words, f"output={folder}"], multirun=True)))
    jobs = sweeps._jobs(request, folder, sweeps._plans(request), None, "")
    begin(jobs)
    return jobs


def run(job: Job) -> None:
    """Trains a job in this process."""
    plan, folder = job.plan, job.folder
    saved = {"run_id": folder.run_id(), **plan.saved}
    checkpoint = load_of_run(folder, saved)
    assert checkpoint is not None
    run_job(TrainingRun(replace(plan.run_config, config=saved), folder.path, checkpoint, plan.choices))


# The stem, and what its branches change; the key of the lengths, and the update after which each branch begins: before
# the first update with another rate, floor(N - 0.25 (N - 4)) + 1, and before the last one.
BRANCHES: dict[str, tuple[str, list[str], str, dict[int, int]]] = {
    "epochs": ("stem", [], "epochs", {2: 7, 4: 14}),
    "tail average": ("tail", [], "epochs", {4: 12}),  # of the last quarter
    "updates": ("steps", [], "steps", {9: 8, 14: 12}),
    "less than an epoch": ("short", [], "steps", {10: 9}),  # the length of an epoch does not follow from it
    "longer cooldown": ("stem", ["schedule.decay_fraction=0.5", "schedule.shape=linear"], "epochs", {4: 11}),
    "shorter cooldown": ("stem", ["schedule.decay_steps=2"], "epochs", {2: 7, 5: 17}),  # the stem's own comes first
    "added cooldown": ("constant", [*WSD, "schedule.final=0.1"], "epochs", {2: 7, 4: 14}),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_each_branch_equals_the_straight_run(name: str, stem_of: Callable[[str], Path], tmp_path: Path) -> None:
    stem, changed, key, starts = BRANCHES[name]
    at = f"at={','.join(map(str, starts))}"
    jobs = jobs_of(tmp_path / "sweep", f"from={stem_of(stem)}", at, *changed)
    for job, (length, start) in zip(jobs, starts.items(), strict=True):
        run(job)
        same_words = [word for word in STEMS[stem] if not word.startswith(("epochs", "steps"))]
        straight = train(tmp_path / f"straight-{length}", *same_words, *changed, f"{key}={length}")
        assert timeless(job.folder.path) == timeless(straight)
        assert same(result(job.folder.path), result(straight))
        assert same(result(job.folder.path, "best.pt")["model"], result(straight, "best.pt")["model"])
        assert (job.folder.summary() or {})["resumed_from"] == [start]


def test_lengths_are_listed_like_any_axis(
    stem_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem, short = map(stem_of, ("stem", "short"))
    jobs = jobs_of(tmp_path / "sweep", f"from={stem}", "at=range(2,6)")
    assert [job.plan.saved["epochs"] for job in jobs] == [2, 3, 4, 5]
    assert [job.plan.saved["schedule_epochs"] for job in jobs] == [2, 3, 4, 5]
    assert [job.plan.saved["resume"] for job in jobs] == [None] * 4
    # The last one has the length of the run itself, which it repeats: nothing is left to do.
    assert "branches: 4 updates instead of 56" in capsys.readouterr().out
    resumed = jobs_of(tmp_path / "sweep", f"from={stem}", "at=range(2,6)", "resume=auto")
    assert distance_of_jobs(RunFolder(tmp_path / "sweep"), resumed) == 0
    # Checkpoints of earlier versions do not say how many updates an epoch has; not every epoch is evaluated.
    older = Path(shutil.copytree(stem, tmp_path / "older"))
    history = (older / "metrics.jsonl").read_text().splitlines(keepends=True)
    (older / "metrics.jsonl").write_text("".join(history[1:]))
    short = Path(shutil.copytree(short, tmp_path / "short"))
    for folder in (older, short):
        _of_earlier_version(folder)
    former = jobs_of(tmp_path / "former", f"from={older}", "at=range(2,6)")
    with pytest.raises(UserError, match="ended it within its first epoch; train it again"):
        jobs_of(tmp_path / "none", f"from={short}", "at=10")
    assert [Path(job.plan.branches_from).name for job in former] == [Path(job.plan.branches_from).name for job in jobs]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_killed_while_branches_are_prepared(after: int, stem_of: Callable[[str], Path], tmp_path: Path) -> None:
    """resume=auto gives those without a checkpoint theirs; one that is added later begins like the first ones."""
    calls, adopt = iter(range(9)), Checkpoints.adopt

    def killed(*arguments: Any, **keys: Any) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt
        adopt(*arguments, **keys)

    words = [f"from={stem_of('stem')}", "at=2,4"]
    with mock.patch.object(Checkpoints, "adopt", killed), pytest.raises(KeyboardInterrupt):
        jobs_of(tmp_path / "sweep", *words)
    assert [metrics(tmp_path / "sweep/0")[0]["epoch"]] == [1]
    jobs = jobs_of(tmp_path / "sweep", *words, "resume=auto")
    run(jobs[1])
    jobs = jobs_of(tmp_path / "sweep", words[0], "at=2,4,5", "resume=auto")
    steps = [result(job.folder.path)["progress"]["step"] for job in jobs]
    assert steps == [7, 16, 20]  # the second one has ended, and stays as it is
    assert (jobs[1].folder.summary() or {})["resumed_from"] == [14]  # floor(16 - 0.25 (16 - 4)) + 1


def _lines(*changed: tuple[str, Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        lines = metrics(folder)
        for key, value in changed:
            lines[0][key] = value
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    return damage


def _of_earlier_version(folder: Path) -> None:
    """Writes the checkpoints of a run as an earlier version did, which only said how long the schedule is."""
    for path in (folder / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["progress"]["horizon"] = state["progress"].pop("length")["horizon"]
        Checkpoints(folder / "checkpoints")._write(path, state)


def _forge(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"epoch": 5.0, "step": 20}\n')
    path = folder / "checkpoints/last.pt"
    state = torch.load(path, weights_only=True)
    state["progress"]["step"] = 10**11
    state["progress"]["length"] |= {"horizon": 10**11, "per_epoch": 10**10}
    Checkpoints(folder / "checkpoints")._write(path, state)


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "epoch 0": (_lines(("epoch", 0)), "metrics.jsonl is damaged: epoch 0, step 4"),
    "no number": (_lines(("step", "x")), "metrics.jsonl is damaged: epoch 1, step x"),
    "list": (_lines(("step", [1])), r"metrics.jsonl is damaged: epoch 1, step \[1\]"),
    "no step": (lambda folder: (folder / "metrics.jsonl").write_text('{"epoch": 1}\n'), "damaged: epoch 1, step None"),
    "cut off": (
        lambda folder: (folder / "metrics.jsonl").write_text("{"),
        "damaged: it ends after epoch 0",
    ),
    "forged": (_forge, "at=2: 20,000,000,000 updates; a branch has at most 4,000,000"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_refuses_a_damaged_run(name: str, stem_of: Callable[[str], Path], tmp_path: Path) -> None:
    change, message = DAMAGED[name]
    shutil.copytree(stem_of("stem"), tmp_path / "stem")
    change(tmp_path / "stem")
    assert re.search(message, refused(tmp_path, "train", "-m", "from=stem", "at=2"))


def test_refuses_a_batch_that_grows(tmp_path: Path) -> None:
    """Its checkpoints count updates, its schedule batches."""
    train(tmp_path / "stem", *WSD, "epochs=4", "accumulate={micro_batches:[1,2],epochs:[2]}")
    message = refused(tmp_path, "train", "-m", "from=stem", "at=3")
    assert "from=stem: its batch grows: accumulate={micro_batches: [1, 2], epochs: [2.0]}; branches need a" in message


def test_refuses_a_run_that_was_lengthened_within_an_epoch(tmp_path: Path) -> None:
    """Update 7 is the first of epoch 3, and the third of epoch 2 in a straight run."""
    stem = train(tmp_path / "stem", *WSD, "steps=6", "schedule_epochs=5")
    train(stem, *WSD, "steps=16", "schedule_epochs=5", "resume=auto")
    message = refused(tmp_path, "train", "-m", "from=stem", "at=12")
    assert "from=stem: ended within epoch 2, after update 6, and was lengthened" in message


class RisingMomentum:
    """A schedule whose rate does not depend on the length of the run, but whose momentum does."""

    def __init__(self, *, horizon: Horizon) -> None:
        self.steps = horizon.steps

    def __call__(self, t: float) -> float:
        return 1.0

    def momentum(self, t: float) -> float:
        return 0.5 + 0.4 * t / self.steps


def test_refuses_a_momentum_that_depends_on_the_length(tmp_path: Path) -> None:
    own = [f"schedule._target_={__name__}.RisingMomentum", f"allow_packages=[{__name__.partition('.')[0]}]"]
    train(tmp_path / "stem", *own, "epochs=2")
    lines = metrics(tmp_path / "stem")
    assert [line["momentum"] for line in lines] == pytest.approx([0.5 + 0.4 * 3 / 8, 0.5 + 0.4 * 7 / 8])
    message = refused(tmp_path, "train", "-m", "from=stem", "at=1", own[1])
    assert "depends on the length of the run from update 1 on" in message


BAD: dict[str, tuple[list[str], str]] = {
    "after the end": (["-m", "from=stem", "at=2,6"], "at=6: from=stem ends after 5 epochs; allowed: 1 to 5"),
    "not a length": (["-m", "from=stem", "at=2.5"], "at=2.5: must list lengths, in epochs"),
    "without a run": (["-m", "at=2"], "at=2: needs one run from which to branch"),
    "another axis": (["-m", "from=stem", "at=2,3", "optimizer.lr=0.1,0.2"],
        "optimizer.lr=0.1,0.2: branches of one run"),
    "seeds": (["-m", "from=stem", "at=2,3", "seeds=3"], "seeds=3: branches of one run differ in their lengths only"),
    "lengths": (["-m", "from=stem", "at=2,3", "epochs=9"], "epochs=9: at=2,3 sets the lengths"),
    "another warmup": (["-m", "from=stem", "at=2,3", "schedule.warmup_steps=2"],
        "at=2: the learning rate differs from that of from=stem from update 0 on; only the cooldown of a branch may "
        "differ: keep schedule.warmup_steps=4"),
    "another key": (["-m", "from=stem", "at=2,3", "optimizer.lr=0.3"], "optimizer.lr: saved 0.1, now 0.3"),
    "search": (["-m", "from=stem", "at=2,3", "hydra/sweeper=dlopt_optuna"],
        "hydra/sweeper=dlopt_optuna: branches are a grid"),
    "checkpoint": (["-m", "from=stem", "at=2,3", "resume=x.pt"],
        "resume=x.pt: at=2,3 chooses the checkpoints; leave it out"),
    "dry run": (["-m", "from=stem", "at=2,3", "dry_run=true"], "at=2,3: dry_run describes whole runs"),
    "no sweep": (["from=stem", "at=2"], "at=2: only sweeps have this word; add -m"),
    **{
        f"no stable phase: {name}": (
            ["-m", f"from={name}", "at=2"],
            "at=2: schedule=.* depends on the length of the run from update .*schedule=wsd schedule.warmup_steps=100",
        )
        for name in ("cosine", "fraction")
    },
    "no checkpoint": (["-m", "from=few", "at=2"],
        "at=2: its cooldown begins after update 7, and from=few has no checkpoint until then .*kept are those of "
        r"updates 12\); train it with checkpoint.every_epochs=1 checkpoint.keep=1000"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refuses_in_one_line(name: str, stem_of: Callable[[str], Path]) -> None:
    words, message = BAD[name]
    stems = [stem_of(word.removeprefix("from=")) for word in words if word.startswith("from=")]
    folder = stems[0].parent if stems else stem_of("stem").parent
    assert re.search(message, refused(folder, "train", *words))


@pytest.mark.slow
def test_sweep_is_resumed_like_any_other(stem_of: Callable[[str], Path]) -> None:
    stems = stem_of("stem").parent
    words = ["train", "-m", "from=stem", "at=2,4", "output=branches"]
    assert dlopt(stems, *words).code == 0
    before = [metrics(stems / f"branches/{number}") for number in range(2)]
    (stems / "branches/1/summary.json").unlink()
    assert dlopt(stems, *words, "resume=auto").code == 0
    assert [metrics(stems / f"branches/{number}") for number in range(2)] == before
