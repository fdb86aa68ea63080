"""Counts the work of one update without running it, and bounds the time that a card needs for it. Needs no GPU.

    python scripts/bench/roofline.py [--only gpt2_small,cifar10_speed,...] [--nanogpt FOLDER] [--airbench FILE]
                                     [--tflops 989] [--tflops-fp32 67] [--terabytes 3.35] [--top 8] [--json FILE]
                                     [KEY=VALUE ...]

The update is dlopt's own (`Step.update`, as `dlopt train compile=true precision=bf16` builds it), on fake tensors: they
have shapes, but no values. --nanogpt (a checkout) and --airbench (airbench94_muon.py) add the update of these files,
with their own model and optimizer. If timm is installed, the training step of its train.py is added for the last three
subjects. KEY=VALUE changes the config, also to compile=false. For each program:

- TFLOP: of products, convolutions and attention, which takes half of them for a causal mask;
- GB: memory traffic, if each operation reads its inputs from memory and writes its outputs;
- GB fused: the traffic of the products, convolutions and attention of compiled functions, and of everything outside of
  compiled functions: as if the compiler fused all else into these;
- GB of parameters: weights, gradients and optimizer state, which every program reads and writes once;
- launches: operations that compute; those outside are not part of a compiled function;
- unaligned: products with a dimension >= 1024 that is no multiple of 8 values (16 bytes of bf16), for which a GPU has
  no fast kernels;
- lower ms: the larger of the time of the FLOPs and that of the parameters; no program is faster;
- fused ms, upper ms: the sum over the operations of the larger of the time of their FLOPs and of their traffic (fused
  or not). Kept times of unfused programs are longer still: kernels do not reach the nominal rates (default: H100
  SXM), and short ones are limited by their launch.

Not counted: the batch (read, augmented, normalized), logging, and the sums of the metrics over many updates. The
operations are those of a CPU, which differ from CUDA's in places: one fused attention kernel instead of another, for
example. Autocast is that of CUDA.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dlopt.basics.length import BatchCount, Length, SampleCount, UpdateCount
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import RunConfig
from dlopt.data.batches import Batch
from dlopt.data.samples import Dataset, InMemory
from dlopt.metrics.sums import MetricSum
from dlopt.models import linear
from dlopt.optim.parameters import freeze
from dlopt.parallel.mode import Mode
from dlopt.tasks.classification import Classification
from dlopt.tasks.task import Task
from dlopt.tasks.text import NextToken
from dlopt.training.builders.model_check import build_on_meta
from dlopt.training.builders.optimizer import build_optimizer, build_schedule
from dlopt.training.builders.precision import Precision
from dlopt.training.builders.step import build_step
from dlopt.training.builders.workload import Workload
from dlopt.training.evaluate import has_train_accuracy

CPU, META = torch.device("cpu"), torch.device("meta")
_ALIGNMENT = 8  # values of bf16 in the 16 bytes that a tensor core loads
_LARGE = 1024  # dimension of a product, below which its time matters little

_ALIKE: dict[str, Any] = {  # torch 2.11 does not know the FLOPs of attention on a processor
    "_scaled_dot_product_flash_attention_for_cpu": torch.ops.aten._scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": torch.ops.aten._scaled_dot_product_flash_attention_backward,
}

# Operations that read or write few rows of their first tensor, which counts as much as the largest other one.
_SPARSE = {
    "embedding", "gather", "index", "index_select", "nll_loss_forward", "scatter_", "scatter_add_", "index_put_",
    "index_add_", "index_copy_",
}  # fmt: skip
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}  # they do not read it
_ALLOCATING = ("empty", "new_empty", "lift_fresh")


@dataclass(frozen=True)
class Card:
    """Rates of a card: FLOP/s of 16-bit and of fp32 products, and bytes/s of its memory."""

    half: float = 989e12
    single: float = 67e12
    memory: float = 3.35e12

    def seconds(self, flops: float, bytes: float, dtype: torch.dtype) -> float:
        return max(flops / (self.half if dtype.itemsize == 2 else self.single), bytes / self.memory)


class Regions:
    """Replaces torch.compile: runs functions as they are, and knows which operations are part of them.

    An operation of a backward pass is part of a function if its node was created in it.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._nodes: list[range] = []  # sequence numbers

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            first, self._depth = _get_sequence_nr(), self._depth + 1
            try:
                with patch("torch.compiler.is_compiling", lambda: True):
                    return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self._nodes.append(range(first, _get_sequence_nr()))

        return run

    @property
    def is_inside(self) -> bool:
        """Whether the present operation is part of a compiled function."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._depth > 0
        return node.name().endswith("AccumulateGrad") or any(node._sequence_nr() in nodes for nodes in self._nodes)


@dataclass
class Work:
    """Work of all calls of an operation on values of one dtype, within compiled functions or outside."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0  # the sum of those of each call: the time of a sum is less than the sum of the times


@dataclass
class Counted:
    """Work of one update."""

    operations: dict[tuple[str, torch.dtype, bool], Work] = field(default_factory=lambda: defaultdict(Work))
    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # by (m, k, n)
    parameter_bytes: float = 0.0  # traffic of weights, gradients and optimizer state

    def total(self, name: str, *, fused: bool = False, outside: bool = False) -> float:
        """Sums a field of `Work` over all operations.

        `outside`: over those outside of compiled functions. `fused`: over these, and over the products, convolutions
        and attention of compiled functions.
        """
        return sum(
            getattr(work, name)
            for (_, _, is_compiled), work in self.operations.items()
            if not is_compiled or not (outside or (fused and not work.flops))
        )

    @property
    def unaligned(self) -> list[tuple[int, int, int]]:
        """The products (m, k, n) with a large dimension that is not aligned."""
        return [dims for dims in self.products if any(dim >= _LARGE and dim % _ALIGNMENT for dim in dims)]

    def summary(self, card: Card) -> dict[str, float]:
        flops = sum(card.seconds(work.flops, 0, dtype) for (_, dtype, _), work in self.operations.items())
        return {
            "TFLOP": self.total("flops") / 1e12,
            "GB": self.total("bytes") / 1e9,
            "GB fused": self.total("bytes", fused=True) / 1e9,
            "GB of parameters": self.parameter_bytes / 1e9,
            "launches": self.total("calls"),
            "launches outside": self.total("calls", outside=True),
            "unaligned": sum(self.products[dims] for dims in self.unaligned),
            "lower ms": max(flops, self.parameter_bytes / card.memory) * 1e3,
            "fused ms": self.total("seconds", fused=True) * 1e3,
            "upper ms": self.total("seconds") * 1e3,
        }


class WorkCounter(TorchDispatchMode):
    """Counts the work of all operations in its context."""

    def __init__(self, card: Card, regions: Regions) -> None:
        super().__init__()
        self.card = card
        self.regions = regions
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.partition("::")[2]
        named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        inputs = {each.name: _tensors(named.get(each.name)) for each in schema.arguments}
        # torch's fused optimizers declare that they write gradients, which they do with a loss scaler only.
        mutated = [each.name for each in schema.arguments if each.is_write and each.name != "grads"]
        outputs = _tensors(output) if not mutated else []
        if name.startswith(_ALLOCATING) or _is_view(inputs, mutated, outputs):
            return output

        sizes = {key: sum(map(_bytes, tensors)) for key, tensors in inputs.items()}
        written = sum(map(_bytes, outputs))
        if name in _SPARSE:
            first, *others = sizes
            sizes[first] = min(sizes[first], max(written, *(sizes[each] for each in others)))
        bytes = sum(sizes.values()) + sum(sizes[each] for each in mutated) + written
        if name in _OVERWRITING:
            bytes -= sizes[mutated[0]]

        formula = flop_registry.get(func.overloadpacket) or flop_registry.get(_ALIKE.get(name))
        flops = 0.0 if formula is None else formula(*args, **kwargs, out_val=output)
        if named.get("is_causal"):
            flops /= 2  # kernels skip the scores above the diagonal
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = [tensor for tensors in inputs.values() for tensor in tensors][-2:]
            self.counted.products[(*left.shape[-2:], right.shape[-1])] += 1
        everything = [*outputs, *(tensor for tensors in inputs.values() for tensor in tensors)]
        dtype = max(everything, key=_bytes).dtype if everything else torch.float32
        work = self.counted.operations[name, dtype, self.regions.is_inside]
        work.calls += 1
        work.flops += flops
        work.bytes += bytes
        work.seconds += self.card.seconds(flops, bytes, dtype)
        return output


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in memory, where the elements of an expanded dimension are one."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _is_view(inputs: Mapping[str, list[Tensor]], mutated: list[str], outputs: list[Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensors in inputs.values() for tensor in tensors}
    return not mutated and all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


class CudaAutocast(TorchFunctionMode):
    """Computes in fp32 what autocast computes in fp32 on CUDA, but in bf16 on a CPU."""

    NAMES = frozenset(
        ("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss",
         "binary_cross_entropy_with_logits", "kl_div", "exp", "log", "pow", "prod", "sum", "norm", "rsqrt", "softplus")
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.NAMES and torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(each) for each in args)
            kwargs = {key: _wide(each) for key, each in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@dataclass(frozen=True)
class Program:
    """An update on fake tensors."""

    mode: FakeTensorMode
    regions: Regions
    update: Callable[[], object]
    optimizers: list[Optimizer]

    def count(self, card: Card) -> Counted:
        """Counts the second update; the first one allocates the optimizer's state."""
        with on_a_gpu(self.mode), CudaAutocast():
            self.update()
            with WorkCounter(card, self.regions) as counter:
                self.update()
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                # Gradients are written and read, the others read and written.
                kept = [parameter, parameter, *(value for value in state.values() if isinstance(value, Tensor))]
                counter.counted.parameter_bytes += 2 * sum(map(_bytes, kept))
        return counter.counted


@contextmanager
def on_a_gpu(mode: FakeTensorMode) -> Iterator[None]:
    """Context in which all new tensors are fake, and linear layers use the operations that they use on a GPU."""
    with patch.multiple(linear, _PREFERS_ONEDNN=False, needs_padding=_needs_padding), mode:
        yield


def _needs_padding(layer: nn.Linear, input: Tensor) -> bool:
    """As `linear.needs_padding` on CUDA, which refuses fake tensors for their type."""
    outputs = len(layer.weight)
    return outputs >= linear._WIDE and outputs % linear._ALIGNED != 0


def faked(module: nn.Module) -> None:
    """Replaces the parameters and buffers of a module on the meta device, which has no optimizers, by fake tensors."""
    replaced: dict[Tensor, Tensor] = {}
    for layer in module.modules():
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if tensor not in replaced:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                replaced[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            setattr(layer, name, replaced[tensor])


def dlopt_program(run_config: RunConfig, task: Task, shape: tuple[int, ...]) -> Program:
    """Builds the update of a config as `dlopt train` does, without adapters, initial values and data.

    `shape`: of the model's input. The update checks for non-finite values as on a GPU.
    """
    parallel, precision = Mode(CPU), Precision(run_config.settings.precision, CPU)
    module = replace(precision, device=META).place(build_on_meta(run_config.model, task.model_arguments(shape)))
    is_image = len(shape) == 3 and any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    memory_format = torch.channels_last if is_image else torch.contiguous_format
    module = module.to(memory_format=memory_format)
    regions = Regions()
    with FakeTensorMode() as mode, patch("torch.compile", regions.compile):
        faked(module)
        freeze(module, run_config.grouping)
        placed = parallel.place(module, shape)
        sample = torch.empty(1, *shape, dtype=torch.uint8)
        workload = Workload(
            run_config=run_config,
            parallel=parallel,
            precision=precision,
            dataset=Dataset(InMemory(sample, torch.empty(1)), None, None, None, unlabelled=task),
            normalize=nn.Identity(),
            module=module,
            placed=placed,
            model=placed.model,
            loss=precision.place_data(run_config.loss.build(**task.target_arguments)),
            memory_format=memory_format,
            augment=None,
            compile_obstacle="" if run_config.settings.compile is True else "compile=false",
        )
        optimizer = build_optimizer(workload)
        samples, batches = int(run_config.data_settings.batch_size), BatchCount(1000)
        length = Length(UpdateCount(1000), batches, batches, SampleCount(samples), SampleCount(1000 * samples))
        schedule = build_schedule(workload, optimizer, length)
        metrics = MetricSum(task, accuracy=has_train_accuracy(workload))
        step = build_step(workload, workload.network, optimizer, schedule, metrics=metrics, average=None, checks=True)
        step.check.immediate = False  # it is immediate on a CPU, and would read values
        if task.tokens is None:
            inputs = torch.empty(samples, *shape, dtype=precision.dtype).to(memory_format=memory_format)
            targets = torch.empty(samples, dtype=torch.int64)
        else:
            inputs, targets = (torch.empty(samples, *shape, dtype=torch.int64) for _ in range(2))
        batch = Batch(inputs, targets, samples)
    return Program(mode, regions, lambda: step.update(batch, 1), [optimizer])


def nanogpt_program(run_config: RunConfig, task: Task, shape: tuple[int, ...], checkout: Path) -> Program:
    """Builds the update of nanoGPT's train.py with its model.py, for a GPT of the size of the config, in bf16.

    Copies the lines of its loop between two batches; its loss scaler does nothing in bf16.
    """
    nanogpt, keys = _imported(checkout / "model.py"), run_config.model.arguments
    vocabulary = math.ceil(task.outputs / 64) * 64  # as its train.py does for GPT-2
    with META, patch("builtins.print"):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(shape[0], vocabulary, keys["depth"], keys["heads"], keys["width"], 0.0, keys["bias"])
        )
    regions, samples = Regions(), int(run_config.data_settings.batch_size)
    with FakeTensorMode() as mode, patch("builtins.print"):
        faked(model)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
        inputs, targets = (torch.empty(samples, *shape, dtype=torch.int64) for _ in range(2))
    compiled = regions.compile(model) if run_config.settings.compile is True else model

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = compiled(inputs, targets)
            loss = loss / 1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Program(mode, regions, update, [optimizer])


def airbench_program(run_config: RunConfig, task: Task, shape: tuple[int, ...], file: Path) -> Program:
    """Builds the update of airbench94_muon.py, with its model and optimizers: fp16, batch 2000. Copies its loop."""
    regions = Regions()
    with patch("torch.compile", regions.compile), patch.object(sys, "argv", [str(file)]):
        airbench = _imported(file)
    with META:
        model = airbench.CifarNet().to(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        faked(model)
        filters = [p for p in model.parameters() if len(p.shape) == 4 and p.requires_grad]
        biases = [p for name, p in model.named_parameters() if "norm" in name and p.requires_grad]
        groups = [{"params": [model.whiten.bias]}, {"params": biases}, {"params": [model.head.weight]}]
        rest = torch.optim.SGD(groups, lr=0.053, weight_decay=0.1, momentum=0.85, nesterov=True, fused=True)
        muon = airbench.Muon(filters, lr=0.24, momentum=0.6, nesterov=True)
        inputs = torch.empty(2000, 3, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
        labels = torch.empty(2000, dtype=torch.int64)
    compiled = regions.compile(model)

    def update() -> None:
        outputs = compiled(inputs)
        F.cross_entropy(outputs, labels, label_smoothing=0.2, reduction="sum").backward()
        rest.step()
        muon.step()
        model.zero_grad(set_to_none=True)

    return Program(mode, regions, update, [rest, muon])


# The model of timm, and its optimizer; None: it has none of this kind, so it trains dlopt's.
TIMM: dict[str, tuple[str | None, str]] = {
    "resnet50": ("resnet50", "sgd"), "vit_small": ("vit_small_patch16_224", "adamw"), "wrn_28_10": (None, "sgd"),
}  # fmt: skip


def timm_program(run_config: RunConfig, task: Task, shape: tuple[int, ...], subject: str) -> Program:
    """Builds the update of timm's train.py --torchcompile --amp --amp-dtype bfloat16 --channels-last.

    Copies the lines of its loop. On a GPU, torch's optimizers default to their foreach functions.
    """
    import timm
    from timm.optim import create_optimizer_v2

    (name, choice), regions, samples = TIMM[subject], Regions(), int(run_config.data_settings.batch_size)
    with META:
        model = (
            build_on_meta(run_config.model, task.model_arguments(shape)) if name is None else timm.create_model(name)
        )
    model = model.to(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        faked(model)
        optimizer = create_optimizer_v2(model, opt=choice, lr=0.1, weight_decay=1e-4, momentum=0.9, foreach=True)
        inputs = torch.empty(samples, *shape).to(memory_format=torch.channels_last)
        labels = torch.empty(samples, dtype=torch.int64)
    compiled = regions.compile(model) if run_config.settings.compile is True else model

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(compiled(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Program(mode, regions, update, [optimizer])


def _imported(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {file.stem: module}), patch("builtins.print"):  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


CIFAR10 = (Classification(10), (3, 32, 32))
GPT2 = (NextToken(50257, predictions=1024), (1024,))
IMAGENET = (Classification(1000), (3, 224, 224))
# As timm's.
SGD = ["optimizer.nesterov=true", "optimizer.weight_decay=1e-4", "decay_norm_and_bias=false"]
# The configs of the tables in docs/speed.md: overrides, what the model predicts, and the shape of its input.
SUBJECTS: dict[str, tuple[list[str], tuple[Task, tuple[int, ...]]]] = {
    "gpt2_small": (
        ["data=tokens", "data.root=.", "data.batch_size=32", "model=gpt2_small", "model.bias=false", "optimizer=adamw",
         "optimizer.betas=[0.9,0.95]", "optimizer.weight_decay=0.1", "decay_norm_and_bias=false", "clip=norm"],
        GPT2,
    ),
    "cifar10_speed": (["experiment=cifar10_speed"], CIFAR10),
    "resnet20": (["model=resnet20", "data.batch_size=128"], CIFAR10),
    "resnet18": (["model=resnet18", "data.batch_size=512"], CIFAR10),
    "wrn_28_10": (["model=wrn_28_10", "data.batch_size=128", *SGD], CIFAR10),
    "resnet50": (["model=resnet50", "model.stem=imagenet", "data.batch_size=256", *SGD], IMAGENET),
    "vit_small": (
        ["model=vit", "model.patch=16", "model.width=384", "model.depth=12", "model.heads=6", "data.batch_size=512",
         "optimizer=adamw", "decay_norm_and_bias=false"],
        IMAGENET,
    ),
}  # fmt: skip

RUN = ("precision=bf16", "compile=true")


def run_config(*overrides: str) -> RunConfig:
    return parse(to_plain(Composer(words=overrides).compose(overrides))[0])


def show(subject: str, programs: Mapping[str, Counted], card: Card, top: int) -> None:
    rows = {name: counted.summary(card) for name, counted in programs.items()}
    table = Table(title=f"{subject}: one update")
    for column in ("", *rows):
        table.add_column(column, justify="right" if column else "left")
    for name in next(iter(rows.values())):
        table.add_row(name, *(f"{row[name]:,.4g}" for row in rows.values()))
    Console().print(table)
    for name, counted in programs.items():
        largest = sorted(counted.operations.items(), key=lambda each: -each[1].seconds)[:top]
        for (operation, dtype, is_compiled), work in largest:
            where = "compiled" if is_compiled else "outside"
            print(f"{name}: {work.calls:4} x {operation}, {dtype}, {where}: {work.seconds * 1e3:.2f} ms")
        for dims in counted.unaligned:
            print(f"{name}: {counted.products[dims]:4} x unaligned product, (m, k, n) = {dims}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--only", default=",".join(SUBJECTS))
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER")
    parser.add_argument("--airbench", type=Path, metavar="FILE")
    parser.add_argument("--tflops", type=float, default=Card.half / 1e12)
    parser.add_argument("--tflops-fp32", type=float, default=Card.single / 1e12)
    parser.add_argument("--terabytes", type=float, default=Card.memory / 1e12)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := sorted(set(options.only.split(",")) - SUBJECTS.keys()):
        parser.error(f"--only {unknown[0]}: must be of {', '.join(SUBJECTS)}")
    if options.nanogpt is not None and not (options.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt {options.nanogpt}: must be a checkout of nanoGPT; it has no model.py")
    if options.airbench is not None and not options.airbench.is_file():
        parser.error(f"--airbench {options.airbench}: no such file; it must be airbench94_muon.py")
    card = Card(options.tflops * 1e12, options.tflops_fp32 * 1e12, options.terabytes * 1e12)
    peers: dict[str, tuple[str, Callable[..., Program], Path | str]] = {}
    if importlib.util.find_spec("timm") is not None:
        peers.update({subject: ("timm", timm_program, subject) for subject in TIMM})
    if options.nanogpt is not None:
        peers["gpt2_small"] = ("nanoGPT", nanogpt_program, options.nanogpt)
    if options.airbench is not None:
        peers["cifar10_speed"] = ("airbench94_muon.py", airbench_program, options.airbench)
    results = {}
    for subject in options.only.split(","):
        overrides, sample = SUBJECTS[subject]
        config = run_config(*overrides, *RUN, *options.overrides)
        programs = {"dlopt": dlopt_program(config, *sample).count(card)}
        if subject in peers:
            name, build, source = peers[subject]
            programs[name] = build(config, *sample, source).count(card)
        show(subject, programs, card, options.top)
        results[subject] = {name: counted.summary(card) for name, counted in programs.items()}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
