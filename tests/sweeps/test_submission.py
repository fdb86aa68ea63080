"""A submitted sweep: what its folder holds, who may run it, and a second submission."""

import errno
import io
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.commands import sweep_worker
from dlopt.sweeps import submission
from dlopt.sweeps.array import SUBMISSION, WORKERS, read_array
from dlopt.sweeps.element import RESTARTS
from dlopt.sweeps.slurm_queue import array_ids, note_array
from dlopt.sweeps.status import StatusReader
from tests.support.line import Result, dlopt
from tests.support.processes import run_dlopt
from tests.support.requires import requires
from tests.sweeps.fake_slurm import SMALL, SUBMIT, WriteTool

PLACE = "sweep"


def said(result: Result) -> str:
    assert result.code == 2 and "Traceback" not in result.err and result.err.count("\n") == 1, result
    return result.err


@pytest.fixture
def slurm(write_tool: WriteTool, tmp_path: Path) -> Path:
    """Fakes Slurm: sbatch appends its flags and the variable TOKEN to a file, which is returned."""
    calls = tmp_path / "calls"
    write_tool("sbatch", f'cat >{tmp_path}/script; echo "$TOKEN $@" >>{calls}; wc -l <{calls}')
    write_tool("squeue", "true")
    write_tool("scancel", f'echo cancelled "$@" >>{calls}')
    return calls


def jobs(tmp_path: Path) -> list[str]:
    return [job.status for job in StatusReader(tmp_path / PLACE).read().jobs]


def list_elements(write_tool: WriteTool, sweep: Path, **states: str) -> None:
    """Makes squeue list elements of the array 1: e0="PENDING"."""
    rows = [f"{1:<24}{name[1:]:<12}{state:<24}{'None':<96}{sweep}/workers/%A_%a.log" for name, state in states.items()]
    write_tool("squeue", "\n".join(f"echo '{row}'" for row in rows) or "true")


@requires("git")
def test_what_is_submitted(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints how to go on and ends; a secret is in no file."""
    monkeypatch.setenv("TOKEN", "a-secret-of-mine")
    secret = "+hydra.job.env_set={TOKEN:'${oc.env:TOKEN}',MODE:fast}"
    words = [*SUBMIT, "hydra.launcher.n_jobs=5", "optimizer=sgd,adam", "seed=0,1", secret, *SMALL]
    result = dlopt(tmp_path, *words)
    assert result.code == 0, result
    assert result.out.splitlines() == [
        "hydra/launcher=slurm: typed n_jobs=5",
        "submitted 4 jobs: 4 elements of a job array, Slurm job 1",
        "next:", f"  dlopt sweep status {PLACE}", f"  dlopt sweep wait {PLACE}", f"  dlopt sweep stop {PLACE}",
    ]  # fmt: skip
    [call] = slurm.read_text().splitlines()
    assert call.startswith("a-secret-of-mine --parsable") and "--array=0-3 " in call
    assert jobs(tmp_path) == ["queued"] * 4 and array_ids(tmp_path / PLACE) == ["1"]
    array = read_array(tmp_path / PLACE)
    assert array is not None and array.elements == 4
    assert (array.jobs[2].folder, array.jobs[2].label) == ("2", "optimizer=adam seed=0")
    assert array.jobs[2].length.startswith("epochs=")
    stored = submission.read(tmp_path / PLACE)
    assert (stored.environment, stored.secrets, stored.command) == ({"MODE": "fast"}, ("TOKEN",), None)
    facts = json.loads((tmp_path / PLACE / "2/environment.json").read_text())
    assert facts["submitted_code"] == stored.sha256
    assert "optimizer=adam" in (tmp_path / PLACE / "2/overrides.yaml").read_text()
    for path in (tmp_path / PLACE).rglob("*"):
        assert not path.is_file() or b"a-secret-of-mine" not in path.read_bytes(), path
    [line] = [line for line in (tmp_path / "script").read_text().splitlines() if line.startswith("srun ")]
    script = shlex.split(line)
    assert script[:2] == ["srun", "--nodes=1"] and script[-2] == stored.digest
    paths = next(word for word in script if word.startswith("PYTHONPATH=")).partition("=")[2].split(":")
    assert (Path(paths[0]) / "dlopt/cli.py").is_file() and Path(paths[0]).is_relative_to(tmp_path / PLACE)


@requires("git")
def test_no_file_of_a_submitted_sweep_has_a_secret(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither labels, nor the code and its diff."""
    project = tmp_path / "project"
    project.mkdir()
    subprocess.run(["git", "init", "-q", project], check=True)
    module = f"mine_{tmp_path.name}"
    (project / f"{module}.py").write_text("import torch\nclass Opt(torch.optim.SGD): pass\n")
    (project / "settings.yaml").write_text("a: 1\n")
    subprocess.run(["git", "-C", project, "add", "."], check=True)
    subprocess.run(
        ["git", "-C", project, "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "first"], check=True
    )
    monkeypatch.syspath_prepend(project)
    monkeypatch.setenv("LATER_TOKEN", "Canary-later-1")
    (project / "settings.yaml").write_text("a: 1\n# Canary-later-1\n")
    (project / f"{module}.py").write_text((project / f"{module}.py").read_text() + "\n")
    for name in (".env", "id_rsa", "secrets.toml", "Canary-later-1.txt"):
        (project / name).write_text("Canary-file-2")
    axis = "a=zip(note=['Canary-later-1 https://me:Canary-url-3@host','https://h?token=Canary-url-4'],seed=[0,1])"
    own = ["optimizer=custom", f"optimizer._target_={module}.Opt", "+optimizer.lr=0.1", f"allow_packages=[{module}]"]
    words = [word if word != f"hydra.sweep.dir={PLACE}" else "hydra.sweep.dir=sweep" for word in SUBMIT]
    result = dlopt(project, *words, "hydra.launcher.n_jobs=1", axis, *own, *SMALL)
    assert result.code == 0, result
    left_out = ".env, ${oc.env:LATER_TOKEN}.txt, id_rsa, ..."
    assert (
        f"not copied with the code: 4 untracked files or folders ({left_out}); to copy one: git add NAME\n"
        in result.out
    )
    assert "Canary" not in result.out
    folder = project / PLACE
    [copy] = (folder / WORKERS / ".code").glob("*/project")
    assert sorted(path.name for path in copy.iterdir()) == [f"{module}.py", "settings.yaml"]
    for path in folder.rglob("*"):
        if path.is_file() and path != copy / "settings.yaml":  # code is copied as it is
            assert b"Canary" not in path.read_bytes(), path
    assert "LATER_TOKEN" in (folder / WORKERS / "code.diff").read_text()
    array = read_array(folder)
    assert array is not None and [job.label for job in array.jobs] == [
        "note='${oc.env:LATER_TOKEN} https://me:***@host' seed=0", "note='https://h?token=***' seed=1",
    ]  # fmt: skip


def test_chunks_and_the_elements_at_once(slurm: Path, write_tool: WriteTool, tmp_path: Path) -> None:
    """By default at most four elements for each that may run; never more than the cluster accepts."""
    write_tool("scontrol", "echo 'MaxArraySize = 6'")
    line = [*SUBMIT, "hydra.launcher.n_jobs=1", "seed=range(0,10)", *SMALL]
    assert dlopt(tmp_path, *line, "hydra.launcher.chunk=5", "dry_run=false").code == 0
    assert "chunk=1: 10 jobs make an array of 10 elements, but MaxArraySize of this cluster is 6; use " in said(
        dlopt(tmp_path, *line, "hydra.launcher.chunk=1", "hydra.sweep.dir=b")
    )
    for number, own in enumerate((["hydra.launcher.n_jobs=1"], ["hydra.launcher.n_jobs=8"])):
        assert dlopt(tmp_path, *line, *own, f"hydra.sweep.dir=c{number}").code == 0
    arrays = [word for word in slurm.read_text().split() if word.startswith("--array=")]
    assert arrays == ["--array=0-1%1", "--array=0-3%1", "--array=0-5"]


def test_the_output_of_a_worker_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATER_TOKEN", "Canary-later-1")

    def read(_: Path) -> Any:
        print("Canary-later-1 https://me:Canary-url-3@host")
        raise UserError("the end")

    monkeypatch.setattr(submission, "read", read)
    monkeypatch.setattr(
        sys, "argv", ["worker", str(tmp_path), "0", '{"slots":1,"requeue":0,"stop_on_failure":false,"part":null}']
    )
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sweep_worker, "end_on_signals", lambda: None)
    assert sweep_worker.main() == 2
    assert out.getvalue() == "${oc.env:LATER_TOKEN} https://me:***@host\n"


def test_a_refused_submission(slurm: Path, write_tool: WriteTool, tmp_path: Path) -> None:
    """It leaves no new folder, and loses nothing of an old one."""
    line = [*SUBMIT, "hydra.launcher.n_jobs=1", "seed=0,1", *SMALL]
    (tmp_path / PLACE).mkdir()
    (tmp_path / PLACE / "mine.txt").touch()
    write_tool("sbatch", "echo no such partition >&2; exit 1")
    assert "sbatch: no such partition" in said(dlopt(tmp_path, *line))
    assert [path.name for path in (tmp_path / PLACE).iterdir()] == ["mine.txt"]
    assert "sbatch: no such partition" in said(
        dlopt(tmp_path, *[word for word in line if "sweep.dir" not in word], "hydra.sweep.dir=new")
    )
    assert not (tmp_path / "new").exists()
    write_tool("sbatch", "cat >/dev/null; echo 1")
    assert dlopt(tmp_path, *line).code == 0
    write_tool("sbatch", "exit 1")
    assert "sbatch" in said(dlopt(tmp_path, *line, "resume=auto"))
    assert jobs(tmp_path) == ["queued"] * 2 and (tmp_path / PLACE / "0/config.yaml").is_file()


@requires("git")
def test_a_second_submission_joins_the_first(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tool: WriteTool
) -> None:
    """It submits nothing while elements are in the queue; other code, jobs or lengths are refused."""
    line = [*SUBMIT, "hydra.launcher.n_jobs=1", "seed=0,1", "epochs=2", *SMALL]
    sweep = tmp_path / PLACE
    assert dlopt(tmp_path, *line).code == 0
    saved = (sweep / "sweep.yaml").read_text(), (sweep / "0/config.yaml").read_text()
    list_elements(write_tool, sweep, e0="CONFIGURING", e1="PENDING")
    (sweep / "0/summary.json").write_text('{"status": "interrupted"}')
    for words in (line, [*line, "resume=auto"], [*line, "hydra.launcher.n_jobs=2"]):
        result = dlopt(tmp_path, *words)
        assert result.code == 0 and result.out.startswith(
            "already submitted: Slurm job 1, elements: 1 running, 1 pending\nnext:\n"
        ), result
    local = [word for word in line if "launcher" not in word]
    assert "another sweep is active in this folder" in said(dlopt(tmp_path, *local))
    longer = [word.replace("epochs=2", "epochs=3") for word in line]
    advice = "; stop them with `dlopt sweep stop sweep`, wait for them, or use another folder"
    for words in (longer, [*longer, "resume=auto"]):
        assert f"queued or running with another length (epochs=2){advice}" in said(dlopt(tmp_path, *words))
    with monkeypatch.context() as patch:
        patch.setattr("dlopt.sweeps.submitting.version", lambda _: "0.0")  # of torch
        assert "queued or running with other settings" in said(dlopt(tmp_path, *line))
    write_tool("squeue", "exit 1")
    assert "squeue does not answer" in said(dlopt(tmp_path, *line))
    assert len(slurm.read_text().splitlines()) == 1  # one call of sbatch, none of scancel
    assert saved == ((sweep / "sweep.yaml").read_text(), (sweep / "0/config.yaml").read_text())
    list_elements(write_tool, sweep)
    assert "this folder contains a sweep; resume it with resume=auto" in said(dlopt(tmp_path, *line))
    result = dlopt(tmp_path, *longer, "resume=auto")
    assert result.code == 0 and "Slurm job 2" in result.out and array_ids(sweep) == ["1", "2"], result
    line[line.index("seed=0,1")] = "seed=0,2"
    for words in (line, [*line, "resume=auto"]):
        other = said(dlopt(tmp_path, *words))
        assert "the sweep that was submitted in this folder has a job 1 (seed=1), which is not one of these" in other


@pytest.fixture
def submitted(tmp_path: Path) -> Path:
    assert dlopt(tmp_path, *SUBMIT, "seed=0,1", *SMALL).code == 0
    return tmp_path / PLACE


def test_nobody_replaces_a_submission_that_a_process_runs(submitted: Path, tmp_path: Path) -> None:
    """It may be between two jobs, and would run the next one of the new submission with its own code."""
    lines = "import sys, pathlib", "from dlopt.sweeps.submission import in_use"
    block = "with in_use(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    command = [sys.executable, "-c", "\n".join([*lines, block]), str(submitted)]
    line = [*SUBMIT, "seed=0,1", "epochs=9", *SMALL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert "queued or running with another length" in said(dlopt(tmp_path, *line))
        process.stdin.close()
    assert dlopt(tmp_path, *line).code == 0


@requires("git")
def test_a_sweep_of_another_user_runs_nothing(submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *line: started.append(line))
    assert dlopt(tmp_path, "sweep", "work", PLACE).code == 0 and len(started) == 1
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of-another-user"))
    digest = submission.read(submitted).digest
    assert "only the user who has submitted this sweep can resume it" in said(dlopt(tmp_path, "sweep", "resume", PLACE))
    refused = said(dlopt(tmp_path, "sweep", "work", PLACE))
    advice = f"you have not submitted this sweep, whose code would run; if you trust it, add trust={digest[:16]}"
    assert advice in refused
    assert "you have not" in said(dlopt(tmp_path, "sweep", "work", PLACE, f"trust='{digest[:8]}'"))
    assert dlopt(tmp_path, "sweep", "work", PLACE, f"trust='{digest[:16]}'").code == 0 and len(started) == 2
    content = json.loads((submitted / WORKERS / SUBMISSION).read_text())
    content["environment"] = {"LD_PRELOAD": "/tmp/x.so"}
    (submitted / WORKERS / SUBMISSION).write_text(json.dumps(content))
    assert "you have not" in said(dlopt(tmp_path, "sweep", "work", PLACE, f"trust='{digest[:16]}'"))


@requires("git")
def test_refusals(submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = submitted / WORKERS / SUBMISSION
    content = json.loads(path.read_text())
    monkeypatch.setattr(submission, "trusted", lambda: {submission.read(submitted).digest})
    for change, message in {
        ("torch", "1.0"): "submitted with torch 1.0, but this is torch",
        ("secrets", ("NO_SUCH_TOKEN",)): "its jobs need these environment variables: NO_SUCH_TOKEN",
        ("cwd", "/no/such/folder"): "submitted in /no/such/folder, a folder that this machine does not have",
        ("elements", 3): "workers/jobs.json is missing, or not of this submission",
        ("tasks", 4): "its jobs have 4 processes, which srun starts",
        (
            "more",
            1,
        ): "submission.json: is damaged: more: Unexpected keyword argument; restore it, or submit the sweep a",
    }.items():
        path.write_text(json.dumps({**content, change[0]: change[1]}))
        assert message in said(dlopt(tmp_path, "sweep", "work", PLACE))
    path.write_text(json.dumps({**content, "paths": [], "dlopt": "9.9"}))
    assert "submitted with dlopt 9.9, but this is dlopt" in said(dlopt(tmp_path, "sweep", "work", PLACE))
    path.write_text(json.dumps(content))
    (submitted / content["code"] / "dlopt/dlopt/__pycache__").mkdir()
    (submitted / content["code"] / "dlopt/dlopt/__pycache__/cli.cpython-311.pyc").write_bytes(b"of a stranger")
    assert "the copy of its code has changed since it was submitted" in said(dlopt(tmp_path, "sweep", "work", PLACE))
    for name, value in {"paths": 5, "environment": [], "tasks": "many"}.items():
        path.write_text(json.dumps({**content, name: value}))
        assert f"sweep/workers/submission.json: is damaged: {name}" in said(dlopt(tmp_path, "sweep", "work", PLACE))
    path.write_text("{")
    assert "submission.json: is damaged: is not JSON" in said(dlopt(tmp_path, "sweep", "work", PLACE))
    path.write_text(json.dumps(content))
    path.with_name(submission.LAUNCHER).unlink()
    assert "no sweep was submitted in this folder" in said(dlopt(tmp_path, "sweep", "resume", PLACE))


def test_stop_and_resume(submitted: Path, slurm: Path, write_tool: WriteTool, tmp_path: Path) -> None:
    """An array of the elements with failed, interrupted and lost jobs, unless they are in the queue."""
    note_array(submitted, "1")
    list_elements(write_tool, submitted, e0="RUNNING", e1="PENDING")
    result = dlopt(tmp_path, "sweep", "stop", PLACE)
    assert result.out.startswith("cancelled 2 elements, whose jobs write checkpoints; to continue: dlopt sweep resume ")
    assert slurm.read_text() == "cancelled -- 1\n"
    settings = submitted / WORKERS / submission.LAUNCHER
    settings.write_text(settings.read_text().replace('"n_jobs": 0', '"n_jobs": 8'))
    assert "only the user who has submitted this sweep" in said(dlopt(tmp_path, "sweep", "resume", PLACE))
    submission.trust(submission.digest_of(json.loads(settings.read_text())))
    assert "all jobs that are left are queued or running (Slurm job 1)" in said(
        dlopt(tmp_path, "sweep", "resume", PLACE)
    )
    failed = '{"status": "failed", "reason": "disk full"}'
    (submitted / "0/summary.json").write_text('{"status": "finished"}')
    (submitted / "1/summary.json").write_text(failed)
    (submitted / "1" / RESTARTS).write_text("{}")
    list_elements(write_tool, submitted)
    write_tool("sbatch", "exit 1")
    assert "sbatch" in said(dlopt(tmp_path, "sweep", "resume", PLACE))
    assert (submitted / "1/summary.json").read_text() == failed
    write_tool("sbatch", f'echo "$@" >>{slurm}; echo 2')
    result = dlopt(tmp_path, "sweep", "resume", PLACE)
    assert result.out.startswith("resumed: 1 element, Slurm job 2\n"), result
    assert "--array=1 " in slurm.read_text() and jobs(tmp_path) == ["finished", "queued"]
    assert not (submitted / "1" / RESTARTS).exists()
    (submitted / "1/summary.json").write_text('{"status": "stopped_early"}')
    assert "no job is left to run" in said(dlopt(tmp_path, "sweep", "resume", PLACE))


def test_two_resumes_submit_one_array(submitted: Path, slurm: Path, write_tool: WriteTool, tmp_path: Path) -> None:
    """The second waits for the first, and finds its elements in the queue."""
    settings = submitted / WORKERS / submission.LAUNCHER
    settings.write_text(settings.read_text().replace('"n_jobs": 0', '"n_jobs": 8'))
    submission.trust(submission.digest_of(json.loads(settings.read_text())))
    rows = [f"{1:<24}{index:<12}{'PENDING':<24}{'None':<96}{submitted}/workers/%A_%a.log" for index in (0, 1)]
    listed = "; ".join(f"echo '{row}'" for row in rows)
    write_tool("squeue", f"[ ! -e {tmp_path}/queued ] || {{ {listed}; }}")
    write_tool("sbatch", f"echo called >>{slurm}; sleep 1; touch {tmp_path}/queued; echo 1")
    with ThreadPoolExecutor(2) as pool:
        ended = [*pool.map(lambda _: run_dlopt(tmp_path, "sweep", "resume", PLACE), range(2))]
    assert slurm.read_text() == "called\n"
    assert sorted(done.returncode for done in ended) == [0, 2]
    assert "all jobs that are left are queued or running (Slurm job 1)" in "".join(done.stderr for done in ended)


def test_why_a_grid_was_stopped(submitted: Path, slurm: Path, tmp_path: Path) -> None:
    """Until it is resumed."""
    stored = submission.read(submitted)
    submission.stop(submitted, stored, "job 0 failed")
    assert "stopped: job 0 failed\n" in dlopt(tmp_path, "sweep", "status", PLACE).out
    assert json.loads(dlopt(tmp_path, "sweep", "status", PLACE, "--json").out)["stop_reason"] == "job 0 failed"
    assert dlopt(tmp_path, "sweep", "resume", PLACE).code == 0
    assert "stopped" not in dlopt(tmp_path, "sweep", "status", PLACE).out


def test_more_values_extend_a_submitted_grid(submitted: Path, tmp_path: Path) -> None:
    """As a local one; all of its jobs are submitted again, because the array consists of them."""
    result = dlopt(tmp_path, *SUBMIT, "seed=2,0,1", "resume=auto", *SMALL)
    assert result.code == 0, result
    assert jobs(tmp_path) == ["queued"] * 3 and submission.read(submitted).elements == 3
    array = read_array(submitted)
    assert array is not None and [job.label for job in array.jobs] == ["seed=0", "seed=1", "seed=2"]
    other = said(dlopt(tmp_path, *SUBMIT, "seed=3,4,5", "resume=auto", *SMALL))
    assert "sweep: the sweep that was submitted in this folder has a job 0 (seed=0), which is not one of these" in other


@requires("git")
def test_a_full_disk_while_submitting(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a write names no file."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = said(dlopt(tmp_path, *SUBMIT, "seed=0,1", *SMALL))
    place = tmp_path / PLACE / WORKERS / ".code"
    assert message == f"dlopt: {place}: cannot be copied beside the sweep: No space left on device\n"
    assert not (tmp_path / PLACE).exists()


def test_stop_of_a_stranger(submitted: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping a sweep needs what resuming it needs: its user. No line of its file is passed to Slurm."""
    (submitted / WORKERS / "slurm").write_text("--me\n--state=RUNNING\n7 8\n")
    assert array_ids(submitted) == []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    assert "only the user who has submitted this sweep can stop it" in said(dlopt(tmp_path, "sweep", "stop", PLACE))
    assert not slurm.exists()


@requires("git")
def test_words_of_a_search(slurm: Path, tmp_path: Path) -> None:
    """Workers run its command in its folder, with copies of the files that it names."""
    (tmp_path / "space.yaml").write_text('optimizer=sgd: {optimizer.lr: "0.1,0.2"}\n')
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text("# @package _global_\n")
    subprocess.run(["git", "init", "-q", tmp_path / "mine"], check=True)
    words = ["hydra/sweeper=dlopt_optuna", "hydra.sweeper.n_trials=3", "optimizer=sgd", "space=space.yaml", *SMALL]
    result = dlopt(tmp_path, *SUBMIT, "--config-dir", "mine", *words)
    assert result.code == 0 and "submitted 3 jobs: no job array" in result.out, result
    command = submission.read(tmp_path / PLACE).command
    assert command is not None and command[0] == "train" and command[3] == "-m"
    [config] = [word for word in command if word.startswith("--config-dir=")]
    [space] = [word for word in command if word.startswith("space=")]
    for word in (config, space):
        path = Path(word.partition("=")[2])
        assert path.exists() and path.is_relative_to(tmp_path / PLACE / WORKERS)
    assert command[-2:] == ("resume=auto", f"hydra.sweep.dir='{tmp_path / PLACE}'")


@requires("git")
def test_code_and_configs_in_no_repository(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs use them where they are, which the command says; another user, who cannot check them, runs nothing."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.syspath_prepend(tmp_path)
    module = f"plain_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text("import torch\nclass Opt(torch.optim.SGD): pass\n")
    (tmp_path / "mine").mkdir()
    own = ["optimizer=custom", f"optimizer._target_={module}.Opt", f"allow_packages=[{module}]"]
    search = ["hydra/sweeper=dlopt_optuna", "hydra.sweeper.n_trials=1", "+optimizer.lr=tag(log,interval(0.01,1))"]
    result = dlopt(tmp_path, *SUBMIT, "--config-dir", "mine", *search, *own, *SMALL)
    for folder in (tmp_path, tmp_path / "mine"):
        line = f"not copied: {folder} (in no repository that git can read); what you edit there changes the jobs"
        assert line in result.out.splitlines(), result
    stored = submission.read(tmp_path / PLACE)
    assert stored.import_paths(tmp_path / PLACE)[1:] == stored.in_place == [str(tmp_path)]
    assert stored.command is not None and f"--config-dir={tmp_path / 'mine'}" in stored.command
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of-another-user"))
    refused = said(dlopt(tmp_path, "sweep", "work", PLACE, f"trust='{stored.digest[:16]}'"))
    assert (
        f"can start its workers, because its code is in no Git repository and was not copied: {tmp_path}\n" in refused
    )


def test_the_folder_of_no_submission(tmp_path: Path) -> None:
    for part in ("work", "stop", "resume"):
        with pytest.raises(UserError, match="no sweep was submitted in this folder"):
            submission.read(tmp_path)
        assert "no sweep was submitted" in said(dlopt(tmp_path, "sweep", part, "."))
