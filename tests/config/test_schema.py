"""The signature is the schema: what is accepted, and how what is refused is described."""

import math
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge
from hypothesis import example, given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Fraction, Natural, NonNegative, Positive, PositiveFraction, Probability
from dlopt.config.parameters import parameters_of
from dlopt.config.schema import Component, check_arguments, component, resolve_target


def target(
    *,
    count: Count = 1,
    natural: Natural = 1,
    positive: Positive = 1.0,
    non_negative: NonNegative = 1.0,
    probability: Probability = 0.5,
    share: Fraction = 0.5,
    positive_share: PositiveFraction = 0.5,
) -> None: ...


RANGES: dict[str, tuple[type, Any]] = {
    "count": (int, lambda x: 1 <= x < 2**63),  # larger integers would overflow torch's
    "natural": (int, lambda x: 0 <= x < 2**63),
    "positive": (float, lambda x: x > 0),
    "non_negative": (float, lambda x: x >= 0),
    "probability": (float, lambda x: 0 <= x <= 1),
    "share": (float, lambda x: 0 <= x < 1),
    "positive_share": (float, lambda x: 0 < x <= 1),
}
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 0.0, 1.0, -0.0, 1e-320]))


@pytest.mark.parametrize("name", RANGES)
@given(value=st.one_of(NUMBERS, st.booleans(), st.text(), st.none(), st.lists(NUMBERS, max_size=2)))
@example(value=2**63 - 1)
@example(value=2**63)
def test_accepts_exactly_the_values_in_range(name: str, value: Any) -> None:
    kind, is_in_range = RANGES[name]
    is_number = type(value) in ((int,) if kind is int else (int, float)) and math.isfinite(value)
    if is_number and is_in_range(value):
        expected = value if kind is int else float(value)  # beyond 2**53 not every integer is a float
        assert check_arguments("key", target, {name: value})[name] == expected
    else:
        with pytest.raises(UserError, match=f"^key.{name}="):
            check_arguments("key", target, {name: value})


def many(
    *,
    text: str = "",
    flag: bool = True,
    choice: Literal["a", "b"] = "a",
    pair: tuple[Fraction, Fraction] = (0.0, 0.0),
    some: tuple[Count, ...] = (),
    maybe: Annotated[float, Ge(2)] | None = None,
    either: Count | Literal["auto"] = 1,
) -> None: ...


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": 1}, """allowed: a string; quote a text that looks like a number: "key.text='...'\""""),
        ({"flag": "yes"}, "allowed: true | false"),
        ({"flag": 1}, "allowed: true | false"),
        ({"choice": "c"}, "allowed: a | b"),
        ({"pair": [0.1]}, "too few values; allowed: a list [a number >= 0 and < 1,a number >= 0 and < 1]"),
        ({"pair": [0.1, 1]}, "less than 1"),
        ({"some": [1, 2**63]}, "key.some=[1, 9223372036854775808]: too large for a 64-bit integer"),
        ({"some": [1, 0]}, "allowed: a list [an integer >= 1]"),
        ({"maybe": 1}, "allowed: a number >= 2 | null"),
        ({"either": "atuo"}, "allowed: an integer >= 1 | auto"),
        ({"txt": "x"}, "key.txt=x: unknown key; did you mean key.text? `dlopt train --help` lists all"),
    ],
)
def test_messages_state_the_allowed_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments("key", many, values)
    assert message in str(caught.value)


@pytest.mark.parametrize(("block", "group"), [("optimizer", "optimizer"), ("hydra.launcher", "hydra/launcher")])
def test_the_message_about_an_unknown_key_names_the_command_that_lists_its_group(block: str, group: str) -> None:
    message = rf"^{block}\.pear=1: unknown key; did you mean {block}\.pair\? `dlopt options {group}` lists all$"
    with pytest.raises(UserError, match=message):
        check_arguments(block, many, {"pear": 1})


def test_converts_values_to_annotated_types() -> None:
    values = {"pair": [0.1, 0], "some": [1, 2], "maybe": 3, "either": "auto"}
    checked = check_arguments("key", many, values)
    assert checked == {"pair": (0.1, 0.0), "some": (1, 2), "maybe": 3.0, "either": "auto"}
    assert isinstance(checked["pair"][1], float)


def test_annotations_need_not_be_hashable_and_are_evaluated_once() -> None:
    def of_a_user(*, updates: Annotated[Count, {"unit": "updates"}] = 1) -> None: ...

    assert check_arguments("key", of_a_user, {"updates": 3}) == {"updates": 3}
    assert parameters_of(of_a_user) is parameters_of(of_a_user)  # asked for hundreds of times per config


def test_missing_arguments_are_named_with_their_type() -> None:
    def needs(*, lr: Positive, params: Any) -> None: ...

    with pytest.raises(UserError, match=r"key\.lr: a value is required \(a number > 0\)"):
        check_arguments("key", needs, {}, frozenset({"params"}))
    with pytest.raises(UserError, match="unknown key"):
        check_arguments("key", needs, {"lr": 1, "params": 2}, frozenset({"params"}))


def test_nested_components_receive_runtime_arguments() -> None:
    node = {
        "_target_": "torch.nn.Sequential",
        "lr": 1,
    }
    with pytest.raises(UserError):
        component("key", node, (), ("torch.nn",))
    outer = component(
        "key",
        {
            "_target_": "tests.config.test_schema.Outer",
            "inner": {"_target_": "tests.config.test_schema.Inner", "scale": 2.0},
            "others": [{"_target_": "tests.config.test_schema.Inner", "scale": 3.0, "size": 7}],
        },
        ("size",),
        ("tests",),
    ).build(size=5, unused=1)
    assert (outer.size, outer.inner.size, outer.others[0].size) == (5, 5, 7)  # its own, where it has one
    assert outer.others[0].scale == 3.0


class Inner:
    def __init__(self, *, size: int, scale: Positive) -> None:
        self.size, self.scale = size, scale


class Outer:
    def __init__(self, *, size: int, inner: Any, others: list[Any]) -> None:
        self.size, self.inner, self.others = size, inner, others


@pytest.mark.parametrize(
    ("key", "target", "choice"),
    [
        ("sampler", "dlopt.data.samplers.HardExamples", "sampler=hard_examples"),
        ("normalize", "dlopt.data.whitening.PCAWhiten", "normalize=pca_whiten"),
        ("clip", "dlopt.training.clipping.ByNorm", "clip=norm"),
        ("optimizer", "dlopt.optim.adamw", "optimizer=adamw"),
        ("optimizer", "torch.optim.SGD", "optimizer=torch.optim.sgd.SGD"),  # gradient_descent and sgd
        ("optimizer", "torch.optim.ASGD", "optimizer=torch.optim.asgd.ASGD"),  # no choice
    ],
)
def test_messages_name_the_choice_of_a_callable(key: str, target: str, choice: str) -> None:
    assert Component(key, resolve_target(key, target, ("dlopt", "torch.optim")), {}).choice == choice


def test_schedules_of_torch_are_refused_with_those_of_dlopt() -> None:
    path = "torch.optim.lr_scheduler.StepLR"
    with pytest.raises(UserError, match=f"^schedule={path}: .*; `dlopt options schedule` lists dlopt's$"):
        resolve_target("schedule", path, ("torch.optim",))


def test_a_class_of_a_script_or_notebook_belongs_into_a_module() -> None:
    with pytest.raises(UserError, match=r"^model=__main__.Net: .*; put it into a module \(mine.py\), and set allow_"):
        resolve_target("model", "__main__.Net", ("__main__",))
