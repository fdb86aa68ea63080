"""Building the objects of an experiment: what training and testing have in common, and what only training needs."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.augment import Pipeline
from dlopt.augment.crop import CentreCrop
from dlopt.config.experiment import Experiment
from dlopt.data import statistics
from dlopt.data.batches import Batches
from dlopt.data.samples import Dataset, Samples
from dlopt.data.splits import prepare
from dlopt.engine import checkpoint, rng
from dlopt.engine.precision import Precision, choose_precision
from dlopt.engine.statistics import exact_statistics
from dlopt.errors import UserError
from dlopt.parallel.shares import cut
from dlopt.parallel.single import Single
from dlopt.parallel.world import current
from dlopt.parameters import parameter_groups
from dlopt.processor import keep_freed_memory, set_threads
from dlopt.random import generator, stream

# Streams: what is drawn for one purpose tells nothing about another, also where the seeds are equal.
_WEIGHTS, _SCHEME, _ORDER, _AUGMENTATION, DROPOUT = range(11, 16)

SMALL_NORM_BATCH = 8  # samples per device below which batch statistics are too noisy (Wu & He 2018, figure 1)


@dataclass
class Setup:
    """Data, normalization and model on their device."""

    experiment: Experiment
    parallel: Any
    precision: Precision
    dataset: Dataset
    normalize: nn.Module
    module: nn.Module
    model: Callable[[Tensor], Tensor]  # the module as it is called: placed, compiled
    loss: nn.Module
    memory_format: torch.memory_format
    augment: Pipeline | None
    statistics_batches: Batches | None = None  # the training split, where exact batch-norm statistics are wanted

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def classify(self) -> bool:
        return self.dataset.classes is not None


def choose_device(name: str) -> torch.device:
    """`auto` takes the accelerator that torch finds, else the CPU."""
    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None and found.type in ("cuda", "mps") else torch.device("cpu")


def parallel_of(experiment: Experiment) -> Any:
    """The mode of parallelism, in whose group this process then is. Raises `UserError`."""
    settings = experiment.settings
    device = choose_device(settings.device)
    mode = experiment.parallel.build(
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


def set_up(experiment: Experiment, normalization: Mapping[str, Any] | None = None, *, parallel: Any = None) -> Setup:
    """Reads the data and builds the model.

    `normalization`: a checkpoint's; None: computed on the training split. `parallel`: see `parallel_of`; None: one
    process, whatever the experiment says.
    """
    settings = experiment.settings
    parallel = Single(choose_device(settings.device)) if parallel is None else parallel
    set_threads(settings.threads, parallel.local_processes)
    keep_freed_memory()
    torch.use_deterministic_algorithms(settings.deterministic)
    device = parallel.device
    precision = choose_precision(settings.precision, device)
    source: Dataset = experiment.data.build(**vars(experiment.data_settings))
    dataset = prepare(source, experiment.data_settings, device=device)
    augment = _augmentation(experiment, dataset)
    shape = dataset.train.shape if augment is None else augment.output_shape

    normalize: nn.Module = experiment.normalize.build(input_shape=dataset.train.shape).to(precision.dtype)
    if normalization is None:
        kind = f"{experiment.normalize.target.__qualname__} {experiment.normalize.arguments} {precision.dtype}"
        statistics.fit(normalize, dataset, count=experiment.data_settings.statistics_samples, kind=kind)
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
    compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
    if compiled and not parallel.compiles:
        if settings.compile != "auto":
            raise UserError(f"compile=true: not with parallel={parallel.name}, whose processes meet between the layers")
        compiled = False
    model = parallel.place(module, shape)
    return Setup(
        experiment=experiment,
        parallel=parallel,
        precision=precision,
        dataset=dataset,
        normalize=normalize,
        module=module,
        model=torch.compile(model) if compiled else model,
        loss=loss.to(device),
        memory_format=memory_format,
        augment=augment,
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


def outputs_of(dataset: Dataset) -> int:
    """The number of outputs: classes, or numbers per target in a regression."""
    if dataset.classes is not None:
        return len(dataset.classes)
    targets = dataset.train.targets
    return 1 if targets.ndim == 1 else targets.shape[1]


def data_facts(setup: Setup) -> dict[str, Any]:
    """What a checkpoint says of the data, so that the model can be used without them: names of the `classes` (None in
    a regression), number of `outputs`, shape of a `sample`, and of the `window` of it that the model sees.
    """
    dataset = setup.dataset
    return {
        "classes": None if dataset.classes is None else list(dataset.classes),
        "outputs": outputs_of(dataset),
        "sample": list(dataset.train.shape),
        "window": list(dataset.train.shape if setup.augment is None else setup.augment.output_shape),
    }


def _model(experiment: Experiment, dataset: Dataset, normalize: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model with its first weights, made on the CPU so that they are the same on every device."""
    seed = experiment.settings.init_seed
    rng.seed_all(stream(seed, _WEIGHTS))
    module: nn.Module = experiment.model.build(input_shape=shape, classes=outputs_of(dataset))
    runtime: dict[str, Any] = {"model": module, "generator": generator("cpu", seed, _SCHEME)}
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


def training_batches(setup: Setup) -> Batches:
    experiment, dataset = setup.experiment, setup.dataset
    settings = experiment.settings
    sampler = experiment.sampler.build(
        targets=dataset.train.targets,
        samples=dataset.train,
        batch_size=experiment.data_settings.batch_size,
        seed=stream(settings.order_seed, _ORDER),
    )
    drop_last = experiment.data_settings.drop_last
    seed = stream(settings.augmentation_seed, _AUGMENTATION)
    augment, share = setup.parallel.augmented(setup.augment), setup.parallel.share
    return _batches(setup, dataset.train, sampler=sampler, augment=augment, seed=seed, drop_last=drop_last, share=share)


def evaluation_batches(setup: Setup, samples: Samples, *, shared: bool = True) -> Batches:
    """The samples as they are, or their centre where the training sees a smaller window of them.

    `shared`: each process has its part of them; else each has all.
    """
    shape = samples.shape if setup.augment is None else setup.augment.output_shape
    share = setup.parallel.share_evaluation if shared else None
    return _batches(setup, samples, augment=None if shape == samples.shape else CentreCrop(shape), share=share)


def _batches(setup: Setup, samples: Samples, **training: Any) -> Batches:
    data = setup.experiment.data_settings
    return Batches(
        samples,
        batch_size=data.batch_size,
        device=setup.device,
        workers=data.workers,
        in_memory=setup.dataset.in_memory,
        normalize=setup.normalize,
        memory_format=setup.memory_format,
        dtype=setup.precision.dtype,
        **training,
    )


def optimizer_of(setup: Setup) -> torch.optim.Optimizer:
    """The optimizer over the model's parameter groups; its learning rate follows the batch size where that is asked."""
    experiment, settings = setup.experiment, setup.experiment.settings
    component = experiment.optimizer
    if experiment.auto_lr:
        raise UserError("optimizer.lr=auto: only `dlopt train` looks for the learning rate; type a number here")
    if settings.scale_lr != "none":
        component = component.partial(lr=component.arguments["lr"] * _lr_scale(experiment, len(setup.dataset.train)))
    groups = parameter_groups(
        setup.module, experiment.grouping, component.arguments, decay_norm_and_bias=settings.decay_norm_and_bias
    )
    try:
        optimizer: torch.optim.Optimizer = component.build(params=groups)
    except ValueError as error:  # a class that is not ours has a range of its own, or takes one group only
        raise UserError(f"optimizer={component.target.__name__}: {error}") from None
    check_optimizer(setup.parallel, optimizer)
    return optimizer


_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon")  # of torch.optim, which does not say so


def check_optimizer(parallel: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises `UserError` where an update needs more of the model at once than a rank has of it."""
    kind = type(optimizer)
    name = f"parallel={parallel.name}: {kind.__name__}"
    others = "use parallel=ddp or an optimizer that works element by element (sgd, adamw, ...)"
    is_torchs = kind.__module__.startswith("torch.")
    alone = getattr(kind, "elementwise", not (is_torchs and kind.__name__ in _NOT_ELEMENTWISE))
    if parallel.splits == "tensors" and not alone:
        raise UserError(f"{name} needs whole tensors or the whole model for an update, and ranks have parts; {others}")
    many = getattr(optimizer, "evaluations", "many" if isinstance(optimizer, torch.optim.LBFGS) else "once") == "many"
    if parallel.splits == "layers" and many:
        raise UserError(f"{name} looks at all layers at once for an update, and each rank has some of them; {others}")


def _lr_scale(experiment: Experiment, count: int) -> float:
    size = experiment.data_settings.batch_size
    ratio = (count if size == "full" else size) / experiment.settings.scale_lr_reference
    return math.sqrt(ratio) if experiment.settings.scale_lr == "sqrt" else ratio


def evaluations(setup: Setup, optimizer: torch.optim.Optimizer) -> str:
    """Whether the optimizer evaluates the loss once or many times per update: it says so, or it is torch's L-BFGS."""
    many = isinstance(optimizer, torch.optim.LBFGS)
    declared: str = getattr(optimizer, "evaluations", "many" if many else "once")
    if declared == "many" and setup.precision.name == "fp16":
        raise UserError(
            f"precision=fp16: {type(optimizer).__name__} evaluates the loss several times per update, "
            "which loss scaling cannot follow; use precision=bf16 or fp32"
        )
    return declared


def _smallest_part(count: int, batch_size: int, accumulate: int, drop_last: bool) -> int:
    """Samples of the smallest micro-batch of an epoch."""
    full, rest = divmod(count, batch_size)
    sizes = ([batch_size] if full else []) + ([rest] if rest and not (drop_last and full) else [])
    return min(size // min(accumulate, size) for size in sizes)


def check_single_values(setup: Setup) -> None:
    """Refuses batch norm over one value per channel: its output would be the shift, whatever the input."""
    data = setup.experiment.data_settings
    count = len(setup.dataset.train)
    batch_size = count if data.batch_size == "full" else min(data.batch_size, count)
    cuts = max(setup.experiment.settings.accumulate, setup.parallel.in_flight)
    smallest = _smallest_part(count, batch_size, cuts, data.drop_last)
    shares = setup.parallel.norm_shares
    if shares > 1:
        parts = [cut(start, start + smallest, rank, shares) for rank in range(shares) for start in (0, 1)]
        smallest = min(part.stop - part.start for part in parts)
        if smallest == 0 and any(isinstance(m, _BatchNorm) for m in setup.module.modules()):
            raise UserError(
                f"data.batch_size={data.batch_size}: {count} training samples leave a (micro-)batch of which one of "
                f"{shares} processes has no part, and its batch norm nothing to normalize; use "
                "parallel.sync_batchnorm=true, larger batches, data.drop_last=true, or model.norm=group"
            )
    if smallest > 1:
        return
    single: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                single.append(name)

        return hook

    norms = [(n, m) for n, m in setup.module.named_modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_pre_hook(look(n)) for n, m in norms]
    first = setup.dataset.train.select(torch.tensor([0]))
    inputs, _ = next(iter(evaluation_batches(setup, first, shared=False).epoch(0)))
    was_training = setup.module.training
    setup.module.eval()
    with torch.no_grad():
        setup.model(inputs)
    setup.module.train(was_training)
    for handle in handles:
        handle.remove()
    if single := setup.parallel.everyones(single):  # a rank may have some of the layers
        raise UserError(
            f"data.batch_size={data.batch_size}: {count} training samples leave a (micro-)batch of one, "
            f"which gives the batch norm {single[0]} one value per channel; "
            "use larger batches, data.drop_last=true, model.norm=group"
            + (", or parallel.sync_batchnorm=true" if setup.parallel.norm_shares > 1 else "")
        )


def norm_statistics(
    setup: Setup, module: nn.Module, model: Callable[[Tensor], Tensor], interruption: object = None
) -> contextlib.AbstractContextManager[None]:
    """The batch-norm statistics with which `module` is evaluated: running ones, or exact ones over the training set.

    What is evaluated after an `interruption` on the way is worth nothing.
    """
    if setup.experiment.settings.norm_statistics == "running":
        return contextlib.nullcontext()
    if setup.statistics_batches is None:
        setup.statistics_batches = evaluation_batches(setup, setup.dataset.train, shared=False)  # of whole batches
    batches = itertools.takewhile(lambda _: not interruption, setup.statistics_batches.epoch(0))
    return exact_statistics(module, model, batches)


def warnings(setup: Setup) -> list[str]:
    """What the user should know of the data, and what is allowed and yet seldom wanted."""
    data, settings = setup.experiment.data_settings, setup.experiment.settings
    notes = [*setup.dataset.notes, *setup.parallel.notes]
    count = len(setup.dataset.train)
    size = count if data.batch_size == "full" else min(data.batch_size, count)
    device_batch = size // setup.parallel.norm_shares // max(settings.accumulate, setup.parallel.in_flight)
    if device_batch < SMALL_NORM_BATCH and any(isinstance(m, _BatchNorm) for m in setup.module.modules()):
        notes.append(
            f"warning: batch norm over {device_batch} samples per device is noisy (fewer than {SMALL_NORM_BATCH}): "
            "use model.norm=group, a larger data.batch_size, or, with several devices, parallel.sync_batchnorm=true"
        )
    return notes


def load_weights(module: nn.Module, path: Path, load: Callable[..., None] = Single.load_model) -> list[str]:
    """Starts from the weights of a checkpoint, or of a file with nothing but weights. Returns lines for the user.

    Weights whose name or shape the model does not have (another head, for other classes) are left out and listed.
    `load`: a mode's `load_model`. Raises `UserError` when nothing fits.
    """
    state, own = checkpoint.load_weights(path), module.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if not any(name in fitting for name, _ in module.named_parameters()):
        raise UserError(f"init_from={path}: none of its {len(state)} weights fits this model by name and shape")
    load(module, fitting, strict=False)
    fresh = [name for name in own if name not in fitting]
    unused = [name for name in state if name not in fitting]
    lines = [f"weights from {path}: {len(fitting)} of {len(own)} tensors loaded"]
    if fresh:
        lines.append(f"  not in the file, or of another shape, so freshly initialized: {', '.join(fresh)}")
    if unused:
        lines.append(f"  in the file and not used: {', '.join(unused)}")
    return lines
