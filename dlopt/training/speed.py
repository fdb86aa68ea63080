"""What makes an experiment fast on this machine, where that is left to dlopt: compiling, and recording updates."""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dlopt.config.experiment import Experiment
from dlopt.errors import UserError
from dlopt.graphs import CudaRecorder, Recorder
from dlopt.parallel.mode import Mode
from dlopt.training.precision import Precision

_WORTH_COMPILING = 3e16  # operations of a run: below these minutes of a GPU, compiling takes longer than it spares


def compiles(experiment: Experiment, parallel: Mode, module: nn.Module, shape: tuple[int, ...], samples: int) -> str:
    """Why the model is not compiled, in words; empty: it is. `samples`: in an epoch.

    Raises `UserError` where compile=true cannot be.
    """
    settings = experiment.settings
    if settings.compile is False:
        return "compile=false"
    if not parallel.compiles:
        if settings.compile is True:
            raise UserError(f"compile=true: not with parallel={parallel.name}, whose processes meet between the layers")
        return f"parallel={parallel.name}: its processes meet between the layers"
    if settings.compile is True:
        return ""
    if parallel.device.type != "cuda":
        return f"on {parallel.device.type} it takes longer than it spares"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if find_spec("triton") is None or compiler is None:
        return "there is no Triton, or no C compiler"
    size = experiment.data_settings.batch_size
    steps = settings.steps or 0
    seen = steps * (samples if size == "full" else size) if steps else settings.epochs * samples
    if 3 * forward_operations(module, shape) * seen < _WORTH_COMPILING:
        return "it takes longer than it spares in a run as short as this"
    return ""


def forward_operations(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Of one sample: additions and multiplications in matrix products and convolutions, counted without computing."""
    state = {name: tensor.detach().to("meta") for name, tensor in module.state_dict().items()}
    inputs = torch.empty(2, *shape, device="meta", dtype=next(module.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, state, (inputs,))
    return counter.get_total_flops() / len(inputs)


def recorder(experiment: Experiment, device: torch.device) -> Recorder | None:
    """What records the data path as a CUDA graph; None: it is not recorded."""
    settings = experiment.settings
    observed = settings.diagnostics or settings.profile  # these look at single batches
    return CudaRecorder() if device.type == "cuda" and settings.cuda_graphs is not False and not observed else None


def chosen(experiment: Experiment, precision: Precision, uncompiled: str, unrecorded: str | None) -> str:
    """What was chosen where `auto` stands, in one line; empty where nothing was left to dlopt."""
    settings = experiment.settings
    told = []
    if settings.precision == "auto":
        told.append(f"precision=auto: {precision.name}")
    if settings.compile == "auto":
        told.append(f"compile=auto: false ({uncompiled})" if uncompiled else "compile=auto: true")
    if settings.cuda_graphs == "auto" and precision.device.type == "cuda":
        told.append(f"cuda_graphs=auto: false ({unrecorded})" if unrecorded else "cuda_graphs=auto: true")
    return " | ".join(told)
