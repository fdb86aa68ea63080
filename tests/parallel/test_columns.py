"""The two-column AlexNet on two ranks, and its traffic compared with parallel=filter on the same model."""

import copy
import re
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.lab.scaling.communication import Traffic
from dlopt.parallel.dropout import CurrentShard, convert_dropout
from dlopt.parallel.modes.columns import split_columns
from dlopt.parallel.modes.filter import split_filters
from tests.support.ranks import run_ranks
from tests.support.split_models import SHAPE, FirstOf, build, join_all, randomized, train_step

ALEXNET = ["model=two_column_alexnet", "model.hidden=32", "model.norm=batch"]


def columns_match_single_process() -> None:
    model_group = join_all()
    full = randomized(build(*ALEXNET))
    split, filters = copy.deepcopy(full), copy.deepcopy(full)
    inputs = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    split_columns(split, SHAPE, model_group)
    convert_dropout(split, CurrentShard())
    expected = train_step(full, inputs)
    with Traffic() as columns_traffic:
        outputs = train_step(split, inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    parameters = dict(full.named_parameters())
    held = {name: p for name, p in split.named_parameters() if not p.is_meta}
    assert {name for name in parameters if f"columns.{model_group.rank}." in name} <= set(held)
    assert ("head.weight" in held) == (model_group.rank == 0)
    for name, parameter in held.items():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(split.eval()(inputs), full.eval()(inputs), rtol=1e-10, atol=1e-10)
    plan = split_filters(filters, SHAPE, model_group)
    convert_dropout(filters, CurrentShard(), plan.dropouts)
    with Traffic() as filter_traffic:
        train_step(filters, inputs)
    # By hand: each rank's half of 256 maps of 2x2, of 256 features and of 32 (twice: hidden and last), there and back;
    # the broadcast of the logits is counted on both ranks.
    halves = [128 * 2 * 2, 128 * 1 * 1, 16, 16]
    assert columns_traffic.sent <= 8 * 6 * (2 * sum(halves) + 10)
    assert columns_traffic.sent >= 8 * 6 * 2 * sum(halves)
    assert columns_traffic.sent < filter_traffic.sent / 5, (columns_traffic.sent, filter_traffic.sent)


def test_columns_match_single_process_with_little_traffic(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_columns:columns_match_single_process", 2, tmp_path)


def frozen_columns_match_single_process() -> None:
    model_group = join_all()
    full = randomized(build(*ALEXNET))
    inputs = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    for frozen in ("columns.0.", "columns.1.front.", "columns."):
        one, split = copy.deepcopy(full), copy.deepcopy(full)
        for model in (one, split):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
        split_columns(split, SHAPE, model_group)
        torch.testing.assert_close(train_step(split, inputs), train_step(one, inputs), rtol=1e-10, atol=1e-10)
        gradients = {name: p.grad for name, p in one.named_parameters()}
        for name, parameter in split.named_parameters():
            if not parameter.is_meta:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-10)


def test_frozen_columns_match_single_process(tmp_path: Path) -> None:
    """A rank whose own layers are frozen takes part in the exchanges of the other's backward pass."""
    run_ranks("tests.parallel.test_columns:frozen_columns_match_single_process", 2, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet20"], "parallel=columns: CifarResNet has no columns; use "),
        (ALEXNET, "parallel=columns: 2 columns need as many processes, but there are 3; start 2"),
    ],
)
def test_unsupported_setups_raise_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        split_columns(build(*overrides), SHAPE, FirstOf(3))
