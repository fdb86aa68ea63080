"""`dlopt scaling`, parallel scaling: benchmarks parallel modes, the network and devices, and simulates a cluster."""

from dlopt.extend import Line, key_of, on_config, value_of
from dlopt.lab.scaling import (
    cluster,
    cluster_command,
    device_command,
    modes_command,
    network_command,
    speedup_command,
)

# Of the help:
_READS, time_modes = modes_command.READS, modes_command.time_modes
time_all_reduce, time_devices = network_command.time_all_reduce, device_command.time_devices
simulate_cluster, Cluster = cluster_command.simulate_cluster, cluster.Cluster
simulate_speedup = speedup_command.simulate_speedup

USAGE = """\
Benchmark parallel modes, the network or devices, or simulate a cluster

Usage:
  dlopt scaling parallel=a,b processes=1,2 [key=value]   parallel modes on this machine
  dlopt scaling allreduce=[1,256] [key=value]            bandwidth between processes, also on several nodes
  dlopt scaling device=[cpu,cuda] [key=value]            throughput of matrix products and convolutions vs. size
  dlopt scaling simulate=true [key=value]                estimated efficiency on a cluster
  dlopt scaling speedup=true [key=value]                 limits of data parallelism, simulated and in closed form

Examples:
  dlopt scaling parallel=ddp,filter processes=1,2
  dlopt scaling parallel=ddp processes=2 parallel.bucket_cap_mb=0.25,1000 model=resnet56
  dlopt scaling parallel=filter model=mlp model.widths=[8192,8192] model.norm=none memory_limit_mb=720
  dlopt scaling simulate=true devices=[8,64,512,4096]
  dlopt scaling speedup=true batch=4096 variation=0.1
  srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 dlopt scaling allreduce=[1,16,256,1024]

Parallel modes:
  Each combination of values is one row; the first row is one process. A row shows the time per update, samples/s,
  speed-up and efficiency relative to one process, peak memory per rank (beyond that of an idle process), bytes sent per
  rank, the fractions of the time spent in collectives (communicating) and blocked by them (waiting), and the compute
  time of the fastest and the slowest rank. On CPUs all processes use the same number of threads.

  processes=N,M :: numbers of processes on this machine (default: 2)
  {time_modes}
and these keys of `dlopt train`:
    {_READS}

Bandwidth (allreduce=[...]):
  Times all-reduces of the given sizes in MiB, as DDP does with gradients. Starts its processes, or runs in those of
  srun or torchrun. bus GB/s: what each rank sends per second, comparable to the speed of a link.

  {time_all_reduce}

Devices (device=[...]):
  {time_devices}

Simulated cluster (simulate=true):
  {simulate_cluster}
  {Cluster}

Limits of the speed-up (speedup=true), on the same cluster:
  {simulate_speedup}
"""


@on_config("scaling", None, several="not needed here; list the values: parallel=ddp,filter")
def scaling(line: Line) -> int:
    """Runs one of the benchmarks. Raises `UserError`."""
    keys = {key_of(override): value_of(override) for override in line.overrides}
    if "simulate" in keys:
        return line.call(simulate_cluster)
    if "speedup" in keys:
        return line.call(simulate_speedup)
    if "allreduce" in keys:
        return line.call(time_all_reduce)
    if keys.get("device", "").startswith("["):
        return line.call(time_devices)
    return line.call(time_modes, "dlopt scaling", _READS)
