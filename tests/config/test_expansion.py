"""Configs that expand or include themselves without end are refused with one line."""

from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.resolve import resolve_saved
from dlopt.config.trust import check_expansion
from tests.support.line import refused


def test_refuses_an_exponential_chain(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    lines = [f"a{i}: " + f"${{a{i - 1}}}" * 4 for i in range(1, 25)]
    (tmp_path / "conf/big.yaml").write_text("\n".join(["defaults: [train, _self_]", "a0: x", *lines]))
    message = refused(tmp_path, "train", "--config-dir", "conf", "--config-name", "big")
    assert "=${a" in message and "expand to more than 10000 values" in message


def test_counts_relative_references_and_blocks() -> None:
    chain = {f"k{i}": f"${{.k{i - 1}}}${{.k{i - 1}}}" for i in range(1, 20)}
    with pytest.raises(UserError, match=r"^block\.k\d+="):
        check_expansion({"block": {"k0": "1", **chain}})
    blocks = {f"b{i}": {"x": f"${{b{i - 1}}}", "y": f"${{b{i - 1}}}"} for i in range(1, 20)}
    with pytest.raises(UserError, match=r"^b\d+\.x="):
        check_expansion({"b0": {"x": 1}, **blocks})
    check_expansion({"seed": 0, "a": "${seed}", "b": "${a}${a}", "cycle": "${cycle}", "env": "${oc.env:HOME}"})


@pytest.mark.parametrize("choice", ["itself", "loop"])
def test_refuses_a_choice_that_includes_itself(tmp_path: Path, choice: str) -> None:
    folder = tmp_path / "conf/optimizer"
    folder.mkdir(parents=True)
    (folder / "itself.yaml").write_text("defaults: [itself]\n")
    (folder / "loop.yaml").write_text("# @package _global_\ndefaults: [/optimizer: loop]\n")
    message = refused(tmp_path, "train", "--config-dir", "conf", f"optimizer={choice}")
    assert message.startswith("dlopt: --config-dir=conf: ") and "includes itself" in message


def test_interpolations_of_a_saved_config_are_checked_before_they_are_resolved() -> None:
    """Those of a checkpoint may be of others."""
    bomb = {f"b{i}": f"${{b{i + 1}}}${{b{i + 1}}}" for i in range(40)} | {"b40": "x"}
    chain = {f"b{i}": f"${{b{i + 1}}}" for i in range(3000)} | {"b3000": "x"}
    for config in (bomb, chain):
        with pytest.raises(UserError, match="its interpolations expand to more than"):
            resolve_saved(config)
    assert resolve_saved({"a": "${b}", "b": 3}) == {"a": 3, "b": 3}
