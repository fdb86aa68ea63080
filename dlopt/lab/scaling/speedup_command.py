"""`dlopt scaling speedup=true`: the limits of data parallelism at a fixed batch, simulated and in closed form."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from rich.table import Table

from dlopt.extend import DONE, Count, Line, NotEmpty, UserError, output_folder
from dlopt.lab.scaling.cluster import Cluster
from dlopt.lab.scaling.cluster_command import Model, describe, layers_of_model
from dlopt.lab.scaling.saving import Output, save
from dlopt.tracking.terminal_text import plain_table, show_table

if TYPE_CHECKING:
    from dlopt.lab.scaling.speedup import Speedup

_DEVICES = [2**i for i in range(11)]


def simulate_speedup(
    line: Line,
    *,
    speedup: Annotated[Literal[True], "true: simulate data parallelism at a fixed global batch"],
    devices: Annotated[NotEmpty[Count], "[N,...]: numbers of devices"] = _DEVICES,
    model: Annotated[Model, "NAME: model"] = "wrn_28_10",
    batch: Annotated[Count, "N: samples per update, over all devices"] = 4096,
    output: Output = None,
) -> int:
    from dlopt.lab.scaling import speedup as limits
    from dlopt.lab.scaling.simulation import of_one_device, size

    arguments, rest = line.take(Cluster)
    cluster = Cluster(**arguments)
    rest.refuse_rest("dlopt scaling speedup=true", simulate_speedup, Cluster)
    if max(devices) > batch:
        raise UserError(f"devices=[{max(devices)}]: must be <= batch={batch}; each device needs a sample")
    layers = layers_of_model(line, model)
    found = limits.speedups(layers, batch, devices, cluster)
    serial = limits.serial_fraction(layers, batch, max(devices), cluster)
    title = f"Speed-up of data parallelism, {batch:,} samples per update"
    described = f"{model}: {size(layers)}; {describe(cluster)}"
    described_one = of_one_device(layers, batch, cluster)
    show_table(
        _table(f"{title}\n{described}\n{described_one}\nserial fraction {serial:.3g}: at most {1 / serial:.3g}x", found)
    )
    figure = limits.draw(found, serial, title=title, subtitle=described)
    records = {"cluster": asdict(cluster), "serial_fraction": serial, "points": [asdict(each) for each in found]}
    save(figure, output_folder(output, "scaling"), "speedup", records)
    return DONE


def _table(title: str, found: Sequence["Speedup"]) -> Table:
    columns = ["devices", "ms/step", "speed-up", "Amdahl"]
    delays = ["slowest, normal", "closed", "slowest, exponential", "closed"]
    table = plain_table(title, right=[*columns, *delays])
    for each in found:
        slowest = [f"{value:.3f}" for kind in each.slowest for value in (each.slowest[kind], each.expected[kind])]
        table.add_row(
            str(each.devices), f"{each.step * 1e3:.2f}", f"{each.speedup:.1f}", f"{each.amdahl:.1f}", *slowest
        )
    return table
