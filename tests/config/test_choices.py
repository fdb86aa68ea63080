"""Every choice says what it is; the keys that are listed are those that Hydra composes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.config.choices import Catalogue
from dlopt.config.compose import Composer
from dlopt.errors import UserError

CATALOGUE = Catalogue()


def write(folder: Path, **files: str) -> str:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


@pytest.mark.parametrize("group", CATALOGUE.groups())
def test_every_choice_begins_with_what_it_is(group: str) -> None:
    choices = CATALOGUE.choices(group)
    assert choices or group == "experiment"
    for choice in choices:
        first = next(line for line in choice.path.read_text().splitlines() if not line.startswith("# @"))
        assert first.startswith("# ") and first[2:].strip(), (
            f"{choice.path}: a comment with a description is wanted first"
        )
        assert len(choice.description) <= 160, f"{choice.path}: one line"


def test_groups_and_defaults_are_those_of_the_defaults_list() -> None:
    composer = Composer()
    chosen = composer.compose([]).hydra.runtime.choices
    groups = CATALOGUE.groups()
    assert set(groups) == {*composer.groups()} | {"experiment"}
    assert groups == {group: chosen[group] for group in groups}
    assert list(groups)[:2] == ["data", "normalize"] and list(groups)[-1] == "experiment"


@pytest.mark.parametrize("group", ["data", "sampler", "loss", "clip", "parallel", "schedule", "init"])
def test_choices_are_those_that_hydra_finds(group: str) -> None:
    assert {choice.name for choice in CATALOGUE.choices(group)} == set(Composer().choices(group))


def leaves(name: str, value: Any) -> dict[str, Any]:
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    is_block = isinstance(value, dict) or any(isinstance(each, dict) for _, each in items)
    if not value or not is_block:
        return {name: value}
    return {key: leaf for inner, each in items for key, leaf in leaves(f"{name}.{inner}", each).items()}


KINDS = (
    "schedule=wsd", "schedule=cosine", "optimizer=sam", "optimizer=gradient_descent", "optimizer=muon",
    "model=resnet18", "model=mlp", "data=custom", "augmentation=random_mix",
)  # fmt: skip


@pytest.mark.parametrize("choice", KINDS)
def test_keys_and_defaults_are_those_that_hydra_composes(choice: str) -> None:
    from omegaconf import OmegaConf

    group, _, name = choice.partition("=")
    (found,) = [each for each in CATALOGUE.choices(group) if each.name == name]
    config = OmegaConf.to_container(Composer().compose([choice]), resolve=False)
    assert isinstance(config, dict)
    wanted = {key: value for key, value in leaves(group, config[group]).items() if key != f"{group}._target_"}
    keys = {key.name: yaml.safe_load(key.value) for key in CATALOGUE.keys(found)}
    elsewhere = {key: keys.pop(key) for key in list(keys) if not key.startswith(f"{group}.")}
    assert keys == wanted and len(wanted) > 1
    assert elsewhere == {
        "optimizer=gradient_descent": {"data.batch_size": "full"},
        "optimizer=sam": {"optimizer@optimizer.base": "sgd"},
    }.get(choice, {})


def test_comments_stand_with_their_keys(tmp_path: Path) -> None:
    text = """\
# First line.
# more: of it

# @package ignored
defaults:
  - _more # not a key
  - _self_
_target_: a.b
text: 'a # no comment' # quoted
list: [1, 2]# no comment without a space, says YAML, yet shown
blocks: # of scalars
  - 1
  - 2
inner:
  deep: ${seed} # far down
bare: # nothing
"""
    folder = write(tmp_path, sampler__mine=text, sampler___more="shared: 1 # pulled in\ntext: x # replaced\n")
    catalogue = Catalogue(folder)
    (mine,) = [choice for choice in catalogue.choices("sampler") if choice.name == "mine"]
    assert mine.description == "First line" and mine.header == ["First line.", "more: of it"]
    assert {key.name.removeprefix("sampler."): (key.value, key.comment) for key in catalogue.keys(mine)} == {
        "shared": ("1", "pulled in"),
        "text": ("a # no comment", "quoted"),
        "list": ("[1, 2]", "no comment without a space, says YAML, yet shown"),
        "blocks": ("[1, 2]", "of scalars"),
        "inner.deep": ("${seed}", "far down"),
        "bare": ("null", "nothing"),
    }


def test_recipes_stand_in_folders_and_set_keys_anywhere(tmp_path: Path) -> None:
    text = """\
# @package _global_
# A recipe
# command: dlopt train experiment=lecture/one
defaults:
  - override /model: mlp # small
epochs: 3 # few
optimizer:
  lr: 0.5
"""
    catalogue = Catalogue(write(tmp_path, experiment__lecture__one=text, experiment___part="# no choice\n"))
    (recipe,) = [choice for choice in catalogue.choices("experiment") if choice.name == "lecture/one"]
    assert not [choice for choice in catalogue.choices("experiment") if choice.name.startswith("_")]
    assert recipe.header == ["A recipe", "command: dlopt train experiment=lecture/one"]
    assert [(key.name, key.value, key.comment) for key in catalogue.keys(recipe)] == [
        ("model", "mlp", "small"),
        ("epochs", "3", "few"),
        ("optimizer.lr", "0.5", ""),
    ]


def test_the_users_own_choice_comes_before_ours_of_the_same_name(tmp_path: Path) -> None:
    catalogue = Catalogue(write(tmp_path, optimizer__sgd="# Mine\n", optimizer__zzz="# Last\n"))
    found = {choice.name: choice.description for choice in catalogue.choices("optimizer")}
    assert found["sgd"] == "Mine" and list(found)[-1] == "zzz" and "adam" in found


def test_numbers_are_in_their_order() -> None:
    names = [choice.name for choice in CATALOGUE.choices("model")]
    assert names.index("resnet20") < names.index("resnet56") < names.index("resnet110")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        Catalogue(str(tmp_path / "none"))
    catalogue = Catalogue(write(tmp_path, sampler__bad="# Bad\na: [1\n"))
    (bad,) = [choice for choice in catalogue.choices("sampler") if choice.name == "bad"]
    with pytest.raises(UserError, match=r"bad\.yaml: no valid YAML"):
        catalogue.keys(bad)
