"""Decides about torch.compile and CUDA graphs where a key is `auto`."""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dlopt.config.experiment import Experiment
from dlopt.errors import UserError
from dlopt.graphs import Recorder
from dlopt.models.layers import example_inputs
from dlopt.parallel.mode import Mode
from dlopt.training.precision import Precision

_WORTH_COMPILING = 3e16  # FLOPs of a run (a few GPU minutes) below which compiling takes longer than it saves


def compile_obstacle(
    experiment: Experiment, parallel: Mode, module: nn.Module, shape: tuple[int, ...], samples: int
) -> str:
    """Returns why the model is not compiled; empty: it is. `samples`: number of samples in an epoch.

    Raises `UserError` for compile=true with a mode that cannot be compiled.
    """
    settings = experiment.settings
    if settings.compile is False:
        return "compile=false"
    if not parallel.compiles:
        if settings.compile is True:
            raise UserError(f"compile=true: parallel={parallel.name} communicates between layers; use compile=auto")
        return f"parallel={parallel.name} communicates between layers"
    if settings.compile is True:
        return ""
    if parallel.device.type != "cuda":
        return f"compiling takes longer than it saves on {parallel.device.type}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if find_spec("triton") is None or compiler is None:
        return "Triton or a C compiler is missing"
    size = experiment.data_settings.batch_size
    batch_size = samples if size == "full" else size
    total = settings.steps * batch_size if settings.steps else settings.epochs * samples
    if 3 * forward_flops(module, shape) * total < _WORTH_COMPILING:  # the backward pass takes twice the forward's
        return "compiling takes longer than it saves in a run this short"
    return ""


def forward_flops(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Counts the FLOPs of one sample in matrix products and convolutions, on the meta device (nothing is computed)."""
    state = {name: tensor.detach().to("meta") for name, tensor in module.state_dict().items()}
    inputs = example_inputs(module, shape, count=2, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, state, (inputs,))
    return counter.get_total_flops() / len(inputs)


def data_recorder(experiment: Experiment, device: torch.device) -> Recorder | None:
    """Returns the recorder that captures the data path as a CUDA graph; None: it runs eagerly."""
    settings = experiment.settings
    observed = settings.diagnostics or settings.profile  # they hook into single batches
    return Recorder() if device.type == "cuda" and settings.cuda_graphs is not False and not observed else None


def describe_auto(
    experiment: Experiment, precision: Precision, compile_obstacle: str, graph_obstacle: str | None
) -> str:
    """Returns the values chosen for keys set to `auto`, in one line; empty if there are none."""
    settings = experiment.settings
    values = []
    if settings.precision == "auto":
        values.append(f"precision=auto: {precision.name}")
    if settings.compile == "auto":
        values.append(f"compile=auto: false ({compile_obstacle})" if compile_obstacle else "compile=auto: true")
    if settings.cuda_graphs == "auto" and precision.device.type == "cuda":
        values.append(f"cuda_graphs=auto: false ({graph_obstacle})" if graph_obstacle else "cuda_graphs=auto: true")
    return " | ".join(values)
