"""The JSON schema of experiment files, as an editor uses it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.json_schema import schema
from dlopt.config.plan import plan
from tests.support.choices import CONF
from tests.support.line import dlopt, refused

FILES = sorted(path for path in (CONF / "experiment").rglob("*.yaml"))


@cache
def validator() -> Draft202012Validator:
    written = schema()
    Draft202012Validator.check_schema(written)
    return Draft202012Validator(written)


def faults(content: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator().iter_errors(content)]


def test_accepts_every_shipped_recipe() -> None:
    for path in FILES:
        assert faults(yaml.safe_load(path.read_text())) == [], path


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("optimizer: {lrr: 0.1}", "$.optimizer"),
        ("optimizer: {lr: -1.0}", "$.optimizer.lr"),
        ("optimizer: {lr: fast}", "$.optimizer.lr"),
        ("epochs: ten", "$.epochs"),
        ("epochs: 0", "$.epochs"),
        ("epoch: 10", "$: "),
        ("precision: fp12", "$.precision"),
        ("evaluate: {every_epoch: 2}", "$.evaluate"),
        ("data: {batch_size: 0}", "$.data.batch_size"),
        ("schedule: {warmup_shape: round}", "$.schedule.warmup_shape"),
        ("defaults: [{override /optimizer: adamm}]", "$.defaults[0]"),
    ],
)
def test_rejects_what_dlopt_rejects(text: str, place: str) -> None:
    found = faults(yaml.safe_load(text))
    assert len(found) == 1 and found[0].startswith(place), found


def test_accepts_interpolations_and_callables_of_ones_own() -> None:
    text = "epochs: ${steps}\nseed: ???\nmodel: {_target_: mine.Net, layers: [1, 2]}\noptimizer: {lr: '${model.lr}'}"
    assert faults(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "epochs": (1, 0, 2.5, "a", None, True),
        "ema": (0.9, 0.0, 1.0, 1.5, None, "a", "tail"),
        "precision": ("bf16", "fp12", 16),
        "tracking": ([], ["tensorboard"], ["x"], "tensorboard"),
        "evaluate.every_epochs": (2, 0, None),
        "data.batch_size": (64, "full", "half", 0),
        "data.val_split": (0.1, 0, 1.0, -0.1),
        "optimizer.lr": (0.1, 0, -1, "a"),
        "optimizer.momentum": (0.9, 1.0, -0.1),
        "schedule.warmup_fraction": (0.1, -0.1, 1.5),
        "model.width": (8, 0, 2.5),
    }.items(),
)
def test_accepts_exactly_the_values_that_dlopt_accepts(key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        content: Any = value
        for part in reversed(key.split(".")):
            content = {part: content}
        shown = json.dumps(value)
        try:
            plan(Composer(), ["optimizer=sgd", "schedule=cosine", f"{key}={shown}"])
        except UserError as error:
            assert faults(content), f"{key}={shown}: {error}"
        else:
            assert not faults(content), f"{key}={shown}"


def test_prints_the_schema_with_own_choices(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.1 # own comment\nspeed: 2\n")
    written = json.loads(dlopt(tmp_path, "template", "schema", "--config-dir", str(tmp_path)).out)
    entries = written["properties"]["defaults"]["items"]["anyOf"][1]["properties"]
    assert "mine" in entries["override /optimizer"]["enum"]
    assert "speed" in written["properties"]["optimizer"]["else"]["properties"]
    assert "needs one name" in refused(tmp_path, "template", "schema", "epochs=3")
