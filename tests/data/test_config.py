"""Every choice's YAML file matches its callable and has a description in the first line."""

import importlib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.parameters import parameters_of
from dlopt.data.splits import DataSettings
from tests.support.choices import files

CONF = Path(__file__).parents[2] / "conf"
NEWER = {"standardize_target"}  # keys of some data sets, which configs of earlier versions lack
COMMON = {field.name for field in fields(DataSettings)}
FRAGMENTS = ("_base", "_values", "_labelled", "_common")  # each includes the former one
RUNTIME = {
    "normalize": {"input_shape"},
    "sampler": {"targets", "samples", "batch_size", "seed"},
    "data": COMMON | {"saved_tokenizer", "saved_columns"},
}


CHOICES = [path for group in RUNTIME for path in files(group)]


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_keys_match_the_arguments(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 10
    node = yaml.safe_load(path.read_text())
    assert path.parent.name != "data" or (node["defaults"][0] in FRAGMENTS and node["defaults"][1] == "_self_")
    module, _, name = node["_target_"].rpartition(".")
    parameters = parameters_of(getattr(importlib.import_module(module), name)).values()
    assert all(p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty for p in parameters)
    # Only keys that saved configs of earlier versions lack: the same value in two places.
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    written = {name: tuple(node[name]) or None if isinstance(node[name], list) else node[name] for name in defaults}
    assert defaults == written
    shared = RUNTIME[path.parent.name]  # a choice may set them to values of its own
    assert {p.name for p in parameters} - shared == set(node) - {"_target_", "defaults"} - shared


def shared(fragment: str) -> dict[str, object]:
    node = yaml.safe_load((CONF / "data" / f"{fragment}.yaml").read_text())
    parents = [name for name in node.pop("defaults", []) if name != "_self_"]
    return {**(shared(parents[0]) if parents else {}), **node}


def test_shared_keys_match_the_settings() -> None:
    """Keys that not every data set has default to the values of the files."""
    assert set(shared("_common")) == COMMON - NEWER - {"group", "order", "weight"}
    defaults = {field.name: field.default for field in fields(DataSettings) if field.default is not MISSING}
    assert {defaults.pop(name) for name in NEWER} == {False}
    assert {defaults.pop(name) for name in ("group", "order", "weight")} == {None}  # of data with columns
    assert defaults == {name: value for name, value in shared("_common").items() if name not in shared("_base")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data=text data.file=x data.image_size=8", "data.image_size=8: unknown key; data="),
        ("data=tokens data.root=x data.val_split=0.2", "data.val_split=0.2: unknown key; data="),
        ("data=python_source data.label_noise=0.1", "data.label_noise=0.1: unknown key; data="),
        ("data=diabetes data.label_noise=0.1", "data.label_noise=0.1: unknown key; data="),
        ("data=wine data.image_size=[8,8]", "data.image_size=[8,8]: unknown key; data="),
    ],
)
def test_refuses_keys_that_mean_nothing_for_a_data_set(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Composer().compose(line.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
