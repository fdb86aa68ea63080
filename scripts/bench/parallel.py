"""Compares parallel modes on this machine: four comparisons with `dlopt scaling`, and their conclusions.

    python scripts/bench/parallel.py [--json FILE] [--folder DIR] [--updates 20] [--only overlap,norm,columns,memory]

- overlap: DDP's all-reduce during the backward (small buckets) against after it (one bucket);
- norm: cost of synchronized BatchNorm;
- columns: bytes sent per rank and update of the two-column AlexNet, parallel=filter against parallel=columns;
- memory: a model that exceeds a memory limit in one process and trains when sharded over two.

Two processes on CPUs, one thread each, gloo. Takes about three minutes on two idle cores; plots are in --folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def overlap(rows: Rows) -> list[str]:
    _, overlapped, sequential = rows
    return [
        f"all-reduce during the backward: {1e3 * overlapped['step']:.1f} ms per update, "
        f"after it: {1e3 * sequential['step']:.1f} ms ({sequential['step'] / overlapped['step']:.2f}x)",
        f"waiting for communication: {overlapped['waiting']:.0%} and {sequential['waiting']:.0%} of the time",
    ]


def norm(rows: Rows) -> list[str]:
    _, local, synchronized = rows
    return [
        f"local statistics: {1e3 * local['step']:.1f} ms per update, {local['collectives']:g} collectives; "
        f"global statistics: {1e3 * synchronized['step']:.1f} ms ({synchronized['step'] / local['step']:.2f}x), "
        f"{synchronized['collectives']:g} collectives"
    ]


def columns(rows: Rows) -> list[str]:
    _, filters, columns = rows
    return [
        f"sent per rank and update: filters {filters['sent_mb']:.2f} MiB, columns {columns['sent_mb']:.2f} MiB: "
        f"{filters['sent_mb'] / columns['sent_mb']:.1f}x"
    ]


def memory(rows: Rows) -> list[str]:
    single, filters = rows
    sharded = f"{max(filters['peak_mb']):.0f} MiB per rank" if filters["peak_mb"] else filters["problem"]
    return [f"one process: {single['problem'] or 'fits (the limit is too high)'}; two, parallel=filter: {sharded}"]


COMPARISONS: dict[str, tuple[list[str], Callable[[Rows], list[str]]]] = {
    "overlap": (
        ["parallel=ddp", "parallel.bucket_cap_mb=4,1000", "model=alexnet", "data.batch_size=32"],
        overlap,
    ),
    "norm": (["parallel=ddp", "parallel.sync_batchnorm=false,true", "model=resnet20"], norm),
    "columns": (["parallel=filter,columns", "model=two_column_alexnet", "data.batch_size=32"], columns),
    "memory": (
        [
            "parallel=filter", "model=mlp", "model.widths=[8192,8192]", "model.norm=none", "memory_limit_mb=720",
            "updates=3", "warmup=1", "profiled=1",
        ],
        memory,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--only", default=",".join(COMPARISONS))
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="dlopt-parallel-"))
    results: dict[str, Rows] = {}
    for name in arguments.only.split(","):
        overrides, conclude = COMPARISONS[name]
        print(f"== {name}", flush=True)
        common = ["device=cpu", "threads=1", "processes=2", "data.workers=0", f"output={folder / name}"]
        updates = (
            [] if any(override.startswith("updates=") for override in overrides) else [f"updates={arguments.updates}"]
        )
        subprocess.run([sys.executable, "-m", "dlopt", "scaling", *overrides, *common, *updates], check=True)
        results[name] = json.loads((folder / name / "modes.json").read_text())
        for line in conclude(results[name]):
            print(f"-> {line}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
