"""`dlopt bench device=[cpu,cuda]`: throughput against size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from dlopt.commands.bench_output import save
from dlopt.commands.line import output_folder, own_keys
from dlopt.config.compose import Composer
from dlopt.errors import UserError
from dlopt.ranges import Count, Positive

KEYS = """\

Keys of dlopt bench device=[...]:
  precision=[fp32]    of fp32, bf16, fp16, fp64
  sizes=[64,...]      rows of the square matrices
  channels=[16,...]   of the convolutions
  threads=auto        of a CPU
  seconds=0.5         for each point
"""


@dataclass(frozen=True, kw_only=True)
class _Own:
    device: list[Literal["cpu", "cuda"]]
    precision: list[Literal["fp32", "bf16", "fp16", "fp64"]] = field(default_factory=lambda: ["fp32", "bf16"])
    sizes: list[Count] = field(default_factory=lambda: [64, 128, 256, 512, 1024, 2048])
    channels: list[Count] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256])
    threads: Count | Literal["auto"] = "auto"
    seconds: Positive = 0.5
    output: str | None = None


def bench_device(composer: Composer, overrides: Sequence[str]) -> int:
    own, rest = own_keys(composer, overrides, _Own)
    if rest:
        names = ", ".join(_Own.__annotations__)
        raise UserError(f"{rest[0]}: dlopt bench device=[...] has no such key; allowed: {names}")
    for name in ("device", "precision", "sizes", "channels"):
        if not getattr(own, name):
            raise UserError(f"{name}=[]: at least one value is needed")
    import torch

    from dlopt.analysis.bench import device as measuring
    from dlopt.processor import set_threads

    set_threads(own.threads)
    points = []
    for device in dict.fromkeys(own.device):
        if device == "cuda" and not torch.cuda.is_available():
            print("cuda: there is no CUDA device here, left out")
            continue
        for precision in dict.fromkeys(own.precision):
            sizes, channels = sorted(set(own.sizes)), sorted(set(own.channels))
            words = {"sizes": sizes, "channels": channels}
            for point in measuring.throughput(torch.device(device), precision, seconds=own.seconds, **words):
                print(f"{device}  {precision}  {point.kind:14}  {point.size:6}  {point.flops / 1e9:10.1f} GFLOP/s")
                points.append(point)
    if not points:
        return 0
    about = [f"cpu: {torch.get_num_threads()} threads"] if "cpu" in own.device else []
    about += [torch.cuda.get_device_name(0)] if any(p.device == "cuda" for p in points) else []
    figure = measuring.draw(points, "Throughput against size (" + ", ".join(about) + ")")
    save(figure, output_folder(own.output, "bench"), "throughput", [asdict(p) for p in points])
    return 0
