"""Changing a saved config: typed keys only, one process, and no trust taken from the file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.resolve import resolve_saved, to_plain
from dlopt.config.saved import take_paths, typed_values, unwatched, with_changes
from dlopt.training.checkpoint import checkpoints
from tests.support.line import SMALL, dlopt, refused

PATH = Path("best.pt")


@pytest.fixture
def saved() -> dict[str, Any]:
    return to_plain(Composer().compose([]))[1]


def test_changes_only_the_given_keys(saved: dict[str, Any]) -> None:
    saved = unwatched(saved)
    assert with_changes(saved, {}, PATH) == saved
    changed = with_changes(saved, {"data.batch_size": 7, "device": "cpu"}, PATH)
    assert changed["data"]["batch_size"] == 7 and changed["device"] == "cpu"
    changed["data"]["batch_size"], changed["device"] = saved["data"]["batch_size"], saved["device"]
    assert changed == saved


def test_one_process_that_nothing_watches(saved: dict[str, Any]) -> None:
    """Services of other versions, and packages of other machines, do not keep a model from being tested."""
    several = {"_target_": "dlopt.parallel.modes.ddp.DDP", "processes": 8}
    watched = {"tracking": ["gone"], "observers": [{"_target_": "gone.Watch"}], "diagnostics": ["gradients"]}
    assert with_changes({**saved, **watched, "parallel": several}, {}, PATH) == unwatched(saved)


def test_accepts_paths_with_letters_of_any_language() -> None:
    assert typed_values(["checkpoint=größe/best.pt", "device=cpu"]) == {"checkpoint": "größe/best.pt", "device": "cpu"}


def test_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.nope=1: the checkpoint's config has no such key"):
        with_changes(saved, {"data.nope": 1}, PATH)
    with pytest.raises(UserError, match=r"allow_packages=\[evil\]"):
        with_changes({**saved, "allow_packages": ["evil"]}, {}, PATH)
    trusted = with_changes({**saved, "allow_packages": ["evil"]}, {"allow_packages": ["good"]}, PATH)
    assert trusted["allow_packages"] == ["good"]


@pytest.mark.parametrize("command", [["predict", "images=x.png"], ["export", "format=torch_export"]])
def test_malicious_checkpoint_runs_no_code(command: list[str], tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run").code == 0
    path = tmp_path / "run/checkpoints/last.pt"
    (tmp_path / "x.png").write_bytes(b"")
    marker = tmp_path / "marker"
    for group in ("model", "normalize", "loss"):
        checkpoint = checkpoints.load(path)
        config = {**checkpoint.config, group: {"_target_": "os.system", "command": f"touch {marker}"}}
        state = {**checkpoint.state, "config": config}
        bad = tmp_path / f"{group}.pt"
        checkpoints.write(bad, lambda file, state=state: torch.save(state, file))  # type: ignore[misc]
        assert "os.system" in refused(tmp_path, command[0], f"checkpoint={bad.name}", *command[1:])
        assert not marker.exists()


def test_texts_that_look_like_interpolations_are_saved_as_texts() -> None:
    overrides = ["model=mlp", r"note='lr \${x}, seed ${seed}'", r"tags=['\${y}']", r"name='a\${z}'"]
    plain, saved = to_plain(Composer().compose(overrides))
    assert (plain["note"], plain["tags"], plain["name"]) == ("lr ${x}, seed 0", ["${y}"], "a${z}")
    assert (saved["note"], saved["tags"], saved["name"]) == ("lr ${x}, seed 0", ["${y}"], r"a\${z}")
    assert resolve_saved(saved) == plain


def test_a_path_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    typed = ["outputs/a", "tta=flip", "lr=0.1", "device=cpu"]
    assert take_paths(typed) == (["outputs/a", "lr=0.1"], ["tta=flip", "device=cpu"])
    for words, message in (
        (["eval", "a", "checkpoint=b"], "a: checkpoint=b is set, too; name the run once"),
        (["predict", "a", "b", "images=c"], "a b: `dlopt predict` takes one run or checkpoint"),
        (["export", "a", "format=onnx"], "checkpoint=a: no such file"),
        (["eval", "a", "--cfg=job"], "--cfg: only available in `dlopt train`"),
        (["eval", "a", "--tta", "flip"], "--tta flip: an override is key=value, without dashes; use tta=flip"),
    ):
        assert message in refused(tmp_path, *words)
