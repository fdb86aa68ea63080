"""Folders of YAML files as a source of Hydra."""

import textwrap
from pathlib import Path

import pytest
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from dlopt.config.choices import config_folder
from dlopt.config.yaml_folder import YamlFolder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def test_values_and_errors_are_those_of_omegaconf(tmp_path: Path) -> None:
    texts = [path.read_text() for path in (config_folder() / "train.yaml", *config_folder().glob("optimizer/*.yaml"))]
    texts += [
        "a: 1e-3\nb: 1_000\nc: 0x1F\nd: 010\ne: 2026-01-01\nf: on\ng: ~\nh: .inf\ni: 1:30\nj: '1'\n",
        "k: &x [1, {y: 2}]\nl: *x\n",
        "a: ${b}\nb: ???\nc: größe\n? d\n: |\n  long\n  text\ne: >-\n  folded\n  text\n",
        "", "# only a comment\n", "- 1\n- [a]\n", "a text\n",
    ]  # fmt: skip
    source = YamlFolder("main", f"dlopt://{tmp_path}")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        found = source.load_config(str(number)).config
        expected = OmegaConf.load(tmp_path / f"{number}.yaml")
        assert repr(found) == repr(expected) and type(found) is type(expected)
    bad = {"a: 1\na: 2\n": "duplicate key a", "a: [1\n": "line", "a: !!python/name:os.system\n": "tag"}
    for text, part in bad.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(Exception, match=part):
            source.load_config("bad")
    (tmp_path / "bad.yaml").write_text("5\n")
    with pytest.raises(OSError, match="int"):
        source.load_config("bad")


def test_lists_groups_and_choices(tmp_path: Path) -> None:
    for path in ("group/b.yaml", "group/a.yaml", "group/inner/c.yaml", "group/__pycache__/x.pyc", "group/README"):
        write(tmp_path / path, "")
    source = YamlFolder("main", f"dlopt://{tmp_path}")
    assert source.list("group", ObjectType.CONFIG) == ["a", "b"]
    assert source.list("group", ObjectType.GROUP) == ["inner"]
    assert source.list("group", None) == ["a", "b", "inner"]
    assert source.is_group("group") and source.is_config("group/a") and not source.is_config("group/inner")
