import pytest
import torch
from torch import Tensor, nn

from dlopt.adapt import LoRALinear
from dlopt.models.known import is_container, is_known, is_stochastic
from dlopt.parallel.dropout import CurrentShard, convert_dropout


class _OfUser(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * torch.rand(())


def _lora(dropout: float) -> nn.Module:
    layer = nn.Linear(2, 2)
    LoRALinear.adapt(layer, rank=1, alpha=1.0, dropout=dropout, generator=torch.Generator())
    return layer


def _global_dropout(p: float) -> nn.Module:
    model = nn.Sequential(nn.Dropout(p))
    convert_dropout(model, CurrentShard())
    return model


@pytest.mark.parametrize(
    ("model", "draws"),
    [
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), True),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), True),
        (nn.MultiheadAttention(2, 1), False),
        (nn.MultiheadAttention(2, 1, dropout=0.5), True),
        (nn.RReLU(), True),
        (_global_dropout(0.0), False),
        (_global_dropout(0.5), True),
        (_lora(dropout=0.0), False),
        (_lora(dropout=0.1), True),
        (_OfUser(), True),
    ],
)
def test_is_stochastic(model: nn.Module, draws: bool) -> None:
    assert is_stochastic(model) is draws
    assert all(map(is_known, model.modules())) is not isinstance(model, _OfUser)


def test_is_container() -> None:
    class Holder(nn.Module):
        pass

    class Block(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    assert all(map(is_container, (nn.Sequential(), nn.ModuleList(), nn.ModuleDict(), Holder())))
    assert not any(map(is_container, (Block(), nn.Linear(1, 1))))
