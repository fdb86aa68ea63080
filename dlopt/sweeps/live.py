"""The processes that share a search: each holds a lock, which the kernel releases when the process ends."""

import os
import socket
import uuid
from pathlib import Path

from dlopt.basics.locks import is_held
from dlopt.sweeps.array import WORKERS


def name_worker() -> str:
    """Returns a name for this process that is unique among the processes of a search."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def live_workers(sweep: Path) -> list[str]:
    """Returns the names of the processes that work on the search."""
    locks = sorted((sweep / WORKERS).glob("*-*.lock"))
    return [path.stem for path in locks if is_held(path)]
