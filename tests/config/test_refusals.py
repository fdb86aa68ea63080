"""A command line with several mistakes: all of them in one message."""

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.plan import plan
from dlopt.sweeps import sweep


def refusals(*words: str) -> list[str]:
    """Returns the lines of the message."""
    with pytest.raises(UserError) as caught:
        plan(Composer(), words)
    return str(caught.value).split("\n")


def test_all_mistakes_are_named_in_the_order_of_the_words() -> None:
    title, *lines = refusals("sed=1", "schedule=cosin", "data.batch_size=-1", "model=mlp", "model.widths=a", "epochs=0")
    assert title == "5 overrides are refused:"
    starts = ["sed=1", "schedule=cosin", "data.batch_size=-1", "model.widths=a", "epochs=0"]
    assert [line.split(":")[0].strip() for line in lines] == starts
    hints = ["did you mean seed?", "did you mean schedule=cosine?", "an integer >= 1", "a list", "an integer >= 1"]
    assert all(hint in line for hint, line in zip(hints, lines, strict=True))


def test_one_mistake_is_one_line() -> None:
    [line] = refusals("optimizer=adamwx", "epochs=1")
    assert line.startswith("optimizer=adamwx: unknown choice; did you mean optimizer=adamw?")


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer=adamwx", "optimizer.amsgrad=true"),  # a key of the choice that was meant
        ("experiment=nothing", "optimizer=adamwx"),  # the recipe may set anything
        ("model=mlp", "evaluate.every_steps=5", "evaluate.every_epochs=2"),  # one mistake of two keys
    ],
)
def test_what_may_follow_from_another_mistake_is_not_named(words: tuple[str, ...]) -> None:
    assert len(refusals(*words)) == 1


def refusals_of_sweep(*words: str) -> list[str]:
    """Returns the lines of the message."""
    with pytest.raises(UserError) as caught:
        sweep.run(sweep.request(Composer(), words))
    return str(caught.value).split("\n")


def test_all_mistakes_of_a_sweep_are_named() -> None:
    words = ("optimizer=adamwx,sgd,sgdx", "optimizr.lr=0.1,1", "epochs=1,0", "data.batch_size=-1", "seeds=x")
    title, *lines = refusals_of_sweep(*words)
    assert title == "6 overrides are refused:"
    starts = ["optimizer=adamwx", "optimizer=sgdx", "optimizr.lr=0.1", "epochs=0", "data.batch_size=-1", "seeds=x"]
    assert [line.split(":")[0].strip() for line in lines] == starts


@pytest.mark.parametrize(
    "words",
    [
        ("model=mlp", "optimizer.lr=-1", "seeds=2"),
        ("optimizer=adamwx,sgd", "optimizer.amsgrad=true,false"),  # keys of the choice that was meant
        ("optimizer=sgd", "optimizer.lr=interval(0,1)", "model=mlp,resnet21"),  # refused before the values are read
    ],
)
def test_one_mistake_of_a_sweep_is_one_line(words: tuple[str, ...]) -> None:
    assert len(refusals_of_sweep(*words)) == 1
