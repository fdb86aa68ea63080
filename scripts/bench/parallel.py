"""What modes of parallelism cost on this machine: four comparisons, each a `dlopt bench`, with what to read off.

    python scripts/bench/parallel.py [--json FILE] [--folder DIR] [--updates 20] [--only overlap,norm,columns,memory]

- overlap: DDP's averaging of gradients beside the backward (small buckets) against all of it behind (one bucket);
- norm: what synchronized batch norm costs;
- columns: bytes that a rank sends in an update of the two-column AlexNet, filters against columns;
- memory: a model that exceeds a cap in one process and trains when two share it.

Two processes on CPUs, one thread each, gloo. Some three minutes on two quiet cores; pictures stay in --folder.
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
    _, beside, behind = rows
    return [
        f"beside the backward {1e3 * beside['step']:.1f} ms, behind it {1e3 * behind['step']:.1f} ms per update: "
        f"{behind['step'] / beside['step']:.2f} x",
        f"time in which nothing but communication goes on: {beside['waiting']:.0%} and {behind['waiting']:.0%}",
    ]


def norm(rows: Rows) -> list[str]:
    _, own, synchronized = rows
    return [
        f"{1e3 * own['step']:.1f} ms per update with each rank's statistics, {1e3 * synchronized['step']:.1f} ms with "
        f"those of the whole batch: {synchronized['step'] / own['step']:.2f} x, {synchronized['collectives']:g} "
        f"collectives instead of {own['collectives']:g}"
    ]


def columns(rows: Rows) -> list[str]:
    _, filters, columns = rows
    return [
        f"sent per rank and update: filters {filters['sent_mb']:.2f} MiB, columns {columns['sent_mb']:.2f} MiB: "
        f"{filters['sent_mb'] / columns['sent_mb']:.1f} x"
    ]


def memory(rows: Rows) -> list[str]:
    single, filters = rows
    fits = f"trains in two with {max(filters['peak_mb']):.0f} MiB each" if filters["peak_mb"] else filters["problem"]
    return [f"one process: {single['problem'] or 'trains (the cap is too high)'}; filter: {fits}"]


PARTS: dict[str, tuple[list[str], Callable[[Rows], list[str]]]] = {
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
    parser.add_argument("--only", default=",".join(PARTS))
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="dlopt-parallel-"))
    found: dict[str, Rows] = {}
    for name in asked.only.split(","):
        overrides, told = PARTS[name]
        print(f"== {name}", flush=True)
        common = ["device=cpu", "threads=1", "processes=2", "data.workers=0", f"output={folder / name}"]
        updates = [] if any(each.startswith("updates=") for each in overrides) else [f"updates={asked.updates}"]
        subprocess.run([sys.executable, "-m", "dlopt", "bench", *overrides, *common, *updates], check=True)
        found[name] = json.loads((folder / name / "modes.json").read_text())
        for line in told(found[name]):
            print(f"-> {line}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
