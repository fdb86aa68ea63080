"""`notify=URL`: one POST when a run or a sweep has ended."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.files import read_json
from tests.support.line import dlopt, refused
from tests.support.sizes import TINY
from tests.sweeps.processes import InProcess

Received = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """The paths and documents that a server at $HOOK has got; it refuses those at /broken."""
    found: Received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            found.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{server.server_port}/hook-t0ken")
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


HOOK = "notify=${oc.env:HOOK}"


def test_a_run(received: Received, tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *TINY, HOOK, "name=mine", "hydra.run.dir=run").code == 0
    [(path, content)] = received
    assert path == "/hook-t0ken" and content.keys() == {"text", "name", "folder", "summary"}
    assert content["summary"] == read_json(tmp_path / "run/summary.json") and content["summary"]["run_id"]
    assert (content["name"], content["folder"]) == ("mine", str(tmp_path / "run"))
    assert content["text"] == f"mine: finished: {tmp_path / 'run'}"
    for file in (each for each in (tmp_path / "run").rglob("*") if each.is_file()):
        assert b"t0ken" not in file.read_bytes(), file
    # No part of the run's identity: a finished run is found without it, and has not ended again.
    again = dlopt(tmp_path, "train", *TINY, "name=mine", "hydra.run.dir=run", "resume=auto")
    assert again.code == 0 and "already finished" in again.out and len(received) == 1


def test_the_config_of_a_run_needs_no_variable(
    received: Received, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dlopt(tmp_path, "train", *TINY, HOOK, "hydra.run.dir=run").code == 0
    monkeypatch.delenv("HOOK")
    assert dlopt(tmp_path, "eval", "run").code == 0
    assert dlopt(tmp_path, "train", "from=run", "dry_run=true").code == 0 and len(received) == 1


def test_a_failed_and_a_refused_run(received: Received, tmp_path: Path) -> None:
    diverges = ("model.norm=none", "optimizer.lr=1e38", "epochs=4")
    assert dlopt(tmp_path, "train", *TINY, *diverges, HOOK, "hydra.run.dir=run").code == 1
    [(_, content)] = received
    assert content["summary"]["status"] == "failed" and content["summary"]["reason"]
    refused(tmp_path, "train", *TINY, HOOK, "optimizer.lr=-1")
    assert len(received) == 1


def test_a_sweep_notifies_once(received: Received, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", InProcess)
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    assert dlopt(tmp_path, "train", "-m", *TINY, HOOK, "seed=0,1", "hydra.sweep.dir=sweep").code == 0
    [(_, content)] = received
    assert content["folder"] == str(tmp_path / "sweep") and content["exit_code"] == 0
    assert [job["status"] for job in content["jobs"]] == ["finished", "finished"]
    assert content["leaderboard"]["best_run"]["folder"] in {job["folder"] for job in content["jobs"]}
    assert dlopt(tmp_path, "train", "-m", *TINY, HOOK, "seed=0,1", "dry_run=true").code == 0 and len(received) == 1


@pytest.mark.parametrize("where", ["broken", "away"])
def test_a_server_that_does_not_answer_costs_a_warning(where: str, received: Received, tmp_path: Path) -> None:
    base = os.environ["HOOK"].rpartition("/")[0]
    url = f"{base}/broken" if where == "broken" else "http://127.0.0.1:1/"
    result = dlopt(tmp_path, "train", *TINY, f"notify={url}", "hydra.run.dir=run")
    assert result.code == 0 and result.err.count("warning: notify: the end was not reported: ") == 1
    assert (tmp_path / "run/summary.json").is_file() and len(received) == (where == "broken")


def test_what_is_no_url_is_refused(tmp_path: Path) -> None:
    assert "notify=file:///etc/x: must be a URL: https://..." in refused(tmp_path, "train", "notify=file:///etc/x")
    assert "notify: " in refused(tmp_path, "train", "experiment=lecture/clipping", "notify=https://example.org/x")
    assert "only available in `dlopt train`" in refused(tmp_path, "find-lr", "notify=https://example.org/x")
