"""What `hydra/launcher=slurm` asks of Slurm's commands."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.sweeps import slurm
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.slurm_queue import cancel, ended_early, max_array_size, note_array, queued_elements
from tests.support.line import dlopt, refused
from tests.support.requires import requires
from tests.sweeps.fake_slurm import SETTINGS, SMALL, SUBMIT, WriteTool


def test_options_of_sbatch(write_tool: WriteTool, tmp_path: Path) -> None:
    """An array of elements with two nodes of 8 GPUs; a secret reaches sbatch as a variable only."""
    write_tool(
        "sbatch", f'echo "$@" >{tmp_path}/flags; cat >{tmp_path}/script; echo "$TOKEN" >{tmp_path}/token; echo "7;c"'
    )
    extra = {"constraint": "a100", "exclusive": True, "hold": False}
    resources = {
        "nodes": 2,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 12,
        "mem_gb": 1.5,
        "extra": extra,
    }
    launcher = Slurm(**{**SETTINGS, **resources})
    assert launcher.tasks == 16
    assert launcher.submit("0-2%2", ["python", "a b"], tmp_path / "50%", tmp_path, {"TOKEN": "secret-1"}) == "7"
    flags = (tmp_path / "flags").read_text().split()
    for flag in (
        "--parsable", "--array=0-2%2", "--requeue", "--signal=USR1@120", "--time=30", "--nodes=2",
        "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=1536M", "--constraint=a100",
        "--exclusive", f"--output={tmp_path}/50%%/%A_%a.log",
    ):  # fmt: skip
        assert flag in flags, flags
    assert not any(flag.startswith(("--partition", "--account", "--hold")) for flag in flags)
    script = (tmp_path / "script").read_text()
    assert "exec python 'a b'" in script
    assert "secret-1" not in script + " ".join(flags) and (tmp_path / "token").read_text() == "secret-1\n"


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 15), (2, 30), (8, 120), (60, 120)])
def test_a_short_element_is_not_signalled_at_its_start(
    minutes: int, seconds: int, write_tool: WriteTool, tmp_path: Path
) -> None:
    """A quarter of its time is left, or two minutes."""
    write_tool("sbatch", f'echo "$@" >{tmp_path}/flags; echo 7')
    Slurm(**{**SETTINGS, "time": minutes}).submit("0-1", ["python"], tmp_path, tmp_path, {})
    assert f"--signal=USR1@{seconds} " in (tmp_path / "flags").read_text()


@pytest.mark.parametrize(
    ("code", "state", "is_started", "requeued"),
    [
        (143, "RUNNING/None", False, [True, True, False]),
        (138, "RUNNING/None", False, [True, True, False]),
        (143, "CANCELLED/None", False, [False]),
        (143, "", False, [False]),
        (143, "RUNNING/None", True, [False]),
        (75, "RUNNING/None", False, [False]),
        (1, "RUNNING/None", False, [False]),
    ],
)
def test_a_signal_while_an_element_starts(
    code: int, state: str, is_started: bool, requeued: list[bool], write_tool: WriteTool, tmp_path: Path
) -> None:
    """The shell requeues it, up to `requeue` times, unless it was cancelled, or had its own handlers."""
    log = tmp_path / "50% done"
    log.mkdir()
    write_tool("sbatch", f"cat >{tmp_path}/script; echo 7")
    Slurm(**{**SETTINGS, "requeue": 2}).submit("0-1", ["python"], log, tmp_path, {})
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    monkeypatch = pytest.MonkeyPatch()
    started = "" if not is_started else f"rm '{log}/.starting_7_1'; "
    write_tool("srun", f"{started}exit {code}")
    write_tool("squeue", f"echo '{state}'" if state else "true")
    write_tool("scontrol", f'echo "$@" >>{tmp_path}/requeued')
    write_tool("sleep", "true")
    with monkeypatch.context() as context:
        for name, value in variables.items():
            context.setenv(name, value)
        for is_requeued in requeued:
            (tmp_path / "requeued").write_text("")
            assert subprocess.run(["sh", tmp_path / "script"]).returncode == code
            assert (tmp_path / "requeued").read_text() == ("requeue 7_1\n" if is_requeued else "")
        (log / ".starting_7_1").touch()
        slurm.note_start(log)
        assert not (log / ".starting_7_1").exists()


def test_a_signal_while_the_ranks_of_a_job_start(write_tool: WriteTool, tmp_path: Path) -> None:
    """They end by the signal, and not with 75; the element stops, and is requeued."""
    (tmp_path / "0").mkdir()
    for code, expected in ((138, None), (143, None), (75, None), (139, -11)):
        write_tool("srun", f"exit {code}")
        allocation = slurm.Allocation(2)
        step = allocation.start(0, tmp_path / "0", {})
        step._process.wait()  # type: ignore[attr-defined]
        assert step.poll() == expected
        assert (allocation.reason is None) == (expected is not None)


def test_no_cluster(write_tool: WriteTool, tmp_path: Path) -> None:
    """Slurm's five errors become one sentence."""
    lines = [
        "resolve_ctls_from_dns_srv: res_nsearch error: Unknown host", "fetch_config: DNS SRV lookup failed",
        "_establish_config_source: failed to fetch config", "Could not establish a configuration source",
    ]  # fmt: skip
    write_tool("sbatch", "\n".join([*(f"echo 'sbatch: error: {line}' >&2" for line in lines), "exit 1"]))
    with pytest.raises(UserError) as error:
        Slurm(**SETTINGS).submit("0-1", ["python"], tmp_path, tmp_path, {})
    sentence = (
        "no Slurm cluster is configured here (SLURM_CONF), or it does not answer; hydra.launcher.n_jobs=0 writes "
    )
    assert str(error.value) == f"hydra/launcher=slurm: sbatch: {sentence}the sweep without one"


def write_recipe(folder: Path, launcher: dict[str, Any]) -> list[str]:
    """Writes a recipe that sets these keys of the launcher; returns the words of a sweep with it, and with Slurm."""
    path = folder / "conf/experiment/site.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# @package _global_\n" + yaml.safe_dump({"hydra": {"launcher": launcher}}))
    return [*SUBMIT, *SMALL, "--config-dir", "conf", "experiment=site", "hydra.launcher.n_jobs=1", "seed=0,1"]


SITE: dict[str, Any] = {
    "partition": "gpu,long", "account": "${oc.env:ACCOUNT}", "nodes": 1, "gpus_per_node": 2, "cpus_per_task": 4,
    "mem_gb": 8, "time": 90, "extra": {"qos": "high", "constraint": "a100:2", "gpus-per-task": "h100:1"},
}  # fmt: skip


@requires("git")
@pytest.mark.parametrize("place", ["a recipe", "a choice"])
def test_a_file_sets_the_resources_of_a_site(
    place: str, write_tool: WriteTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They reach sbatch as --key=value, beside what is typed; the header of the sweep says who has set what."""
    write_tool("sbatch", f'for each; do echo "$each"; done >{tmp_path}/flags; cat >/dev/null; echo 7')
    write_tool("squeue", "true")
    monkeypatch.setenv("ACCOUNT", "lab-3")
    words = [*write_recipe(tmp_path, SITE), "+hydra.launcher.extra.comment='two words --wrap=id'"]
    if place == "a choice":
        path = tmp_path / "conf/hydra/launcher/site.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump({"defaults": ["slurm", "_self_"], **SITE}))
        words = [each.replace("hydra/launcher=slurm", "hydra/launcher=site") for each in words]
        words.remove("experiment=site")
    result = dlopt(tmp_path, *words)
    assert result.code == 0, result
    flags = (tmp_path / "flags").read_text().splitlines()
    for flag in (
        "--partition=gpu,long", "--account=lab-3", "--nodes=1", "--gpus-per-node=2", "--cpus-per-task=4", "--mem=8192M",
        "--time=90", "--qos=high", "--constraint=a100:2", "--gpus-per-task=h100:1", "--comment=two words --wrap=id",
    ):  # fmt: skip
        assert flags.count(flag) == 1, flags
    header, *_ = result.out.splitlines()
    typed, found = header.split("; ")
    assert typed.endswith(": typed n_jobs=1 'extra.comment=two words --wrap=id'"), header
    assert {"partition=gpu,long", "account=lab-3", "time=90", "extra.qos=high"} <= {*found.split()}, header
    assert found.startswith("from config files ") and "n_jobs" not in found


@pytest.mark.parametrize(
    ("launcher", "named"),
    [
        ({"account": "--wrap=id"}, "account"),
        ({"account": "-Aroot"}, "account"),
        ({"partition": "gpu x"}, "partition"),
        ({"partition": "gpu\n#SBATCH --wrap=id"}, "partition"),
        ({"partition": "größe"}, "partition"),
        ({"partition": ""}, "partition"),
        ({"account": "${oc.env:ACCOUNT}"}, "account"),
        ({"account": "${oc.env:MISSING}"}, "account"),
        ({"account": "${name}"}, "account"),
        ({"time": -5}, "time"),
        ({"extra": {"qos": True}}, "extra.qos"),
        ({"extra": {"qos": "--wrap"}}, "extra.qos"),
        ({"extra": {"wrap": "id"}}, "extra.wrap"),
        ({"extra": {"QOS": "high"}}, "extra.QOS"),
        ({"extra": {"export": "ALL,LD_PRELOAD=x.so"}}, "extra.export"),
        ({"extra": {"output": "x"}}, "extra.output"),
        ({"extra": {"qos ": "x"}}, "extra.qos "),
        ({"extra": {"chdir": "/tmp"}}, "extra.chdir"),
        ({"tasks_per_node": 8}, "tasks_per_node"),
        ({"chunk": 3}, "chunk"),
        ({"_target_": "hydra_plugins.dlopt_sweeps.GpuLauncher"}, "_target_"),
    ],
    ids=str,
)
def test_options_that_a_file_may_not_set(
    launcher: dict[str, Any], named: str, write_tool: WriteTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tool("sbatch", f"touch {tmp_path}/submitted; echo 7")
    monkeypatch.setenv("ACCOUNT", "--wrap=id")
    words = [*write_recipe(tmp_path, launcher), "name='--wrap'"]
    message = refused(tmp_path, *words)
    assert message.startswith(f"dlopt: hydra.launcher.{named}="), message
    assert "command line" in message and not (tmp_path / "submitted").exists()


def test_a_file_chooses_no_launcher(write_tool: WriteTool, tmp_path: Path) -> None:
    """Not in place of the default, nor of the typed one."""
    write_tool("sbatch", f"touch {tmp_path}/submitted; echo 7")
    words = write_recipe(tmp_path, {})
    path = tmp_path / "conf/experiment/site.yaml"
    path.write_text("# @package _global_\ndefaults: [override /hydra/launcher: slurm]\n")
    message = refused(tmp_path, *(each for each in words if not each.startswith(("hydra/launcher", "hydra.launcher"))))
    assert message.startswith("dlopt: hydra/launcher=slurm: set in a config file, but accepted from the command line")
    assert not (tmp_path / "submitted").exists()


def test_refusals_of_sbatch(write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tool("sbatch", "echo 'sbatch: error: invalid partition\n  specified: gpu' >&2; exit 1")
    launcher = Slurm(**SETTINGS)
    with pytest.raises(UserError, match=r"sbatch: sbatch: error: invalid partition specified: gpu$"):
        launcher.submit("0", ["true"], tmp_path, tmp_path, {})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch was not found"):
        launcher.require()
    replace(launcher, n_jobs=0).require()


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING/None", True),
        ("COMPLETING/None", False),
        ("CANCELLED/None", False),
        ("COMPLETING/Preempted", True),
        ("", False),
    ],
)
def test_only_an_element_that_was_not_cancelled_is_requeued(
    state: str, requeued: bool, write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tool("squeue", f"echo {state}")
    write_tool("scontrol", f'echo "$@" >>{tmp_path}/calls; exit 1')
    slurm.requeue_element()  # not in Slurm
    assert not (tmp_path / "calls").exists()
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    slurm.requeue_element()
    assert (tmp_path / "calls").exists() == requeued
    if requeued:
        assert (tmp_path / "calls").read_text() == "requeue 11_3\n"


def line(array: int, index: str, state: str, output: str) -> str:
    """What squeue prints of an element."""
    return f"{array:<24}{index:<12}{state:<24}{'None':<96}{output:<1024}\n"


def test_elements_in_the_queue(write_tool: WriteTool, tmp_path: Path) -> None:
    """Only those of this sweep: the file of the ids may be a stranger's."""
    sweep = tmp_path / "50% done"
    (sweep / "workers").mkdir(parents=True)
    own, other = f"{tmp_path}/50%% done/workers/%A_%a.log", f"{tmp_path}/else/workers/%A_%a.log"
    lines = line(7, "0", "RUNNING", own) + line(7, "1", "CONFIGURING", own) + line(7, "2", "PENDING", own)
    lines += line(8, "0", "PENDING", other) + line(9, "0", "PENDING", own) + line(9, "N/A", "PENDING", own)
    write_tool("squeue", f"echo \"$@\" >{tmp_path}/asked; cat <<'E'\n{lines}E")
    write_tool("scancel", f'echo "$@" >>{tmp_path}/cancelled')
    assert not queued_elements(sweep) and not (tmp_path / "asked").exists()
    (sweep / "workers/slurm").write_text("--me\n--state=RUNNING\n7_1\n\n7,10\n\u0667\n")
    assert not queued_elements(sweep) and not (tmp_path / "asked").exists()
    for number in ("7", "8", "9", "7"):
        note_array(sweep, number)
    found = queued_elements(sweep)
    assert found.states == {"7": {0: "RUNNING", 1: "CONFIGURING", 2: "PENDING"}, "9": {0: "PENDING"}}
    assert found.by_index == {0: "PENDING", 1: "CONFIGURING", 2: "PENDING"}
    assert (found.running, found.pending, found.answers) == (["7_0", "7_1"], 2, True)
    assert "--jobs=7,8,9 " in (tmp_path / "asked").read_text()
    assert cancel(found) == 4 and cancel(found, pending_only=True) == 2
    assert (tmp_path / "cancelled").read_text() == "-- 7 9\n--state=PENDING -- 7 9\n"


def test_slurm_does_not_answer(write_tool: WriteTool, tmp_path: Path) -> None:
    """Elements may then be running; not those of arrays that Slurm has forgotten."""
    (tmp_path / "workers").mkdir()
    note_array(tmp_path, "7")
    write_tool("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert not queued_elements(tmp_path).answers
    write_tool("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queued_elements(tmp_path).answers


def test_how_slurm_has_ended_elements(write_tool: WriteTool, tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    note_array(tmp_path, "7")
    write_tool("sacct", "echo '7_0|COMPLETED\n7_1|NODE_FAIL\n7_2|CANCELLED by 1000\n7_3|RUNNING'")
    assert ended_early(tmp_path) == {"7_1": "NODE_FAIL", "7_2": "CANCELLED"}
    write_tool("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert ended_early(tmp_path) == {}


def test_the_largest_array(write_tool: WriteTool) -> None:
    write_tool("scontrol", "echo 'MaxArraySize            = 1001\nMaxArrayTasks = 3'")
    assert max_array_size() == 1001
    write_tool("scontrol", "exit 1")
    assert max_array_size() is None


def test_sbatch_answers_no_id(write_tool: WriteTool, tmp_path: Path) -> None:
    write_tool("sbatch", "echo --me")
    with pytest.raises(UserError, match=r"sbatch: answers '--me\\n' instead of a job id"):
        slurm.Slurm(**SETTINGS).submit("0", ["true"], tmp_path, tmp_path, {})


def test_several_processes_need_a_parallel_mode(tmp_path: Path) -> None:
    keys = ["-m", "hydra/launcher=slurm", "hydra.launcher.nodes=2", "seed=0,1", "dry_run=true"]
    assert "starts 2 processes per job, which would train the same model" in refused(tmp_path, "train", *keys)
    assert dlopt(tmp_path, "train", *keys, "parallel=ddp").code == 0


def test_words_that_do_not_fit(write_tool: WriteTool, tmp_path: Path) -> None:
    write_tool("sbatch", "exit 1")
    slurm_keys = ["-m", "hydra/launcher=slurm", "seed=0,1"]
    for words, message in {
        ("-m", "seed=0,1", "wait=true"): "wait=true: only for hydra/launcher=slurm",
        (*slurm_keys, "wait=1"): "wait=1: must be true or false",
        (*slurm_keys, "hydra.sweeper.max_batch_size=2"): "max_batch_size=2: not with hydra/launcher=slurm",
        (*slurm_keys, "+hydra.job.env_set.A=${seed}"): "hydra.job.env_set: must be the same for all jobs",
        ("wait=true",): "wait=true: only sweeps have this word; add -m",
    }.items():
        assert message in refused(tmp_path, "train", *words)
