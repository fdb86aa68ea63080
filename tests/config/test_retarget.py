"""Replacing the callable of a choice drops the keys that only the former callable has."""

from typing import Any

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain


def composed(*lines: str) -> dict[str, Any]:
    plain, saved = to_plain(Composer().compose(list(lines)), lines)
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


def test_keys_that_the_new_callable_or_the_group_has_are_kept() -> None:
    former = composed("optimizer=adam")["optimizer"]
    optimizer = composed("optimizer=adam", "optimizer._target_=torch.optim.RAdam")["optimizer"]
    assert former.keys() - optimizer.keys() == {"amsgrad", "fused"} & former.keys()
    assert {"lr", "betas", "groups", "layer_decay"} <= optimizer.keys()
