"""`init_from` of models and files that have one tensor under several names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.training.builders.workload import load_weights
from dlopt.training.checkpoint.shared_weights import complete_shared
from tests.support.gpt import CONTEXT, VOCABULARY, gpt

PAIR = ("embedding.tokens.weight", "head.weight")


def outputs(model: nn.Module) -> Tensor:
    tokens = torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(tokens)


def other_gpt(**changed: Any) -> nn.Module:
    model = gpt(**changed)
    for parameter in model.parameters():
        parameter.data.mul_(-0.7)
    return model


def saved(path: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, path)
    return path


@pytest.mark.parametrize("lost", [(), PAIR[:1], PAIR[1:]])
def test_one_of_the_copies_is_enough(tmp_path: Path, lost: tuple[str, ...]) -> None:
    source, target = gpt(), other_gpt()
    weights = {name: value for name, value in source.state_dict().items() if name not in lost}
    [line] = load_weights(target, saved(tmp_path / "w.pt", weights), complete=True)
    count = len(source.state_dict())
    assert f" {count} of {count} tensors loaded" in line
    assert torch.equal(outputs(target), outputs(source))


def test_safetensors_without_the_second_copy(tmp_path: Path) -> None:
    source, target = gpt(), other_gpt()
    save_model(source, str(tmp_path / "w.safetensors"))
    load_weights(target, tmp_path / "w.safetensors", complete=True)
    assert torch.equal(outputs(target), outputs(source))


def test_refuses_two_tensors_for_a_shared_one(tmp_path: Path) -> None:
    path, target = saved(tmp_path / "w.pt", gpt(tied_embeddings=False).state_dict()), other_gpt()
    before = outputs(target)
    with pytest.raises(UserError, match=r"(embedding\.tokens\.weight|head\.weight) and (?!\1).* are one shared tensor"):
        load_weights(target, path)
    larger = {**gpt().state_dict(), PAIR[0]: torch.ones(VOCABULARY + 1, 12)}
    with pytest.raises(UserError, match=r"head\.weight and embedding\.tokens\.weight are one shared tensor"):
        load_weights(target, saved(path, larger))
    assert torch.equal(outputs(target), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [0, 1])
def test_copies_may_differ_by_rounding(tmp_path: Path, dtype: torch.dtype, rounded: int) -> None:
    source, target = gpt(), other_gpt()
    weights = source.state_dict()
    weights[PAIR[rounded]] = weights[PAIR[rounded]].to(dtype)
    load_weights(target, saved(tmp_path / "w.pt", weights), complete=True)
    assert torch.equal(outputs(target), outputs(source)), "loads the copy of the higher precision"


def test_copies_of_a_file_in_a_model_without_shared_tensors(tmp_path: Path) -> None:
    source, target = gpt(), other_gpt(tied_embeddings=False)
    load_weights(target, saved(tmp_path / "w.pt", source.state_dict()), complete=True)
    assert torch.equal(outputs(target), outputs(source))
    for name in PAIR:
        weights = {key: value for key, value in source.state_dict().items() if key != name}
        lines = load_weights(target, saved(tmp_path / "w.pt", weights))
        assert lines[1] == f"  missing or with another shape, newly initialized: {name}"
        with pytest.raises(UserError, match=rf"an untrained part cannot be tested; .*: {name}$"):
            load_weights(target, tmp_path / "w.pt", complete=True)


class Autoencoder(nn.Module):
    """Shares a transposed weight, a layer under two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.middle = nn.Linear(3, 3)
        self.again = self.middle
        self.decoder = nn.Linear(3, 4)
        self.decoder.weight = nn.Parameter(self.encoder.weight.data.t())
        scale = torch.rand(3)
        self.register_buffer("scale", scale)
        self.middle.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.again(self.middle(self.encoder(x) * self.scale)))


@pytest.mark.parametrize("lost", ["decoder.weight", "encoder.weight", "again.weight", "middle.bias", "scale"])
def test_views_layers_and_buffers(tmp_path: Path, lost: str) -> None:
    source, target, inputs = Autoencoder(), Autoencoder(), torch.randn(2, 4)
    weights = {name: value for name, value in source.state_dict().items() if name != lost}
    [line] = load_weights(target, saved(tmp_path / "w.pt", weights), complete=True)
    assert " 11 of 11 tensors" in line and torch.equal(target(inputs), source(inputs))


@pytest.mark.parametrize("name", ["decoder.weight", "encoder.weight", "again.weight", "middle.bias", "middle.scale"])
def test_refuses_different_views_layers_and_buffers(tmp_path: Path, name: str) -> None:
    weights = Autoencoder().state_dict()
    with pytest.raises(UserError, match=rf"^init_from=.*{name}.* are one shared tensor in this model"):
        load_weights(Autoencoder(), saved(tmp_path / "w.pt", {**weights, name: weights[name] + 1e-3}))


def test_disjoint_parts_of_one_memory_are_not_shared() -> None:
    memory = torch.zeros(7)
    tensors = {"a": memory[:4].view(2, 2), "b": memory[4:6], "c": memory[6:]}
    weights = {"a": torch.ones(2, 2), "b": torch.full((2,), 2.0)}
    assert complete_shared(tensors, weights) == weights


def test_a_part_of_a_shared_tensor_determines_no_more() -> None:
    memory = torch.zeros(4)
    tensors = {"whole": memory, "part": memory[1:3]}
    assert list(complete_shared(tensors, {"part": torch.ones(2)})) == ["part"]
    result = complete_shared(tensors, {"whole": torch.arange(4.0)})
    assert result["part"].tolist() == [1, 2]
