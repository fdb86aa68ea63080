"""`python -m dlopt.analysis.bench.network FILE`: one rank's part in timing all-reduces; rank 0 writes FILE.

From Python `measured(processes)` gives the link that a ring over processes of this machine sees.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from dlopt.analysis.bench.costs import Link
from dlopt.parallel import launch
from dlopt.parallel import world as worlds
from dlopt.parallel.group import Group

SIZES = (64, 16 << 10, 256 << 10, 1 << 20, 4 << 20)  # bytes
_ROUNDS = 15


def measured(processes: int) -> Link:
    """Latency and bandwidth that fit the times of all-reduces best (relative errors, least squares)."""
    with tempfile.TemporaryDirectory(prefix="dlopt-bench-") as folder:
        path = Path(folder) / "times.json"
        codes, _, asked = launch.run_processes(
            [sys.executable, "-m", "dlopt.analysis.bench.network", str(path)], processes, {}
        )
        if asked:
            raise KeyboardInterrupt
        if any(codes):
            raise RuntimeError(f"the processes that time the network ended with {codes}")
        times = {int(size): seconds for size, seconds in json.loads(path.read_text()).items()}
    return fitted(times, processes)


def fitted(times: dict[int, float], processes: int) -> Link:
    """2 (p-1) alpha + 2 (p-1)/p n/beta = t for the alpha and beta, see `bench_costs.ring_all_reduce`."""
    sizes, seconds = np.array(list(times)), np.array(list(times.values()))
    terms = np.stack([np.full(len(sizes), 2.0 * (processes - 1)), 2 * (processes - 1) / processes * sizes], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(sizes)), rcond=None)
    return Link(max(float(latency), 1e-7), 1 / max(float(per_byte), 1e-13))


def main() -> None:
    launch.end_with_parent()
    world = worlds.current()
    assert world is not None
    torch.set_num_threads(1)
    Group(world, torch.device("cpu"), minutes=2.0)
    times = {}
    for size in SIZES:
        values, found = torch.zeros(size // 4), []
        for _ in range(_ROUNDS):
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(values)
            found.append(time.perf_counter() - start)
        times[size] = statistics.median(found[3:])
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(times))
    worlds.leave()
    worlds.end_process(0)


if __name__ == "__main__":
    main()
