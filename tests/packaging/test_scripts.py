"""scripts/setup, scripts/dlopt, scripts/test with stand-ins for uv and Python: logs calls, installs nothing.

The PATH of these tests holds the tools named here and the stand-ins, nothing else of the machine.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("setup", "dlopt", "test")
TOOLS = ["sh", "cat", "chmod", "cp", "dirname", "env", "flock", "grep"]
TOOLS += ["ls", "mkdir", "readlink", "rm", "sleep", "touch", "uname"]

# Environment variables steer the stand-ins: NO_ENSUREPIP, NO_PIP, NO_NETWORK, NO_TORCH_INDEX, SLEEP (of the install).
# The installed versions of PyTorch that satisfy the constraints are 2.0 and 2.0+BUILD.
PYTHON = r"""#!/bin/sh
echo "python $@" >>"$LOG"
case "$*" in
    "-m venv"*)
        case "$*" in *--without-pip*) ;; *) [ -z "$NO_ENSUREPIP" ] || exit 1 ;; esac
        for target; do :; done
        mkdir -p "$target/bin"; cp "$0" "$target/bin/python" ;;
    "-m pip --python"*) [ -z "$NO_PIP" ] ;;
    *"install"*" uv") cp "$STANDINS/uv" "$(dirname "$0")/uv" ;;
    "-m pip install"*) [ -z "$NO_NETWORK" ] && cp "$STANDINS/command" "$(dirname "$0")/dlopt" ;;
    "-m pytest"*) echo "pytest $*"; exit "${PYTEST_EXIT:-0}" ;;
    "-m ruff"* | "-m mypy"* | "scripts/words.py") echo "$*"; exit "${EXIT:-0}" ;;
    *) exit 1 ;;
esac
"""
UV = r"""#!/bin/sh
echo "uv $@" >>"$LOG"
case "$*" in
    venv*)
        for target; do :; done
        mkdir -p "$target/bin"; cp "$STANDINS/python3" "$target/bin/python" ;;
    *--offline*) ls .venv/lib/python3.13/site-packages | grep -q "^torch-2.0[+.]" ;;
    *--dry-run*) [ -z "$NO_TORCH_INDEX" ] ;;
    "pip install"*)
        [ -z "$NO_NETWORK" ] || { echo "error: dns" >&2; exit 1; }
        case "$*" in *--torch-backend*) [ -z "$NO_TORCH_INDEX" ] || exit 1 ;; esac
        touch .venv/half; sleep "${SLEEP:-0}"; rm -f .venv/half
        cp "$STANDINS/command" .venv/bin/dlopt ;;
esac
"""
COMMAND = r"""#!/bin/sh
echo dlopt "$@"
ls -l /proc/$$/fd | { grep -c '[p]yproject.toml' || :; }
exit ${EXIT:-0}
"""


class Checkout:
    """A checkout in a path with a space, and the log of what the stand-ins were called with."""

    def __init__(self, folder: Path, *, uv: bool) -> None:
        self.root = folder / "check out"
        self.bin = folder / "bin"
        self.standins = folder / "standins"
        self.log = folder / "log"
        for path in (self.root / "scripts", self.bin, self.standins):
            path.mkdir(parents=True)
        for name in (*(f"scripts/{each}" for each in SCRIPTS), "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            self.bin.joinpath(tool).symlink_to(str(shutil.which(tool)))
        for name, text in (("python3", PYTHON), ("uv", UV), ("command", COMMAND)):
            path = self.standins / name
            path.write_text(text)
            path.chmod(0o755)
        shutil.copy(self.standins / "python3", self.bin / "python3")
        if uv:
            shutil.copy(self.standins / "uv", self.bin / "uv")
        self.log.touch()

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def start(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        arguments = [str(self.root / "scripts/dlopt"), "train", "a b"] if not command else list(command)
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "STANDINS": str(self.standins)}
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
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def calls(self, pattern: str = "") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]

    def installs(self) -> list[str]:
        return self.calls(r"^uv pip install -p .venv -c")

    def install_torch(self, version: str) -> None:
        for folder in (self.venv / "lib/python3.13/site-packages").glob("torch-*"):
            folder.rmdir()
        (self.venv / "lib/python3.13/site-packages" / f"torch-{version}.dist-info").mkdir(parents=True)

    def edit_pyproject(self) -> None:
        path = self.root / "pyproject.toml"
        path.write_text(path.read_text() + "# changed\n")
        later = (self.venv / ".dlopt").stat().st_mtime + 5  # coarse clocks of file systems must not hide the change
        os.utime(path, (later, later))


# What the stand-in for dlopt prints: its arguments, and how many descriptors of the lock it inherited.
DONE = (0, "dlopt train a b\n0\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path, uv=True)


@pytest.fixture
def without_uv(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path, uv=False)


def test_wrappers_are_short() -> None:
    for name in ("dlopt", "test"):
        assert len((ROOT / "scripts" / name).read_text().splitlines()) <= 25


def test_first_call_installs_and_only_the_command_writes_to_stdout(checkout: Checkout) -> None:
    code, output, errors = checkout.run()
    assert (code, output) == DONE and "setting up" in errors
    (install,) = checkout.installs()
    assert "-c scripts/constraints.txt -e .[sweep,schedulefree,timm]" in install


def test_later_calls_start_neither_uv_nor_python(checkout: Checkout) -> None:
    checkout.run()
    before = checkout.calls()
    code, output, errors = checkout.run()
    assert (code, output) == DONE and errors == "" and checkout.calls() == before


def test_exit_code_is_that_of_the_command(checkout: Checkout) -> None:
    assert checkout.run(EXIT="75")[0] == 75


def test_through_a_symlink_from_another_folder(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(checkout.root / "scripts/dlopt")
    assert checkout.run(str(link), "train", "a b", cwd=Path("/"))[:2] == DONE
    assert checkout.run("sh", "scripts/dlopt", "train", "a b")[:2] == DONE
    assert len(checkout.installs()) == 1


def test_changed_pyproject_updates_in_place(checkout: Checkout) -> None:
    checkout.run()
    marker = checkout.venv / "marker"
    marker.touch()
    checkout.edit_pyproject()
    assert checkout.run()[:2] == DONE
    os.utime(checkout.venv / ".dlopt", (2**31, 2**31))  # newer than pyproject.toml, which was dated ahead
    assert marker.exists() and len(checkout.installs()) == 2 and len(checkout.calls("^uv venv")) == 1
    checkout.run()
    assert len(checkout.installs()) == 2


def test_reports_and_retries_a_failed_installation(checkout: Checkout) -> None:
    code, output, errors = checkout.run(NO_NETWORK="1")
    assert code != 0 and output == "" and "error: dns" in errors and "trying pip" in errors
    assert checkout.run()[:2] == DONE


def test_falls_back_to_pip(checkout: Checkout) -> None:
    uv = checkout.bin / "uv"
    uv.write_text(uv.read_text().replace("$NO_NETWORK", "$NO_UV_NETWORK"))
    code, output, errors = checkout.run(NO_UV_NETWORK="1")
    assert (code, output) == DONE and "trying pip" in errors
    assert checkout.calls("python -m pip install .* -c scripts/constraints.txt")


def test_concurrent_first_calls_install_once(checkout: Checkout) -> None:
    processes = [checkout.start(SLEEP="0.5") for _ in range(3)]
    results = [(process.communicate(timeout=60)[0], process.returncode) for process in processes]
    assert [(code, output) for output, code in results] == [DONE] * 3
    assert len(checkout.installs()) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_interrupted_installation_starts_from_scratch(checkout: Checkout) -> None:
    process = checkout.start(SLEEP="60")
    half = checkout.venv / "half"
    wait_for(half.exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert half.exists()
    assert checkout.run()[:2] == DONE
    assert not half.exists() and len(checkout.calls("^uv venv")) == 2


def test_reinstalls_in_a_moved_checkout(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run()
    checkout.root = checkout.root.rename(tmp_path / "moved")
    assert checkout.run()[:2] == DONE
    assert len(checkout.calls("^uv venv")) == 2


def test_recreates_environment_without_python(checkout: Checkout) -> None:
    checkout.run()
    (checkout.venv / "bin/python").unlink()
    assert checkout.run()[:2] == DONE
    assert len(checkout.calls("^uv venv")) == 2


def test_environment_of_the_user_is_never_deleted(checkout: Checkout) -> None:
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python3", checkout.venv / "bin/python")
    marker = checkout.venv / "marker"
    marker.touch()
    assert checkout.run(NO_NETWORK="1")[0] != 0 and marker.exists()
    assert checkout.run()[:2] == DONE and marker.exists()
    assert not checkout.calls("^uv venv")


def test_installs_uv_with_pip(without_uv: Checkout) -> None:
    assert without_uv.run()[:2] == DONE
    assert without_uv.calls("python -m venv .venv") and without_uv.calls("pip install .* uv$")
    assert len(without_uv.installs()) == 1


def test_uses_pip_of_the_interpreter_without_ensurepip(without_uv: Checkout) -> None:
    assert without_uv.run(NO_ENSUREPIP="1")[:2] == DONE
    assert without_uv.calls("--without-pip") and without_uv.calls("pip --python")


def test_reports_missing_uv_and_pip(without_uv: Checkout) -> None:
    code, output, errors = without_uv.run(NO_ENSUREPIP="1", NO_PIP="1")
    assert code == 1 and output == "" and "apt install python3-venv" in errors
    assert without_uv.run()[:2] == DONE  # once it is installed


def test_dlopt_python_chooses_the_interpreter(checkout: Checkout) -> None:
    assert checkout.run(DLOPT_PYTHON="3.12")[:2] == DONE
    assert checkout.calls(r"^uv venv .*-p 3\.12")
    checkout.root.joinpath(".venv/bin/python").unlink()
    assert checkout.run()[:2] == DONE
    assert checkout.calls("^uv venv .*-p >=3.11")


def test_installs_cpu_torch_without_a_driver(checkout: Checkout) -> None:
    assert checkout.run()[:2] == DONE
    assert checkout.installs()[-1].endswith("--torch-backend auto")
    checkout.edit_pyproject()
    _, _, errors = checkout.run(NO_TORCH_INDEX="1")
    assert "--torch-backend" not in checkout.installs()[-1] and "out of reach" in errors


def test_torch_with_a_driver_or_by_choice(checkout: Checkout) -> None:
    assert checkout.run(DLOPT_TORCH="cu130")[:2] == DONE
    assert checkout.installs()[-1].endswith("--torch-backend cu130")
    checkout.edit_pyproject()
    shutil.copy(checkout.standins / "command", checkout.bin / "nvidia-smi")
    assert checkout.run()[0] == 0
    assert "--torch-backend" not in checkout.installs()[-1] and len(checkout.calls("dry-run")) == 0


@pytest.mark.parametrize("version", ["2.0", "2.0+cpu", "2.0+cu130"])
def test_keeps_the_installed_torch_without_asking_for_it(checkout: Checkout, version: str) -> None:
    checkout.run()
    checkout.install_torch(version)
    probes = len(checkout.calls("dry-run"))
    code, _, errors = checkout.run(str(checkout.root / "scripts/test"), NO_TORCH_INDEX="1")
    assert code == 0 and "trying pip" not in errors and "5 GB" not in errors
    assert ",test]" in checkout.installs()[-1] and "--torch-backend" not in checkout.installs()[-1]
    assert all("--offline" in call for call in checkout.calls("dry-run")[probes:])


def test_replaces_an_old_torch_by_the_same_build(checkout: Checkout) -> None:
    checkout.run()
    for version, end in (("1.9+cpu", "--torch-backend cpu"), ("1.9", "[sweep,schedulefree,timm]")):
        checkout.install_torch(version)
        checkout.edit_pyproject()
        assert checkout.run()[:2] == DONE
        assert checkout.installs()[-1].endswith(end)
    checkout.install_torch("1.9+cu130")
    checkout.edit_pyproject()
    _, _, errors = checkout.run(NO_TORCH_INDEX="1")
    assert "--torch-backend" not in checkout.installs()[-1] and "out of reach" in errors
    checkout.install_torch("2.0+cpu")
    checkout.edit_pyproject()
    assert checkout.run(DLOPT_TORCH="cu130")[:2] == DONE
    assert checkout.installs()[-1].endswith("--torch-backend cu130")


def test_test_command_adds_the_test_tools_and_keeps_them(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts/test")
    checkout.run()
    assert checkout.run(script)[0] == 0
    assert [",test]" in call for call in checkout.installs()] == [False, True]
    checkout.run()
    assert len(checkout.installs()) == 2
    checkout.edit_pyproject()
    checkout.run()
    assert ",test]" in checkout.installs()[-1]


def test_test_command_fails_if_a_step_fails_or_no_test_runs(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts/test")
    code, output, _ = checkout.run(script, "-k", "one two")
    assert code == 0 and "-m ruff check" in output and "-m mypy dlopt" in output
    assert checkout.calls("-m pytest")[-1].endswith("-k one two")
    code, _, errors = checkout.run(script, PYTEST_EXIT="5")
    assert code == 1 and "pytest(5)" in errors
    before = len(checkout.calls("-m pytest -n"))
    code, _, errors = checkout.run(script, EXIT="3")
    assert code == 1 and "ruff(3) mypy(3) words(3)" in errors
    assert len(checkout.calls("-m pytest -n")) == before + 1  # the other parts run nevertheless


def test_test_command_compiles_a_fresh_clone_once(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts/test")
    checkout.run(script)
    (checkout.root / "tests/__pycache__").mkdir(parents=True)
    checkout.run(script)
    assert len(checkout.calls("--collect-only")) == 1
    assert len(checkout.calls("-m pytest -n")) == 2


def test_constraints_pin_every_requirement_without_addresses() -> None:
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+( ; .+)?", pin) for pin in pins)
    assert not re.search(r"https?://|--hash|@ ", "\n".join(lines))
    names = {re.split("==", pin)[0] for pin in pins}
    assert {"torch", "torchvision", "hydra-core", "optuna", "pytest", "ruff"} <= names
