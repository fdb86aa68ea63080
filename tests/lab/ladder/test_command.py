"""`dlopt ladder` from end to end on tiny models: searches, runs, resumes, shares, reports."""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt import cli
from dlopt.basics.folders import RunFolder
from tests.support.drawing import drawing
from tests.support.line import dlopt, entries, refused
from tests.support.processes import start

RECIPE = {
    "defaults": [
        {"override /data": "linear"}, {"override /model": "mlp"}, {"override /loss": "mse"},
        {"override /normalize": "none"}, {"override /schedule": "cosine"},
    ],
    "name": "tiny",
    "steps": 8,
    "threads": 1,
    "data": {
        "intervals": [[-1.0, 1.0], [-0.2, 0.2]], "train_size": 128, "val_size": 64, "test_size": 64, "batch_size": 32
    },
}  # fmt: skip
FAMILY: dict[str, Any] = {
    "experiment": "tiny",
    "metric": "val_loss",
    "unit": "images",
    "tokens_per_parameter": 20,
    "rules": {"width": "2 * depth", "depth": "the number of the rung", "batch": "constant", "schedule": "cosine"},
    "rungs": {"one": ["model.widths=[2]"], "two": ["model.widths=[4,4]"], "three": ["model.widths=[6,6,6]"]},
}
LINE = ("--config-dir", "conf", "model=tiny", "output=out", "search=1", "seeds=1")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a config folder that has a family of three rungs."""
    for name, content, head in (("experiment", RECIPE, "# @package _global_\n"), ("ladder", FAMILY, "# Tiny\n")):
        path = tmp_path / f"conf/{name}/tiny.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(head + yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def change(place: Path, **changes: Any) -> None:
    (place / "conf/ladder/tiny.yaml").write_text(yaml.safe_dump({**FAMILY, **changes}, sort_keys=False))


@pytest.mark.parametrize("rest", [[], ["dry_run=true"]])
def test_keys_of_the_recipes_data(place: Path, rest: list[str]) -> None:
    """The default data set does not have them."""
    typed = ["optimizer=sgd", "optimizer.lr=0.1", "data.intervals=[[-1.0,1.0],[-0.3,0.3]]"]
    assert dlopt(place, "ladder", *typed, *LINE, "rungs=2", *rest).code == 0
    if not rest:
        config = RunFolder(place / "out/sgd/one/seed-0").config() or {}
        assert config["data"]["intervals"] == [[-1.0, 1.0], [-0.3, 0.3]]


def test_searches_extrapolates_resumes_and_reports(place: Path) -> None:
    first = dlopt(place, "ladder", "optimizer=sgd", *LINE, "rungs=2")
    assert first.code == 0, first.err
    content = json.loads((place / "out/results.json").read_text())
    search = content["searches"]["sgd"]
    tried = {float(lr): loss for lr, loss in search["losses"]["one"].items()}
    assert 6 <= len(tried) <= 13 and search["fit"]["exponent"] == 0  # one searched rung
    best = min(tried, key=lambda lr: math.inf if tried[lr] is None else tried[lr])
    assert best / 2 < search["optima"]["one"]["lr"] < best * 2
    for rung in ("one", "two"):
        run = RunFolder(place / f"out/sgd/{rung}/seed-0")
        config, lines = run.config() or {}, (run.path / "metrics.jsonl").read_text().splitlines()
        assert config["optimizer"]["lr"] == pytest.approx(search["optima"]["one"]["lr"], rel=1e-3)
        assert config["optimizer"]["nesterov"]  # the fixed key of its benchmark space
        size = content["ladder"]["rungs"][rung]
        assert len(lines) == 1 and json.loads(lines[0])["step"] == size["updates"]  # evaluated at the end only
        assert size["updates"] == round(20 * size["parameters"] / 32)
        assert size["parameters"] == (run.summary() or {})["parameters"]
        [record] = [each for each in content["runs"] if each["rung"] == rung]
        assert record["loss"] == json.loads(lines[0])["val_loss"]
        assert not [*run.path.glob("checkpoints/*.pt")]
    assert content["analysis"]["laws"]["sgd"]["exponent"]["value"] >= 0 and (place / "out/figures/loss.svg").is_file()
    before = {path: path.stat().st_mtime_ns for path in place.glob("out/*/*/*/summary.json")}
    listed = dlopt(place, "ladder", "optimizer=sgd", *LINE, "rungs=2", "dry_run=true").out
    assert " a run, as on average in 1 that ended\n" in listed and " hours, one run at a time\n" in listed
    second = dlopt(place, "ladder", "optimizer=sgd,adamw", *LINE, "rungs=2", "optimizer.lr=0.01")
    assert second.code == 2 and "runs of another ladder (different: optimizers.sgd)" in second.err
    second = dlopt(place, "ladder", "optimizer=adamw", *LINE, "rungs=2", "optimizer.lr=0.01")
    assert second.code == 0, second.err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "adamw: the same rate at all sizes (optimizer.lr=0.01)" in " ".join(second.out.split())
    assert "No speed-up of adamw over sgd is stated: one search found the rate of sgd" in " ".join(second.out.split())
    assert "Speed-up" not in second.out and not (place / "out/figures/speed_up.pdf").exists()
    with drawing(True):
        report = dlopt(place, "ladder", "report", "out")
    assert report.code == 0 and "Loss minus that of sgd" in report.out
    assert (place / "out/figures/loss.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (place / "out/figures/loss.svg").read_text()
    page = (place / "out/index.html").read_text()
    assert "2 * depth" in page and "the same rate at all sizes" in page
    other = dlopt(place, "ladder", "optimizer=sgd", *LINE, "rungs=2", "data.batch_size=16")
    assert other.code == 2 and "runs of another ladder (different: " in other.err
    _check_copy(place)
    shutil.rmtree(place / "out/sgd/two/seed-0")
    (place / "out/results.json").unlink()
    continued = dlopt(place, "ladder", "optimizer=sgd", *LINE, "rungs=2")
    ended, runs = len(before) - 1, max(len(before), 9)  # 9: 7 to search the rate, and one for each rung
    assert continued.code == 0 and f"about {runs} runs, {ended} of which have ended; folder: " in continued.out


def _check_copy(place: Path) -> None:
    """A copy of results.json replaces all folders."""
    (place / "copy").mkdir()
    shutil.copy(place / "out/results.json", place / "copy")
    line = [*(each for each in LINE if each != "output=out"), "output=copy", "rungs=2", "optimizer.lr=0.01"]
    copied = dlopt(place, "ladder", "optimizer=adamw", *line)
    assert copied.code == 0 and not (place / "copy/adamw").exists() and not (place / "copy/sgd").exists(), copied.err
    first, second = (json.loads((place / folder / "results.json").read_text()) for folder in ("out", "copy"))
    for key in ("searches", "runs", "search_runs", "analysis"):
        assert first[key] == second[key]
    assert first["facts"]["hours"] == second["facts"]["hours"]
    for content in ("[]", json.dumps({**second, "runs": [{"index": None}]})):
        (place / "copy/results.json").write_text(content)
        damaged = dlopt(place, "ladder", "report", "copy")
        assert (
            damaged.code == 2
            and "results.json: is damaged: " in damaged.err
            and "restore it, or remove it" in damaged.err
        )
    (place / "copy/results.json").write_text(json.dumps({**second, "format": 1}))
    former = dlopt(place, "ladder", "report", "copy")
    assert former.code == 2 and "is from another version of dlopt; remove it" in former.err


@pytest.mark.slow
def test_shorter_runs_branch_off_and_equal_those_of_their_length(place: Path) -> None:
    line = ("optimizer=sgd", *LINE, "rungs=2", "optimizer.lr=0.01", "schedule=wsd")
    result = dlopt(place, "ladder", *line, "tokens_per_parameter=[400,100,200]")
    assert result.code == 0, result.err
    content = json.loads((place / "out/results.json").read_text())
    assert (content["ladder"]["shorter"], content["ladder"]["tokens_per_parameter"]) == ([100, 200], 400)
    runs = {(each["rung"], each["length"]): each for each in content["runs"]}
    assert len(runs) == 6 and [*content["shorter"]] == ["100", "200"]
    for (rung, length), run in runs.items():
        warmup = f"schedule.warmup_steps={content['ladder']['rungs'][rung]['warmup']}"
        folder = f"alone/{rung}-{length}"
        alone = [each for each in line if each != "output=out"]
        typed = [*alone, f"output={folder}", f"tokens_per_parameter={length or 400}", warmup]
        assert dlopt(place, "ladder", *typed).code == 0
        [straight] = [
            each for each in json.loads((place / folder / "results.json").read_text())["runs"] if each["rung"] == rung
        ]
        assert run["loss"] == straight["loss"]
    added = 0
    for branch in place.glob("out/sgd/*/*-length-*"):
        [start] = (RunFolder(branch).summary() or {})["resumed_from"]
        steps = (RunFolder(branch).config() or {})["steps"]
        assert 0.7 * steps < start < 0.9 * steps
        added += steps - start
    ratio = 1 + added / sum(each["updates"] for each in content["ladder"]["rungs"].values())
    assert ratio < 1.2 and f"all lengths: {ratio:.2f} times the updates of the longest runs" in result.out
    assert not [*place.glob("out/*/*/*/checkpoints/*")]
    other = dlopt(place, "ladder", *line, "tokens_per_parameter=[200,400]")
    assert other.code == 2 and "runs of another ladder (different: shorter, rungs.one, rungs.two)" in other.err


@pytest.mark.slow
def test_lists_the_runs(place: Path) -> None:
    result = dlopt(place, "ladder", "optimizer=sgd", *LINE, "dry_run=true")
    assert result.code == 0 and not (place / "out").exists()
    assert "sgd, one: 7 to search the rate + 1 seeds\n" in result.out and "sgd, three: 1 seeds" in result.out
    assert "10 runs: time unknown\n" in result.out


@pytest.mark.slow
def test_arms_of_weight_decay(place: Path) -> None:
    line = ("optimizer=adamw", *LINE, "rungs=2", "arms=[constant,zero]")
    listed = dlopt(place, "ladder", *line, "dry_run=true").out
    assert "adamw.constant, one: 35 to search the weight decay + 7 to search the rate + 1 seeds\n" in listed
    assert "adamw.constant, two: 1 seeds\n" in listed and "adamw.zero, one: 7 to search the rate + 1 seeds\n" in listed
    result = dlopt(place, "ladder", *line)
    assert result.code == 0, result.err
    content = json.loads((place / "out/results.json").read_text())
    for arm, decay in (("constant", content["decays"]["adamw"]["constant"]), ("zero", 0)):
        config = RunFolder(place / f"out/adamw.{arm}/two/seed-0").config() or {}
        assert config["optimizer"]["weight_decay"] == pytest.approx(decay, rel=1e-3)
        assert config["optimizer"]["_target_"] == "dlopt.optim.adamw"
    searched = RunFolder(place / "out/adamw/one/decay-2-rate+2").config() or {}
    assert searched["optimizer"]["weight_decay"] == pytest.approx(0.1 / 10**0.5, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "runs"),
    [((), 6), (("rungs=2", "schedule=wsd", "optimizer.lr=0.01", "tokens_per_parameter=[100,200,400]"), 12)],
)
def test_kills_lose_nothing_and_two_processes_share_the_runs(more: tuple[str, ...], runs: int, place: Path) -> None:
    arguments = ("optimizer=sgd,adamw", *LINE, *more)
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    for number in range(3):
        process = start(_ladder, arguments, environment, place, {1: place / "log.txt", 2: place / "log.txt"})
        deadline = time.monotonic() + 60
        ended = len(list(place.glob("out/*/*/*/summary.json")))
        while process.is_alive() and time.monotonic() < deadline:
            if len(list(place.glob("out/*/*/*/summary.json"))) > ended + number % 3:
                break
            time.sleep(0.05)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    logs = [place / f"log-{number}.txt" for number in range(2)]
    processes = [start(_ladder, arguments, environment, place, {1: log, 2: log}) for log in logs]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0], [log.read_text() for log in logs]
    content = json.loads((place / "out/results.json").read_text())
    assert len(content["runs"]) == runs and not any(each["failure"] for each in content["runs"])
    fresh = dlopt(place, "ladder", *("output=fresh" if each == "output=out" else each for each in arguments))
    assert fresh.code == 0, fresh.err
    expected = json.loads((place / "fresh/results.json").read_text())
    assert content["searches"] == expected["searches"]
    for part in (content, expected):
        for run in part["runs"]:
            run.pop("seconds")
    assert content["runs"] == expected["runs"]
    # Two processes may use other routines of BLAS, from which the fits differ in their last digits.
    first, second = (flatten({"": part["analysis"]}) for part in (content, expected))
    assert first.keys() == second.keys() and list(first.values()) == [
        pytest.approx(each, rel=1e-2, abs=1e-6) if isinstance(each, float) else each for each in second.values()
    ]


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_checkpoint(place: Path) -> None:
    change(place, tokens_per_parameter=12_000, rungs={"one": ["model.widths=[2]"], "two": ["model.widths=[3]"]})
    line = ("optimizer=sgd", *LINE, "optimizer.lr=0.01", "hydra.launcher.n_jobs=1")
    process = start(_ladder, line, {"PATH": "/usr/bin:/bin"}, place, {1: place / "log.txt", 2: place / "log.txt"})
    run = RunFolder(place / "out/sgd/one/seed-0")
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline and not (run.checkpoints / "last.pt").exists():
        time.sleep(0.05)
    os.kill(int((run.path / ".lock").read_text()), signal.SIGKILL)
    process.join()
    assert (run.summary() or {}).get("died"), (place / "log.txt").read_text()
    result = dlopt(place, "ladder", *line)
    summary = run.summary() or {}
    assert result.code == 0 and summary["status"] == "finished", result.err
    [step] = summary["resumed_from"]
    assert step > 0 and not [*run.checkpoints.glob("*.pt")]


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Returns the leaves of dicts and lists, by their path."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: leaf for name, each in items for key, leaf in flatten(each, f"{path}.{name}").items()}


def _ladder(*arguments: str) -> None:
    sys.argv = ["dlopt", "ladder", *arguments]
    cli.main()


BAD_INPUT = {
    "model=tiny": "optimizer: name the optimizers",
    "optimizer=sgd": "model: name one family",
    "optimizer=sgd model=tine": "model=tine: unknown family; did you mean model=tiny?",
    "optimizer=sgdd model=tiny": "did you mean optimizer=sgd?",
    "optimizer=sgd,sgd model=tiny": "an optimizer is listed twice",
    "rungs=1": "rungs=1: a fit needs at least two rungs",
    "rungs=[two]": "rungs=[two]: a fit needs at least two rungs",
    "rungs=4": "rungs=4: model=tiny has 3 rungs: one, two, three",
    "rungs=[on,two]": "rungs=on: unknown rung; did you mean rungs=one?",
    "seeds=0": "seeds=0",
    "tokens_per_parameter=0": "tokens_per_parameter=0",
    "steps=3": "steps=3: part of the protocol",
    "seed=3": "seed=3: part of the protocol",
    "schedule=plateau": "schedule=plateau: follows evaluations",
    "tokens_per_parameter=[5,5]": "tokens_per_parameter=[5,5]: a length is listed",
    "tokens_per_parameter=[10,20]": "schedule=cosine depends on the length of the run, from update 1 of one on",
    "tokens_per_parameter=[10,10.1] schedule=wsd": "two lengths have as many updates at one",
    "tokens_per_parameter=[10,20] schedule=wsd schedule.decay_epochs=1": "several tokens_per_parameter need updates",
    "tokens_per_parameter=[9,90] schedule=wsd optimizer.groups=[{match:'*',horizon:0.5}]": "a horizon of a group",
    "model.widths=[3]": "model.widths=[3]: set by the rungs of model=tiny",
    "optimizer.lr=auto": "optimizer.lr=auto: a ladder needs a number",
    "optimizer.lr=-1": "optimizer.lr=-1",
    "optimizer=prodigy model=tiny": "optimizer=prodigy: has no learning rate to search",
    "data.batch_size=full": "data.batch_size=full: a ladder needs a number",
    "optimizer=adamw model=tiny arms=[half]": "each constant | inverse | zero | hyperball",
    "optimizer=adamw model=tiny arms=[inverse]": "arms=inverse: the rungs of model=tiny have no",
    "optimizer=lion model=tiny arms=[zero,hyperball]": "optimizer.hyperball",
    "optimizer=adamw model=tiny arms=[zero] optimizer.lr=0.1": "optimizer.lr=0.1: the arms set weight",
}


@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input(line: str, place: Path) -> None:
    """Beside `optimizer=sgd model=tiny`, unless the line sets one of them."""
    named = [] if line.startswith(("optimizer=", "model=tin")) else ["optimizer=sgd", "model=tiny"]
    assert BAD_INPUT[line] in refused(place, "ladder", "--config-dir", "conf", "output=out", *named, *line.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": {**FAMILY["rules"], "width": ""}}, "has no rule of width"),
        ({"rules": {"width": "2 * depth", "batch": "constant", "schedule": "cosine"}}, "has no rule of depth"),
        ({"metric": "val_accuracy"}, "metric=val_accuracy of"),
        ({"rungs": {"one": ["model.widths=[2]"], "huge": ["model.widths=[100000,100000]"]}}, "GiB are available"),
        ({"tokens_per_parameter": "many"}, "tokens_per_parameter"),
        ({"optimizers": {"sgd": ["optimizer.momentun=0.5"]}}, "did you mean optimizer.momentum?"),
        ({"optimizers": {"sdg": ["optimizer.momentum=0.5"]}}, "optimizers.sdg: unknown choice; did you mean"),
        ({"optimizers": {"sgd": ["optimizer.lr=0.5"]}}, "optimizers.sgd: optimizer.lr=0.5: allowed: keys of the optim"),
        ({"optimizers": {"sgd": ["schedule.warmup_fraction=0.5"]}}, "allowed: keys of the optimizer but learning"),
        ({"arms": {"zero": ["optimizer.lr=0.5"]}}, "arms.zero: optimizer.lr=0.5: allowed: keys of the optim"),
        ({"arms": {"half": []}}, "half"),
    ],
)
def test_bad_families(changes: dict[str, Any], message: str, place: Path) -> None:
    change(place, **changes)
    assert message in refused(place, "ladder", "optimizer=sgd", *LINE)


def test_a_family_sets_hyperparameters_that_yield_to_typed_ones(place: Path) -> None:
    change(place, optimizers={"sgd": ["optimizer.momentum=0.5", "optimizer.weight_decay=0.01"]})
    line = ("optimizer=sgd", *LINE, "rungs=2", "optimizer.lr=0.01", "optimizer.weight_decay=0.02")
    result = dlopt(place, "ladder", *line)
    assert result.code == 0, result.err
    config = RunFolder(place / "out/sgd/one/seed-0").config() or {}
    assert (config["optimizer"]["momentum"], config["optimizer"]["weight_decay"]) == (0.5, 0.02)
    assert "Set: optimizer.momentum=0.5" in " ".join(result.out.split())


def test_shipped_families_compose(place: Path) -> None:
    from dlopt.config.compose import Composer
    from dlopt.config.plan import plan
    from dlopt.lab.ladder.family import load_family
    from dlopt.optim.parameters import parameter_groups
    from dlopt.training.builders.model_check import model_on_meta

    before = entries(place)
    for name in ("gpt", "vit", "resnet", "gpt_gpu"):
        family = load_family(name, Composer())
        sizes = [*family.rungs.values()]
        for overrides in (sizes[0], sizes[-1]):
            plan(Composer(), [f"experiment={family.experiment}", *overrides, "steps=10"])
        for lines in family.arms.values():
            config = plan(Composer(), [f"experiment={family.experiment}", *sizes[0], *lines]).run_config
            module = model_on_meta(config.model, {"input_shape": (8,), "vocabulary": 16})
            groups = parameter_groups(module, config.grouping, {"hyperball": True}, decay_norm_and_bias=False)
            rest = {each for group in groups if not group.get("use_muon", True) for each in group["params"]}
            matrices = {name for name, each in module.named_parameters() if each.ndim > 1 and each not in rest}
            assert rest and all(name.startswith("block") for name in matrices)
    assert entries(place) == before


def test_submitted_workers_get_the_words_of_the_command(place: Path) -> None:
    line = ["optimizer=adamw", *LINE, "rungs=2", "hydra/launcher=slurm", "hydra.launcher.n_jobs=0"]
    result = dlopt(place, "ladder", *line)
    assert result.code == 0, result.err
    assert "hydra/launcher=slurm: typed n_jobs=0" in result.out.splitlines()
    command = json.loads((place / "out/workers/submission.json").read_text())["command"]
    words = [each for each in line[1:] if not each.startswith(("--", "conf", "output"))]
    assert command[0] == "ladder" and {"optimizer=adamw", *words} <= {*command}
