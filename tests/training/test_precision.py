import pytest
import torch
from torch import nn

from dlopt.training.precision import Precision, choose_precision

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
