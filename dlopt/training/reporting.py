"""Output of a run: the header that describes it, and the summary at its end."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlopt.adapt import describe
from dlopt.basics.files import read_json, write_atomically, write_json
from dlopt.basics.folders import RunFolder
from dlopt.basics.length import Length
from dlopt.config.overrides import storable
from dlopt.config.run_config import RunConfig
from dlopt.config.schema import dotted_name
from dlopt.config.validation_sets import KEY
from dlopt.data.samples import Dataset
from dlopt.losses import Distillation
from dlopt.metrics.measures import at_end
from dlopt.metrics.names import VAL_ACCURACY, VAL_LOSS, Metric, best_key, set_of
from dlopt.models.third_party import pretrained_inputs
from dlopt.optim.parameters import idle_rules
from dlopt.tasks.user import UserTask
from dlopt.tracking.tracking import Tracking
from dlopt.training.batch_norm import norm_notes
from dlopt.training.builders.further import describe_weights, names_of
from dlopt.training.builders.mup import describe_rates
from dlopt.training.builders.precision import bf16_slowdown
from dlopt.training.builders.speed import describe_auto
from dlopt.training.builders.workload import Workload, batch_size, build_sampler, data_spec
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.nonfinite import Recovery
from dlopt.training.progress import Progress, Status, TrainingRun
from dlopt.training.step import EpochBatches
from dlopt.training.stopping import Best

TOKENIZER = "tokenizer.json"  # of a text that is not read byte by byte


def open_tracking(run: TrainingRun, checkpoint: Checkpoint | None, console: bool) -> Tracking:
    settings = run.run_config.settings
    return Tracking(
        run.folder,
        sinks=settings.tracking,
        console=console,
        log_every_steps=settings.log_every_steps,
        resume_from=None if checkpoint is None else (checkpoint.evaluated_epoch, checkpoint.step),
        packages=settings.allow_packages,
        predicts=not run.run_config.task.is_a(UserTask),
    )


def log_header(run: TrainingRun, workload: Workload, length: Length, progress: Progress, tracking: Tracking) -> None:
    """Logs data, model and device."""
    dataset, facts = workload.dataset, header_facts(workload, length)
    facts["overrides"] = RunFolder(run.folder).typed() if run.overrides is None else storable(run.overrides)
    if workload.device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    environment = read_json(run.folder / "environment.json")
    if workload.parallel.ranks.is_main and environment is not None:
        identity = data_spec(workload)["identity"]
        data = {**dataset.facts, **({} if identity is None else {"identity": identity})}
        if facts["val"]:
            data["validation"] = {"count": facts["val"], "unit": facts["unit"]}
        write_json(run.folder / "environment.json", {**environment, "data": data})
    if workload.parallel.ranks.is_main and dataset.tokenizer is not None:
        write_atomically(run.folder / TOKENIZER, dataset.tokenizer.description.encode())  # not redacted: it is data
    tracking.begin(
        dict(workload.run_config.config),
        facts,
        length,
        first_step=progress.step,
        choices=run.choices,
        seconds=progress.seconds,
    )


def header_facts(workload: Workload, length: Length) -> dict[str, Any]:
    """Returns the facts of `terminal_text.header_rows` that follow from the config and its data."""
    dataset = workload.dataset
    parameters = list(workload.module.parameters())
    tokens = workload.task.predictions  # of a sample; 1 for labels
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "train": len(dataset.train) * tokens,
        "val": len(dataset.val) * tokens if dataset.val is not None else 0,
        "test": len(dataset.test) * tokens if dataset.test is not None else 0,
        "drawn": len(build_sampler(workload.run_config, dataset.train)) * tokens,
        "batch_size": batch_size(workload.run_config, dataset.train),
        "device": str(workload.device),
        "precision": workload.precision.name,
        "parallel": workload.parallel.name,
        "processes": workload.parallel.ranks.processes,
        "unit": workload.task.counted_as(dataset.train.shape),
        "inputs": workload.task.describe(tuple(data_spec(workload)["window"]), _targets(dataset), dataset.classes),
        "metrics": [*(Metric("val", name).column for name in _shown_metrics(workload)), *_of_sets(workload)],
        "sets": {name: size * tokens for name, size in _sizes(workload).items()},
    }
    samples = workload.run_config.settings.evaluate.samples
    if samples is not None and dataset.val is not None and samples < len(dataset.val):
        facts |= {"val": samples * tokens, "all_val": facts["val"]}
    return facts


def _targets(dataset: Dataset) -> Tensor:
    """Returns the targets of the training set; the values of a regression in their own unit."""
    targets, columns = dataset.train.targets, dataset.columns
    if columns is None or columns.scale == 1.0:
        return targets
    return targets.double() * columns.scale + columns.mean


def notes(workload: Workload, optimizer: Optimizer, graph_obstacle: str | None) -> list[str]:
    """Returns the values chosen for `auto`, in a line, notes on the data and the parallel mode, and warnings.

    `graph_obstacle`: why updates are not replayed from a CUDA graph; None if they are.
    """
    dataset = workload.dataset
    chosen = describe_auto(workload.run_config, workload.precision, workload.compile_obstacle, graph_obstacle)
    pretrained = describe_pretrained(workload.run_config, data_spec(workload)["window"])
    growth, init = workload.growth, workload.run_config.init.arguments
    rates = None if growth is None else describe_rates(workload.module, optimizer, growth, init["base_width"])
    size, drawn = workload.run_config.data_settings.batch_size, batch_size(workload.run_config, dataset.train)
    small = (
        f"warning: data.batch_size={size} exceeds the {drawn:,} training samples of an epoch: every epoch is one update"
        if isinstance(size, int) and size > drawn
        else None
    )
    balanced = [
        f"loss.{key}=balanced: weights of {weights.min():.3g} to {weights.max():.3g}, by the draws of the sampler"
        for key, value in workload.run_config.loss.arguments.items() if value == "balanced"
        for weights in workload.loss.buffers()
    ]  # fmt: skip
    notes = (*balanced, describe_weights(workload), *workload.notes, workload.throughput.note, small)
    lines = (describe(workload.module), chosen, pretrained, rates, *notes)
    described = [line for line in lines if line]
    idle = [*workload.already_frozen, *idle_rules(workload.module, workload.run_config.grouping)]
    of_sets = [f"{KEY}.{name}: {line}" for name, each in workload.validation_sets.items() for line in each.notes]
    return [*described, *dataset.notes, *of_sets, *workload.placed.notes, *norm_notes(workload), *idle]


def describe_pretrained(run_config: RunConfig, shape: tuple[int, ...]) -> str:
    """Describes the images for which pretrained weights were trained, and how this run's images differ.

    `shape`: of the model's input. Empty without pretrained weights.
    """
    model, constants = run_config.model, run_config.normalize.arguments
    name, pretrained = str(model.arguments.get("name")), model.arguments.get("pretrained", False)
    inputs = pretrained_inputs(dotted_name(model.target), name, pretrained)
    if inputs is None:
        return ""
    height, width = inputs.size
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (inputs.mean, inputs.std))
    differences = []
    if (tuple(constants.get("mean", ())), tuple(constants.get("std", ()))) != (inputs.mean, inputs.std):
        differences.append("another normalization")
    if tuple(shape[1:]) != inputs.size:
        differences.append(f"images of {'x'.join(map(str, shape[1:]))}")
    compared = " and ".join(differences) or "the same"
    return f"pretrained on images of {height}x{width} with mean [{mean}] and std [{std}]; this run uses {compared}"


def show_first_batch(workload: Workload, batches: EpochBatches, tracking: Tracking) -> None:
    """Logs training images, and a warning if the processor emulates the precision."""
    if len(workload.dataset.train.shape) == 3 and workload.run_config.settings.tracking:
        inputs, _ = next(iter(batches.epoch(0)))
        # Waits for the device once, before the first update.
        tracking.images(inputs[:64].float().cpu())
    if workload.precision.is_emulated:
        tracking.message(_emulation_warning(workload, batches))


def _emulation_warning(workload: Workload, batches: EpochBatches) -> str:
    cost, name = "is slower than fp32", workload.precision.name
    # Otherwise this process has only a part of the model, or the loss reads more than the batch below has.
    if workload.parallel.sharding.kind == "replicated" and not names_of(workload.loss):
        batch = next(iter(batches.epoch(0)))
        loss = workload.loss.cross_entropy if isinstance(workload.loss, Distillation) else workload.loss
        slowdown = bf16_slowdown(workload.module, loss, *batch, name=name)
        cost = f"takes {slowdown:.1f} times as long as fp32 (measured)"
    return (
        f"warning: precision={name}: this processor emulates bf16, which {cost}; use precision=fp32, or "
        "precision=auto, which selects bf16 only where the processor has it"
    )


def _shown_metrics(workload: Workload) -> list[str]:
    """Returns the names of the metrics, beside loss and accuracy, of every evaluation."""
    return [*(each.name for each in workload.task.computed(())), *workload.run_config.own_metrics]


def _of_sets(workload: Workload) -> list[str]:
    """Returns the columns that the table of epochs shows of the named validation sets: accuracies, else losses."""
    metric = VAL_ACCURACY if workload.task.accuracy == VAL_ACCURACY.name else VAL_LOSS
    columns = [metric.on_set(name).column for name in workload.validation_sets]
    monitor = workload.run_config.settings.monitor
    return [*columns, *([monitor] if set_of(monitor, workload.validation_sets) else [])]


def _sizes(workload: Workload) -> dict[str, int]:
    """Returns the number of samples of each named validation set that an evaluation reads."""
    most = workload.run_config.settings.evaluate.samples
    sizes = {name: len(dataset.val or ()) for name, dataset in workload.validation_sets.items()}
    return sizes if most is None else {name: min(size, most) for name, size in sizes.items()}


def summarize(workload: Workload, status: Status, progress: Progress, best: Best, recovery: Recovery) -> dict[str, Any]:
    """Returns the content of summary.json before the test; accuracies are left out where the task has none."""
    flops, evaluated = workload.computed_flops, progress.evaluated_samples
    settings = workload.run_config.settings
    summary = {
        "status": status,
        **({} if (run_id := workload.run_config.config.get("run_id")) is None else {"run_id": run_id}),
        "epochs": progress.epoch,
        "steps": progress.step,
        "best_epoch": best.epoch,
        VAL_LOSS.best: best.val_loss,
        VAL_ACCURACY.best: best.val_accuracy,
        "test_loss": None,
        "test_accuracy": None,
        "seconds": progress.seconds,
        "samples": progress.samples,
        "flops": None if flops is None or evaluated is None else round(flops * evaluated),
        "peak_memory": progress.peak_memory,
        "peak_memory_of": "device" if workload.device.type == "cuda" else "process",
        **at_end(workload.module),
        "parallel": workload.parallel.name,
        "processes": workload.parallel.ranks.processes,
        "resumed_from": progress.resumed_from,
        **({} if progress.found_lr is None else {"found_lr": progress.found_lr}),
        **({"skipped_updates": recovery.skipped} if settings.on_divergence == "skip" else {}),
    }
    summary |= {best_key(column): value for column, value in best.others.items()}
    if workload.task.accuracy != VAL_ACCURACY.name and best.val_accuracy is None:
        summary = {key: value for key, value in summary.items() if key not in (VAL_ACCURACY.best, "test_accuracy")}
    return summary
