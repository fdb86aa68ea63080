"""`dlopt bench`: how fast parallel modes are and what they need; how fast a device is; what a cluster would do."""

from dlopt.commands import bench_device, bench_modes, bench_simulate
from dlopt.commands.line import read_line


def bench(arguments: list[str]) -> int:
    """Measures, prints and draws. Raises `UserError`."""
    usage = bench_modes.USAGE + bench_device.KEYS + bench_simulate.KEYS
    line = read_line(arguments, usage, several="several values need no flag here: parallel=ddp,filter")
    if line is None:
        return 0
    composer = line.composer()
    keys = {each.partition("=")[0]: each.partition("=")[2] for each in line.overrides}
    if "simulate" in keys:
        return bench_simulate.bench_simulate(composer, line.overrides)
    if keys.get("device", "").startswith("["):
        return bench_device.bench_device(composer, line.overrides)
    return bench_modes.bench_modes(composer, line.overrides)
