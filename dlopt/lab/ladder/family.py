"""Families of models: ladder/NAME.yaml in the laboratory or in --config-dir, and the sizes of their rungs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval, MinLen

from dlopt.basics.plain_values import load_yaml
from dlopt.extend import (
    Line,
    Names,
    Natural,
    NonNegative,
    Positive,
    UserError,
    group_of,
    key_of,
    lower_is_better,
    value_of,
)
from dlopt.lab.ladder.arms import Arm

if TYPE_CHECKING:
    from dlopt.config.run_config import RunConfig
    from dlopt.extend import Composer

FOLDER = "ladder"  # in the laboratory and in a --config-dir
_Text = Annotated[str, MinLen(1)]
_Size = Annotated[int, Interval(ge=1, le=10**18)]
_COPIES = 4  # of the parameters, in fp32: themselves, gradients, and two of an optimizer's state


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a family grows, in words."""

    width: _Text
    depth: _Text
    batch: _Text
    schedule: _Text


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models of several sizes.

    Attributes:
        experiment: recipe of all rungs.
        metric: a loss, which decides.
        unit: what `tokens_per_parameter` counts, a plural: bytes, tokens, images.
        tokens_per_parameter: default.
        rungs: name -> overrides, from small to large.
        optimizers: name -> overrides: hyperparameters that are usual for such models.
        arms: arm -> overrides: further keys of an arm.
    """

    name: str
    experiment: str
    metric: str
    unit: str
    tokens_per_parameter: float
    rules: Rules
    rungs: Mapping[str, Sequence[str]]
    optimizers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    arms: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _FamilyFile:
    experiment: str
    metric: str
    unit: str
    tokens_per_parameter: Positive
    rules: dict[str, Any]
    rungs: dict[str, list[str]]
    optimizers: dict[str, list[str]] = field(default_factory=dict)
    arms: dict[Arm, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Branch:
    """A shorter run of a rung, which continues its run. `shared`: updates until which the two are equal."""

    updates: _Size
    shared: Natural


@dataclass(frozen=True)
class Rung:
    """A size of the family.

    Attributes:
        parameters: trainable, embeddings included; a shared matrix counts once.
        samples: training tokens (or images), all updates together.
        compute: FLOPs of the training, 6 * parameters * samples; for images, 3 * the FLOPs of a forward pass * samples.
        epochs: passes over the training data.
        warmup: updates of the warmup, if all lengths share that of the shortest; None: as the schedule sets it.
        branches: the shorter runs, from short to long.
    """

    overrides: Sequence[str]
    parameters: _Size
    updates: _Size
    samples: _Size
    compute: Positive
    epochs: NonNegative
    warmup: Natural | None = None
    branches: tuple[Branch, ...] = ()

    @property
    def width(self) -> float | None:
        """Of the model; None if the rung does not set `model.width`."""
        found = [value_of(each) for each in self.overrides if key_of(each) == "model.width"]
        return float(found[-1]) if found else None

    def of_length(self, updates: int) -> "Rung":
        """Returns the rung with runs of so many updates."""
        ratio = updates / self.updates
        samples = self.samples // self.updates * updates
        return replace(
            self,
            updates=updates,
            samples=samples,
            compute=self.compute * ratio,
            epochs=self.epochs * ratio,
            branches=(),
        )


def load_family(name: str, composer: "Composer") -> Family:
    """Reads a family. Raises `UserError`."""
    from dlopt.extend import check_arguments  # with pydantic, which the help does not need

    own = composer.config_dir
    folders = [*([] if own is None else [Path(own)]), Path(__file__).parents[1]]
    paths = {path.stem: path for folder in reversed(folders) for path in sorted((folder / FOLDER).glob("*.yaml"))}
    Names("family", paths, "dlopt ladder --help", "model=").check(name)
    path = paths[name]
    try:
        content = check_arguments(path.name, _FamilyFile, load_yaml(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for rule in ("width", "depth"):
        if not content["rules"].get(rule):
            raise UserError(
                f"model={name}: {path} has no rule of {rule}; write it in words: rules.{rule}: width = 16 * depth"
            )
    rules = Rules(**check_arguments(f"{path.name}: rules", Rules, content["rules"]))
    if not lower_is_better(content["metric"]):
        raise UserError(f"model={name}: metric={content['metric']} of {path} is not a loss; a ladder needs one")
    for optimizer in content.get("optimizers", {}):
        if "." not in optimizer:
            composer.names("optimizer").check(optimizer, f"model={name}: optimizers.{optimizer}")
    for key in ("optimizers", "arms"):
        for owner, lines in content.get(key, {}).items():
            _check_lines(f"model={name}: {key}.{owner}", lines)
    return Family(**{**content, "rules": rules, "name": name})


def _check_lines(place: str, lines: Sequence[str]) -> None:
    for line in lines:
        if group_of(line) != "optimizer" or key_of(line).endswith("lr"):
            raise UserError(f"{place}: {line}: allowed: keys of the optimizer but learning rates, which are searched")


def chosen_rungs(family: Family, rungs: int | Sequence[str] | None) -> list[str]:
    """Returns the names of the smallest N rungs, or of the named ones, from small to large. Raises `UserError`."""
    names = [*family.rungs]
    if rungs is None:
        chosen = names
    elif isinstance(rungs, int):
        if not 1 <= rungs <= len(names):
            raise UserError(f"rungs={rungs}: model={family.name} has {len(names)} rungs: {', '.join(names)}")
        chosen = names[:rungs]
    else:
        for name in rungs:
            Names("rung", names, "dlopt ladder --help", "rungs=").check(name)
        chosen = [name for name in names if name in rungs]
    if len(chosen) < 2:
        shown = rungs if isinstance(rungs, int) else f"[{','.join(chosen)}]"
        raise UserError(f"rungs={shown}: a fit needs at least two rungs")
    return chosen


def measure(line: Line, family: Family, name: str, lengths: Sequence[float], shared: Sequence[str]) -> Rung:
    """Builds a rung on the meta device and returns its size. Raises `UserError` if it does not fit the memory.

    `lengths`: tokens per parameter of its runs, ascending.
    """
    from dlopt.training.builders.dataset import read_dataset
    from dlopt.training.builders.model_check import model_on_meta
    from dlopt.training.builders.speed import forward_flops

    own = family.rungs[name]
    run_config, choices = line.run_config([f"experiment={family.experiment}", *own, *shared])
    batch = run_config.data_settings.batch_size
    if not isinstance(batch, int):
        raise UserError(f"data.batch_size={batch}: a ladder needs a number, which its batch-size rule sets")
    if run_config.settings.batch_growth is not None:
        raise UserError("accumulate: a ladder compares runs of constant batches; use a number of micro-batches")
    dataset = read_dataset(run_config)
    shape = dataset.task.input_shape(dataset.train.shape)
    module = model_on_meta(run_config.model, dataset.task.model_arguments(shape))
    parameters = sum(each.numel() for each in module.parameters() if each.requires_grad)
    _refuse_large(name, parameters, run_config.settings.device)
    per_window = dataset.task.predictions
    *shorter, updates = [max(round(each * parameters / (batch * per_window)), 1) for each in lengths]
    samples = updates * batch * per_window
    flops = 6 * parameters if dataset.task.tokens is not None else 3 * forward_flops(module, shape)
    rung = Rung(own, parameters, updates, samples, flops * samples, updates * batch / len(dataset.train))
    if not shorter:
        return rung
    word = f"tokens_per_parameter=[{','.join(f'{each:g}' for each in lengths)}]"
    return _with_branches(rung, shorter, run_config, f"{word}: schedule={choices['schedule']}", name)


def _with_branches(rung: Rung, shorter: Sequence[int], run_config: "RunConfig", word: str, name: str) -> Rung:
    """Returns a rung with shorter runs that branch off before their cooldowns. Raises `UserError`."""
    from dlopt.sweeps.branches import shared_updates

    for part in ("schedule", "decay"):
        for key, value in run_config.config[part].items():
            if key.endswith("_epochs") and value is not None:
                steps = key.removesuffix("epochs") + "steps"
                raise UserError(f"{part}.{key}={value}: several tokens_per_parameter need updates: {part}.{steps}")
    if len({*shorter, rung.updates}) <= len(shorter):
        raise UserError(f"{word}: two lengths have as many updates at {name}; choose lengths farther apart")
    warmup = None
    if run_config.warmup.warmup_steps is None:
        warmup = run_config.warmup.length(shorter[0], steps_per_epoch=1.0)
        run_config = replace(run_config, warmup=replace(run_config.warmup, warmup_steps=warmup))
    branches = []
    for updates in shorter:
        shared, differ = shared_updates(run_config, run_config, rung.updates, updates, steps_per_epoch=1.0)
        if shared is None:
            raise UserError(
                f"{word} depends on the length of the run, from update {differ} of {name} on, so that no shorter run "
                "can branch off; set schedule=wsd, which is constant before its cooldown"
            )
        branches.append(Branch(updates, shared))
    return replace(rung, warmup=warmup, branches=tuple(branches))


def _refuse_large(name: str, parameters: int, device: str) -> None:
    import torch

    from dlopt.machine.memory import available_memory

    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    available = torch.cuda.get_device_properties(0).total_memory if on_gpu else available_memory()
    needed = _COPIES * 4 * parameters
    if needed > available:
        raise UserError(
            f"rungs={name}: {parameters:,} parameters, their gradients and an optimizer's state need "
            f"{needed / 2**30:,.1f} GiB of memory, {available / 2**30:,.1f} GiB are available; choose smaller rungs"
        )
