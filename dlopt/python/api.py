"""Python API for scripts and notebooks: `dlopt.train`, ...; `dlopt.runs` and `dlopt.open_run` import no torch."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType

from hydra.types import RunMode

from dlopt.basics.errors import USER_ERROR, ReportedError, RunError, UserError
from dlopt.commands.find_lr import learning_rates
from dlopt.config.compose import Composer
from dlopt.config.flags import parse_arguments
from dlopt.config.overrides import quoted, with_folder
from dlopt.config.packages import series_of
from dlopt.config.parameters import show
from dlopt.config.plan import checked
from dlopt.config.reads import COMPOSITION, refuse_unread_hydra
from dlopt.config.resolve import interpolations_explained
from dlopt.instruments.lr_range import LearningRates
from dlopt.machine.world import current
from dlopt.python.model import Model, Prediction, load, preserve_global_state
from dlopt.python.runs import Run, Runs, open_run, runs
from dlopt.run.runner import run
from dlopt.sweeps import sweep as sweeps
from dlopt.sweeps.branches import branched

__all__ = [
    "LearningRates", "Model", "Prediction", "Run", "Runs",
    "find_lr", "load", "open_run", "runs", "sweep", "train",
]  # fmt: skip


@interpolations_explained()
def train(overrides: Sequence[str] = (), *, console: bool = False, **keys: object) -> Run:
    """Trains a model like `dlopt train`: `train(["optimizer=adamw", "epochs=5"])`.

    Restores global state afterwards: random generators, thread count and torch flags. A process runs one `train`,
    `sweep` or `find_lr` at a time, in whatever thread. On a signal or after `max_time` the run stops early with the
    status `interrupted`.

    Args:
        overrides: the arguments of `dlopt train`, also `--config-dir=DIR` for a folder of your own choices.
        keys: none; refused with the way to write them: `train(["optimizer=adamw"])`, not `train(optimizer="adamw")`.
        console: print the same progress as the command.

    Raises:
        UserError: wrong configuration or input, or another call in this process; no files are left behind.
        RunError: the run failed.
    """
    lines = _checked("train", overrides, keys, "use dlopt.sweep for sweeps, and `dlopt train` for flags")
    try:
        with preserve_global_state("train()"):
            parsed = parse_arguments(lines)
            lines = with_folder(parsed.overrides, multirun=False)
            config = Composer(config_dir=parsed.config_dir, words=lines).compose(lines)
            if (series := series_of(config)) is not None or config.hydra.mode == RunMode.MULTIRUN:
                way = "dlopt.sweep" if series is None else f"`dlopt train` for a {series}"
                raise UserError(f"train(): runs one experiment at a time; use {way}")
            hints = {"hydra.job.env_set": "set os.environ", "hydra.job.chdir": "call os.chdir"}
            refuse_unread_hydra(lines, "train()", (*COMPOSITION, "hydra.run"), hints)
            folder, _ = run(checked(config, lines), console=console, from_python=True)
    except ReportedError as error:  # of processes that the run has started
        raise (UserError if error.code == USER_ERROR else RunError)(str(error)) from None
    return open_run(folder.path)


@interpolations_explained()
def sweep(overrides: Sequence[str] = (), *, console: bool = False, **keys: object) -> Runs:
    """Runs a sweep like `dlopt train -m` and returns its runs: `sweep(["optimizer=sgd,adamw", "seed=range(0,3)"])`.

    Every job is a separate process. A failed job does not affect the others, and is in the table with the status
    `failed`. With `resume=auto`, runs the jobs that are missing.

    Args:
        overrides: the arguments of `dlopt train -m`, also `hydra/launcher=joblib` for several jobs at once and
            `hydra/sweeper=dlopt_optuna` for a search.
        console: print the same progress as the command.

    Raises:
        UserError: wrong configuration or input of any job; no files are left behind.
    """
    lines = _checked("sweep", overrides, keys, "-m is implied; use `dlopt train -m` for other flags")
    out, err = (sys.stdout, sys.stderr) if console else (io.StringIO(), io.StringIO())
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with preserve_global_state("sweep()"), _hidden_main(), redirected[0], redirected[1]:
        parsed = parse_arguments(["-m", *lines])
        composer = Composer(config_dir=parsed.config_dir, words=parsed.overrides)
        request = sweeps.request(composer, branched(composer, with_folder(parsed.overrides, multirun=True)))
        if request.config.dry_run:
            raise UserError("dry_run=true: only available in `dlopt train`")
        sweeps.run(replace(request, is_waiting=True))
    return runs(request.found)


def find_lr(overrides: Sequence[str] = (), **keys: object) -> LearningRates:
    """Runs a learning-rate range test like `dlopt find-lr`: `find_lr(["optimizer=adamw", "updates=200"]).steepest`.

    Writes no files.

    Args:
        overrides: the arguments of `dlopt find-lr`, except `output`.

    Raises:
        UserError: wrong configuration or input.
    """
    lines = _checked("find_lr", overrides, keys, "use `dlopt find-lr` for flags")
    with preserve_global_state("find_lr()"):
        return learning_rates(lines)


def _checked(function: str, overrides: Sequence[str], keys: Mapping[str, object], hint: str) -> list[str]:
    """Returns the overrides as Hydra parses them. Raises `UserError` for anything else than a list of them."""
    if keys:  # train(optimizer="adamw")
        wrong = ", ".join(f"{key}={value!r}" for key, value in keys.items())
        typed = [overrides] if isinstance(overrides, str) else list(overrides)
        lines = [*typed, *(f"{key}={show(value)}" for key, value in keys.items())]
        raise UserError(f"{function}({wrong}): overrides are a list: {function}({json.dumps(lines)})")
    if isinstance(overrides, str):  # would be read letter by letter
        raise UserError(f"{function}({overrides!r}): must be a list: {function}({overrides.split()})")
    for line in overrides:
        if not isinstance(line, str) or (line.startswith("-") and not line.startswith("--config-dir=")):
            raise UserError(f"{function}([{line!r}]): must be key=value; {hint}; the flag --config-dir=DIR is allowed")
    if current() is not None:
        command = function.replace("_", "-") if function == "find_lr" else "train"
        raise UserError(f"{function}(): cannot run inside torchrun or srun; use the command `dlopt {command}`")
    return [line if line.startswith("-") else quoted(line) for line in overrides]


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Hides the caller's script from multiprocessing, whose new processes would execute it once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
