"""A sweep in TensorBoard's HParams tab, in a real browser."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlopt.tracking.tracking import Tracking
from tests.support.browser import NEEDS_BROWSER, chromium
from tests.support.lengths import constant

pytestmark = [pytest.mark.slow, NEEDS_BROWSER]

# All texts, those within the components' own trees too.
_TEXTS = """
    const found = [];
    const walk = (root) => {
        for (const node of root.querySelectorAll("*")) {
            if (node.shadowRoot) walk(node.shadowRoot);
            const parts = [...node.childNodes].filter((each) => each.nodeType === 3);
            const own = parts.map((each) => each.data.trim()).join("");
            if (own) found.push([own, node]);
        }
    };
    walk(document);
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Optimizers x rates x seeds; what is best differs."""
    number = 0
    for optimizer in ("sgd", "adamw"):
        for lr in (0.125, 0.25):
            for seed in (0, 1):
                config = {"name": "x", "seed": seed, "init_seed": seed, "optimizer": {"lr": lr}}
                with Tracking(tmp_path / str(number), sinks=["tensorboard"], console=False) as tracking:
                    tracking.begin(config, {}, constant(1, 1), choices={"optimizer": optimizer})
                    tracking.epoch({"epoch": 1, "step": 1, "val_loss": 1.0, "val_accuracy": 0.5 + number / 100})
                    best = {"best_val_accuracy": 0.5 + number / 100, "best_val_loss": 1.0}
                    tracking.finish({"status": "finished", "steps": 1, "test_accuracy": 0.4, **best})
                number += 1
    return tmp_path


@pytest.fixture
def address(sweep: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--logdir", str(sweep)], env=os.environ, **quiet)  # type: ignore[call-overload]
    try:
        _wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait(done: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = done()
            if found:
                return found
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_tab_shows_differing_settings_and_best_metrics(address: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", 1500) as browser:
        browser.get(f"{address}/#hparams")

        def texts() -> list[str]:
            found: list[str] = browser.execute_script(f"{_TEXTS} return found.map(([text]) => text);")
            return found

        _wait(lambda: "7/tensorboard" in texts())
        shown = texts()
        assert {f"{i}/tensorboard" for i in range(8)} <= set(shown)
        assert {"optimizer", "optimizer.lr", "seed", "best/val_accuracy"} <= set(shown)
        assert "init_seed" not in shown
        assert browser.execute_script(
            f"{_TEXTS} const tab = found.find(([text]) => /^parallel coordinates view$/i.test(text));"
            "if (tab) tab[1].click(); return Boolean(tab);"
        )
        _wait(lambda: {"sgd", "adamw", "Color by", "Quantile"} <= set(texts()))
        errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == []
