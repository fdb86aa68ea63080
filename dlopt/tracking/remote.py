"""Sends metrics to MLflow and Weights & Biases from a thread: training neither waits for them nor fails with them."""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dlopt.files import read_json, write_atomically

_CLOSE_TIMEOUT = 30.0  # seconds to wait at the end of a run for pending deliveries
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED"}
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # per MLflow request
_UPDATE = "update"  # metric of W&B
_MAX_PARAM_LENGTH = 500  # characters, the smallest limit of all MLflow versions

HParams = Mapping[str, str | bool | float]
Scalars = tuple[int, float, Mapping[str, float]]
"""(update, time in seconds since 1970, values by tag)."""


class Service(Protocol):
    """A tracking service. Calls may block and may raise any exception; `status` is that of summary.json."""

    def begin(self, hparams: HParams) -> None: ...
    def send(self, scalars: list[Scalars]) -> None: ...
    def end(self, status: str) -> None: ...


class Remote:
    """Calls `service` from a thread, in order, and never raises.

    Stops at the first error, which `warn` receives once, in the training thread.
    """

    def __init__(self, name: str, service: Service, warn: Callable[[str], None], *, timeout: float = _CLOSE_TIMEOUT):
        self._name, self._service, self._timeout = name, service, timeout
        self._warn: Callable[[str], None] | None = warn
        self._queue: queue.SimpleQueue[Scalars | str | HParams] = queue.SimpleQueue()
        self._error: str | None = None
        self._status = "failed"  # if the run is closed without `end`
        self._thread = threading.Thread(target=self._deliver, name=f"dlopt-{name}", daemon=True)

    def config(self, config: Mapping[str, object], hparams: HParams) -> None:
        self._queue.put(dict(hparams))
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._error is None and self._thread.ident is not None:
            self._queue.put((step, time.time(), dict(values)))
        self.flush()

    def flush(self) -> None:
        """Reports an error of the thread; does not wait for deliveries."""
        if self._error is not None and self._warn is not None:
            warn, self._warn = self._warn, None
            warn(f"tracking={self._name}: {self._error}; training continues without it")

    def end(self, status: str) -> None:
        self._status = status or self._status

    def close(self) -> None:
        """Waits for pending deliveries, at most for the timeout."""
        if self._thread.is_alive():
            self._queue.put(self._status)
            self._thread.join(self._timeout)
            if self._thread.is_alive() and self._error is None:
                self._error = f"not all metrics were delivered within {self._timeout:.0f} s"
        self.flush()

    def _deliver(self) -> None:
        """Sends everything that has queued up in one request: hyperparameters first, a final status last."""
        try:
            while True:
                items = [self._queue.get()]
                while not self._queue.empty():
                    items.append(self._queue.get())
                for item in items:
                    if isinstance(item, dict):
                        self._service.begin(item)
                if scalars := [item for item in items if isinstance(item, tuple)]:
                    self._service.send(scalars)
                for item in items:
                    if isinstance(item, str):
                        self._service.end(item)
                        return
        except BaseException as error:  # includes SystemExit: some libraries call sys.exit
            self._error = " ".join(f"{type(error).__name__}: {error}".split())[:300]


class MLflow:
    """A run on the server MLFLOW_TRACKING_URI, or in MLflow's default store. The experiment is named after `name`.

    A resumed run continues the same MLflow run. Metrics between the checkpoint and the interruption appear twice.
    """

    def __init__(self, folder: Path) -> None:
        # MLflow's defaults retry for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._folder = folder
        self._client: Any = None
        self._run = ""

    def begin(self, hparams: HParams) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Param

        self._client = MlflowClient()
        id_file, uri = self._folder / "mlflow.json", get_tracking_uri()
        if (saved := read_json(id_file)) is not None and saved["tracking_uri"] == uri:
            self._run = saved["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"mlflow.runName": self._folder.name, "mlflow.source.name": "dlopt", "dlopt.folder": str(self._folder)}
        self._run = self._client.create_run(self._experiment_id(str(hparams["name"])), tags=tags).info.run_id
        write_atomically(id_file, json.dumps({"tracking_uri": uri, "run_id": self._run}).encode())
        params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in hparams.items()]
        for chunk in _chunks(params, _MAX_PARAMS):
            self._client.log_batch(self._run, params=chunk)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another job of the sweep has created it in the meantime
                experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id)

    def send(self, scalars: list[Scalars]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(tag, value, int(1000 * seconds), step)
            for step, seconds, values in scalars
            for tag, value in values.items()
        ]
        for chunk in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self._run, metrics=chunk)

    def end(self, status: str) -> None:
        self._client.set_terminated(self._run, _MLFLOW_STATUS.get(status, "KILLED"))


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Wandb:
    """A run of Weights & Biases, configured by WANDB_API_KEY, WANDB_MODE, ... The project is named after `name`.

    A resumed run continues under the same id; repeated epochs appear twice, as in MLflow.
    Without an account, WANDB_MODE=offline writes to the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: Any = None

    def begin(self, hparams: HParams) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise PermissionError("no account: set WANDB_API_KEY, or WANDB_MODE=offline")
        id_file = self._folder / "wandb.id"
        self._run = wandb.init(
            project=str(hparams["name"]),
            name=self._folder.name,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            dir=str(self._folder),
            config=dict(hparams),
            # W&B's own `git diff` starts programs that a repository configures (`environment.repository` does not).
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        # W&B drops what is logged for a step before its last one, such as epochs repeated after a rollback or a resume.
        # Its own steps therefore only count the calls, and charts are drawn against the number of updates.
        self._run.define_metric(_UPDATE)
        self._run.define_metric("*", step_metric=_UPDATE)
        write_atomically(id_file, f"{self._run.id}\n".encode())

    def send(self, scalars: list[Scalars]) -> None:
        for step, _, values in scalars:
            self._run.log({**values, _UPDATE: step})

    def end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("finished", "stopped_early") else 1)


SERVICES: dict[str, Callable[[Path], Service]] = {"mlflow": MLflow, "wandb": Wandb}
