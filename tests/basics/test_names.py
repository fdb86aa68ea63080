"""What messages say about unknown names: what was meant, and what is allowed."""

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.names import Names

OPTIMIZERS = Names(
    "choice",
    ["adam", "adamw", "lion", "momentum", "newton", "sgd", "sgdw"],
    "dlopt options optimizer",
    "optimizer=",
    instead=lambda name: "use optimizer=schedule_free_adamw" if name == "schedulefree" else "",
)
COMMANDS = Names("command", ["eval", "train"], forms={"fit": "dlopt train"})
KEYS = Names("key", ["name", "seed"], forms={"lr": "optimizer.lr", "optimizer.lr": "optimizer.lr"})
METRICS = Names("metric", ["train_accuracy", "val_accuracy", "val_loss"], prefix="by=")
ALL = "`dlopt options optimizer` lists all"


@pytest.mark.parametrize(
    ("names", "typed", "message"),
    [
        (OPTIMIZERS, "lionn", f"optimizer=lionn: unknown choice; did you mean optimizer=lion? {ALL}"),
        (OPTIMIZERS, "SGD", f"unknown choice; did you mean optimizer=sgd? allowed: sgd, sgdw, ...; {ALL}"),
        (OPTIMIZERS, "ment", f"unknown choice; did you mean optimizer=momentum? {ALL}"),  # in the name
        (OPTIMIZERS, "wt", f"optimizer=wt: unknown choice; allowed: adam, adamw, lion, momentum, newton, ...; {ALL}"),
        (OPTIMIZERS, "", f"optimizer=: unknown choice; allowed: adam, adamw, lion, momentum, newton, ...; {ALL}"),
        (OPTIMIZERS, "schedulefree", "optimizer=schedulefree: unknown choice; use optimizer=schedule_free_adamw"),
        (COMMANDS, "fit", "fit: unknown command; use dlopt train"),
        (COMMANDS, "fitt", "fitt: unknown command; did you mean dlopt train? allowed: eval, train"),
        (COMMANDS, "evil", "evil: unknown command; did you mean eval? allowed: eval, train"),
        (KEYS, "lrr", "lrr: unknown key; did you mean optimizer.lr? allowed: name, seed"),
        (METRICS, "acc", "did you mean by=val_accuracy? allowed: train_accuracy, val_accuracy, val_loss"),
        (Names("key", ()), "x", "x: unknown key; allowed: none"),
    ],
)
def test_unknown_names(names: Names, typed: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        names.check(typed)
    assert str(caught.value).endswith(message)


def test_known_names_are_accepted() -> None:
    OPTIMIZERS.check("sgd")


def test_a_message_may_begin_with_a_file() -> None:
    message = str(METRICS.unknown("loss", "a.yaml: by"))
    assert message.startswith("a.yaml: by: unknown metric; did you mean by=val_loss?")


def test_the_last_part_of_a_key_is_understood() -> None:
    assert Names("key", ["model.lr", "optimizer.lr"]).similar("lr") == "model.lr"  # the first with this last part
