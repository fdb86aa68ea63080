"""`dlopt template`: what it prints is valid and starts a run."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.commands.command_table import every_command
from dlopt.commands.template import TEMPLATES
from dlopt.machine.world import World, current
from tests.support.line import SMALL, dlopt, refused


def printed(folder: Path, name: str) -> str:
    result = dlopt(folder, "template", name)
    assert (result.code, result.err) == (0, ""), result.err
    return result.out


def options(script: str) -> list[str]:
    """Returns the enabled options of sbatch."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all(printed(folder, "kubernetes"))
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prints_how_to_use_the_file(name: str, tmp_path: Path) -> None:
    assert "dlopt template" in printed(tmp_path, name)


@pytest.mark.parametrize("arguments", [[], ["slurm", "docker"], ["slrum"]])
def test_refuses_other_arguments(arguments: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, "template", *arguments)
    assert "slurm" in message
    assert ("did you mean slurm?" in message) == (arguments == ["slrum"])


def test_job_script(tmp_path: Path) -> None:
    script = printed(tmp_path, "slurm")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    enabled = options(script)
    assert "--requeue" in enabled and "--signal=USR1@120" in enabled
    assert any(option.startswith("--cpus-per-task=") for option in enabled)
    for blank in ("time", "account", "partition"):
        assert f"\n##SBATCH --{blank}=" in script
    assert len([option for option in enabled if option.startswith("--output=")]) == 1


def test_manifest_resumes_stopped_pods(tmp_path: Path) -> None:
    spec = manifest(tmp_path)["Job"]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # required by podFailurePolicy
    [container] = spec["template"]["spec"]["containers"]
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", ()):
            actions[code] = rule["action"]
            assert rule["onExitCodes"]["containerName"] == container["name"]
    assert actions == {75: "Ignore", 2: "FailJob"}
    assert "resume=auto" in container["args"]


def test_manifest_mounts_outputs_and_shared_memory(tmp_path: Path) -> None:
    documents = manifest(tmp_path)
    pod = documents["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts["/outputs"]]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert any(line.startswith("hydra.run.dir=/outputs/") for line in container["args"])


def test_manifest_describes_the_ranks(tmp_path: Path) -> None:
    documents = manifest(tmp_path)
    job, service = documents["Job"], documents["Service"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {entry["name"]: entry.get("value", "1") for entry in container["env"]}  # RANK is the pod's index
    assert current(environment | {"RANK": "0"}) is None, "one pod starts its own ranks"
    assert current(environment | {"WORLD_SIZE": "2"}) == World("torchrun", 1, 2, 0, 1)
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and environment["MASTER_PORT"].isdigit()
    [*train, folder] = container["args"]
    assert folder.startswith("hydra.run.dir=")
    result = dlopt(tmp_path, *train, *SMALL, "device=cpu", "epochs=1", "hydra.run.dir=run")
    assert result.code == 0, result.err


@pytest.mark.parametrize("typed", ["--nodes 2", "nodes=2"])
def test_options_of_sbatch_belong_to_sbatch(typed: str, tmp_path: Path) -> None:
    message = refused(tmp_path, "template", "slurm", *typed.split())
    assert f"sbatch --{typed.removeprefix('--')} train.sbatch" in message


def test_the_guide_for_programs_names_commands_and_keys_that_exist(tmp_path: Path) -> None:
    text = printed(tmp_path, "agents")
    assert 40 <= len(text.splitlines()) <= 60
    for command in re.findall(r"`dlopt ([a-z-]+)", text):
        assert command in every_command()
    helps = {name: dlopt(tmp_path, name, "--help").out for name in ("judge", "runs", "sweep", "report", "options")}
    for key in ("because", "equal", "minutes", "seeds", "margin", "ablate", "ledger"):
        assert key in text and key in helps["judge"]
