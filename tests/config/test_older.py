"""Configs of older versions: what they used and is gone."""

from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.older import of_today

OLDER = {"recovery": {"attempts": 5, "lr_factor": 0.1}, "on_divergence": "skip"}
MOMENTS = {**OLDER, "optimizer": {"lr": 1.0, "state_dtype": "bf16"}}
ROLLED_BACK = {**OLDER, "on_divergence": "rollback"}


def test_keys_that_changed_nothing_are_left_out() -> None:
    found = of_today({**OLDER, "optimizer": {"lr": 1.0, "state_dtype": None}}, trains=True)
    assert found == {"recovery": {"attempts": 5}, "on_divergence": "skip", "optimizer": {"lr": 1.0}}


def test_what_concerns_the_training_only_is_refused_there() -> None:
    assert of_today(ROLLED_BACK) == {"recovery": {"attempts": 5}, "on_divergence": "stop"}
    with pytest.raises(UserError, match=r"^on_divergence=rollback: .*from=RUN on_divergence=stop"):
        of_today(ROLLED_BACK, trains=True)


def test_moments_in_bf16_are_refused_where_they_would_be_trained_on() -> None:
    assert "state_dtype" not in of_today(MOMENTS)["optimizer"]
    with pytest.raises(UserError, match=r"^optimizer\.state_dtype=bf16: .*precision=bf16_pure"):
        of_today(MOMENTS, trains=True)


@pytest.mark.parametrize("saved", [{}, {"recovery": None}, {"recovery": {}, "optimizer": {"state_dtype": "int8"}}])
def test_configs_of_today_stay_as_they_are(saved: dict[str, Any]) -> None:
    """Also with the argument of an optimizer of the user's own."""
    assert of_today(saved, trains=True) == saved
