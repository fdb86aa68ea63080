"""Replacing the callable of a choice drops the keys of the choice."""

from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.plan import plan
from dlopt.config.resolve import to_plain


def composed(*lines: str) -> dict[str, Any]:
    plain, saved = to_plain(Composer().compose(list(lines)))
    assert plain == saved
    parse(plain)
    return plain


def test_a_callable_that_takes_any_key_gets_typed_keys_only() -> None:
    target = "torchvision.models.mobilenet_v3_small"
    assert composed(f"model._target_={target}", "+model.num_classes=10", "model.width=8")["model"] == {
        "_target_": target,
        "num_classes": 10,
        "width": 8,
    }


def test_a_later_choice_replaces_a_callable() -> None:
    later = composed("optimizer=torch.optim.RAdam", "optimizer=adamw", "optimizer.lr=0.1")
    assert later == composed("optimizer=adamw", "optimizer.lr=0.1")
    assert composed("optimizer=adamw", "optimizer=torch.optim.RAdam") == composed("optimizer=torch.optim.RAdam")


def test_a_new_callable_inherits_only_the_keys_of_its_group() -> None:
    typed = ["optimizer=adam", "optimizer._target_=torch.optim.RAdam", "optimizer.lr=0.1", "schedule=cosine"]
    optimizer = composed(*typed)["optimizer"]
    assert optimizer == {"groups": [], "layer_decay": None, "_target_": "torch.optim.RAdam", "lr": 0.1}
    assert composed("model._target_=torch.nn.Flatten")["model"] == {"_target_": "torch.nn.Flatten"}  # no width


def test_a_callable_of_a_recipe_inherits_only_what_the_recipe_sets(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\nmodel: {_target_: torchvision.models.mobilenet_v3_small, num_classes: 10}\n"
    (tmp_path / "experiment/small.yaml").write_text(recipe)
    run = plan(Composer(config_dir=str(tmp_path)), ["experiment=small", "model.width=8"])
    assert run.saved["model"] == {
        "_target_": "torchvision.models.mobilenet_v3_small",
        "num_classes": 10,
        "width": 8,
    }
    assert run.choices["model"] == "torchvision.models.mobilenet_v3_small"


def test_a_dotted_name_is_a_choice() -> None:
    """Its keys need no plus sign, because its signature says which there are."""
    found = composed("optimizer=torch.optim.RAdam", "optimizer.lr=0.1", "optimizer.eps=1e-6")["optimizer"]
    assert {key: found[key] for key in ("_target_", "lr", "eps")} == {
        "_target_": "torch.optim.RAdam",
        "lr": 0.1,
        "eps": 1e-6,
    }
    assert composed("data=torchvision.datasets.FakeData", "data.train.size=9")["data"]["train"] == {
        "_target_": "torchvision.datasets.FakeData",
        "size": 9,
    }
    composer = Composer()
    run = plan(composer, ["loss=torch.nn.NLLLoss"])
    assert run.choices["loss"] == "torch.nn.NLLLoss" and run.texts == ["loss=torch.nn.NLLLoss"]
    for lines, message in (
        (["optimizer=mine.X"], r"to trust another package, set allow_packages=\[mine\]"),
        (
            ["optimizer=torch.optim.RAdam", "optimizer.ep=1"],
            r"optimizer\.ep=1: unknown key; did you mean optimizer\.eps",
        ),
        (["parallel=mine.Mode"], "parallel=mine.Mode: unknown choice"),
    ):
        with pytest.raises(UserError, match=message):
            plan(composer, lines)


def test_a_single_value_where_a_list_is_needed() -> None:
    """The saved config has the list, which others read."""
    saved = plan(Composer(), ["tracking=tensorboard", "model=mlp", "model.widths=8", "tags=a"]).saved
    assert (saved["tracking"], saved["model"]["widths"], saved["tags"]) == (["tensorboard"], [8], ["a"])
