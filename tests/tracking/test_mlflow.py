"""MLflow, with a database and with its own server on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dlopt import cli
from dlopt.basics.errors import UserError
from dlopt.tracking import remote
from dlopt.tracking.tracking import Tracking
from tests.support.lengths import constant
from tests.support.line import SMALL, dlopt
from tests.support.ports import free_port
from tests.support.processes import start
from tests.support.runs import at_update

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    address = f"http://127.0.0.1:{(port := free_port())}"
    store = ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *store], stdout=log, stderr=log, cwd=folder, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        try:
            _wait_for(f"{address}/health", folder / "log")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def _wait_for(address: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-2000:])


@pytest.mark.slow
def test_a_run_on_a_real_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    line = ["train", *SMALL, "tracking=[tensorboard,mlflow]", "log_every_steps=1", "name=größe x", "hydra.run.dir=run"]
    result = dlopt(tmp_path, *line)
    assert result.code == 0 and "without it" not in result.out + result.err, result
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("größe x")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["optimizer"] == "sgd" and run.data.params["model.widths"] == "[4]"
    history = client.get_metric_history(run.info.run_id, "val/accuracy")
    assert [point.step for point in history] == [1, 2] and "test/accuracy" in run.data.metrics
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2
    assert dlopt(tmp_path, *line, "epochs=3", "schedule_epochs=3", "resume=auto").code == 0
    [run] = client.search_runs([experiment.experiment_id])
    assert [p.step for p in client.get_metric_history(run.info.run_id, "val/accuracy")] == [1, 2, 3]


@pytest.mark.slow
def test_an_interrupted_run_continues_in_the_same_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := "sqlite:///new/mlflow.db")
    line = ["train", *SMALL, "tracking=[mlflow]", "hydra.run.dir=run"]
    assert dlopt(tmp_path, *line, "max_time=1e-9").code == 75
    result = dlopt(tmp_path, *line, "resume=auto", "epochs=3", "schedule_epochs=3")
    assert result.code == 0 and "without it" not in result.out + result.err, result
    client = MlflowClient(store)
    [run] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FINISHED" and "test/accuracy" in run.data.metrics
    assert run.data.params["epochs"] != "3" and run.data.tags["dlopt.epochs"] == "3"
    history = client.get_metric_history(run.info.run_id, "val/loss")
    losses = [json.loads(text)["val_loss"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [point.value for point in history] == losses


def killed_at_update_2(arguments: list[str]) -> None:
    def kill() -> None:
        while not Path("run/mlflow.json").exists():  # names the MLflow run, which is created in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["dlopt", *arguments]
    with at_update(2, kill):
        cli.main()


@pytest.mark.slow
def test_a_killed_run_continues_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"sqlite:///{tmp_path}/mlflow.db")
    line = ["train", *SMALL, "tracking=[mlflow]", "hydra.run.dir=run", "resume=auto"]
    process = start(killed_at_update_2, (line,), os.environ, tmp_path, {})
    process.join()
    assert process.exitcode == -signal.SIGKILL
    result = dlopt(tmp_path, *line)
    assert result.code == 0 and "without it" not in result.out + result.err, result
    client = MlflowClient(store)
    [run] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FINISHED" and "test/accuracy" in run.data.metrics
    history = [point.value for point in client.get_metric_history(run.info.run_id, "val/loss")]
    losses = [json.loads(text)["val_loss"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Metrics are sent in the background: those of the first epoch may have been waiting when the run was killed.
    assert len(losses) == 2 and history in (losses, losses[1:])


@pytest.mark.slow
def test_a_store_that_does_not_work_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no database")
    address = f"127.0.0.1:{free_port()}"
    stores = {
        "sqlite:///folder": "unable to open database file",
        "sqlite:///text": "file is not a database",
        "sqlite://": "in memory",
        "sqlite:mlflow.db": "Could not parse",
        "htp://server": "not a kind of store",
        f"http://user:secret@{address}": "Connection refused",
        f"postgresql://user:secret@{address}/x": "",  # the text is that of the driver
    }
    for store, reason in stores.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        message = _refusal()
        shown = store.replace("user:secret", "***")
        assert message.startswith(f"tracking=[mlflow]: MLFLOW_TRACKING_URI={shown}: ") and reason in message, message
        assert "use a database, MLFLOW_TRACKING_URI=sqlite:///mlflow.db" in message
        assert "\n" not in message and "secret" not in message, message
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for store in ("file:mlruns", "mlruns", address):  # a folder, since MLflow 3.17 no store
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        try:
            remote.check(["mlflow"], "x")
        except UserError as error:
            assert f"MLFLOW_TRACKING_URI={store}: " in str(error)
        else:
            assert (tmp_path / store.removeprefix("file:")).is_dir()  # an older MLflow


def _refusal() -> str:
    with pytest.raises(UserError) as caught:
        remote.check(["mlflow"], "x")
    return str(caught.value)


@pytest.mark.slow
def test_a_deleted_experiment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    remote.check(["mlflow"], "x")
    client = MlflowClient()
    client.delete_experiment(client.get_experiment_by_name("x").experiment_id)
    message = _refusal()
    assert "name=x" in message and "deleted" in message


@pytest.mark.slow
def test_unreachable_server_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Tracking(tmp_path, sinks=["mlflow"], console=False) as tracking:
        tracking.begin({"name": "x"}, {}, constant(1, 1))
        tracking.epoch({"epoch": 1, "step": 1, "val_loss": 1.0})
        tracking.finish({"status": "finished", "steps": 1})
    log = (tmp_path / "train.log").read_text()
    assert log.count("tracking=mlflow: ") == 1 and "training continues without it" in log


def test_the_check_prints_nothing(tmp_path: Path) -> None:
    """MLflow reports at INFO, into the waiting line, that it creates a database."""
    code = "from dlopt.tracking.remote import check; check(['mlflow'], 'train')"
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_LOGGING_LEVEL"}
    environment = variables | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, "") and "INFO" not in shown.stderr
    assert (tmp_path / "m.db").exists()
