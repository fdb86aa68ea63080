"""Run folders: new, finished, unfinished, live, resumed and extended runs."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.files import write
from dlopt.basics.folders import FORMAT, FolderSnapshot, RunFolder, inside, make, make_new, newest
from dlopt.basics.interruption import Interrupted
from dlopt.basics.locks import hold, is_held
from dlopt.config.resuming import differences
from dlopt.machine.world import World
from dlopt.run import runner
from dlopt.run.folder import Attempt
from dlopt.run.record import describe
from dlopt.training.checkpoint import checkpoints
from tests.support.line import HeldByAnotherProcess, Result, dlopt, entries, only, refused
from tests.support.sizes import TINY

IN_RUN = "hydra.run.dir=run"


def train(folder: Path, *arguments: str) -> Result:
    result = dlopt(folder, "train", *TINY, *arguments)
    assert result.code == 0, result.err
    return result


def stop_after_first_epoch(folder: Path, *arguments: str) -> None:
    """Leaves a run killed after one of two epochs: a checkpoint, but no summary."""
    train(folder, *arguments, "epochs=1", "schedule_epochs=2")
    run = only(folder, "run") if IN_RUN in arguments else max(folder.glob("outputs/train/*"))
    (run / "summary.json").unlink()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = checkpoints.load(run / "checkpoints/last.pt").model
    return model


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# -- files of a run


def test_files_of_a_run_folder(tmp_path: Path) -> None:
    train(tmp_path, "name=mine", "tracking=[tensorboard]")
    run = only(tmp_path, "outputs/mine/*")
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoints",
        "tensorboard", "train.log",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {
        "last.pt", "last.pt.sha256", "best.pt", "best.pt.sha256",
    }  # fmt: skip
    assert yaml.safe_load((run / "overrides.yaml").read_text()) == [*TINY, "name=mine", "tracking=[tensorboard]"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["widths"] == [4]
    environment = json.loads((run / "environment.json").read_text())
    assert {"torch", "python", "git_commit"} <= environment.keys()
    count, unit = environment["data"]["validation"]["count"], environment["data"]["validation"]["unit"]
    correct = lines(run)[-1]["val_accuracy"] * count
    assert count > 1 and unit == "images" and correct == pytest.approx(round(correct), abs=1e-6)
    assert [line["epoch"] for line in lines(run)] == [1, 2]
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert not list(run.rglob("*.tmp"))


def test_the_newest_folder_is_the_last_one_created_also_if_the_clock_is_set_back(tmp_path: Path) -> None:
    names = ["2026-11-26_10-00-00", "2025-01-01_00-00-00", "2025-01-01_00-00-00", "2024-01-01_00-00-00"]
    (tmp_path / "report").mkdir()
    for name in names:
        made = make_new(tmp_path / name)
        found = newest(tmp_path, lambda folder: None if folder.path.name == "report" else 0)
        assert found is not None and found.path == made
    assert not list((tmp_path / names[0]).iterdir())  # the name says it
    assert newest(tmp_path, lambda folder: 0 if folder.path.name in names[:2] else None) == RunFolder(
        tmp_path / names[1]
    )
    assert newest(tmp_path, lambda folder: int(folder.path.name != names[0])) == RunFolder(tmp_path / names[0])
    made = make_new(tmp_path / "2027-01-01_00-00-00")
    assert not list(made.iterdir())


def test_make_new_in_the_same_second(tmp_path: Path) -> None:
    fixed = "2026-01-01_00-00-00"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_new(tmp_path / "outputs/x" / fixed), range(24)))
    assert len(set(made)) == 24 and all(path.is_dir() for path in made)
    assert {path.name for path in made} == {fixed, *(f"{fixed}-{i}" for i in range(1, 24))}
    newest_folder = newest(tmp_path / "outputs/x", lambda folder: True)
    assert newest_folder is not None and newest_folder.path.name == f"{fixed}-23"  # not -9


def test_make_refuses_existing_folder(tmp_path: Path) -> None:
    make(tmp_path / "a/b", "hydra.run.dir")
    with pytest.raises(UserError, match="another run is creating this folder"):
        make(tmp_path / "a/b", "hydra.run.dir")


def test_commands_in_the_same_second_use_different_folders(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("defaults: [train, _self_]\nhydra: {run: {dir: outputs/train/now}}\n")
    for _ in range(2):
        train(tmp_path, "--config-dir", "conf", "--config-name", "mine")
    assert {path.name for path in (tmp_path / "outputs/train").iterdir()} == {"now", "now-1"}


# -- a folder with a run


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path, IN_RUN)
    before = contents(tmp_path)
    message = refused(tmp_path, "train", *TINY, IN_RUN)
    assert "finished" in message and "resume=auto" in message
    result = train(tmp_path, IN_RUN, "resume=auto")
    assert "finished" in result.out
    assert f"{json.loads((tmp_path / 'run/summary.json').read_text())['test_accuracy']:.2%}".split("%")[0] in result.out
    shorter = train(tmp_path, IN_RUN, "resume=auto", "epochs=1")
    assert "this run is already finished, after 2 epochs: " in shorter.out
    assert contents(tmp_path) == before


def test_unfinished_run_without_resume(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    message = refused(tmp_path, "train", *TINY, IN_RUN)
    assert "unfinished" in message and "resume=auto" in message


def test_resumes_in_its_folder(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    train(tmp_path, IN_RUN, "resume=auto", "schedule_epochs=2")
    train(tmp_path, "hydra.run.dir=whole", "schedule_epochs=2")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert [line["epoch"] for line in lines(run)] == [1, 2]
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == [1]
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)


def test_damaged_config_is_replaced_by_that_of_the_checkpoint(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    (tmp_path / "run/config.yaml").write_text("")
    line = [IN_RUN, "resume=auto", "schedule_epochs=2"]
    assert "now 0.02" in refused(tmp_path, "train", *TINY, *line, "optimizer.lr=0.02")
    assert "new run" not in train(tmp_path, *line).out
    assert json.loads((tmp_path / "run/summary.json").read_text())["resumed_from"] == [1]


def test_resume_auto_finds_newest_unfinished_run(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, "seed=1")
    stop_after_first_epoch(tmp_path, "seed=2")
    other, resumed = sorted(tmp_path.glob("outputs/train/*"))
    before = contents(other)
    train(tmp_path, "seed=2", "resume=auto", "schedule_epochs=2")
    assert len(list(tmp_path.glob("outputs/train/*"))) == 2
    assert RunFolder(resumed).has_ended() and contents(other) == before
    train(tmp_path, "seed=2", "resume=auto", "schedule_epochs=2")  # none is unfinished now: afresh
    assert len(list(tmp_path.glob("outputs/train/*"))) == 3
    train(tmp_path, "seed=1", "name=other", "resume=auto", "schedule_epochs=2")  # nor of this name
    assert len(list(tmp_path.glob("outputs/other/*"))) == 1 and contents(other) == before


def test_resumes_with_other_keys_of_the_machine_and_of_logging(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path)
    changed = ["profile=true", "profile_steps=[0,2]", "cuda_graphs=false", "channels_last=false", "data.workers=0"]
    changed += ["epochs=3", "threads=auto", "log_every_steps=1", "tracking=[]", "checkpoint.keep=1", "device=cpu"]
    train(tmp_path, "resume=auto", "schedule_epochs=2", *changed)
    run = only(tmp_path, "outputs/train/*")
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == [1]


def test_data_on_another_disk_are_the_same_data(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / f"here/{label}").mkdir(parents=True)
        for number in range(10):
            image = Image.new("L", (8, 8), 20 * number + ord(label) % 2)
            image.save(tmp_path / f"here/{label}/{number}.png")
    keys = ("data=image_folder", "data.channels=1", "data.subset=null", "data.batch_size=4")
    stop_after_first_epoch(tmp_path, *keys, "data.root=here")
    (tmp_path / "here").rename(tmp_path / "there")
    train(tmp_path, *keys, "data.root=there", "resume=auto", "schedule_epochs=2")
    run = only(tmp_path, "outputs/train/*")
    assert [line["epoch"] for line in lines(run)] == [1, 2]
    (run / "summary.json").unlink()
    (tmp_path / "there/b").rename(tmp_path / "there/c")
    result = dlopt(tmp_path, "train", *TINY, *keys, "data.root=there", "resume=auto", "schedule_epochs=2", "epochs=3")
    assert result.code == 2 and "with classes ['a', 'b'], now ['a', 'c']; see data.root" in result.err


@pytest.mark.parametrize("changed", ["precision=bf16", "deterministic=true", "init_from=x.pt", "monitor=val_loss"])
def test_other_keys_make_another_run(changed: str, tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    (tmp_path / "x.pt").touch()
    message = refused(tmp_path, "train", *TINY, IN_RUN, "resume=auto", "schedule_epochs=2", changed)
    assert f"has another config ({changed.partition('=')[0]}: saved " in message


def test_resume_auto_skips_live_run(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path)
    run = only(tmp_path, "outputs/train/*")
    with HeldByAnotherProcess(run):
        train(tmp_path, "resume=auto", "schedule_epochs=2")
    assert len(list(tmp_path.glob("outputs/train/*"))) == 2 and len(lines(run)) == 1


@pytest.mark.parametrize("has_saved", [True, False])
@pytest.mark.parametrize("place", [("hydra.run.dir=new",), ()], ids=["typed", "dated"])
def test_a_restarted_launcher_continues_the_run_that_it_has_started_from_a_checkpoint(
    place: tuple[str, ...], has_saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, IN_RUN, "epochs=1", "schedule_epochs=3")
    line = ("resume=run/checkpoints/last.pt", "schedule_epochs=3", *place)
    train(tmp_path, *line, "epochs=2")  # killed after the second epoch
    first = tmp_path / "new" if place else only(tmp_path, "outputs/train/*")
    (first / "summary.json").unlink()
    if not has_saved:
        for path in (first / "checkpoints").iterdir():
            path.unlink()
    monkeypatch.setattr("dlopt.run.folder.current", lambda: World("torchrun", 0, 2, 0, 2, restarts=1))
    train(tmp_path, *line, "epochs=3")
    run = first if place or has_saved else max(tmp_path.glob("outputs/train/*"))
    assert [each["epoch"] for each in lines(run)] == [1, 2, 3]
    resumed = json.loads((run / "summary.json").read_text())["resumed_from"]
    assert resumed == ([1, 2] if has_saved else [1])


def test_unfinished_run_without_checkpoint_restarts(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    train(tmp_path, IN_RUN, "resume=auto")
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


def test_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    for path in (tmp_path / "run/checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = contents(tmp_path)
    result = dlopt(tmp_path, "train", *TINY, IN_RUN, "resume=auto", "schedule_epochs=2")
    assert result.code == 1 and "all checkpoints in" in result.err and "Traceback" not in result.err
    assert contents(tmp_path) == before


# -- length


def test_extended_run_keeps_its_schedule(tmp_path: Path) -> None:
    train(tmp_path, IN_RUN)
    before = {path: each[0] for path, each in contents(tmp_path).items()}
    message = refused(tmp_path, "train", *TINY, IN_RUN, "resume=auto", "epochs=3")
    assert "schedule_epochs=3 to stretch the schedule, or schedule_epochs=2" in message
    assert message.strip().endswith(f"{IN_RUN} resume=auto epochs=3 schedule_epochs=3")
    assert {path: each[0] for path, each in contents(tmp_path).items()} == before
    train(tmp_path, IN_RUN, "resume=auto", "epochs=3", "schedule_epochs=2")
    run = tmp_path / "run"
    rates = [line["lr"] for line in lines(run)]
    assert [line["epoch"] for line in lines(run)] == [1, 2, 3]
    assert rates[2] <= rates[1]  # the cosine has arrived at 0 and stays there; a new horizon would raise it again
    assert json.loads((run / "summary.json").read_text())["epochs"] == 3


def test_extended_run_that_was_killed_is_not_finished(tmp_path: Path) -> None:
    """It has left the summary of the shorter run, and a config with its own length."""
    train(tmp_path, IN_RUN)
    longer = [IN_RUN, "resume=auto", "epochs=3", "schedule_epochs=3"]
    summary = (tmp_path / "run" / "summary.json").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()}
    train(tmp_path, *longer)
    (tmp_path / "run" / "summary.json").write_text(summary)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(before[path.name]) if path.name in before else path.unlink()
    train(tmp_path, *longer)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 3


# -- another config


@pytest.mark.parametrize(
    "change", ["seed=5", "model.widths=[5]", "data.subset=50", "data.batch_size=8", "optimizer=adam"]
)
def test_refuses_other_config_with_differences(change: str, tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    message = refused(tmp_path, "train", *TINY, IN_RUN, "schedule_epochs=2", "resume=auto", change)
    key, _, value = change.partition("=")
    assert ("optimizer._target_" if key == "optimizer" else key) in message
    assert (value if key != "optimizer" else "torch.optim.Adam").strip("[]") in message
    assert shlex.join(TINY) in message  # how that run was started
    message = refused(tmp_path, "train", *TINY, "resume=run/checkpoints/last.pt", change)
    assert "another config" in message


def test_differences_names_dotted_keys() -> None:
    saved = {"seed": 1, "epochs": 2, "model": {"widths": [4], "depth": 2}, "data": {"workers": 1}}
    resumed = {"seed": 1, "epochs": 9, "model": {"widths": [4], "norm": "batch"}, "data": {"workers": 7}}
    assert differences(saved, resumed) == {"model.depth": (2, None), "model.norm": (None, "batch")}


# -- resume=PATH


def test_resume_path_copies_history(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    before = contents(tmp_path / "run")
    train(tmp_path, "schedule_epochs=2", "resume=run/checkpoints/last.pt")
    run = only(tmp_path, "outputs/train/*")
    assert [line["epoch"] for line in lines(run)] == [1, 2]
    assert lines(run)[0] == lines(tmp_path / "run")[0]
    assert contents(tmp_path / "run") == before
    train(tmp_path, "schedule_epochs=2", "hydra.run.dir=whole")
    torch.testing.assert_close(weights(run), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_resume_path_in_the_same_folder_but_not_into_another_run(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    train(tmp_path, "hydra.run.dir=other")
    refused(tmp_path, "train", *TINY, "hydra.run.dir=other", "resume=run/checkpoints/last.pt")
    train(tmp_path, IN_RUN, "schedule_epochs=2", "resume=run/checkpoints/last.pt")
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


# -- live folders


def test_refuses_live_folder_before_writing(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    with HeldByAnotherProcess(tmp_path / "run") as process:
        before = contents(tmp_path)
        for resume in ("resume=auto", "resume=null"):
            assert "active in this folder" in refused(tmp_path, "train", *TINY, IN_RUN, resume, "schedule_epochs=2")
        assert contents(tmp_path) == before
        process.kill()
        process.wait()
        train(tmp_path, IN_RUN, "resume=auto", "schedule_epochs=2")  # a dead process's lock does not count


def test_lock_is_exclusive(tmp_path: Path) -> None:
    with HeldByAnotherProcess(tmp_path):
        assert RunFolder(tmp_path).is_live()
        with pytest.raises(UserError, match="another run is active"):
            RunFolder(tmp_path).lock()
    assert not RunFolder(tmp_path).is_live()


def test_asking_for_the_lock_does_not_take_it(tmp_path: Path) -> None:
    """A reader that polls must not refuse a run that starts."""
    lock = tmp_path / ".lock"
    lock.touch()
    reader = get_context("fork").Process(target=ask_until, args=(tmp_path,), daemon=True)
    reader.start()
    for _ in range(2000):
        hold(lock).close()
    (tmp_path / "end").touch()
    reader.join(300)
    assert reader.exitcode == 0


def ask_until(folder: Path) -> None:
    while not (folder / "end").exists():
        is_held(folder / ".lock")


def test_a_lock_in_a_folder_that_is_read_only(tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock():
        code = (
            "import sys, pathlib, os, dlopt.basics.locks as locks; flags = [];"
            "opened = os.open; os.open = lambda path, how, *rest: flags.append(how) or opened(path, how, *rest);"
            "print(locks.is_held(pathlib.Path(sys.argv[1])), any(how & os.O_ACCMODE for how in flags))"
        )
        line = [sys.executable, "-c", code, str(tmp_path / ".lock")]
        assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "True False\n"


def test_the_lock_excludes_its_own_process(tmp_path: Path) -> None:
    """The kernel would grant it again; and opening the file to test the lock would release it."""
    with RunFolder(tmp_path).lock():
        assert RunFolder(tmp_path).is_live()
        with pytest.raises(UserError, match="another run is active"):
            RunFolder(tmp_path).lock()
        code = "import sys, pathlib, dlopt.basics.locks; print(dlopt.basics.locks.is_held(pathlib.Path(sys.argv[1])))"
        line = [sys.executable, "-c", code, str(tmp_path / ".lock")]
        assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "True\n"
    assert not RunFolder(tmp_path).is_live()
    RunFolder(tmp_path).lock().close()


@pytest.mark.parametrize("name", [".lock", "checkpoints", "checkpoints/shards", "metrics.jsonl", "tensorboard", "any"])
def test_a_run_does_not_write_through_a_link_in_its_folder(name: str, tmp_path: Path) -> None:
    """A folder of others could lead it to files elsewhere. The folder itself may be a link."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "outputs").symlink_to(tmp_path / "run")
    run = RunFolder(tmp_path / "outputs")
    run.lock().close()
    for target in ("mine", "nowhere"):
        link = tmp_path / "run" / name
        shutil.rmtree(link) if link.is_dir() and not link.is_symlink() else link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        for write_to in (run.lock, lambda: describe(run.path, {}, [], {})):
            with pytest.raises(UserError, match=rf"outputs: {name} is a link, .*; remove it"):
                write_to()
    with pytest.raises(UserError, match="mine: x is a link"):
        (tmp_path / "x").symlink_to(tmp_path)
        inside(tmp_path, "x/y", "mine")
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_folder_that_is_removed_or_renamed_during_its_run(tmp_path: Path) -> None:
    def rename() -> None:
        run.path.rename(tmp_path / "other")

    def replace() -> None:
        rename()
        run.path.mkdir()
        (run.path / ".lock").touch()

    renamed = r"run: during the run, .* was renamed to .*/other; resume with hydra.run.dir=.*/other resume=auto"
    changes = {shutil.rmtree: "was removed", rename: renamed, replace: renamed}
    for change, message in changes.items():
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        run = RunFolder(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        run.refuse_moved()  # not locked by this process
        with run.lock():
            run.refuse_moved()
            change(*([run.path] if change is shutil.rmtree else []))  # type: ignore[operator]
            with pytest.raises(RunError, match=message):
                run.refuse_moved()


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dlopt", "train", *TINY, IN_RUN]
    root = str(Path(__file__).parents[2])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, **pipes) for _ in range(2)]
    ends = [(process.communicate(timeout=300), process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2], ends
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


# -- folders that cannot be used


@pytest.mark.parametrize(
    "line",
    [
        ["train", "hydra.run.dir=s3://bucket/run"],
        ["train", "-m", "seed=1,2", "hydra.sweep.dir=gs://bucket/sweep"],
        ["trajectory", "output=hdfs://host/folder"],
    ],
)
def test_refuses_urls(line: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, *line)
    assert f"{line[-1]}: must be a path, not a URL; mount" in message and "copy" in message


# -- cleanup after runs that fail to start


@pytest.mark.parametrize("place", ["run", "there", "there/already", "a/b/c", "."])
def test_cleanup(place: str, tmp_path: Path) -> None:
    (tmp_path / "there/already").mkdir(parents=True)
    (tmp_path / "there/file").write_text("kept")
    refused(tmp_path, "train", *TINY, "data.subset=9", f"hydra.run.dir={place}")
    assert (tmp_path / "there/file").read_text() == "kept"


def test_cleanup_in_an_unfinished_run(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN, "init_from=null")
    before = entries(tmp_path)
    refused(tmp_path, "train", *TINY, IN_RUN, "resume=auto", "schedule_epochs=2", "epochs=2", "init_from=")
    assert entries(tmp_path) == before


def test_snapshot_keeps_existing_files(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    snapshot = FolderSnapshot(tmp_path)
    (tmp_path / "new/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    snapshot.erase(tmp_path)
    assert entries(tmp_path) == {"kept"}
    snapshot = FolderSnapshot(tmp_path / "kept")
    (tmp_path / "kept-1").mkdir()
    (tmp_path / "kept-1/file").touch()
    snapshot.erase(tmp_path / "kept-1")  # the suffix of a run of the same second
    assert entries(tmp_path) == {"kept"}
    snapshot = FolderSnapshot(tmp_path / "x/y")
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/other").touch()  # another process was faster
    snapshot.erase(tmp_path / "x/y")
    assert entries(tmp_path) == {"kept", "x", "x/other"}


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root, who writes everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    assert "cannot write to this folder" in refused(tmp_path, "train", *TINY, IN_RUN)


def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to("/dev/full")
    assert "cannot write to this folder" in refused(tmp_path, "train", *TINY, IN_RUN)


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(tmp_path, "hydra.run.dir='~/run'")
    assert (tmp_path / "home/run/summary.json").exists() and not (tmp_path / "~").exists()


def test_relative_folders_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    train(tmp_path / "elsewhere", "hydra.run.dir=../run")
    assert (tmp_path / "run/summary.json").exists()


def test_folder_taken_by_another_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = runner.place

    def taken_meanwhile(*arguments: Any) -> Attempt:
        monkeypatch.undo()
        attempt = place(*arguments)
        train(tmp_path, IN_RUN)
        return attempt

    monkeypatch.setattr(runner, "place", taken_meanwhile)
    result = dlopt(tmp_path, "train", *TINY, IN_RUN)
    assert result.code == 2 and "active in this folder" in result.err
    assert RunFolder(tmp_path / "run").has_ended() and len(lines(tmp_path / "run")) == 2


@pytest.mark.parametrize("place", ["hydra.run.dir=second", "hydra.run.dir=made", "name=train"])
def test_cleanup_of_a_resumed_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN)
    (tmp_path / "made").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise UserError("data.root=x: it is gone")

    monkeypatch.setattr("dlopt.training.run.train_run", refuse)
    line = [*TINY, "schedule_epochs=2", "resume=run/checkpoints/last.pt", place]
    assert "it is gone" in refused(tmp_path, "train", *line)  # the history that was taken along is gone, too


def test_signal_after_the_run_leaves_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of the training and its exit code."""
    execute = runner.execute

    def interrupted(*arguments: Any, **keys: Any) -> None:
        execute(*arguments, **keys)
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(runner, "execute", interrupted)
    assert dlopt(tmp_path, "train", *TINY, IN_RUN).code == 75
    assert RunFolder(tmp_path / "run").has_ended()


# -- formats


@pytest.mark.parametrize("found", [FORMAT + 1, FORMAT - 1, None, "1"])
def test_refuses_another_folder_format(tmp_path: Path, found: object) -> None:
    run = tmp_path / "outputs/train/2026-11-20_12-00-00"
    stop_after_first_epoch(tmp_path, f"hydra.run.dir={run}")
    path = run / "environment.json"
    environment = json.loads(path.read_text())
    assert environment["folder_format"] == FORMAT and RunFolder(run).other_format() is None
    path.write_text(json.dumps({**environment, "folder_format": found}))
    shown = "none" if found is None else found
    reason = f"{run}: written by another version of dlopt (run folder format {shown}; this version reads {FORMAT})"
    for typed in (
        ["resume=auto"],
        ["resume=auto", f"hydra.run.dir={run}"],
        [f"resume={run}/checkpoints/last.pt"],
        [f"from={run}"],
    ):
        assert reason in refused(tmp_path, "train", *TINY, *typed), typed
    listed = dlopt(tmp_path, "runs", "outputs")
    assert "skipped: written by another version of dlopt" in listed.err and run.name not in listed.out


def test_refuses_another_checkpoint_format(tmp_path: Path) -> None:
    stop_after_first_epoch(tmp_path, IN_RUN, "checkpoint.every_steps=1", "data.batch_size=10")
    newest = tmp_path / "run/checkpoints/last.pt"
    assert [*newest.parent.glob("step-*.pt")]
    state = torch.load(newest, weights_only=True)
    write(newest, lambda file: torch.save({**state, "format": 99}, file))
    changed = ["checkpoint.every_steps=1", "data.batch_size=10"]
    for command in (
        ["train", *TINY, *changed, IN_RUN, "resume=auto"],
        ["train", *TINY, *changed, f"resume={newest}"],
        ["eval", f"checkpoint={newest}"],
        ["train", *TINY, *changed, f"init_from={newest}", "hydra.run.dir=new"],
    ):
        assert "written by another version of dlopt (format 99; this version reads " in refused(tmp_path, *command)
