"""Checkpoints of strangers run no code, whichever command or function reads them."""

import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

import dlopt
from dlopt.basics.errors import UserError
from tests.support.checkpoints import poison
from tests.support.line import dlopt as run
from tests.support.sizes import TINY


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose checkpoints create the file `started` when a pickle in them is loaded."""
    folder = tmp_path_factory.mktemp("attacked")
    assert run(folder, "train", *TINY, "hydra.run.dir=run").code == 0
    for path in (folder / "run/checkpoints").glob("*.pt"):
        poison(path, folder / "started")
    Image.new("L", (8, 8)).save(folder / "image.png")
    return folder


UNREADABLE = "(the shards cannot be read: |all checkpoints in .* are damaged)"
LAST, TRAIN = "run/checkpoints/last.pt", ("train", *TINY)
COMMANDS = {
    "eval": ("eval", "checkpoint=run"),
    "predict": ("predict", f"checkpoint={LAST}", "images=image.png"),
    "export": ("export", f"checkpoint={LAST}", "format=safetensors"),
    "consolidate": ("consolidate", f"checkpoint={LAST}"),
    "init_from": (*TRAIN, f"init_from={LAST}"),
    "resume": (*TRAIN, "epochs=3", f"resume={LAST}"),
    "resume=auto": (*TRAIN, "epochs=3", "hydra.run.dir=run", "resume=auto"),
    "teacher": (*TRAIN, "loss=distillation", "loss.teacher=run"),
    "diagnose": ("diagnose", f"checkpoint={LAST}"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_run_no_code_of_a_checkpoint(attacked: Path, command: tuple[str, ...]) -> None:
    result = run(attacked, *command)
    assert not (attacked / "started").exists()
    assert result.code == (1 if "resume=auto" in command else 2)
    assert re.fullmatch(f"dlopt: .*{UNREADABLE}.*\n", result.err), result


def test_functions_run_no_code_of_a_checkpoint(attacked: Path) -> None:
    with pytest.raises(UserError, match=UNREADABLE):
        dlopt.load(str(attacked / LAST))
    assert not (attacked / "started").exists()


def test_the_payload_works(attacked: Path) -> None:
    pickle.loads((attacked / "run/checkpoints/shards/last/.metadata").read_bytes())
    assert (attacked / "started").exists()
    (attacked / "started").unlink()
