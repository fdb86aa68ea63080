"""Decides about torch.compile and CUDA graphs where a key is `auto`."""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dlopt.basics.errors import UserError
from dlopt.config.conflicts import splits_model
from dlopt.config.run_config import RunConfig
from dlopt.machine.cuda_graphs import Recorder
from dlopt.models.known import unknown_part
from dlopt.models.layers import copied_state, evaluation_mode, example_inputs, replaced_forwards
from dlopt.parallel.mode import Mode
from dlopt.training.builders.precision import Precision

P = ParamSpec("P")
R = TypeVar("R")

_WORTH_THREADS = 4e6  # FLOPs of a layer for a batch: about 100 microseconds of one core
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # torch.compile's modes that record CUDA graphs themselves
_SAMPLES = 2  # some models squeeze a batch of one
_SHAPES = 64  # batch shapes that torch compiles a graph for, before it gives up and runs the model eagerly
# Products and decompositions of torch that its counter of FLOPs ignores, by the start of their name.
_UNCOUNTED = (
    "mv", "addmv", "dot", "vdot", "addr", "addbmm", "_trilinear", "_cdist", "_fft", "linalg_", "_linalg_", "cholesky",
    "triangular_solve", "lu_", "qr", "svd", "_native_multi_head", "_transformer_enc",
)  # fmt: skip
_WORTH_COMPILING = 3e16  # FLOPs of a run (a few GPU minutes) below which compiling takes longer than it saves


def compile_obstacle(run_config: RunConfig, parallel: Mode, flops: float | None, samples: int) -> str:
    """Returns why the model is not compiled; empty if it is.

    `flops`: of a training sample, for compile=auto on a GPU; None if unknown. `samples`: of an epoch. Raises
    `UserError` for a requested compilation that the device does not support.
    """
    settings, device = run_config.settings, parallel.device.type
    if settings.compile is False:
        return "compile=false"
    if splits_model(run_config.parallel) and parallel.ranks.processes > 1:
        return f"parallel={parallel.name} communicates between layers"
    if settings.compile == "reduce-overhead" and device != "cuda":
        raise UserError(f"compile=reduce-overhead: replays CUDA graphs, which {device} does not have; use compile=true")
    if settings.compile != "auto":
        return ""
    if settings.activation_checkpointing != "none":
        return f"activation_checkpointing={settings.activation_checkpointing}"
    if {*settings.diagnostics} - {"curvature"}:
        return "the hooks of diagnostics do not run in a compiled model"
    if device != "cuda":
        return f"compiling takes longer than it saves on {device}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if find_spec("triton") is None or compiler is None:
        return "Triton or a C compiler is missing"
    if flops is None:
        return "the FLOPs of the model cannot be counted"
    size = run_config.data_settings.batch_size
    batch_size = samples if size == "full" else min(size, samples)
    total = settings.steps * batch_size if settings.steps else settings.whole_epochs * samples
    if flops * total < _WORTH_COMPILING:
        return "compiling takes longer than it saves in a run this short"
    return ""


def compiled(function: Callable[P, R], setting: bool | str) -> Callable[P, R]:
    """Returns the function under torch.compile. `setting`: true, auto, blocks, or one of torch's modes."""
    # By default, torch compiles one graph of variable size from the second shape on: the kernels of a batch, and so the
    # last bits, would depend on earlier batches, on where a run was resumed, and on earlier runs in the process.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    # By default, torch 2.11 does not check a module's parameters again while it has the same tensors: after a schedule
    # has frozen some (`horizon`) it would compute their gradients, and after unfreezing none.
    torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    mode = None if isinstance(setting, bool) or setting in ("auto", "blocks") else setting
    replayed: Callable[P, R] = torch.compile(function, mode=mode, dynamic=False)
    if setting not in GRAPH_MODES:
        return replayed

    def run(*inputs: P.args, **options: P.kwargs) -> R:
        torch.compiler.cudagraph_mark_step_begin()
        # Metrics keep outputs, whose memory the next replay overwrites.
        return tree_map_only(Tensor, torch.clone, replayed(*inputs, **options))

    return run


def with_compiled_blocks(model: Callable[P, R], blocks: Sequence[nn.Module]) -> Callable[P, R]:
    """Returns `model` with its blocks compiled one by one. Blocks of one class and shape share a compilation.

    They are compiled while `model` runs. At other times they stay as they are, with hooks and second derivatives.
    """
    forwards = {block: compiled(block.forward, "blocks") for block in blocks}

    def run(*inputs: P.args, **options: P.kwargs) -> R:
        with replaced_forwards(forwards):
            return model(*inputs, **options)

    return run


def prefers_one_thread(module: nn.Module, shape: tuple[int, ...], samples: int) -> bool:
    """Returns whether one CPU thread trains the model as fast as several, because its layers are small.

    Decides by their size, not by a timing: the number of threads changes the last bits of the results. `samples`: of a
    micro-batch.
    """
    work: list[float] = []  # FLOPs per sample of each call of a layer; a recurrent layer is called at each time step

    def count(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(layer.weight, Tensor) and isinstance(output, Tensor):
            work.append(2 * layer.weight.numel() / len(layer.weight) * output.numel() / _SAMPLES)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | _ConvNd)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with evaluation_mode(module), torch.no_grad():
            module(example_inputs(module, shape, count=_SAMPLES, device="cpu"))
    except Exception:  # a third-party model that does not take zeros
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return bool(work) and sum(work) * samples < _WORTH_THREADS * len(work)


class _Uncounted(TorchDispatchMode):
    """Raises NotImplementedError for an operation whose FLOPs are not known: a sum without it would be too small."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, is_torch = function.overloadpacket.__name__, function.namespace in ("aten", "prim", "prims")
        if function.overloadpacket not in flop_registry and (name.startswith(_UNCOUNTED) or not is_torch):
            raise NotImplementedError(f"the FLOPs of {function} are not known")
        return function(*args, **(kwargs or {}))


def forward_flops(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Counts the FLOPs of one sample in matrix products and convolutions, on the meta device (nothing is computed).

    Raises NotImplementedError for an operation whose FLOPs are not known.
    """
    inputs = example_inputs(module, shape, count=2, device="meta")
    # The counter, which is asked first, breaks operations into those that it knows.
    with torch.no_grad(), _Uncounted(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, copied_state(module, "meta"), (inputs,))
    return counter.get_total_flops() / len(inputs)


def training_flops(module: nn.Module, shape: tuple[int, ...]) -> float | None:
    """Returns the FLOPs of one training sample, counting the backward pass as two forward passes.

    None if the model does not run on the meta device (a third-party model), or has operations that are not counted.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            return 3 * forward_flops(module, shape)
    except Exception:
        return None
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def data_recorder(run_config: RunConfig, device: torch.device, parts: Sequence[object]) -> Recorder | None:
    """Returns the recorder that captures the data path as a CUDA graph; None if it runs eagerly.

    `parts`: what the path calls. A graph would repeat the numbers that a user's component computes on the host.
    """
    settings = run_config.settings
    hooked = settings.diagnostics or settings.profile  # into single batches
    is_eager = device.type != "cuda" or settings.cuda_graphs is False or hooked or any(map(unknown_part, parts))
    return None if is_eager else Recorder()


def describe_auto(
    run_config: RunConfig, precision: Precision, compile_obstacle: str, graph_obstacle: str | None
) -> str:
    """Returns the values chosen for keys set to `auto`, in one line; empty if there are none."""
    settings = run_config.settings
    values = [f"precision=auto: {precision.name}"] if settings.precision == "auto" else []
    obstacles = {"compile": compile_obstacle}
    if precision.device.type == "cuda":
        obstacles["cuda_graphs"] = graph_obstacle or ""
    for key, obstacle in obstacles.items():
        if getattr(settings, key) == "auto":
            values.append(f"{key}=auto: " + (f"false ({obstacle})" if obstacle else "true"))
    return " | ".join(values)
