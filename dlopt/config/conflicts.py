"""Features that a run cannot have at the same time, in one table: `CONFLICTS`.

A row names two features, why they exclude each other, and what to use instead. `refuse_conflicts` reports all conflicts
of a run at once. It is called twice before data are read: before torch is imported, for what values and the names of
dlopt's parts tell, and with the classes of the parts, for all. What depends on the data, the built model or the traits
of the built optimizer is checked where it is known. The page docs/reference/conflicts.md shows the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import UserError
from dlopt.config.parameters import as_typed
from dlopt.config.schema import Component, choice_of, dotted_name
from dlopt.config.settings import GROUPS, Growth, Settings
from dlopt.machine.world import current

if TYPE_CHECKING:
    from dlopt.config.run_config import RunConfig


@dataclass(frozen=True)
class Run:
    """The run to look for features in. `config`: plain values; `parts`: None before torch is imported."""

    settings: Settings
    config: Mapping[str, Any]
    parts: "RunConfig | None" = None

    def value(self, key: str) -> Any:
        """Returns the value of a dotted key; None if the chosen part of the group does not have it."""
        group, _, name = key.partition(".")
        if group not in GROUPS:
            return attrgetter(key)(self.settings)
        part = self.config.get(group)
        return part.get(name) if isinstance(part, Mapping) else None

    def paths(self, group: str) -> list[str]:
        """Returns the dotted name of a part's function or class, and with `parts` those of the bases of the class."""
        if self.parts is None:
            return [str(self.value(f"{group}._target_"))]
        target = getattr(self.parts, group).target
        return [dotted_name(each) for each in getattr(target, "__mro__", [target])]

    def choice(self, group: str) -> str:
        if self.parts is None:
            return f"{group}={choice_of(group, *self.paths(group))}"
        return str(getattr(self.parts, group).choice)


@dataclass(frozen=True)
class Feature:
    """Something that a run may use.

    Attributes:
        name: as the documentation shows it.
        find: returns KEY=VALUE or GROUP=CHOICE of a run that uses it; None if it does not, or if that is not known yet.
    """

    name: str
    find: Callable[[Run], str | None]


@dataclass(frozen=True)
class Conflict:
    """Two features that exclude each other, the reason, and what to use."""

    one: Feature
    other: Feature
    why: str
    use: str

    def refusal(self, run: Run) -> str | None:
        """Returns the message about a run that has both features; else None."""
        one, other = self.one.find(run), self.other.find(run)
        return None if one is None or other is None else f"{one} with {other}: {self.why}; use {self.use}"


def refuse_conflicts(run: Run) -> None:
    """Raises `UserError` with all conflicts of a run, as far as its features are known yet."""
    refusals = [refusal for row in CONFLICTS if (refusal := row.refusal(run)) is not None]
    if len(refusals) > 1:
        raise UserError("\n".join([f"{len(refusals)} conflicts of settings:", *(f"  {each}" for each in refusals)]))
    if refusals:
        raise UserError(refusals[0])


# -- kinds of features


def _valued(key: str, is_used: Callable[[Any], bool], name: str) -> Feature:
    """A key whose value meets a condition."""

    def find(run: Run) -> str | None:
        value = run.value(key)
        return f"{key}={as_typed(value)}" if is_used(value) else None

    return Feature(name, find)


def _set(key: str, *unused: Any) -> Feature:
    """A key with any value but null and those in `unused`."""
    return _valued(key, lambda value: value is not None and value not in unused, key)


def _is(key: str, *values: Any) -> Feature:
    """A key with one of these values."""
    return _valued(key, lambda value: value in values, f"{key}={'|'.join(map(as_typed, values))}")


def _lists(key: str, *values: str) -> Feature:
    """A list with one of these values."""
    return _valued(key, lambda value: any(each in value for each in values), f"{key}=[{'|'.join(values)}]")


def _part(group: str, name: str, is_used: Callable[[Component], object], *known: str) -> Feature:
    """A choice of a group whose class or arguments meet a condition. `known`: dotted names that are known to."""

    def find(run: Run) -> str | None:
        is_known = run.paths(group)[0] in known if run.parts is None else is_used(getattr(run.parts, group))
        return run.choice(group) if is_known else None

    return Feature(name, find)


def _named(group: str, name: str, is_used: Callable[[list[str]], bool]) -> Feature:
    """A choice of a group whose dotted names (`Run.paths`) meet a condition."""
    return Feature(name, lambda run: run.choice(group) if is_used(run.paths(group)) else None)


def _built_by(group: str, name: str, *paths: str) -> Feature:
    """A part of the function or class with one of these dotted names, or of a class derived from it."""
    return _named(group, f"{group}={name}", lambda found: not {*paths}.isdisjoint(found))


def _other_than(group: str, name: str, path: str) -> Feature:
    """Any choice of a group but one."""
    return _named(group, f"{group} other than {name}", lambda found: found[0] != path)


# -- conditions


def splits_model(mode: Component) -> bool:
    """Returns whether a rank of a parallel mode computes only a part of the model.

    Assumed of a mode of the user's own, unless the function that builds it has `splits_model = False`.
    """
    return bool(getattr(mode.target, "splits_model", dotted_name(mode.target) not in (_SINGLE, _DDP, _FSDP)))


def _split(run: Run) -> str | None:
    if run.parts is not None:
        splits = splits_model(run.parts.parallel)
    else:  # what another package's mode does is not known yet
        [path] = run.paths("parallel")
        splits = path.startswith("dlopt.") and path not in (_SINGLE, _DDP, _FSDP)
    return run.choice("parallel") if splits else None


def _in_processes(run: Run) -> str | None:
    """The mode of several processes, as far as the config or the launcher tells their number."""
    if run.paths("parallel")[0] == _SINGLE:
        return None
    processes = run.value("parallel.processes") if (world := current()) is None else world.size
    if not isinstance(processes, int) or processes < 2:
        return None
    return f"{run.choice('parallel')} in {processes} processes"


def _has_rate(optimizer: Component) -> bool:
    """Whether the optimizer has the argument lr (for SAM, its base optimizer)."""
    base = optimizer.arguments.get("base")
    return optimizer.arguments.get("lr") is not None or (isinstance(base, Component) and _has_rate(base))


def _is_schedule_free(optimizer: Component) -> bool:
    from dlopt.optim.traits import is_schedule_free  # imports torch

    return is_schedule_free(optimizer.target)


def _predicts_pixels(loss: Component) -> bool:
    return getattr(loss.target, "predicts_pixels", False)


def _on_cpu(run: Run) -> str | None:
    device = run.settings.device
    if device == "auto" and run.parts is not None:
        import torch

        return None if torch.accelerator.is_available() else "device=auto (no accelerator)"
    return "device=cpu" if device == "cpu" else None


_SINGLE, _DDP = "dlopt.parallel.mode.Mode", "dlopt.parallel.modes.ddp.data_parallel"
_FSDP, _PIPELINE = "dlopt.parallel.modes.fsdp.fully_sharded", "dlopt.parallel.modes.pipeline.pipeline"
_SCHEDULE_FREE = ("dlopt.optim.schedule_free.ScheduleFreeSGD", "dlopt.optim.schedule_free.ScheduleFreeAdamW")
_HARD_EXAMPLES = ("dlopt.data.samplers.HardExamples", "dlopt.data.samplers.hard.HardExamples")

# -- the features: of values

ACCUMULATE = _set("accumulate", 1)
AT_RESTARTS = _is("checkpoint.at_restarts", True)
AUTO_LR = _is("optimizer.lr", "auto")
BALANCED = _is("loss.class_weights", "balanced")
BALANCED_LABELS = _is("loss.pos_weight", "balanced")
BF16_PURE = _is("precision", "bf16_pure")
COMPILE = _set("compile", False, "auto")
COMPILED_GRAPHS = _is("compile", "reduce-overhead", "max-autotune")
CUDA_GRAPHS = _is("cuda_graphs", True)
CURVATURE = _lists("diagnostics", "curvature")
DECAY_WIDTH = _set("decay.width", "none")
DIAGNOSTICS = _set("diagnostics", [])
DIAGNOSTICS_OF_LOSS = _lists("diagnostics", "gradients", "curvature")
DRY_RUN = _set("dry_run", False)
EMA = _set("ema")
EXACT_STATISTICS = _is("norm_statistics", "exact")
EVERY_EPOCHS = _set("evaluate.every_epochs", 1)
EVERY_STEPS = _set("evaluate.every_steps")
FP16 = _is("precision", "fp16")
FULL_BATCH = _is("data.batch_size", "full")
GROWTH = _valued("accumulate", lambda value: isinstance(value, Growth), "accumulate={micro_batches: [...]}")
HALVE = _is("on_out_of_memory", "halve")
HOOKED_DIAGNOSTICS = _lists("diagnostics", "gradients", "activations")
MPS = _is("device", "mps")
NOT_ON_CPU = _is("precision", "fp16", "tf32")
NOT_ON_MPS = _is("precision", "fp64", "tf32", "bf16_pure")
ON_CPU = Feature("device=cpu", _on_cpu)
OWN_METRIC = _valued("evaluate.metrics", lambda names: "." in "".join(names), "evaluate.metrics=[pkg.function]")
PRETRAINED = _set("model.pretrained", False)
RECOMPUTATION = _set("activation_checkpointing", "none")
RECOMPUTED_SEGMENTS = _is("activation_checkpointing", "all")
RESUME = _set("resume")
SCALE_LR = _set("scale_lr", "none")
SIGMOID = _is("model.output", "sigmoid")
SKIP = _is("on_divergence", "skip")
STATIC_GRAPH = _is("parallel.static_graph", True)

# -- of parts

ADAPT = _other_than("adapt", "none", "dlopt.adapt.none")
AUTO_TASK = _built_by("task", "auto", "dlopt.tasks.kinds.auto")
COUPLED = _part("task", "task=pkg.Class with couples_batch", lambda part: getattr(part.target, "couples_batch", False))
DISTILLATION = _built_by("loss", "distillation", "dlopt.losses.Distillation")
DRAWN = _built_by("data", "drawn", "dlopt.data.generated.drawn")
FSDP = _built_by("parallel", "fsdp", _FSDP)
HARD_EXAMPLES = _built_by("sampler", "hard_examples", *_HARD_EXAMPLES)
INIT = _part("init", "init other than default", lambda part: dotted_name(part.target) != "dlopt.init.default")
LOSS_AWARE = _part("sampler", "sampler=hard_examples", lambda part: hasattr(part.target, "observe"), *_HARD_EXAMPLES)
MUP = _part("init", "init=mup", lambda part: part.takes("growth"), "dlopt.init.mup")
NO_AUTOENCODER = _part(
    "model", "model other than autoencoder", lambda part: not getattr(part.target, "reconstructs", False)
)
NO_LR = _part("optimizer", "optimizer=pkg.Class without lr", lambda part: not _has_rate(part))
NOT_MUP = _part("init", "init other than mup", lambda part: not part.takes("growth"))
OWN_TASK = _built_by("task", "pkg.Class", "dlopt.tasks.user.UserTask")
PARALLEL = _other_than("parallel", "single", _SINGLE)
PIPELINE = _built_by("parallel", "pipeline", _PIPELINE)
PIXELS = _part("loss", "loss=pixel_cross_entropy", _predicts_pixels, "dlopt.losses.PixelCrossEntropy")
PRODIGY = _built_by("optimizer", "prodigy", "dlopt.optim.Prodigy", "dlopt.optim.prodigy.Prodigy")
SCHEDULE_FREE = _part("optimizer", "optimizer=schedule_free_*", _is_schedule_free, *_SCHEDULE_FREE)
SEVERAL = Feature("several processes", _in_processes)
SHARDED = Feature("parallel other than single, ddp", lambda run: FSDP.find(run) or _split(run))
SPLIT = Feature("parallel=filter|columns|pipeline|spatial|hybrid", _split)
TOLERANCE = _built_by("stopping", "tolerance", "dlopt.training.stopping.Tolerance")

CONFLICTS = (
    # Length, evaluation, diagnostics
    Conflict(DRY_RUN, RESUME,
             "a dry run describes a whole run, not the rest of one", "resume=null, or dry_run=false"),
    Conflict(EVERY_STEPS, EVERY_EPOCHS,
             "only one of them may be set", "evaluate.every_epochs=1 or evaluate.every_steps=null"),
    Conflict(DIAGNOSTICS, SHARDED, "no process has the whole model", "parallel=single or ddp"),
    Conflict(CURVATURE, SEVERAL,
             "second derivatives are not averaged over ranks", "parallel=single, or diagnostics without curvature"),
    Conflict(HOOKED_DIAGNOSTICS, COMPILE, "their hooks do not run in a compiled model", "compile=false"),
    # The batch
    Conflict(GROWTH, FULL_BATCH, "a full batch cannot grow", "a number of samples"),
    Conflict(GROWTH, PIPELINE,
             "a pipeline has the same micro-batches in every update", "a number, or parallel=ddp or fsdp"),
    Conflict(AT_RESTARTS, GROWTH,
             "an update of a batch that grows may cross a restart", "checkpoint.at_restarts=false"),
    Conflict(STATIC_GRAPH, ACCUMULATE, "only the last backward averages gradients", "parallel.static_graph=false"),
    Conflict(HALVE, SEVERAL,
             "the processes need equal micro-batches", "on_out_of_memory=stop and a larger accumulate"),
    # Compilation and recomputation
    Conflict(RECOMPUTATION, COMPILE,
             "the compiler decides what to recompute", "compile=false, or activation_checkpointing=none"),
    Conflict(RECOMPUTATION, SPLIT, "the mode communicates between layers",
             "parallel=single, ddp or fsdp, or activation_checkpointing=none"),
    Conflict(RECOMPUTED_SEGMENTS, FSDP,
             "the mode gathers the weights block by block, a segment has several blocks",
             "activation_checkpointing=blocks"),
    Conflict(COMPILE, SPLIT, "the mode communicates between layers", "compile=auto"),
    Conflict(CUDA_GRAPHS, COMPILED_GRAPHS,
             "torch.compile then records CUDA graphs of its own", "compile=max-autotune-no-cudagraphs"),
    Conflict(ACCUMULATE, COMPILED_GRAPHS,
             "the CUDA graphs overwrite the gradients of the previous micro-batch",
             "compile=max-autotune-no-cudagraphs"),
    Conflict(COMPILED_GRAPHS, SEVERAL, "the CUDA graphs cannot contain the communication",
             "compile=max-autotune-no-cudagraphs or compile=true"),
    # Precision
    Conflict(NOT_ON_CPU, ON_CPU, "not supported on a CPU", "precision=bf16 or fp32, or device=cuda"),
    Conflict(NOT_ON_MPS, MPS, "not supported on an Apple GPU", "precision=fp32, bf16 or fp16"),
    Conflict(FP16, SHARDED, "the ranks would diverge in their loss scales", "precision=bf16"),
    Conflict(BF16_PURE, SHARDED,
             "the mode shards all layers in one dtype", "precision=bf16, or parallel=ddp"),
    Conflict(EMA, BF16_PURE,
             "the average moves by less than bf16 weights resolve", "precision=bf16 or ema=null"),
    Conflict(BF16_PURE, SCHEDULE_FREE,
             "the optimizer evaluates an average, which moves by less than bf16 weights resolve",
             "precision=bf16 or another optimizer"),
    Conflict(BF16_PURE, PRODIGY,
             "the distance to the initial weights, which sets the learning rate, is at first less than bf16 resolves",
             "precision=bf16 or another optimizer"),
    Conflict(TOLERANCE, BF16_PURE,
             "bf16 rounds weights by more than small updates", "precision=bf16, or stopping=early"),
    Conflict(CURVATURE, BF16_PURE, "bf16 does not resolve second derivatives", "precision=bf16"),
    # Learning rate, average, decay, initial weights
    Conflict(SCALE_LR, AUTO_LR,
             "the range test already chooses the learning rate for this batch size",
             "scale_lr=none, or a number for optimizer.lr"),
    Conflict(SCALE_LR, NO_LR,
             "there is no learning rate to scale", "scale_lr=none, or a number for optimizer.lr"),
    Conflict(EMA, SCHEDULE_FREE,
             "the optimizer evaluates an average of its own", "ema=null or another optimizer"),
    Conflict(DECAY_WIDTH, NOT_MUP, "there is no width to refer to", "decay.width=none, or init=mup"),
    Conflict(INIT, PRETRAINED,
             "the init would overwrite the pretrained weights", "init=default or model.pretrained=false"),
    Conflict(MUP, ADAPT,
             "the init sets learning rates of the model's own weights, which adapters freeze",
             "another init, or adapt=none"),
    Conflict(ADAPT, SPLIT, "the mode splits the layers themselves", "parallel=single, ddp or fsdp"),
    # Samplers
    Conflict(BALANCED, HARD_EXAMPLES,
             "the sampler draws by the losses: no fixed weights balance its draws",
             "loss.class_weights=null or a list, or another sampler"),
    Conflict(BALANCED_LABELS, HARD_EXAMPLES,
             "the sampler draws by the losses: no fixed weights balance its draws",
             "loss.pos_weight=null or a list, or another sampler"),
    Conflict(SKIP, LOSS_AWARE,
             "the sampler needs the losses of every update", "on_divergence=stop or another sampler"),
    Conflict(LOSS_AWARE, SPLIT,
             "the mode does not exchange the losses that the sampler needs", "parallel=ddp or another sampler"),
    Conflict(LOSS_AWARE, DISTILLATION, "the loss has no losses of single samples", "sampler=random"),
    # Losses
    Conflict(PIXELS, NO_AUTOENCODER, "the targets must be the pixels of images", "model=autoencoder"),
    Conflict(SIGMOID, PIXELS, "the loss applies a sigmoid", "model.output=identity"),
    Conflict(DISTILLATION, SPLIT,
             "the loss needs whole samples and outputs on every rank", "parallel=ddp or parallel=fsdp"),
    Conflict(DIAGNOSTICS_OF_LOSS, DISTILLATION,
             "these diagnostics are computed without the teacher", "diagnostics=[activations] or []"),
    # Tasks of the user's own
    Conflict(DRAWN, AUTO_TASK, "the data have no samples; a task draws them", "task=mine.Task"),
    Conflict(OWN_TASK, SPLIT,
             "the mode splits tensors, which the task does not know", "parallel=ddp or parallel=fsdp"),
    Conflict(EXACT_STATISTICS, OWN_TASK, "the task calls the model itself", "norm_statistics=running"),
    Conflict(OWN_METRIC, OWN_TASK,
             "the task has no outputs to measure", "the values that the task's evaluate returns"),
    Conflict(LOSS_AWARE, OWN_TASK, "the task has no losses of single samples", "sampler=random"),
    Conflict(ACCUMULATE, COUPLED, "the loss of the task couples the samples of a batch", "accumulate=1"),
    Conflict(HALVE, COUPLED, "the loss of the task couples the samples of a batch", "on_out_of_memory=stop"),
    Conflict(COUPLED, PARALLEL, "the loss of the task couples the samples of a batch", "parallel=single"),
)  # fmt: skip
"""All conflicts, in the order of messages and of the page."""
