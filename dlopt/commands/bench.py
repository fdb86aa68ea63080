"""`dlopt bench`: how fast parallel modes are and what they need; how fast a device is; what a cluster would do."""

from dlopt.commands import bench_device, bench_modes, bench_simulate
from dlopt.config.compose import Composer, parse_arguments
from dlopt.errors import UserError


def bench(arguments: list[str]) -> int:
    """Measures, prints and draws. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help:
        print(bench_modes.USAGE + bench_device.KEYS + bench_simulate.KEYS, end="")
        return 0
    if parsed.multirun:
        raise UserError("-m: several values need no flag here: parallel=ddp,filter")
    composer = Composer(parsed.config_name, parsed.config_dir)
    keys = {line.partition("=")[0]: line.partition("=")[2] for line in parsed.overrides}
    if "simulate" in keys:
        return bench_simulate.bench_simulate(composer, parsed.overrides)
    if keys.get("device", "").startswith("["):
        return bench_device.bench_device(composer, parsed.overrides)
    return bench_modes.bench_modes(composer, parsed.overrides)
