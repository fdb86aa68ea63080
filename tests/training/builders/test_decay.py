"""Weight decay of a run: which optimizers and weights it is for, resumes, precisions and processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.optim.cautious_decay import CautiousDecay
from dlopt.training.builders.optimizer import build_optimizer, build_schedule
from dlopt.training.builders.workload import build_workload
from tests.support.equality import compare
from tests.support.lengths import constant
from tests.support.modes import FSDP
from tests.support.runs import run_config, small_workload
from tests.support.sizes import MLP, without

CAUTIOUS = "decay.cautious=true"
COUPLED = "needs an optimizer that subtracts lr \\* weight_decay \\* theta"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["optimizer=sgd", "decay=linear"], f"^decay=linear: {COUPLED} .*, which SGD with these keys does not; use"),
        (["optimizer=lamb", CAUTIOUS], f"^decay.cautious=true: {COUPLED} .* LAMB "),
        (["optimizer=lars", "decay=cosine"], f"^decay=cosine: {COUPLED} .* LARS "),
        (["optimizer=muon", "optimizer.rest=sgd", CAUTIOUS], f"^decay.cautious=true: {COUPLED} .* Muon "),
        (["optimizer=scion", "decay=independent"], f"^decay=independent: {COUPLED} .* Scion "),
        (["optimizer=sam", CAUTIOUS], f"^decay.cautious=true: {COUPLED} .* SAM "),
        (
            ["optimizer=adamw", "model.norm=none", "decay=corrected"],
            "^decay=corrected: .* trains none; use decay=const",
        ),
        (
            ["optimizer=scion", "model=mlp", "init=mup", "decay.width=inverse"],
            "^decay.width=inverse: Scion has no weight d",
        ),
    ],
)
def test_refusals(keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(small_workload(*keys))


def test_warns_of_a_change_of_no_decay(caplog: pytest.LogCaptureFixture) -> None:
    for decay, said in (("0.1", []), ("0", ["decay=linear: has no effect, because the weight decay is 0"])):
        build_optimizer(small_workload("optimizer=adamw", "decay=linear", f"optimizer.weight_decay={decay}"))
        assert [record.getMessage().partition(";")[0] for record in caplog.records] == said


def test_an_unknown_optimizer_must_say_that_its_decay_is_decoupled() -> None:
    class Theirs(torch.optim.AdamW):
        pass

    for keys in ([], ["decay=linear"]):
        workload = small_workload("optimizer=adamw", *keys)
        theirs = replace(workload.run_config.optimizer, target=Theirs, arguments={"lr": 0.1, "weight_decay": 0.1})
        workload.run_config = replace(workload.run_config, optimizer=theirs)
        if not keys:
            assert type(build_optimizer(workload)) is Theirs
            continue
        with pytest.raises(UserError, match=r"^decay=linear: Theirs does not say .*OptimizerTraits\(decoupled_decay=T"):
            build_optimizer(workload)


def test_the_default_changes_nothing() -> None:
    workload = small_workload("optimizer=adamw")
    optimizer = build_optimizer(workload)
    assert type(optimizer) is torch.optim.AdamW and not isinstance(optimizer, CautiousDecay)
    schedule = build_schedule(workload, optimizer, constant(40, 10))
    assert schedule.decay is None and set(schedule.state_dict()) == {"last_epoch", "base_lrs", "component"}
    assert "normalized" not in optimizer.param_groups[0]


def corrected(*keys: str) -> set[str]:
    workload = build_workload(run_config(*keys, "decay=corrected", "optimizer=adamw", "device=cpu", "threads=1"))
    groups = build_optimizer(workload).param_groups
    found = {p for group in groups if group.get("normalized") for p in group["params"]}
    return {name for name, p in workload.module.named_parameters() if p in found}


def test_corrects_what_a_normalization_layer_follows(tmp_path: Path) -> None:
    """Not the output layer, embeddings and vectors."""
    residual = corrected("model=resnet20", "model.depth=8", "data.subset=60")
    blocks = {f"stage{stage}.0.conv{number}.weight" for stage in (1, 2, 3) for number in (1, 2)}
    assert residual == {"stem.0.weight", *blocks}
    path = tmp_path / "a.txt"
    path.write_text("a short text\n" * 400)
    text = ["data=text", f"data.file={path}", "data.sequence_length=16", "model=gpt_nano", "model.depth=1"]
    matrices = {"qkv", "project", "up", "down"}
    names = corrected(*text, "model.tied_embeddings=false")
    assert {name.split(".")[-2] for name in names} == matrices and len(names) == 4


def test_width_of_mup() -> None:
    """The decay of an update, per weight: not at all or inversely by width, for both forms of the decay."""
    keys = ["model=mlp", "model.norm=none", "data.subset=60", "init=mup", "init.base_width=16", "device=cpu"]
    keys += ["optimizer=adamw", "optimizer.lr=0.01", "optimizer.weight_decay=0.1"]

    def per_update(width: int, *more: str) -> dict[str, float]:
        workload = build_workload(run_config(*keys, f"model.widths=[{width},{width}]", *more))
        optimizer = build_optimizer(workload)
        build_schedule(workload, optimizer, constant(40, 10)).step(20)
        products = {p: g["lr"] * g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        return {name: products[p] for name, p in workload.module.named_parameters()}

    for more in ([], ["decay=independent"]):
        base = per_update(16, *more)
        assert base == pytest.approx(dict.fromkeys(base, base["head.weight"]), rel=1e-14)
        assert per_update(64, *more) == pytest.approx(base, rel=1e-14)
        inverse = per_update(64, *more, "decay.width=inverse")
        for name, value in inverse.items():
            scaled = name in ("layer2.linear.weight", "head.weight")
            assert value == pytest.approx(base[name] / (4 if scaled else 1), rel=1e-14), name


def test_rounds_bf16_weights_after_the_decay() -> None:
    """One rounding per update, in which the decay is included: its expectation is exact."""
    workload = small_workload("optimizer=sgdw", "precision=bf16_pure", CAUTIOUS, "optimizer.weight_decay=0.01")
    optimizer = build_optimizer(workload)
    group: dict[str, Any] = optimizer.param_groups[0]
    p = next(p for p in group["params"] if p.ndim > 1)
    with torch.no_grad():
        p.fill_(1.0)
    p.grad = torch.ones_like(p)
    group["lr"] = lr = 0.01  # bf16 resolves 2^-8 below 1
    optimizer.step()
    # momentum=0.9 as an average
    assert p.double().mean().item() == pytest.approx(1 - lr * 0.1 - lr * 0.01, abs=1e-4)
    assert p.dtype == torch.bfloat16 and len(p.unique()) == 2


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Masks and decays of shards are those of the full weights."""
    keys = [*without(MLP, "optimizer.lr"), "model.norm=layer", "decay=corrected", CAUTIOUS, "schedule=cosine"]
    keys += ["optimizer.weight_decay=0.3", "data.batch_size=32", "epochs=3"]
    compare(tmp_path, 2, {name: ([*keys, f"optimizer={name}"], FSDP) for name in ("adamw", "muon")})
