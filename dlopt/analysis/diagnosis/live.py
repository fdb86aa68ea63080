"""Diagnostics during a training: the statistics of `dlopt diagnose` at every so many updates."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from dlopt.analysis.diagnosis.curvature import GradientSpread, Spectrum, curvature_along, flat, hessian_product, lanczos
from dlopt.analysis.diagnosis.layers import LayerProbe, layer_parameters, norms
from dlopt.analysis.diagnosis.measuring import loss_of, untouched
from dlopt.errors import UserError
from dlopt.training.build import Workload
from dlopt.training.step import Observer, Step

Kind = Literal["gradients", "activations", "curvature"]
Report = Callable[[int, Mapping[str, float], Mapping[str, Tensor]], None]
"""Takes the number of updates, figures and histograms, by tag."""

_PRODUCTS = 4  # Hessian-vector products of one look; the vector found is where the next look starts
SELDOMER = 10
"""The curvature, which costs some twenty updates, is looked at in every tenth look only."""

_KEPT = 2000  # values of a histogram


def check(workload: Workload, kinds: Sequence[Kind]) -> None:
    """Raises `UserError` where there is nothing to be seen."""
    if workload.parallel.sharding != "replicated":
        raise UserError(
            f"diagnostics=[{','.join(kinds)}]: with parallel={workload.parallel.name} no process has the whole model; "
            "use parallel=single or ddp"
        )
    if hasattr(workload.model, "_orig_mod") and set(kinds) - {"curvature"}:  # torch.compile's
        raise UserError("diagnostics: a compiled model shows nothing of its layers; type compile=false")
    if "curvature" in kinds and workload.parallel.processes > 1:
        raise UserError(
            f"diagnostics=[{','.join(kinds)}]: the curvature needs second derivatives, which processes do not average; "
            "leave it out, or use parallel=single"
        )


class Diagnostics(Observer):
    """Looks at update 0 and at every `every`-th one after it, without changing anything about them.

    activations: mean, standard deviation, saturated and dead shares of each layer. gradients: norms of the
    back-propagated gradients and of the weights' (before clipping), update-to-weight ratio, and, with one process, the
    gradient noise scale from the two halves of the batch. curvature, in every tenth look: largest eigenvalue of the
    Hessian of the batch's loss behind the update, and the curvature along the update. With several processes the main
    one reports, of the gradients the averaged ones, of the activations its own. Each look at the curvature starts from
    the eigenvector that the one before found; the first one of a resumed run starts anew.
    """

    def __init__(self, workload: Workload, kinds: Sequence[Kind], every: int, report: Report) -> None:
        check(workload, kinds)
        self.workload = workload
        self.kinds = kinds
        self.every = every
        self.report = report
        self._layers = layer_parameters(workload.module)
        self._vector: Tensor | None = None
        self._norms: dict[str, float] | None = None  # of the gradients, in an update that is looked at; {}: not yet

    def around(
        self, step: Step, inputs: Tensor, targets: Tensor, number: int
    ) -> contextlib.AbstractContextManager[None] | None:
        return None if number % self.every else self._looking(step, inputs, targets, number)

    def evaluation_ends(self) -> None:
        """Takes the norms of the gradients of an update's first evaluation, just before these are clipped."""
        if self._norms == {}:
            gradients = [[p.grad for p in each if p.grad is not None] for each in self._layers.values()]
            values = norms(gradients).tolist()
            self._norms = {f"gradients/norm/{name}": v for name, v in zip(self._layers, values, strict=True)}

    @contextlib.contextmanager
    def _looking(self, step: Step, inputs: Tensor, targets: Tensor, number: int) -> Iterator[None]:
        figures: dict[str, float] = {}
        histograms: dict[str, Tensor] = {}
        with_activations, with_gradients = "activations" in self.kinds, "gradients" in self.kinds
        with_curvature = "curvature" in self.kinds and number % (SELDOMER * self.every) == 0
        if not (with_activations or with_gradients or with_curvature):
            yield
            return
        probe = LayerProbe(self.workload.module, activations=with_activations, gradients=with_gradients, keep=_KEPT)
        before = [p.detach().clone() for p in step.parameters] if with_gradients or with_curvature else []
        scale = 1.0 if step.scaler is None else float(step.scaler.get_scale())
        with contextlib.ExitStack() as stack:
            if with_activations or with_gradients:
                stack.enter_context(probe.watching())
            self._norms = {} if with_gradients else None
            try:
                yield
            finally:
                found, self._norms = self._norms, None
        figures |= found or {}
        steps = [p.detach() - start for p, start in zip(step.parameters, before, strict=False)]
        for layer in probe.layers:
            if with_activations:
                figures[f"activations/mean/{layer.name}"] = layer.outputs.mean
                figures[f"activations/std/{layer.name}"] = layer.outputs.std
                for name, share in (("saturated", layer.saturated), ("dead", layer.dead)):
                    if share is not None:
                        figures[f"activations/{name}/{layer.name}"] = share
                histograms[f"activations/{layer.name}"] = layer.outputs.values
            if with_gradients:
                figures[f"gradients/backpropagated/{layer.name}"] = layer.gradients.norm / scale
                histograms[f"gradients/{layer.name}"] = layer.gradients.values / scale
        if with_gradients:
            figures |= self._ratios(step.parameters, steps, before)
            if self.workload.parallel.processes == 1:
                figures["gradients/noise_scale"] = self._noise_scale(step.parameters, inputs, targets)
        if with_curvature:
            figures |= self._curvature(step.parameters, inputs, targets, steps)
        finite = {tag: value for tag, value in figures.items() if not math.isnan(value)}
        self.report(number + 1, finite, histograms)

    def _ratios(self, trained: Sequence[Tensor], steps: Sequence[Tensor], before: Sequence[Tensor]) -> dict[str, float]:
        """||update|| / ||weights|| of each layer."""
        places = {id(p): i for i, p in enumerate(trained)}
        own = [[places[id(p)] for p in each if id(p) in places] for each in self._layers.values()]
        moved, sizes = (norms([[values[i] for i in each] for each in own]) for values in (steps, before))
        found = zip(self._layers, moved.tolist(), sizes.tolist(), strict=True)
        return {f"gradients/update_to_weight/{name}": move / size for name, move, size in found if size > 0}

    def _noise_scale(self, trained: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> float:
        half = len(targets) // 2
        if half < 1:
            return math.nan
        spread = GradientSpread(["all"])
        with untouched(self.workload):
            for part in (slice(0, half), slice(half, 2 * half)):
                loss = loss_of(self.workload, inputs[part], targets[part])
                found = torch.autograd.grad(loss, trained, allow_unused=True)
                spread.add([[torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)]])
        return spread.noise_scale(half)[0]

    def _curvature(
        self, trained: Sequence[Tensor], inputs: Tensor, targets: Tensor, steps: Sequence[Tensor]
    ) -> dict[str, float]:
        direction = flat(steps)
        with untouched(self.workload):
            product = hessian_product(loss_of(self.workload, inputs, targets), trained)
            start = self._vector
            if start is None:
                draws = torch.Generator().manual_seed(0)
                start = torch.randn(direction.numel(), generator=draws).to(direction)
            found: Spectrum = lanczos(product, start, _PRODUCTS, 1)
            figures = {"curvature/largest_eigenvalue": float(found.eigenvalues[0])}
            figures["curvature/along_update"] = curvature_along(product, direction)
        if found.vectors.isfinite().all():
            self._vector = found.vectors[0]
        return figures
