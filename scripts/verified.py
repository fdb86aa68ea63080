"""Verifies the optimizers of dlopt, torch, timm, schedulefree and pytorch-optimizer: the matrix of the docs.

    .venv/bin/python scripts/verified.py     # what docs/verify/matrix.json lacks for the installed versions

Each optimizer is verified in a process of its own, with its default arguments. The script may be interrupted and
repeated; docs/generate.py then writes the page. docs/verify/confirmed.yaml holds the failures that were reproduced by
hand.
It needs `pip install timm schedulefree pytorch-optimizer`, and about 10 minutes on one core.
"""

import argparse
import inspect
import json
import multiprocessing
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first update imports it: once for all processes

from dlopt.lab.verify.command import certify
from dlopt.lab.verify.methods import known
from dlopt.lab.verify.subject import Subject

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "verify"
PACKAGES = {
    "dlopt": ("dlopt.optim", "dlopt.optim.schedule_free"),
    "torch": ("torch.optim",),
    "timm": ("timm.optim",),
    "schedulefree": ("schedulefree",),
    "pytorch-optimizer": ("pytorch_optimizer",),
}
SECONDS = 60  # for one optimizer
SGD: tuple[Any, Mapping[str, Any]] = (torch.optim.SGD, {"lr": 0.1})
REQUIRED: dict[str, dict[str, Any]] = {  # arguments without defaults
    **{name: {"base_optimizer": torch.optim.SGD, "lr": 0.1} for name in ("SAM", "FriendlySAM", "LookSAM")},
    "BSAM": {"num_data": 50_000},
    "Ranger21": {"num_iterations": 100},
    "SGDP": {"lr": 0.1},  # of timm; that of pytorch-optimizer has another default
}
WRAPPERS = {
    **{name: "optimizer" for name in ("Lookahead", "Magma", "OrthoGrad", "ScheduleFreeWrapper", "TRAC")},
    "timm.Lookahead": "base_optimizer",
}
NOT_RUN = {
    **dict.fromkeys(("AdaLOMO", "LOMO", "AdamMini", "WSAM", "GSAM"), "takes a model"),
    "DeMo": "needs einops and a process group",
    "DistributedMuon": "needs a process group",
    "LoRARite": "takes pairs of LoRA matrices",
    "SaRA": "trains only weights below a threshold",
    "PCGrad": "takes several losses",
    "SafeFP16Optimizer": "scales losses in float16",
}


def classes(package: str) -> Iterator[tuple[str, Any]]:
    """Yields the optimizers that a package defines itself."""
    seen = set()
    for module in PACKAGES[package]:
        for name, value in sorted(vars(import_module(module)).items()):
            is_own = isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and not name.startswith("_")
            own_package = getattr(value, "__module__", "").split(".")[0] == module.split(".")[0]
            if is_own and own_package and value is not torch.optim.Optimizer and value not in seen:
                seen.add(value)
                yield name, value


def subject(package: str, name: str, target: Any) -> Subject:
    own = WRAPPERS.get(f"{package}.{name}") or WRAPPERS.get(name)
    if own is not None:
        return Subject(target, {}, (own, *SGD))
    if package == "dlopt" and name == "SAM":
        return Subject(target, {"lr": None}, ("base", *SGD))
    return Subject(target, REQUIRED.get(name, {}))


def verify(package: str, name: str, target: Any, results: Connection) -> None:
    """Sends the outcome of each check; runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    one = subject(package, name, target)
    certificate = certify(one, known(target, one.keys))
    results.send({check.name: [outcome.status, outcome.reason] for check, outcome in certificate})


def text(matrix: Mapping[str, Any]) -> str:
    """Returns JSON with a line for each optimizer."""
    parts = []
    for package, entry in matrix.items():
        lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in entry["optimizers"].items()]
        head = f'{json.dumps(package)}: {{"version": {json.dumps(entry["version"])}, "optimizers": {{\n'
        parts.append(head + ",\n".join(lines) + "\n}}")
    return "{" + ",\n".join(parts) + "}\n"


def run(only: str | None) -> None:
    file = FOLDER / "matrix.json"
    matrix = json.loads(file.read_text()) if file.exists() else {}
    for package in PACKAGES:
        entry = matrix.setdefault(package, {"version": "", "optimizers": {}})
        if entry["version"] != version(package):
            entry.update(version=version(package), optimizers={})
        for name, target in classes(package):
            done = name in entry["optimizers"] and (only is None or only not in f"{package}.{name}")
            if done or name in NOT_RUN or inspect.isabstract(target):
                continue
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=verify, args=(package, name, target, sender))
            process.start()
            sender.close()
            try:
                found = receiver.recv() if receiver.poll(SECONDS) else f"more than {SECONDS} s"
            except EOFError:
                found = "the process died"
            process.kill()
            process.join()
            entry["optimizers"][name] = found
            file.parent.mkdir(exist_ok=True)
            file.write_text(text(matrix))
            failed = found if isinstance(found, str) else [k for k, (status, _) in found.items() if status == "fail"]
            print(package, name, failed, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="verify again the optimizers whose PACKAGE.NAME contains this")
    run(parser.parse_args().only)
