"""Hydra's words for a search space, and what Optuna makes of them."""

import re
from pathlib import Path

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

import dlopt
from dlopt.basics.errors import UserError
from tests.sweeps.spaces import space


@pytest.mark.parametrize(
    "typed, distribution",
    [
        ("interval(0.001,0.1)", FloatDistribution(0.001, 0.1)),
        ("interval(1,5)", FloatDistribution(1.0, 5.0)),
        ("int(interval(1,5))", IntDistribution(1, 5)),
        ("tag(log,interval(0.001,0.1))", FloatDistribution(0.001, 0.1, log=True)),
        ("tag(log,int(interval(1,100)))", IntDistribution(1, 100, log=True)),
        ("range(0,5)", IntDistribution(0, 4)),  # as Hydra's range: without its end
        ("range(1,10,2)", IntDistribution(1, 9, step=2)),
        ("range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("range(-0.2,1.8,0.6)", FloatDistribution(-0.2, 1.6, step=0.6)),  # in binary, 1.6 is missed
        ("range(4.9,3.4,-1.1)", FloatDistribution(3.8, 4.9, step=1.1)),
        ("range(1,3,0.5)", FloatDistribution(1.0, 2.5, step=0.5)),
        ("choice(a,b)", CategoricalDistribution(["a", "b"])),
        ("0.1,[2,3],null", CategoricalDistribution(["0.1", "[2,3]", "null"])),
    ],
)
def test_distributions(typed: str, distribution: BaseDistribution) -> None:
    assert space(f"key={typed}").searched == {"key": distribution}


def test_the_guide_describes_the_distributions() -> None:
    guide = (Path(dlopt.__file__).parents[1] / "docs/howto/search.md").read_text()
    rows = re.findall(r"^\| `([^`]+)`.* \| (a number|an integer|one)\b", guide, re.MULTILINE)
    kinds = {"a number": FloatDistribution, "an integer": IntDistribution, "one": CategoricalDistribution}
    assert len(rows) == 6
    for value, noun in rows:
        assert isinstance(space(f"key={value}").searched["key"], kinds[noun]), value


def test_grid_points_equal_hydras() -> None:
    found = space("a=range(0,3)", "b=x,y", "c=1", "d=range(0,0.3,0.1)")
    assert found.size() == 18 and len(found.points()) == 18
    assert found.points()[:4] == [
        {"a": 0, "b": "x", "d": 0.0}, {"a": 0, "b": "x", "d": 0.1}, {"a": 0, "b": "x", "d": 0.2},
        {"a": 0, "b": "y", "d": 0.0},
    ]  # fmt: skip
    assert found.overrides(found.points()[-1]) == ["c=1", "a=2", "b=y", "d=0.2"]
    assert found.label(found.points()[-1]) == "a=2 b=y d=0.2"
    assert space("a=1,2", "b=interval(0,1)").size() is None


def test_last_value_of_a_key_wins() -> None:
    found = space("a=interval(0,1)", "b=1", "a=2", "b=range(0,2)")
    assert set(found.searched) == {"b"} and found.fixed == ("a=2",)


@pytest.mark.parametrize(
    "typed, said",
    [
        ("interval(2,1)", "a <= b"),
        ("tag(log,interval(0,1))", "0 < a"),
        ("tag(log,range(1,5))", "interval"),
        ("tag(square,interval(1,5))", "tag(square"),
        ("range(5,1)", "empty"),
        ("range(5,1,2)", "empty"),
        ("tag(log,choice(1,5))", "interval"),
        ("a,b,a", "duplicate"),
        ("1", "nothing to search"),
    ],
)
def test_rejects_invalid_spaces(typed: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        space(f"key={typed}")
    assert said in str(error.value)
