"""MLflow: where MLFLOW_TRACKING_URI says, or MLflow's own default; the experiment has the run's `name`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.files import write_atomically
from dlopt.tracking.remote import Point

_STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED"}
_PARAMS, _METRICS = 100, 1000  # that MLflow takes at once
_LONGEST = 500  # characters of a parameter that every version takes


class MLflow:
    """One run. A resumed one goes on in the same run of MLflow, where what was sent twice stays twice."""

    def __init__(self, folder: Path) -> None:
        # MLflow's own defaults keep trying for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._folder = folder
        self._client: Any = None
        self._run = ""

    def begin(self, hparams: Mapping[str, str | bool | float]) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Param

        self._client = MlflowClient()
        kept = self._folder / "mlflow.json"
        place = get_tracking_uri()
        if kept.exists():
            found = json.loads(kept.read_text())
            if found["tracking_uri"] == place:
                self._run = found["run_id"]
                self._client.update_run(self._run, status="RUNNING")
                return
        tags = {"mlflow.runName": self._folder.name, "mlflow.source.name": "dlopt", "dlopt.folder": str(self._folder)}
        self._run = self._client.create_run(self._experiment_id(str(hparams["name"])), tags=tags).info.run_id
        write_atomically(kept, json.dumps({"tracking_uri": place, "run_id": self._run}).encode())
        params = [Param(key, str(value)[:_LONGEST]) for key, value in hparams.items()]
        for some in _batches(params, _PARAMS):
            self._client.log_batch(self._run, params=some)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another job of the sweep was faster
                found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(tag, value, int(1000 * when), step) for step, when, values in points for tag, value in values.items()
        ]
        for some in _batches(metrics, _METRICS):
            self._client.log_batch(self._run, metrics=some)

    def end(self, status: str) -> None:
        self._client.set_terminated(self._run, _STATUS.get(status, "KILLED"))


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
