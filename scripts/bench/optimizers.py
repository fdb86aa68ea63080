"""Benchmarks optimizers: microseconds per step and bytes of state per parameter, against a counterpart.

    python scripts/bench/optimizers.py [--sizes 1 25] [--only sgdw lion] [--device cuda] [--json FILE]

dlopt's optimizers and their counterparts (torch's closest method, or another package's implementation) take turns on
equal tensors. Reports medians over the rounds and of the ratios within a round. torch's own optimizers have no
counterpart. Dense second-order methods are excluded, because their state is quadratic in the parameters.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import schedulefree
import torch
from pytorch_optimizer import LARS as TheirLARS
from pytorch_optimizer import SAM as TheirSAM
from pytorch_optimizer import Lamb as TheirLamb
from pytorch_optimizer import Lion as TheirLion
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dlopt.optim import LAMB, LARS, SAM, SGDW, Lion, Muon, NAdam, Rprop
from dlopt.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LR = 1e-6


class TorchMuon(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for the rest, stepped one after the other."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.optimizers = [
            torch.optim.Muon([p for p in params if p.ndim == 2], lr=LR, weight_decay=0.01),
            torch.optim.AdamW([p for p in params if p.ndim != 2], lr=LR),
        ]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()
            self.state.update(optimizer.state)


class TheirSAMFromAnywhere(TheirSAM):
    """pytorch-optimizer's SAM, which needs the first gradient before the step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        super().step(closure)


def in_training(optimizer: Any) -> Any:
    optimizer.train()
    return optimizer


def without_counterpart(name: str, **keys: Any) -> tuple[Make, None, str]:
    return (lambda p: getattr(torch.optim, name)(p, lr=LR, **keys)), None, ""


CASES: dict[str, tuple[Make, Make | None, str]] = {
    "sgd": without_counterpart("SGD", momentum=0.9),
    "momentum": (
        lambda p: SGDW(p, lr=LR, weight_decay=0.0),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.9),
        "torch SGD, dampening",
    ),
    "sgdw": (
        lambda p: SGDW(p, lr=LR, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.9, weight_decay=0.01),
        "torch SGD, L2",
    ),
    "rprop": (lambda p: Rprop(p, lr=LR), lambda p: torch.optim.Rprop(p, lr=LR), "torch Rprop"),
    "adagrad": without_counterpart("Adagrad"),
    "adadelta": without_counterpart("Adadelta"),
    "rmsprop": without_counterpart("RMSprop"),
    "adam": without_counterpart("Adam"),
    "adamw": without_counterpart("AdamW"),
    "nadam": (lambda p: NAdam(p, lr=LR), lambda p: torch.optim.NAdam(p, lr=LR), "torch NAdam"),
    "radam": without_counterpart("RAdam"),
    "lamb": (
        lambda p: LAMB(p, lr=LR),
        lambda p: TheirLamb(p, lr=LR, weight_decay=0.01, weight_decouple=False),
        "pytorch-optimizer",
    ),
    "lars": (lambda p: LARS(p, lr=LR), lambda p: TheirLARS(p, lr=LR, weight_decay=5e-4), "pytorch-optimizer"),
    "lion": (lambda p: Lion(p, lr=LR), lambda p: TheirLion(p, lr=LR, weight_decay=0.01), "pytorch-optimizer"),
    "muon": (lambda p: Muon(p, lr=LR, rest_lr=LR), TorchMuon, "torch Muon and AdamW"),
    "schedule_free_sgd": (
        lambda p: ScheduleFreeSGD(p, lr=LR),
        lambda p: in_training(schedulefree.SGDScheduleFree(p, lr=LR)),
        "schedulefree",
    ),
    "schedule_free_adamw": (
        lambda p: ScheduleFreeAdamW(p, lr=LR),
        lambda p: in_training(schedulefree.AdamWScheduleFree(p, lr=LR)),
        "schedulefree",
    ),
    "sam": (
        lambda p: SAM(base=torch.optim.SGD(p, lr=LR, momentum=0.9)),
        lambda p: TheirSAMFromAnywhere(p, torch.optim.SGD, lr=LR, momentum=0.9),
        "pytorch-optimizer",
    ),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=LR, max_iter=1, history_size=10), None, ""),
}


class Bench:
    """Benchmark of one optimizer on its own tensors."""

    def __init__(self, make: Make, millions: float, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        side = round((millions * 1e6 / 24) ** 0.5)
        shapes = [shape for _ in range(24) for shape in ((side, side), (side,))]
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        self.grads = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        self.optimizer = make(self.params)
        self.loss = torch.zeros((), device=device)
        self.wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def closure(self) -> Tensor:
        """Sets fresh gradients like a backward pass, because some optimizers modify them in place."""
        self.optimizer.zero_grad()
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.clone()
        return self.loss

    def step(self) -> float:
        """Makes a step; returns its seconds."""
        evaluates = isinstance(self.optimizer, SAM | TheirSAM | torch.optim.LBFGS)
        self.closure()
        self.wait()
        start = time.perf_counter()
        self.optimizer.step(self.closure if evaluates else None)  # type: ignore[arg-type]
        self.wait()
        return time.perf_counter() - start

    def state_bytes(self) -> float:
        tensors = [v for state in self.optimizer.state.values() for v in _tensors(state)]
        return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in self.params)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for entry in entries for t in _tensors(entry)]


def measure(name: str, millions: float, device: torch.device, rounds: int) -> dict[str, Any]:
    ours, theirs, counterpart = CASES[name]
    benches = [Bench(make, millions, device) for make in (ours, theirs) if make is not None]
    for bench in benches:
        for _ in range(3):
            bench.step()
    count = max(1, min(50, int(0.05 / benches[0].step())))
    times: list[list[float]] = [[] for _ in benches]
    for i in range(rounds):
        turns = list(enumerate(benches))
        for j, bench in turns if i % 2 == 0 else reversed(turns):
            times[j].append(statistics.median(bench.step() for _ in range(count)))
    result = {"optimizer": name, "millions": millions, "microseconds": statistics.median(times[0]) * 1e6}
    result["state_bytes"] = benches[0].state_bytes()
    if theirs is not None:
        result |= {"counterpart": counterpart, "counterpart_microseconds": statistics.median(times[1]) * 1e6}
        result["ratio"] = statistics.median(a / b for a, b in zip(*times, strict=True))
        result["counterpart_state_bytes"] = benches[1].state_bytes()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 25], help="millions of parameters")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

    table = Table(title=f"torch {torch.__version__}, {machine}")
    for column in ("optimizer", "M parameters", "us/step", "bytes", "counterpart", "us/step", "bytes", "ratio"):
        table.add_column(column, justify="left" if column in ("optimizer", "counterpart") else "right")
    results = []
    for millions in arguments.sizes:
        for name in arguments.only:
            r = measure(name, millions, device, arguments.rounds)
            results.append(r)
            row = [name, f"{millions:g}", f"{r['microseconds']:,.0f}", f"{r['state_bytes']:.1f}"]
            if "ratio" in r:
                row += [r["counterpart"], f"{r['counterpart_microseconds']:,.0f}"]
                row += [f"{r['counterpart_state_bytes']:.1f}", f"{r['ratio']:.2f}"]
            table.add_row(*row)
    Console(width=None if Console().is_terminal else 130).print(table)
    if arguments.json:
        report = {"torch": torch.__version__, "machine": machine, "rounds": arguments.rounds, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
