"""Replays updates from a CUDA graph: the speed of small models on small batches is limited by kernel launches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.data.batches import Batch
from dlopt.machine.cuda_graphs import GraphedFunction, Recorder
from dlopt.models.known import is_known, unknown_part
from dlopt.optim.captured_decay import capture_decay
from dlopt.optim.cautious_decay import CautiousDecay
from dlopt.optim.traits import optimizer_traits
from dlopt.training.builders.recompute import Recomputed
from dlopt.training.builders.speed import GRAPH_MODES
from dlopt.training.step import Step, UpdateResult


def obstacle(step: Step, parts: Sequence[object], *, observed: bool = False, compile: bool | str = False) -> str | None:
    """Returns why the updates of a step cannot be captured; None if they can. `compile`: the key of the run.

    A captured update has no control flow that depends on tensor values, does not synchronize with the device, and
    differs between steps only in tensors and seeds. This is known of torch's and dlopt's layers and `parts` only: the
    loss and the clipping.
    """
    mode, settings, precision = step.mode, step.settings, step.precision.name
    traits, part = optimizer_traits(step.optimizer), next(filter(None, map(unknown_part, parts)), None)
    branches = traits.evaluations == "many" or not traits.capturable
    rounds_decay = bool(step.schedule.decayed_groups) and precision == "bf16_pure"
    records = f"compile={compile} records graphs of its own; compile=max-autotune-no-cudagraphs does not"
    reasons = {
        f"CUDA graphs are not available on {mode.device.type}": mode.device.type != "cuda",
        "an update communicates between processes": mode.ranks.processes > 1,
        records: compile in GRAPH_MODES,
        "diagnostics and profile use hooks, which a replay does not run": observed,
        f"{type(step.optimizer).__name__} has control flow on the host": branches,
        "precision=fp16 adapts its loss scale on the host": precision == "fp16",
        "check=step and on_divergence=skip synchronize in every update": settings.check_now,
        "accumulate grows the batch, whose shape is a constant in a graph": settings.grows,
        "on_out_of_memory=halve may change the size of micro-batches": settings.halve_on_out_of_memory,
        "the schedule changes the weight decay, which precision=bf16_pure would round with the weights": rounds_decay,
        f"{part} may have control flow on the host": part is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or layer_obstacle(step.module)


def layer_obstacle(module: nn.Module) -> str | None:
    """Returns why a graph cannot record the layers of a model; None if it can."""
    for layer in module.modules():
        if isinstance(layer, Recomputed):
            return "activation checkpointing restores the state of the random generator, which cannot be recorded"
        if not is_known(layer) or isinstance(layer, nn.RNNBase):  # cuDNN keeps dropout states of its own
            return f"{type(layer).__name__} may have control flow on the host"
    return None


class GraphedUpdate:
    """Runs the first updates of a step eagerly, then captures one, and replays it for all others.

    One graph holds forward, backward, clipping, the optimizer's update and, if `averages`, the weight average. If the
    schedule changes the momentum, the graph ends before the optimizer's update, which then runs eagerly: torch's fused
    kernels take the momentum as a number of the host, which a graph would repeat.

    A replay uses the captured memory addresses and runs no Python. Therefore:

    - each batch is copied into static input tensors;
    - learning rates are tensors, which the schedule fills in place, and so is a weight decay that it changes;
    - dropout is seeded before each replay, which makes it bitwise identical to that of an eager step;
    - losses and outputs are cloned before the next replay overwrites them.

    Args:
        batch_size: samples in a captured batch; other batches, such as the last one of an epoch, run eagerly.
        log_norm: also capture the gradient norm, for logging.
        averages: also capture the weight average, whose decay is constant: a replay repeats it.
    """

    def __init__(
        self, step: Step, recorder: Recorder, batch_size: int, *, log_norm: bool = False, averages: bool = False
    ) -> None:
        self.step = step
        self._batch_size, self._log_norm = batch_size, log_norm
        self._captures_step = not step.schedule.cycles_momentum
        self._averages = averages and self._captures_step  # an average follows the optimizer's update
        self._graphed = GraphedFunction("the update", self._captured_update, recorder)
        self._static: Batch | None = None  # the graph's inputs and targets
        step.check.immediate = False  # would read a value on the host
        step.check.preallocates = False  # a graph would reuse, or clear, the flags of other updates
        self._resting = step.schedule.resting
        self._rates: list[Tensor] = []
        self._decays: dict[int, Tensor] = {}
        if not self._captures_step:
            return
        zero = torch.zeros((), device=step.parameters[0].device)
        self._rates = [zero.clone() for _ in step.optimizer.param_groups]
        self._decays = {index: zero.clone() for index in step.schedule.decayed_groups}
        if self._decays and not isinstance(step.optimizer, CautiousDecay):
            capture_decay(step.optimizer)
        self._use_tensors(step.optimizer)
        step.optimizer.register_state_dict_post_hook(_convert_to_floats)
        step.optimizer.register_load_state_dict_post_hook(self._use_tensors)

    def __call__(self, batch: Batch, number: int, *, log_norm: bool = False) -> UpdateResult:
        """See `Step.update`."""
        step, static = self.step, self._copied(batch)
        if static is None:
            return step.update(batch, number, log_norm=log_norm)
        step.begin(static, number, log_norm=self._log_norm)
        if step.schedule.resting != self._resting:  # the schedule froze parameters: the backward pass has changed
            self._resting = step.schedule.resting
            # One eager update: a compiled model compiles its new backward pass in it. All other kernels are known.
            self._graphed.reset(warmup_runs=1)
        # Seeding on the host would not be in the graph: a replay continues from the seed that is set before it.
        step.seed()
        step.seeds = False
        captured, grads = self._graphed()
        result = captured.clone()  # the next replay overwrites it
        step.seeds = True
        if not self._captures_step:
            for parameter, grad in zip(step.parameters, grads, strict=True):
                parameter.grad = grad  # those of the graph, also after the eager update of a smaller batch
            step.optimizer.step()
        step.advance()
        step.end(result, None if self._averages else step.average)
        return result

    def _captured_update(self) -> tuple[UpdateResult, list[Tensor | None]]:
        """Runs what the graph holds; returns also the gradients, for the optimizer's update outside of it."""
        step = self.step
        result = step.loss_and_gradients()
        grads = [parameter.grad for parameter in step.parameters]
        if self._captures_step:
            step.optimizer.step()
        if self._averages and step.average is not None:
            step.average()
        return result, grads

    def _copied(self, batch: Batch) -> Batch | None:
        """Copies a batch into the static tensors; returns None if its shape or dtype differs from theirs."""
        if self._static is None:
            if len(batch.targets) != self._batch_size:
                return None
            self._static = Batch(torch.empty_like(batch.inputs), torch.empty_like(batch.targets), batch.total)
        pairs = [(self._static.inputs, batch.inputs), (self._static.targets, batch.targets)]
        if any(static.shape != tensor.shape or static.dtype != tensor.dtype for static, tensor in pairs):
            return None
        for static, tensor in pairs:
            static.copy_(tensor)
        return self._static

    def _use_tensors(self, optimizer: Optimizer) -> None:
        """Puts what the schedule changes into static tensors, at the start and after a state is loaded.

        Loading replaces the optimizer's state tensors: the update has to be captured again.
        """
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate.fill_(float(group["lr"]))
            if "capturable" in group:
                group["capturable"] = True
        for index, decay in self._decays.items():
            group = optimizer.param_groups[index]
            group["weight_decay"] = decay.fill_(float(group["weight_decay"]))
        self._graphed.reset()


def _convert_to_floats(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Makes a saved state independent of CUDA graphs. Waits for the device, as its checkpoint does."""
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
        if isinstance(group.get("weight_decay"), Tensor):
            group["weight_decay"] = float(group["weight_decay"])
