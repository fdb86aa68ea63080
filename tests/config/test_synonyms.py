"""Words of other tools: every row of the table is unknown to dlopt, and what it points to exists."""

import pytest

from dlopt.basics.errors import UserError
from dlopt.config.choices import Catalogue, Choice, config_folder
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.synonyms import for_choice, for_flag, for_key, table

KEYS, CHOICES = table("keys"), table("choices")
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.fixture(scope="module")
def choices() -> dict[str, set[str]]:
    """The choices of every group."""
    catalogue = Catalogue()
    return {group: {each.name for each in catalogue.choices(group)} for group in [*catalogue.groups(), *HYDRA_GROUPS]}


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """All keys: those of the run and those of every choice."""
    catalogue = Catalogue()
    listed = [Choice("", "train", config_folder() / "train.yaml")]
    listed += [choice for group in catalogue.groups() if group != "experiment" for choice in catalogue.choices(group)]
    return {key.name for choice in listed for key in catalogue.keys(choice)}


def check_use(advice: str, choices: dict[str, set[str]], keys: set[str]) -> None:
    for override in advice.partition(" (")[0].split():  # the note is in parentheses
        key, equals, value = override.partition("=")
        assert equals
        if key in choices:
            assert value == "{}" or value in choices[key], override
        else:
            assert key in keys or key == "output", override


def test_keys(choices: dict[str, set[str]], keys: set[str]) -> None:
    for key, use in KEYS.items():
        assert key not in keys and key not in choices and not any(each.startswith(f"{key}.") for each in keys), key
        assert for_key(key, "7") == f"use {use.replace('{}', '7')}"
        check_use(use, choices, keys)


def test_choices(choices: dict[str, set[str]], keys: set[str]) -> None:
    for pattern, use in CHOICES.items():
        group, _, choice = pattern.replace("*", "_b0").partition("=")
        assert choice not in choices.get(group, ()), pattern
        assert for_choice(group, choice) == f"use {use.replace('{}', choice)}"
        check_use(use, choices, keys)


def test_no_pattern_hides_a_choice(choices: dict[str, set[str]]) -> None:
    assert not [(group, name) for group, names in choices.items() for name in names if for_choice(group, name)]


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("gpus=2", "parallel=ddp parallel.processes=2 (one process per GPU; for a single GPU: device=cuda)"),
        ("optimizer.learning_rate=0.1", "optimizer.lr=0.1"),
        ("trainer.max_epochs=5", "epochs=5"),
        ("+max_epochs=5", "epochs=5"),
        ("Batch_Size=32", "data.batch_size=32 (summed over all processes)"),
        ("model=efficientnet_b0", "model=timm model.name=efficientnet_b0"),
        ("schedule=none", "schedule=constant"),
        ("schedule=null", "schedule=constant"),
        ("hydra/launcher=submitit_slurm", "hydra/launcher=slurm"),
    ],
)
def test_error_is_the_pointer_alone(line: str, use: str, composer: Composer) -> None:
    with pytest.raises(UserError) as error:
        parse(*to_plain(composer.with_words(line).compose([line])))
    assert str(error.value).startswith(line.lstrip("+")) and str(error.value).endswith(f"; use {use}")


def test_a_key_of_the_config_is_not_replaced(composer: Composer) -> None:
    """`patience` is a key of schedule=plateau, which is the better hint for another schedule."""
    with pytest.raises(UserError, match="schedule=plateau has it"):
        composer.compose(["schedule.patience=3"])


def test_unknown_words_have_no_row() -> None:
    assert not for_key("zzz", "1")
    assert not for_choice("model", "zzz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 5", "--epochs 5: an override is key=value, without dashes; use epochs=5"),
        ("--epochs=5 --lr 1", "--epochs=5: an override is key=value, without dashes; use epochs=5"),
        ("seed=1 --gpus 2", "--gpus 2: an override is key=value, without dashes; use parallel=ddp"),
        ("--amp epochs=5", "--amp: an override is key=value, without dashes; use precision=auto"),
        ("--cfg job seed=1", ""),
    ],
)
def test_flags(arguments: str, message: str) -> None:
    hint = for_flag(arguments.split(), ["--cfg"])
    assert hint.startswith(message) and bool(hint) is bool(message)


def test_advice_for_a_key_is_not_refused_in_turn() -> None:
    assert for_key("scheduler", "none") == "use schedule=constant"
    assert for_key("lr_scheduler", "ReduceLROnPlateau") == "use schedule=plateau"
    assert for_key("criterion", "ce") == "use loss=cross_entropy"
    assert for_key("scheduler", "cosine").startswith("use schedule=cosine (")
