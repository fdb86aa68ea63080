"""Checkpoints and config files of an older dlopt, which lack keys that have come since; and bombs made of aliases."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dlopt.aliases import check_file, written_out
from dlopt.config.compose import Composer, to_plain
from dlopt.config.older import completed
from dlopt.folders import RunFolder
from dlopt.train import checkpoint
from tests.commands.line import SMALL, dlopt, refused


def saved(*lines: str) -> dict[str, Any]:
    return to_plain(Composer().compose(list(lines)), list(lines))[1]


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    found = yaml.safe_load(yaml.safe_dump(config))
    for key in keys:
        *path, name = key.split(".")
        node = found
        for each in path:
            node = node[each]
        del node[name]
    return found  # type: ignore[no-any-return]


def test_what_is_complete_stays_as_it_is() -> None:
    config = saved("model=mlp", "optimizer=adam")
    assert completed(config) == (config, [])


def test_keys_groups_and_keys_of_groups_are_filled_in() -> None:
    config = saved("model=mlp", "optimizer=adam", "optimizer.lr=0.5")
    old = without(config, "check", "evaluate.figures", "sampler", "optimizer.layer_decay", "data.drop_last")
    found, lines = completed(old)
    assert found == config
    assert {"check=auto", "evaluate.figures=[]", "sampler=...", "optimizer.layer_decay=None"} <= set(lines)


def test_a_key_on_which_the_choices_differ_is_not_guessed() -> None:
    config = without(saved("model=alexnet_224"), "model.hidden", "model.dropout")
    found = completed(config)[0]["model"]
    assert "dropout" in found and "hidden" not in found


def test_an_older_checkpoint_is_evaluated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run").code == 0
    path = tmp_path / "run/checkpoints/last.pt"
    before = dlopt(tmp_path, "eval", f"checkpoint={path}").out
    state = checkpoint.load(path)
    state["config"] = without(state["config"], "on_divergence", "checkpoint.asynchronous")
    checkpoint.write(path, lambda file: torch.save(state, file))
    result = dlopt(tmp_path, "eval", f"checkpoint={path}")
    assert result.code == 0, result.err
    assert "on_divergence=stop" in caplog.text
    assert [line for line in before.splitlines() if "loss" in line] == [
        line for line in result.out.splitlines() if "loss" in line
    ]


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


def test_sizes_with_aliases_written_out() -> None:
    assert written_out("a: [1, 2]") == 5  # the mapping, its key, the list, two numbers
    assert written_out("a: &x [1, 2]\nb: *x\n") == 9
    assert written_out(bomb(4)) > 9**4
    assert written_out("a: &x [*x]") > 100_000
    assert written_out("a: [") == 0


@pytest.mark.parametrize("place", ["train2.yaml", "optimizer/evil.yaml"])
def test_a_bomb_in_a_config_folder_is_refused_at_once(tmp_path: Path, place: str) -> None:
    path = tmp_path / "conf" / place
    path.parent.mkdir(parents=True)
    path.write_text(bomb())
    begin = time.process_time()
    message = refused(tmp_path, "train", "--config-dir", "conf", "optimizer=evil", *SMALL)
    assert place in message and "aliases" in message
    assert time.process_time() - begin < 5


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &x [1, 2]\nb: *x\n")
    check_file(path)
    path.write_text("x" * 10_000_001)
    with pytest.raises(ValueError, match="bytes"):
        check_file(path)
    with pytest.raises(ValueError, match="regular"):
        check_file(tmp_path)


def test_a_bomb_in_a_run_folder_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(bomb())
    assert RunFolder(tmp_path).config() is None
