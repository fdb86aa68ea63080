"""muP: rates and initial weights by width, the coordinate check, and refused combinations."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.init import mup
from dlopt.optim import SOAP, DistributedShampoo, Muon, Scion, Shampoo
from dlopt.optim.parameters import Grouping, Rule, parameter_groups
from dlopt.optim.traits import DECOUPLED
from dlopt.training.builders.mup import describe_rates, width_factors, width_growth
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from dlopt.training.progress import endless_batches
from tests.support.pages import ROOT
from tests.support.runs import run_config, start

TEXT = "\n".join(f"def f{number}(x):\n    return x + {number}" for number in range(300))
MLP = ("model=mlp", "model.norm=none", "data.subset=600", "data.batch_size=64", "threads=1", "device=cpu")
MUP = ("init=mup", "init.base_width=16", "tracking=[]")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT)
    return [
        "data=text", f"data.file={path}", "data.sequence_length=16", "data.batch_size=16", "model=gpt_nano",
        "model.depth=2", "model.heads=2", "model.tied_embeddings=false", "model.attention_scale=linear",
        "schedule=constant", "optimizer=adam", "optimizer.lr=0.003", "threads=1", "device=cpu",
    ]  # fmt: skip


def rates(*lines: str) -> dict[str, tuple[float, float]]:
    """Returns parameter name -> (learning rate, weight decay)."""
    workload = build_workload(run_config(*lines))
    groups = build_optimizer(workload).param_groups
    values = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: values[p] for name, p in workload.module.named_parameters()}


def test_learning_rates_of_a_gpt(gpt: list[str]) -> None:
    lines = [*gpt, *MUP, "optimizer=adamw", "optimizer.lr=0.01", "optimizer.weight_decay=0.1"]
    assert set(rates(*lines, "model.width=16").values()) == {(0.01, 0.1)}
    rule = "optimizer.groups=[{match: 'head.*', lr: 0.5}]"
    for name, (lr, decay) in rates(*lines, "model.width=64", rule).items():
        is_matrix = name.endswith(("qkv.weight", "project.weight", "up.weight", "down.weight", "head.weight"))
        expected = 0.01 / (4 if is_matrix else 1) / (2 if name == "head.weight" else 1)
        assert (lr, decay) == pytest.approx((expected, 0.4 if is_matrix else 0.1)), name
    workload = build_workload(run_config(*lines, "model.width=64", "decay.cautious=true"))
    assert workload.growth is not None
    described = partial(describe_rates, workload.module, build_optimizer(workload), workload.growth)
    assert described(16) == "muP: optimizer.lr / 4 for 9 hidden and output weights (width 64, init.base_width=16)"
    assert described(64) == "muP: optimizer.lr for all parameters (width 64, init.base_width=64)"
    assert described(128) == "muP: optimizer.lr * 2 for 9 hidden and output weights (width 64, init.base_width=128)"


def test_initial_weights_of_an_mlp() -> None:
    """The first layer reads pixels, whose number does not grow; the last one is the output."""
    workload = build_workload(run_config(*MLP, *MUP, "model.widths=[256,256]", "init.std=0.1"))
    spread = {name: p.std().item() for name, p in workload.module.named_parameters() if p.ndim == 2}
    expected = {"layer1.linear.weight": 0.1, "layer2.linear.weight": 0.1 / 4, "head.weight": 0.1 / 16}
    assert spread == pytest.approx(expected, rel=0.05)
    assert rates(*MLP, *MUP, "model.widths=[256,256]", "optimizer=lion", "optimizer.lr=0.1") == {
        "layer1.linear.weight": (0.1, 0.01), "layer1.linear.bias": (0.1, 0.01),
        "layer2.linear.weight": (0.1 / 16, 0.16), "layer2.linear.bias": (0.1, 0.01),
        "head.weight": (0.1 / 16, 0.16), "head.bias": (0.1, 0.01),
    }  # fmt: skip


def test_width_of_a_wide_resnet_is_in_channels() -> None:
    growth = build_workload(run_config("model=wrn_16_4", "model.depth=10", "data.subset=60", *MUP)).growth
    assert growth is not None and growth.width == 64
    assert growth.outputs == {"head.weight"} and not {"stem.weight", "stage1.0.conv1.weight"} & growth.hidden


def changes(lines: list[str], width: int, updates: int = 4) -> dict[str, float]:
    """Returns by how much (RMS) the output of each layer changes in a few updates, and the logits' own size."""
    trainer = probe_trainer(build_workload(run_config(*lines, f"model.width={width}")), Path())
    module = trainer.module
    inputs, _ = next(iter(trainer.batches.epoch(0)))

    def outputs() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.detach()}))
            for name, layer in layers.items()
        ]
        module(inputs)
        for hook in hooks:
            hook.remove()
        return seen

    before = outputs()
    for number, batch in enumerate(islice(endless_batches(trainer.batches, trainer.progress), updates)):
        trainer.run_update(batch, number)
    return {name: (after - before[name]).square().mean().sqrt().item() for name, after in outputs().items()}


class Net(nn.Module):
    """Every kind of layer: of which inputs, outputs, or both grow."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.embedding, self.input = nn.Embedding(8, width), nn.Linear(4, width)
        self.hidden, self.norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.head = nn.Linear(width, 3, bias=False)

    def forward(self, tokens: Tensor, inputs: Tensor) -> Tensor:
        hidden = self.hidden(torch.relu(self.embedding(tokens).mean(1) + self.input(inputs)))
        logits: Tensor = self.head(torch.relu(self.norm(hidden)))
        return logits


LAYERS = ("embedding", "input", "hidden", "norm", "head")
BASE, WIDTHS = 16, (16, 32, 64, 128)
REST = [Rule(match="embedding.*", rest=True), Rule(match="head.*", rest=True)]
MUON = {"lr": 0.02, "weight_decay": 0.1, "rest_lr": 0.003, "rest": "adamw"}
DMUON = {**MUON, "lr": 0.003, "rest_lr": None, "adjust_lr_fn": "match_rms_adamw"}
SCION = {"lr": 0.001, "radius": 20.0, "rest_radius": 20.0}
SHAMPOO = {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-4}
SOAP_KEYS = {"lr": 0.003, "weight_decay": 0.1}
Case = tuple[type[torch.optim.Optimizer], dict[str, Any], list[Rule]]
CASES: dict[str, Case] = {
    "adamw": (torch.optim.AdamW, SOAP_KEYS, []),
    "muon": (Muon, MUON, []),
    "muon, rest: true": (Muon, MUON, REST),
    "dmuon": (Muon, DMUON, []),
    "scion": (Scion, SCION, []),
    "scion, rest: true": (Scion, {**SCION, "constrained": False}, REST),
    "shampoo": (Shampoo, SHAMPOO, []),
    "shampoo, diagonal": (Shampoo, {**SHAMPOO, "max_size": 1}, []),
    "distributed_shampoo": (DistributedShampoo, {**SOAP_KEYS, "update_every": 2}, []),
    "soap": (SOAP, SOAP_KEYS, []),
    "soap, orthogonalize": (SOAP, {**SOAP_KEYS, "orthogonalize": True}, []),
}


def factors_of(case: Case, net: nn.Module, width: int, **decay: bool) -> tuple[dict[str, dict[str, float]], Any]:
    """Returns the factors, and a function of factors that builds the optimizer."""
    kind, keys, rules = case
    growth = width_growth(Component("model", Net, {"width": width}), {})

    def build(factors: dict[str, dict[str, float]] | None = None) -> torch.optim.Optimizer:
        grouping = Grouping(groups=rules, layer_decay=None)
        return kind(parameter_groups(net, grouping, keys, decay_norm_and_bias=True, factors=factors), **keys)

    return width_factors(net, build(), growth, BASE, keys, **decay), build


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", {"hidden": 1 / 4, "head": 1 / 4}),
        ("soap", {"hidden": 1 / 2, "head": 1 / 4}),
        ("distributed_shampoo", {"hidden": 1 / 4, "head": 1 / 4}),
        ("shampoo", {"head": 1 / 2, "embedding": 2, "input": 2, "norm": 2}),
        # sqrt(rows / columns) of [64, 4] is twice that of [16, 4]; [8, 64] has a factor of 1, as [8, 16]
        ("muon", {"head": 1 / 2, "embedding": 2}),
        ("muon, rest: true", {"head": 1 / 4}),
        ("dmuon", {"hidden": 1 / 2, "head": 1 / 4}),
        ("soap, orthogonalize", {"hidden": 1 / 2, "head": 1 / 4}),
        ("scion", {"embedding": 4}),
        ("scion, rest: true", {"embedding": 4}),
    ],
)
def test_factors_at_four_times_the_width(name: str, expected: dict[str, float]) -> None:
    """The step, and the decay of an update, which does not depend on the width or is inverse to it."""
    net, key = Net(width=4 * BASE), "radius" if name.startswith("scion") else "lr"
    factors, build = factors_of(CASES[name], net, 4 * BASE)
    found = {parameter: each[key] for parameter, each in factors.items() if key in each}
    assert {parameter.partition(".")[0]: each for parameter, each in found.items()} == pytest.approx(expected)
    groups = {p: group for group in build(factors).param_groups for p in group["params"]}
    if name == "muon":
        line = describe_rates(net, build(factors), width_growth(Component("model", Net, {"width": 64}), {}), BASE)
        scaled = "optimizer.lr / 2 for 1 output weight, optimizer.lr * 2 for 1 other parameter"
        assert line == f"muP: {scaled} (width 64, init.base_width=16)"
    inverse, build_inverse = factors_of(CASES[name], net, 4 * BASE, inverse=True)
    inverse_groups = {p: group for group in build_inverse(inverse).param_groups for p in group["params"]}
    base = {p: group for group in factors_of(CASES[name], net, BASE)[1]().param_groups for p in group["params"]}
    for parameter, p in net.named_parameters():
        if key == "radius":
            continue  # the decay is lr
        rate = found.get(parameter, 1.0)
        assert groups[p]["lr"] == pytest.approx(base[p]["lr"] * rate)
        product = base[p]["lr"] * base[p]["weight_decay"]
        assert groups[p]["lr"] * groups[p]["weight_decay"] == pytest.approx(product), parameter
        scale = 4 if parameter in ("hidden.weight", "head.weight") else 1
        assert inverse_groups[p]["lr"] * inverse_groups[p]["weight_decay"] == pytest.approx(product / scale), parameter
        if name == "shampoo":  # squared gradients: inputs / outputs
            eps = 1e-4 * {"hidden.weight": 1, "head.weight": 4}.get(parameter, 1 / 4)
            assert groups[p]["eps"] == pytest.approx(eps), parameter


def sizes(case: Case, width: int, *, scaled: bool) -> Tensor:
    """Returns the RMS by which two updates change the output of each layer, given its old input, and the logits."""
    net, draws = Net(width=width).double(), torch.Generator().manual_seed(0)
    growth = width_growth(Component("model", Net, {"width": width}), {})
    mup(net, draws, growth=growth, std=0.1, base_width=BASE, zero_last_gamma=False)
    factors, build = factors_of(case, net, width)
    optimizer = build(factors if scaled else None)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    draws.manual_seed(1)
    tokens = torch.randint(8, (128, 2), generator=draws)
    inputs = torch.randn(128, 4, generator=draws, dtype=torch.float64)
    labels, seen = (tokens[:, 0] + (inputs[:, 0] > 0)) % 3, dict[nn.Module, Any]()
    with torch.no_grad():
        hooks = [
            layer.register_forward_hook(lambda *each: seen.update({each[0]: each[1:]})) for layer in net.children()
        ]
        before = net(tokens[64:], inputs[64:])
        for hook in hooks:
            hook.remove()
    for half in (slice(0, 32), slice(32, 64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens[half], inputs[half]), labels[half]).backward()
        optimizer.step()
    with torch.no_grad():
        changes = [layer(*given) - output for layer, (given, output) in seen.items()]
        changes.append(net(tokens[64:], inputs[64:]) - before)
    return torch.stack([each.square().mean().sqrt() for each in changes])


@pytest.mark.parametrize("name", CASES)
def test_coordinate_check_by_optimizer(name: str) -> None:
    """Slopes of log(size of the changes) by log(width): near 0 with the factors, and far from it without.

    Measured: with them at most 0.24 from 0, or 0.41 where a diagonal of Shampoo is only an estimate.
    """
    logs = torch.tensor(WIDTHS, dtype=torch.float64).log()
    logs -= logs.mean()

    def slopes(*, scaled: bool) -> Tensor:
        found = torch.stack([sizes(CASES[name], width, scaled=scaled) for width in WIDTHS]).log()
        return logs @ found / logs.square().sum()

    tolerance = 0.5 if name == "shampoo, diagonal" else 0.3
    scaled, unscaled = slopes(scaled=True), slopes(scaled=False)
    described = dict(zip((*LAYERS, "logits"), zip(scaled.tolist(), unscaled.tolist(), strict=True), strict=True))
    assert scaled.abs().max() < tolerance, described
    assert unscaled.abs().max() > 0.45 and unscaled.abs().sum() > scaled.abs().sum() + 0.3, described


def test_coordinate_check(gpt: list[str]) -> None:
    """Yang et al. 2022, figure 5: outputs move equally at all widths with muP, and more the wider without it."""
    narrow, wide = (changes([*gpt, *MUP], width) for width in (16, 256))
    for name in narrow:
        assert 0.4 < wide[name] / narrow[name] < 2.5, (name, narrow[name], wide[name])
    standard = [changes([*gpt, "init=gpt2"], width) for width in (16, 256)]
    assert standard[1]["head"] > 5 * standard[0]["head"]


@pytest.mark.slow
def test_the_best_learning_rate_does_not_move_with_the_width(gpt: list[str]) -> None:
    """From width 16 to 128 it stays in a grid of 4x; with a standard initialization it moves."""

    def best(width: int, *init: str) -> float:
        ends = {}
        for rate in (2.0**-8, 2.0**-6, 2.0**-4):
            lines = *gpt, *init, "init.std=0.1", f"model.width={width}", f"optimizer.lr={rate}", "steps=60"
            trainer = probe_trainer(build_workload(run_config(*lines)), Path())
            losses = []
            for number, batch in enumerate(islice(endless_batches(trainer.batches, trainer.progress), 60)):
                trainer.run_update(batch, number)
                losses.append(trainer.train_metrics.since_last()["loss"])
            ends[rate] = sum(losses[-10:])
        return min(ends, key=ends.__getitem__)

    assert best(16, *MUP) == best(128, *MUP)
    assert best(16, "init=gpt2") > best(128, "init=gpt2")


def test_a_run_saves_its_rates(gpt: list[str], tmp_path: Path) -> None:
    lines = [*gpt, *MUP, "model.width=32", "steps=4"]
    assert math.isfinite(start(tmp_path / "run", *lines)["test_loss"])
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert sorted(group["initial_lr"] for group in state["optimizer"]["param_groups"]) == [0.0015, 0.003]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["model=mlp", "optimizer=sgd"],
            "init=mup: sets learning rates for Adam .*, not for SGD with these keys; use optimizer=adamw, .* scion",
        ),
        (["model=mlp", "optimizer=muon", "optimizer.rest=sgd"], "init=mup: .* not for Muon"),
        (
            ["model=mlp", "optimizer=muon", "optimizer.hyperball=true", "optimizer.weight_decay=0"],
            "init=mup: .* not for Muon",
        ),
        (["model=mlp", "optimizer=kron"], "init=mup: .* not for Kron"),
        (["model=mlp", "optimizer=sophia"], "init=mup: .* not for Sophia"),
        (["model=resnet18", "optimizer=adam"], "init=mup: model=dlopt.models.resnet.ResNet has no key for its width"),
        (["model=airbench94"], "init=mup: model=airbench94 already divides its outputs by its width"),
    ],
)
def test_refusals(extra: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(build_workload(run_config("data.subset=60", "device=cpu", *MUP, *extra)))


class TrustRatio(torch.optim.SGD):
    """Scales each step to the norm of its tensor: nobody says how its steps grow."""

    traits = replace(DECOUPLED, scope="tensor")


def test_decoupled_decay_does_not_say_how_steps_grow() -> None:
    config = run_config("data.subset=60", "device=cpu", *MUP, "model=mlp", "model.norm=none")
    config = replace(config, optimizer=Component("optimizer", TrustRatio, {"lr": 0.1, "weight_decay": 0.0}))
    with pytest.raises(UserError, match=r"^init=mup: .*TrustRatio"):
        build_optimizer(build_workload(config))


def test_the_best_rates_at_four_widths() -> None:
    """Of scripts/width_transfer.py: with muP within a factor of 2; without it, those of three move by 4."""
    measured = json.loads((ROOT / "docs/mup/results.json").read_text(encoding="utf-8"))
    assert set(measured) == {"adamw", "muon", "scion", "shampoo", "soap"}

    def range_of_exponents(widths: dict[str, dict[str, list[float | None]]]) -> int:
        best = []
        for losses in widths.values():
            means = {n: math.inf if None in each else sum(each) for n, each in losses.items()}
            best.append(int(min(means, key=means.__getitem__)))
            assert all(str(best[-1] + step) in losses for step in (-2, -1, 1, 2)), "not at the end of the grid"
        assert list(widths) == ["16", "32", "64", "128"]
        return max(best) - min(best)

    found = {name: {init: range_of_exponents(widths) for init, widths in of.items()} for name, of in measured.items()}
    assert all(each["mup"] <= 1 for each in found.values()), found
    assert all(found[name]["standard"] >= 2 for name in ("adamw", "muon", "soap")), found
