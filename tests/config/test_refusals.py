"""A command line with several mistakes: all of them in one message."""

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.plan import plan


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
