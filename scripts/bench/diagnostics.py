"""Benchmarks the overhead of diagnostics at the default interval, by kind.

    python scripts/bench/diagnostics.py [--rounds 9] [--batch 128] [--models resnet20,mlp]

Runs updates with diagnostics (statistics, histograms, TensorBoard) and plain updates in turn; the overhead is
(observed - plain) / (interval x plain), from medians. Synthetic images of 32x32 for ResNet-20, digits for the MLP.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.settings import Diagnostic
from dlopt.instruments.diagnostics import CURVATURE_INTERVAL, Diagnostics
from dlopt.tracking.tracking import Tracking
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload

KINDS: tuple[tuple[Diagnostic, ...], ...] = (("activations",), ("gradients", "activations"), ("curvature",))
MODELS = {"resnet20": ["model=resnet20", "data.image_size=32"], "mlp": ["model=mlp"]}


def measure(typed: list[str], kinds: tuple[Diagnostic, ...], rounds: int) -> tuple[float, float, int]:
    """Returns the seconds of a plain and of an observed update, and the updates between observed ones."""
    lines = [*typed, f"diagnostics=[{','.join(kinds)}]"]
    run_config = parse(to_plain(Composer().compose(lines), lines)[0])
    every = run_config.settings.diagnostics_every
    with tempfile.TemporaryDirectory() as folder:
        workload = build_workload(run_config)
        tracking = Tracking(Path(folder), sinks=["tensorboard"], console=False)
        observer = Diagnostics(workload, kinds, every, tracking.diagnostics)
        # The same model and optimizer with and without the observer.
        plain = probe_trainer(workload, Path(folder))
        observed = probe_trainer(workload, Path(folder), observers=[observer])
        batches = list(itertools.islice(plain.batches.epoch(0), 8))
        workload.module.train()
        times: dict[bool, list[float]] = {False: [], True: []}
        for step in range(2 * (rounds + 2)):
            is_observed = bool(step % 2)
            trainer = observed if is_observed else plain
            start = time.perf_counter()
            trainer.update(batches[step % len(batches)], CURVATURE_INTERVAL * every * step)
            if workload.device.type == "cuda":
                torch.cuda.synchronize()
            times[is_observed].append(time.perf_counter() - start)
        tracking.close()
    interval = every * CURVATURE_INTERVAL if kinds == ("curvature",) else every
    return statistics.median(times[False][2:]), statistics.median(times[True][2:]), interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--models", default="resnet20,mlp")
    arguments = parser.parse_args()
    for model in arguments.models.split(","):
        for kinds in KINDS:
            typed = [*MODELS[model], f"data.batch_size={arguments.batch}"]
            plain, observed, every = measure(typed, kinds, arguments.rounds)
            overhead = (observed - plain) / (every * plain)
            print(
                f"{model:9} {','.join(kinds):32} plain {plain * 1e3:8.2f} ms, observed {observed * 1e3:8.2f} ms: "
                f"{overhead:.2%} overhead every {every} updates",
                flush=True,
            )


if __name__ == "__main__":
    main()
