"""Benchmarks the cost of normalization layers: updates and evaluation of the same network with each of them.

    python scripts/bench/normalization.py [--rounds 30] [--batch 128] [--models resnet20,mlp]

All variants take turns in one process; a ratio is the median over the rounds of the ratios within a round. Random
images of 32x32 pixels for ResNet-20, digits for the MLP (three hidden layers of 256). Evaluation: the forward pass.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload

NORMS = ("none", "batch", "layer", "group")
MODELS = {
    "resnet20": ["model=resnet20", "data.image_size=32"],
    "mlp": ["model=mlp", "model.widths=[256,256,256]"],
}


def tasks(typed: list[str], folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns an update and an evaluation of the network, each on one batch."""
    lines = [*typed, "threads=1", "optimizer.lr=0.001", "augmentation=none"]
    trainer = probe_trainer(build_workload(parse(to_plain(Composer(words=lines).compose(lines))[0])), folder)
    batch = next(trainer.batches.epoch(0))
    module, numbers = trainer.step.module, iter(range(10**9))

    def update() -> object:
        module.train()
        return trainer.run_update(batch, next(numbers))

    @torch.inference_mode()
    def evaluation() -> object:
        module.eval()
        return module(batch.inputs)

    return update, evaluation


def seconds(task: Callable[[], object]) -> float:
    # Processor time: other processes do not count. On a GPU the time until it has finished.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--models", default="resnet20,mlp")
    arguments = parser.parse_args()
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            common = [*MODELS[model], f"data.batch_size={arguments.batch}"]
            built = {norm: tasks([*common, f"model.norm={norm}"], Path(folder)) for norm in NORMS}
            for number, name in enumerate(("update", "evaluation")):
                rounds = []
                for _ in range(arguments.rounds + 3):  # the first three warm up
                    rounds.append({norm: seconds(both[number]) for norm, both in built.items()})
                print(f"{model}, {name}, batch {arguments.batch}")
                for norm in NORMS:
                    time_used = statistics.median(each[norm] for each in rounds[3:])
                    ratio = statistics.median(each[norm] / each["batch"] for each in rounds[3:])
                    print(f"  {norm:6} {1e3 * time_used:8.2f} ms, {ratio:5.2f} of batch norm's", flush=True)


if __name__ == "__main__":
    main()
