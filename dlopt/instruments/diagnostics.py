"""Diagnostics during training: statistics of layers every n updates."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlopt.basics.random import stream
from dlopt.config.settings import Diagnostic
from dlopt.instruments.curvature import GradientSpread, curvature_along, hessian_product, lanczos, random_vector
from dlopt.instruments.layers import LayerProbe, layer_parameters, norms, norms_by_layer
from dlopt.models.layers import frozen_statistics
from dlopt.optim.common import flat
from dlopt.tasks.draws import Draws
from dlopt.tasks.user import TaskErrors, TaskLoss
from dlopt.training.builders.workload import Workload
from dlopt.training.rng import EVALUATION
from dlopt.training.step import Observer, Step

Report = Callable[[int, Mapping[str, float], Mapping[str, Tensor]], None]
"""Receives the number of updates, and metrics and histograms by tag."""

_PRODUCTS = 4  # Lanczos iterations per measurement; few suffice, as each starts from the previous eigenvector
_CURVATURE_INTERVAL = 10  # because curvature costs about twenty updates
_KEPT = 2000  # values of a histogram


class Diagnostics(Observer):
    """Records diagnostics of updates 0, `every`, 2 `every`, ..., without changing the updates.

    activations: mean, standard deviation, saturated and dead fractions of each layer. gradients: norms of the
    back-propagated gradients and of the weights' gradients (before clipping), update-to-weight ratio, and, with one
    process, the gradient noise scale from the two halves of the batch. curvature, every tenth time: largest eigenvalue
    of the Hessian of the batch's loss after the update, and the curvature along the update. With several processes,
    rank 0 reports the averaged gradients and its own activations.

    Records activations and gradients in the update's first evaluation of the loss. The later ones, of L-BFGS, SAM or
    Newton, are at other weights, and some differentiate twice.
    """

    def __init__(self, workload: Workload, kinds: Sequence[Diagnostic], every: int, report: Report) -> None:
        self.workload, self.kinds, self.every, self.report = workload, kinds, every, report
        self._layers = layer_parameters(workload.module)
        self._vector: Tensor | None = None  # the previous eigenvector; None in the first measurement, also when resumed
        self._is_recording = False  # whether the first clipping of this update has to record the norms
        self._norms: dict[str, float] = {}
        self._hooks = contextlib.ExitStack()  # of the probe, until the first evaluation has ended

    def before_clip(self) -> None:
        """Ends the recording before the first clipping of an update; records gradient norms."""
        self._hooks.close()
        if self._is_recording:
            gradients = [[p.grad for p in each if p.grad is not None] for each in self._layers.values()]
            values = norms(gradients).tolist()
            self._norms = {f"gradients/norm/{name}": v for name, v in zip(self._layers, values, strict=True)}
            self._is_recording = False

    def around_update(
        self, step: Step, inputs: Tensor, targets: Tensor, number: int
    ) -> contextlib.AbstractContextManager[None] | None:
        return None if number % self.every else self._recording(step, inputs, targets, number)

    @contextlib.contextmanager
    def _recording(self, step: Step, inputs: Tensor, targets: Tensor, number: int) -> Iterator[None]:
        metrics: dict[str, float] = {}
        histograms: dict[str, Tensor] = {}
        with_activations, with_gradients = "activations" in self.kinds, "gradients" in self.kinds
        with_curvature = "curvature" in self.kinds and number % (_CURVATURE_INTERVAL * self.every) == 0
        if not (with_activations or with_gradients or with_curvature):
            yield
            return
        probe = LayerProbe(self.workload.module, activations=with_activations, gradients=with_gradients, keep=_KEPT)
        copied = step.parameters if with_gradients or with_curvature else []
        before = {p: p.detach().clone() for p in copied}  # the update works in place
        scale = 1.0 if step.scaler is None else float(step.scaler.get_scale())
        with self._hooks:
            if with_activations or with_gradients:
                self._hooks.enter_context(probe.recording())
            self._is_recording = with_gradients
            try:
                yield
            finally:
                gradient_norms, self._norms, self._is_recording = self._norms, {}, False
        metrics |= gradient_norms
        steps = {p: p.detach() - start for p, start in before.items()}
        for layer in probe.layers:
            if with_activations:
                metrics[f"activations/mean/{layer.name}"] = layer.outputs.mean
                metrics[f"activations/std/{layer.name}"] = layer.outputs.std
                for name, fraction in (("saturated", layer.saturated), ("dead", layer.dead)):
                    if fraction is not None:
                        metrics[f"activations/{name}/{layer.name}"] = fraction
                histograms[f"activations/{layer.name}"] = layer.outputs.values
            if with_gradients:
                metrics[f"gradients/backpropagated/{layer.name}"] = layer.gradient_norm / scale
                histograms[f"gradients/{layer.name}"] = layer.gradients.values / scale
        if with_gradients:
            moved, sizes = (norms_by_layer(self._layers, values).tolist() for values in (steps, before))
            ratios = {name: m / s for name, m, s in zip(self._layers, moved, sizes, strict=True) if s > 0}
            metrics |= {f"gradients/update_to_weight/{name}": ratio for name, ratio in ratios.items()}
            if self.workload.parallel.ranks.processes == 1:
                metrics["gradients/noise_scale"] = self._noise_scale(step.parameters, inputs, targets)
        if with_curvature:
            with preserved_state(self.workload):
                product = hessian_product(differentiable_loss(self.workload, inputs, targets), step.parameters)
                start = random_vector(step.parameters) if self._vector is None else self._vector
                spectrum = lanczos(product, start, _PRODUCTS, 1)
                metrics["curvature/largest_eigenvalue"] = float(spectrum.eigenvalues[0])
                metrics["curvature/along_update"] = curvature_along(product, flat(list(steps.values())))
            if spectrum.vectors.isfinite().all():
                self._vector = spectrum.vectors[0]
        finite = {tag: value for tag, value in metrics.items() if not math.isnan(value)}
        self.report(number + 1, finite, histograms)

    def _noise_scale(self, trained: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> float:
        half = len(targets) // 2
        if half < 1:
            return math.nan
        spread = GradientSpread()
        with preserved_state(self.workload):
            for number, samples in enumerate((slice(0, half), slice(half, 2 * half))):
                loss = differentiable_loss(self.workload, inputs[samples], targets[samples], number)
                spread.add([torch.autograd.grad(loss, trained, materialize_grads=True)])
        return spread.noise_scale(half)[0]


def differentiable_loss(workload: Workload, inputs: Tensor, targets: Tensor, number: int = 0) -> Tensor:
    """Computes the mean loss of the uncompiled model, so that hooks fire and second derivatives exist.

    `number`: of the batch, on which the draws of a task of the user's own depend.
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        if isinstance(workload.loss, TaskLoss):
            seed = stream(workload.run_config.settings.augmentation_seed, EVALUATION, number)
            draws = Draws.of_update(workload.device, seed, len(targets), workload.precision.dtype)
            with TaskErrors(workload.loss.task, "the loss"), torch.enable_grad():  # it may contain derivatives
                parts = workload.precision.autocast_parts(workload.loss)((inputs, targets), draws)
            return torch.stack([*parts.values()]).sum()
        autocast = workload.precision.autocast
        loss: Tensor = autocast(workload.loss)(autocast(workload.module)(inputs), targets)
    return loss


@contextlib.contextmanager
def preserved_state(workload: Workload) -> Iterator[None]:
    """Context that keeps the running statistics of BatchNorm, and restores the random generators on exit."""
    devices = [workload.device] if workload.device.type == "cuda" else []
    with frozen_statistics(workload.module), torch.random.fork_rng(devices), torch.enable_grad():
        yield
