"""Activation checkpointing: the same run with fewer activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.instruments.layers import LayerProbe
from dlopt.instruments.model_summary import kept_for_backward
from dlopt.models.layers import frozen_statistics
from dlopt.models.mlp import MLP as MLPModel
from dlopt.training import graphed_update
from dlopt.training.builders.recompute import recompute, repeated_blocks
from dlopt.training.builders.workload import Workload, build_workload
from tests.support.gpt import CONTEXT, VOCABULARY, gpt
from tests.support.runs import assert_same_run, run_config, start
from tests.support.sizes import BASE, MLP, RESNET, without

CPU = torch.device("cpu")
VIT = [*BASE, "model=vit", "model.width=12", "model.depth=3", "model.dropout=0.3", "data.batch_size=32", "epochs=2"]


def text(folder: Path) -> list[str]:
    path = folder / "a.txt"
    path.write_text("\n".join(f"def f{number}(x): return {number}" for number in range(60)))
    return [
        *without(BASE, "data.subset", "data.val_split"), "data=text", f"data.file={path}", "data.sequence_length=12",
        "data.batch_size=30", "model=gpt_nano", "model.width=16", "model.heads=4", "model.depth=3",
        "model.dropout=0.2", "optimizer=adamw", "optimizer.lr=0.01", "steps=8",
    ]  # fmt: skip


RUNS = {
    "resnet": [*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "ema=0.9"],
    "vit": VIT,
    "sam": [*RESNET, "data.batch_size=48", "optimizer=sam", "steps=3"],
}


@pytest.mark.parametrize(("name", "setting"), [("resnet", "blocks"), ("vit", "all"), ("sam", "all")])
def test_run_is_bitwise_identical(tmp_path: Path, name: str, setting: str) -> None:
    """With dropout, batch norm, micro-batches, and an optimizer that evaluates the loss twice."""
    lines = without(RUNS[name], "optimizer.momentum", "optimizer.weight_decay") if name == "sam" else RUNS[name]
    start(tmp_path / "plain", *lines)
    start(tmp_path / "recomputed", *lines, f"activation_checkpointing={setting}")
    assert_same_run(tmp_path / "plain", tmp_path / "recomputed")


@pytest.mark.parametrize("setting", ["blocks", "all"])
def test_text_run_is_bitwise_identical(tmp_path: Path, setting: str) -> None:
    lines = text(tmp_path)
    start(tmp_path / "plain", *lines)
    start(tmp_path / "recomputed", *lines, f"activation_checkpointing={setting}")
    assert_same_run(tmp_path / "plain", tmp_path / "recomputed")


@pytest.mark.parametrize(
    "choices", [["optimizer=newton_cg"], ["optimizer=lbfgs"], ["optimizer=newton_cg", "adapt=lora"]]
)
def test_optimizers_that_differentiate_twice(tmp_path: Path, choices: list[str]) -> None:
    """Their backward passes also run where batch norm counts again; an adapter's scale is a buffer in the graph."""
    lines = [*MLP, "model.widths=[5,5,5]", *choices, "steps=3"]
    lines = [line for line in lines if not line.startswith("optimizer.lr")]
    start(tmp_path / "plain", *lines)
    start(tmp_path / "recomputed", *lines, "activation_checkpointing=all")
    assert_same_run(tmp_path / "plain", tmp_path / "recomputed")


def bytes_kept(model: nn.Module, inputs: torch.Tensor) -> int:
    with kept_for_backward(model) as saved:
        model(inputs).sum().backward()
    return sum(saved.values())


def test_keeps_the_inputs_of_blocks_only() -> None:
    tokens = torch.randint(VOCABULARY, (8, CONTEXT))
    deep, deeper = gpt(depth=6), gpt(depth=12)
    plain = bytes_kept(gpt(depth=12), tokens) - bytes_kept(gpt(depth=6), tokens)
    for model in (deep, deeper):
        recompute(model, "blocks", choice="model=gpt")
    block_input = 8 * CONTEXT * 12 * 8  # fp64
    assert bytes_kept(deeper, tokens) - bytes_kept(deep, tokens) == 6 * block_input
    assert plain > 6 * 16 * block_input


def test_keeps_the_inputs_of_segments() -> None:
    """Segments of two layers: of 12 + 3 layers in 4 segments, three keep their inputs, and the last one all."""
    tokens = torch.randint(VOCABULARY, (8, CONTEXT))
    model = gpt(depth=13)
    whole = bytes_kept(model, tokens)
    recompute(model, "all", choice="model=gpt")
    assert bytes_kept(model, tokens) < whole / 3


def test_names_state_and_evaluation_stay() -> None:
    plain, model = gpt(dropout=0.1), gpt(dropout=0.1)
    recompute(model, "blocks", choice="model=gpt")
    assert list(plain.state_dict()) == list(model.state_dict())
    tokens = torch.randint(VOCABULARY, (2, CONTEXT))
    with torch.no_grad():
        assert torch.equal(plain.eval()(tokens), model.eval()(tokens))


class SpectralBlock(nn.Module):
    """A layer whose buffers change in every forward pass, and whose output depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.layer(inputs).tanh()


def test_buffers_that_enter_the_output() -> None:
    gradients, states = [], []
    for setting in ("none", "blocks"):
        torch.manual_seed(0)
        model = nn.Sequential(SpectralBlock(), SpectralBlock()).double()
        recompute(model, setting, choice="model=custom")  # type: ignore[arg-type]
        for _ in range(2):
            model(torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        states.append(model.state_dict())
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_backward_outside_of_frozen_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    recompute(model, "all", choice="model=custom")
    with frozen_statistics(model):
        loss = model(torch.randn(5, 3)).square().sum()
    loss.backward()
    assert all(int(m.num_batches_tracked) == 0 for m in model if isinstance(m, nn.BatchNorm1d))
    assert all(m.track_running_stats and m.momentum == 0.1 for m in model if isinstance(m, nn.BatchNorm1d))


def test_diagnostics_record_each_activation_once() -> None:
    calls = []
    for setting in ("none", "blocks"):
        model = gpt()
        recompute(model, setting, choice="model=gpt")  # type: ignore[arg-type]
        probe = LayerProbe(model)
        with probe.recording():
            model(torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))).sum().backward()
        calls.append([(each.name, each.calls, each.inputs.mean, each.gradients.norm) for each in probe.layers])
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["model=resnet20"], [f"stage{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]),
        (["model=preact_resnet20"], [f"stage{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]),
        (["model=vit", "model.width=12", "model.depth=2"], ["block1", "block2"]),
        (["model=residual_mlp", "model.blocks=2"], ["block1", "block2"]),
        (["model=mlp"], []),
        (["model=vgg11"], []),
    ],
)
def test_blocks_of_models(lines: list[str], names: list[str]) -> None:
    module = workload(*lines).module
    known = {layer: name for name, layer in module.named_modules()}
    assert [known[block] for block in repeated_blocks(module)] == names


def workload(*lines: str) -> Workload:
    return build_workload(run_config("data.subset=40", "device=cpu", "threads=1", *lines))


class WithBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)])


def test_attribute_blocks() -> None:
    """As in timm's transformers."""
    model = WithBlocks()
    assert repeated_blocks(model) == list(model.blocks)


def test_a_model_that_is_no_sequence() -> None:
    with pytest.raises(
        UserError, match=r"^activation_checkpointing=all: model=custom is not a sequence of layers; use"
    ):
        recompute(WithBlocks(), "all", choice="model=custom")


def test_cuda_graphs_do_not_record_it() -> None:
    arguments: Any = {
        "input_shape": (4,), "classes": 2, "widths": [3, 3], "activation": "relu", "dropout": 0.0, "norm": "none",
        "norm_affine": True, "norm_groups": 1, "norm_ghost_batch": None, "norm_eps": 1e-5, "norm_momentum": 0.1,
    }  # fmt: skip
    model = MLPModel(**arguments)
    assert graphed_update.layer_obstacle(model) is None
    recompute(model, "all", choice="model=mlp")
    assert "activation checkpointing" in str(graphed_update.layer_obstacle(model))
