"""The wheel contains the package and its configuration, and works outside the checkout."""

import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import dlopt
from tests.support.requires import requires

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, and the wheel built from it rather than from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_containers_copy_the_wheel(dist: Path, wheel: Path) -> None:
    [pattern] = re.findall(r"^COPY (\S+) ", (ROOT / "dlopt/templates/Dockerfile").read_text(), re.MULTILINE)
    assert [*dist.glob(pattern)] == [wheel]


def files(folder: str, prefix: str = "") -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout to compare with")
    return {prefix + name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()}


@requires("git")
def test_wheel_contains_only_the_package_and_conf(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    contents = {name for name in names if ".dist-info/" not in name}
    assert contents == files("dlopt") | files("conf", "dlopt/")
    assert {"dlopt/conf/train.yaml", "dlopt/py.typed", "dlopt/templates/train.sbatch"} <= contents
    licenses = {name.partition(".dist-info/licenses/")[2] for name in names - contents}
    assert "LICENSE" in licenses


@requires("git")
def test_sdist_contains_only_tracked_files(dist: Path) -> None:
    """The tests in the archive need its pages, images and scripts."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names - {"PKG-INFO"} == files(".")
    assert not {name.split("/")[0] for name in names} & {"data", ".venv", "dist", "build"}


@pytest.mark.slow
@requires("git")
def test_builds_are_reproducible(tmp_path: Path) -> None:
    """Builds copies with different times, umasks and clocks."""
    digests = []
    for name, mask in (("one", "022"), ("two", "077")):
        copy = tmp_path / name / "dlopt"
        for file in sorted(files(".")):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
            if name == "two":
                os.utime(copy / file, (10**9, 10**9))
        command = f"umask {mask}; exec {sys.executable} -m build --no-isolation --outdir {tmp_path / name} ."
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "TZ": "UTC-5" if name == "two" else "UTC"}
        done = subprocess.run(["sh", "-c", command], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        built = [path for path in (tmp_path / name).iterdir() if path.is_file()]
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built})
    assert len(digests[0]) == 2 and digests[0] == digests[1]


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "dlopt" and metadata["Version"] == dlopt.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist") or []
    assert "torch>=2.11" in required and "torchvision>=0.26" in required
    (hydra,) = (line for line in required if line.startswith("hydra-core"))
    assert ">=1.3.8" in hydra and "<1.5" in hydra
    assert {"sweep", "test"} <= set(metadata.get_all("Provides-Extra") or [])
    entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "dlopt = dlopt.cli:main" in entry_points


@pytest.mark.slow
def test_installed_wheel_trains_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin/python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # The packages of this environment, without its own (editable) dlopt: a folder named in a .pth file is put on the
    # path, but the .pth files in it are not read.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    command = str(venv / "bin/dlopt")
    assert run(python, "-c", "import dlopt; print(dlopt.__file__)").startswith(str(venv))
    assert dlopt.__version__ in run(command, "--version")
    assert dlopt.__version__ in run(python, "-m", "dlopt", "--version")
    assert run(command, "template", "slurm").startswith("#!")
    assert list(work.iterdir()) == []
    run(command, "train", "epochs=1")
    (path,) = work.glob("outputs/*/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["status"] == "finished" and summary["epochs"] == 1
    assert len((path.parent / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["uvx", "pipx"])
def test_uvx_and_pipx(wheel: Path, tmp_path: Path, tool: str) -> None:
    """`uvx --from . dlopt` and `pipx install .`, with all dependencies, from uv's cache: no test uses the network."""
    environment = {**os.environ, "PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(tmp_path / "bin")}
    environment["UV_OFFLINE"] = "1"
    if tool == "uvx":
        commands = [[sys.executable, "-m", "uv", "tool", "run", "-q", "--from", str(wheel), "dlopt", "options", "clip"]]
    else:
        install = [sys.executable, "-m", "pipx", "install", "--backend", "uv", "--python", sys.executable, str(wheel)]
        commands = [install, [str(tmp_path / "bin/dlopt"), "options", "clip"]]
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        if "network was disabled" in done.stdout + done.stderr:
            pytest.skip("needs the dependencies in uv's cache")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "max_norm" in done.stdout
