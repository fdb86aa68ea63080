"""Settings of `hydra/launcher=slurm`, and the type of the fixture `write_tool`, which writes Slurm's commands."""

from collections.abc import Callable
from typing import Any

WriteTool = Callable[[str, str], None]

SETTINGS: dict[str, Any] = {
    "n_jobs": 2, "chunk": None, "partition": None, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0,
    "cpus_per_task": 1, "mem_gb": None, "time": 30, "requeue": 3, "account": None, "extra": {},
    "stop_on_failure": False,
}  # fmt: skip
SUBMIT = ["train", "-m", "hydra/launcher=slurm", "hydra.launcher.n_jobs=0", "hydra.sweep.dir=sweep"]
"""Arguments of dlopt that write a sweep into its folder, and start no worker."""
SMALL = [
    "device=cpu", "threads=1", "tracking=[]", "model=mlp", "model.widths=[8]", "data.subset=100", "data.workers=0",
    "log_every_steps=null",
]  # fmt: skip
