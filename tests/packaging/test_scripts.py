"""The set-up scripts against an interpreter that only pretends: what it is asked to do is logged, nothing is installed.

The PATH of these tests holds the named tools and the pretended interpreters, nothing of the machine's own Python.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["sh", "cat", "chmod", "cksum", "cp", "dirname", "find", "grep", "ls", "mkdir", "mv", "readlink", "rm"]
TOOLS += ["sleep", "tail", "touch"]

# Environment variables steer it: NO_ENSUREPIP, NO_PIP, NO_NETWORK, SLEEP (seconds of `pip install`).
INTERPRETER = r"""#!/bin/sh
here=$(dirname "$(dirname "$0")")
case "$1 $2" in
    "-c"*_base_executable*) echo "$0"; case "$0" in */old/*) exit 1 ;; esac; exit 0 ;;
    "-c"*) exec "{python}" "$@" ;;
esac
echo "$@" >>"$LOG"
case "$*" in
    "-m venv"*)
        for target; do :; done
        mkdir -p "$target/bin"; touch "$target/pyvenv.cfg"; cp "$0" "$target/bin/python"
        case "$*" in
            *--without-pip*) ;;
            *) [ -z "$NO_ENSUREPIP" ] || {{ echo "ensurepip is not available"; exit 1; }}; touch "$target/pip" ;;
        esac ;;
    "-m pip --version") [ -e "$here/pip" ] ;;
    "-m pip --python"*) [ -z "$NO_PIP" ] && touch "$(dirname "$(dirname "$4")")/pip" ;;
    "-m pip install"*)
        [ -e "$here/pip" ] || exit 1
        [ -z "$NO_NETWORK" ] || {{ echo "NewConnectionError: Temporary failure in name resolution"; exit 1; }}
        touch "$here/half"; sleep "${{SLEEP:-0}}"; rm -f "$here/half"
        for name in dlopt ruff mypy; do
            {{
                echo '#!/bin/sh'; echo "echo $name"' "$@"'
                echo 'ls -l /proc/$$/fd | grep -c [.]lock'; echo 'exit ${{EXIT:-0}}'
            }} >"$here/bin/$name"
            chmod +x "$here/bin/$name"
        done ;;
    "-m pytest"*) echo "pytest $*"; exit "${{PYTEST_EXIT:-0}}" ;;
    *) echo "no such module"; exit 1 ;;
esac
"""


class Checkout:
    """A checkout in a path with spaces, and what the pretended interpreters were asked to do."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"
        self.bin = folder / "bin"
        self.log = folder / "log"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("scripts/dlopt", "scripts/test", "scripts/bootstrap.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in TOOLS:
            self.bin.joinpath(tool).symlink_to(str(shutil.which(tool)))
        self.log.touch()

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def add_python(self, name: str, folder: str = "") -> Path:
        path = self.bin / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(INTERPRETER.format(python=sys.executable))
        path.chmod(0o755)
        return path

    def start(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        arguments = [str(self.root / "scripts/dlopt"), "train", "a b"] if not command else list(command)
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "NO_PIP": "", "NO_ENSUREPIP": "", "NO_NETWORK": ""}
        return subprocess.Popen(
            arguments,
            cwd=cwd or self.root,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
        process = self.start(*command, cwd=cwd, **variables)
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors

    def calls(self, what: str = "") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if what in line]

    def edit_pyproject(self) -> None:
        with (self.root / "pyproject.toml").open("a") as file:
            file.write("# changed\n")


# What the pretended dlopt prints: its arguments, and how many descriptors of the lock it has inherited.
DONE = (0, "dlopt train a b\n0\n")


@pytest.fixture
def bare(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def checkout(bare: Checkout) -> Checkout:
    bare.add_python("python3")
    return bare


def test_first_call_sets_up_and_only_the_command_writes_to_stdout(checkout: Checkout) -> None:
    code, output, errors = checkout.run()
    assert (code, output) == DONE
    assert "setting up" in errors and "ready" in errors
    (install,) = checkout.calls("pip install")
    assert f"-e {checkout.root}[sweep" in install and not install.endswith(",test]")


def test_later_calls_start_no_python(checkout: Checkout) -> None:
    checkout.run()
    before = checkout.calls()
    code, output, errors = checkout.run()
    assert (code, output) == DONE and errors == ""
    assert checkout.calls() == before


def test_exit_code_is_the_commands(checkout: Checkout) -> None:
    assert checkout.run(EXIT="75")[0] == 75


def test_through_a_symlink_from_another_folder(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(checkout.root / "scripts/dlopt")
    assert checkout.run(str(link), "train", "a b", cwd=Path("/"))[:2] == DONE
    assert checkout.run("sh", "scripts/dlopt", "train", "a b")[:2] == DONE
    assert len(checkout.calls("pip install")) == 1


def test_changed_pyproject_updates_in_place(checkout: Checkout) -> None:
    checkout.run()
    kept = checkout.venv / "kept"
    kept.touch()
    checkout.edit_pyproject()
    code, output, errors = checkout.run()
    assert (code, output) == DONE and "up to date" in errors
    assert kept.exists() and len(checkout.calls("pip install")) == 2 and len(checkout.calls("venv ")) == 1


def test_update_without_network_says_so_and_is_tried_again_in_place(checkout: Checkout) -> None:
    checkout.run()
    kept = checkout.venv / "kept"
    kept.touch()
    checkout.edit_pyproject()
    code, output, errors = checkout.run(NO_NETWORK="1")
    assert code == 1 and output == "" and "no network" in errors
    assert checkout.run()[:2] == DONE
    assert kept.exists()


def test_first_call_without_network_says_so_and_the_next_one_succeeds(checkout: Checkout) -> None:
    code, _, errors = checkout.run(NO_NETWORK="1")
    assert code == 1 and "no network" in errors
    assert checkout.run()[:2] == DONE


def test_concurrent_first_calls_install_once(checkout: Checkout) -> None:
    processes = [checkout.start(SLEEP="0.5") for _ in range(3)]
    results = [(process.communicate(timeout=30), process.returncode) for process in processes]
    assert [(code, output) for (output, _), code in results] == [DONE] * 3
    assert sum("waiting for another" in errors for (_, errors), _ in results) == 2
    assert len(checkout.calls("pip install")) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.mark.parametrize("update", [False, True])
def test_interrupted_set_up_is_made_again_from_nothing(checkout: Checkout, update: bool) -> None:
    if update:
        checkout.run()
        checkout.edit_pyproject()
    process = checkout.start(SLEEP="20")
    half = checkout.venv / "half"
    wait_for(half.exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert half.exists()
    made = len(checkout.calls("venv "))
    assert checkout.run()[:2] == DONE
    assert not half.exists() and len(checkout.calls("venv ")) == made + 1


def test_moved_checkout_is_set_up_again(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run()
    checkout.root = checkout.root.rename(tmp_path / "moved")
    assert checkout.run()[:2] == DONE
    assert len(checkout.calls("venv ")) == 2


def test_environment_whose_python_is_gone_is_made_again(checkout: Checkout) -> None:
    checkout.run()
    (checkout.venv / "bin/python").unlink()
    assert checkout.run()[:2] == DONE
    assert len(checkout.calls("venv ")) == 2


@pytest.mark.parametrize("usable", [True, False])
def test_somebody_elses_environment_is_never_deleted(checkout: Checkout, usable: bool) -> None:
    kept = checkout.venv / "kept"
    (checkout.venv / "bin").mkdir(parents=True)
    for path in (kept, checkout.venv / "pyvenv.cfg"):
        path.touch()
    if usable:
        (checkout.venv / "pip").touch()
        shutil.copy(checkout.bin / "python3", checkout.venv / "bin/python")
    code, output, errors = checkout.run()
    if usable:
        assert (code, output) == DONE
    else:
        assert code == 1 and "remove it" in errors
    assert kept.exists() and not checkout.calls("venv ")


def test_without_ensurepip_pip_comes_from_the_interpreters_own(checkout: Checkout) -> None:
    code, output, _ = checkout.run(NO_ENSUREPIP="1")
    assert (code, output) == DONE
    assert checkout.calls("--without-pip") and checkout.calls("pip --python")


def test_without_ensurepip_and_pip_the_message_says_what_to_install(checkout: Checkout) -> None:
    code, output, errors = checkout.run(NO_ENSUREPIP="1", NO_PIP="1")
    assert code == 1 and output == "" and "apt install python3-venv" in errors
    assert checkout.run()[:2] == DONE  # once that is installed


def test_old_python_gives_way_to_a_newer_one(bare: Checkout) -> None:
    old = bare.add_python("python3", "old")
    path = f"{old.parent}:{bare.bin}"
    code, output, errors = bare.run(PATH=path)
    assert code == 1 and output == "" and "3.11 or newer is needed" in errors and f"too old: {old}" in errors
    assert not bare.venv.exists()
    newer = bare.add_python("python3.12")
    code, output, errors = bare.run(PATH=path)
    assert (code, output) == DONE and f"with {newer}" in errors


def test_no_python_at_all(bare: Checkout) -> None:
    code, output, errors = bare.run()
    assert code == 1 and output == "" and "apt install python3 python3-venv" in errors
    assert not bare.venv.exists()


def test_dlopt_python_chooses_and_is_not_replaced(checkout: Checkout) -> None:
    old = checkout.add_python("python3.9", "old")
    for wrong in (str(old), "/nowhere/python3"):
        code, _, errors = checkout.run(DLOPT_PYTHON=wrong)
        assert code == 1 and f"DLOPT_PYTHON={wrong}" in errors
    chosen = checkout.add_python("python3.12")
    code, output, errors = checkout.run(DLOPT_PYTHON=str(chosen))
    assert (code, output) == DONE and f"with {chosen}" in errors


def test_test_command_adds_the_test_tools_and_keeps_them(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts/test")
    checkout.run()
    assert checkout.run(script)[0] == 0
    assert [call.rstrip("]").endswith(",test") for call in checkout.calls("pip install")] == [False, True]
    checkout.run()
    assert len(checkout.calls("pip install")) == 2
    checkout.edit_pyproject()
    checkout.run()
    assert checkout.calls("pip install")[-1].endswith(",test]")


def test_test_command_fails_when_a_part_fails_or_no_test_ran(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts/test")
    code, output, _ = checkout.run(script, "-k", "one two")
    assert code == 0 and "ruff check" in output and "mypy" in output
    assert checkout.calls("-m pytest")[-1].endswith("-k one two")
    code, _, errors = checkout.run(script, PYTEST_EXIT="5")
    assert code == 1 and "pytest(5)" in errors
    before = len(checkout.calls("-m pytest"))
    code, _, errors = checkout.run(script, EXIT="3")
    assert code == 1 and "ruff(3) mypy(3)" in errors
    assert len(checkout.calls("-m pytest")) == before + 1  # the other parts run all the same
