"""`dlopt bench`: benchmarks parallel modes, the network and devices, and simulates a cluster."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table

from dlopt.command_line.line import Line, on_experiment, output_folder, refuse_empty, writing
from dlopt.command_line.processes import run_rank
from dlopt.command_line.reads import LEARNING_RATE, RECIPE, UPDATE
from dlopt.config.overrides import group_of, is_typed, key_of, value_of, without
from dlopt.errors import DONE, UserError
from dlopt.files import write_json
from dlopt.lab.bench.cluster import Cluster
from dlopt.parallel import launch
from dlopt.parallel.rendezvous import current
from dlopt.plain import without_nan
from dlopt.ranges import Count, Natural, Positive
from dlopt.results import drawing
from dlopt.tracking.layout import plain_table, show_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlopt.lab.bench.layers import Layer
    from dlopt.lab.bench.simulation import ModeEstimate

_READS = (*UPDATE, *LEARNING_RATE, *RECIPE, "ema", "stopping", "check", "on_divergence")  # of parallel modes
USAGE = """\
Benchmark parallel modes, the network or devices, or simulate a cluster

Usage:
  dlopt bench parallel=a,b processes=1,2 [key=value]   parallel modes on this machine
  dlopt bench allreduce=[1,256] [key=value]            bandwidth between processes, also on several nodes
  dlopt bench device=[cpu,cuda] [key=value]            throughput of matrix products and convolutions vs. size
  dlopt bench simulate=true [key=value]                estimated efficiency on a cluster

Examples:
  dlopt bench parallel=ddp,filter processes=1,2
  dlopt bench parallel=ddp processes=2 parallel.bucket_cap_mb=0.25,1000 model=resnet56
  dlopt bench parallel=filter model=mlp model.widths=[8192,8192] model.norm=none memory_limit_mb=720
  dlopt bench simulate=true devices=[8,64,512,4096]
  srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 dlopt bench allreduce=[1,16,256,1024]

Parallel modes:
  Each combination of values is one row; the first row is one process. A row shows the time per update, samples/s,
  speed-up and efficiency relative to one process, peak memory per rank (beyond that of an idle process), bytes sent per
  rank, the fractions of the time spent in collectives (communicating) and blocked by them (waiting), and the compute
  time of the fastest and the slowest rank. On CPUs all processes use the same number of threads.

  processes=N,M :: numbers of processes on this machine (default: 2)
  {_bench_modes}
and these keys of `dlopt train`:
    {_READS}

Bandwidth (allreduce=[...]):
  Times all-reduces of the given sizes in MiB, as DDP does with gradients. Starts its processes, or runs in those of
  srun or torchrun. bus GB/s: what each rank sends per second, comparable to the speed of a link.

  {_bench_allreduce}

Devices (device=[...]):
  {_bench_devices}

Simulated cluster (simulate=true):
  {_simulate}
  {Cluster}
"""

_Output = Annotated[str | None, "DIR: folder of the plot and the results (default: outputs/bench/DATE_TIME)"]


@on_experiment("bench", None, several="not needed here; list the values: parallel=ddp,filter")
def bench(line: Line) -> int:
    """Runs one of the benchmarks. Raises `UserError`."""
    keys = {key_of(override): value_of(override) for override in line.overrides}
    if "simulate" in keys:
        return line.call(_simulate)
    if "allreduce" in keys:
        return line.call(_bench_allreduce)
    if keys.get("device", "").startswith("["):
        return line.call(_bench_devices)
    return line.call(_bench_modes, "dlopt bench", _READS)


def _save(figure: "Figure", folder: Path, name: str, records: Any) -> None:
    path = folder / f"{name}.json"
    with writing(folder):
        write_json(path, without_nan(records), indent=1)
        written = [*drawing.save(figure, folder, name), path]
    print(*written, sep="\n")


# -- parallel modes


@dataclass(frozen=True)
class _ModeRow:
    overrides: list[str]
    label: str
    processes: int
    baseline: int  # index of the row with the same config on one process


def _bench_modes(
    line: Line,
    *,
    updates: Annotated[Count, "N: timed updates"] = 20,
    warmup: Annotated[Natural, "N: warm-up updates"] = 3,
    profiled: Annotated[Count, "N: additional updates that profile communication"] = 5,
    memory_limit_mb: Annotated[
        Positive | None, "X: memory limit of each process, beyond that of an idle one (default: no limit)"
    ] = None,
    output: _Output = None,
) -> int:
    from dlopt.lab.bench import modes

    jobs = _rows(line)
    checked = [line.experiment(job.overrides) for job in jobs]
    folder = output_folder(output, "bench")
    settings = {"updates": updates, "warmup": warmup, "profiled": profiled, "memory_limit_mb": memory_limit_mb}
    rows: list[modes.ModeResult] = []
    with tempfile.TemporaryDirectory(prefix="dlopt-bench-", ignore_cleanup_errors=True) as scratch:
        for number, (job, (experiment, choices)) in enumerate(zip(jobs, checked, strict=True)):
            processes = f"{job.processes} process{'' if job.processes == 1 else 'es'}"
            print(f"{number + 1}/{len(jobs)}: {job.label}, {processes}", file=sys.stderr, flush=True)
            workdir, mode = Path(scratch) / str(number), choices["parallel"]
            row = modes.measure(
                experiment.config, workdir, label=job.label, mode=mode, processes=job.processes, settings=settings
            )
            rows.append(modes.with_speedup(row, rows[job.baseline] if rows else row))
    modes.refuse_if_all_failed(rows)
    show_table(modes.table(rows))
    for problem in modes.failures(rows):
        print(problem)
    overrides = " ".join(without(line.overrides, "processes"))
    figure = modes.draw(rows, title=f"dlopt bench {overrides}")
    _save(figure, folder, "modes", [asdict(row) | {"spread": row.spread} for row in rows])
    return DONE


def _rows(line: Line) -> list[_ModeRow]:
    """Expands the command line to rows: a single-process baseline, then each mode with each number of processes."""
    from dlopt.processor import usable_cores

    processes = [override for override in line.overrides if key_of(override) == "processes"] or ["processes=2"]
    overrides = without(line.overrides, "processes")
    if not is_typed("parallel", overrides):
        overrides = ["parallel=ddp", *overrides]
    for override in overrides:
        if key_of(override) == "parallel.processes":
            raise UserError(f"{override}: use processes={value_of(override)} here, one or more values")
    combinations = replace(line, overrides=processes[-1:]).combinations()
    counts = [_count(override) for combination in combinations for override in combination]
    # The same threads per process in all rows, few enough that the largest number of processes fits the cores.
    threads = max(usable_cores() // max(counts), 1)
    if not is_typed("threads", overrides):
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


def _count(override: str) -> int:
    value = value_of(override)
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"processes={value}: must be an integer >= 1, or several: processes=1,2")
    from dlopt.config.rules import PROCESSES_PER_CORE

    cores = os.cpu_count() or 1
    if int(value) > PROCESSES_PER_CORE * cores:
        raise UserError(f"processes={value}: this machine has {cores} cores; at most {PROCESSES_PER_CORE * cores}")
    return int(value)


# -- bandwidth between processes


def _bench_allreduce(
    line: Line,
    *,
    allreduce: Annotated[list[Positive], "[X,...]: sizes in MiB"],
    processes: Annotated[Count | None, "N: processes on this machine (default: 2); srun and torchrun set it"] = None,
    repeats: Annotated[Count, "N: timed all-reduces per size; the result is the median"] = 20,
    device: Annotated[Literal["auto", "cpu", "cuda"], "NAME: cuda uses NCCL, cpu uses gloo"] = "auto",
    timeout_minutes: Annotated[Positive, "X: how long processes wait for each other"] = 10.0,
) -> int:
    """Runs in the processes of a launcher, or starts `processes` that do."""
    line.refuse_rest("dlopt bench allreduce=[...]", _bench_allreduce)
    refuse_empty(allreduce=allreduce)
    world = current()
    if world is None:
        count = _count(f"processes={2 if processes is None else processes}")
        sizes = ",".join(map(str, allreduce))
        keys = [f"allreduce=[{sizes}]", f"repeats={repeats}", f"device={device}", f"timeout_minutes={timeout_minutes}"]
        return launch.group_code(*launch.run_processes(launch.python_module("dlopt", "bench", *keys), count, {}))
    if processes not in (None, world.size):
        raise UserError(f"processes={processes}: {world.launcher} started {world.size} processes")

    def run() -> int:
        from dlopt.lab.bench.communication import measure_all_reduce
        from dlopt.training.build import build_mode

        keys = ["parallel=ddp", f"parallel.timeout_minutes={timeout_minutes}", f"device={device}", "threads=1"]
        mode = build_mode(line.experiment(keys)[0])
        table = plain_table(right=["MiB", "ms", "GB/s", "bus GB/s"])
        for row in measure_all_reduce([round(size * 2**20) for size in allreduce], repeats, mode.device):
            rates = [f"{rate / 1e9:.3g}" for rate in (row.algorithm, row.bus)]
            table.add_row(f"{row.size / 2**20:.4g}", f"{row.seconds * 1e3:.3f}", *rates)
        if world.is_main:
            print(f"all-reduce on {mode.device.type}: {world.size} processes, {world.local_size} per node")
            show_table(table)
        return DONE

    run_rank(run)


# -- devices


_PRECISIONS: list[Literal["fp32", "bf16", "fp16", "fp64"]] = ["fp32", "bf16"]
_SIZES = [64, 128, 256, 512, 1024, 2048]
_CHANNELS = [8, 16, 32, 64, 128, 256]


def _bench_devices(
    line: Line,
    *,
    device: Annotated[list[Literal["cpu", "cuda"]], "[NAME,...]: cpu and cuda"],
    precision: Annotated[
        list[Literal["fp32", "bf16", "fp16", "fp64"]], "[NAME,...]: any of fp32, bf16, fp16, fp64"
    ] = _PRECISIONS,
    sizes: Annotated[list[Count], "[N,...]: rows of the square matrices"] = _SIZES,
    channels: Annotated[list[Count], "[N,...]: channels of the convolutions"] = _CHANNELS,
    threads: Annotated[Count | Literal["auto"], "N: CPU threads"] = "auto",
    seconds: Annotated[Positive, "X: time per measurement"] = 0.5,
    output: _Output = None,
) -> int:
    line.refuse_rest("dlopt bench device=[...]", _bench_devices)
    refuse_empty(device=device, precision=precision, sizes=sizes, channels=channels)
    import torch

    from dlopt.lab.bench import device as device_bench
    from dlopt.processor import set_threads

    set_threads(threads)
    grid = {"sizes": sorted(set(sizes)), "channels": sorted(set(channels))}
    points = []
    for name in dict.fromkeys(device):
        if name == "cuda" and not torch.cuda.is_available():
            print("cuda: no CUDA device available, skipped")
            continue
        for dtype in dict.fromkeys(precision):
            for point in device_bench.throughput(torch.device(name), dtype, seconds=seconds, **grid):
                print(f"{name}  {dtype}  {point.kind:14}  {point.size:6}  {point.flops / 1e9:10.1f} GFLOP/s")
                points.append(point)
    if not points:
        return DONE
    devices = [f"cpu: {torch.get_num_threads()} threads"] if "cpu" in device else []
    devices += [torch.cuda.get_device_name(0)] if any(p.device == "cuda" for p in points) else []
    figure = device_bench.draw(points, "Throughput vs. size (" + ", ".join(devices) + ")")
    _save(figure, output_folder(output, "bench"), "throughput", [asdict(p) for p in points])
    return DONE


# -- a simulated cluster

Model = Literal["wrn_28_10", "resnet50", "resnet101"]
Training = Literal["alexnet_imagenet", "imagenet_90", "resnet_imagenet", "wrn_cifar"]
_IMAGENET, _CIFAR = 1_281_167, 50_000  # training images
_TRAININGS: dict[Training, tuple[int, str]] = {  # name -> samples of the whole training, description
    "alexnet_imagenet": (90 * 1_200_000, "90 epochs of 1.2 million images (Krizhevsky et al. 2012, section 5)"),
    "imagenet_90": (90 * _IMAGENET, "90 epochs of ImageNet (Goyal et al. 2017, section 5.1)"),
    "resnet_imagenet": (600_000 * 256, "600,000 updates of 256 images (He et al. 2016, section 3.4)"),
    "wrn_cifar": (200 * _CIFAR, "200 epochs of CIFAR (Zagoruyko & Komodakis 2016, section 3)"),
}
MODELS: dict[Model, tuple[list[str], tuple[int, int, int], int, Training]] = {  # the training is the paper's
    "wrn_28_10": (["model=wrn_28_10"], (3, 32, 32), 10, "wrn_cifar"),
    "resnet50": (["model=resnet50", "model.stem=imagenet"], (3, 224, 224), 1000, "resnet_imagenet"),
    "resnet101": (["model=resnet101", "model.stem=imagenet"], (3, 224, 224), 1000, "resnet_imagenet"),
}
_MODELS = list(MODELS)
_DEVICES = [8, 64, 512, 4096]


def _simulate(
    line: Line,
    *,
    simulate: Annotated[Literal[True], "true: simulate instead of measuring"],
    devices: Annotated[list[Count], "[N,...]: numbers of devices"] = _DEVICES,
    models: Annotated[list[Model], "[NAME,...]: models"] = _MODELS,
    batch: Annotated[Count, "N: samples per device, in all modes"] = 64,
    training: Annotated[
        Training | Literal["paper"],
        'NAME: schedule for the column "days": that of the model\'s paper, or one of alexnet_imagenet, imagenet_90, '
        "resnet_imagenet, wrn_cifar",
    ] = "paper",
    layers: Annotated[
        Literal["counted", "measured"],
        "NAME: layer times: counted (from FLOPs and bytes) or measured (on this machine's device)",
    ] = "counted",
    validate: Annotated[
        list[Count] | None,
        "[N,...]: numbers of processes on this machine for which to compare estimated and measured times",
    ] = None,
    output: _Output = None,
) -> int:
    from dlopt.lab.bench import simulation

    arguments, rest = line.take(Cluster)
    cluster = Cluster(**arguments)
    rest.refuse_rest("dlopt bench simulate=true", _simulate, Cluster)
    refuse_empty(devices=devices, models=models)
    estimates: dict[str, list[ModeEstimate]] = {}
    for name in dict.fromkeys(models):
        costs = _layers(line, name, batch, is_measured=layers == "measured")
        estimates[name] = []
        for count in sorted(set(devices)):
            estimates[name] += simulation.estimates(costs, batch, count, cluster)
        samples, described = _TRAININGS[MODELS[name][-1] if training == "paper" else training]
        title = f"{name}: {simulation.size(costs)}\ndays: {described}"
        show_table(_table(title, estimates[name], samples / batch))
    points = _validate(validate) if validate else []
    folder = output_folder(output, "bench")
    title = f"Estimated efficiency relative to one device, {batch} samples per device, layer times {layers}"
    figure = simulation.draw(estimates, cluster, title=title, subtitle=_describe(cluster))
    records = {
        "cluster": asdict(cluster),
        "estimates": {name: [asdict(each) for each in every] for name, every in estimates.items()},
        "validation": points,
    }
    _save(figure, folder, "cluster", records)
    return DONE


def _table(title: str, estimates: Sequence["ModeEstimate"], updates: float) -> Table:
    """Builds the table of a model; `updates`: those of the whole training on one device."""
    columns = ["devices", "ms/step", "compute", "efficiency", "GB/device", "days"]
    table = plain_table(title, left=["mode"], right=columns)
    for row in estimates:
        memory = f"{row.memory / 1e9:.1f}{'' if row.fits else ', OOM'}"
        compute = f"{row.compute / row.step:.0%}"
        times = f"{row.step * 1e3:.2f}", f"{row.step * updates / row.devices / 86400:.3g}"
        table.add_row(row.mode, str(row.devices), times[0], compute, f"{row.efficiency:.1%}", memory, times[1])
    return table


def _describe(cluster: Cluster) -> str:
    return (
        f"{cluster.per_server} devices per server, {cluster.tflops:g} TFLOP/s, {cluster.memory:g} GB; within a server "
        f"{cluster.bandwidth_within:g} GB/s, {cluster.latency_within:g} µs; between servers "
        f"{cluster.bandwidth_between:g} GB/s, {cluster.latency_between:g} µs; "
        f"step time variation {cluster.variation:.0%}"
    )


def _layers(line: Line, name: Model, batch: int, *, is_measured: bool) -> "list[Layer]":
    """Returns the layers of a model; measured ones with their seconds per sample of a batch."""
    import torch

    from dlopt.lab.bench.layers import layers_of, timed
    from dlopt.lab.bench.simulation import per_sample
    from dlopt.processor import choose_device

    overrides, shape, classes, _ = MODELS[name]
    experiment, _ = line.experiment(overrides)

    def make() -> Any:
        return experiment.model.build(input_shape=shape, classes=classes)

    if not is_measured:
        return layers_of(make, shape)
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timed_batch = batch if device.type == "cuda" else 2  # CPUs are slow: time two samples
    module = make().to(device=device, dtype=dtype, memory_format=torch.channels_last)
    inputs = torch.randn(timed_batch, *shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return per_sample(timed(module, inputs), timed_batch)


def _validate(counts: list[int]) -> list[dict[str, Any]]:
    from dlopt.lab.bench import modes

    batch = modes.BATCH
    if max(counts) > batch:
        raise UserError(f"validate=[{max(counts)}]: the global batch has {batch} samples; allowed: 1 to {batch}")
    title = "ms per update of a ResNet-20 on digits: estimated from timings of layers and all-reduces"
    table = plain_table(title, left=["mode"], right=["processes", "estimated", "measured", "ratio"])
    points = modes.validate(sorted(set(counts)))
    for point in points:
        times = [f"{seconds * 1e3:.1f}" for seconds in (point.calculated, point.measured)]
        table.add_row(point.mode, str(point.processes), *times, f"{point.calculated / point.measured:.2f}")
    show_table(table)
    return [asdict(point) for point in points]
