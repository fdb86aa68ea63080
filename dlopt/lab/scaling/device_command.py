"""`dlopt scaling device=[...]`: measures the throughput of devices against the size of the operation."""

from dataclasses import asdict
from typing import Annotated, Literal

from dlopt.extend import DONE, Count, Line, NotEmpty, Positive, output_folder
from dlopt.lab.scaling.saving import Output, save

_Precision = Literal["fp32", "bf16", "fp16", "fp64"]
_PRECISIONS: list[_Precision] = ["fp32", "bf16"]
_SIZES = [64, 128, 256, 512, 1024, 2048]
_CHANNELS = [8, 16, 32, 64, 128, 256]


def time_devices(
    line: Line,
    *,
    device: Annotated[NotEmpty[Literal["cpu", "cuda"]], "[NAME,...]: cpu and cuda"],
    precision: Annotated[NotEmpty[_Precision], "[NAME,...]: any of fp32, bf16, fp16, fp64"] = _PRECISIONS,
    sizes: Annotated[NotEmpty[Count], "[N,...]: rows of the square matrices"] = _SIZES,
    channels: Annotated[NotEmpty[Count], "[N,...]: channels of the convolutions"] = _CHANNELS,
    threads: Annotated[Count | Literal["auto"], "N: CPU threads"] = "auto",
    seconds: Annotated[Positive, "X: time per measurement"] = 0.5,
    output: Output = None,
) -> int:
    line.refuse_rest("dlopt scaling device=[...]", time_devices)
    import torch

    from dlopt.lab.scaling import device as device_throughput
    from dlopt.machine.threads import set_threads

    set_threads(threads)
    grid = {"sizes": sorted(set(sizes)), "channels": sorted(set(channels))}
    points = []
    for name in dict.fromkeys(device):
        if name == "cuda" and not torch.cuda.is_available():
            print("cuda: no CUDA device available, skipped")
            continue
        for dtype in dict.fromkeys(precision):
            for point in device_throughput.throughput(torch.device(name), dtype, seconds=seconds, **grid):
                print(f"{name}  {dtype}  {point.kind:14}  {point.size:6}  {point.flops / 1e9:10.1f} GFLOP/s")
                points.append(point)
    if not points:
        return DONE
    devices = [f"cpu: {torch.get_num_threads()} threads"] if "cpu" in device else []
    devices += [torch.cuda.get_device_name(0)] if any(p.device == "cuda" for p in points) else []
    figure = device_throughput.draw(points, "Throughput vs. size (" + ", ".join(devices) + ")")
    save(figure, output_folder(output, "scaling"), "throughput", [asdict(p) for p in points])
    return DONE
