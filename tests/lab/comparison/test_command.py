"""`comparison` in an experiment file: runs, plot and overrides."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dlopt.lab.comparison.frozen import CHANGED
from dlopt.sweeps import pool as pools
from dlopt.sweeps.array import read_array
from dlopt.sweeps.element import Element
from tests.support.line import Result, dlopt, refused

RECIPE = """\
# @package _global_
# A small comparison
defaults:
  - /experiment/lecture/_comparison
  - override /model: mlp
  - override /schedule: constant
  - _self_

comparison:
  title: Widths & 100 % of them
  see: Wider is better.
  variants:
    narrow: ["model.widths=[2]"]
    wide: ["model.widths=[8]"]
  along: {}
  seeds: [0, 1]
  metrics: [train_loss, val_accuracy]
  claims:
    - {claim: Wide networks learn faster, metric: train_loss, lower: wide, than: narrow, factor: 1.0}

name: small
epochs: 2
data:
  subset: 60
  batch_size: 20
"""
# Changes of the recipe: a run before the variants, and a variant that starts from it.
BEFORE = ("  variants:", '  before:\n    base: ["model.widths=[8]", epochs=1, init_from=null]\n  variants:')
WILD = ("  along", "    wild: [optimizer.lr=1.0e+30]\n  along")  # diverges
STARTS = ('wide: ["model.widths=[8]"]', 'wide: ["model.widths=[8]", init_from=before:base]')


def taught(student: str, teacher: str) -> tuple[str, str]:
    """The change of the recipe by which a variant learns from another."""
    widths = {"narrow": 2, "wide": 8}[student]
    return (
        f'{student}: ["model.widths=[{widths}]"]',
        f"{student}: [loss=distillation, \"loss.teacher='variant:{teacher}'\"]",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a config folder that contains a comparison."""
    (tmp_path / "myconf" / "experiment").mkdir(parents=True)
    (tmp_path / "myconf" / "experiment" / "small.yaml").write_text(RECIPE)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


RUN = ["train", "--config-dir", "../myconf", "experiment=small"]


def compare(folder: Path, *typed: str) -> Result:
    return dlopt(folder, *RUN, *typed)


def change(folder: Path, *changes: tuple[str, str]) -> None:
    """Replaces texts of the recipe."""
    recipe = folder.parent / "myconf/experiment/small.yaml"
    for old, new in changes:
        assert old in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(old, new))


@pytest.mark.drawn
def test_writes_runs_table_and_plot(folder: Path) -> None:
    result = compare(folder, "hydra.run.dir=out")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("Widths & 100 % of them: 4 runs in ")
    assert lines[1:3] == ["a preview: comparison.quick=true", "what to look at: Wider is better."]
    lines = lines[2:]
    assert lines[1].startswith("  1/4 narrow, seed 0: train_loss ") and lines[4].startswith("  4/4 wide, seed 1: ")
    assert lines[5].split() == ["variant", "train_loss", "val_accuracy"]
    assert {*lines[6]} == {"─"} and lines[9] == "Wider is better." and len(lines) == 13
    saved = json.loads((folder / "out/comparison.json").read_text())
    assert lines[10] == saved["claims"][0]["sentence"] and "Wide networks learn faster. Training loss, " in lines[10]
    assert [row["variant"] for row in saved["rows"]] == ["narrow", "wide"] and saved["seeds"] == [0, 1]
    last = [json.loads((folder / f"out/{i}/metrics.jsonl").read_text().splitlines()[-1]) for i in range(4)]
    assert float(lines[7].split()[1]) == pytest.approx((last[0]["train_loss"] + last[1]["train_loss"]) / 2, rel=1e-3)
    config = yaml.safe_load((folder / "out/3/config.yaml").read_text())
    assert config["model"]["widths"] == [8] and config["seed"] == 1 and "comparison" not in config
    with Image.open(folder / "out/comparison.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert (folder / "out/comparison.svg").is_file()


def test_claims_changed_after_the_results_are_marked_until_the_comparison_runs_again(folder: Path) -> None:
    assert compare(folder, "hydra.run.dir=out").code == 0
    first = json.loads((folder / "out/comparison.json").read_text())
    assert first["recipe"] == "small" and "changed_after_results" not in first
    assert CHANGED not in dlopt(folder, "report", "out").out
    change(folder, ("factor: 1.0", "factor: 1.01"))
    report = dlopt(folder, "report", "out").out
    assert f"{first['claims'][0]['verdict']}, {CHANGED}: Wide networks learn faster\n" in report
    assert "run the comparison again, in a new folder" in report
    assert CHANGED in (folder / "out/report/index.html").read_text()
    result = compare(folder, "hydra.run.dir=out", "resume=auto")  # evaluates the new margin on the old runs
    assert result.code == 0 and CHANGED in result.out, result.err
    assert json.loads((folder / "out/comparison.json").read_text())["changed_after_results"] is True
    change(folder, ("see: Wider is better.", "see: Wider is much better."))  # not a claim
    assert compare(folder, "hydra.run.dir=new").code == 0
    assert CHANGED not in dlopt(folder, "report", "new").out


def test_resumes(folder: Path) -> None:
    assert compare(folder, "hydra.run.dir=out", "seed=3").code == 0
    before = (folder / "out/0/summary.json").read_bytes()
    (folder / "out/1/summary.json").unlink()
    message = compare(folder, "hydra.run.dir=out", "seed=3")
    assert message.code == 2 and "this folder contains runs; resume them with resume=auto" in message.err
    result = compare(folder, "hydra.run.dir=out", "seed=3", "resume=auto")
    assert result.code == 0 and "2 runs" in result.out
    assert (folder / "out/0/summary.json").read_bytes() == before
    assert json.loads((folder / "out/1/summary.json").read_text())["status"] == "finished"


def test_resume_auto_finds_the_unfinished_comparison(folder: Path) -> None:
    assert compare(folder, "seed=3", "epochs=1").code == 0
    [first] = folder.glob("outputs/small/*")
    assert compare(folder, "seed=3", "epochs=1", "resume=auto").code == 0  # finished: a new one
    [second] = set(folder.glob("outputs/small/*")) - {first}
    for path in (first / "1/summary.json", first / "comparison.json"):  # as if it had been killed
        path.unlink()
    before = (first / "0/summary.json").read_bytes()
    other = compare(folder, "seed=3", "epochs=1", "optimizer.lr=0.5", "resume=auto")
    assert len(list(folder.glob("outputs/small/*"))) == 3 and f"in {first.relative_to(folder)}\n" not in other.out
    result = compare(folder, "seed=3", "epochs=1", "resume=auto")
    assert result.code == 0 and f"in {first.relative_to(folder)}\n" in result.out
    assert (first / "comparison.json").is_file() and (first / "1/summary.json").is_file()
    assert (first / "0/summary.json").read_bytes() == before and second.is_dir()


@pytest.mark.drawn
def test_axis_with_a_diverging_run(folder: Path) -> None:
    change(folder, ("along: {}", "along: {optimizer.lr: [0.1, 1.0e+30]}"))
    one = compare(folder, "epochs=1", "hydra.run.dir=one", "seed=0")
    assert one.code == 0 and "nan" not in one.err, one.err  # a result, not an error
    rows = [line.split() for line in one.out.splitlines() if line.startswith(("narrow", "wide"))]
    assert [row[1] for row in rows] == ["0.1", "1e+30"] * 2
    assert [row[2] == "diverged" for row in rows] == [False, True] * 2
    assert (folder / "one/comparison.png").stat().st_size > 10_000


def test_stops_at_a_failed_run(folder: Path) -> None:
    (folder / "out" / "1").mkdir(parents=True)
    (folder / "out" / "1" / "checkpoints").write_text("no folder")
    result = compare(folder, "epochs=1", "hydra.run.dir=out", "resume=auto")
    assert result.code == 1 and "diverged" not in result.out and "  2/4" not in result.out
    assert not (folder / "out/comparison.png").exists()


def test_interrupted_comparison_prints_how_to_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.lab.comparison.running.exit_code", lambda *_, **__: 75)
    result = compare(folder, "hydra.run.dir=out")
    assert (result.code, result.err) == (75, "")
    assert result.out.splitlines() == [
        "Widths & 100 % of them: 4 runs in out",
        "a preview: comparison.quick=true",
        "what to look at: Wider is better.",
        "stopped after 0 of 4 runs; resume with resume=auto",
    ]


def test_a_metric_that_the_runs_do_not_have_is_no_divergence(folder: Path) -> None:
    result = compare(folder, "epochs=1", "hydra.run.dir=out", "comparison.metrics=[val_loss,val_macro_f1,gap]")
    assert result.code == 2 and "comparison.metrics: the runs have no val_macro_f1; they have " in result.err
    metrics = "comparison.metrics=[val_macro_f1,gap,accuracy_gap,val_error,steps,test_loss]"
    result = compare(folder, "epochs=1", "hydra.run.dir=two", "seed=0", metrics, "evaluate.metrics=[macro_f1]")
    assert result.code == 0 and "diverged" not in result.out, result.err


def test_axis_points_with_several_keys(folder: Path) -> None:
    change(
        folder,
        ("along: {}", 'along: {size: {"1": ["model.norm=none", "data.batch_size=10"], "2": ["optimizer.lr=0.3"]}}'),
    )
    result = compare(folder, "epochs=1", "hydra.run.dir=out", "seed=0")
    assert result.code == 0, result.err
    saved = [yaml.safe_load((folder / f"out/{i}/config.yaml").read_text()) for i in range(4)]
    assert [each["data"]["batch_size"] for each in saved] == [10, 20, 10, 20] and saved[3]["optimizer"]["lr"] == 0.3
    message = refused(folder, *RUN, "optimizer.lr=1")
    assert "optimizer.lr: cannot be overridden; varied by size 2 (optimizer.lr=0.3)" in message


def test_override_replaces_an_axis(folder: Path) -> None:
    change(folder, ("along: {}", "along: {optimizer.lr: [0.1, 0.2]}"))
    result = compare(folder, "optimizer.lr=0.3", "epochs=1", "++seed=5")
    assert result.code == 0, result.err
    assert "2 runs" in result.out
    [config] = folder.glob("outputs/small/*/1/config.yaml")
    saved = yaml.safe_load(config.read_text())
    assert saved["optimizer"]["lr"] == 0.3 and saved["seed"] == 5


def test_claims_about_removed_variants_are_not_evaluated(folder: Path) -> None:
    change(folder, ("than: narrow", "than: thin"))
    result = compare(folder, "+comparison.variants.other=['model.norm=none']", "epochs=1", "seed=0")
    assert "Not evaluated: Wide networks learn faster." in result.out, result.err


def test_variants_from_the_shell_work_as_the_message_advises(folder: Path) -> None:
    line = "+comparison.variants.both=[model.widths=[4],model.norm=none]"
    message = refused(folder, *RUN, line)
    advised = "+comparison.variants.both=['model.widths=[4]','model.norm=none']"
    assert message.strip().endswith(f'inside the quotes for the shell: "{advised}"')
    result = compare(folder, advised, "dry_run=true", "seed=0")
    assert "job 2: experiment=small comparison=null model.widths=[4] model.norm=none seed=0" in result.out, result.err


def test_a_quick_comparison_is_a_preview_without_verdicts(folder: Path) -> None:
    change(folder, ("  claims:", '  quick_overrides: ["comparison.seeds=[7]", epochs=1, data.subset=50]\n  claims:'))
    result = compare(folder, "comparison.quick=true", "data.subset=40", "hydra.run.dir=out")
    assert result.code == 0, result.err
    assert "2 runs in out" in result.out and "Not judged: Wide networks learn faster. Training loss: " in result.out
    assert "A preview of fewer runs; without comparison.quick=true, the claims are judged." in result.out.splitlines()
    saved = json.loads((folder / "out/comparison.json").read_text())
    assert saved["quick"] is True and saved["seeds"] == [7] and saved["claims"][0]["verdict"] == "not judged"
    config = yaml.safe_load((folder / "out/1/config.yaml").read_text())
    assert (config["epochs"], config["data"]["subset"], config["seed"]) == (1, 40, 7)  # what is typed wins
    assert "not judged: Wide networks learn faster" in dlopt(folder, "report", "out").out


@pytest.mark.parametrize(
    ("typed", "runs"),
    [
        ("comparison.only=[wide]", ["model.widths=[8]"]),
        ("comparison.variants={two:['model.widths=[2]','model.norm=none'],three:['model.widths=[3]']}",
         ["model.widths=[2] model.norm=none", "model.widths=[3]"]),
        ("+comparison.variants={two:['model.norm=none']}",
         ["model.widths=[2]", "model.widths=[8]", "model.norm=none"]),
    ],
)  # fmt: skip
def test_variants_are_chosen_replaced_and_added_from_the_shell(folder: Path, typed: str, runs: list[str]) -> None:
    result = compare(folder, typed, "dry_run=true", "seed=0")
    assert result.code == 0, result.err
    for number, lines in enumerate(runs):
        assert f"job {number}: experiment=small comparison=null {lines} seed=0\n" in result.out
    assert f"job {len(runs)}: " not in result.out


def test_advice_on_variants_works(folder: Path) -> None:
    line = "comparison.variants={a:[model.widths=[3]],b:[]}"
    message = refused(folder, *RUN, line)
    advised = message.strip().rpartition("for the shell: ")[2].strip('"')
    assert advised == "comparison.variants={a:['model.widths=[3]'],b:[]}"
    assert "job 1: experiment=small comparison=null seed=0" in compare(folder, advised, "dry_run=true", "seed=0").out


def test_comparison_null_trains_once(folder: Path) -> None:
    result = compare(folder, "comparison=null", "epochs=1", "hydra.run.dir=single")
    assert result.code == 0, result.err
    assert (folder / "single/summary.json").is_file()


LAUNCHED = "runs in other processes cannot read init_from=before:base; leave out hydra.launcher"
# What is typed, and what it says; some after changes of the recipe.
REFUSED: list[tuple[str, str, *tuple[tuple[str, str], ...]]] = [
    ("model.widths=[4]", "model.widths: cannot be overridden; varied by narrow (model.widths=[2])"),
    ("comparison.metrics=[]", "comparison.metrics=[]: list should have at least 1 item"),
    ("comparison.metrics=[val_loss,valloss]", "metrics=[valloss]: unknown metric; did you mean val_loss?"),
    ("comparison.x=hours", "comparison.x=hours: "),
    ("comparison.sees=x", "comparison.sees"),
    ("comparison.variants=[wide]", "variants=[wide]: to choose variants by their labels, set comparison.only"),
    ("+comparison.variants.x='a=1'", "allowed: a block {name: a list [a,b,...], each a string}"),
    ("comparison.only=[wild]", "comparison.only=[wild]: unknown variant; did you mean wide?"),
    ("comparison.quick=maybe", "comparison.quick=maybe: "),
    ("comparison=3", "comparison=3: allowed: a mapping, or null"),
    ("optimizer.lr=-1", "optimizer.lr=-1: "),
    ("epochs=2,3", "epochs=2,3: several values need `dlopt train -m`"),
    ("", "comparison.claims.0: unknown variant thin; allowed: narrow, wide", ("than: narrow", "than: thin")),
    *(("comparison.quick=true", message, ("  claims:", f"  quick_overrides: {lines}\n  claims:")) for lines,
        message in (("[resume=auto]", "resume=auto: may only be given"), ("3", "quick_overrides=3: allowed: a list"))),
    *(("", f"comparison: {line}: may only be given on the command line", ('["model.widths=[2]"]',
        f'["{line}"]')) for line in ("allow_packages=[os]", "hydra.job.env_set.A=1", "+hydra.job.chdir=true",
        "resume=auto")),
    ("", "variant:wide: must name an earlier variant than narrow; allowed: none", taught("narrow", "wide")),
    ("init_from=before:other", "init_from=before:other: must name an earlier entry of comparison.before", BEFORE),
    *((typed, message, BEFORE, ("epochs: 2", "epochs: 2\ninit_from: before:base")) for typed,
        message in (("hydra/launcher=joblib", LAUNCHED), ("hydra.launcher.n_jobs=2",
        f"hydra/launcher=serial: {LAUNCHED}"), ("hydra/launcher=slurm hydra.launcher.n_jobs=0", LAUNCHED),
        ("hydra.sweep.dir=x", "hydra.sweep.dir=x: a comparison does not read this key; use hydra.run.dir"))),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "message", "changes"), [(typed, said, rest) for typed, said, *rest in REFUSED])
def test_refused_before_writing(folder: Path, typed: str, message: str, changes: list[tuple[str, str]]) -> None:
    change(folder, *changes)
    assert message in refused(folder, *RUN, *typed.split())


def test_dry_run_lists_runs(folder: Path) -> None:
    result = compare(folder, "dry_run=true")
    assert result.code == 0, result.err
    assert [line for line in result.out.splitlines() if "job 3: " in line and "model.widths=[8]" in line]
    assert "4 runs in outputs/" in result.out and "4 jobs; no job has ended" in result.out
    assert list(folder.iterdir()) == []


def test_a_variant_teaches_a_later_one(folder: Path) -> None:
    """Of the same seed. A comparison that is resumed detects neither as changed."""
    change(folder, taught("wide", "narrow"))
    assert compare(folder, "hydra.run.dir=out").code == 0
    for number, teacher in ((2, 0), (3, 1)):
        loss = yaml.safe_load((folder / f"out/{number}/config.yaml").read_text())["loss"]
        assert loss["teacher"] == str(folder / f"out/{teacher}")
        recorded = (folder / f"out/{teacher}/checkpoints/best.pt.sha256").read_text().split()[0]
        assert loss["teacher_sha256"] == recorded
    before = (folder / "out/3/metrics.jsonl").read_text()
    (folder / "out/comparison.json").unlink()
    assert compare(folder, "hydra.run.dir=out", "resume=auto").code == 0
    assert (folder / "out/3/metrics.jsonl").read_text() == before and (folder / "out/comparison.json").exists()


def test_runs_at_once_in_other_processes_give_the_same_results(folder: Path) -> None:
    """A student waits for its teacher, and a diverged run is a result there, too."""
    change(folder, taught("wide", "narrow"), WILD)
    both = [
        compare(folder, f"hydra.run.dir={name}", "seed=1", *launcher)
        for name, launcher in (("here", []), ("pool", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]))
    ]
    assert [result.code for result in both] == [0, 0], both
    first, second = (result.out.replace("pool", "here").splitlines() for result in both)
    assert sorted(second[3:6]) == first[3:6] and second[6:] == first[6:]
    assert re.search(r"^wild +diverged", both[1].out, re.MULTILINE)
    assert (folder / "here/comparison.json").read_bytes() == (folder / "pool/comparison.json").read_bytes()


def test_elements_run_a_submitted_comparison(folder: Path) -> None:
    """The same command with resume=auto judges it; a diverged run is a result, and does not run again."""
    change(folder, WILD, ("seeds: [0, 1]", "seeds: [0]"))
    line = ["hydra/launcher=slurm", "hydra.launcher.n_jobs=0", "hydra.run.dir=out"]
    submitted = compare(folder, *line)
    assert submitted.code == 0 and "submitted 3 jobs: no job array" in submitted.out, submitted
    assert "this command with hydra.run.dir=out resume=auto" in submitted.out
    assert not (folder / "out/comparison.json").exists()
    claims = (folder / "out/claims.json").read_bytes()
    (folder / "out/claims.json").write_bytes(claims[:-9])  # not frozen again
    damaged = compare(folder, *line, "resume=auto")
    assert damaged.code == 2 and "out/claims.json: is damaged: is not JSON; restore it, for it says" in damaged.err
    (folder / "out/claims.json").write_bytes(claims)
    assert dlopt(folder, "sweep", "status", "out").out.startswith("3 jobs: 3 queued")
    array = read_array(folder / "out")
    assert array is not None

    def run() -> None:
        source = Element(folder / "out", dict(enumerate(array.jobs)), {}, (), restarts=1)
        pools.run(source, replace(pools.local(n_jobs=1, stop_on_failure=False), poll_seconds=0.01), source.overview)
        assert dlopt(folder, "sweep", "status", "out").out.startswith("3 jobs: 2 finished, 1 failed")

    run()
    written = (folder / "out/2/summary.json").stat().st_mtime_ns
    (folder / "out/1/summary.json").unlink()  # while another run is left
    assert "submitted 3 jobs" in compare(folder, *line, "resume=auto").out
    run()
    result = compare(folder, *line, "resume=auto")
    assert result.code == 0 and re.search(r"^wild +diverged", result.out, re.MULTILINE), result
    assert (folder / "out/comparison.json").exists()
    assert (folder / "out/2/summary.json").stat().st_mtime_ns == written
    here = compare(folder, "hydra.run.dir=here")
    assert result.out.splitlines()[1:] == here.out.replace("here/", "out/").splitlines()[1:]


def test_variants_start_from_runs_before_them(folder: Path) -> None:
    """One for each seed; they are neither in the table nor in the plot, and a resumed comparison finds them."""
    change(folder, BEFORE, STARTS, ('narrow: ["model.widths=[2]"]', "narrow: [init_from=null]"))
    result = compare(folder, "hydra.run.dir=out")
    assert result.code == 0, result.err
    lines = result.out.splitlines()[2:]
    assert lines[1].startswith("  1/6 base, seed 0: ") and lines[6].startswith("  6/6 wide, seed 1: ")
    saved = json.loads((folder / "out/comparison.json").read_text())
    assert [row["variant"] for row in saved["rows"]] == ["narrow", "wide"]
    base = torch.load(folder / "out/1/checkpoints/best.pt", weights_only=True)  # seed 1
    log = (folder / "out/5/train.log").read_text()
    assert "out/1/checkpoints/best.pt" in log and "tensors loaded" in log and "newly initialized" not in log
    assert base["config"]["model"]["widths"] == [8]
    assert yaml.safe_load((folder / "out/5/config.yaml").read_text())["init_from"] == "before:base"
    before = (folder / "out/0/summary.json").read_bytes()
    (folder / "out/5/summary.json").unlink()
    assert compare(folder, "hydra.run.dir=out", "resume=auto").code == 0
    assert (folder / "out/0/summary.json").read_bytes() == before


def test_the_commands_of_a_report_can_be_typed(folder: Path) -> None:
    change(folder, BEFORE, STARTS)
    assert compare(folder, "hydra.run.dir=out", "data.batch_size=30").code == 0
    found = json.loads(dlopt(folder, "report", "out", "--json").out)["configurations"]
    commands = [shlex.split(row["command"]) for row in found]
    assert len(commands) == 3  # with that of `base`; `wide` starts from another run for each seed
    for program, *words in commands:
        result = dlopt(folder, *words, "dry_run=true")
        assert program == "dlopt" and result.code == 0 and "no job has ended" in result.out, (words, result.err)
    [line] = [words for words in commands if any("/out/0/checkpoints/best.pt" in word for word in words)]
    assert {"model.widths=[8]", "data.batch_size=30", "seed=0"} < {*line}
    assert not any("before:" in word for words in commands for word in words)
    assert dlopt(folder, *line[1:], "hydra.run.dir=again").code == 0
    again, first = (json.loads((folder / path / "summary.json").read_text()) for path in ("again", "out/4"))
    assert again["best_val_loss"] == first["best_val_loss"]
