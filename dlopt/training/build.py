"""Data, normalization and model of an experiment, on their device: what training and testing have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.augment import Pipeline
from dlopt.augment.pipeline import CentreCrop
from dlopt.config.experiment import Experiment
from dlopt.data.batches import Batches, Delivery
from dlopt.data.normalization import fit
from dlopt.data.samplers import LossAwareSampler
from dlopt.data.samples import Dataset, Samples
from dlopt.data.splits import prepare
from dlopt.errors import UserError
from dlopt.parallel.mode import Mode
from dlopt.parallel.rendezvous import current
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parameters import freeze
from dlopt.processor import choose_device, keep_freed_memory, set_threads
from dlopt.random import generator, stream
from dlopt.training import checkpoint, rng, speed
from dlopt.training.precision import Precision, choose_precision
from dlopt.training.rng import AUGMENTATION, ORDER, SCHEME, WEIGHTS
from dlopt.training.step import Network


@dataclass
class Workload:
    """Data, normalization and model on their device."""

    experiment: Experiment
    parallel: Mode
    precision: Precision
    dataset: Dataset
    normalize: nn.Module
    module: nn.Module
    model: Callable[[Tensor], Tensor]  # the module as it is called: placed, compiled
    loss: nn.Module
    memory_format: torch.memory_format
    augment: Pipeline | None
    uncompiled: str = ""  # why the model is not compiled; empty: it is
    statistics_batches: Batches | None = None  # the training split, where exact batch-norm statistics are wanted

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def classify(self) -> bool:
        return self.dataset.classes is not None

    @property
    def network(self) -> Network:
        return Network(self.module, self.model, self.loss)

    def with_lr(self, lr: float) -> "Workload":
        """Replaces optimizer.lr=auto by a learning rate."""
        optimizer = self.experiment.optimizer.partial(lr=lr)
        return replace(self, experiment=replace(self.experiment, optimizer=optimizer, auto_lr=False))


def parallel_of(experiment: Experiment) -> Mode:
    """Builds the parallel mode; this process joins its group. Raises `UserError`."""
    settings = experiment.settings
    device = choose_device(settings.device)
    mode: Mode = experiment.parallel.build(
        device=device,
        accumulate=settings.accumulate,
        batch_size=experiment.data_settings.batch_size,
        precision=choose_precision(settings.precision, device).name,
        threads=settings.threads,
    )
    world = current()
    if world is not None and mode.processes == 1:
        raise UserError(
            f"parallel={mode.name}: {world.launcher} started {world.size} processes, and each would train the same; "
            "use parallel=ddp, or start one"
        )
    return mode


def build_workload(
    experiment: Experiment, normalization: Mapping[str, Any] | None = None, *, parallel: Mode | None = None
) -> Workload:
    """Reads the data and builds the model.

    `normalization`: a checkpoint's; None: computed on the training split. `parallel`: see `parallel_of`; None: one
    process, whatever the experiment says.
    """
    settings = experiment.settings
    parallel = Mode(choose_device(settings.device)) if parallel is None else parallel
    set_threads(settings.threads, parallel.local_processes)
    keep_freed_memory()
    torch.use_deterministic_algorithms(settings.deterministic)
    device = parallel.device
    # By default cuDNN takes an algorithm by rule of thumb: here all batches but the last have one shape.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not settings.deterministic
    precision = choose_precision(settings.precision, device)
    source: Dataset = experiment.data.build(**vars(experiment.data_settings))
    dataset = prepare(source, experiment.data_settings, device=device)
    augment = _augmentation(experiment, dataset)
    shape = dataset.train.shape if augment is None else augment.output_shape

    normalize: nn.Module = experiment.normalize.build(input_shape=dataset.train.shape).to(precision.dtype)
    if normalization is None:
        kind = f"{experiment.normalize.target.__qualname__} {experiment.normalize.arguments} {precision.dtype}"
        fit(normalize, dataset, count=experiment.data_settings.statistics_samples, kind=kind)
    else:
        normalize.load_state_dict(normalization)
    normalize = normalize.to(device)
    _check_normalization(experiment, normalize, shape)

    module = _model(experiment, dataset, normalize, shape)
    convolves = len(shape) == 3 and any(isinstance(m, nn.Conv2d) for m in module.modules())
    wanted = settings.channels_last
    memory_format = torch.channels_last if (convolves if wanted == "auto" else wanted) else torch.contiguous_format
    module = module.to(device=device, dtype=precision.dtype)
    if convolves:
        module = module.to(memory_format=memory_format)
    loss: nn.Module = experiment.loss.build(classes=None if dataset.classes is None else len(dataset.classes))
    uncompiled = speed.compiles(experiment, parallel, module, shape, len(dataset.train))
    freeze(module, experiment.grouping)
    model = parallel.place(module, shape)
    return Workload(
        experiment=experiment,
        parallel=parallel,
        precision=precision,
        dataset=dataset,
        normalize=normalize,
        module=module,
        model=model if uncompiled else torch.compile(model),
        loss=loss.to(device),
        memory_format=memory_format,
        augment=augment,
        uncompiled=uncompiled,
    )


def _check_normalization(experiment: Experiment, normalize: nn.Module, shape: tuple[int, ...]) -> None:
    """Statistics per pixel do not go with an augmentation that gives out windows of another size."""
    try:
        normalize(torch.zeros(1, *shape, device=next(iter(normalize.buffers()), torch.zeros(())).device))
    except RuntimeError:
        raise UserError(
            f"normalize={experiment.normalize.target.__name__}: it has a value for each pixel of the images, and the "
            f"augmentation gives out windows of {shape[1]}x{shape[2]}; use normalize=standardize"
        ) from None


def _augmentation(experiment: Experiment, dataset: Dataset) -> Pipeline | None:
    """None for an empty pipeline, which would still draw from a generator in every step."""
    if experiment.augmentation.arguments.get("operations") == []:
        return None
    classes = None if dataset.classes is None else len(dataset.classes)
    pipeline: Pipeline = experiment.augmentation.build(
        input_shape=dataset.train.shape, classes=classes, train=dataset.train
    )
    return pipeline


def data_facts(workload: Workload) -> dict[str, Any]:
    """What a checkpoint says of the data, so that the model can be used without them: names of the `classes` (None in
    a regression), number of `outputs`, shape of a `sample`, and of the `window` of it that the model sees.
    """
    dataset = workload.dataset
    return {
        "classes": None if dataset.classes is None else list(dataset.classes),
        "outputs": dataset.outputs,
        "sample": list(dataset.train.shape),
        "window": list(dataset.train.shape if workload.augment is None else workload.augment.output_shape),
    }


def _model(experiment: Experiment, dataset: Dataset, normalize: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model with its first weights, made on the CPU so that they are the same on every device."""
    seed = experiment.settings.init_seed
    rng.seed_all(stream(seed, WEIGHTS))
    module: nn.Module = experiment.model.build(input_shape=shape, classes=dataset.outputs)
    runtime: dict[str, Any] = {"model": module, "generator": generator("cpu", seed, SCHEME)}
    if experiment.init.takes("inputs"):
        runtime["inputs"] = _first_inputs(dataset.train, normalize, shape)
    experiment.init.build(**runtime)
    return module


def _first_inputs(samples: Samples, normalize: nn.Module, shape: tuple[int, ...], count: int = 5000) -> Tensor:
    """Normalized training inputs for initializations that look at data, evenly spread over the split."""
    indices = torch.linspace(0, len(samples) - 1, min(count, len(samples))).long()
    device = next(iter(normalize.buffers()), torch.zeros(())).device
    inputs = samples.fetch(indices).to(device)
    if shape != samples.shape:
        inputs, _ = CentreCrop(shape)(inputs, indices)
    normalized: Tensor = normalize(inputs)
    return normalized.float().cpu()


def load_weights(module: nn.Module, path: Path, mode: Mode | None = None) -> list[str]:
    """Starts from the weights of a checkpoint, or of a file with nothing but weights. Returns lines for the user.

    Weights whose name or shape the model does not have (another head, for other classes) are left out and listed.
    `mode`: loads them on all ranks. Raises `UserError` when nothing fits.
    """
    state, own = checkpoint.load_weights(path), module.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if not any(name in fitting for name, _ in module.named_parameters()):
        raise UserError(f"init_from={path}: none of its {len(state)} weights fits this model by name and shape")
    (mode or Mode(torch.device("cpu"))).load_model(module, fitting, strict=False)
    fresh = [name for name in own if name not in fitting]
    unused = [name for name in state if name not in fitting]
    lines = [f"weights from {path}: {len(fitting)} of {len(own)} tensors loaded"]
    if fresh:
        lines.append(f"  not in the file, or of another shape, so freshly initialized: {', '.join(fresh)}")
    if unused:
        lines.append(f"  in the file and not used: {', '.join(unused)}")
    return lines


_EVALUATED_AT_ONCE = 1024  # samples on a GPU at least: smaller batches are bound by launching kernels


def training_batches(workload: Workload) -> Batches:
    experiment, dataset = workload.experiment, workload.dataset
    settings = experiment.settings
    sampler = experiment.sampler.build(
        targets=dataset.train.targets,
        samples=dataset.train,
        batch_size=experiment.data_settings.batch_size,
        seed=stream(settings.order_seed, ORDER),
    )
    drop_last = experiment.data_settings.drop_last
    seed = stream(settings.augmentation_seed, AUGMENTATION)
    augment, share = workload.parallel.shard_augmentation(workload.augment), workload.parallel.batch_shard
    compiled = workload.device.type == "cuda" and not workload.uncompiled
    return Batches(
        dataset.train,
        _delivery(workload, compiled=compiled, recorder=speed.recorder(experiment, workload.device)),
        batch_size=experiment.data_settings.batch_size,
        sampler=sampler,
        drop_last=drop_last,
        augment=augment,
        seed=seed,
        share=share,
    )


def evaluation_batches(workload: Workload, samples: Samples, *, shared: bool = True) -> Batches:
    """The samples as they are, or their centre where the training sees a smaller window of them.

    `shared`: each process has its part of them; else each has all.
    """
    shape = samples.shape if workload.augment is None else workload.augment.output_shape
    share = workload.parallel.evaluation_shard if shared else None
    size = workload.experiment.data_settings.batch_size
    if shared and workload.device.type == "cuda" and workload.dataset.in_memory and size != "full":
        size = max(size, _EVALUATED_AT_ONCE)
    augment = None if shape == samples.shape else CentreCrop(shape)
    return Batches(samples, _delivery(workload), batch_size=size, augment=augment, share=share)


def _delivery(workload: Workload, **acceleration: Any) -> Delivery:
    return Delivery(
        workload.device,
        in_memory=workload.dataset.in_memory,
        workers=workload.experiment.data_settings.workers,
        normalize=workload.normalize,
        memory_format=workload.memory_format,
        dtype=workload.precision.dtype,
        **acceleration,
    )


# -- where processes and samplers set conditions


_SHARDED_FROM = 100_000_000  # parameters: one process gathers and writes fewer in no time


def checkpoint_writer(workload: Workload) -> ShardWriter | None:
    """Returns what writes the shards of all ranks; None: the main rank writes everything. Raises `UserError`."""
    sharded, mode = workload.experiment.settings.checkpoint.sharded, workload.parallel
    writer = mode.checkpoint_writer()
    if writer is None:
        if sharded is True:
            why = "one process has it all" if mode.processes == 1 else f"parallel={mode.name} writes one file"
            raise UserError(
                f"checkpoint.sharded=true: {why}; use parallel=fsdp with several processes, or checkpoint.sharded=auto"
            )
        return None
    if sharded == "auto":
        sharded = sum(p.numel() for p in workload.module.parameters()) >= _SHARDED_FROM
    return writer if sharded else None


def loss_aware_sampler(workload: Workload, batches: Batches) -> LossAwareSampler | None:
    """Returns the sampler of `batches` where its order follows the samples' losses. Raises `UserError`."""
    sampler, experiment, mode = batches.sampler, workload.experiment, workload.parallel
    if not isinstance(sampler, LossAwareSampler):
        return None
    name = experiment.sampler.target.__name__
    if not mode.supports_loss_aware_samplers:
        raise UserError(
            f"sampler={name}: its order follows the samples' losses, which processes of parallel={mode.name} do not "
            "tell each other; use parallel=ddp or another sampler"
        )
    if experiment.settings.on_divergence == "skip":
        raise UserError(
            f"on_divergence=skip: sampler={name} learns from the losses of every update; "
            "use on_divergence=rollback or another sampler"
        )
    sampler.maximum = mode.maximum_over_ranks
    return sampler
