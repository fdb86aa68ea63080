"""`dlopt bench parallel=...`: modes of parallelism beside one process."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException

from dlopt.commands.bench_output import save
from dlopt.commands.line import output_folder, own_keys
from dlopt.config.compose import Composer, choices_of, to_plain
from dlopt.errors import UserError
from dlopt.ranges import Count, Natural, Positive
from dlopt.tracking.layout import standard_output

if TYPE_CHECKING:
    from dlopt.analysis.bench.modes import Row

USAGE = """\
dlopt bench parallel=a,b processes=1,2 [key=value]: measures parallel modes and draws what it finds

  dlopt bench parallel=ddp,filter processes=1,2
  dlopt bench parallel=ddp processes=2 parallel.bucket_cap_mb=0.25,1000 model=resnet56
  dlopt bench parallel=filter model=mlp model.widths=[8192,8192] model.norm=none memory_limit_mb=720
  dlopt bench device=[cpu,cuda]                      throughput of matrix products and convolutions against size
  dlopt bench simulate=true devices=[8,64,512,4096]  what a cluster would do, calculated

Any key of `dlopt train` may have several values, a row for each combination; the first row is one process. Per row:
time per update, samples per second, speed-up and efficiency against one process, peak memory of each rank beyond that
of a bare process, bytes that a rank sends, the share of the time in which a collective is under way (communicating) and
in which nothing else goes on (waiting), and how long the fastest and the slowest rank work by themselves.
On CPUs every process has the same number of threads, so that efficiency compares like with like.
  processes=N,M       numbers of processes on this machine (2)
  updates=N           timed updates (20)
  warmup=N            updates before (3)
  profiled=N          updates more whose bytes and waiting times are looked at (5)
  memory_limit_mb=X   memory that each process may take beyond a bare one (null: no limit)
  output=DIR          folder of the picture and the figures (outputs/bench/<date>_<time>)
"""


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command alone."""

    updates: Count = 20
    warmup: Natural = 3
    profiled: Count = 5
    memory_limit_mb: Positive | None = None
    output: str | None = None


@dataclass(frozen=True)
class _Job:
    """One row to measure."""

    overrides: list[str]
    label: str
    processes: int
    baseline: int  # position of the job that is one process of the same


def bench_modes(composer: Composer, overrides: Sequence[str]) -> int:
    from dlopt.analysis.bench import modes
    from dlopt.config.parsing import parse

    own, rest = own_keys(composer, overrides, _Own)
    jobs = _jobs(composer, rest)
    configs = []
    for job in jobs:
        plain, saved = to_plain(composer.compose(job.overrides), job.overrides)
        parse(plain, saved)
        configs.append((saved, choices_of(composer.compose(job.overrides))["parallel"]))
    folder = output_folder(own.output, "bench")
    plan = {name: value for name, value in asdict(own).items() if name != "output"}
    rows: list[Row] = []
    scratch = Path(tempfile.mkdtemp(prefix="dlopt-bench-"))
    try:
        for number, (job, (config, mode)) in enumerate(zip(jobs, configs, strict=True)):
            print(f"{number + 1} of {len(jobs)}: {job.label} on {job.processes}", file=sys.stderr, flush=True)
            place = scratch / str(number)
            row = modes.measure(config, place, label=job.label, mode=mode, processes=job.processes, plan=plan)
            rows.append(modes.against(row, rows[job.baseline] if rows else row))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    modes.refuse_if_all_failed(rows)
    standard_output().print(modes.table(rows))
    for line in modes.problems(rows):
        print(line)
    typed = " ".join(line for line in rest if not line.startswith("processes="))
    figure = modes.draw(rows, title=f"dlopt bench {typed}")
    save(figure, folder, "modes", [asdict(row) | {"spread": row.spread} for row in rows])
    return 0


def _jobs(composer: Composer, overrides: list[str]) -> list[_Job]:
    """The rows: one process of everything but the mode, then each mode with each number of processes."""
    if not any(line.startswith("parallel=") for line in overrides):
        overrides = ["parallel=ddp", *overrides]
    if not any(line.startswith("processes=") for line in overrides):
        overrides = [*overrides, "processes=2"]
    for line in overrides:
        if line.lstrip("+").startswith("parallel.processes="):
            raise UserError(f"{line}: here it is processes={line.partition('=')[2]}, of which there may be several")
    parsed = composer.parse(overrides)
    try:
        [combinations] = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise UserError(str(error)) from None
    varied = {str(each.get_key_element()) for each in parsed if each.is_sweep_override()}
    largest = max(_processes(lines) for lines in combinations)
    threads = [] if any(line.startswith("threads=") for line in overrides) else [f"threads={_threads(largest)}"]
    jobs: list[_Job] = []
    offered: dict[str, set[str]] = {}
    for lines in combinations:
        mode = next(line for line in lines if line.startswith("parallel="))
        if mode not in offered:
            offered[mode] = {str(key) for key in composer.compose([mode]).parallel}
    known = set[str]().union(*offered.values())
    for lines in combinations:
        processes = _processes(lines)
        mode = next(line for line in lines if line.startswith("parallel="))
        common = [line for line in lines if not line.startswith(("parallel", "processes="))] + threads
        label = [line for line in common if line.partition("=")[0] in varied]
        single = _Job(["parallel=single", *common], ", ".join(["single", *label]), 1, 0)
        places = [i for i, job in enumerate(jobs) if job.overrides == single.overrides]
        if not places:
            places = [len(jobs)]
            jobs.append(replace(single, baseline=len(jobs)))
        if processes == 1:
            continue  # whatever the mode, one process is one process
        if mode == "parallel=single":
            raise UserError(f"parallel=single processes={processes}: one process is all that this mode has")
        own = [line for line in lines if line.startswith("parallel.")]
        skipped = [line for line in own if line[9:].partition("=")[0] in known - offered[mode]]
        own = [line for line in own if line not in skipped]
        keys = [line.removeprefix("parallel.") for line in own if line.partition("=")[0] in varied]
        job = _Job(
            [mode, *own, *common], ", ".join([mode.removeprefix("parallel="), *keys, *label]), processes, places[0]
        )
        if job not in jobs:
            jobs.append(job)
    return jobs


def _processes(lines: Sequence[str]) -> int:
    text = next(line for line in lines if line.startswith("processes=")).partition("=")[2]
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"processes={text}: input should be a whole number from 1; several are written processes=1,2")
    return int(text)


def _threads(processes: int) -> int:
    """Threads of every process, so that the largest number of processes fits the cores."""
    return max(len(os.sched_getaffinity(0)) // processes, 1)
