"""What the trials do not show: the cost of an update relative to SGD, and the test metrics of the best trials."""

import statistics
from dataclasses import replace
from pathlib import Path

import torch

from dlopt.config.parsing import parse
from dlopt.config.resolve import resolve_saved
from dlopt.extend import (
    RunConfig,
    RunFolder,
    Trainer,
    Workload,
    build_workload,
    load_checkpoint,
    probe_trainer,
    write_json,
)
from dlopt.instruments.profiling import state_bytes
from dlopt.lab.benchmark.reading import TEST
from dlopt.lab.benchmark.results import UpdateCost
from dlopt.lab.scaling.rank import seconds_of, updates_of
from dlopt.metrics.names import Metric
from dlopt.trained.distillation import with_teacher
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.evaluate import test_report

_WARMUP = 5  # updates
_PAIRS = 9
_UPDATES = 20  # of each of a pair; SOAP, Shampoo and Kron update their preconditioners every 10


def measure(baseline: RunConfig, run_config: RunConfig, scratch: Path) -> UpdateCost:
    """Measures updates of both configs in turn, in this process.

    Updates are replayed from CUDA graphs if those of both can be: launches from the host are no cost of an optimizer.
    """
    configs = [baseline, run_config]
    trainers = [_trainer(config, scratch) for config in configs]
    if len({trainer.graph_obstacle is None for trainer in trainers}) > 1:
        trainers = [_trainer(_without_graphs(config), scratch) for config in configs]
    updates = [updates_of(trainer, trainer.mode.device) for trainer in trainers]
    for update in updates:
        seconds_of(update, _WARMUP)
    ratios = []
    for pair in range(_PAIRS):
        order = (0, 1) if pair % 2 == 0 else (1, 0)  # neither is always the first
        seconds = {index: seconds_of(updates[index], _UPDATES) for index in order}
        ratios.append(seconds[1] / seconds[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return UpdateCost(middle, low, high, state_memory(trainers[1]))


def _trainer(run_config: RunConfig, scratch: Path) -> Trainer:
    return probe_trainer(with_teacher(build_workload(run_config)), scratch, checks=False)


def _without_graphs(run_config: RunConfig) -> RunConfig:
    return replace(run_config, settings=replace(run_config.settings, cuda_graphs=False))


def state_memory(trainer: Trainer) -> float:
    """Returns the bytes of the optimizer's state relative to the parameters."""
    return state_bytes(trainer.step.optimizer) / sum(p.nbytes for p in trainer.module.parameters())


def test_trial(folder: Path) -> None:
    """Tests the best model of a trial and writes test.json, unless it exists."""
    run = RunFolder(folder)
    path, best = folder / TEST, Checkpoints(run.checkpoints).best
    saved = run.config()
    if path.exists() or saved is None or not best.is_file():
        return
    checkpoint = load_checkpoint(best)
    workload: Workload = build_workload(parse(resolve_saved(saved), saved), checkpoint)
    with torch.no_grad():
        workload.load(checkpoint)
    tested, task = test_report(workload), workload.task
    assert tested is not None  # nothing interrupts it
    usual = ["loss", task.accuracy or "loss", *task.loss_metrics(0.0)]  # of validations: tests have others, too
    usual += [name for each in task.computed(()) for name in each.names]
    columns = [Metric("test", name).column for name in usual]
    write_json(path, {key: value for key, value in tested.metrics.items() if key in columns}, indent=None)
