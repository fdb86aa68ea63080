"""The stop flag of a run, and signals before a run has started."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

import dlopt as package
from dlopt.basics.folders import RunFolder, make
from dlopt.basics.interruption import SIGNALS, Interruption, signals_deferred
from tests.support.line import dlopt, entries
from tests.support.sizes import TINY


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_sets_the_stop_flag(number: signal.Signals) -> None:
    former = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as interruption:
        assert not interruption and interruption.reason is None
        send(number)
        assert interruption and interruption.reason == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == former


def test_second_sigint_raises() -> None:
    with Interruption() as interruption:
        send(signal.SIGINT)
        assert interruption
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_repeated_sigterm_is_ignored() -> None:
    with Interruption() as interruption:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            send(number)
        assert interruption


def test_a_second_signal_does_not_wait_for_the_end_of_a_block() -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            assert received == []
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
        assert received == [signal.SIGTERM]
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_max_time_is_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("dlopt.basics.interruption.time.monotonic", lambda: now)
    with Interruption(max_time=2.0) as interruption:
        now += 119
        assert not interruption
        now += 1
        assert interruption and interruption.reason == "max_time=2 minutes"


def test_no_handlers_outside_the_main_thread() -> None:
    flags = []

    def work() -> None:
        with Interruption() as interruption:
            flags.append(bool(interruption))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert flags == [False]


# -- while a command starts


SIGNAL_AT_IMPORT = """
import os, signal, sys
from dlopt import cli

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))

_, module, number, *arguments = sys.argv
sys.argv[1:] = arguments
sys.meta_path.insert(0, Sender())
cli.main()
"""


@pytest.mark.parametrize(
    ("module", "number", "code"), [("omegaconf", signal.SIGINT, 130), ("torch", signal.SIGTERM, 75)]
)
def test_signal_within_an_import(module: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SIGNAL_AT_IMPORT, module, str(int(number)), "train", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (code, f"dlopt: interrupted by {number.name}\n")
    assert entries(tmp_path) == set()


@pytest.mark.parametrize(
    ("number", "files", "code", "advice"),
    [
        (signal.SIGINT, "", 130, ""),
        (signal.SIGINT, "folder", 75, ""),
        (signal.SIGINT, "folder, lock", 75, "; resume with resume=auto"),
        (signal.SIGTERM, "", 75, ""),
        (signal.SIGUSR1, "folder", 75, ""),
    ],
)
def test_signal_before_the_stop_flag(
    number: signal.Signals, files: str, code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(_: list[str]) -> int:
        if "folder" in files:
            make(tmp_path / "run", "hydra.run.dir")
        with RunFolder(tmp_path / "run").lock() if "lock" in files else contextlib.nullcontext():
            send(number)
        raise AssertionError("not interrupted")

    run_instead(command, monkeypatch)
    result = dlopt(tmp_path, "options")
    assert (result.code, result.err) == (code, f"dlopt: interrupted by {number.name}{advice}\n")


def test_signal_within_a_composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's clean-up asserts what holds only after a whole composition, and replaces the exception of the signal."""

    signals = [signal.SIGTERM]

    def load(*_: object, **__: object) -> None:
        try:
            if signals:
                send(signals.pop())
        finally:
            raise AssertionError

    monkeypatch.setattr("dlopt.config.compose.recall", lambda *_: None)  # else from memory, without Hydra
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)
    end = threading.Event()
    other = threading.Thread(target=end.wait)  # which receives the signal, if the main thread blocks it
    other.start()
    result = dlopt(tmp_path, "train", *TINY, "model.norm=none")
    end.set()
    assert (result.code, result.err) == (75, "dlopt: interrupted by SIGTERM\n")


def test_signal_after_the_command_keeps_its_exit_code(tmp_path: Path) -> None:
    code = "import os, signal; from dlopt import cli; cli.sys.exit = lambda _: os.kill(os.getpid(), signal.SIGINT)"
    command = [sys.executable, "-c", f"{code}; cli.main()", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dlopt {package.__version__}\n", "")


def run_instead(command: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `dlopt options` run `command`."""
    monkeypatch.setattr("dlopt.commands.options.options", command)


MOMENTS = 6
SENDS_WHEN_STARTED = """
from dlopt import cli
find = cli.find
def started(arguments):
    print("started", flush=True)
    return find(arguments)
cli.find = started
cli.main()
"""


class Started:
    """A command in a process group of its own, as in a terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SENDS_WHEN_STARTED, *arguments], cwd=folder, start_new_session=True, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "started\n"


LONG = (*TINY[:3], "threads=1", "epochs=100000", "stopping=none", "name=x")
STARTS = {"train": ("train", *LONG), "sweep": ("train", "-m", *LONG, "optimizer=sgd,adamw")}


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """How long a command takes to write its first metrics."""

    @functools.cache
    def measure(name: str) -> float:
        folder = tmp_path_factory.mktemp(name)
        started, begin = Started(folder, *STARTS[name]), time.monotonic()
        while not [*folder.rglob("metrics.jsonl")]:
            assert time.monotonic() < begin + 300 and started.process.poll() is None
            time.sleep(0.02)
        taken = time.monotonic() - begin
        os.killpg(started.process.pid, signal.SIGKILL)
        started.process.communicate(timeout=300)
        return taken

    return measure


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment"), [*(("train", k) for k in range(MOMENTS)), *(("sweep", k) for k in range(0, MOMENTS, 2))]
)
def test_signal_at_any_moment(name: str, moment: int, seconds: Callable[[str], float], tmp_path: Path) -> None:
    number = (signal.SIGINT, signal.SIGTERM)[moment // (2 if name == "sweep" else 1) % 2]
    delay = seconds(name) * moment / MOMENTS
    started = Started(tmp_path, *STARTS[name])
    time.sleep(delay)
    os.killpg(started.process.pid, number)
    out, err = started.process.communicate(timeout=300)
    assert started.process.returncode in (130, 75), err
    assert "Traceback" not in out + err and "Error" not in out + err and "KeyboardInterrupt" not in out + err
    lines = err.splitlines()
    assert len(lines) <= 1, err
    assert lines or "resume=auto" in out
    if started.process.returncode == 130:
        assert entries(tmp_path) == set()
