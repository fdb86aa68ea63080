"""Python API for scripts and notebooks: `from dlopt import train, load`."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from hydra.types import RunMode
from torch import Tensor, nn

from dlopt.attempt import prepare
from dlopt.augment.pipeline import CentreCrop
from dlopt.command_line.reads import COMPOSITION, refuse_unread_hydra
from dlopt.config.compose import Composer
from dlopt.config.overrides import quoted
from dlopt.config.plan import checked
from dlopt.errors import DONE, INTERRUPTED, RunError, UserError
from dlopt.job import start
from dlopt.openmp import adapt_waiting
from dlopt.parallel.rendezvous import current
from dlopt.processor import set_deterministic, set_threads
from dlopt.tracking import read_metrics, read_summary
from dlopt.tracking.layout import short_path
from dlopt.training import rng
from dlopt.training.restore import Trained, restore

_REPR_METRICS = ("epochs", "best_val_loss", "best_val_accuracy", "test_loss", "test_accuracy")


class Model(nn.Module):
    """A trained model in evaluation mode, with its input normalization and centre crop.

    Maps images [B, C, H, W] with values 0..255 (or vectors, as in the data set) to outputs [B, K], and tokens [B, T]
    (int64) to outputs [B, T, K].

    Attributes:
        classes: names of the K classes; None if there are no labels.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.normalize = trained.normalize
        self.module = trained.module
        self.classes = trained.classes
        self._task = trained.task
        self._sample, self._window = trained.sample, trained.window
        self._dtype = trained.precision.dtype
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        if self._task.vocabulary is None and self._window != self._sample and tuple(inputs.shape[1:]) == self._sample:
            inputs, _ = CentreCrop(self._window)(inputs, torch.empty(0))
        outputs: Tensor = self.module(self._task.normalized(inputs, self.normalize, self._dtype))
        return outputs


@dataclass(frozen=True, repr=False)
class Result:
    """Files of a run: `summary` (summary.json) and `history`, one dict per evaluated epoch (metrics.jsonl)."""

    folder: Path
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    def __repr__(self) -> str:
        values = {key: self.summary[key] for key in _REPR_METRICS if self.summary.get(key) is not None}
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        return f"<{self.summary.get('status')}: {metrics}; {short_path(self.folder)}>"

    @functools.cached_property
    def model(self) -> Model:
        """The best model by the validation metric."""
        return load(self.folder)


def train(overrides: Sequence[str] = (), *, console: bool = False) -> Result:
    """Trains a model like `dlopt train`: `train(["optimizer=adamw", "epochs=5"])`.

    Restores global state afterwards: random generators, thread count and torch flags. On a signal or after `max_time`
    the run stops early with the status `interrupted`.

    Args:
        overrides: the arguments of `dlopt train`.
        console: print the same progress as the command.

    Raises:
        UserError: wrong configuration or input; no files are left behind.
        RunError: the run failed.
    """
    if isinstance(overrides, str):  # would be read letter by letter
        raise UserError(f"train({overrides!r}): must be a list: train({overrides.split()})")
    for line in overrides:
        if not isinstance(line, str) or line.startswith("-"):
            raise UserError(f"train([{line!r}]): must be key=value; use `dlopt train` for sweeps and flags")
    lines = [quoted(line) for line in overrides]
    if current() is not None:
        raise UserError("train(): cannot run inside torchrun or srun; use the command `dlopt train`")
    config = Composer().compose(lines)
    if config.get("comparison") is not None or config.hydra.mode == RunMode.MULTIRUN:
        raise UserError("train(): runs one experiment at a time; use `dlopt train` for sweeps and comparisons")
    hints = {"hydra.job.env_set": "set os.environ", "hydra.job.chdir": "call os.chdir"}
    refuse_unread_hydra(lines, "train()", (*COMPOSITION, "hydra.run"), hints)
    prepared = prepare(checked(config, lines))
    folder = prepared.folder.path
    if not prepared.is_done:
        try:
            with _preserve_global_state():
                code = start(prepared.run, console=console)
        except UserError:
            if prepared.is_new and not prepared.folder.is_live():
                prepared.before.erase(folder)
            raise
        if code not in (DONE, INTERRUPTED):
            raise RunError(str((read_summary(folder) or {}).get("reason", f"the run in {folder} failed")))
    return Result(folder, read_summary(folder) or {}, read_metrics(folder))


def load(run: str | PathLike[str]) -> Model:
    """Loads the best model of a run folder (by its validation metric), or a checkpoint. Raises `UserError`.

    Warns if the run was evaluated with norm_statistics=exact: a checkpoint has the running statistics.
    """
    path = Path(run)
    if path.is_dir():
        best = path / "checkpoints" / "best.pt"
        path = best if best.exists() else best.with_name("last.pt")
    with _preserve_global_state():
        trained = restore(path, {})
    if trained.warning is not None:
        warnings.warn(trained.warning, stacklevel=2)
    return Model(trained)


@contextlib.contextmanager
def _preserve_global_state() -> Iterator[None]:
    """Restores the random generators of Python, NumPy and torch, and torch's global flags."""
    rng_state = rng.state()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, grad = torch.backends.cudnn, torch.is_grad_enabled()
    tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    try:
        yield
    finally:
        rng.restore(rng_state)
        set_threads(threads)
        adapt_waiting(1)  # ends the watch: the caller's threads wait as before
        torch.set_float32_matmul_precision(precision)
        set_deterministic(deterministic, warn_only=warn_only)
        cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
        torch.set_grad_enabled(grad)
