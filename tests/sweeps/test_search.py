"""`dlopt train -m hydra/sweeper=dlopt_optuna` from the command line; its jobs run in this process."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from dlopt.basics.folders import RunFolder
from dlopt.basics.locks import is_held
from dlopt.config.overrides import parse_axes
from dlopt.sweeps import search as module
from dlopt.sweeps import sweep as sweeps
from dlopt.sweeps.jobs import Job, JobResult
from dlopt.sweeps.search import Search, _Trial, build_study_spec
from dlopt.sweeps.study import STUDY_LOCK, WORKERS, ClaimedTrial, open_storage
from tests.support.line import SMALL, Result, dlopt, refused
from tests.sweeps.processes import InProcess
from tests.sweeps.spaces import composer
from tests.sweeps.worker import make_job, make_spec, plan, study_of

TINY = [*[each for each in SMALL if not each.startswith("epochs")], "epochs=1", "tracking=[]"]
SEARCH = ["hydra/sweeper=dlopt_optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.objective=best_val_loss"]
SPACE = "optimizer.lr=tag(log,interval(0.01,1))"
HERE = "hydra.sweep.dir=sweep"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", InProcess)
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)


def search(folder: Path, *arguments: str) -> Result:
    return dlopt(folder, "train", "-m", *TINY, *SEARCH, HERE, *arguments)


def summaries(folder: Path) -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("sweep/[0-9]*/summary.json"))}


def test_search_runs_resumes_and_grows(tmp_path: Path) -> None:
    result = search(tmp_path, SPACE, "optimizer=sgd,adamw", "hydra.sweeper.n_trials=3")
    assert result.code == 0, result.err
    first = summaries(tmp_path)
    assert list(first) == ["0", "1", "2"] and {each["status"] for each in first.values()} == {"finished"}
    rates = [yaml.safe_load((tmp_path / f"sweep/{i}/config.yaml").read_text())["optimizer"]["lr"] for i in range(3)]
    assert len(set(rates)) == 3 and all(0.01 <= rate <= 1 for rate in rates)
    assert any(
        line.startswith("optimizer.lr=") for line in yaml.safe_load((tmp_path / "sweep/0/overrides.yaml").read_text())
    )
    best = min(first, key=lambda number: float(str(first[number]["best_val_loss"])))
    board = result.out.partition("lowest first")[2] or result.out.partition("lower is better")[2]
    assert f"lr={rates[int(best)]:.4g}"[:8] in board.split("\n")[3] and f"best run: sweep/{best}" in board
    tests = [line for line in board.splitlines() if f"{first[best]['test_loss']:.3f}"[:4] in line]
    assert tests and tests[0].startswith("1")

    line = [SPACE, "optimizer=sgd,adamw"]
    whole = ("train", "-m", *TINY, *SEARCH, HERE, *line)
    assert "resume=auto" in refused(tmp_path, *whole, "hydra.sweeper.n_trials=3")
    again = search(tmp_path, *line, "hydra.sweeper.n_trials=3", "resume=auto")
    assert again.code == 0 and "finished" in again.out and summaries(tmp_path) == first
    more = search(tmp_path, *line, "hydra.sweeper.n_trials=4", "resume=auto", "--json")  # the total number of jobs
    assert more.code == 0 and list(summaries(tmp_path)) == ["0", "1", "2", "3"]
    ranked = json.loads(more.out)["leaderboard"]
    losses = {str(tmp_path / "sweep" / i): each["best_val_loss"] for i, each in summaries(tmp_path).items()}
    assert (ranked["metric"], ranked["direction"]) == ("val_loss", "minimize")
    assert [row["folders"] for row in ranked["rows"]] == [[path] for path in sorted(losses, key=losses.__getitem__)]
    other = "optimizer.lr=tag(log,interval(0.01,2))"
    message = refused(tmp_path, "train", "-m", *TINY, *SEARCH, HERE, other, "optimizer=sgd,adamw", "resume=auto")
    assert "optimizer.lr: saved tag(log,interval(0.01,1.0)), now tag(log,interval(0.01,2.0))" in message
    message = refused(tmp_path, *whole, "epochs=2", "resume=auto")
    assert "epochs: saved 1, now 2" in message


def test_shows_the_test_of_the_best_job_in_a_folder_of_another_name(tmp_path: Path) -> None:
    result = search(tmp_path, SPACE, "hydra.sweeper.n_trials=2", "hydra.sweep.subdir='job-${hydra.job.num}'")
    assert result.code == 0, result.err
    ends = [json.loads((tmp_path / f"sweep/job-{number}/summary.json").read_text()) for number in range(2)]
    best = min(ends, key=lambda end: end["best_val_loss"])
    assert f"{best['test_loss']:.4f}" in result.out


def test_resumes_the_unfinished_search_in_the_default_folder(tmp_path: Path) -> None:
    line = ["train", "-m", *TINY, *SEARCH, SPACE]
    assert dlopt(tmp_path, *line, "hydra.sweeper.n_trials=1").code == 0
    assert dlopt(tmp_path, *line, "hydra.sweeper.n_trials=2", "resume=auto").code == 0
    [folder] = tmp_path.glob("outputs/train/*")
    assert (folder / "1/summary.json").is_file()


def test_processes_write_sweep_yaml_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process does not see its own lock: ask a fork."""
    held = []

    def written(path: Path, value: object) -> None:
        child = os.fork()
        if child == 0:
            os._exit(is_held(path.parent / WORKERS / STUDY_LOCK))
        held.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    monkeypatch.setattr(module, "write_yaml", written)
    study = study_of(tmp_path, make_spec(1, None))
    module._write_sweep_file(tmp_path, {}, study, make_spec(1, None))
    study.close()
    assert held == [1]


def test_failed_job_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    result = search(tmp_path, "data.subset=40,9", "hydra/sweeper/sampler=grid")
    assert result.code == 1 and "job 1 failed: " in result.out
    assert {number: each["status"] for number, each in summaries(tmp_path).items()} == {"0": "finished", "1": "failed"}


def test_a_search_does_not_select_on_the_test_set(tmp_path: Path) -> None:
    result = search(tmp_path, SPACE, "hydra.sweeper.objective=test_accuracy")
    assert result.code == 2 and "hydra.sweeper.objective=test_accuracy: a search by a test metric would" in result.err
    assert "set hydra.sweeper.objective=best_val_accuracy" in result.err and not summaries(tmp_path)


def test_unknown_objective_needs_a_direction(tmp_path: Path) -> None:
    result = search(tmp_path, SPACE, "hydra.sweeper.n_trials=3", "hydra.sweeper.objective=best_val_f2")
    assert result.code == 2 and "hydra.sweeper.objective=best_val_f2: not a metric of dlopt; " in result.err


@pytest.mark.parametrize("objective", ["best_val_f2", "best_val_macro_f1", "val_loss", "train_loss", "gap", "score"])
def test_an_objective_that_no_summary_has_is_refused_before_the_first_job(objective: str, tmp_path: Path) -> None:
    line = (SPACE, "hydra.sweeper.n_trials=3", f"hydra.sweeper.objective={objective}")
    result = search(tmp_path, *line, *(["hydra.sweeper.direction=maximize"] if objective == "best_val_f2" else []))
    assert result.code == 2 and not summaries(tmp_path) and result.err.count("\n") == 1
    assert result.err.startswith(
        f"dlopt: hydra.sweeper.objective={objective}: summary.json will not have it; allowed: best_val_loss, "
        "best_val_accuracy; evaluate.metrics adds others"
    )


def test_unknown_metric_of_the_pruner_is_refused(tmp_path: Path) -> None:
    median = ["hydra/sweeper/pruner=median", "hydra.sweeper.watch=val_los"]
    result = search(tmp_path, SPACE, "hydra.sweeper.n_trials=3", *median)
    assert result.code == 2 and result.err.startswith("dlopt: hydra.sweeper.watch=val_los: not a metric of dlopt; ")


@pytest.mark.parametrize(
    ("objective", "watch", "direction", "is_pruned"),
    [
        ("best_val_accuracy", "val_loss", "auto", True),  # the pruner's metric improves in the other direction
        ("best_val_accuracy", "train_loss", "auto", True),
        ("best_val_macro_f1", "val_loss", "maximize", True),
        ("best_val_loss", "auto", "auto", True),
        ("best_val_loss", "val_accuracy", "auto", False),
    ],
)
def test_pruner_stops_jobs_with_a_worse_metric(objective: str, watch: str, direction: str, is_pruned: bool) -> None:
    """Reports 1 for four jobs and 2 for the fifth, whose loss is therefore worse and whose accuracy better."""
    typed = [
        "hydra/sweeper=dlopt_optuna",
        "hydra/sweeper/pruner=median",
        f"hydra.sweeper.objective={objective}",
        f"hydra.sweeper.watch={watch}",
        f"hydra.sweeper.direction={direction}",
    ]
    spec = build_study_spec(composer().with_words(*typed).compose(typed, multirun=True), parse_axes([SPACE]))
    study = optuna.create_study(direction=spec.directions[0], pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    prunes = []

    class Recorded:
        folder = Path()

        def report(self, claim: ClaimedTrial, epoch: int, value: float) -> bool:
            claim.trial.report(value, epoch)
            return claim.trial.should_prune()

    for number, value in enumerate([1.0, 1.0, 1.0, 1.0, 2.0]):
        trial = study.ask()
        search = Search(spec, cast(Any, Recorded()), cast(Any, None))
        search._trials[number] = _Trial(ClaimedTrial(number, {}, trial, is_takeover=False), [], [{}])
        job = Job(number, RunFolder(Path()), plan([]), "")
        prunes.append(search.should_stop(job, {"epoch": 1, spec.pruning_metric or "": value}))
        study.tell(trial, 0.0)
    assert [bool(each) for each in prunes] == [False, False, False, False, is_pruned]


def test_several_objectives_print_the_pareto_front(tmp_path: Path) -> None:
    objectives = "hydra.sweeper.objective=[best_val_accuracy,parameters]"
    line = ["model.widths=[4],[8]", "hydra/sweeper/sampler=grid", objectives]
    result = search(tmp_path, *line)
    assert result.code == 0, result.err
    assert "model.widths=[4]" in result.out.partition("Pareto front")[2]


def test_password_is_not_written_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY", f"sqlite:///{tmp_path}/study.db?sesame=1")
    result = search(tmp_path, SPACE, "hydra.sweeper.n_trials=1", "hydra.sweeper.storage=${oc.env:STUDY}")
    assert result.code == 0, result.err
    assert (tmp_path / "study.db").is_file()
    files = [path for path in (tmp_path / "sweep").rglob("*") if path.is_file()]
    assert not [path for path in files if b"sesame" in path.read_bytes()]


def test_folders_that_share_a_database(tmp_path: Path) -> None:
    def run(place: str, total: int, *more: str) -> Result:
        words = [SPACE, "hydra.sweeper.storage=sqlite:///study.db", f"hydra.sweeper.n_trials={total}"]
        return dlopt(tmp_path, "train", "-m", *TINY, *SEARCH, *words, f"hydra.sweep.dir={place}", *more)

    def status(place: str) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(dlopt(tmp_path, "sweep", "status", place, "--json").out))

    assert "joins" not in run("first", 2).out
    late = run("second", 2)
    assert late.code == 2 and not (tmp_path / "second").exists()
    assert f"study.db has ended with 2 trials in {tmp_path / 'first'}; to extend it" in late.err
    later = run("second", 3)
    assert later.code == 0, later.err
    assert f"study.db: 2 of 3 trials are in {tmp_path / 'first'}\n" in later.out
    assert "  dlopt report second first\n" in later.out
    assert sorted(each.name for each in (tmp_path / "second").glob("[0-9]*")) == ["2"]
    for place, numbers in {"first": [0, 1], "second": [2]}.items():
        found = status(place)
        assert found["exit_code"] == 0 and found["counts"] == {"finished": len(numbers)}
        assert [job["number"] for job in found["jobs"]] == numbers
    (tmp_path / "first").rename(tmp_path / "moved")  # its own trials are still its own
    assert run("moved", 3, "resume=auto").code == 0 and status("moved")["counts"] == {"finished": 2}


def test_each_trial_runs_with_all_seeds_and_counts_by_their_mean(tmp_path: Path) -> None:
    (tmp_path / "points.yaml").write_text("- {optimizer.lr: 3e-1}\n- optimizer.lr: 0.02\n")
    line = [SPACE, "seeds=2", "hydra.sweeper.enqueue=points.yaml", "hydra.sweeper.n_trials=3"]
    result = search(tmp_path, *line, "--json")
    assert result.code == 0, result.err
    configs = [yaml.safe_load((tmp_path / f"sweep/{i}/config.yaml").read_text()) for i in range(6)]
    assert [config["seed"] for config in configs] == [0, 1] * 3
    rates = [config["optimizer"]["lr"] for config in configs]
    assert rates[:4] == [0.3, 0.3, 0.02, 0.02] and rates[4] == rates[5] and rates[4] not in (0.3, 0.02)
    losses = [float(str(each["best_val_loss"])) for each in summaries(tmp_path).values()]
    means = {math.fsum(losses[i : i + 2]) / 2: [str(tmp_path / f"sweep/{i + j}") for j in (0, 1)] for i in (0, 2, 4)}
    rows = json.loads(result.out)["leaderboard"]["rows"]
    assert [row["folders"] for row in rows] == [means[mean] for mean in sorted(means)]
    study = study_of_sweep(tmp_path / "sweep")
    assert sorted(study) == sorted(means)
    message = refused(tmp_path, "train", "-m", *TINY, *SEARCH, HERE, *line[:1], *line[2:], "resume=auto")
    assert "seeds: saved 0,1, now nothing" in message
    # Points may be added, and those that the study has need not be repeated.
    new = "hydra.sweeper.enqueue=[{optimizer.lr:0.07}]"
    full = search(tmp_path, *line[:2], new, line[3], "resume=auto")
    assert full.code == 2 and full.err.count("\n") == 1
    assert "1 new points, but 0 of hydra.sweeper.n_trials=3 have not begun; set hydra.sweeper.n_trials=4" in full.err
    assert search(tmp_path, *line[:2], new, "hydra.sweeper.n_trials=4", "resume=auto").code == 0
    rates = [yaml.safe_load((tmp_path / f"sweep/{i}/config.yaml").read_text())["optimizer"]["lr"] for i in range(8)]
    assert rates[:4] == [0.3, 0.3, 0.02, 0.02] and rates[6:] == [0.07, 0.07]


def study_of_sweep(sweep: Path) -> list[float]:
    """Returns the objectives of the trials."""
    storage = open_storage(None, sweep)
    [study] = optuna.get_all_study_names(storage)
    return [trial.values[0] for trial in optuna.load_study(study_name=study, storage=storage).trials]


def of_seeds(folder: Path, count: int, **changes: Any) -> Search:
    """A search whose trials have several jobs, in a process of its own."""
    spec = replace(make_spec(4, None), seeds=[f"seed={seed}" for seed in range(count)], **changes)
    return Search(spec, study_of(folder, spec), lambda *arguments: make_job(folder, *arguments))


def finished(loss: float) -> JobResult:
    return JobResult("finished", {"best_val_loss": loss})


def test_a_trial_is_pruned_by_the_mean_of_its_seeds(tmp_path: Path) -> None:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    search = of_seeds(tmp_path, 3, pruner=pruner, pruning_metric="val_loss")
    first = [cast(Job, search.next()) for _ in range(3)]
    for job, loss in zip(first, [1.0, 2.0, 6.0], strict=True):  # a mean of 3
        assert not search.should_stop(job, {"epoch": 1, "val_loss": loss})
        search.ended(job, finished(loss))
    kept = [cast(Job, search.next()) for _ in range(3)]
    assert not any(search.should_stop(job, {"epoch": 1, "val_loss": 2.9}) for job in kept)
    pruned = [cast(Job, search.next()) for _ in range(3)]
    assert not any(search.should_stop(job, {"epoch": 1, "val_loss": 4.0}) for job in pruned[:2])
    assert search.should_stop(pruned[2], {"epoch": 1, "val_loss": 1.1})  # a mean of 3.03
    assert search.should_stop(pruned[0], {"epoch": 2, "val_loss": 0.0})  # the others do not run on
    for job in kept:
        search.ended(job, finished(2.9))
    for job in pruned:
        search.ended(job, JobResult("pruned", {}))
    trials = search._study._trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "WAITING"]
    assert trials[0].values == [3.0] and trials[2].intermediate_values == {1: math.fsum([4.0, 4.0, 1.1]) / 3}


def test_a_failed_seed_fails_its_trial(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    search = of_seeds(tmp_path, 3)
    jobs = [cast(Job, search.next()) for _ in range(2)]
    search.ended(jobs[0], JobResult("failed", {}, "diverged"))
    assert search.should_stop(jobs[1], {"epoch": 1})
    assert "trial 0 failed with seed=0; not run: seed=2" in capfd.readouterr().out
    search.ended(jobs[1], JobResult("pruned", {}))
    trial = search._study._trials()[0]
    assert trial.state == TrialState.FAIL and trial.user_attrs["reason"] == "seed=0: diverged"
    assert cast(Job, search.next()).number == 3
    module._write_sweep_file(tmp_path, {}, search._study, search._spec)
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["jobs"] == 4 * 3 - 1  # never 12: `wait` would not end


def test_seeds_of_a_killed_process_go_on_in_another(tmp_path: Path) -> None:
    """The other process is handed all jobs of the trial; the worker pool returns the results of those that are done."""
    losses = [0.1, 0.7, 0.4]
    first = of_seeds(tmp_path, 3)
    jobs = [cast(Job, first.next()) for _ in range(3)]
    first.ended(jobs[0], finished(losses[0]))
    first.ended(jobs[1], JobResult("interrupted", {}))
    assert first.interrupted == 1
    first._study.close()
    second = of_seeds(tmp_path, 3)
    again = [cast(Job, second.next()) for _ in range(3)]
    assert [job.label for job in again] == [job.label for job in jobs]
    for job, loss in zip(again, losses, strict=True):
        second.ended(job, finished(loss))
    [trial] = second._study.finished()
    assert trial.values == [math.fsum(losses) / 3] and second.interrupted == 0
    assert trial.user_attrs["runs"] == [[str(tmp_path / str(i)), [loss]] for i, loss in enumerate(losses)]


BAD = {
    "a space without values to draw": ([], "nothing to search"),
    "a value that no job takes": (["optimizer.lr=interval(-1,1)"], "optimizer.lr=-1"),
    "an integer drawn as another": (["model.widths=[4],[x]"], "model.widths"),
    "a key that one of the choices lacks": (["optimizer.momentum=interval(0,0.9)", "optimizer=sgd,adam"], "momentum"),
    "a range of seeds": (["seed=interval(0,5)", SPACE], "seed: a search draws configurations, not seeds; seeds=5"),
    "a seed of the weights": (["init_seed=0,1", SPACE], "init_seed: a search draws configurations, not seeds"),
    "seeds twice": (["seeds=2", "seed=0,1", SPACE], "seeds=2 seed=0,1: set the seeds once"),
    "one folder for all seeds": (["seeds=2", SPACE, "hydra.sweep.subdir='lr-${optimizer.lr}'"],
        "hydra.sweep.subdir=lr-0.01: must be different for each seed"),
    "a point outside the space": ([SPACE, "hydra.sweeper.enqueue=[{optimizer.lr:0.1},{optimizer.lr:5}]"],
        "hydra.sweeper.enqueue: point 2: optimizer.lr=5: outside the search space; allowed: tag(log,interval(0.01,1"),
    "a point of other keys": ([SPACE, "hydra.sweeper.enqueue=[{optimizer.weight_decay:0.1}]"],
        "point 1: optimizer.weight_decay=0.1: not a searched key; allowed: optimizer.lr"),
    "a point of the other optimizer": (["space=benchmark", "optimizer=sgd,adam",
        "hydra.sweeper.enqueue=[{optimizer.lr:0.1}]"],
        "optimizer.lr=0.1: only searched with optimizer=adam or optimizer=sgd, which the point does not set"),
    "no points": ([SPACE, "hydra.sweeper.enqueue=points.yaml"], "enqueue=points.yaml: No such file"),
    "one point": ([SPACE, "hydra.sweeper.enqueue={optimizer.lr:0.1}"], "allowed: a string | a list"),
    "more points than trials": ([SPACE, "hydra.sweeper.n_trials=1",
        "hydra.sweeper.enqueue=[{optimizer.lr:0.1},{optimizer.lr:0.2}]"], "2 points, but hydra.sweeper.n_trials=1"),
    "points of a grid": (["optimizer.lr=0.1,0.2", "hydra/sweeper/sampler=grid",
        "hydra.sweeper.enqueue=[{optimizer.lr:0.1}]"], "hydra/sweeper/sampler=grid tries every point"),
    "no number of jobs": ([SPACE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
    "no end": ([SPACE, "hydra.sweeper.n_trials=null"], "n_trials=null"),
    "an unknown direction": ([SPACE, "hydra.sweeper.direction=up"], "hydra.sweeper.direction=up"),
    "too few directions": ([SPACE, "hydra.sweeper.objective=[seconds,best_val_loss]",
        "hydra.sweeper.direction=[minimize]"], "one for each objective"),
    "a pruner without a metric": ([SPACE, "hydra/sweeper/pruner=asha", "hydra.sweeper.objective=seconds"], "watch"),
    "a pruner without epochs": ([SPACE, "hydra/sweeper/pruner=hyperband", "hydra.sweeper.pruner.min_epochs=9"],
        "hydra.sweeper.pruner.max_epochs=1: must be at least"),
    "a step of no size": ([SPACE, "hydra/sweeper/sampler=cmaes", "hydra.sweeper.sampler.sigma=0"], "sigma=0"),
    "a population of one": ([SPACE, "hydra/sweeper/sampler=cmaes", "hydra.sweeper.sampler.population=1"],
        "population=1"),
    "folds": ([SPACE, "data.folds=3", "data.fold=0,1,2"], "data.fold: a search draws configurations, not folds"),
    "an unknown sampler": ([SPACE, "hydra/sweeper/sampler=tpx"], "tpx"),
    "a sampler's key": ([SPACE, "+hydra.sweeper.sampler.x=1"], "hydra.sweeper.sampler.x"),
    "code for a sampler": ([SPACE, "hydra.sweeper.sampler._target_=os.system"], "_target_"),
    "a database without a server": ([SPACE, "hydra.sweeper.storage=nothing://here"], "hydra.sweeper.storage"),
    "another launcher": ([SPACE, "hydra/launcher=basic"], "hydra/launcher=basic"),
    "no place": ([SPACE, "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0"),
    "no GPU": ([SPACE, "hydra/launcher=gpus"], "hydra.launcher.gpus=auto"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rejects_invalid_searches(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments, said = BAD[case]
    assert said in refused(tmp_path, "train", "-m", *TINY, *SEARCH, *arguments)


def test_dry_run_lists_the_jobs_and_leaves_nothing(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", "-m", *TINY, "optimizer.lr=0.1,0.2", "seed=1", HERE, "dry_run=true")
    lines = result.out.splitlines()
    assert result.code == 0 and lines[1:3] == ["job 0: optimizer.lr=0.1", "job 1: optimizer.lr=0.2"]
    assert lines[-1].startswith("2 jobs; no job has ended to tell the time")
    assert not list(tmp_path.iterdir())
    line = ["hydra.sweep.subdir=../x", "dry_run=true", "seed=0,1"]
    assert "hydra.sweep.subdir" in refused(tmp_path, "train", "-m", *TINY, *line)


def test_refuses_other_fixed_keys_of_a_searched_choice(tmp_path: Path) -> None:
    line = (*SEARCH, HERE, "optimizer=sgd,adamw", SPACE, "resume=auto")
    assert search(tmp_path, *line, "optimizer.weight_decay=0.1", "hydra.sweeper.n_trials=1").code == 0
    message = refused(tmp_path, "train", "-m", *TINY, *line, "optimizer.weight_decay=0", "hydra.sweeper.n_trials=2")
    assert "optimizer.weight_decay: saved 0.1, now 0" in message


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        (["model=mlp"], "best_val_accuracy"),
        (["model=autoencoder"], "best_val_loss"),
        (["model=mlp", "monitor=val_macro_f1", "evaluate.metrics=[macro_f1]"], "best_val_macro_f1"),
        (["data=image_folder", "data.root=nowhere"], "best_val_accuracy"),  # unknown without the data
    ],
)
def test_the_default_objective_is_what_the_runs_monitor(words: list[str], objective: str) -> None:
    typed = ["hydra/sweeper=dlopt_optuna", SPACE, *words]
    request = sweeps.request(composer().with_words(*typed), typed)
    assert module._monitored(request) == objective


def test_one_ranking_of_a_search_with_seeds(tmp_path: Path) -> None:
    """The end, the report, and the commands that take its folder name the same run: a trial of all its seeds."""
    points = "hydra.sweeper.enqueue=[{optimizer.lr:0.5},{optimizer.lr:0.05},{optimizer.lr:0.1}]"
    line = ["optimizer.lr=interval(0.01,1)", points, "seed=0,1", "hydra.sweeper.n_trials=3"]
    ended = search(tmp_path, *line, "--json")
    rows = json.loads(ended.out)["leaderboard"]["rows"]
    assert [row["rank"] for row in rows] == [1, 2, 3] and all(row["ended"] == 2 for row in rows)
    best = rows[0]["folders"]
    number = int(Path(best[1]).name)
    failed = json.loads((Path(best[1]) / "summary.json").read_text()) | {"status": "failed", "reason": "planted"}
    (tmp_path / f"sweep/{number}/summary.json").write_text(json.dumps(failed))
    report = json.loads(dlopt(tmp_path, "report", "sweep", "--json").out)
    assert report["by"] == "val_loss" and report["direction"] == "minimize"
    assert [row["rank"] for row in report["configurations"]] == [1, 2, None]
    assert report["configurations"][2]["folders"] == best
    again = json.loads(search(tmp_path, *line, "resume=auto", "--json").out)["leaderboard"]
    assert [row["folders"] for row in again["rows"]] == [row["folders"] for row in report["configurations"]]
    said = dlopt(tmp_path, "eval", "checkpoint=sweep")
    assert any(
        f"best of 6 runs: {Path(folder).relative_to(tmp_path)}" in said.out + said.err for folder in rows[1]["folders"]
    )
