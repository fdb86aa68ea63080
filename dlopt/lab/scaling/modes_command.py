"""`dlopt scaling parallel=...`: benchmarks parallel modes with several numbers of processes on this machine."""

import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from dlopt.basics.scratch import scratch
from dlopt.config.overrides import is_set
from dlopt.config.reads import LEARNING_RATE, RECIPE, UPDATE
from dlopt.extend import (
    DONE,
    Count,
    Line,
    Natural,
    Positive,
    UserError,
    group_of,
    key_of,
    output_folder,
    value_of,
    without,
)
from dlopt.lab.scaling.saving import Output, save
from dlopt.tracking.terminal_text import show_table

READS = (*UPDATE, *LEARNING_RATE, *RECIPE, "ema", "stopping", "check", "on_divergence")


@dataclass(frozen=True)
class _ModeRow:
    overrides: list[str]
    label: str
    processes: int
    baseline: int  # index of the row with the same config on one process


def time_modes(
    line: Line,
    *,
    updates: Annotated[Count, "N: timed updates"] = 20,
    warmup: Annotated[Natural, "N: warm-up updates"] = 3,
    profiled: Annotated[Count, "N: additional updates that profile communication"] = 5,
    memory_limit_mb: Annotated[
        Positive | None, "X: memory limit of each process, beyond that of an idle one (default: no limit)"
    ] = None,
    output: Output = None,
) -> int:
    from dlopt.lab.scaling import modes

    jobs = _rows(line)
    checked = [line.run_config(job.overrides) for job in jobs]
    folder = output_folder(output, "scaling")
    settings = {"updates": updates, "warmup": warmup, "profiled": profiled, "memory_limit_mb": memory_limit_mb}
    rows: list[modes.ModeResult] = []
    with scratch() as workdirs:
        for number, (job, (run_config, choices)) in enumerate(zip(jobs, checked, strict=True)):
            processes = f"{job.processes} process{'' if job.processes == 1 else 'es'}"
            print(f"{number + 1}/{len(jobs)}: {job.label}, {processes}", file=sys.stderr, flush=True)
            workdir, mode = workdirs / str(number), choices["parallel"]
            row = modes.measure(
                run_config.config, workdir, label=job.label, mode=mode, processes=job.processes, settings=settings
            )
            rows.append(modes.with_speedup(row, rows[job.baseline] if rows else row))
    modes.refuse_if_all_failed(rows)
    show_table(modes.table(rows))
    for problem in modes.failures(rows):
        print(problem)
    overrides = " ".join(without(line.overrides, "processes"))
    figure = modes.draw(rows, title=f"dlopt scaling {overrides}")
    save(figure, folder, "modes", [asdict(row) | {"spread": row.spread} for row in rows])
    return DONE


def _rows(line: Line) -> list[_ModeRow]:
    """Expands the command line to rows: a single-process baseline, then each mode with each number of processes."""
    from dlopt.machine.threads import usable_cores

    processes = [override for override in line.overrides if key_of(override) == "processes"] or ["processes=2"]
    overrides = without(line.overrides, "processes")
    if not is_set("parallel", overrides):
        overrides = ["parallel=ddp", *overrides]
    for override in overrides:
        if key_of(override) == "parallel.processes":
            raise UserError(f"{override}: use processes={value_of(override)} here, one or more values")
    combinations = replace(line, overrides=processes[-1:]).combinations()
    counts = [process_count(override) for combination in combinations for override in combination]
    # The same threads per process in all rows, few enough that the largest number of processes fits the cores.
    threads = max(usable_cores() // max(counts), 1)
    if not is_set("threads", overrides):
        overrides = [*overrides, f"threads={threads}"]
    rows: list[_ModeRow] = []
    for job in replace(line, overrides=overrides).jobs(("parallel",)):
        mode = next(override for override in job.overrides if key_of(override) == "parallel")
        mode_keys = [override for override in job.overrides if group_of(override) == "parallel" and override != mode]
        common = [override for override in job.overrides if override not in (mode, *mode_keys)]
        label = [override for override in common if override in job.varied]
        keys = [override.removeprefix("parallel.") for override in mode_keys if override in job.varied]
        for count in counts:
            single = ["parallel=single", *common]
            baseline = next((i for i, row in enumerate(rows) if row.overrides == single), len(rows))
            if baseline == len(rows):
                rows.append(_ModeRow(single, ", ".join(["single", *label]), 1, baseline))
            if count == 1:
                continue  # the baseline, for every mode
            if mode == "parallel=single":
                raise UserError(f"parallel=single processes={count}: this mode has only one process")
            name = ", ".join([value_of(mode), *keys, *label])
            row = _ModeRow([mode, *mode_keys, *common], name, count, baseline)
            if row not in rows:
                rows.append(row)
    return rows


def process_count(override: str) -> int:
    value = value_of(override)
    if not value.isdecimal() or len(value) > 9 or int(value) < 1:
        raise UserError(f"processes={value}: must be an integer >= 1, or several: processes=1,2")
    from dlopt.config.rules import PROCESSES_PER_CORE

    cores = os.cpu_count() or 1
    if int(value) > PROCESSES_PER_CORE * cores:
        raise UserError(f"processes={value}: this machine has {cores} cores; at most {PROCESSES_PER_CORE * cores}")
    return int(value)
