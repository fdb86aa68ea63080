"""`dry_run=true`: what a run would do and need, in batches and bytes, without training it.

The data are read as they are stored, and not downloaded. The model is on the meta device, where tensors have shapes
but no values. One update there, without forward and backward, creates the state of the optimizer.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_bytes, format_count, format_duration, round_duration
from dlopt.basics.random import generator
from dlopt.basics.scratch import scratch
from dlopt.config.overrides import value_of
from dlopt.config.plan import Plan
from dlopt.config.run_config import RunConfig
from dlopt.machine.device import choose_device
from dlopt.machine.world import current
from dlopt.optim.parameters import freeze
from dlopt.optim.traits import optimizer_traits
from dlopt.parallel.batch_shards import local_slices
from dlopt.parallel.mode import Mode, Placed
from dlopt.parallel.modes.fsdp import check_shards
from dlopt.parallel.modes.hybrid import data_groups
from dlopt.parallel.processes.launch import count_processes
from dlopt.parallel.shards import Kind
from dlopt.tracking.terminal_text import header_rows, rows_table, show_table
from dlopt.trained.distillation import with_teacher
from dlopt.training.budget import MANY, update_seconds, updates_within
from dlopt.training.builders.dataset import prepare_data, read_source
from dlopt.training.builders.model_check import check_memory, model_on_meta, on_meta
from dlopt.training.builders.optimizer import LR_SCALES, check_optimizer, needs_whole_tensors
from dlopt.training.builders.precision import Precision, torch_defaults
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, batch_size, build_loss, build_mode, build_workload
from dlopt.training.loop import Trainer
from dlopt.training.reporting import header_facts

_TIMED = 0.1  # seconds of the updates of dry_run=timed
_LOCAL = {"download": False, "offline": True}  # keys with which a data set downloads nothing
_ANY_LR = 1e-3  # in place of optimizer.lr=auto
_ALONE = {"processes": None, "data_degree": None, "model_degree": 1}  # keys of modes, for a process without others


@dataclass(frozen=True)
class _Split:
    """How a mode uses its processes: `batch` of them share a batch, and `model` of them a copy of the model."""

    batch: int = 1
    model: int = 1
    kind: Kind = "replicated"
    is_by_rows: bool = False


def show(plan: Plan, jobs: int = 1, at_once: int = 1, *, tasks: int = 1, ended: Sequence[float] = ()) -> None:
    """Prints what the run of a plan would do, and how long `jobs` like it take, if that is known. Raises `UserError`.

    Args:
        tasks: processes that a launcher starts for each job.
        ended: seconds of such jobs that have ended.
    """
    settings, budget = plan.run_config.settings, plan.run_config.settings.budget
    run_config = plan.run_config if budget is None else plan.run_config.with_steps(MANY)
    processes = _processes(run_config, tasks)
    mode, split = _mode(run_config, processes)
    device = choose_device(settings.device).type
    facts: dict[str, Any] = {"parallel": mode.name, "processes": processes, "device": device}
    rows = _of_machine(processes, device)
    seconds = fmean(ended) if ended else None
    source = f"as on average in {format_count('jobs', len(ended))} that ended, without their start"
    with torch_defaults(), scratch() as folder:
        workload = _workload(run_config, mode)
        if workload is None:
            rows |= _of_batch(run_config, run_config.data_settings.batch_size, split, processes)
            rows["updates"] = ["unknown until the data are here: a dry run downloads nothing"]
        else:
            size = batch_size(run_config, workload.dataset.train)
            rows |= _of_batch(run_config, size, split, processes)
            trainer = probe_trainer(workload, folder, checks=False)
            length = trainer.length
            facts = {**header_facts(workload, length), **facts}
            per_epoch = "batches that grow" if length.grows else f"{length.per_epoch:,} per epoch"
            rows["updates"] = [per_epoch, f"{length.updates:,} in all"]
            rows |= _of_memory(workload, trainer, mode, split)
            if settings.dry_run == "timed" or budget is not None:
                samples = max(_local_samples(size, settings.micro_batches, split.batch))
                update = _timed_update(run_config, samples, folder)
                updates = length.updates if budget is None else updates_within(budget, trainer, update, 0.0, 0.0)
                facts["length"], rows["updates"][1] = replace(length, updates=updates), f"{updates:,} in all"
                seconds = update * length.batches(updates)
                source = f"updates of {1000 * update:,.3g} ms with {samples:,} samples, timed in one process; start"
                source += f"{', communication' if processes > 1 else ''} and evaluation not counted"
    header = header_rows(plan.saved, plan.choices, facts)
    show_table(rows_table({**header, **{name: texts for name, texts in rows.items() if texts}}))
    print(time_line(jobs, at_once, seconds, source))


def time_line(jobs: int, at_once: int, seconds: float | None, source: str) -> str:
    """Says how long the jobs take. The total is computed from the rounded time of a job, so that the line adds up.

    `seconds`: of a job; None if unknown. `source`: of this time.
    """
    at_once = min(at_once, jobs)
    counted, parallel = format_count("jobs", jobs), f", {at_once} at once" if at_once > 1 else ""
    if seconds is None:
        return f"{counted}{parallel}; no job has ended to tell the time: dry_run=timed times an update"
    job = round_duration(seconds)
    if jobs == 1:
        return f"1 job of about {format_duration(job)} ({source})"
    total = format_duration(job * math.ceil(jobs / at_once))
    return f"{counted} of about {format_duration(job)} each{parallel}: about {total} in total ({source})"


# -- processes and device


def _processes(run_config: RunConfig, tasks: int) -> int:
    """Returns the number of processes of the run: those that are typed, also without as many GPUs."""
    arguments, world = run_config.parallel.arguments, current()
    if "processes" not in arguments:
        return 1
    started = tasks if world is None else world.size
    if started > 1:
        return started
    return arguments["processes"] or count_processes(arguments, run_config.settings.device)


def _mode(run_config: RunConfig, processes: int) -> tuple[Mode, _Split]:
    """Returns the mode in this process alone, and how it splits. Raises `UserError` for keys that contradict."""
    parallel, keys = run_config.parallel, run_config.parallel.arguments
    alone = {key: value for key, value in _ALONE.items() if key in keys}
    if current() is None:
        mode = build_mode(replace(run_config, parallel=parallel.partial(**alone)))
    else:  # the other processes of a launcher do not join
        mode = Mode(choose_device(run_config.settings.device), value_of(parallel.choice))
    match mode.name if processes > 1 else "":
        case "ddp":
            return mode, _Split(processes)
        case "fsdp":
            check_shards(keys["shards"], processes)
            return mode, _Split(processes, keys["shards"] or processes, "tensors", is_by_rows=True)
        case "hybrid":
            groups = data_groups(processes, keys["data_degree"], keys["model_degree"])
            return mode, _Split(groups, keys["model_degree"], "tensors")
        case "filter" | "spatial":
            return mode, _Split(1, processes if mode.name == "filter" else 1, "tensors")
        case "pipeline" | "columns":
            return mode, _Split(1, processes, "layers")
    return mode, _Split()


def _of_machine(processes: int, device: str) -> dict[str, list[str]]:
    """Says where several processes run, and whether an accelerator exists here."""
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        where = f"{processes:,} on the {format_count('cores', cores)} of this machine"
        return {"processes": [where]} if processes > 1 else {}
    gpus = torch.cuda.device_count() if device == "cuda" else int(torch.backends.mps.is_available())
    here = f"{gpus} here" if gpus else f"no {device.upper()} device here"
    return {"processes": [f"{processes:,} with a GPU each"] if processes > 1 else [], "device": [f"{device}: {here}"]}


# -- data, model and optimizer


def _workload(run_config: RunConfig, mode: Mode) -> Workload | None:
    """Builds the workload with its model on the meta device; None if its data would be downloaded first."""
    settings, data, cpu = run_config.settings, run_config.data, Mode(torch.device("cpu"), mode.name)
    unread = replace(run_config.data_settings, memory=False)
    local = replace(run_config, data_settings=unread)
    downloads = {key: value for key, value in _LOCAL.items() if data.arguments.get(key) is (not value)}
    if downloads and settings.dry_run != "timed":
        local = replace(local, data=data.partial(**downloads))
        try:
            read_source(local)
        except UserError:
            return None
    dataset, augment = prepare_data(local, None, cpu, (), compares=False)
    shape = dataset.task.input_shape(dataset.train.shape if augment is None else augment.output_shape)
    model, arguments = run_config.model, dataset.task.model_arguments(shape)
    if mode.device.type == "cpu":
        check_memory(model, arguments, has_gradients=False)
    if "pretrained" in model.arguments:
        model = model.partial(pretrained=False)  # the weights might be downloaded
    module = model_on_meta(model, arguments)
    with on_meta():
        run_config.adapt.build(model=module, generator=generator("cpu", settings.seed))
    precision = Precision(settings.precision, cpu.device)
    module = replace(precision, device=torch.device("meta")).place(module)
    freeze(module, run_config.grouping)
    workload = Workload(
        run_config=run_config,
        parallel=cpu,
        precision=precision,
        dataset=dataset,
        normalize=nn.Identity(),
        module=module,
        placed=Placed(module),
        model=module,
        loss=build_loss(run_config, dataset, module),
        memory_format=torch.contiguous_format,
        augment=augment,
    )
    return workload.with_lr(_ANY_LR) if run_config.auto_lr else workload


def _local_samples(batch: int, micro_batches: int, processes: int) -> list[int]:
    """Returns the samples of a batch in each of the processes that share it."""
    ranks = (local_slices(batch, micro_batches, rank, processes) for rank in range(processes))
    return [sum(part.stop - part.start for part in parts) for parts in ranks]


def _of_batch(
    run_config: RunConfig, size: int | Literal["full"], split: _Split, processes: int
) -> dict[str, list[str]]:
    """Describes a batch of `size` samples, and what `scale_lr` does to the learning rate for it."""
    settings, rows = run_config.settings, {"batch": ["the training set"]}
    if size != "full":
        rows["batch"] = [format_count("samples", size)]
        local = _local_samples(size, settings.micro_batches, split.batch)
        shares = dict.fromkeys(f"{each:,}" for each in (min(local), max(local)))
        rows["batch"] += [f"{' to '.join(shares)} per process"] if processes > 1 else []
    number = run_config.parallel.arguments.get("micro_batches") or settings.micro_batches
    rows["batch"] += [f"{number} micro-batches"] if number > 1 else []
    if run_config.auto_lr:
        rows["rate"] = ["optimizer.lr=auto: from a range test at the start"]
    elif settings.scale_lr != "none" and size != "full":
        factor = LR_SCALES[settings.scale_lr](size / settings.scale_lr_reference)
        lr = run_config.optimizer.arguments.get("lr")
        scaled = f" = {lr * factor:.4g}" if isinstance(lr, int | float) else ""
        rows["rate"] = [f"scale_lr={settings.scale_lr}: optimizer.lr times {factor:.4g}{scaled}, for {size} samples "
                        f"instead of scale_lr_reference={settings.scale_lr_reference}"]  # fmt: skip
    return rows


def _of_memory(workload: Workload, trainer: Trainer, mode: Mode, split: _Split) -> dict[str, list[str]]:
    """Describes the bytes of weights, gradients and state. Raises `UserError` if the mode excludes the optimizer."""
    optimizer, weights = trainer.step.optimizer, list[Tensor](workload.module.parameters())
    mode.sharding.kind, mode.sharding.is_by_rows = split.kind, split.is_by_rows
    check_optimizer(mode, optimizer)
    tensors = {"weights": weights, "gradients": [weight for weight in weights if weight.requires_grad]}
    if trainer.average is not None:
        tensors["average"] = weights
    name = f"state of {type(optimizer).__name__}"
    try:
        tensors[name] = _state(optimizer)
        unknown = []
    except Exception:  # an optimizer may do anything with its gradients
        unknown = [f"{name} unknown: it depends on values, which a dry run does not compute"]
    rows = {"memory": [f"{key} {format_bytes(_bytes(each))}" for key, each in tensors.items()] + unknown}
    if split.model > 1:
        rows["per process"] = [
            f"{key} {format_bytes(_rows_bytes(each, split.model) if split.is_by_rows else _bytes(each) / split.model)}"
            for key, each in tensors.items()
        ]
        if not split.is_by_rows or needs_whole_tensors(mode, optimizer):
            rows["per process"].append(f"about: the mode gives each process 1/{split.model} of the model")
    rows["memory"].append("and activations: see `dlopt summary`")
    return rows


def _state(optimizer: Optimizer) -> list[Tensor]:
    """Returns the state after two updates on the meta device: the first of ADOPT, for example, creates only a part."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    many = optimizer_traits(optimizer).evaluations == "many"
    closures: list[Any] = [lambda: torch.zeros((), device="meta")] if many else []
    for _ in range(2):
        optimizer.step(*closures)
    return [leaf for leaf in tree_leaves([*optimizer.state.values()]) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _rows_bytes(tensors: Iterable[Tensor], processes: int) -> int:
    """Returns the bytes of tensors that are sharded along dimension 0, in the process with most of them."""
    return _bytes(tensor[: -(-len(tensor) // processes)] if tensor.ndim else tensor for tensor in tensors)


def _timed_update(run_config: RunConfig, samples: int, folder: Path) -> float:
    """Returns the seconds of an update with this batch size, in this process."""
    data = replace(run_config.data_settings, batch_size=samples)
    workload = with_teacher(build_workload(replace(run_config, data_settings=data)))
    with contextlib.closing(workload):
        workload = workload.with_lr(_ANY_LR) if run_config.auto_lr else workload
        return update_seconds(probe_trainer(workload, folder, checks=False), _TIMED)
