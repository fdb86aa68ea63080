"""What all tests share: one thread each (workers share the cores), and the same draws in every run."""

import gc
import logging
import os
import random
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dlopt.parallel.processes import launch
from dlopt.sweeps.pool import PRELOADED
from tests.support import processes
from tests.support.requires import requires, skip_without_needs

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before torch is first imported, and for the commands that tests start

# Started by `nohup` or by a service, the tests and all processes of theirs would ignore it, as runs then do.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A child must not collect what the worker has left: the destructor of a process group waits for threads that only the
# worker has.
os.register_at_fork(after_in_child=gc.freeze)

os.fsync = lambda descriptor: None  # type: ignore[assignment]  # half of a small run's time; no test cuts the power
# Neither this replacement nor that of the launcher is in new interpreters: tests/parallel/test_launch.py and
# tests/reliability/test_ranks.py train, save, kill and resume runs of several ranks there.
PRELOADED.append("tests.support.preload")
launch.start_rank = processes.start_rank

settings.register_profile("fixed", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("random", deadline=None, max_examples=200)  # of the nightly job: finds new examples
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fixed")
settings.load_profile(PROFILE)


def pytest_xdist_auto_num_workers() -> int:
    """Returns three workers for two cores (`-n auto`): many tests wait for processes that they have started."""
    return (3 * (os.cpu_count() or 1) + 1) // 2


def pytest_configure() -> None:
    """Keeps hypothesis from trying constants of the modules imported so far: they depend on the order of the tests."""
    if PROFILE == "fixed":
        from hypothesis.internal.conjecture import providers

        nothing = providers.Constants()
        providers._get_local_constants = lambda: nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(requires("gpu"))
        skip_without_needs(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Seeds the global generators before the fixtures, so that no test depends on the tests before it.

    Only tests marked `drawn` draw pictures.
    """
    import numpy as np
    import torch  # after the variables above are set

    from tests.support.drawing import drawing

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with drawing(item.get_closest_marker("drawn") is not None):
        return (yield)


def pytest_collection_finish() -> None:
    """Collects garbage more rarely, and not in what has been imported: otherwise 7 % of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Makes the first backward pass, in which autograd starts a thread per device.

    After torch.export it counts devices that do not exist; then no test that runs later could fork and train.
    """
    if session.config.getoption("dist", "no") != "no" and not hasattr(session.config, "workerinput"):
        return  # the process that starts the workers, which wait for it
    import torch  # after the variables above are set

    from tests.support import drawing
    from tests.support.remembered import remember_configs

    drawing.install()
    remember_configs()
    if not torch.accelerator.is_available():
        torch.ones((), requires_grad=True).backward()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else extension modules report at exit what was not collected


@pytest.fixture(autouse=True)
def root_level() -> Iterator[None]:
    """Gives the root logger its level back: a command sets it for its process, which other tests share."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def conf_dir() -> Path:
    return Path(__file__).resolve().parents[1] / "conf"


@pytest.fixture
def new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts ranks as users do, where tests fork them (see `processes`)."""
    monkeypatch.setattr(launch, "start_rank", processes.start_rank_in_new_interpreter)
