"""dlopt from Python: `from dlopt import train, load`, in a script or a notebook."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from hydra.types import RunMode
from torch import Tensor, nn

from dlopt.augment.pipeline import CentreCrop
from dlopt.commands.train import prepare
from dlopt.config.compose import Composer
from dlopt.errors import DONE, INTERRUPTED, RunError, UserError
from dlopt.job import claim, start
from dlopt.parallel.rendezvous import current
from dlopt.tracking import read_metrics, read_summary
from dlopt.tracking.layout import short_path
from dlopt.training import rng
from dlopt.training.restore import Trained, restore

_SHOWN = ("epochs", "best_val_loss", "best_val_accuracy", "test_loss", "test_accuracy")


class Model(nn.Module):
    """A trained model with its input normalization: images [B, C, H, W] of 0..255 (or vectors, as in the data) ->
    outputs [B, K]. `classes`: their names; None in a regression. It is in evaluation mode.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.normalize = trained.normalize
        self.module = trained.module
        self.classes = trained.classes
        self._sample, self._window = trained.sample, trained.window
        self._dtype = trained.precision.dtype
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        if self._window != self._sample and tuple(inputs.shape[1:]) == self._sample:
            inputs, _ = CentreCrop(self._window)(inputs, torch.empty(0))
        outputs: Tensor = self.module(self.normalize(inputs).to(self._dtype))
        return outputs


@dataclass(frozen=True, repr=False)
class Result:
    """What a run left in `folder`: its `summary` (summary.json), and its `history`, a dict per evaluated epoch
    (metrics.jsonl)."""

    folder: Path
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    def __repr__(self) -> str:
        """One line, as the last line of a notebook's cell shows it."""
        shown = {key: self.summary[key] for key in _SHOWN if self.summary.get(key) is not None}
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
        return f"<{self.summary.get('status')}: {metrics}; {short_path(self.folder)}>"

    @functools.cached_property
    def model(self) -> Model:
        """The best model by the validation metric."""
        return load(self.folder)


def train(overrides: Sequence[str] = (), *, console: bool = False) -> Result:
    """`dlopt train` on the same overrides: `train(["optimizer=adamw", "epochs=5"])`.

    A run in this process leaves no global state behind: random generators, threads and torch's switches are as they
    were. With `max_time`, or on a signal, it ends early with the status `interrupted`.

    Args:
        console: show what the command shows.

    Raises:
        UserError: the configuration or the input is wrong; nothing is left behind.
        RunError: the run failed.
    """
    lines = list(overrides)
    if current() is not None:
        raise UserError("train(): not inside torchrun or srun; start `dlopt train` there")
    config = Composer().compose(lines)
    if config.get("comparison") is not None or config.hydra.mode == RunMode.MULTIRUN:
        raise UserError("train(): one run at a time; sweeps and comparisons are started by `dlopt train`")
    ready = prepare(config, lines)
    folder = ready.folder.path
    if not ready.is_done:
        processes, lock = claim(ready.run)
        try:
            with _undisturbed(), lock:
                code = start(ready.run, processes, typed=lines, console=console)
        except UserError:
            if ready.is_new and not ready.folder.is_live():
                ready.before.erase(folder)
            raise
        if code not in (DONE, INTERRUPTED):
            raise RunError(str((read_summary(folder) or {}).get("reason", f"the run in {folder} failed")))
    return Result(folder, read_summary(folder) or {}, read_metrics(folder))


def load(run: str | PathLike[str]) -> Model:
    """The model of a run's folder (the best one by its validation metric), or of a checkpoint. Raises `UserError`."""
    path = Path(run)
    if path.is_dir():
        best = path / "checkpoints" / "best.pt"
        path = best if best.exists() else best.with_name("last.pt")
    with _undisturbed():
        return Model(restore(path, {}))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What is global in Python, numpy and torch is afterwards as it was before."""
    drawn = rng.state()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    is_strict, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn, grad = torch.backends.cudnn, torch.is_grad_enabled()
    tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    try:
        yield
    finally:
        rng.restore(drawn)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(is_strict, warn_only=warns)
        cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
        torch.set_grad_enabled(grad)
