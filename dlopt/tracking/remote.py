"""Sends metrics to MLflow and Weights & Biases from a thread: training neither waits for a network nor fails for it."""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dlopt.files import read_json, write_atomically

_PATIENCE = 30.0  # seconds that the end of a run waits for what is still to be delivered
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED"}
_PARAMS, _METRICS = 100, 1000  # that MLflow takes at once
_LONGEST = 500  # characters of a parameter that every version of MLflow takes

HParams = Mapping[str, str | bool | float]
Point = tuple[int, float, Mapping[str, float]]
"""Update, time (seconds since 1970), values by tag."""


class Service(Protocol):
    """A tracking service. Each call may take its time, and may raise; `status` as in summary.json."""

    def begin(self, hparams: HParams) -> None: ...
    def send(self, points: list[Point]) -> None: ...
    def end(self, status: str) -> None: ...


class Remote:
    """Hands everything to `service` in order. The first failure ends that and is passed to `complain`, once and in the
    training thread; nothing here raises."""

    def __init__(self, name: str, service: Service, complain: Callable[[str], None], *, patience: float = _PATIENCE):
        self._name, self._service, self._patience = name, service, patience
        self._complain: Callable[[str], None] | None = complain
        self._waiting: queue.SimpleQueue[Point | str | HParams] = queue.SimpleQueue()
        self._failure: str | None = None
        self._status = "failed"  # of a run that is closed without an end
        self._thread = threading.Thread(target=self._work, name=f"dlopt-{name}", daemon=True)

    def config(self, config: Mapping[str, object], hparams: HParams) -> None:
        self._waiting.put(dict(hparams))
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._failure is None and self._thread.ident is not None:
            self._waiting.put((step, time.time(), dict(values)))
        self.flush()

    def flush(self) -> None:
        """Reports a failure."""
        if self._failure is not None and self._complain is not None:
            complain, self._complain = self._complain, None
            complain(f"tracking={self._name}: {self._failure}; training goes on without it")

    def end(self, status: str) -> None:
        self._status = status or self._status

    def close(self) -> None:
        """Waits for the deliveries."""
        if self._thread.is_alive():
            self._waiting.put(self._status)
            self._thread.join(self._patience)
            if self._thread.is_alive() and self._failure is None:
                self._failure = f"it did not take all metrics within {self._patience:.0f} s"
        self.flush()

    def _work(self) -> None:
        try:
            while True:
                taken = [self._waiting.get()]
                while not self._waiting.empty():
                    taken.append(self._waiting.get())
                for each in taken:
                    if isinstance(each, dict):
                        self._service.begin(each)
                if points := [each for each in taken if isinstance(each, tuple)]:
                    self._service.send(points)
                for each in taken:
                    if isinstance(each, str):
                        self._service.end(each)
                        return
        except BaseException as error:  # a library that calls sys.exit takes nothing with it either
            self._failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]


class MLflow:
    """A run where MLFLOW_TRACKING_URI says, or in MLflow's own default place; the experiment has the run's `name`.

    A resumed run continues the same run of MLflow, where what was sent twice stays twice.
    """

    def __init__(self, folder: Path) -> None:
        # MLflow's own defaults keep trying for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._folder = folder
        self._client: Any = None
        self._run = ""

    def begin(self, hparams: HParams) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Param

        self._client = MlflowClient()
        kept, uri = self._folder / "mlflow.json", get_tracking_uri()
        if (known := read_json(kept)) is not None and known["tracking_uri"] == uri:
            self._run = known["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"mlflow.runName": self._folder.name, "mlflow.source.name": "dlopt", "dlopt.folder": str(self._folder)}
        self._run = self._client.create_run(self._experiment_id(str(hparams["name"])), tags=tags).info.run_id
        write_atomically(kept, json.dumps({"tracking_uri": uri, "run_id": self._run}).encode())
        for some in _batches([Param(key, str(value)[:_LONGEST]) for key, value in hparams.items()], _PARAMS):
            self._client.log_batch(self._run, params=some)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another job of the sweep was faster
                experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id)

    def send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(tag, value, int(1000 * when), step) for step, when, values in points for tag, value in values.items()
        ]
        for some in _batches(metrics, _METRICS):
            self._client.log_batch(self._run, metrics=some)

    def end(self, status: str) -> None:
        self._client.set_terminated(self._run, _MLFLOW_STATUS.get(status, "KILLED"))


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Wandb:
    """A run of Weights & Biases, as WANDB_MODE, WANDB_API_KEY and its other variables say; the project has the run's
    `name`. A resumed run continues under the same id. Without an account, WANDB_MODE=offline writes to the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: Any = None

    def begin(self, hparams: HParams) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise PermissionError("no account: set WANDB_API_KEY, or WANDB_MODE=offline")
        kept = self._folder / "wandb.id"
        self._run = wandb.init(
            project=str(hparams["name"]),
            name=self._folder.name,
            id=kept.read_text().strip() if kept.exists() else None,
            resume="allow",
            dir=str(self._folder),
            config=dict(hparams),
            settings=wandb.Settings(console="off", silent=True),
        )
        write_atomically(kept, f"{self._run.id}\n".encode())

    def send(self, points: list[Point]) -> None:
        for step, _, values in points:
            self._run.log(dict(values), step=step)

    def end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("finished", "stopped_early") else 1)


SERVICES: dict[str, Callable[[Path], Service]] = {"mlflow": MLflow, "wandb": Wandb}
