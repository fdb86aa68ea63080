import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from dlopt.basics.errors import UserError
from dlopt.machine.world import World, current
from dlopt.parallel.processes import rendezvous
from dlopt.parallel.processes.process_group import join
from dlopt.parallel.processes.rendezvous import caused_by_peer, first_to_fail, missing_ranks, slurm_master
from dlopt.run.record import failure
from tests.support.line import refused
from tests.support.processes import run_by_hand
from tests.support.ranks import run_ranks
from tests.support.sizes import TINY

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_GTIDS": "2", "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "no-such-host-n[1-2]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}  # fmt: skip


def test_single_processes_have_no_world() -> None:
    assert current({}) is None
    assert current({"LOCAL_RANK": "0"}) is None
    assert current(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert current({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # a batch script, not one of srun's tasks


def test_launchers_are_detected() -> None:
    assert current(TORCHRUN) == World("torchrun", 3, 4, 1, 2)
    assert current(SRUN) == World("srun", 2, 3, 0, 1)
    assert current(SRUN | TORCHRUN) == World("torchrun", 3, 4, 1, 2)  # torchrun inside srun
    own = {"DLOPT_RANK": "1", "DLOPT_PROCESSES": "2"}
    assert current(SRUN | own) == World("dlopt", 1, 2, 1, 2)


def test_processes_of_launchers_without_local_ranks() -> None:
    """A PyTorchJob sets four variables: its pods are machines; by hand, the address shows that there is one machine."""
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert current(pod) == World("torchrun", 1, 2, 0, 1)
    assert current(pod | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == World("torchrun", 1, 2, 1, 2)
    for address in ("127.0.0.1", "localhost", "::1"):
        assert current(pod | {"MASTER_ADDR": address}) == World("torchrun", 1, 2, 1, 2)
    assert current({"RANK": "1", "WORLD_SIZE": "2"}) == World("torchrun", 1, 2, 1, 2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5: must be < WORLD_SIZE=2"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_invalid_environments_raise(broken: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        current(TORCHRUN | broken)


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_half_of_a_rank(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch's env://, which expects both."""
    monkeypatch.setenv(variable, "0")
    missing = "WORLD_SIZE" if variable == "RANK" else "RANK"
    assert refused(tmp_path, "train", *TINY).startswith(f"dlopt: {missing}: not set; set both")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ({}, "MASTER_ADDR, MASTER_PORT: not set, but RANK=0 and WORLD_SIZE=2 are"),
        ({"MASTER_ADDR": "127.0.0.1"}, "set it, or parallel.master_port;"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}, "MASTER_PORT: not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT=x: must be a port"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be a port"),
    ],
)
def test_names_missing_variables(
    address: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)
    assert message in refused(tmp_path, "train", *TINY, "parallel=ddp", "device=cpu")


def test_restarts_are_read_from_the_environment() -> None:
    torchrun = current(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    srun = current(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert torchrun is not None and torchrun.restarts == 2
    assert srun is not None and srun.restarts == 1


def test_local_size_of_a_slurm_node() -> None:
    two = current(SRUN | {"SLURM_PROCID": "0", "SLURM_GTIDS": "0,1"})
    unknown = current({name: value for name, value in SRUN.items() if name != "SLURM_GTIDS"})
    assert two is not None and two.local_size == 2
    assert unknown is not None and unknown.local_size == 2, "assumes equal tasks per node"


def test_slurm_rendezvous_address_and_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_master(SRUN)[0] == "10.0.0.9", "no scontrol"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames $NODES" ] && printf "%s\\n" "$FIRST" n2\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("NODES", SRUN["SLURM_STEP_NODELIST"])
    monkeypatch.setenv("FIRST", "no-such-host-n1")
    assert slurm_master(SRUN)[0] == "10.0.0.9", "the first node's name does not resolve"
    monkeypatch.setenv("FIRST", "localhost")
    assert slurm_master(SRUN)[0] == "localhost"
    assert slurm_master(SRUN | {"SLURM_STEP_NUM_NODES": "1"})[0] == "127.0.0.1"
    ports = {slurm_master(SRUN | other)[1] for other in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})}
    assert len(ports) == 3


def lose_a_rank() -> None:
    """Called on all ranks: rank 1 ends while rank 0 waits for it in a collective."""
    rendezvous._ROLL_CALL = 0.1
    keys = {"processes": None, "timeout_minutes": 1.0, "master_addr": None, "master_port": None}
    join("ddp", torch.device("cpu"), **keys)  # type: ignore[arg-type]
    distributed.barrier()
    own = RuntimeError("an error of this process")
    assert not caused_by_peer(own) and missing_ranks(own) == []
    if os.environ["DLOPT_RANK"] == "1":
        os._exit(0)
    with pytest.raises(RuntimeError) as lost:
        distributed.all_reduce(torch.zeros(1))
    assert caused_by_peer(lost.value) and not caused_by_peer(ValueError())
    assert missing_ranks(lost.value) == [1]
    os._exit(0)


def test_names_the_rank_that_ended(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_rendezvous:lose_a_rank", 2, tmp_path)


def test_one_rank_reports_a_failure_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "current", lambda: None)
    assert first_to_fail() and first_to_fail()
    monkeypatch.setattr(rendezvous, "current", lambda: World("dlopt", 0, 2, 0, 2))
    monkeypatch.setattr(rendezvous, "_store", distributed.HashStore())
    assert first_to_fail() and not first_to_fail()


def message(stderr: str) -> str:
    """Returns the line of a rank; torch warns of lost connections, as these tests load it before its level is set."""
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("dlopt: ")]
    return line


TABLE = [
    "train", "data=table", "data.file=t.csv", "data.target=y", "data.batch_size=8", "model=mlp", "model.widths=[4]",
    "epochs=1", "tracking=[]", "threads=1", "device=cpu", "parallel=ddp", "output=run",
]  # fmt: skip


def tables(folder: Path, *shifts: float) -> None:
    """Writes the table of each rank, whose 40 rows are those of rank 0, with `shift` added to the first input."""
    for rank, shift in enumerate(shifts):
        rows = [f"{i % 7 + shift},{i % 5},{'uv'[i % 2]}" for i in range(40)]
        (folder / str(rank)).mkdir()
        (folder / f"{rank}/t.csv").write_text("\n".join(["a,b,y", *rows]))


def test_the_ranks_read_other_data(tmp_path: Path) -> None:
    """The same number of rows: no collective fails, and both would train a mixture."""
    tables(tmp_path, 0, 1)
    for rank, done in enumerate(run_by_hand(tmp_path, *TABLE, ranks=[{}, {}])):
        other = "data.file=t.csv: rank 1 differs from rank 0: the training set has other inputs"
        assert done.returncode == 2 and other in message(done.stderr)
        assert not (tmp_path / f"{rank}/run").exists()


def test_a_rank_without_the_data(tmp_path: Path) -> None:
    """Rank 0, which hosts the store, keeps it until the others have read why it ends."""
    tables(tmp_path, 0, 0)
    (tmp_path / "0/t.csv").unlink()
    for done in run_by_hand(tmp_path, *TABLE, ranks=[{}, {}]):
        assert done.returncode == 2 and message(done.stderr).startswith("dlopt: data.file=t.csv: cannot be read in ")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([{}, {"WORLD_SIZE": "3"}], "dlopt: WORLD_SIZE=3 on rank 1, but WORLD_SIZE=2 on rank 0; set one number"),
        (
            [{"WORLD_SIZE": "3"}, {"WORLD_SIZE": "3"}],
            "dlopt: parallel.timeout_minutes=0.15: not all of the 3 ranks have joined within this time (rank 2 has "
            "not)",
        ),
    ],
)
def test_the_roll_call(ranks: list[dict[str, str | None]], expected: str, tmp_path: Path) -> None:
    ended = run_by_hand(tmp_path, *TABLE, "parallel.timeout_minutes=0.15", ranks=ranks)
    assert [(done.returncode, message(done.stderr)) for done in ended] == [(2, expected)] * 2


def test_rank_0_refuses_the_config(tmp_path: Path) -> None:
    """The others do not look at it: they read the refusal from the store, and do not wait for the timeout."""
    for done in run_by_hand(tmp_path, *TABLE, "data.targett=y", ranks=[{}, {}]):
        assert done.returncode == 2
        assert message(done.stderr).startswith("dlopt: data.targett=y: unknown key; did you mean data.target?")


def wait_in_different_collectives() -> None:
    """Called on all ranks: rank 1 comes later than the timeout, but responds."""
    keys = {"processes": None, "timeout_minutes": 0.02, "master_addr": None, "master_port": None}
    join("ddp", torch.device("cpu"), **keys)  # type: ignore[arg-type]
    if os.environ["DLOPT_RANK"] == "1":
        time.sleep(2)
    with pytest.raises(RuntimeError) as error:
        distributed.all_reduce(torch.zeros(1))
    code, reason = failure(error.value)
    assert code == 1 and str(reason).startswith("all ranks respond, but wait in different collectives: check that all")
    os._exit(0)


def test_a_timeout_of_ranks_that_respond(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_rendezvous:wait_in_different_collectives", 2, tmp_path)


def post_a_failure() -> None:
    """Called on all ranks: rank 1 refuses something that rank 0 accepts."""
    rendezvous._ROLL_CALL = 0.1
    keys = {"processes": None, "timeout_minutes": 1.0, "master_addr": None, "master_port": None}
    join("ddp", torch.device("cpu"), **keys)  # type: ignore[arg-type]
    if os.environ["DLOPT_RANK"] == "1":
        assert first_to_fail(*failure(UserError("data.file=t.csv: no such file")))
        os._exit(0)
    with pytest.raises(RuntimeError) as lost:
        distributed.barrier()
    assert failure(lost.value) == (2, "rank 1: data.file=t.csv: no such file")
    os._exit(0)


def test_the_others_report_why_a_rank_has_failed(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_rendezvous:post_a_failure", 2, tmp_path)
