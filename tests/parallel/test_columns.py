"""The two-column AlexNet on two ranks, and what it costs to send against other splits of the same net."""

import copy
import re
from pathlib import Path

import pytest
import torch

from dlopt.analysis.bench.communication import Traffic
from dlopt.errors import UserError
from dlopt.parallel.columns import split_columns
from dlopt.parallel.dropout import Place, make_global
from dlopt.parallel.filter import split_filters
from tests.parallel.models import SHAPE, build, joined, passed, unusual
from tests.parallel.ranks import run_ranks
from tests.parallel.test_filter import Three

ALEXNET = ["model=two_column_alexnet", "model.hidden=32", "model.norm=batch"]


def columns_against_the_whole_net() -> None:
    ranks = joined()
    whole = unusual(build(*ALEXNET))
    own, filters = copy.deepcopy(whole), copy.deepcopy(whole)
    inputs = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    split_columns(own, SHAPE, ranks)
    make_global(own, Place())
    expected = passed(whole, inputs)
    with Traffic() as few:
        found = passed(own, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = dict(whole.named_parameters())
    mine = {name: p for name, p in own.named_parameters() if not p.is_meta}
    assert {name for name in parameters if f"columns.{ranks.rank}." in name} <= set(mine)
    assert ("head.weight" in mine) == (ranks.rank == 0)
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(own.eval()(inputs), whole.eval()(inputs), rtol=1e-10, atol=1e-10)
    plan = split_filters(filters, SHAPE, ranks)
    make_global(filters, Place(), plan.dropouts)
    with Traffic() as many:
        passed(filters, inputs)
    # By hand: each rank's half of 256 maps of 2x2, of 256 features and of 32 (twice: hidden and last), there and back;
    # the logits' way is counted on both ranks.
    halves = [128 * 2 * 2, 128 * 1 * 1, 16]
    assert few.sent <= 8 * 6 * (2 * sum(halves) + 16 + 10)
    assert few.sent >= 8 * 6 * 2 * sum(halves)
    assert few.sent < many.sent / 5, (few.sent, many.sent)


def test_columns_compute_what_the_net_does_and_send_little(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_columns:columns_against_the_whole_net", 2, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=resnet20"],
            "parallel=columns: the model is a CifarResNet, which has no columns; use ",
        ),
        (
            ALEXNET,
            "parallel=columns: the model has 2 columns, one for each process, and there are 3 processes",
        ),
    ],
)
def test_wrong_set_ups_get_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        split_columns(build(*overrides), SHAPE, Three())
