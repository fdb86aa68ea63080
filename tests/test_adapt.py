"""LoRA: the layer against its closed form, and runs that fine-tune with it."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.adapt import adapted_layers, describe, lora, merged
from dlopt.basics.errors import UserError
from dlopt.commands.eval import evaluate
from dlopt.commands.export import export
from dlopt.models.linear import Linear
from dlopt.python.api import load
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.precision import Precision
from dlopt.training.builders.workload import build_workload, load_weights
from dlopt.training.checkpoint import checkpoints
from tests.support.equality import Cases, compare
from tests.support.gpt import CONTEXT, VOCABULARY, gpt
from tests.support.modes import DDP, FSDP
from tests.support.runs import assert_same_run, metrics, resume, run_config, start
from tests.support.sizes import MLP, SMALL

NET = ["model.norm=none", "model.widths=[12,12]"]
LORA = ["adapt=lora", "adapt.rank=2", "adapt.alpha=6", "adapt.targets=[layer1]", "adapt.train=[head]"]


def adapted(model: nn.Module, rank: int = 2, **changed: Any) -> nn.Module:
    keys: dict[str, Any] = {"alpha": 6.0, "dropout": 0.0, "targets": ["*"], "train": [], **changed}
    lora(model=model, generator=torch.Generator().manual_seed(0), rank=rank, **keys)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- the layer


def test_equation_3_and_its_gradients() -> None:
    base = nn.Linear(5, 4).double()
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    inputs = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    model = adapted(nn.Sequential(base))
    layer: Any = model[0]  # type: ignore[index]
    assert torch.equal(model(inputs), F.linear(inputs, weight, bias))  # bit for bit: B is zero
    a, b = layer.lora_a, layer.lora_b
    b.data.normal_()
    outputs = model(inputs)
    assert torch.allclose(outputs, inputs @ (weight + 6 / 2 * b @ a).T + bias, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(outputs)
    outputs.backward(upstream)
    # By hand: the gradient G of W' = W + 3 B A is upstream^T x; of B it is 3 G A^T, of A it is 3 B^T G.
    gradient = upstream.T @ inputs
    assert torch.allclose(b.grad, 3 * gradient @ a.T, rtol=1e-12)
    assert torch.allclose(a.grad, 3 * b.T @ gradient, rtol=1e-12)
    assert torch.allclose(inputs.grad, upstream @ (weight + 3 * b @ a), rtol=1e-12)  # type: ignore[arg-type]
    assert layer.weight.grad is None and layer.bias.grad is None
    state = merged(model.state_dict())
    assert [*state] == ["0.weight", "0.bias"] and torch.allclose(state["0.weight"], weight + 3 * b @ a, rtol=1e-13)


@pytest.mark.parametrize("kind", [nn.Linear, Linear])
@pytest.mark.parametrize("size", [16, 512])  # of which oneDNN, where dlopt's layer uses it, computes only the larger
def test_first_outputs_are_those_of_the_layer_bit_for_bit(kind: type[nn.Linear], size: int) -> None:
    layer, inputs = kind(size, size), torch.randn(32, size)
    expected = layer(inputs)
    assert torch.equal(adapted(nn.Sequential(layer))(inputs), expected)


def test_dropout_is_of_the_update_only() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 6)), dropout=0.5)
    inputs = torch.randn(3, 6)
    assert torch.equal(model(inputs), nn.Sequential.forward(model.eval(), inputs))  # type: ignore[arg-type]
    model.train()[0].lora_b.data.normal_()  # type: ignore[index, union-attr]
    assert not torch.equal(model(inputs), model(inputs))


def test_layers_of_a_gpt() -> None:
    """All but the last layer, whose weight is the embedding. Merged weights give the same outputs."""
    model = adapted(gpt())
    assert not hasattr(model.head, "lora_a")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    plain = gpt()
    plain.load_state_dict(merged(model.state_dict()))
    tokens = torch.randint(VOCABULARY, (2, CONTEXT))
    assert torch.allclose(plain(tokens), model(tokens), rtol=1e-9)
    layers = {name.rpartition(".")[0] for name in trainable(adapted(gpt(), targets=["block1"]))}
    assert layers == {"block1.attention.qkv", "block1.attention.project", "block1.mlp.up", "block1.mlp.down"}
    names = trainable(adapted(gpt(), targets=["*.qkv"], train=["block2.norm1", "*.bias"]))
    assert "block2.norm1.weight" in names and "block1.mlp.up.bias" in names and "block1.mlp.up.weight" not in names


def test_layer_decay_counts_an_adapter_as_part_of_its_layer() -> None:
    lines = [*SMALL, *NET, "adapt=lora", "adapt.rank=2", "optimizer.layer_decay=0.5", "optimizer.lr=1"]
    workload = build_workload(run_config(*lines))
    rates = {p: group["lr"] for group in build_optimizer(workload).param_groups for p in group["params"]}
    found = {name: rates[p] for name, p in workload.module.named_parameters() if p in rates}
    assert found["layer1.linear.lora_a"] == found["layer1.linear.lora_b"] == 0.25 and found["head.lora_b"] == 1.0


# -- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    start(folder, *SMALL, *NET, "epochs=2")
    return folder / "checkpoints" / "best.pt"


def weights(path: Path) -> dict[str, Tensor]:
    return dict(checkpoints.load(path).model)


def test_fine_tunes_tests_and_exports_a_plain_model(base: Path, tmp_path: Path) -> None:
    lines = [*SMALL, *NET, *LORA, f"init_from={base}", "epochs=2"]
    summary = start(tmp_path / "run", *lines)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    before, after = weights(base), weights(best)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert after["layer1.linear.lora_b"].abs().max() > 0
    # The model that `predict`, `export` and `sample` load has linear layers only.
    model = load(best)
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"LoRALinear"})
    workload = build_workload(run_config(*lines), checkpoints.load(best))
    workload.load(checkpoints.load(best))
    inputs = workload.dataset.test.fetch(torch.arange(64))  # type: ignore[union-attr]
    with torch.inference_mode():
        expected = workload.module.eval()(workload.normalize(inputs).float())
        assert torch.allclose(model(inputs), expected, rtol=0, atol=1e-6)
    (tmp_path / "run" / "config.yaml").write_text("")
    assert evaluate([f"checkpoint={best}"]) == 0
    assert export([f"checkpoint={best}", "format=safetensors", f"output={tmp_path / 'model.safetensors'}"]) == 0
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "model.safetensors")
    names = {name.removeprefix("model.") for name in exported if name.startswith("model.")}
    assert names == set(before)
    # A further run starts from the merged weights, with or without adapters of its own.
    for more in ([], LORA):
        module = build_workload(run_config(*SMALL, *NET, *more)).module
        [line] = load_weights(module, best)
        assert "6 of 6 tensors loaded" in line
        assert torch.equal(module.state_dict()["layer1.linear.weight"], merged(after)["layer1.linear.weight"])
    assert summary["status"] == "finished" and len(metrics(tmp_path / "run")) == 2


def test_first_loss_is_that_of_the_base(base: Path) -> None:
    inputs = torch.randn(9, 1, 8, 8)
    outputs = []
    for more in ([], LORA):
        module = build_workload(run_config(*SMALL, *NET, *more, "init_seed=5")).module.eval()
        load_weights(module, base)
        outputs.append(module(inputs))
    assert torch.equal(*outputs)


def test_adapters_do_not_change_the_random_weights_of_the_model() -> None:
    plain, other = (build_workload(run_config(*SMALL, *NET, *more)).module.state_dict() for more in ([], LORA))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_resumed_run_is_bitwise_identical(base: Path, tmp_path: Path) -> None:
    lines = [*SMALL, *NET, *LORA, "adapt.dropout=0.2", f"init_from={base}", "epochs=2", "ema=0.9"]
    start(tmp_path / "whole", *lines)
    start(tmp_path / "parts", *lines, "max_time=0.0001")
    resume(tmp_path / "parts", *lines)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


CASES: Cases = {
    "ddp": (
        [*MLP, *LORA, "model.norm=none", "adapt.dropout=0.2", "data.batch_size=35", "accumulate=2", "steps=4"],
        DDP,
    ),
    "fsdp": (
        [*MLP, *LORA, "model.norm=none", "data.batch_size=35", "steps=4", "ema=0.9", "clip=norm", "clip.max_norm=0.5"],
        [*FSDP],
    ),
}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)


@pytest.mark.slow
def test_compiled_run_equals_eager_run(tmp_path: Path) -> None:
    lines = [*SMALL, *NET, *LORA, "epochs=2", "precision=fp64"]
    losses = [start(tmp_path / str(flag), *lines, f"compile={flag}")["best_val_loss"] for flag in ("false", "true")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_describes_the_trainable_parameters() -> None:
    module = build_workload(run_config(*SMALL, *NET, *LORA)).module
    # 64-12-12-10 units: layer1 has 2 * (64 + 12) adapter weights; the head has 130 parameters.
    assert describe(module) == "LoRA of rank 2 in 1 linear layer: trains 282 of 1,218 parameters (23.15%)"
    assert describe(nn.Linear(2, 2)) is None


def test_rules_of_the_optimizer_apply_afterwards() -> None:
    rules = "optimizer.groups=[{match: '*.bias', freeze: false}, {match: 'head.*', freeze: true}]"
    names = trainable(build_workload(run_config(*SMALL, *NET, *LORA, rules)).module)
    assert names == {"layer1.linear.lora_a", "layer1.linear.lora_b", "layer1.linear.bias", "layer2.linear.bias"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["adapt.targets=[stem]"], r"^adapt\.targets=\[stem\]: matches no linear layer .* has layer1\.linear"),
        (["adapt.train=[tail]"], r"^adapt\.train=\[tail\]: matches no parameter; the model has layer1\.linear\.weight"),
        (["adapt.targets=[head]"], r"^adapt\.targets=\[head\]: no layer to adapt is left; .* not in adapt\.train"),
        (["adapt.rank=0"], r"^adapt\.rank=0: .* allowed: an integer >= 1"),
    ],
)
def test_refusals(lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_workload(run_config(*SMALL, *NET, *LORA, *lines))


# -- precision


@pytest.mark.parametrize(("alpha", "rank"), [(5.0, 3), (1.0, 3), (0.7, 11)])
def test_the_scale_is_exact_in_every_dtype(alpha: float, rank: int) -> None:
    inputs = torch.randn(4, 16, dtype=torch.float64)
    model = adapted(nn.Sequential(nn.Linear(16, 12)), rank, alpha=alpha)
    for convert in (nn.Module.bfloat16, nn.Module.float, nn.Module.double):
        assert adapted_layers(convert(model))[0].lora_scale.item() == alpha / rank
    placed = Precision("fp64", torch.device("cpu")).place(adapted(nn.Sequential(nn.Linear(16, 12)), rank, alpha=alpha))
    layer: Any = placed[0]  # type: ignore[index]
    layer.lora_b.data.normal_()
    weight, a, b = (each.detach().numpy() for each in (layer.weight, layer.lora_a, layer.lora_b))
    expected = weight + alpha / rank * (b @ a)
    error = abs(merged(placed.state_dict())["0.weight"].numpy() - expected).max()
    assert error < 1e-15
    outputs = (placed(inputs) - layer.bias).detach().numpy()
    assert abs(outputs - inputs.numpy() @ expected.T).max() < 1e-14


@pytest.mark.parametrize("fraction", [0.05, 0.005])
def test_merging_keeps_a_small_update_of_bf16(fraction: float) -> None:
    """Against NumPy in float64."""
    model = Precision("bf16_pure", torch.device("cpu")).place(adapted(nn.Sequential(nn.Linear(64, 48)), 4))
    layer: Any = model[0]  # type: ignore[index]
    layer.lora_b.data.normal_()
    update = 6 / 4 * layer.lora_b.double() @ layer.lora_a.double()
    layer.lora_b.data *= (fraction * layer.weight.double().norm() / update.norm()).item()
    weight, a, b = (each.detach().double().numpy() for each in (layer.weight, layer.lora_a, layer.lora_b))
    update = 6 / 4 * b @ a
    result = merged(model.state_dict())["0.weight"]
    error = result.double().numpy() - weight - update
    assert result.dtype == torch.float32
    assert numpy.linalg.norm(error) < 1e-5 * numpy.linalg.norm(update)


def test_layers_with_several_names_have_no_adapter() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = adapted(nn.Sequential(layer, other, layer))
    assert type(model[0]) is nn.Linear and hasattr(model[1], "lora_a")  # type: ignore[index]


def test_bf16_pure_evaluates_exports_and_loads_the_whole_update(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lines = [*SMALL, *NET, *LORA, f"init_from={base}", "epochs=1", "precision=bf16_pure", "optimizer=sgd"]
    start(tmp_path / "run", *lines)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    checkpoint = checkpoints.load(best)
    model = checkpoint.model
    weight, a, b = (model[f"layer1.linear.{name}"].double() for name in ("weight", "lora_a", "lora_b"))
    update = 6 / 2 * b @ a
    assert model["layer1.linear.weight"].dtype == torch.bfloat16 and update.norm() > 0
    with pytest.warns(UserWarning, match=r"precision=bf16_pure: using fp32, because bf16 would round the merged"):
        loaded = load(best)
    assert export([f"checkpoint={best}", "format=safetensors", f"output={tmp_path / 'w.safetensors'}"]) == 0
    for found in (loaded.module.state_dict()["layer1.linear.weight"],
                  load_file(tmp_path / "w.safetensors")["model.layer1.linear.weight"]):  # fmt: skip
        assert found.dtype == torch.float32
        assert (found.double() - weight - update).norm() < 1e-5 * update.norm()
    workload = build_workload(run_config(*lines), checkpoint)
    workload.load(checkpoint)
    inputs = workload.dataset.test.fetch(torch.arange(64))  # type: ignore[union-attr]
    with torch.inference_mode():
        evaluated = workload.module.eval()(workload.normalize(inputs).bfloat16()).float()
        assert torch.allclose(loaded(inputs), evaluated, rtol=0, atol=0.02 * evaluated.abs().max().item())
    assert evaluate([f"checkpoint={best}"]) == 0


def test_loads_fp64_without_rounding(tmp_path: Path) -> None:
    start(tmp_path / "run", *SMALL, *NET, "epochs=1", "precision=fp64")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    checkpoint, model = checkpoints.load(best), load(best)
    assert all(torch.equal(value, checkpoint.model[name]) for name, value in model.module.state_dict().items())
    assert all(torch.equal(value, checkpoint.normalize[name]) for name, value in model.normalize.state_dict().items())
