"""Models that read the weight of an adapted layer instead of calling it, in any mode, and adapters that never train."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.adapt import lora
from dlopt.basics.errors import UserError
from dlopt.tasks.classification import Classification
from dlopt.training.builders.adapter_check import check_adapters
from dlopt.training.builders.precision import Precision
from tests.support.runs import run_config


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.relu(self.hidden(self.norm(self.first(inputs)))))
        return outputs

    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(x)


class Reads(Net):
    """As timm's BEiT, EVA and Swin V2."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.linear(x, self.middle.weight, self.middle.bias)


class Multiplies(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return x @ self.middle.weight.data.T


class ReadsInEvaluation(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(x) if self.training else F.linear(x, self.middle.weight, self.middle.bias)


class ReadsAlso(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(x) + F.linear(x, self.middle.weight)


class CallsTheFunction(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self.middle, x)


class Fuses(Net):
    def train(self, mode: bool = True) -> "Fuses":
        if not mode:
            self.fused = self.middle.weight.T.contiguous()
        return super().train(mode)

    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(x) if self.training else x @ self.fused


class OwnProjection(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.MultiheadAttention(8, 2, batch_first=True)  # type: ignore[assignment]
        self.middle.out_proj = nn.Linear(8, 8)

    def hidden(self, x: Tensor) -> Tensor:
        tokens = x[:, None]
        return self.middle(tokens, tokens, tokens)[0][:, 0]


class WithoutGradient(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.norm(self.first(inputs))
        return self.head(self.middle(hidden))


class Unused(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return x


class OnlyInEvaluation(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return x if self.training else self.middle(x)


class OnlyInTraining(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(x) if self.training else x


class SkippedAtRandom(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < 0.5 else self.middle(x)


class CalledTwice(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(self.middle(x))


class ReadsNoValues(Net):
    def hidden(self, x: Tensor) -> Tensor:
        weight = self.middle.weight.data
        return self.middle(x.to(weight.dtype) + weight.new_zeros(8) + torch.zeros_like(weight)[0])


class Listed(Net):
    """Calls the layer by a reference that no module has, with a hook that scales its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.middle]
        self.middle.register_forward_hook(lambda module, inputs, output: 2 * output)

    def hidden(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Encoder(Net):
    """With torch's fused kernels in evaluation mode; a padding mask makes its encoder use nested tensors, too."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def hidden(self, x: Tensor) -> Tensor:
        tokens = x[:, None].repeat(1, 3, 1) * torch.arange(1, 4)[:, None]
        mask = torch.tensor([[False, False, True]]).expand(len(x), 3) if self.masked else None
        return self.middle(self.encoder(tokens, src_key_padding_mask=mask)[:, 0])


def adapted(model: nn.Module, **changed: Any) -> nn.Module:
    keys: dict[str, Any] = {"rank": 2, "alpha": 2.0, "dropout": 0.0, "targets": ["*"], "train": [], **changed}
    lora(model=model, generator=torch.Generator().manual_seed(0), **keys)
    return model


def check(model: nn.Module, precision: str = "fp32") -> None:
    placed = Precision(precision, torch.device("cpu"))
    check_adapters(run_config("adapt=lora"), placed.place(adapted(model)), placed, (6,), Classification(6))


EFFECT = (
    r"adapt=lora: adapters of {} have no effect where the model reads the weight of the layer instead of calling it"
)
UPDATE = r"adapt=lora: adapters of {} would never train, because they get no gradient"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Reads, f"{EFFECT.format('middle')}; set adapt.targets=[first,head]"),
        (Multiplies, EFFECT.format("middle")),
        (ReadsInEvaluation, EFFECT.format("middle")),
        (ReadsAlso, EFFECT.format("middle")),
        (CallsTheFunction, EFFECT.format("middle")),
        (Fuses, EFFECT.format("middle")),
        (OwnProjection, EFFECT.format("middle.out_proj")),
        (WithoutGradient, f"{UPDATE.format('first')}; set adapt.targets=[middle,head]"),
        (Unused, UPDATE.format("middle")),
        (OnlyInEvaluation, UPDATE.format("middle")),
    ],
)
def test_refuses_adapters_without_effect(kind: type[nn.Module], message: str, precision: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check(kind(), precision)


@pytest.mark.parametrize(
    "kind", [Net, OnlyInTraining, SkippedAtRandom, CalledTwice, ReadsNoValues, Listed, Encoder, lambda: Encoder(True)]
)
def test_accepts_adapters_that_are_used_and_changes_nothing(kind: type[Net]) -> None:
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training and "forward" not in vars(model.middle)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_the_blocks_by_a_pattern() -> None:
    model = nn.Sequential(*(Reads() for _ in range(6)))
    for each in model:
        each.head = nn.Linear(8, 6)  # type: ignore[union-attr]
    with pytest.raises(
        UserError, match=r"0.middle, 1.middle, 2.middle, 3.middle and 2 more .*targets=\[\*.first,\*.he"
    ):
        check(model)


def test_reports_a_check_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    check(nn.Sequential(nn.Linear(5, 2)))
    assert "no check whether the model uses its adapters, because it fails for 2 random samples" in caplog.text


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_uses_the_adapters_of_torchs_encoder(masked: bool) -> None:
    """The outputs without gradients are those of the same weights in training mode, without dropout."""
    torch.manual_seed(0)
    model = adapted(Encoder(masked), targets=["encoder"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    model.norm.eval()  # type: ignore[union-attr, operator]
    inputs = torch.randn(4, 6)
    expected = model(inputs)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(inputs), expected, atol=1e-5)


def test_adapted_layers_keep_their_hooks_and_references() -> None:
    model, inputs = Listed().eval(), torch.randn(4, 6)
    expected = model(inputs)
    layer = model.middle
    adapted(model)
    assert model.middle is layer and torch.equal(model(inputs), expected)
    nn.init.normal_(layer.lora_b)  # type: ignore[arg-type]
    assert not torch.equal(model(inputs), expected)
