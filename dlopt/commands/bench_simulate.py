"""`dlopt bench simulate=true`: what a cluster would make of three models under each mode of parallelism."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dlopt.analysis.bench.simulation import Cluster, Estimate, estimates, size
from dlopt.commands.bench_output import save
from dlopt.commands.line import output_folder, own_keys
from dlopt.config.compose import Composer, to_plain
from dlopt.errors import UserError
from dlopt.ranges import Count
from dlopt.tracking.layout import Fitted, plain_table, standard_output

if TYPE_CHECKING:
    from dlopt.analysis.bench.layers import Layer

KEYS = """\

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


@dataclass(frozen=True, kw_only=True)
class _Own:
    simulate: Literal[True]
    devices: list[Count] = field(default_factory=lambda: [8, 64, 512, 4096])
    models: list[Model] = field(default_factory=lambda: list(MODELS))
    batch: Count = 64
    layers: Literal["counted", "measured"] = "counted"
    validate: list[Count] = field(default_factory=list)
    output: str | None = None


def bench_simulate(composer: Composer, overrides: Sequence[str]) -> int:
    """Prints and draws. Raises `UserError`."""
    own, rest = own_keys(composer, overrides, _Own)
    cluster, rest = own_keys(composer, [*(f"{k}={v}" for k, v in _CLUSTER.items()), *rest], Cluster)
    if rest:
        names = ", ".join((*_Own.__annotations__, *Cluster.__annotations__))
        raise UserError(f"{rest[0]}: dlopt bench simulate=true has no such key; allowed: {names}")
    for name in ("devices", "models"):
        if not getattr(own, name):
            raise UserError(f"{name}=[]: at least one value is needed")
    from dlopt.analysis.bench import simulation_picture

    found: dict[str, list[Estimate]] = {}
    for name in dict.fromkeys(own.models):
        layers = _layers(composer, name, own)
        found[name] = [e for count in sorted(set(own.devices)) for e in estimates(layers, own.batch, count, cluster)]
        standard_output().print(_table(f"{name}: {size(layers)}", found[name]))
    points = _validate(own) if own.validate else []
    folder = output_folder(own.output, "bench")
    title = f"Expected efficiency against one device, {own.batch} samples per device, layer times {own.layers}"
    figure = simulation_picture.draw(found, cluster, title=title, subtitle=_described(cluster))
    figures = {
        "cluster": asdict(cluster),
        "estimates": {name: [asdict(each) for each in every] for name, every in found.items()},
        "validation": points,
    }
    save(figure, folder, "cluster", figures)
    return 0


def _table(title: str, found: "Sequence[Estimate]") -> Fitted:
    table = plain_table(title)
    for name in ("mode", "devices", "ms/step", "computing", "efficiency", "GB/device"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for each in found:
        memory = f"{each.memory / 1e9:.1f}{'' if each.fits else ', too large'}"
        share = f"{each.compute / each.step:.0%}"
        table.add_row(each.mode, str(each.devices), f"{each.step * 1e3:.2f}", share, f"{each.efficiency:.1%}", memory)
    return Fitted(table)


def _described(cluster: Cluster) -> str:
    return (
        f"{cluster.per_server} devices a server, {cluster.tflops:g} TFLOP/s, {cluster.memory:g} GB; within "
        f"{cluster.bandwidth_within:g} GB/s, {cluster.latency_within:g} µs; between servers "
        f"{cluster.bandwidth_between:g} GB/s, {cluster.latency_between:g} µs; "
        f"step times vary by {cluster.variation:.0%}"
    )


def _layers(composer: Composer, name: Model, own: _Own) -> "list[Layer]":
    """Layers of one model, with the seconds of `own.batch` samples where they are measured."""
    import torch

    from dlopt.analysis.bench import layers
    from dlopt.config.parsing import parse
    from dlopt.processor import choose_device

    overrides, shape, classes = MODELS[name]
    experiment = parse(to_plain(composer.compose(overrides), overrides)[0])

    def make() -> Any:
        return experiment.model.build(input_shape=shape, classes=classes)

    if own.layers == "counted":
        return layers.layers_of(make, shape)
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    few = own.batch if device.type == "cuda" else 2  # a CPU takes its time: two samples stand for the others
    module = make().to(device=device, dtype=dtype, memory_format=torch.channels_last)
    inputs = torch.randn(few, *shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    timed = layers.timed(module, inputs)
    scale = own.batch / few
    return [dataclasses.replace(each, forward=each.forward * scale, backward=each.backward * scale) for each in timed]


def _validate(own: _Own) -> list[dict[str, Any]]:
    from dlopt.analysis.bench.validation import BATCH, validate

    if max(own.validate) > BATCH:
        raise UserError(
            f"validate=[{max(own.validate)}]: a batch of {BATCH} is shared out; allowed: numbers up to {BATCH}"
        )
    table = plain_table(
        "ms per update of a ResNet-20 on digits: calculated from what updates, layers and all-reduces take"
    )
    for name in ("mode", "processes", "calculated", "measured", "ratio"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    points = validate(sorted(set(own.validate)))
    for each in points:
        seconds = (each.calculated, each.measured)
        ratio = f"{each.calculated / each.measured:.2f}"
        table.add_row(each.mode, str(each.processes), *(f"{one * 1e3:.1f}" for one in seconds), ratio)
    standard_output().print(Fitted(table))
    return [asdict(each) for each in points]
