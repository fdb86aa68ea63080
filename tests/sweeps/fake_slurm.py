"""Settings of `hydra/launcher=slurm`, and the type of the fixture `write_tool`, which writes Slurm's commands."""

from collections.abc import Callable

WriteTool = Callable[[str, str], None]

SETTINGS: dict[str, object] = {
    "n_jobs": 2, "partition": None, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1,
    "mem_gb": None, "time": 30, "requeue": 3, "account": None, "extra": {},
}  # fmt: skip
