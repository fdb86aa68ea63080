"""Every choice's YAML file matches its callable and has a description in the first line."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dlopt.config.schema import parameters_of
from dlopt.data.splits import DataSettings
from tests.support.choices import files

CONF = Path(__file__).parents[2] / "conf"
COMMON = {field.name for field in fields(DataSettings)}
RUNTIME = {
    "normalize": {"input_shape"},
    "sampler": {"targets", "samples", "batch_size", "seed"},
    "data": COMMON | {"saved_tokenizer"},
}


CHOICES = [path for group in RUNTIME for path in files(group)]


# Saved configs may lack these keys. They have the only default values: those of the YAML file.
ADDED_LATER = {"csv": {"label_separator"}, "text": {"column", "tokenizer", "vocabulary"}}


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_keys_match_the_arguments(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 10
    node = yaml.safe_load(path.read_text())
    assert path.parent.name != "data" or node["defaults"][:2] == ["_common", "_self_"]
    module, _, name = node["_target_"].rpartition(".")
    parameters = parameters_of(getattr(importlib.import_module(module), name)).values()
    assert all(p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults.keys() == ADDED_LATER.get(path.stem, set())
    assert all(node[key] == value for key, value in defaults.items())
    shared = RUNTIME[path.parent.name]  # a choice may set them to values of its own
    assert {p.name for p in parameters} - shared == set(node) - {"_target_", "defaults"} - shared


def test_common_keys_match_the_settings() -> None:
    assert set(yaml.safe_load((CONF / "data" / "_common.yaml").read_text())) == COMMON
