"""Hostile configs: what names code outside the allow-list is refused before it runs. The payload leaves a marker."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from dlopt.basics.errors import UserError
from dlopt.config import compose
from dlopt.config.compose import Composer
from dlopt.config.resolve import to_plain
from dlopt.config.schema import ALLOWED_PACKAGES, resolve_target
from dlopt.training.checkpoint import checkpoints
from tests.support.line import SMALL, dlopt, only, refused


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    folder = tmp_path / "fired"
    folder.mkdir()
    return folder / "marker"


@pytest.fixture
def pickled(tmp_path: Path, marker: Path) -> Path:
    path = tmp_path / "payload.pt"
    path.write_bytes(pickle.dumps(Payload(marker)))
    return path


def test_the_payload_fires(pickled: Path, marker: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of what it has just run
        torch.load(pickled, weights_only=False)["x"]
    assert marker.exists()


COMMAND = "_target_:os.system,command:'touch MARKER'"
LOAD = "_target_:torch.load,f:'PICKLED',weights_only:false"
TYPED = [
    "optimizer._target_=os.system",
    "optimizer._target_=torch.load",
    "optimizer._target_=builtins.exec",
    "optimizer._target_=torch.hub.load",
    "optimizer._target_=torchvision.datasets.utils.os.system",
    "optimizer._target_=torchvision.datasets.utils.download_and_extract_archive",
    "optimizer._target_=torchvision.io.write_file",
    "optimizer._target_=dlopt.run.environment.subprocess.Popen",
    "optimizer._target_=dlopt.cli.main",
    "optimizer._target_=dlopt.basics.folders.make",
    "optimizer._target_=torch.optim.sgd.SGD.__init__",
    "optimizer._target_=torch.optim.SGD.__init__.__globals__",
    "optimizer._target_=torch.optim",
    "optimizer._target_=torch.optim..SGD",
    "optimizer._target_=",
    "optimizer._target_=5",
    "_target_=os.system",
    "+_target_={COMMAND}",
    "model={COMMAND}",
    "+data.extra={COMMAND}",
    "+augmentation.extra=[{COMMAND}]",
    "augmentation.operations=[{COMMAND}]",
    "optimizer.lr={COMMAND}",
    "hydra.callbacks.x={COMMAND}",
    "hydra.callbacks.x._target_=torch.load",
    "+hydra.callbacks.x._target_=torch.load",
    "+hydra.callbacks={x:{LOAD}}",
    "+hydra.callbacks.x={LOAD}",
    "++hydra.callbacks.x={LOAD}",
    "+hydra={callbacks:{x:{LOAD}}}",
    "+hydra.callbacks.x='${oc.create:{_target_:torch.load}}'",
    "++hydra.sweeper={COMMAND}",
    "++hydra.launcher={COMMAND}",
    "hydra.sweeper._target_=os.system",
    "hydra.sweeper={COMMAND}",
    "hydra.launcher={COMMAND}",
    "hydra/launcher={COMMAND}",
    "hydra.sweeper=${model}",
    "+hydra.job_logging.handlers={x:{'()':os.system,command:'touch MARKER'}}",
    "+hydra.job_logging.handlers={x:{class:logging.os.system,command:'touch MARKER'}}",
    "+hydra.hydra_logging.handlers.x={class:logging.StreamHandler,stream:'ext://os.system'}",
    "hydra.hydra_logging.handlers.console.stream=${name}",
]


@pytest.mark.parametrize("mode", ["run", "sweep"])
@pytest.mark.parametrize("override", TYPED)
def test_typed(override: str, mode: str, tmp_path: Path, pickled: Path, marker: Path) -> None:
    line = override.replace("COMMAND", COMMAND).replace("LOAD", LOAD)
    line = line.replace("MARKER", str(marker)).replace("PICKLED", str(pickled))
    flags = ["-m", "seed=0,1"] if mode == "sweep" else []
    refused(tmp_path, "train", *SMALL, *flags, line)
    assert not marker.exists()


def test_malicious_launcher_does_not_run_even_unchecked(
    tmp_path: Path, pickled: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "check_hydra", lambda *_: None)
    inner = f"++hydra.launcher.extra={{{LOAD}}}".replace("PICKLED", str(pickled))
    with contextlib.suppress(Exception):
        dlopt(tmp_path, "train", *SMALL, "-m", "seed=0,1", inner)
    assert not marker.exists()


def test_callbacks_do_not_run_even_unchecked(
    tmp_path: Path, pickled: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "check_hydra", lambda *_: None)
    monkeypatch.setattr("dlopt.config.reads.refuse_unread_hydra", lambda *_: None)
    typed = [*SMALL, "epochs=1", f"+hydra.callbacks.x={{{LOAD}}}".replace("PICKLED", str(pickled))]
    assert dlopt(tmp_path, "train", *typed).code == 0
    assert dlopt(tmp_path, "train", *typed, "-m", "seed=0,1").code == 0
    assert not marker.exists()


def test_rerun_from_a_pickle(tmp_path: Path, pickled: Path, marker: Path) -> None:
    assert "--experimental-rerun" in refused(tmp_path, "train", "--experimental-rerun", str(pickled))
    assert not marker.exists()


FILES: dict[str, tuple[str, Any]] = {
    "a component": ("optimizer=evil", {"_target_": "os.system", "command": "touch MARKER"}),
    "an argument": ("optimizer=evil", {"_target_": "torch.optim.SGD", "lr": {"_target_": "os.system", "command": "x"}}),
    "trust given by the file": ("experiment=evil", {"allow_packages": ["os"], "optimizer": {"_target_": "os.system",
        "command": "touch MARKER"}}),
    "a callback": ("experiment=evil", {"hydra": {"callbacks": {"x": {"_target_": "torch.load", "f": "PICKLED",
        "weights_only": False}}}}),
    "the logging's factory": ("experiment=evil", {"hydra": {"job_logging": {"handlers": {"x": {"()": "os.system",
        "command": "touch MARKER"}}}}}),
    "the sweeper": ("experiment=evil", {"hydra": {"sweeper": {"_target_": "os.system", "command": "touch MARKER"}}}),
    "the environment of jobs": ("experiment=evil", {"hydra": {"job": {"env_set": {"PYTHONPATH": "MARKER"}}}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_file(kind: str, tmp_path: Path, pickled: Path, marker: Path) -> None:
    choice, content = FILES[kind]
    group, name = choice.split("=")
    path = tmp_path / "conf" / group / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    text = yaml.safe_dump(content).replace("MARKER", str(marker)).replace("PICKLED", str(pickled))
    path.write_text(("# @package _global_\n" if group == "experiment" else "") + text)
    for flags in ([], ["-m", "seed=0,1"]):
        refused(tmp_path, "train", "--config-dir", str(tmp_path / "conf"), choice, *SMALL, *flags)
    assert not marker.exists()


def test_python_tag_in_yaml(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "conf/optimizer/evil.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"_target_: torch.optim.SGD\nlr: !!python/object/apply:os.system ['touch {marker}']\n")
    refused(tmp_path, "train", "--config-dir", "conf", "optimizer=evil", *SMALL)
    assert not marker.exists()


# -- what a checkpoint's config names


def saved_run(tmp_path: Path) -> Path:
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run").code == 0
    return tmp_path / "run/checkpoints/last.pt"


def rewrite(path: Path, **changes: Any) -> None:
    """Changes a checkpoint's config and updates its checksum, as an attacker could."""
    checkpoint = checkpoints.load(path)
    config = OmegaConf.create(checkpoint.config)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, merge=False, force_add=True)
    state = {**checkpoint.state, "config": OmegaConf.to_container(config)}
    checkpoints.write(path, lambda file: torch.save(state, file))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"_target_": "os.system", "command": "touch MARKER"}},
        {"model": {"_target_": "torch.load", "f": "PICKLED", "weights_only": False}},
        {"allow_packages": ["os"], "model": {"_target_": "os.system", "command": "touch MARKER"}},
        {"data": {"_target_": "torchvision.datasets.utils.extract_archive", "from_path": "a", "to_path": "b"}},
    ],
)
def test_checkpoint(changes: dict[str, Any], tmp_path: Path, pickled: Path, marker: Path) -> None:
    path = saved_run(tmp_path)
    text = yaml.safe_dump(changes).replace("MARKER", str(marker)).replace("PICKLED", str(pickled))
    rewrite(path, **yaml.safe_load(text))
    refused(tmp_path, "eval", f"checkpoint={path}")
    refused(tmp_path, "train", *SMALL, f"resume={path}")
    assert not marker.exists()


def test_checkpoint_that_is_a_pickle(tmp_path: Path, pickled: Path, marker: Path) -> None:
    checkpoints.write(tmp_path / "evil.pt", lambda file: file.write(pickled.read_bytes()))
    refused(tmp_path, "eval", "checkpoint=evil.pt")
    for key in ("resume", "init_from"):
        refused(tmp_path, "train", *SMALL, f"{key}=evil.pt")
    assert not marker.exists()


# -- what is allowed


@pytest.mark.parametrize(
    "path",
    ["torch.optim.SGD", "torch.optim.sgd.SGD", "torch.nn.CrossEntropyLoss", "torchvision.datasets.CIFAR10",
     "torchvision.models.resnet18", "dlopt.models.mlp.MLP", "dlopt.optim.SGDW"],
)  # fmt: skip
def test_callables_of_the_allowed_packages(path: str) -> None:
    assert callable(resolve_target("key", path, ALLOWED_PACKAGES))


def test_a_module_that_fails_to_import_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpackage.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing brokenpackage failed: No module named 'a_module_that_is_not_there'"):
        resolve_target("optimizer._target_", "brokenpackage.Sgd", ["brokenpackage"])
    with pytest.raises(UserError, match="not installed"):
        resolve_target("optimizer._target_", "nosuchpackage.Sgd", ["nosuchpackage"])


# -- secrets


def test_secrets_of_the_environment_stay_out_of_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_NAME", "hunter2hunter2")
    root = tmp_path / "hunter2hunter2" / "train"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            image(root / label / f"{i}.png", shade=40 * i + (100 if label == "b" else 0))
    line = ["data=image_folder", "data.root=${oc.env:SECRET_NAME}", "data.channels=1"]
    small = [each for each in SMALL if not each.startswith("data")]
    result = dlopt(tmp_path, "train", *small, *line, "data.val_split=0.25", "model.norm=none", "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["root"] == "${oc.env:SECRET_NAME}"
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    evaluated = dlopt(tmp_path, "eval", f"checkpoint={only(tmp_path, 'run/checkpoints/last.pt')}")
    assert evaluated.code == 0, evaluated.err  # the folder was found through the environment


def image(path: Path, shade: int) -> None:
    from PIL import Image

    Image.new("L", (8, 8), shade).save(path)


def test_keeps_other_environment_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_NAME", "hunter2hunter2")
    config = Composer().compose(["name=run-${oc.env:SECRET_NAME}", "resume=${name}/last.pt"])
    plain, saved = to_plain(config)
    assert plain["name"] == "run-hunter2hunter2" and plain["resume"] == "run-hunter2hunter2/last.pt"
    assert saved["name"] == "run-${oc.env:SECRET_NAME}" and saved["resume"] == "${name}/last.pt"


def test_numbers_of_the_environment_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of a job array with different seeds have different configs."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    line = ["seed='${oc.decode:${oc.env:SLURM_ARRAY_TASK_ID}}'", "epochs=13"]
    plain, saved = to_plain(Composer().compose(line))
    assert saved["seed"] == saved["init_seed"] == plain["seed"] == 3 and saved["epochs"] == 13
