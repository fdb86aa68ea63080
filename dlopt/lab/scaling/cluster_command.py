"""`dlopt scaling simulate=true`: estimates the efficiency of parallel modes on a cluster."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table

from dlopt.extend import DONE, Count, Line, NotEmpty, UserError, output_folder
from dlopt.lab.scaling.cluster import Cluster
from dlopt.lab.scaling.saving import Output, save
from dlopt.tracking.terminal_text import plain_table, show_table

if TYPE_CHECKING:
    from dlopt.lab.scaling.layers import Layer
    from dlopt.lab.scaling.simulation import ModeEstimate


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


def simulate_cluster(
    line: Line,
    *,
    simulate: Annotated[Literal[True], "true: simulate instead of measuring"],
    devices: Annotated[NotEmpty[Count], "[N,...]: numbers of devices"] = _DEVICES,
    models: Annotated[NotEmpty[Model], "[NAME,...]: models"] = _MODELS,
    batch: Annotated[Count, "N: samples per device, in all modes"] = 64,
    training: Annotated[
        Training | Literal["paper"],
        'NAME: schedule for the column "days": that of the model\'s paper, or one of alexnet_imagenet, imagenet_90, '
        "resnet_imagenet, wrn_cifar",
    ] = "paper",
    validate: Annotated[
        list[Count] | None,
        "[N,...]: numbers of processes on this machine for which to compare estimated and measured times",
    ] = None,
    output: Output = None,
) -> int:
    from dlopt.lab.scaling import simulation

    arguments, rest = line.take(Cluster)
    cluster = Cluster(**arguments)
    rest.refuse_rest("dlopt scaling simulate=true", simulate_cluster, Cluster)
    estimates: dict[str, list[ModeEstimate]] = {}
    for name in dict.fromkeys(models):
        costs = layers_of_model(line, name)
        estimates[name] = []
        for count in sorted(set(devices)):
            estimates[name] += simulation.estimates(costs, batch, count, cluster)
        samples, described = _TRAININGS[MODELS[name][-1] if training == "paper" else training]
        of_one = simulation.of_one_device(costs, batch, cluster)
        title = f"{name}: {simulation.size(costs)}\n{of_one}\ndays: {described}"
        show_table(_table(title, estimates[name], samples / batch))
    points = _validate(validate) if validate else []
    folder = output_folder(output, "scaling")
    title = f"Estimated efficiency relative to one device, {batch} samples per device"
    figure = simulation.draw(estimates, cluster, title=title, subtitle=describe(cluster))
    records = {
        "cluster": asdict(cluster),
        "estimates": {name: [asdict(each) for each in every] for name, every in estimates.items()},
        "validation": points,
    }
    save(figure, folder, "cluster", records)
    return DONE


def _table(title: str, estimates: Sequence["ModeEstimate"], updates: float) -> Table:
    """Builds the table of a model; `updates`: of the whole training on one device."""
    columns = ["devices", "ms/step", "compute", "efficiency", "GB/device", "days"]
    table = plain_table(title, left=["mode"], right=columns)
    for row in estimates:
        memory = f"{row.memory / 1e9:.1f}{'' if row.fits else ', OOM'}"
        compute = f"{row.compute / row.step:.0%}"
        times = f"{row.step * 1e3:.2f}", f"{row.step * updates / row.devices / 86400:.3g}"
        table.add_row(row.mode, str(row.devices), times[0], compute, f"{row.efficiency:.1%}", memory, times[1])
    return table


def describe(cluster: Cluster) -> str:
    """Formats the keys of a cluster."""
    return (
        f"{cluster.per_server} devices per server, {cluster.tflops:g} TFLOP/s, {cluster.memory:g} GB; within a server "
        f"{cluster.bandwidth_within:g} GB/s, {cluster.latency_within:g} µs; between servers "
        f"{cluster.bandwidth_between:g} GB/s, {cluster.latency_between:g} µs; "
        f"step time variation {cluster.variation:.0%}"
    )


def layers_of_model(line: Line, name: Model) -> "list[Layer]":
    """Returns the layers of a model, counted."""
    from dlopt.lab.scaling.layers import layers_of

    overrides, shape, classes, _ = MODELS[name]
    run_config, _ = line.run_config(overrides)
    return layers_of(lambda: run_config.model.build(input_shape=shape, classes=classes), shape)


def _validate(counts: list[int]) -> list[dict[str, Any]]:
    from dlopt.lab.scaling import modes

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
