"""scripts/setup, scripts/dlopt and scripts/test: their syntax, and their calls of stand-ins for uv and Python.

The PATH of the stand-ins holds the tools named here, nothing else of the machine; they log calls and install nothing.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dlopt
from tests.support.requires import find

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*(ROOT / "scripts").rglob("*"), ROOT / ".ci/run", ROOT / "dlopt/templates/train.sbatch"]
SHELL = [path for path in SCRIPTS if path.is_file() and re.match(rb"#!.*\b(ba|da)?sh\n", path.read_bytes()[:40])]
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
        [ -z "$NO_NETWORK$NO_UV_NETWORK" ] || { echo "error: dns" >&2; exit 1; }
        case "$*" in *--torch-backend*) [ -z "$NO_TORCH_INDEX" ] || exit 1 ;; esac
        touch .venv/half; sleep "${SLEEP:-0}"; rm -f .venv/half
        cp "$STANDINS/command" .venv/bin/dlopt ;;
esac
"""
COMMAND = r"""#!/bin/sh
echo dlopt "$@"
ls -l /proc/$$/fd >"$LOG.$$" # not a pipe: this shell would close its ends while ls reads the folder
grep -c '[p]yproject.toml' "$LOG.$$" || :
exit ${EXIT:-0}
"""
# What the stand-in for dlopt prints: its arguments, and how many descriptors of the lock it inherited.
DONE = (0, "dlopt train a b\n0\n")


class Checkout:
    """A checkout in a path with a space, and the log of what the stand-ins were called with."""

    def __init__(self, folder: Path, *, uv: bool = True) -> None:
        self.root = folder / "check out"
        self.bin, self.standins, self.log = folder / "bin", folder / "standins", folder / "log"
        for path in (self.root / "scripts", self.bin, self.standins):
            path.mkdir(parents=True)
        for name in ("scripts/setup", "scripts/dlopt", "scripts/test", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            self.bin.joinpath(tool).symlink_to(str(shutil.which(tool)))
        for name, text in (("python3", PYTHON), ("uv", UV), ("command", COMMAND)):
            (self.standins / name).write_text(text)
            (self.standins / name).chmod(0o755)
        for name in ("python3", "uv") if uv else ("python3",):
            shutil.copy(self.standins / name, self.bin / name)
        self.log.touch()

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def start(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        arguments = command or (str(self.root / "scripts/dlopt"), "train", "a b")
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "STANDINS": str(self.standins)} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            arguments, cwd=cwd or self.root, env=environment, text=True, start_new_session=True, **pipes
        )

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
        process = self.start(*command, cwd=cwd, **variables)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def calls(self, pattern: str = "") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]

    def installs(self) -> list[str]:
        return self.calls(r"^uv pip install -p .venv -c")

    def install_torch(self, version: str) -> None:
        packages = self.venv / "lib/python3.13/site-packages"
        for folder in packages.glob("torch-*"):
            folder.rmdir()
        (packages / f"torch-{version}.dist-info").mkdir(parents=True)

    def edit_pyproject(self) -> None:
        path = self.root / "pyproject.toml"
        path.write_text(path.read_text() + "# changed\n")
        later = (self.venv / ".dlopt").stat().st_mtime + 5  # coarse clocks of file systems must not hide the change
        os.utime(path, (later, later))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    checkers = [["bash" if b"bash" in script.read_bytes()[:40] else "sh", "-n"]]
    checkers += [["shellcheck", "--severity=warning"]] if find("shellcheck") else []
    for command in checkers:
        done = subprocess.run([*command, str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_real_command_through_a_symlink_from_another_folder(tmp_path: Path) -> None:
    """In a checkout that is set up, scripts/dlopt is the dlopt of this environment, with its exit code."""
    root = tmp_path / "check out"
    (root / "scripts").mkdir(parents=True)
    (root / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/dlopt", root / "scripts")
    (root / "pyproject.toml").touch()
    (root / ".venv/bin/python").symlink_to(sys.executable)
    (root / ".venv/bin/dlopt").write_text(f'#!/bin/sh\nexec {sys.executable} -m dlopt "$@"\n')
    (root / ".venv/bin/dlopt").chmod(0o755)
    (root / ".venv/.dlopt").write_text(f"{root} sweep\n")
    os.utime(root / "pyproject.toml", (1, 1))
    (tmp_path / "link").symlink_to(root / "scripts/dlopt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, code, output in ((["--version"], 0, f"dlopt {dlopt.__version__}\n"), (["trian"], 2, "")):
        done = subprocess.run([tmp_path / "link", *arguments], cwd="/", env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, output), done.stderr


def test_first_call_installs_and_later_calls_start_neither_uv_nor_python(checkout: Checkout) -> None:
    code, output, errors = checkout.run()
    assert (code, output) == DONE and "setting up" in errors  # only the command writes to stdout
    (install,) = checkout.installs()
    assert "-c scripts/constraints.txt -e .[sweep,schedulefree,timm,pandas]" in install
    before = checkout.calls()
    assert checkout.run() == (*DONE, "")
    assert checkout.run("sh", "scripts/dlopt", "train", "a b", EXIT="75")[0] == 75
    assert checkout.calls() == before


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


def test_reports_a_failed_installation_and_retries_with_pip(checkout: Checkout) -> None:
    code, output, errors = checkout.run(NO_NETWORK="1")
    assert code != 0 and output == "" and "error: dns" in errors and "trying pip" in errors
    code, output, errors = checkout.run(NO_UV_NETWORK="1")
    assert (code, output) == DONE and "trying pip" in errors
    assert checkout.calls("python -m pip install .* -c scripts/constraints.txt")


def test_concurrent_first_calls_install_once(checkout: Checkout) -> None:
    processes = [checkout.start(SLEEP="0.5") for _ in range(3)]
    results = [(process.communicate(timeout=300)[0], process.returncode) for process in processes]
    assert [(code, output) for output, code in results] == [DONE] * 3
    assert len(checkout.installs()) == 1


def interrupt(checkout: Checkout) -> None:
    process, half = checkout.start(SLEEP="600"), checkout.venv / "half"
    while not half.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert half.exists()


def move(checkout: Checkout) -> None:
    checkout.run()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))


def lose_python(checkout: Checkout) -> None:
    checkout.run()
    (checkout.venv / "bin/python").unlink()


@pytest.mark.parametrize("breaks", [interrupt, move, lose_python], ids=lambda function: function.__name__)
def test_installs_from_scratch_where_the_environment_cannot_be_used(
    breaks: Callable[[Checkout], None], checkout: Checkout
) -> None:
    breaks(checkout)
    assert checkout.run()[:2] == DONE
    assert not (checkout.venv / "half").exists() and len(checkout.calls("^uv venv")) == 2


def test_environment_of_the_user_is_never_deleted(checkout: Checkout) -> None:
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python3", checkout.venv / "bin/python")
    marker = checkout.venv / "marker"
    marker.touch()
    assert checkout.run(NO_NETWORK="1")[0] != 0 and marker.exists()
    assert checkout.run()[:2] == DONE and marker.exists()
    assert not checkout.calls("^uv venv")


def test_installs_uv_with_pip(tmp_path: Path) -> None:
    """Where Debian's ensurepip is missing, with the pip of the interpreter; without that, says what to install."""
    plain, bare = Checkout(tmp_path / "plain", uv=False), Checkout(tmp_path / "bare", uv=False)
    assert plain.run()[:2] == DONE
    assert plain.calls("python -m venv .venv") and plain.calls("pip install .* uv$") and len(plain.installs()) == 1
    code, output, errors = bare.run(NO_ENSUREPIP="1", NO_PIP="1")
    assert code == 1 and output == "" and "apt install python3-venv" in errors
    assert bare.run(NO_ENSUREPIP="1")[:2] == DONE
    assert bare.calls("--without-pip") and bare.calls("pip --python")


def test_dlopt_python_chooses_the_interpreter(checkout: Checkout) -> None:
    assert checkout.run(DLOPT_PYTHON="3.12")[:2] == DONE
    assert checkout.calls(r"^uv venv .*-p 3\.12")
    checkout.root.joinpath(".venv/bin/python").unlink()
    assert checkout.run()[:2] == DONE
    assert checkout.calls("^uv venv .*-p >=3.11")


EXTRAS = "[sweep,schedulefree,timm,pandas]"


@pytest.mark.parametrize(
    ("installed", "has_driver", "variables", "end"),
    [
        (None, False, {}, "--torch-backend auto"),  # the builds for a CPU
        (None, False, {"NO_TORCH_INDEX": "1"}, EXTRAS),
        (None, False, {"DLOPT_TORCH": "cu130"}, "--torch-backend cu130"),
        (None, True, {}, EXTRAS),
        ("1.9+cpu", False, {}, "--torch-backend cpu"),  # too old: replaced by the same build
        ("1.9", False, {}, EXTRAS),
        ("1.9+cu130", False, {"NO_TORCH_INDEX": "1"}, EXTRAS),
        ("2.0", False, {"NO_TORCH_INDEX": "1"}, EXTRAS),
        ("2.0+cpu", False, {"NO_TORCH_INDEX": "1"}, EXTRAS),
        ("2.0+cu130", False, {"NO_TORCH_INDEX": "1"}, EXTRAS),
        ("2.0+cpu", False, {"DLOPT_TORCH": "cu130"}, "--torch-backend cu130"),
    ],
)
def test_build_of_pytorch(
    installed: str | None, has_driver: bool, variables: dict[str, str], end: str, checkout: Checkout
) -> None:
    if installed is not None:
        checkout.run()
        checkout.install_torch(installed)
        checkout.edit_pyproject()
    if has_driver:
        shutil.copy(checkout.standins / "command", checkout.bin / "nvidia-smi")
    probes = len(checkout.calls("dry-run"))
    code, output, errors = checkout.run(**variables)
    assert (code, output) == DONE and checkout.installs()[-1].endswith(end)
    keeps, probed = (installed or "").startswith("2.0"), checkout.calls("dry-run")[probes:]
    assert ("out of reach" in errors) == ("NO_TORCH_INDEX" in variables and not keeps)
    if has_driver or (keeps and "DLOPT_TORCH" not in variables):
        assert all("--offline" in call for call in probed), "it stays without asking PyTorch's index for it"


def test_test_command_adds_the_test_tools_and_keeps_them(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts/test")
    checkout.run()
    assert checkout.run(script)[0] == 0
    assert [",test]" in call for call in checkout.installs()] == [False, True]
    (checkout.root / "tests/__pycache__").mkdir(parents=True)
    checkout.run(script)
    checkout.run()
    assert len(checkout.installs()) == 2
    assert len(checkout.calls("--collect-only")) == 1, "compiles a fresh clone once"
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


def test_constraints_pin_every_requirement_without_addresses() -> None:
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+( ; .+)?", pin) for pin in pins)
    assert not re.search(r"https?://|--hash|@ ", "\n".join(lines))
    assert {"torch", "torchvision", "hydra-core", "optuna", "pytest", "ruff"} <= {pin.split("==")[0] for pin in pins}
