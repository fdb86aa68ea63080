"""Parameter groups: rules by name, decay of norms and biases, layer-wise learning rates."""

from typing import Any

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.optim import Muon
from dlopt.optim.parameters import Grouping, Rule, parameter_groups

ARGUMENTS = {"lr": 0.1, "weight_decay": 0.01}


@pytest.fixture
def model() -> nn.Sequential:
    parts = {"stem": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    built = nn.Sequential()
    for name, part in parts.items():
        built.add_module(name, part)
    return built


def groups(model: nn.Module, *rules: Rule, decay: bool = True, layer_decay: float | None = None) -> dict[str, dict]:
    """Name of each parameter -> the settings of its group."""
    found = parameter_groups(
        model,
        Grouping(groups=list(rules), layer_decay=layer_decay),
        ARGUMENTS,
        decay_norm_and_bias=decay,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: {k: v for k, v in group.items() if k != "params"} for group in found for p in group["params"]}


def test_no_rules_give_one_group_in_model_order(model: nn.Module) -> None:
    found = parameter_groups(model, Grouping(groups=[], layer_decay=None), ARGUMENTS, decay_norm_and_bias=True)
    assert found == [{"params": list(model.parameters())}]


def test_norms_and_biases_without_decay(model: nn.Module) -> None:
    found = groups(model, decay=False)
    exempt = {name for name, group in found.items() if group == {"weight_decay": 0.0}}
    assert exempt == {"stem.bias", "norm.weight", "norm.bias", "hidden.bias", "head.bias"}
    assert all(found[name] == {} for name in set(found) - exempt)


def test_rules_multiply_and_match_by_pattern(model: nn.Module) -> None:
    found = groups(model, Rule(match="head.*", lr=10.0), Rule(match="*.bias", weight_decay=0.0, lr=0.5))
    assert found["head.weight"] == pytest.approx({"lr": 1.0})
    assert found["head.bias"] == pytest.approx({"lr": 0.5, "weight_decay": 0.0})
    assert found["stem.weight"] == {}


def test_freezes_all_but_the_head(model: nn.Module) -> None:
    found = groups(model, Rule(match="*", freeze=True), Rule(match="head.*", freeze=False))
    assert set(found) == {"head.weight", "head.bias"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_layer_decay(model: nn.Module) -> None:
    found = groups(model, layer_decay=0.5)
    rates = {name: group.get("lr", 0.1) for name, group in found.items()}
    assert rates == pytest.approx(
        {
            "stem.weight": 0.025, "stem.bias": 0.025, "norm.weight": 0.025, "norm.bias": 0.025,
            "hidden.weight": 0.05, "hidden.bias": 0.05, "head.weight": 0.1, "head.bias": 0.1,
        }
    )  # fmt: skip


def test_groups_have_their_own_learning_rates(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rules = [Rule(match="stem*", freeze=True), Rule(match="head.*", lr=10.0)]
    found = parameter_groups(model, Grouping(groups=rules, layer_decay=None), ARGUMENTS, decay_norm_and_bias=True)
    optimizer = torch.optim.SGD(found, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p).mean().item() for name, p in model.named_parameters()}
    assert moved["stem.weight"] == 0
    assert moved["hidden.weight"] == pytest.approx(0.1, rel=1e-4)
    assert moved["head.weight"] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("rules", "arguments", "message"),
    [
        ([Rule(match="tail.*", lr=2.0)], ARGUMENTS, "tail"),
        ([Rule(match="*", freeze=True)], ARGUMENTS, "frozen"),
        ([Rule(match="head.*", lr=2.0)], {}, "no lr"),
        ([Rule(match="head.*", weight_decay=2.0)], {"lr": 0.1}, "no weight_decay"),
        ([Rule(match="head.*", rest=True)], ARGUMENTS, r"groups\.0\.rest=true: this optimizer has a single method"),
    ],
)
def test_rejects_rules_without_effect(
    model: nn.Module, rules: list[Rule], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parameter_groups(model, Grouping(groups=rules, layer_decay=None), arguments, decay_norm_and_bias=True)


def test_horizon_and_rest(model: nn.Module) -> None:
    arguments = {"lr": 0.2, "weight_decay": 0.0, "rest": "sgd", "rest_lr": 0.1}
    rules = [Rule(match="head.weight", rest=True, lr=3.0), Rule(match="stem.bias", horizon=0.5)]
    found = parameter_groups(model, Grouping(groups=rules, layer_decay=None), arguments, decay_norm_and_bias=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    special = {names[g["params"][0]]: {k: v for k, v in g.items() if k != "params"} for g in found if len(g) > 1}
    assert special == {"head.weight": pytest.approx({"lr": 0.6, "use_muon": False}), "stem.bias": {"horizon": 0.5}}
    optimizer = Muon(found, lr=0.2, weight_decay=0.0, rest="sgd", rest_lr=0.1)
    [head] = [g for g in optimizer.param_groups if model.get_parameter("head.weight") in set(g["params"])]
    assert head["use_muon"] is False and head["lr"] == pytest.approx(0.3)  # three times rest_lr
    [bias] = [g for g in optimizer.param_groups if model.get_parameter("stem.bias") in set(g["params"])]
    assert bias["horizon"] == 0.5


def test_optimizer_without_weight_decay(model: nn.Module) -> None:
    found = parameter_groups(model, Grouping(groups=[], layer_decay=None), {"lr": 0.1}, decay_norm_and_bias=False)
    assert all("weight_decay" not in group for group in found)


def test_embeddings_count_as_norm_and_bias() -> None:
    class Tied(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False))
            self[3].weight = self[0].weight

    model = Tied()
    arguments = {"lr": 0.1, "weight_decay": 0.2}
    groups = parameter_groups(model, Grouping(groups=[], layer_decay=None), arguments, decay_norm_and_bias=False)
    assert [len(group["params"]) for group in groups] == [4, 1]
    assert groups[1]["params"][0] is model[1].weight and groups[0]["weight_decay"] == 0.0


def test_biases_of_attention_are_biases() -> None:
    found = groups(nn.MultiheadAttention(4, 2), decay=False)
    assert {name for name, group in found.items() if group} == {"in_proj_bias", "out_proj.bias"}


TIMM = [
    "vit_tiny_patch16_224", "vit_little_patch16_reg4_gap_256", "deit_tiny_distilled_patch16_224", "cait_xxs24_224",
    "convnext_atto", "convnextv2_atto", "swin_tiny_patch4_window7_224", "mixer_s32_224", "efficientnet_b0", "resnet18",
    "xcit_nano_12_p16_224",
]  # fmt: skip


@pytest.fixture(scope="module")
def timm_models() -> dict[str, nn.Module]:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return {name: timm.create_model(name, pretrained=False) for name in TIMM}


def decayed(found: list[dict[str, Any]], model: nn.Module, default: float) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group.get("weight_decay", default) for group in found for p in group["params"]}


@pytest.mark.parametrize("name", TIMM)
def test_decay_equals_the_groups_of_timm(name: str, timm_models: dict[str, nn.Module]) -> None:
    from timm.optim import param_groups_weight_decay

    model = timm_models[name]
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    expected = decayed(param_groups_weight_decay(model, 0.2, no_weight_decay_list=listed), model, 0.2)
    found = groups(model, decay=False)
    assert {parameter: 0.2 if not group else group["weight_decay"] for parameter, group in found.items()} == expected
    assert 0 < sum(value == 0 for value in expected.values()) < len(expected)


@pytest.mark.parametrize("name", TIMM)
def test_layer_decay_equals_the_scales_of_timm(name: str, timm_models: dict[str, nn.Module]) -> None:
    """All parameters of the input stage (patches, class token, positions) have one rate, and each block."""
    from timm.optim import param_groups_layer_decay

    model = timm_models[name]
    names = {parameter: each for each, parameter in model.named_parameters()}
    scales = {
        names[p]: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.75) for p in group["params"]
    }  # fmt: skip
    rates = {each: group.get("lr", 0.1) for each, group in groups(model, layer_decay=0.75).items()}
    assert rates == pytest.approx({each: 0.1 * scale for each, scale in scales.items()}, rel=1e-12)


class Foreign(nn.Module):
    """Parameters as other packages have them, without `no_weight_decay`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 1, (1, 4))  # [1, 1, 1, 4]: a weight, although it has the shape of a gain
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.grn = nn.ParameterDict({name: nn.Parameter(torch.zeros(1, 1, 1, 4)) for name in ("gamma", "beta")})
        self.layer_scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.rms = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(4))})
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.recurrent = nn.LSTM(4, 4)
        self.slope = nn.PReLU(4)
        self.out = nn.Linear(4, 1)  # [1, 4]


class Lists(Foreign):
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "grn.*"}


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Lists()


def test_parameters_of_foreign_models() -> None:
    decays = {"patches.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "out.weight"}
    assert {name for name, group in groups(Foreign(), decay=False).items() if not group} == decays
    # A list is complete, as in timm: what it does not name decays from two dimensions on.
    listed = decays | {"cls_token", "layer_scale"}
    assert {name for name, group in groups(Lists(), decay=False).items() if not group} == listed
    wrapped = groups(Wraps(), decay=False)
    assert {name for name, group in wrapped.items() if not group} == {f"body.{name}" for name in listed}
