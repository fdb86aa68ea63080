"""`dlopt scaling allreduce=[...]`: measures the bandwidth between processes, also on several nodes."""

from typing import Annotated, Literal

from dlopt.commands.shared.processes import run_rank
from dlopt.extend import DONE, Count, Line, NotEmpty, Positive, UserError
from dlopt.lab.scaling.modes_command import process_count
from dlopt.machine.world import current
from dlopt.parallel.processes import launch
from dlopt.tracking.terminal_text import plain_table, show_table


def time_all_reduce(
    line: Line,
    *,
    allreduce: Annotated[NotEmpty[Positive], "[X,...]: sizes in MiB"],
    processes: Annotated[Count | None, "N: processes on this machine (default: 2); srun and torchrun set it"] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], "NAME: cuda uses NCCL, cpu uses gloo"] = "auto",
) -> int:
    """Runs in the processes of a launcher, or starts `processes` that do."""
    line.refuse_rest("dlopt scaling allreduce=[...]", time_all_reduce)
    world = current()
    if world is None:
        count = process_count(f"processes={2 if processes is None else processes}")
        keys = [f"allreduce=[{','.join(map(str, allreduce))}]", f"device={device}"]
        return launch.group_code(*launch.run_processes(launch.python_module("dlopt", "scaling", *keys), count, {}))
    if processes not in (None, world.size):
        raise UserError(f"processes={processes}: {world.launcher} started {world.size} processes")

    def run() -> int:
        from dlopt.lab.scaling.communication import measure_all_reduce
        from dlopt.training.builders.workload import build_mode

        mode = build_mode(line.run_config(["parallel=ddp", f"device={device}", "threads=1"])[0])
        table = plain_table(right=["MiB", "ms", "GB/s", "bus GB/s"])
        for row in measure_all_reduce([round(size * 2**20) for size in allreduce], mode.device):
            rates = [f"{rate / 1e9:.3g}" for rate in (row.algorithm, row.bus)]
            table.add_row(f"{row.size / 2**20:.4g}", f"{row.seconds * 1e3:.3f}", *rates)
        if world.is_main:
            print(f"all-reduce on {mode.device.type}: {world.size} processes, {world.local_size} per node")
            show_table(table)
        return DONE

    run_rank(run)
