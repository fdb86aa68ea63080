import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.training.precision import Precision, bf16_slowdown, choose_precision
from tests.support.runs import metrics, start
from tests.support.sizes import SMALL

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "weights", "outputs"),
    [
        ("fp32", torch.float32, torch.float32),
        ("tf32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_dtypes(name: str, weights: torch.dtype, outputs: torch.dtype) -> None:
    precision = choose_precision(name, CPU)
    assert precision.dtype == weights
    layer = nn.Linear(3, 2).to(precision.dtype)
    result = precision.autocast(layer)(torch.randn(4, 3, dtype=precision.dtype))
    assert result.dtype == outputs
    result.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == weights
    assert not torch.is_autocast_enabled("cpu")
    assert precision.scaler() is None


@pytest.mark.parametrize("name", ["fp32", "tf32", "fp64"])
def test_fp32_has_no_wrapper(name: str) -> None:
    layer = nn.Linear(3, 2)
    assert Precision(name, CPU).autocast(layer) is layer


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_selects_bf16_if_supported(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.training.precision._has_bf16", lambda device: has_it)
    assert choose_precision("auto", CPU).name == ("bf16" if has_it else "fp32")


@pytest.mark.parametrize("limit", ["AVX512_CORE", "avx2"])
def test_a_limit_of_the_instruction_set_is_regarded(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert Precision("bf16", CPU).is_emulated and not Precision("fp32", CPU).is_emulated
    assert choose_precision("auto", CPU).name == "fp32"


class Costly(nn.Module):
    """Takes 12 s of its own clock under autocast, otherwise 1 s, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.clock = [0.0]

    def __deepcopy__(self, memo: Any) -> "Costly":
        copied = Costly.__new__(Costly)
        nn.Module.__init__(copied)
        copied.layers, copied.clock = copy.deepcopy(self.layers, memo), self.clock
        return copied

    def forward(self, inputs: Tensor) -> Tensor:
        self.clock[0] += 12 if torch.is_autocast_enabled("cpu") else 1
        outputs: Tensor = self.layers(inputs)
        return outputs


def test_slowdown_of_bf16_is_measured_without_side_effects() -> None:
    module, inputs, targets = Costly(), torch.randn(20, 3), torch.randint(4, (20,))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    assert bf16_slowdown(module, nn.CrossEntropyLoss(), inputs, targets, lambda: module.clock[0]) == 12
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.get_rng_state().equal(random)


def test_emulated_bf16_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [*SMALL, "precision=bf16", "epochs=1", "augmentation=crop_flip", "model.dropout=0.3"]
    start(tmp_path / "fast", *keys)
    monkeypatch.setattr("dlopt.training.precision._has_bf16", lambda device: False)
    monkeypatch.setattr("dlopt.training.reporting.bf16_slowdown", lambda *arguments: 12.34)
    start(tmp_path / "slow", *keys)
    log = (tmp_path / "slow" / "train.log").read_text()
    assert log.count("takes 12.3 times as long as fp32 (measured); use precision=fp32") == 1
    assert log.index("12.3") < log.index("epoch 1")
    assert metrics(tmp_path / "slow")[0]["train_loss"] == metrics(tmp_path / "fast")[0]["train_loss"]


@pytest.mark.gpu
def test_float16_scales_the_loss() -> None:
    precision = choose_precision("fp16", torch.device("cuda"))
    scaler = precision.scaler()
    assert scaler is not None and precision.dtype == torch.float32
    layer = nn.Linear(3, 2, device="cuda")
    assert precision.autocast(layer)(torch.randn(4, 3, device="cuda")).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "allowed"), [("tf32", True), ("fp32", False), ("bf16", False)])
def test_tf32_is_enabled_by_its_precision_only(name: str, allowed: bool) -> None:
    choose_precision(name, torch.device("cuda"))
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
