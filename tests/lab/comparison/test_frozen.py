"""Claims in the results of comparisons: the hash that detects changed claims, former verdicts, damaged files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.lab.comparison.frozen import claims_hash, claims_lines, is_changed, read_claims, recipe_hash, recipe_path
from tests.support.comparisons import GALLERY, SHIPPED

COMPARISON: dict[str, Any] = yaml.safe_load("""
title: Momentum
see: The curves.
variants: {momentum: [optimizer=sgd], plain: [optimizer.momentum=0]}
along: {optimizer.lr: [0.01, 0.1, 1]}
seeds: [0, 1, 2]
metrics: [train_loss]
claims:
- {claim: Momentum is faster, metric: train_loss, lower: momentum, than: plain, factor: 2}
""")


def changed(change: Callable[[dict[str, Any]], object]) -> bool:
    other = copy.deepcopy(COMPARISON)
    change(other)
    return claims_hash(other) != claims_hash(COMPARISON)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it["claims"][0].update(factor=1.99),
        lambda it: it["claims"][0].update(claim="Momentum is slower"),
        lambda it: it["claims"][0].update(at={"optimizer.lr": 0.1}),
        lambda it: it["claims"].pop(),
        lambda it: it["along"].update({"optimizer.lr": [0.01, 0.1]}),
        lambda it: it["variants"]["plain"].append("optimizer.nesterov=true"),
        lambda it: it.update(choose="val_loss"),
    ],
)
def test_a_changed_text_margin_or_grid_changes_the_hash(change: Callable[[dict[str, Any]], object]) -> None:
    assert changed(change)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.update(title="T", see="S", seeds=[7], metrics=["val_loss"], x="step"),
        lambda it: it["claims"][0].update(claim="Momentum  is\nfaster", factor=2.0, when_not=None),
        lambda it: it["along"].update({"optimizer.lr": [0.01, 0.1, 1.0]}),
        lambda it: it.update(choose=None, variants=dict(reversed(it["variants"].items()))),
    ],
)
def test_presentation_order_and_seeds_do_not(change: Callable[[dict[str, Any]], object]) -> None:
    assert not changed(change)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_results_are_those_of_the_recipes_claims(name: str) -> None:
    """Fails after a change of a claim, a margin or a grid; scripts/gallery NAME runs the recipe again."""
    saved = json.loads((GALLERY / f"{name}.json").read_text())
    assert saved["recipe_hash"] == saved["claims_hash"] == recipe_hash(saved["recipe"], None) is not None
    assert not is_changed(saved)
    comparison = yaml.safe_load(recipe_path(saved["recipe"], None).read_text())["comparison"]
    for claim in comparison["claims"]:
        margin = "factor" if "factor" in claim else "difference"
        claim[margin] *= 1.01
        claim[margin] += 0.001
    assert claims_hash(comparison) != saved["recipe_hash"]


def test_reads_claims_and_leaves_out_damaged_ones(tmp_path: Path) -> None:
    entry = {"claim": "A is lower", "verdict": "contradicted", "outcome": "1 against 2."}
    content: dict[str, Any] = {"claims": [entry, entry | {"verdict": 7}, None, {}], "changed_after_results": True}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    [claim] = read_claims(tmp_path)
    assert (claim.verdict, claim.changed) == ("contradicted", True)
    assert claims_lines([claim])[0] == "contradicted, changed after results: A is lower"
    for damaged in ("", "[]", json.dumps({"claims": 3, "recipe": ["x"], "recipe_hash": {}})):
        (tmp_path / "comparison.json").write_text(damaged)
        assert read_claims(tmp_path) == []
    assert not is_changed({"recipe": "no/such", "recipe_hash": "0"})
