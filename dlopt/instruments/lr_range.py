"""Learning-rate range test (Smith 2017, section 3.3): trains with a growing rate and suggests rates from the losses.

`python -m dlopt.instruments.lr_range FOLDER` runs one rank, with the keys in FOLDER/sweep.json: see `run_rank`.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dlopt.basics.errors import USER_ERROR, RunError, UserError
from dlopt.basics.files import write_json
from dlopt.basics.scratch import scratch
from dlopt.basics.status_line import status_line
from dlopt.config.run_config import RunConfig
from dlopt.config.schema import Component
from dlopt.instruments.layers import is_off_scale, moments_of
from dlopt.instruments.lr_range_keys import RangeTest
from dlopt.instruments.measuring_ranks import RankOutcome, run_rank, run_ranks
from dlopt.machine.world import current
from dlopt.parallel.processes import rendezvous
from dlopt.parallel.processes.launch import count_processes
from dlopt.results import drawing
from dlopt.results.drawing import COLOURS
from dlopt.tracking.tracking import Tracking
from dlopt.trained.distillation import with_teacher
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_mode, build_workload, load_weights
from dlopt.training.progress import endless_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEWEST = 5  # updates before the divergence check starts
_RISE = 1.1  # a smoothed loss above this multiple of its minimum has risen


@dataclass(frozen=True)
class LearningRates:
    """Result of a range test. The suggested rates are None if the loss never fell."""

    rates: list[float]
    losses: list[float]  # of each update's batch, before the update
    smoothed: list[float]
    steepest: float | None  # where the smoothed loss falls fastest against log(rate)
    valley: float | None  # the middle of the longest descent, which is more conservative
    diverged: bool
    off_scale: list[float] | None = None  # mean and standard deviation of inputs that are far from 0 and 1


def check(keys: RangeTest) -> None:
    """Raises `UserError` for inconsistent keys."""
    if keys.max_lr <= keys.min_lr:
        raise UserError(f"max_lr={keys.max_lr:g}: must be > min_lr={keys.min_lr:g}")


def uses_line_search(optimizer: Component) -> str | None:
    """Returns the key that enables the line search of an optimizer; None if it has no line search."""
    keys = ("max_evaluations", "max_backtracks", "line_search_fn")
    return next((key for key in keys if optimizer.arguments.get(key) is not None), None)


def trial(run_config: RunConfig, keys: RangeTest) -> RunConfig:
    """Returns the config with the test's learning rates; multipliers of parameter groups are kept."""
    if "lr" not in run_config.optimizer.arguments:
        raise UserError(f"{run_config.optimizer.choice}: has no learning rate to tune")
    if key := uses_line_search(run_config.optimizer):
        value = run_config.optimizer.arguments[key]
        raise UserError(f"optimizer.{key}={value}: the line search chooses the length of a step; set optimizer.lr")
    return replace(
        run_config,
        optimizer=run_config.optimizer.partial(lr=1.0),
        auto_lr=False,
        schedule=Component("schedule", lambda horizon: keys.rate, {}),
        warmup=replace(run_config.warmup, warmup_epochs=None, warmup_steps=0, warmup_fraction=0.0),
        settings=replace(
            run_config.settings,
            accumulate=run_config.settings.micro_batches,
            scale_lr="none",
            ema=None,
            steps=keys.updates,
        ),
    )


def find(workload: Workload, keys: RangeTest) -> LearningRates:
    """Loads the weights of `init_from`, if set, trains with growing rates, and restores the model bitwise.

    Learning rates that do not depend on optimizer.lr, such as Muon's rest_lr, stay constant. All ranks must call this,
    and return the same result: losses are over the global batch.
    """
    check(keys)
    if (path := workload.run_config.settings.init_from) is not None:
        load_weights(workload.module, Path(path), workload.parallel)
    workload = replace(workload, run_config=trial(workload.run_config, keys))
    with restored(workload.module, workload.device), status_line() as show:
        # A non-finite loss ends the test, here and on all ranks.
        trainer = probe_trainer(with_teacher(workload), Path(os.devnull), checks=False)
        groups, others = (build_optimizer(each).param_groups for each in (workload, workload.with_lr(2.0)))
        pairs = enumerate(zip(groups, others, strict=True))
        constant = {i: float(group["lr"]) for i, (group, other) in pairs if group["lr"] == other["lr"]}
        rates, losses, smoothed = [], [], []
        average, best, diverged, off_scale = 0.0, math.inf, False, None
        workload.module.train()
        for number, batch in enumerate(islice(endless_batches(trainer.batches, trainer.progress), keys.updates)):
            rate = keys.rate(number)
            if number == 0 and (inputs := moments_of([batch.inputs])) is not None and is_off_scale(inputs):
                off_scale = [inputs.mean, inputs.std]
            if workload.parallel.ranks.is_main:
                show(f"update {number + 1}/{keys.updates}, learning rate {rate:.2g}")
            for index, independent in constant.items():
                group = trainer.step.optimizer.param_groups[index]
                is_tensor = isinstance(group["lr"], torch.Tensor)
                group["lr"] = group["lr"].fill_(independent) if is_tensor else independent
            trainer.run_update(batch, number)
            # Waits for the device, and is a collective: all ranks decide alike, after each update, whether to end.
            loss = trainer.train_metrics.since_last()["loss"]
            if not math.isfinite(loss):
                diverged = True
                break
            rates.append(rate)
            losses.append(loss)
            average = keys.smoothing * average + (1 - keys.smoothing) * loss
            smoothed.append(average / (1 - keys.smoothing ** (number + 1)))  # corrects the bias of the zero start
            best = min(best, smoothed[-1])
            if number >= _FEWEST and smoothed[-1] > keys.diverge * best:
                diverged = True
                break
    steepest, valley = steepest_slope(rates, smoothed), middle_of_descent(rates, smoothed)
    return LearningRates(rates, losses, smoothed, steepest, valley, diverged, off_scale)


@contextmanager
def restored(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores weights, buffers and torch's generators on exit, and removes gradients."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    was_training = module.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            module.load_state_dict(state)
            module.zero_grad(set_to_none=True)
            module.train(was_training)


def steepest_slope(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Returns the rate of the steepest central difference before the lowest loss; None if the losses never fall."""
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    slopes = {
        i: (smoothed[i + 1] - smoothed[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(1, min(lowest + 1, len(rates) - 1))
    }
    best = min(slopes, key=slopes.__getitem__, default=None)
    return None if best is None or slopes[best] >= 0 else rates[best]


def middle_of_descent(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Returns the middle of the longest decreasing subsequence, as in fastai's `valley` (Howard & Gugger 2020).

    None if the losses never fall.
    """
    length = [1] * len(smoothed)  # of the longest decreasing subsequence that ends at i
    for i, loss in enumerate(smoothed):
        length[i] += max((length[j] for j in range(i) if smoothed[j] > loss), default=0)
    if max(length, default=1) < 2:
        return None
    end = max(range(len(length)), key=length.__getitem__)
    start = max(end - length[end] + 1, 0)
    return rates[start + (end - start) // 2]


def describe(result: LearningRates) -> list[str]:
    reached = f" up to a learning rate of {result.rates[-1]:.3g}" if result.rates else ""
    course = f"{len(result.rates)} updates{reached}; {describe_end(result)}"
    if result.off_scale is not None:
        mean, std = result.off_scale
        course += f"; inputs have mean {mean:.2g} and standard deviation {std:.2g}: first try normalize=standardize"
    if result.valley is None or result.steepest is None:
        advice = "try other values of min_lr and max_lr, or more updates"
        return [course, f"no suggestion, because the loss never decreased; {advice}"]
    return [
        course,
        f"steepest slope: optimizer.lr={result.steepest:.2g} (the loss falls fastest)",
        f"valley: optimizer.lr={result.valley:.2g} (middle of the longest descent)",
    ]


def describe_end(result: LearningRates) -> str:
    """Describes the end of the test by the smoothed losses, as the plot shows it."""
    smoothed, rates = result.smoothed, result.rates
    if not smoothed:
        return "the first loss is not finite"
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    minimum = f"after its minimum of {smoothed[lowest]:.3g} at lr {rates[lowest]:.2g}"
    if result.diverged:
        return f"the loss diverged {minimum}"
    if smoothed[-1] > smoothed[0]:
        return f"the loss rose above its initial value {minimum}"
    if smoothed[-1] > _RISE * smoothed[lowest]:
        return f"the loss rose to {smoothed[-1]:.3g} {minimum}"
    return "the loss did not rise; try a larger max_lr"


def draw(result: LearningRates, title: str) -> "Figure":
    """Plots the losses and suggestions; an arrow marks a smoothed loss above three times its initial value."""
    figure = drawing.figure(8, 4.5)
    axes = figure.add_subplot()
    axes.plot(result.rates, result.losses, color="0.75", linewidth=1, label="loss of each batch")
    axes.plot(result.rates, result.smoothed, color=COLOURS[0], linewidth=2, label="smoothed")
    for i, (name, rate) in enumerate((("steepest slope", result.steepest), ("valley", result.valley)), 1):
        if rate is not None:
            height = result.smoothed[result.rates.index(rate)]
            axes.plot([rate], [height], "os"[i - 1], color=COLOURS[i], markersize=8, label=f"{name}: {rate:.2g}")
            axes.axvline(rate, color=COLOURS[i], linewidth=1, linestyle=":")
    axes.set_xscale("log")
    finite = result.smoothed or [0.0]
    low, high = min([*finite, *result.losses]), min(max(finite), 3 * finite[0])
    margin = 0.1 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    if max(finite) > high + margin:
        end = next(i for i, loss in enumerate(finite) if loss > high + margin)
        axes.annotate(
            "diverges", (result.rates[end], high + margin), (-8, -18), textcoords="offset points", ha="right",
            arrowprops={"arrowstyle": "->", "color": COLOURS[0]}, color=COLOURS[0],
        )  # fmt: skip
    axes.set(xlabel="learning rate", ylabel="loss")
    axes.set_title(title, fontsize=11, wrap=True)
    drawing.clean_axes(axes, color="0.92")
    axes.legend(frameon=False)
    return figure


def write(result: LearningRates, folder: Path, title: str) -> list[Path]:
    """Writes find_lr.png, .svg and .json into the folder; returns their paths. Raises OSError."""
    path = folder / "find_lr.json"
    write_json(path, asdict(result), indent=1)
    return [*drawing.save(draw(result, title), folder, "find_lr"), path]


def find_lr(workload: Workload, tracking: Tracking, folder: Path) -> float:
    """Returns the learning rate for `optimizer.lr=auto`, of the steepest slope; writes the result to the run folder.

    Raises `UserError` if no learning rate reduced the loss.
    """
    result = find(workload, RangeTest())
    if (rate := result.steepest) is None:
        raise UserError("optimizer.lr=auto: no learning rate reduced the loss; set optimizer.lr to a number")
    tracking.message(f"optimizer.lr=auto: found {rate:.3g} (see find_lr.png) in {len(result.rates)} updates")
    if workload.parallel.ranks.is_main:
        with suppress(OSError):  # a full disk is reported by the first checkpoint
            write(result, folder, "Learning-rate range test")
    return rate


def measure(run_config: RunConfig, keys: RangeTest) -> LearningRates | None:
    """Runs a range test here, or in as many processes as the config has; None on ranks > 0 of a launcher."""
    world = current()
    # A launcher has started the processes, maybe more than this machine has GPUs.
    processes = 1 if world else count_processes(run_config.parallel.arguments, run_config.settings.device)
    if processes == 1:
        result = test_range(run_config, keys)
        if world is not None:
            rendezvous.leave()
        return result if rendezvous.is_main() else None
    with scratch() as folder:
        (folder / "sweep.json").write_text(json.dumps(asdict(keys)))
        codes = run_ranks("dlopt.instruments.lr_range", folder, run_config.config, processes, {})
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    for each in results:
        if "error" in each:
            raise UserError(each["error"]) if USER_ERROR in codes else RunError(each["error"])
    if any(codes) or not results:
        raise RunError(f"the processes of the test failed with exit codes {', '.join(map(str, codes))}")
    return LearningRates(**results[0])


def steepest_rate(run_config: RunConfig) -> float | None:
    """Returns the rate of the steepest slope; None if the loss never falls, or no rate can be tested."""
    try:
        return test_range(run_config, RangeTest()).steepest
    except UserError:  # no learning rate, or a line search
        return None


def test_range(run_config: RunConfig, keys: RangeTest) -> LearningRates:
    """Runs a range test in this process, or as one rank of several."""
    return find(build_workload(run_config, parallel=build_mode(run_config)), keys)


def _measure_rank(run_config: RunConfig, folder: Path, _: int) -> dict[str, Any]:
    keys = RangeTest(**json.loads((folder / "sweep.json").read_text()))
    return asdict(test_range(run_config, keys))


def _explain(error: Exception) -> RankOutcome | None:
    return ({"error": str(error)}, error.code) if isinstance(error, UserError | RunError) else None


if __name__ == "__main__":
    rendezvous.end_process(run_rank(_measure_rank, _explain))
