"""Sends metrics to MLflow and Weights & Biases, from a thread.

Training neither waits for them nor fails with them.
"""

import json
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hydra.core.utils import env_override

from dlopt.basics.errors import FileError, UserError, require_package
from dlopt.basics.files import read_json, write_atomically
from dlopt.basics.folders import ENDED
from dlopt.basics.plain_values import read_regular
from dlopt.basics.secrets import redact
from dlopt.basics.status_line import waiting

_CLOSE_TIMEOUT = 30.0  # seconds to wait at the end of a run for pending deliveries
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED"}
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # per MLflow request
_UPDATE = "update"  # metric of W&B
_MAX_PARAM_LENGTH = 500  # characters, the smallest limit of all MLflow versions
_LIMITS = {  # of MLflow, whose own defaults retry for many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}  # fmt: skip
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # schemes of MLflow's stores that need SQLAlchemy
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")

HParams = Mapping[str, str | bool | float]
Scalars = tuple[int, float, Mapping[str, float]]
"""(update, time in seconds since 1970, values by tag)."""


class Service(Protocol):
    """A tracking service. Calls may block and may raise any exception; `status`: as in summary.json."""

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
            self._error = redact(_without_credentials(" ".join(f"{type(error).__name__}: {error}".split())))[:300]


def check(sinks: Sequence[str], name: str) -> None:
    """Raises `UserError` for a service that cannot record a run called `name`; call before the run starts."""
    for sink in dict.fromkeys(sinks):
        if sink in SERVICES:
            with waiting(f"tracking=[{sink}] ..."):
                SERVICES[sink].check(f"tracking=[{','.join(sinks)}]", name)


def _without_credentials(text: str) -> str:
    return _CREDENTIALS.sub("***@", text)


class MLflow:
    """A run in the store MLFLOW_TRACKING_URI, or in MLflow's default one. The experiment is named after `name`.

    A resumed run continues the same MLflow run. Metrics between the checkpoint and the interruption appear twice.
    """

    def __init__(self, folder: Path) -> None:
        for variable, value in _LIMITS.items():
            os.environ.setdefault(variable, value)
        self._folder = folder
        self._client: Any = None
        self._run = ""

    def begin(self, hparams: HParams) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Param

        self._client = MlflowClient()
        id_file, uri = self._folder / "mlflow.json", redact(_without_credentials(get_tracking_uri()))
        saved = read_json(id_file) or {}
        if _without_credentials(str(saved.get("tracking_uri"))) == uri and "run_id" in saved:
            self._run = str(saved["run_id"])
            self._client.update_run(self._run, status="RUNNING")
            self._tag_changed(hparams)
            return
        tags = {"mlflow.runName": self._folder.name, "mlflow.source.name": "dlopt"}
        tags["dlopt.folder"] = redact(str(self._folder))
        experiment = _experiment(self._client, str(hparams["name"]))
        self._run = self._client.create_run(experiment.experiment_id, tags=tags).info.run_id
        # At once: a run that is killed before this line creates a second MLflow run when it is resumed.
        write_atomically(id_file, json.dumps({"tracking_uri": uri, "run_id": self._run}).encode())
        params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in hparams.items()]
        for chunk in _chunks(params, _MAX_PARAMS):
            self._client.log_batch(self._run, params=chunk)

    def _tag_changed(self, hparams: HParams) -> None:
        """Sets a tag dlopt.KEY for each changed value, such as the epochs of a longer run: parameters cannot change."""
        run = self._client.get_run(self._run).data
        for key, value in hparams.items():
            text, tag = str(value)[:_MAX_PARAM_LENGTH], f"dlopt.{key}"
            if run.tags.get(tag, run.params.get(key, text)) != text:
                self._client.set_tag(self._run, tag, text)

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


def _check_mlflow(key: str, name: str) -> None:
    """Raises `UserError` unless the store has the experiment `name`, or can create it."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read by the import; INFO disturbs the waiting line
    from mlflow import MlflowClient, get_tracking_uri

    uri = get_tracking_uri()
    is_set = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    store = f"MLFLOW_TRACKING_URI={uri}" if is_set else f"MLflow's default store {uri}"
    limits = _LIMITS | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # the user is waiting
    try:
        if re.split(r"[:+]", uri)[0] in _DATABASES:
            _connect(uri)
        with env_override({variable: os.environ.get(variable, value) for variable, value in limits.items()}):
            experiment = _experiment(MlflowClient(), name)
    except (Exception, SystemExit) as error:
        hint = "use a database, MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or the http:// address of a server"
        raise UserError(_without_credentials(f"{key}: {store}: {_reason(error)}; {hint}")) from None
    if experiment.lifecycle_stage != "active":
        hint = f"restore it with `mlflow experiments restore -x {experiment.experiment_id}`, or use another name"
        raise UserError(f"{key}: name={name}: {_without_credentials(store)} has deleted this experiment; {hint}")


def _connect(uri: str) -> None:
    """Connects to a database once: MLflow retries for 100 s. Creates the folder of an SQLite file, as MLflow does."""
    require_package("a database", "sqlalchemy", "mlflow")
    from sqlalchemy import create_engine, make_url

    url = make_url(uri)
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise UserError("a database in memory is lost when the run ends")
        file = Path(str(url.database))
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise FileError("cannot write to this file")
    engine = create_engine(url)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _reason(error: BaseException) -> str:
    """Returns the cause in an error of MLflow, SQLAlchemy or requests, as one short line."""
    if type(error).__name__.startswith("Unsupported"):  # ModelRegistryStoreURIException, whose text is about models
        return "not a kind of store that MLflow knows"
    text = " ".join(str(error).partition("\n")[0].partition("(Background on")[0].split())
    text = re.split(r"\. (?=[A-Z])", text.rpartition("Caused by ")[2])[0]
    return text.rstrip(" .)")[:300] or type(error).__name__


def _experiment(client: Any, name: str) -> Any:
    """Returns MLflow's experiment of this name, created if missing."""
    from mlflow.exceptions import MlflowException

    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment
    try:
        return client.get_experiment(client.create_experiment(name))
    except MlflowException:
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return experiment  # another job of the sweep has created it in the meantime


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _read_id(path: Path) -> str:
    """Reads the name of a run from a file that an earlier start has written. Raises OSError and ValueError."""
    return read_regular(path, 1000).decode().strip()


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

        _require_account()
        sys.argv[1:] = map(redact, sys.argv[1:])  # W&B stores the command line
        id_file = self._folder / "wandb.id"
        if not id_file.exists():  # before W&B has the run: killed at any moment, it is resumed under the same id
            write_atomically(id_file, f"{os.environ.get('WANDB_RUN_ID') or uuid.uuid4().hex[:8]}\n".encode())
        self._run = wandb.init(
            project=str(hparams["name"]),
            name=self._folder.name,
            id=_read_id(id_file),
            resume="allow",
            dir=str(self._folder),
            config=dict(hparams),
            # W&B's own `git diff` starts programs that a repository configures (`environment.repository` does not).
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        # W&B drops values of steps before its last one, such as epochs repeated after a resume.
        # Its own steps therefore only count the calls, and charts are drawn against the number of updates.
        self._run.define_metric(_UPDATE)
        self._run.define_metric("*", step_metric=_UPDATE)

    def send(self, scalars: list[Scalars]) -> None:
        for step, _, values in scalars:
            self._run.log({**values, _UPDATE: step})

    def end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ENDED else 1)


def _check_wandb(key: str, name: str) -> None:
    """Raises `UserError` without an account that W&B needs."""
    try:
        _require_account()
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {_reason(error)}") from None


def _require_account() -> None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
        raise PermissionError("no account: set WANDB_API_KEY, or WANDB_MODE=offline")


class _Supported(NamedTuple):
    """`start` opens the record of the run in a folder; `check` of (key, name of the run) raises `UserError` before."""

    start: Callable[[Path], Service]
    check: Callable[[str, str], None]


SERVICES: dict[str, _Supported] = {
    "mlflow": _Supported(MLflow, _check_mlflow),
    "wandb": _Supported(Wandb, _check_wandb),
}
"""All of `Sink` except TensorBoard."""
