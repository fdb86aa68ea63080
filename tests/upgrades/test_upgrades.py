"""What earlier versions left still works: a run folder of each format is kept here. What a newer one leaves is refused.

format_1: written by 0.1.0, before `evaluate.tta` and `checkpoint.sharded` had come:

    dlopt train model=mlp model.widths=[2] data.subset=30 data.batch_size=10 epochs=2 threads=1 tracking=[] \
        log_every_steps=null checkpoint.keep=1 optimizer=momentum name=old max_time=0.00001

It ended after one of four updates. A change of the format adds a folder beside it, and leaves this one as it is.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dlopt import load
from dlopt.config.compose import Composer, to_plain
from dlopt.config.resuming import differences
from dlopt.files import write
from dlopt.folders import FORMAT, RunFolder
from dlopt.tracking import read_metrics, read_summary
from dlopt.train import checkpoint
from tests.commands.line import dlopt, refused

OLD = Path(__file__).with_name("format_1")
LINE = yaml.safe_load((OLD / "overrides.yaml").read_text())[:-1]  # without max_time
# of the same run without an interruption, by the version that wrote the folder
LOSSES = [(2.456164002418518, 2.4104669094085693), (2.418889045715332, 2.394498586654663)]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "outputs" / "old" / "2026-11-20_12-00-00"))


def finished_as_it_would_have(folder: Path) -> bool:
    found = [(line["train_loss"], line["val_loss"]) for line in read_metrics(folder)]
    assert found == [pytest.approx(pair, rel=1e-5) for pair in LOSSES]
    return (read_summary(folder) or {})["status"] == "finished"


@pytest.mark.parametrize(
    "where", ["resume=auto", "resume=auto hydra.run.dir={old}", "resume={old}/checkpoints/last.pt"]
)
def test_a_run_of_the_first_format_goes_on(tmp_path: Path, old: Path, where: str) -> None:
    result = dlopt(tmp_path, "train", *LINE, *where.format(old=old).split())
    assert result.code == 0, result.err
    assert "goes on from step 1 of 4" in result.out
    new = max(old.parent.iterdir()) if where.startswith("resume={") else old
    assert finished_as_it_would_have(new)


def test_its_model_its_config_and_its_figures_are_read(tmp_path: Path, old: Path) -> None:
    assert load(old)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert dlopt(tmp_path, "eval", f"checkpoint={old}/checkpoints/last.pt").code == 0
    assert dlopt(tmp_path, "train", f"from={old}", "max_time=null", "hydra.run.dir=new").code == 0
    assert finished_as_it_would_have(tmp_path / "new")
    assert "interrupted" in dlopt(tmp_path, "runs", str(old)).out


def test_keys_that_have_come_since_are_no_differences() -> None:
    saved = RunFolder(OLD).config()
    assert saved is not None and "tta" not in saved["evaluate"]
    assert differences(saved, to_plain(Composer().compose(LINE), LINE)[1]) == {}
    typed = [*LINE, "evaluate.tta=flip", "seed=3"]
    found = differences(saved, to_plain(Composer().compose(typed), typed)[1])
    assert found["evaluate.tta"] == ("none", "flip") and found["seed"] == (0, 3)


def of_format(folder: Path, number: object) -> None:
    path = folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "folder_format": number}))


def test_new_folders_say_their_format(tmp_path: Path, old: Path) -> None:
    assert RunFolder(old).newer_format() is None  # which says none
    assert dlopt(tmp_path, "train", *LINE, "hydra.run.dir=run").code == 0
    assert json.loads((tmp_path / "run/environment.json").read_text())["folder_format"] == FORMAT
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["format"] == checkpoint.FORMAT


def test_a_newer_folder_is_refused_by_name(tmp_path: Path, old: Path) -> None:
    of_format(old, FORMAT + 1)
    told = f"{old}: written by a newer dlopt (run folder format {FORMAT + 1}; this reads {FORMAT})"
    for typed in (
        "resume=auto",
        f"resume=auto hydra.run.dir={old}",
        f"resume={old}/checkpoints/last.pt",
        f"from={old}",
    ):
        assert told in refused(tmp_path, "train", *LINE, *typed.split()), typed
    listed = dlopt(tmp_path, "runs", "outputs")
    assert "skipped: written by a newer dlopt" in listed.err and str(old.name) not in listed.out
    of_format(old, "odd")
    assert RunFolder(old).newer_format() is None


def test_a_newer_checkpoint_is_refused_by_name_and_an_older_one_is_not_taken_instead(tmp_path: Path, old: Path) -> None:
    newest = old / "checkpoints/last.pt"
    state = torch.load(newest, weights_only=True)
    shutil.copy(newest, newest.with_name("step-1.pt"))
    newest.with_name("step-1.pt.sha256").write_text(Path(f"{newest}.sha256").read_text().replace("last", "step-1"))
    write(newest, lambda file: torch.save({**state, "format": 99}, file))
    for command in (
        ["train", *LINE, "resume=auto"],
        ["train", *LINE, f"resume={newest}"],
        ["eval", f"checkpoint={newest}"],
        ["train", *LINE, f"init_from={newest}", "hydra.run.dir=run"],
    ):
        result = dlopt(tmp_path, *command)
        assert result.code == 2 and "written by a newer dlopt (format 99; this reads " in result.err, result
        assert "Traceback" not in result.err
