"""`dlopt bench`: how fast parallel modes are and what they need; how fast a device is; what a cluster would do."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.commands.command import Line, on_experiment, output_folder, refuse_empty, writing
from dlopt.errors import DONE, UserError
from dlopt.files import write_atomically
from dlopt.plain import without_nan
from dlopt.ranges import Count, Natural, Positive
from dlopt.tracking.layout import Fitted, plain_table, standard_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlopt.analysis.bench.modes import Row
    from dlopt.analysis.bench.simulation import Cluster, Estimate
    from dlopt.analysis.model_summary import Layer

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

Keys of dlopt bench device=[...]:
  precision=[fp32]    of fp32, bf16, fp16, fp64
  sizes=[64,...]      rows of the square matrices
  channels=[16,...]   of the convolutions
  threads=auto        of a CPU
  seconds=0.5         for each point

Keys of dlopt bench simulate=true (no other keys are taken):
  devices=[8,64,512,4096]   numbers of devices
  models=[wrn_28_10,resnet50,resnet101]
  batch=64                  samples per device, in all modes
  layers=counted            counted: operations and bytes; measured: on this machine's device, one by one
  validate=[]               numbers of processes here: measured and calculated times per update stand side by side
The cluster: per_server=8, tflops=300 and memory_bandwidth=3000 (GB/s) that a device reaches, memory=80 (GB),
  bandwidth_within=300 (GB/s between devices of a server), latency_within=5 (microseconds), bandwidth_between=50 (GB/s
  of a server), latency_between=10, variation=0.02 (standard deviation over mean of a device's time per update),
  value_bytes=2 (of an activation), micro_batches=32 (of the pipeline), bucket_mb=25
"""


@on_experiment(USAGE, several="several values need no flag here: parallel=ddp,filter")
def bench(line: Line) -> int:
    """Measures, prints and draws. Raises `UserError`."""
    keys = {each.partition("=")[0]: each.partition("=")[2] for each in line.overrides}
    if "simulate" in keys:
        return line.call(_simulate)
    return line.call(_bench_devices if keys.get("device", "").startswith("[") else _bench_modes)


def _save(figure: "Figure", folder: Path, name: str, records: Any) -> None:
    """Writes the picture and what it shows, and prints where they are."""
    from dlopt.analysis import drawing

    path = folder / f"{name}.json"
    with writing(folder):
        write_atomically(path, (json.dumps(without_nan(records), indent=1) + "\n").encode())
        written = [*drawing.save(figure, folder, name), path]
    print(*written, sep="\n")


# -- parallel modes


@dataclass(frozen=True)
class _Row:
    """One row to measure."""

    overrides: list[str]
    label: str
    processes: int
    baseline: int  # position of the row that is one process of the same


def _bench_modes(
    line: Line,
    *,
    updates: Count = 20,
    warmup: Natural = 3,
    profiled: Count = 5,
    memory_limit_mb: Positive | None = None,
    output: str | None = None,
) -> int:
    from dlopt.analysis.bench import modes

    jobs = _rows(line)
    checked = [line.experiment(job.overrides) for job in jobs]
    folder = output_folder(output, "bench")
    plan = {"updates": updates, "warmup": warmup, "profiled": profiled, "memory_limit_mb": memory_limit_mb}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="dlopt-bench-", ignore_cleanup_errors=True) as scratch:
        for number, (job, (experiment, choices)) in enumerate(zip(jobs, checked, strict=True)):
            print(f"{number + 1} of {len(jobs)}: {job.label} on {job.processes}", file=sys.stderr, flush=True)
            place, mode = Path(scratch) / str(number), choices["parallel"]
            row = modes.measure(
                experiment.config, place, label=job.label, mode=mode, processes=job.processes, plan=plan
            )
            rows.append(modes.against(row, rows[job.baseline] if rows else row))
    modes.refuse_if_all_failed(rows)
    standard_output().print(modes.table(rows))
    for problem in modes.problems(rows):
        print(problem)
    typed = " ".join(each for each in line.overrides if not each.startswith("processes="))
    figure = modes.draw(rows, title=f"dlopt bench {typed}")
    _save(figure, folder, "modes", [asdict(row) | {"spread": row.spread} for row in rows])
    return DONE


def _rows(line: Line) -> list[_Row]:
    """The rows: one process of everything but the mode, then each mode with each number of processes."""
    typed = [each for each in line.overrides if each.startswith("processes=")] or ["processes=2"]
    overrides = [each for each in line.overrides if not each.startswith("processes=")]
    if not any(each.startswith("parallel=") for each in overrides):
        overrides = ["parallel=ddp", *overrides]
    for each in overrides:
        if each.lstrip("+").startswith("parallel.processes="):
            raise UserError(f"{each}: here it is processes={each.partition('=')[2]}, of which there may be several")
    counts = [_count(each) for lines in replace(line, overrides=typed[-1:]).combinations() for each in lines]
    threads = max(len(os.sched_getaffinity(0)) // max(counts), 1)  # so that the largest number fits the cores
    if not any(each.startswith("threads=") for each in overrides):
        overrides = [*overrides, f"threads={threads}"]
    rows: list[_Row] = []
    for job in replace(line, overrides=overrides).jobs(("parallel",)):
        mode = next(each for each in job.overrides if each.startswith("parallel="))
        own = [each for each in job.overrides if each.startswith("parallel.")]
        common = [each for each in job.overrides if each not in (mode, *own)]
        label = [each for each in common if each in job.varied]
        keys = [each.removeprefix("parallel.") for each in own if each in job.varied]
        for count in counts:
            single = ["parallel=single", *common]
            baseline = next((i for i, row in enumerate(rows) if row.overrides == single), len(rows))
            if baseline == len(rows):
                rows.append(_Row(single, ", ".join(["single", *label]), 1, baseline))
            if count == 1:
                continue  # whatever the mode, one process is one process
            if mode == "parallel=single":
                raise UserError(f"parallel=single processes={count}: one process is all that this mode has")
            name = ", ".join([mode.removeprefix("parallel="), *keys, *label])
            row = _Row([mode, *own, *common], name, count, baseline)
            if row not in rows:
                rows.append(row)
    return rows


def _count(override: str) -> int:
    text = override.partition("=")[2]
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"processes={text}: input should be a whole number from 1; several are written processes=1,2")
    return int(text)


# -- devices


_PRECISIONS: list[Literal["fp32", "bf16", "fp16", "fp64"]] = ["fp32", "bf16"]
_SIZES = [64, 128, 256, 512, 1024, 2048]
_CHANNELS = [8, 16, 32, 64, 128, 256]


def _bench_devices(
    line: Line,
    *,
    device: list[Literal["cpu", "cuda"]],
    precision: list[Literal["fp32", "bf16", "fp16", "fp64"]] = _PRECISIONS,
    sizes: list[Count] = _SIZES,
    channels: list[Count] = _CHANNELS,
    threads: Count | Literal["auto"] = "auto",
    seconds: Positive = 0.5,
    output: str | None = None,
) -> int:
    line.refuse_rest("dlopt bench device=[...]", _bench_devices)
    refuse_empty(device=device, precision=precision, sizes=sizes, channels=channels)
    import torch

    from dlopt.analysis.bench import device as measuring
    from dlopt.processor import set_threads

    set_threads(threads)
    words = {"sizes": sorted(set(sizes)), "channels": sorted(set(channels))}
    points = []
    for name in dict.fromkeys(device):
        if name == "cuda" and not torch.cuda.is_available():
            print("cuda: there is no CUDA device here, left out")
            continue
        for each in dict.fromkeys(precision):
            for point in measuring.throughput(torch.device(name), each, seconds=seconds, **words):
                print(f"{name}  {each}  {point.kind:14}  {point.size:6}  {point.flops / 1e9:10.1f} GFLOP/s")
                points.append(point)
    if not points:
        return DONE
    about = [f"cpu: {torch.get_num_threads()} threads"] if "cpu" in device else []
    about += [torch.cuda.get_device_name(0)] if any(p.device == "cuda" for p in points) else []
    figure = measuring.draw(points, "Throughput against size (" + ", ".join(about) + ")")
    _save(figure, output_folder(output, "bench"), "throughput", [asdict(p) for p in points])
    return DONE


# -- a simulated cluster

Model = Literal["wrn_28_10", "resnet50", "resnet101"]
MODELS: dict[Model, tuple[list[str], tuple[int, int, int], int]] = {
    "wrn_28_10": (["model=wrn_28_10"], (3, 32, 32), 10),
    "resnet50": (["model=resnet50", "model.stem=imagenet"], (3, 224, 224), 1000),
    "resnet101": (["model=resnet101", "model.stem=imagenet"], (3, 224, 224), 1000),
}
_CLUSTER: dict[str, Any] = {
    "per_server": 8, "tflops": 300.0, "memory_bandwidth": 3000.0, "memory": 80.0, "bandwidth_within": 300.0,
    "latency_within": 5.0, "bandwidth_between": 50.0, "latency_between": 10.0, "variation": 0.02, "value_bytes": 2,
    "micro_batches": 32, "bucket_mb": 25.0,
}  # fmt: skip
_MODELS = list(MODELS)
_DEVICES = [8, 64, 512, 4096]


def _simulate(
    line: Line,
    *,
    simulate: Literal[True],
    devices: list[Count] = _DEVICES,
    models: list[Model] = _MODELS,
    batch: Count = 64,
    layers: Literal["counted", "measured"] = "counted",
    validate: list[Count] | None = None,
    output: str | None = None,
) -> int:
    """Prints and draws. Raises `UserError`."""
    from dlopt.analysis.bench import simulation

    own, rest = line.take(simulation.Cluster, **_CLUSTER)
    cluster = simulation.Cluster(**own)
    rest.refuse_rest("dlopt bench simulate=true", _simulate, simulation.Cluster)
    refuse_empty(devices=devices, models=models)
    found: dict[str, list[Estimate]] = {}
    for name in dict.fromkeys(models):
        costs = _layers(line, name, batch, is_measured=layers == "measured")
        found[name] = []
        for count in sorted(set(devices)):
            found[name] += simulation.estimates(costs, batch, count, cluster)
        standard_output().print(_table(f"{name}: {simulation.size(costs)}", found[name]))
    points = _validate(validate) if validate else []
    folder = output_folder(output, "bench")
    title = f"Expected efficiency against one device, {batch} samples per device, layer times {layers}"
    figure = simulation.draw(found, cluster, title=title, subtitle=_described(cluster))
    records = {
        "cluster": asdict(cluster),
        "estimates": {name: [asdict(each) for each in every] for name, every in found.items()},
        "validation": points,
    }
    _save(figure, folder, "cluster", records)
    return DONE


def _table(title: str, found: Sequence["Estimate"]) -> Fitted:
    table = plain_table(title)
    for name in ("mode", "devices", "ms/step", "computing", "efficiency", "GB/device"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for each in found:
        memory = f"{each.memory / 1e9:.1f}{'' if each.fits else ', too large'}"
        share = f"{each.compute / each.step:.0%}"
        table.add_row(each.mode, str(each.devices), f"{each.step * 1e3:.2f}", share, f"{each.efficiency:.1%}", memory)
    return Fitted(table)


def _described(cluster: "Cluster") -> str:
    return (
        f"{cluster.per_server} devices a server, {cluster.tflops:g} TFLOP/s, {cluster.memory:g} GB; within "
        f"{cluster.bandwidth_within:g} GB/s, {cluster.latency_within:g} µs; between servers "
        f"{cluster.bandwidth_between:g} GB/s, {cluster.latency_between:g} µs; "
        f"step times vary by {cluster.variation:.0%}"
    )


def _layers(line: Line, name: Model, batch: int, *, is_measured: bool) -> "list[Layer]":
    """Layers of one model, with the seconds of `batch` samples where they are measured."""
    import torch

    from dlopt.analysis import model_summary
    from dlopt.processor import choose_device

    overrides, shape, classes = MODELS[name]
    experiment, _ = line.experiment(overrides)

    def make() -> Any:
        return experiment.model.build(input_shape=shape, classes=classes)

    if not is_measured:
        return model_summary.layers_of(make, shape)
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    few = batch if device.type == "cuda" else 2  # a CPU takes its time: two samples stand for the others
    module = make().to(device=device, dtype=dtype, memory_format=torch.channels_last)
    inputs = torch.randn(few, *shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    scale = batch / few
    return [
        replace(each, forward=each.forward * scale, backward=each.backward * scale)
        for each in model_summary.timed(module, inputs)
    ]


def _validate(counts: list[int]) -> list[dict[str, Any]]:
    from dlopt.analysis.bench.modes import BATCH, validate

    if max(counts) > BATCH:
        raise UserError(f"validate=[{max(counts)}]: a batch of {BATCH} is shared out; allowed: numbers up to {BATCH}")
    table = plain_table(
        "ms per update of a ResNet-20 on digits: calculated from what updates, layers and all-reduces take"
    )
    for name in ("mode", "processes", "calculated", "measured", "ratio"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    points = validate(sorted(set(counts)))
    for each in points:
        seconds = (each.calculated, each.measured)
        ratio = f"{each.calculated / each.measured:.2f}"
        table.add_row(each.mode, str(each.processes), *(f"{one * 1e3:.1f}" for one in seconds), ratio)
    standard_output().print(Fitted(table))
    return [asdict(each) for each in points]
