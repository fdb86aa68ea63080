import pytest

from dlopt.errors import UserError
from dlopt.parallel.world import World, current, first_host, master

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "no-such-host-n[1-2]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}  # fmt: skip


def test_a_process_alone() -> None:
    assert current({}) is None
    assert current(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert current({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # a batch script, not one of srun's tasks


def test_launchers() -> None:
    assert current(TORCHRUN) == World("torchrun", 3, 4, 1, 2)
    assert current(SRUN) == World("srun", 2, 3, 0, 1)
    assert current(SRUN | TORCHRUN) == World("torchrun", 3, 4, 1, 2)  # torchrun inside srun
    own = {"DLOPT_RANK": "1", "DLOPT_PROCESSES": "2"}
    assert current(SRUN | own) == World("dlopt", 1, 2, 1, 2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5: there are only 2"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(broken: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        current(TORCHRUN | broken)


def test_restarts_are_counted() -> None:
    torchrun = current(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    srun = current(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert torchrun is not None and torchrun.restarts == 2
    assert srun is not None and srun.restarts == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2,5],m1", "n1"), ("gpu[007-010]", "gpu007"), ("a,b", "a"), ("r[1,3]-ib", "r1-ib")],
)
def test_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_where_a_slurm_step_meets() -> None:
    assert master(SRUN)[0] == "10.0.0.9"  # the first node's name does not resolve
    assert master(SRUN | {"SLURM_STEP_NODELIST": "localhost"})[0] == "localhost"
    assert master(SRUN | {"SLURM_STEP_NUM_NODES": "1"})[0] == "127.0.0.1"
    ports = {master(SRUN | other)[1] for other in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})}
    assert len(ports) == 3
