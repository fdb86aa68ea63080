"""Golden losses: refactoring must not change them.

Three recipes in fp64, 30 updates each, the loss of every update. With other vector instructions (none, AVX2, AVX-512)
they differ by less than 1e-12. After a change that is meant to change them:

    REGENERATE_GOLDEN=1 python -m pytest tests/training/test_golden.py

rewrites tests/training/golden.json and skips; say in the commit which numbers moved and why.
"""

import json
import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dlopt.training.builders.workload import build_workload
from dlopt.training.nonfinite import NonFiniteCheck
from tests.support.runs import run_config, start

FILE = Path(__file__).with_name("golden.json")
COMMON = ["precision=fp64", "steps=30", "device=cpu", "threads=1", "tracking=[]", "data.workers=0", "seed=3"]
RECIPES = {
    "residual net, momentum, crops": [
        "model=resnet20", "optimizer=sgd", "optimizer.lr=0.02", "optimizer.weight_decay=1e-4",
        "decay_norm_and_bias=false", "schedule=cosine_warmup", "augmentation=crop_flip", "data.subset=80",
        "data.batch_size=12", "ema=0.9",
    ],
    "dropout, AdamW, accumulation, clipping": [
        "model=mlp", "model.widths=[16,16]", "model.dropout=0.2", "model.activation=tanh", "model.norm=none",
        "init=xavier_uniform", "optimizer=adamw", "optimizer.lr=0.01", "schedule=one_cycle", "clip=norm",
        "accumulate=3", "loss.label_smoothing=0.1", "data.subset=150", "data.batch_size=32",
    ],
    "L-BFGS, squared error": [
        "model=mlp", "model.widths=[8]", "model.norm=none", "model.activation=tanh", "init=xavier_uniform",
        # a line search would branch on the last bits
        "optimizer=lbfgs", "optimizer.max_iter=2", "optimizer.line_search_fn=null", "optimizer.lr=0.2",
        "schedule=constant", "loss=mse", "data.subset=100", "data.batch_size=full",
    ],
}  # fmt: skip


def losses(folder: Path, recipe: str) -> list[float]:
    found: list[float] = []
    see = NonFiniteCheck.examine

    def noted(self: NonFiniteCheck, loss: Tensor, *update: Any, **of_gradients: Any) -> None:
        found.append(float(loss))
        see(self, loss, *update, **of_gradients)

    weights = folder / "weights.pt"
    torch.save(exact_weights(*COMMON, *RECIPES[recipe]), weights)
    with patch.object(NonFiniteCheck, "examine", noted):
        start(folder, *COMMON, *RECIPES[recipe], f"init_from={weights}")
    return found


def exact_weights(*overrides: str) -> dict[str, Tensor]:
    """Initial weights from integers: random floats differ in their last bit between processors."""
    draws = torch.Generator().manual_seed(0)
    state = build_workload(run_config(*overrides)).module.state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            integers = torch.randint(-999, 1000, value.shape, generator=draws)
            state[name] = integers.double() / (600 * math.sqrt(value[0].numel()))
    return state


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_equal_the_golden_ones(tmp_path: Path, recipe: str) -> None:
    found = losses(tmp_path, recipe)
    assert len(found) == 30
    golden: dict[str, list[float]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("REGENERATE_GOLDEN"):
        golden[recipe] = found
        FILE.write_text(json.dumps({name: golden[name] for name in RECIPES if name in golden}, indent=1) + "\n")
        pytest.skip("rewritten")
    assert found == pytest.approx(golden[recipe], rel=1e-9, abs=0)
    assert found[-1] < found[0]
