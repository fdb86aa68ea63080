"""Tracking services: failures are reported once and never block training; metrics arrive in order."""

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from dlopt.basics import secrets
from dlopt.basics.errors import UserError
from dlopt.tracking.remote import SERVICES, Remote, Scalars
from dlopt.tracking.sinks import Sink
from dlopt.tracking.tracking import Tracking
from tests.support.lengths import constant
from tests.support.line import refused


class Fake:
    """Records its calls. `fails`: the call that raises. `waits`: seconds per call."""

    def __init__(self, fails: str = "", waits: float = 0.0) -> None:
        self.calls: list[Any] = []
        self._fails, self._waits = fails, waits

    def _do(self, name: str, what: Any) -> None:
        time.sleep(self._waits)
        if name == self._fails:
            raise ConnectionError("no\nservice here")
        self.calls.append((name, what))

    def begin(self, hparams: Mapping[str, str | bool | float]) -> None:
        self._do("begin", hparams)

    def send(self, scalars: list[Scalars]) -> None:
        for step, _, values in scalars:
            self._do("send", (step, values))

    def end(self, status: str) -> None:
        self._do("end", status)


def use(service: Any, *, status: str | None = "finished", timeout: float = 5.0) -> list[str]:
    warnings: list[str] = []
    remote = Remote("fake", service, warnings.append, timeout=timeout)
    remote.config({}, {"optimizer.lr": 0.1})
    for step in range(1, 4):
        remote.scalars(step, {"loss": 1 / step})
        remote.flush()
    if status is not None:
        remote.end(status)
    remote.close()
    remote.close()
    return warnings


def test_everything_arrives_in_order() -> None:
    service = Fake()
    assert use(service) == []
    assert service.calls == [
        ("begin", {"optimizer.lr": 0.1}),
        *[("send", (step, {"loss": 1 / step})) for step in range(1, 4)],
        ("end", "finished"),
    ]


def test_run_closed_without_end_counts_as_failed() -> None:
    service = Fake()
    use(service, status=None)
    assert service.calls[-1] == ("end", "failed")


@pytest.mark.parametrize("fails", ["begin", "send", "end"])
def test_a_failure_is_reported_once_in_the_callers_thread(fails: str) -> None:
    threads: set[int] = set()
    warnings = use(Fake(fails=fails))
    assert warnings == ["tracking=fake: ConnectionError: no service here; training continues without it"]
    remote = Remote("fake", Fake(fails=fails), lambda _: threads.add(threading.get_ident()))
    remote.config({}, {})
    remote.scalars(1, {"loss": 1.0})
    remote.close()
    assert threads == {threading.get_ident()}


def test_hanging_service_does_not_block() -> None:
    start = time.monotonic()
    warnings = use(Fake(waits=20), timeout=0.2)
    assert time.monotonic() - start < 5
    assert warnings == ["tracking=fake: not all metrics were delivered within 0 s; training continues without it"]


def test_every_sink_is_tensorboard_or_a_service() -> None:
    assert {*get_args(Sink)} == {"tensorboard", *SERVICES}


def test_close_without_begin_does_nothing() -> None:
    Remote("fake", Fake(), lambda _: pytest.fail("complained")).close()


def test_tracking_sends_the_same_metrics_to_every_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Fake()
    monkeypatch.setitem(SERVICES, "mlflow", SERVICES["mlflow"]._replace(start=lambda folder: service))
    with Tracking(tmp_path, sinks=["mlflow"], console=False, log_every_steps=1) as tracking:
        tracking.begin({"name": "x", "optimizer": {"lr": 0.1}}, {}, constant(1, 1))
        tracking.step(1, {"train/loss": 2.0})
        tracking.epoch({"epoch": 1, "step": 1, "train_loss": 2.0, "val_accuracy": 0.5, "lr": 0.1})
        tracking.finish({"status": "finished", "steps": 1, "test_accuracy": 0.4})
    assert [name for name, _ in service.calls] == ["begin", "send", "send", "send", "end"]
    assert service.calls[0][1]["optimizer.lr"] == 0.1
    assert [call[1][1] for call in service.calls[1:4]] == [
        {"train/loss": 2.0}, {"val/accuracy": 0.5}, {"test/accuracy": 0.4}
    ]  # fmt: skip


class FakeWandb:
    """The functions of the package wandb that dlopt calls; `init` is killed the first time, after W&B has the run."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.exit_codes: list[int] = []

    Settings = dict

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        if len(self.inits) == 1:
            raise SystemExit
        finish = lambda exit_code: self.exit_codes.append(exit_code)  # noqa: E731
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=self.logged.append, finish=finish)


def test_wandb_resumes_one_run_and_receives_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["dlopt", "note=https://me:Xq81-zeta@host"])
    monkeypatch.setattr(secrets, "_replacements", {})
    monkeypatch.setattr(secrets, "_pattern", None)
    secrets.note("Xq81-zeta", "${oc.env:PASSWORD}", is_named=True)
    for status in ("failed", "interrupted", "finished"):
        with Tracking(tmp_path, sinks=["wandb"], console=False) as tracking:
            tracking.begin({"name": "x", "data": {"root": "s3://Xq81-zeta"}}, {}, constant(1, 1))
            tracking.epoch({"epoch": 1, "step": 1, "train_loss": 2.0})
            tracking.finish({"status": status, "steps": 1})
    assert {each["id"] for each in wandb.inits} == {(tmp_path / "wandb.id").read_text().strip()}
    assert [each["resume"] for each in wandb.inits] == ["allow"] * 3 and wandb.exit_codes == [1, 0]
    assert wandb.logged == [{"train/loss": 2.0, "update": 1}] * 2
    assert wandb.inits[0]["config"]["data.root"] == "s3://${oc.env:PASSWORD}"
    assert "Xq81-zeta" not in f"{wandb.inits} {sys.argv}"
    assert wandb.inits[0]["settings"]["disable_git"] is True, (
        "its git diff starts programs that a repository configures"
    )


def _refuse(key: str, name: str) -> None:
    raise UserError(f"{key}: name={name}: no store")


@pytest.mark.parametrize(
    "line",
    (["train"], ["train", "-m", "seed=0,1"], ["train", "experiment=lecture/clipping", "comparison.quick=true"]),
)
def test_a_service_that_cannot_record_is_refused_before_the_run(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlopt.basics.errors.is_installed", lambda name: True)
    monkeypatch.setitem(SERVICES, "mlflow", SERVICES["mlflow"]._replace(check=_refuse))
    message = refused(tmp_path, *line, "tracking=[tensorboard,mlflow]", "name=x")
    assert "tracking=[tensorboard,mlflow]: name=x: no store" in message
    assert not list(tmp_path.rglob("config.yaml"))
