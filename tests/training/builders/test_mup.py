"""muP: rates and initial weights by width, the coordinate check, and refused combinations."""

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.training.builders.mup import describe_rates
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.workload import build_workload
from dlopt.training.progress import endless_batches
from dlopt.training.run import probe_trainer
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
    workload = build_workload(run_config(*lines, "model.width=64"))
    assert workload.growth is not None
    line = "muP: optimizer.lr / 4 for 9 hidden and output weights (width 64, init.base_width=16)"
    assert describe_rates(workload.growth, 16) == line
    assert "optimizer.lr / 1 for" in describe_rates(workload.growth, 64)
    assert "optimizer.lr * 2 for" in describe_rates(workload.growth, 128)


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
        trainer.update(batch, number)
    return {name: (after - before[name]).square().mean().sqrt().item() for name, after in outputs().items()}


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
                trainer.update(batch, number)
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
        (["model=mlp", "optimizer=sgd"], "init=mup: sets learning rates for Adam .* not for SGD; use optimizer=adamw"),
        (["model=mlp", "optimizer=muon"], "init=mup: .* not for Muon"),
        (["model=mlp", "optimizer=sophia"], "init=mup: .* not for Sophia"),
        (["model=resnet18", "optimizer=adam"], "init=mup: model=dlopt.models.resnet.ResNet has no key for its width"),
        (["model=airbench94"], "init=mup: model=airbench94 already divides its outputs by its width"),
    ],
)
def test_refusals(extra: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(build_workload(run_config("data.subset=60", "device=cpu", *MUP, *extra)))
