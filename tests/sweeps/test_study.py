"""Studies shared by several processes, with the journal and a real PostgreSQL, and recovery after kills."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from dlopt.basics.errors import UserError
from dlopt.basics.locks import hold, is_held, taken
from dlopt.config.overrides import grid, parse_axes
from dlopt.sweeps import samplers
from dlopt.sweeps.space import parse_space
from dlopt.sweeps.study import JOURNAL, WORKERS, StudySpec, hide_password, open_storage
from tests.support.requires import find, requires
from tests.sweeps.worker import make_spec, study_of

ROOT = Path(__file__).resolve().parents[2]


def begin_worker(
    folder: Path, total: int, url: str | None = None, together: int = 1, seeds: int = 0
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.sweeps.worker", str(folder), str(total), *([url] if url else [])]
    environment = {**os.environ, "TOGETHER": str(together), "SEEDS": str(seeds)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def objectives(folder: Path, total: int, url: str | None = None) -> dict[int, tuple[float, ...]]:
    study = study_of(folder, make_spec(total, url))
    found = {trial.number: tuple(trial.values) for trial in study.finished()}
    study.close()
    return found


def events(folder: Path, kind: str) -> Counter[str]:
    lines = (folder / "log").read_text().split("\n") if (folder / "log").exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith(kind))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a PostgreSQL server on a loopback port and yields the URL of its database."""
    pytest.importorskip("psycopg")
    tools = Path(str(find("initdb"))).parent
    folder = tmp_path_factory.mktemp("postgres")
    as_user: list[str] = []
    if os.geteuid() == 0:  # it refuses to run as root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
        for parent in folder.parents:
            if parent != Path("/") and parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o011)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "password").write_text("open sesame")
    (folder / "password").chmod(0o644)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": "/", "check": True}
    data = folder / "data"
    initdb = [*as_user, str(tools / "initdb"), "-D", str(data), "-A", "scram-sha-256", "-U", "me", "-N"]
    subprocess.run([*initdb, f"--pwfile={folder / 'password'}"], **quiet)  # type: ignore[call-overload]
    settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
    options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    with (folder / "log").open("wb") as log:
        command = [*as_user, str(tools / "postgres"), "-D", str(data), "-p", str(port), *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    ready = [str(tools / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    deadline = time.monotonic() + 60
    while subprocess.run(ready, check=False).returncode:
        assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.2)
    try:
        yield f"postgresql+psycopg://me:open sesame@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seeds"), [("journal", 0), ("journal", 3), pytest.param("postgres", 3, marks=requires("initdb"))]
)
def test_four_workers_share_a_study(kind: str, seeds: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    total, url = 15 if seeds else 40, request.getfixturevalue("postgres") if kind == "postgres" else None
    workers = [begin_worker(tmp_path, total, url, together=4, seeds=seeds) for _ in range(4)]
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, said
    assert (
        events(tmp_path, "begin")
        == events(tmp_path, "end")
        == Counter(
            map(str, range(total * max(seeds, 1)))  # none twice
        )
    )
    assert len(objectives(tmp_path, total, url)) == total  # none lost
    assert sum("finished" in text for text in said) > 1, "the work is shared"


def kill_and_go_on(folder: Path, kills: int, seed: int, seeds: int) -> int:
    """Kills workers at random moments, then lets one finish; returns how many were killed while running."""
    draw, killed = random.Random(seed), 0
    for _ in range(kills):
        worker = begin_worker(folder, 30, seeds=seeds)
        deadline = time.monotonic() + 60
        before = sum(events(folder, "end").values())
        while not list((folder / WORKERS).glob("*-*.lock")) and time.monotonic() < deadline:
            time.sleep(0.02)
        while sum(events(folder, "end").values()) == before and worker.poll() is None:  # it is at work
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.1))
        killed += worker.poll() is None
        worker.kill()
        worker.communicate()
    last = begin_worker(folder, 30, seeds=seeds)
    said, _ = last.communicate(timeout=120)
    assert last.returncode == 0, said
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [0, 3])
def test_kills_at_random_moments_do_not_change_results(seeds: int, tmp_path: Path) -> None:
    kills, jobs = 3, 30 * max(seeds, 1)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    assert kill_and_go_on(tmp_path / "killed", kills, kills, seeds) > 0
    whole = begin_worker(tmp_path / "whole", 30, seeds=seeds)
    assert whole.wait(timeout=120) == 0
    assert objectives(tmp_path / "killed", 30) == objectives(tmp_path / "whole", 30)
    ended = events(tmp_path / "killed", "end")
    assert set(ended) == set(map(str, range(jobs)))
    assert sum(ended.values()) <= jobs + 2 * kills  # only what was running ran again: two slots


def test_job_of_a_dead_process_is_taken_over_once(tmp_path: Path) -> None:
    """Uses real processes: a process does not see its own locks."""
    code = (
        "import sys; from pathlib import Path; from tests.sweeps.worker import *\n"
        "study = study_of(Path(sys.argv[1]), make_spec(3, None)); claim = study.claim()\n"
        "print(claim.number, claim.is_takeover, claim.values, flush=True); input()"
    )

    def worker() -> "subprocess.Popen[str]":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]

    first, second = worker(), worker()
    lines = [each.stdout.readline().split(maxsplit=2) for each in (first, second) if each.stdout]
    assert sorted(line[0] for line in lines) == ["0", "1"] and all(line[1] == "False" for line in lines)
    first.kill()
    first.wait()
    third = worker()
    assert third.stdout is not None
    taken = third.stdout.readline().split(maxsplit=2)
    assert taken[:2] == [lines[0][0], "True"] and taken[2] == lines[0][2]  # with the values that it had
    fourth = worker()
    assert fourth.stdout is not None
    assert fourth.stdout.readline().split()[:2] == ["2", "False"]
    assert sum(is_held(path) for path in (tmp_path / WORKERS).glob("*-*.lock")) == 3
    for each in (second, third, fourth):
        each.kill()
        each.communicate()


@pytest.mark.parametrize("enqueued", [[], [{"lr": 0.1}]])
@pytest.mark.parametrize("sampler", ["random", "tpe", "sobol"])
def test_takeover_draws_the_same_remaining_values(sampler: str, enqueued: list[dict[str, Any]], tmp_path: Path) -> None:
    spec = make_spec(3, None, "lr=tag(log,interval(0.001,1))", "fixed=interval(2,2)", "kind=a,b", "width=range(1,99)")
    more = {"random": {}, "tpe": {"startup_trials": 2, "multivariate": False, "constant_liar": True}}
    options = more.get(sampler, {"scramble": True})
    spec = replace(spec, sampler=getattr(samplers, sampler)(space=spec.space, seed=0, **options), enqueued=enqueued)
    study = study_of(tmp_path, spec)
    whole = study.claim()
    assert whole is not None and len(whole.values) == 4
    assert (whole.values["lr"] == 0.1) == bool(enqueued)
    study.close()
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    for drawn in range(5):
        (tmp_path / JOURNAL).write_bytes(b"".join(lines[: len(lines) - drawn]))
        study = study_of(tmp_path, spec)
        again = study.claim()
        assert again is not None and again.is_takeover
        assert (again.number, again.values) == (whole.number, whole.values)
        study.close()


@pytest.mark.parametrize(("sampler", "options"), [("sobol", {"scramble": True}), ("halton", {"scramble": False})])
def test_enqueued_points_leave_out_no_point_of_a_sequence(
    sampler: str, options: dict[str, bool], tmp_path: Path
) -> None:
    spec = make_spec(4, None, "lr=tag(log,interval(0.001,1))", "width=interval(0.0,1.0)")
    spec = replace(spec, sampler=getattr(samplers, sampler)(space=spec.space, seed=0, **options))
    point = {"lr": 0.1, "width": 0.5}
    drawn = {}
    for name, enqueued in {"plain": [], "enqueued": [point]}.items():
        (tmp_path / name).mkdir()
        study = study_of(tmp_path / name, replace(spec, enqueued=enqueued, total=4 + len(enqueued)))
        claims = [study.claim() for _ in range(study.total)]
        drawn[name] = [claim.values for claim in claims if claim is not None]
        study.close()
    assert drawn["enqueued"] == [point, *drawn["plain"]] and len(drawn["plain"]) == 4


def test_points_are_enqueued_in_a_study_that_has_begun(tmp_path: Path) -> None:
    """They are the next trials; the sequence of the drawn ones is that of a study without them."""
    spec = make_spec(4, None, "lr=tag(log,interval(0.001,1))", "width=interval(0.0,1.0)")
    spec = replace(spec, sampler=samplers.halton(space=spec.space, seed=0, scramble=False))

    def claimed(folder: Path, *parts: StudySpec, most: int = 2) -> list[Mapping[str, Any]]:
        values = []
        for part in parts:
            study = study_of(folder, part)
            claims = [study.claim() for _ in range(most)]
            for claim in filter(None, claims):
                study.finish(claim, TrialState.COMPLETE, [0.0])
                values.append(claim.values)
            study.close()
        return values

    points = [{"lr": 0.1, "width": 0.5}, {"lr": 0.2, "width": 0.5}]
    for name in ("plain", "enqueued"):
        (tmp_path / name).mkdir()
    plain = claimed(tmp_path / "plain", spec, spec)
    later = replace(spec, total=6, enqueued=points)
    assert claimed(tmp_path / "enqueued", spec, later, later, later) == [*plain[:2], *points, *plain[2:]]
    with pytest.raises(UserError, match=r"1 new points, but 0 of hydra.sweeper.n_trials=6 have not begun"):
        study_of(tmp_path / "enqueued", replace(later, enqueued=[*points, points[0]]))


@pytest.mark.parametrize("sampler", ["random", "tpe", "sobol", "grid"])
def test_draws_only_the_axes_that_a_job_has(sampler: str, tmp_path: Path) -> None:
    always = parse_axes(["pair=zip(width=[1,2],depth=[3,4])", "kind=a,b"])
    own = {"kind=a": ["lr=1,2"], "kind=b": ["lr=3,4", "momentum=range(5,7)"]}
    axes = [
        replace(axis, name=f"{axis.name} [{when}]", when=when)
        for when, words in own.items()
        for axis in parse_axes(words)
    ]
    searched = parse_space([*always, *axes])
    assert searched.size() == 12
    more = {"random": {}, "tpe": {"startup_trials": 2, "multivariate": True, "constant_liar": True}, "grid": {}}
    draws = getattr(samplers, sampler)(space=searched, seed=0, **more.get(sampler, {"scramble": True}))
    spec = replace(make_spec(12, None), space=searched, sampler=draws)
    jobs = []
    for _ in range(12):
        study = study_of(tmp_path, spec)
        whole = study.claim()
        assert whole is not None
        study.close()
        study = study_of(tmp_path, spec)  # another process takes it over
        claim = study.claim()
        assert claim is not None and claim.is_takeover and claim.values == whole.values
        study.finish(claim, TrialState.COMPLETE, [float(len(jobs) % 3)], run=str(tmp_path))
        jobs.append(tuple(searched.overrides(claim.values)))
        assert searched.overrides(study.finished()[-1].params) == [*jobs[-1]]
        study.close()
    assert {(len(job), "kind=b" in job, "momentum=" in " ".join(job)) for job in jobs} == {
        (4, False, False),
        (5, True, True),
    }
    if sampler == "grid":
        assert jobs == list(map(tuple, grid([*always, *axes])))


@pytest.mark.filterwarnings("error:The reported value")  # of Optuna: it would interrupt the output of the sweep
def test_a_job_taken_over_reports_its_first_epochs_again(tmp_path: Path) -> None:
    for epochs in (2, 4):
        study = study_of(tmp_path, make_spec(1, None))
        claim = study.claim()
        assert claim is not None and claim.is_takeover == (epochs == 4)
        for epoch in range(1, epochs + 1):
            study.report(claim, epoch, float(epoch))
        trial = study._storage.get_trial(claim.trial._trial_id)
        assert trial.intermediate_values == {epoch: float(epoch) for epoch in range(1, epochs + 1)}
        study.close()


def test_torn_line_of_the_journal_is_truncated(tmp_path: Path) -> None:
    study = study_of(tmp_path, make_spec(3, None))
    claim = study.claim()
    assert claim is not None
    study.close()
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole + b'{"op_code": 5, "work')
    again = study_of(tmp_path, make_spec(4, None))
    assert again.counts()[TrialState.WAITING] == 3
    assert (tmp_path / JOURNAL).read_bytes().startswith(whole)
    again.close()


def test_the_total_may_grow(tmp_path: Path) -> None:
    for total in (3, 5, 4):
        study = study_of(tmp_path, make_spec(total, None))
        assert study.counts()[TrialState.WAITING] == total
        study.close()


def test_rejects_another_space_and_lists_differences(tmp_path: Path) -> None:
    study_of(tmp_path, make_spec(3, None)).close()
    with pytest.raises(UserError) as error:
        study_of(tmp_path, make_spec(3, None, "lr=tag(log,interval(0.001,0.5))", "kind=a,b"))
    assert "lr: saved tag(log,interval(0.001,1.0)), now tag(log,interval(0.001,0.5))" in str(error.value)
    assert "kind" not in str(error.value)


def test_unreachable_database_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(UserError) as error:
        open_storage("postgresql://me:sesame@127.0.0.1:1/none", tmp_path)
    assert "sesame" not in str(error.value) and "127.0.0.1" in str(error.value)
    with pytest.raises(UserError, match="not the URL"):
        open_storage("what is this", tmp_path)


def test_passwords_are_not_shown() -> None:
    assert hide_password("postgresql://me:sesame@host/db") == "postgresql://me:***@host/db"


def test_asking_for_the_lock_of_this_process_does_not_release_it(tmp_path: Path) -> None:
    path, script = (
        tmp_path / "lock",
        "import sys, pathlib, dlopt.basics.locks; dlopt.basics.locks.hold(pathlib.Path(sys.argv[1]))",
    )
    lock = hold(path)
    with taken(path) as is_taken:
        assert not is_taken
    command = [sys.executable, "-c", script, str(path)]
    assert "holds this lock" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr
    lock.close()
