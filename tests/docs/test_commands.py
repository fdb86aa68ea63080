"""Every command line of the pages is valid; fast ones are run.

Lines of `dlopt train` are composed and validated (`dry_run=true`), with every job of a sweep and of a Slurm array, in a
folder where the pages' placeholders (DATE, FOLDER, ...) exist. Lines of other commands run, on little data.
"""

import contextlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dlopt.commands.command_table import every_command
from dlopt.commands.grid import overrides_of
from dlopt.config.plan import Plan
from dlopt.lab.comparison.comparison import Comparison, VariantRun
from dlopt.sweeps.request import SweepRequest
from tests.support.line import dlopt
from tests.support.pages import ROOT, block_after, blocks
from tests.support.sizes import TINY

DATE = "outputs/train/DATE"
LITTLE = {  # what makes a line of that command one of a moment; what is typed later wins
    "find-lr": ("model=mlp", "model.widths=[4]", "data.subset=40", "threads=1", "updates=10"),
    "diagnose": ("updates=1", "eigenvalues=0", "batches=1", "data.subset=40", "threads=1"),
    "trajectory": ("steps=3",),
    "benchmark": ("dry_run=true",),
    "ladder": ("dry_run=true", "rungs=2", "tokens_per_parameter=0.1"),
}
# These start processes, or diagnose a dozen deep networks.
LONG = {"scaling", "--check", "model=plain56,resnet56", "model.widths=[100,100,100]"}
WATCHING = {"--watch", "--open"}
PLAN_JOB = SweepRequest.plan_job
CELLS = Comparison.cells
RANK = {
    "steps": [0.1],
    "threads": 1,
    "samples": 8,
    "peak_mb": 9.0,
    "sent_mb": 1.0,
    "collectives": 2,
    "communicating": 0.2,
    "waiting": 0.1,
}  # as a rank of `dlopt scaling` measures
_HEADS = {
    ".venv/bin/python",
    ".venv/bin/uv",
    "pip",
    "tensorboard",
    "git",
    "cd",
    "eval",
    "squeue",
    "export",
    "until",
    "sinfo",
}
_HEADS |= {"kubectl", "wandb", "optuna-dashboard"}


@dataclass(frozen=True)
class Line:
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def arguments(self) -> list[str] | None:
        """Of dlopt, whoever starts it; None for a line of something else."""
        words = self.words
        for i, word in enumerate(words):
            if word in ("dlopt", "scripts/dlopt"):
                rest = words[i + 1 :]
            elif word == "train.sbatch" and words[i - 1] != ">":
                rest = ["train", *words[i + 1 :]]
            else:
                continue
            end = next((j for j, each in enumerate(rest) if each in _ENDS), None)
            return [each.removesuffix(";") for each in rest[:end]]
        return None

    @property
    def recipe(self) -> str:
        return next((word for word in self.arguments or [] if word.startswith("experiment=")), "")


DATA_SET = """
from torch.utils.data import Dataset
class MyDataset(Dataset):
    def __init__(self, *, root: str = "", argument: int = 0) -> None: ...
"""
_ENDS = {">", "&", "|", "||", "&&", ";", "do"}


def lines() -> list[Line]:
    found = []
    for block in blocks("bash"):
        for text in block.text.replace("\\\n", " ").splitlines():
            for part in text.split("; dlopt"):  # two commands in a line
                text = part if part == text.split("; dlopt")[0] else f"dlopt{part}"
                if shlex.split(text, comments=True):
                    found.append(Line(block.page, text))
    return found


LINES = lines()
OURS = [*{" ".join(line.arguments): line for line in reversed(LINES) if line.arguments}.values()]  # each one once
OURS.sort(key=lambda line: line.recipe)  # a recipe is composed once, if one process tests all its lines


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the placeholders of the pages are real."""
    folder = tmp_path_factory.mktemp("pages")
    colours = {"cats": (200, 90, 40), "dogs": (30, 90, 200)}
    for part in ("FOLDER", "FOLDER/train", "images"):
        for name, colour in colours.items():
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(4):
                shade = tuple(min(255, value + 9 * i) for value in colour)
                Image.new("RGB", (40, 36), shade).save(folder / part / name / f"{i}.jpg")
    table = "".join(f"images/{name}/{i}.jpg,{name}\n" for name in colours for i in range(4))
    (folder / "labels.csv").write_text(f"path,label\n{table}")
    (folder / "measurements.csv").write_text("width,length,species\n" + "1,2,a\n3,5,b\n" * 20)
    for name, run in (("train", DATE), ("night", "outputs/night"), ("base", "outputs/base")):
        done = dlopt(folder, "train", *TINY, f"name={name}", "checkpoint.keep=4", "epochs=4", f"hydra.run.dir={run}")
        assert done.code == 0, done.err
    for number, optimizer in enumerate(("sgd", "adamw")):  # outputs/night as a sweep
        job = (f"optimizer={optimizer}", "epochs=1", f"hydra.run.dir=sweep/outputs/night/{number}")
        assert dlopt(folder, "train", *TINY, *job).code == 0
    (folder / "start.py").write_text("def ")
    text = ("data=text", "data.file=labels.csv", "data.sequence_length=8", "model=gpt_nano", "steps=2", "tracking=[]")
    done = dlopt(folder, "train", *text, "threads=1", "device=cpu", "hydra.run.dir=outputs/gpt")
    assert done.code == 0, done.err
    rows = (
        "data=table",
        "data.file=measurements.csv",
        "model=mlp",
        "epochs=1",
        "tracking=[]",
        "threads=1",
        "device=cpu",
    )
    done = dlopt(folder, "train", *rows, "hydra.run.dir=outputs/table")
    assert done.code == 0, done.err
    shutil.copy(folder / "measurements.csv", folder / "new.csv")
    shutil.copy(folder / "labels.csv", folder / "notes.txt")
    for name in ("search", "schedules", "slurm", "endless"):
        shutil.copytree(folder / "outputs/night", folder / "outputs" / name)
    shutil.copy(folder / DATE / "checkpoints/best.pt", folder / "weights.pt")
    for path, page, language in (
        ("mine/optim.py", "docs/tutorials/write_an_optimizer.md", "python"),
        ("myconf/optimizer/sign_momentum.yaml", "docs/tutorials/write_an_optimizer.md", "yaml"),
        ("mine/data.py", "docs/howto/custom_data.md", "python"),
        ("mine/metrics.py", "docs/extending.md", "python"),
        ("mine/watch.py", "docs/extending.md", "python"),
        ("mine/denoise.py", "docs/howto/own_task.md", "python"),
        ("mine/matching.py", "docs/howto/own_task.md", "python"),
        ("myconf/experiment/denoise.yaml", "docs/howto/own_task.md", "yaml"),
        ("myconf/benchmark/tier/mine.yaml", "docs/howto/own_task.md", "yaml"),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(block_after(page, language, f"`{path}`"))
    shutil.copy(ROOT / "docs/examples/tasks/denoising.py", folder)
    np.savez(folder / "train.npz", images=np.zeros((8, 8, 8), np.uint8), labels=np.arange(8) % 2)
    script = block_after("docs/tutorials/fine_tune.md", "python", "`make_folders.py`")
    with contextlib.chdir(folder):  # writes the folders `upright` and `tilted`
        exec(compile(script, "make_folders.py", "exec"), {})
    (folder / "mine/__init__.py").write_text(DATA_SET)
    (folder / "myconf/optimizer/mine.yaml").write_text((folder / "myconf/optimizer/sign_momentum.yaml").read_text())
    (folder / "bin").mkdir()
    (folder / "bin/sbatch").write_text("#!/bin/sh\n")
    (folder / "bin/sbatch").chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def equipped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every optional package counts as installed, and Slurm; nothing is drawn or timed."""
    monkeypatch.setattr("dlopt.lab.scaling.modes._run", lambda _, folder, count, __: ([RANK] * count, None))
    monkeypatch.setattr("dlopt.run.dry_run._workload", lambda *_: None)  # reads no data
    monkeypatch.setattr("dlopt.lab.judge.command.run", lambda *_: None)
    monkeypatch.setattr(SweepRequest, "plan_job", plan_new)
    monkeypatch.setattr(Comparison, "cells", cells_of_the_first_seed)
    monkeypatch.setenv("DLOPT_NOTIFY", "http://127.0.0.1:9")  # a dry run sends nothing
    monkeypatch.syspath_prepend(place)
    for name in [each for each in sys.modules if each.partition(".")[0] == "mine"]:  # another test's package
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("PATH", str(place / "bin"), prepend=":")
    for module in ("errors", "ranges"):
        monkeypatch.setattr(f"dlopt.basics.{module}.is_installed", lambda name: True)


def plan_new(request: SweepRequest, overrides: Sequence[str], number: int) -> Plan:
    """Composes only the jobs of a sweep that have a new override; for the others, returns the first job."""
    planned: dict[str, Plan] = request.__dict__.setdefault("planned", {})
    if not planned or not planned.keys() >= set(overrides):
        result = PLAN_JOB(request, overrides, number)
        planned.update(dict.fromkeys(overrides, result))
        return result
    return replace(next(iter(planned.values())), subfolder=str(number))


def cells_of_the_first_seed(comparison: Comparison) -> Iterator[VariantRun]:
    """The runs of a setting differ only in their seed."""
    return (cell for cell in CELLS(comparison) if cell.seed == comparison.seeds[0])


def is_slow(line: Line) -> bool:
    return bool(LONG & set(line.arguments or ())) or line.page not in ("README.md", "docs/quickstart.md")


def marked(lines: list[Line]) -> list[Any]:
    return [pytest.param(each, marks=pytest.mark.slow if is_slow(each) else ()) for each in lines]


def ids(line: Line) -> str:
    return f"{line.page}: {line.text.strip()}"[:110]


@pytest.mark.parametrize("line", marked([each for each in OURS if (each.arguments or [""])[0] == "train"]), ids=ids)
def test_lines_of_train_compose_and_validate(line: Line, place: Path) -> None:
    words = [word for word in line.arguments or [] if word != "..."]
    if "..." in (line.arguments or []):  # a sweep, or a search
        words += ["hydra/sweeper=dlopt_optuna", "optimizer=sgd,adamw"] if "sweeper" in line.text else ["seed=0,1"]
    if array := re.search(r"--array=0-(\d+)", line.text):
        jobs = [overrides_of(number, words[1:]) for number in range(int(array[1]) + 1)]
        with pytest.raises(Exception, match=f"jobs 0 to {len(jobs) - 1}"):
            overrides_of(len(jobs), words[1:])
    else:
        jobs = [words[1:]]
    for job in jobs:
        if "--help" in job or "--cfg" in job:
            assert dlopt(place, "train", *job).code == 0
            return
        # A dry run is of a whole run, and has no document.
        job = [word for word in job if not word.startswith("resume=") and word != "--json"]
        result = dlopt(place, "train", *job, "dry_run=true")
        if "'.error." in line.text:  # shows what becomes of a mistake
            assert result.code == 2 and "did you mean" in result.err
            return
        assert result.code == 0, f"{line.text}\n{result.err}"
        assert re.search(r"^[\d,]+ jobs?\b", result.out, re.MULTILINE), result.out


@pytest.mark.parametrize(
    "line", marked([each for each in OURS if (each.arguments or ["train"])[0] != "train"]), ids=ids
)
def test_lines_of_other_commands_run(line: Line, place: Path, tmp_path: Path) -> None:
    words = [word for word in line.arguments or [] if word not in WATCHING]
    command = words[0]
    if command in ("-h", "--help", "--version"):
        return
    assert command in every_command(), line.text
    more = LITTLE.get(command, ())
    if command == "trajectory" and "function=" not in line.text:
        more = ("points=3", "samples=20") if "checkpoint=" in line.text else ()
    if command == "benchmark":
        fewer = () if "workloads=" in line.text or "tier=mine" in line.text else ("workloads=[mlp]",)
        more = (*more, *fewer) if "optimizer=" in line.text else ()
        more = ("seed=0",) if "--check" in words else more  # other trials every time: rounding may separate one
    if command == "ladder":
        is_report = words[1] == "report"
        more = tuple(each for each in more if f"{each.partition('=')[0]}=" not in line.text and not is_report)
    if command == "runs" and "clean" in words:
        more = ("--yes",)
        shutil.copytree(place / "outputs/night", tmp_path / "outputs/night")
        place = tmp_path
    if re.search(r"outputs/night(/\d| optimizer=)", line.text):
        place = place / "sweep"
    result = dlopt(place, *words, *more)
    if command in ("benchmark", "ladder") and words[1] in ("report", "targets"):
        assert result.code == 2 and f"not a folder for `dlopt {command} " in result.err
        return
    if command == "sweep":  # runs, but no sweep: tests/commands/test_sweep.py and tests/sweeps/test_submission.py
        assert result.code == 2 and re.search("not the folder of a series|no sweep was submitted", result.err)
        return
    if command == "consolidate":  # a sharded checkpoint takes several processes: tests/parallel/test_sharded.py
        assert result.code == 2 and "is not sharded" in result.err
        return
    if words[:2] == ["judge", "ledger"]:  # of the line above it on its page, which another process may test
        assert result.code == 0 or "no change was judged against this base" in result.err
        return
    expected = 4 if command == "judge" else 0  # without runs, it is undecided
    assert result.code == expected, f"{line.text}\n{result.err}"


@pytest.mark.parametrize("line", [each for each in LINES if not each.arguments], ids=ids)
def test_other_lines_name_what_there_is(line: Line) -> None:
    words = [word for word in line.words if "=" not in word] or ["export"]
    named = [word for word in words if word.startswith(("scripts/", ".ci/"))]
    assert named or words[0] in {*_HEADS, "python", "python3"} or words[0] == "sbatch", line.text
    for word in named:
        assert (ROOT / word).exists(), word


@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block.page)
def test_what_is_shown_is_what_is_answered(block: object, place: Path) -> None:
    text = block.text  # type: ignore[attr-defined]
    for typed, output in re.findall(r"^\$ dlopt (.*)\n((?:[^$].*\n)*)", text, re.MULTILINE):
        result = dlopt(place, *shlex.split(typed))
        pattern = ".*".join(re.escape(part) for part in output.strip().split("..."))
        assert re.fullmatch(pattern, (result.out + result.err).strip(), re.DOTALL), result


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_python_is_python(block: object) -> None:
    compile(block.text, "page", "exec")  # type: ignore[attr-defined]
