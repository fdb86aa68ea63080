"""YAML alias bombs."""

import time
from pathlib import Path

import pytest

from dlopt.folders import RunFolder
from dlopt.plain import check_yaml, expanded_size
from tests.commands.line import SMALL, refused


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


def test_expanded_size() -> None:
    assert expanded_size("a: [1, 2]") == 5  # the mapping, its key, the list, two numbers
    assert expanded_size("a: &x [1, 2]\nb: *x\n") == 9
    assert expanded_size(bomb(4)) > 9**4
    assert expanded_size("a: &x [*x]") > 100_000
    assert expanded_size("a: [") == 0


@pytest.mark.parametrize("name", ["train2.yaml", "optimizer/evil.yaml"])
def test_refuses_bomb_in_config_dir(tmp_path: Path, name: str) -> None:
    path = tmp_path / "conf" / name
    path.parent.mkdir(parents=True)
    path.write_text(bomb())
    begin = time.process_time()
    message = refused(tmp_path, "train", "--config-dir", "conf", "optimizer=evil", *SMALL)
    assert name in message and "aliases" in message
    assert time.process_time() - begin < 5


def test_accepts_few_aliases(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &x [1, 2]\nb: *x\n")
    check_yaml(path)
    path.write_text("x" * 10_000_001)
    with pytest.raises(ValueError, match="bytes"):
        check_yaml(path)
    with pytest.raises(ValueError, match="regular"):
        check_yaml(tmp_path)


def test_bomb_in_a_run_folder_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(bomb())
    assert RunFolder(tmp_path).config() is None
