"""Builds what training and testing share: data, normalization, model, loss and parallel mode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dlopt._version import __version__
from dlopt.adapt import none as no_adapters
from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import UserError
from dlopt.basics.random import generator, stream
from dlopt.config.resuming import differences
from dlopt.config.run_config import RunConfig
from dlopt.config.validation_sets import KEY
from dlopt.data.batches import Batches
from dlopt.data.identity import difference
from dlopt.data.normalization import Nothing, fit
from dlopt.data.samplers import ClassBalanced, Sampler
from dlopt.data.samples import Dataset, Samples
from dlopt.data.settings import SPLITS
from dlopt.init import WidthGrowth
from dlopt.losses import Distillation, Weighted
from dlopt.machine.device import choose_device, set_deterministic
from dlopt.machine.memory import keep_freed_memory
from dlopt.machine.threads import set_threads
from dlopt.machine.world import current
from dlopt.optim.parameters import freeze
from dlopt.parallel.empty_shards import accept_empty_batches
from dlopt.parallel.mode import Mode, Placed
from dlopt.training import rng
from dlopt.training.builders import speed
from dlopt.training.builders.adapter_check import check_adapters
from dlopt.training.builders.dataset import prepare_data, read_validation_sets
from dlopt.training.builders.further import WEIGHT, named_tensors, names_of, require_further, sample_weights
from dlopt.training.builders.layer_order import layer_order
from dlopt.training.builders.model_check import (
    accepts_an_empty_batch,
    build_module,
    check_memory,
    check_outputs,
    has_convolutions,
    uses_channels_last,
)
from dlopt.training.builders.mup import width_growth
from dlopt.training.builders.phases import CpuModel, Inputs, WholeModel
from dlopt.training.builders.precision import choose_precision
from dlopt.training.builders.recompute import recompute, repeated_blocks
from dlopt.training.checkpoint.content import Checkpoint, blamed
from dlopt.training.checkpoint.weights import match_weights, other_class
from dlopt.training.micro_loss import Network
from dlopt.training.throughput import Throughput


@dataclass(kw_only=True)
class Workload(WholeModel):
    """Data, normalization, model and loss of a config, on their device."""

    placed: Placed
    model: Callable[[Tensor], Tensor]  # calls the module: wrapped by the parallel mode, compiled
    validation_sets: Mapping[str, Dataset] = field(default_factory=dict)  # see `with_validation_sets`
    notes: Sequence[str] = ()  # about its parts; the data's notes are separate
    statistics_batches: Batches | None = None  # training split, for norm_statistics=exact
    opened: WeakSet[Batches] = field(default_factory=WeakSet)  # they may have worker processes

    @property
    def growth(self) -> WidthGrowth | None:
        """The weights that grow with the width, if the initialization (muP) scales them; else None."""
        init = self.run_config.init
        if not (init.takes("growth") and init.takes("base_width")):
            return None
        return width_growth(self.run_config.model, self.task.model_arguments(self.shape))

    @property
    def _unfrozen_flops(self) -> float | None:
        # The backward pass of frozen layers computes less than `flops` counts.
        return self.flops if all(parameter.requires_grad for parameter in self.module.parameters()) else None

    @property
    def throughput(self) -> Throughput:
        return Throughput.on(self.precision, self.task.tokens, self._unfrozen_flops, self.parallel.ranks.processes)

    @property
    def computed_flops(self) -> float | None:
        """`flops` if an update computes exactly these: no frozen layers, recomputed activations or teacher."""
        recomputes = self.run_config.settings.activation_checkpointing != "none"
        freezes = any(rule.horizon is not None for rule in self.run_config.grouping.groups)
        return None if freezes or recomputes or isinstance(self.loss, Distillation) else self._unfrozen_flops

    @cached_property
    def weights(self) -> Tensor | None:
        """The weights of the training samples in the loss, see `sample_weights`. Raises `UserError`."""
        return sample_weights(self)

    @cached_property
    def further(self) -> Mapping[str, Tensor]:
        """The tensors of the training samples that the loss of an update reads, by name. Raises `UserError`."""
        return named_tensors(self) | ({} if self.weights is None else {WEIGHT: self.weights})

    @property
    def network(self) -> Network:
        setting = self.run_config.settings.compile
        if self.task.calls_model:
            advice = None
            if not self.compile_obstacle:
                advice = f"compile={setting}".lower(), "use compile=false"
            elif self.parallel.sharding.kind != "replicated":
                advice = f"parallel={self.parallel.name}", "use parallel=ddp, which supports second derivatives"
            return Network(self.module, self.placed.model, self.loss, task_loss=cast(Any, self.model), advice=advice)
        loss, further = self.loss, self.loss.further if isinstance(self.loss, Distillation) else None
        if self.further:
            loss, further = loss if self.weights is None else Weighted(loss), lambda batch: batch.further
        network = Network(self.module, self.model, loss, further)
        if self.compile_obstacle:
            return network
        compile = partial(speed.compiled, setting=setting)
        if self.parallel.ranks.processes == 1 and setting != "blocks":
            return replace(network, model=self.placed.model, compile=compile)
        # Without the model: its blocks are compiled alone, or it is compiled as a whole with the mode's wrapper, which
        # communicates in forward and backward.
        return replace(network, loss=compile(loss))

    def close(self) -> None:
        """Ends the worker processes of all batches."""
        for batches in list(self.opened):
            batches.close()

    def load(self, checkpoint: Checkpoint) -> None:
        """Loads the evaluated weights of a checkpoint. All ranks call this with the same checkpoint."""
        self.parallel.sharding.load_model(self.module, checkpoint.evaluated_weights)  # the module has the adapters

    def with_lr(self, lr: float) -> "Workload":
        """Returns a copy with a learning rate in place of optimizer.lr=auto."""
        optimizer = self.run_config.optimizer.partial(lr=lr)
        return replace(self, run_config=replace(self.run_config, optimizer=optimizer, auto_lr=False))


def build_mode(run_config: RunConfig) -> Mode:
    """Builds the parallel mode and joins its process group. Raises `UserError`."""
    settings, device = run_config.settings, choose_device(run_config.settings.device)
    mode: Mode = run_config.parallel.build(
        device=device,
        accumulate=settings.micro_batches,
        batch_size=run_config.data_settings.batch_size,
        precision=choose_precision(settings.precision, device).name,
        threads=settings.threads,
    )
    world = current()
    if world is not None and mode.ranks.processes == 1:
        raise UserError(
            f"parallel={mode.name}: {world.launcher} started {world.size} processes, which would train the same model; "
            "use parallel=ddp, or start one process"
        )
    return mode


def build_workload(
    run_config: RunConfig,
    saved: Checkpoint | None = None,
    *,
    parallel: Mode | None = None,
    identified: Sequence[str] = (),
    tests: bool = False,
) -> Workload:
    """Loads the data and builds normalization, model and loss. Raises `UserError`.

    Args:
        saved: a checkpoint with the normalization and the tokenizer; None to compute them on the training split.
        parallel: see `build_mode`; None for one process.
        identified: the splits whose content is identified, see `dlopt.data.identity`; empty for none. Several ranks
            identify all of them, by default, and compare.
        tests: the workload is for a test of `saved`, also on other data than those of its run.
    """
    mode = Mode(choose_device(run_config.settings.device)) if parallel is None else parallel
    inputs = _read_inputs(run_config, saved, mode, identified, tests=tests)
    model = _to_device(_build_on_cpu(inputs, is_new=saved is None))
    placed = mode.place(model.module, model.shape)
    return Workload(**vars(model), placed=placed, model=_compiled(model, placed))


def _read_inputs(
    run_config: RunConfig, saved: Checkpoint | None, parallel: Mode, identified: Sequence[str], *, tests: bool
) -> Inputs:
    settings, ranks, is_on_gpu = run_config.settings, parallel.ranks, parallel.device.type == "cuda"

    # The machine: threads, memory and kernels of this process.
    set_threads(settings.threads, ranks.local_processes)
    keep_freed_memory()
    set_deterministic(settings.deterministic)
    # Measuring cuDNN's algorithms pays off: all batches but the last of an epoch have the same shape.
    torch.backends.cudnn.benchmark = is_on_gpu and not settings.deterministic
    precision = choose_precision(settings.precision, parallel.device)

    # Data and augmentation. All ranks must run the same version and config, and read the same data.
    identified = identified or (SPLITS if ranks.processes > 1 else ())
    dataset, augment = prepare_data(run_config, saved, parallel, identified, tests=tests)
    facts = {**run_config.config, "dlopt": __version__, "torch": str(torch.__version__)}
    ranks.refuse_difference("config", facts, _other_key)
    data = run_config.config["data"]
    place = next((f"data.{key}={data[key]}" for key in ("file", "root") if data.get(key)), run_config.data.choice)
    ranks.refuse_difference(place, dataset.identity, difference)

    # Normalization: with the statistics of the training split, or of the checkpoint.
    component = run_config.normalize
    normalize = component.build_as(nn.Module, input_shape=dataset.train.shape).to(precision.data_dtype)
    if saved is None:
        kind = f"{component.target.__qualname__} {component.arguments} {precision.data_dtype}"
        fit(normalize, dataset, count=run_config.data_settings.statistics_samples, kind=kind)
    else:
        with blamed("the checkpoint"):
            normalize.load_state_dict(saved.normalize)
    inputs = Inputs(
        run_config=run_config,
        parallel=parallel,
        precision=precision,
        dataset=dataset,
        augment=augment,
        normalize=normalize.to(parallel.device),
    )
    if len(inputs.shape) == 3:
        try:
            normalize(torch.zeros(1, *inputs.shape, device=_device_of(normalize)))
        except RuntimeError:
            raise UserError(
                f"{component.choice}: its statistics are per pixel, but the augmentation changes the image size to "
                f"{inputs.shape[1]}x{inputs.shape[2]}; use normalize=standardize"
            ) from None
    return inputs


def _other_key(first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Describes the first key in which two configs differ; None if none does."""
    return next((f"{key}={new}, not {old}" for key, (old, new) in differences(first, other).items()), None)


def _device_of(normalize: nn.Module) -> torch.device:
    return next(iter(normalize.buffers()), torch.zeros(())).device


def _is_alone_on_cpu(inputs: Inputs) -> bool:
    return inputs.device.type == "cpu" and inputs.parallel.ranks.processes == 1


def _build_on_cpu(inputs: Inputs, *, is_new: bool) -> CpuModel:
    """Builds the model, if it fits into memory, and checks that it fits the task, its inputs and the mode."""
    run_config, task, shape = inputs.run_config, inputs.task, inputs.shape
    freezes = any(rule.freeze for rule in run_config.grouping.groups) or run_config.adapt.target is not no_adapters
    has_gradients = is_new and _is_alone_on_cpu(inputs) and not freezes
    check_memory(run_config.model, task.model_arguments(shape), has_gradients=has_gradients)
    model = CpuModel(**vars(inputs), module=build_model(inputs))
    if run_config.model.target.__module__.startswith("dlopt."):
        task.check_model(run_config.model.choice, model.module)
    task.check_inputs(
        normalize=None if run_config.normalize.target is Nothing else run_config.normalize.choice,
        augments=run_config.augmentation.arguments.get("operations") != [],
    )
    if is_new and not task.calls_model:  # a checkpoint can be used although its model has other outputs
        check_outputs(model)
    model.uses = layer_order(model)
    if inputs.parallel.ranks.processes > 1 and not task.calls_model and not accepts_an_empty_batch(model):
        accept_empty_batches(model.module, run_config.data_settings.batch_size)
    return model


def build_model(inputs: Inputs) -> nn.Module:
    """Builds and initializes the model on the CPU, for the same initial weights on every device."""
    run_config, samples, shape = inputs.run_config, inputs.dataset.train, inputs.shape
    seed, init, arguments = run_config.settings.init_seed, run_config.init, inputs.task.model_arguments(shape)
    rng.seed_all(stream(seed, rng.WEIGHTS))
    module = build_module(run_config.model, arguments)
    runtime: dict[str, Any] = {"model": module, "generator": generator("cpu", seed, rng.SCHEME)}
    if init.takes("inputs"):  # up to 5000 training inputs, evenly spaced
        inputs.task.check_measured(init.choice)
        indices = torch.linspace(0, len(samples) - 1, min(5000, len(samples))).long()
        measured = samples.fetch(indices).to(_device_of(inputs.normalize))
        if shape != samples.shape:
            measured, _ = CentreCrop(shape)(measured, indices)
        runtime["inputs"] = inputs.normalize(measured).float().cpu()
    if init.takes("growth"):
        runtime["growth"] = width_growth(run_config.model, arguments)
    init.build(**runtime)
    adapters = {"generator": generator("cpu", seed, rng.ADAPTERS)} if run_config.adapt.takes("generator") else {}
    run_config.adapt.build(model=module, **adapters)
    return module


def _to_device(model: CpuModel) -> WholeModel:
    """Gives the model its data type and memory format; builds its loss; freezes and recomputes layers."""
    run_config, precision, dataset, shape = model.run_config, model.precision, model.dataset, model.shape
    settings, samples = run_config.settings, dataset.train
    memory_format = torch.channels_last if uses_channels_last(model) else torch.contiguous_format
    module = precision.place(model.module)
    if has_convolutions(model):
        module = module.to(memory_format=memory_format)
    check_adapters(run_config, module, precision, shape, model.task)
    loss = build_loss(run_config, dataset, module)
    if (
        settings.threads == "auto"
        and _is_alone_on_cpu(model)
        and speed.prefers_one_thread(module, shape, batch_size(run_config, samples) // settings.micro_batches)
    ):
        set_threads(1)
    # In milliseconds, beside 1 s of imports that the optimizer needs, too.
    flops = None if model.task.calls_model else speed.training_flops(module, shape)
    epoch = len(build_sampler(run_config, samples))
    obstacle = speed.compile_obstacle(run_config, model.parallel, flops, epoch)
    already_frozen = freeze(module, run_config.grouping)
    recompute(module, settings.activation_checkpointing, choice=run_config.model.choice)
    return WholeModel(
        **{**vars(model), "module": module},
        loss=loss if model.task.calls_model else precision.place_data(loss),
        memory_format=memory_format,
        already_frozen=already_frozen,
        flops=flops,
        compile_obstacle=obstacle,
    )


def _compiled(model: WholeModel, placed: Placed) -> Callable[[Tensor], Tensor]:
    """Returns what calls the placed model. Raises `UserError` for compile=blocks without any."""
    call = model.parallel.around(placed, model.loss) if model.task.calls_model else placed.model
    setting = model.run_config.settings.compile
    if model.compile_obstacle:
        return call
    if setting != "blocks":
        return speed.compiled(call, setting)
    if not (blocks := repeated_blocks(model.module)):
        raise UserError(f"compile=blocks: {model.run_config.model.choice} has no repeated blocks; use compile=true")
    return speed.with_compiled_blocks(call, blocks)


def with_validation_sets(workload: Workload, *, identifies: bool = False) -> Workload:
    """Returns the workload with its named validation sets, which only training and `dlopt eval` read.

    `identifies`: see `read_validation_sets`. Raises `UserError`.
    """
    mode = workload.parallel
    identifies |= mode.ranks.processes > 1
    sets = read_validation_sets(workload.run_config, workload.dataset, mode, identifies=identifies)
    mode.ranks.refuse_difference(KEY, _identities(sets), difference)
    require_further(workload.run_config.loss, workload.loss, {f"{KEY}.{name}": each.val for name, each in sets.items()})
    return replace(workload, validation_sets=sets)


def _identities(sets: Mapping[str, Dataset]) -> dict[str, Any]:
    return {name: each.identity["train"] for name, each in sets.items() if each.identity is not None}


def build_loss(run_config: RunConfig, dataset: Dataset, module: nn.Module) -> nn.Module:
    """Builds the loss. A loss of another package raises `UserError` if its result is no mean or has no gradient."""
    component, task, targets = run_config.loss, dataset.task, dataset.train.targets
    if task.calls_model:
        return task.own_loss(module)
    sampler = run_config.sampler
    is_own_sampler = not sampler.target.__module__.startswith("dlopt.")
    if "balanced" in component.arguments.values() and (sampler.target is ClassBalanced or is_own_sampler):
        # Count the targets in the proportions in which they are drawn: the first draws of `ClassBalanced` have each
        # class once; of the user's own sampler, the first epoch counts.
        order = build_sampler(run_config, dataset.train).order(0)
        targets = targets[order[: len(targets.unique())] if sampler.is_a(ClassBalanced) else order]
    balance = task.balance(component.arguments, targets)
    loss = component.build_as(nn.Module, **task.target_arguments, **balance)
    names = names_of(loss)
    call = partial(loss.forward, **dict.fromkeys(names)) if names else loss.forward
    component.require_call(call, "forward(outputs, targets)")
    require_further(component, loss, {"training": dataset.train, "validation": dataset.val, "test": dataset.test})

    def check(loss: nn.Module, inputs: tuple[Any, ...], value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim:
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{component.choice}: returns {found}; must return the mean over the samples, one number")
        if inputs[0].requires_grad and not value.requires_grad:
            raise UserError(f"{component.choice}: its result has no gradient; do not detach the outputs")

    def check_passed(loss: nn.Module, inputs: tuple[Any, ...], further: Mapping[str, Any]) -> None:
        if lacking := [name for name in names if name not in further]:
            raise UserError(f"{component.choice}: reads {', '.join(lacking)}, which only training and evaluation pass")

    if not component.target.__module__.startswith("dlopt."):
        loss.register_forward_hook(check)
    if names:
        loss.register_forward_pre_hook(check_passed, with_kwargs=True)
    return loss


def build_sampler(run_config: RunConfig, samples: Samples) -> Sampler:
    """Builds the sampler of the training `samples`."""
    sampler = run_config.sampler.build_as(
        Sampler,  # type: ignore[type-abstract]
        targets=samples.targets,
        samples=samples,
        batch_size=run_config.data_settings.batch_size,
        seed=stream(run_config.settings.order_seed, rng.ORDER),
    )
    run_config.sampler.require_call(sampler.order, "order(epoch)")
    return sampler


def batch_size(run_config: RunConfig, samples: Samples) -> int:
    """Returns the samples of a training batch as they are drawn: all of an epoch if data.batch_size is larger."""
    size, drawn = run_config.data_settings.batch_size, len(build_sampler(run_config, samples))
    return drawn if size == "full" else min(size, drawn)


def load_weights(
    module: nn.Module,
    path: Path,
    mode: Mode | None = None,
    *,
    complete: bool = False,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Initializes the model from a checkpoint, or from a file of weights (see `match_weights`). Returns lines to log.

    Skips and lists weights whose name or shape differs (the head, for other classes). `mode`: loads on all ranks.
    `classes`: of the data; others in a checkpoint are reported, or refused with `complete`. Raises `UserError` if no
    weight matches, or with `complete` if one is missing.
    """
    match = match_weights(path, module)
    mode = mode or Mode(torch.device("cpu"))
    mode.ranks.refuse_other_file("init_from", path)
    other = other_class(match.classes, classes)
    if complete and other is not None:
        raise UserError(f"init_from={path}: trained with other classes than those of the data: {other}")
    if complete and match.missing:
        raise UserError(
            f"init_from={path}: an untrained part cannot be tested; the file lacks, or has with another shape: "
            f"{', '.join(match.missing)}"
        )
    mode.sharding.load_model(module, match.weights, strict=False)
    if other is not None and len(match.classes or ()) == len(classes or ()):  # otherwise the last layer does not fit
        warning = f"  warning: the last layer, too, although it was trained with other classes: {other}"
        return [*match.lines, warning]
    return match.lines


def data_spec(workload: Workload) -> dict[str, Any]:
    """Returns the facts about the data that a checkpoint stores, so that its model can be used without the data.

    `sample`: shape of a sample; `window`: shape of the model's input (a crop of an image, the first tokens of a text);
    `tokenizer`: the content of its tokenizer.json; `identity`: on rank 0.
    """
    dataset, names = workload.dataset, workload.class_names
    spec: dict[str, Any] = {} if dataset.tokenizer is None else {"tokenizer": dataset.tokenizer.description}
    if dataset.columns is not None:
        spec["columns"] = dataset.columns.saved
    identity = dataset.identity
    if identity is not None:
        of_sets = _identities(workload.validation_sets)
        identity = {**identity, **{f"{KEY}.{name}": each for name, each in of_sets.items()}}
    return {
        **spec,
        "classes": None if names is None else list(names),
        "task": dataset.task.saved,
        "sample": list(dataset.train.shape),
        "window": list(workload.shape),
        "identity": identity,
    }


def refuse_other_data(workload: Workload, checkpoint: Checkpoint) -> None:
    """Raises `UserError` on all ranks if the data differ from those of the checkpoint's run.

    Data may differ under equal configs: files may have changed, and `data.root` may name another folder.
    """
    saved, current = checkpoint.data, data_spec(workload)
    for name, what in (("classes", "classes"), ("sample", "samples of the shape")):
        if saved[name] != current[name]:
            raise UserError(
                f"resume: the run was trained on other data, with {what} {saved[name]}, now {current[name]}; see "
                "data.root"
            )
    # Only rank 0 identifies the data; a difference must end all ranks.
    found = workload.parallel.ranks.broadcast(difference(checkpoint.identity, current["identity"]))
    if found is not None:
        raise UserError(
            f"resume: the data have changed since the checkpoint was written: {found}; restore them, or start a new "
            "run with init_from=CHECKPOINT, which loads the weights only"
        )
