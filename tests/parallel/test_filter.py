"""Models split by filters against the same models on one process."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.lab.scaling.communication import Traffic
from dlopt.models.layers import GlobalAveragePool, Norm, NormKind
from dlopt.models.preact import PreActBlock, PreActBottleneck
from dlopt.models.resnet import BasicBlock, Bottleneck
from dlopt.parallel.modes.filter import Splitter, split_filters
from tests.support.ranks import run_ranks
from tests.support.split_models import FirstOf, build, compare, join_all

MODELS = {
    "options A": ["model=resnet20", "model.depth=8", "model.dropout=0.2"],
    "plain": ["model=plain20", "model.depth=8", "model.norm=none"],
    "groups": ["model=resnet20", "model.depth=8", "model.norm=group"],
    "layer norm": ["model=resnet20", "model.depth=8", "model.norm=layer"],
    "alexnet": ["model=alexnet", "model.hidden=32", "model.norm=batch"],
    "two columns": ["model=two_column_alexnet", "model.hidden=32"],
    "locally connected": ["model=locally_connected", "model.channels=[4,8]", "model.dropout=0.2"],
    "mlp": ["model=mlp", "model.widths=[12,8]", "model.dropout=0.3", "model.norm=batch"],
    "mlp, layer norm": ["model=mlp", "model.widths=[12,8]", "model.norm=layer"],
    "linear": ["model=mlp", "model.widths=[]"],
    "residual mlp": ["model=residual_mlp", "model.width=12", "model.blocks=2", "model.dropout=0.3"],
}  # fmt: skip
LARGE = {
    "wide": ["model=wrn_16_4", "model.depth=10", "model.widen=2", "model.dropout=0.3"],
    "pre-activation": ["model=preact_resnet20", "model.depth=8", "model.norm=instance", "model.dropout=0.3"],
    "pre-activation bottlenecks": ["model=preact_resnet20", "model.block=bottleneck", "model.depth=11"],
    "options B": ["model=resnet18"],
    "bottlenecks": ["model=resnet50"],
    "vgg": ["model=vgg11_bn", "model.dropout=0.3"],
}  # fmt: skip


def norm(kind: NormKind = "batch") -> Norm:
    return Norm(norm=kind, norm_affine=True, norm_groups=4, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1)


def small_blocks() -> dict[str, nn.Module]:
    """One model for each kind of block with a projection shortcut."""
    torch.manual_seed(0)

    def net(*blocks: nn.Module, channels: int) -> nn.Module:
        stem = nn.Conv2d(2, 8, 3, padding=1)
        return nn.Sequential(stem, *blocks, GlobalAveragePool(), nn.Linear(channels, 10))

    def option_b(kind: NormKind) -> nn.Module:
        projection = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=norm(kind).bias), norm(kind).maps(16))
        return BasicBlock(8, 16, 2, shortcut=projection, norm=norm(kind))

    projection = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    return {
        "option B": net(option_b("batch"), channels=16),
        "option B without norm": net(option_b("none"), channels=16),
        "bottleneck": net(Bottleneck(8, 4, 2, shortcut=projection, norm=norm()), channels=16),
        "pre-activation": net(PreActBlock(8, 16, 2, projection=True, dropout=0.3, norm=norm()), channels=16),
        "pre-activation bottleneck": net(
            PreActBottleneck(8, 8, 2, projection=True, dropout=0.3, norm=norm()), channels=32
        ),
    }


def all_models(names: list[str]) -> None:
    several = MODELS | LARGE
    models = {name: build(*several[name]) for name in names}
    compare({**(small_blocks() if "linear" in names else {}), **models}, split_filters)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "names"), [(2, list(LARGE)), (4, ["options A", "mlp", "wide", "linear"])])
def test_split_models_match_single_process(tmp_path: Path, processes: int, names: list[str]) -> None:
    run_ranks("tests.parallel.test_filter:all_models", processes, tmp_path, names)


def collectives_of_a_block() -> None:
    model_group = join_all()
    counts = []
    for name, block in small_blocks().items():
        split_filters(block, (2, 8, 8), model_group)
        maps, layer = torch.randn(3, 8, 8, 8, requires_grad=True), block[1]  # type: ignore[index]
        layer._forward_pre_hooks.popitem()  # the hook that gathers the stem's output
        with Traffic() as forward:
            outputs = layer(maps)
        with Traffic() as backward:
            outputs.sum().backward()
        counts.append((name, forward.collectives, backward.collectives))
    assert counts == [
        ("option B", 1, 1),
        ("option B without norm", 1, 1),
        ("bottleneck", 2, 2),
        ("pre-activation", 1, 1),
        ("pre-activation bottleneck", 2, 2),
    ]


def run_all() -> None:
    collectives_of_a_block()
    all_models(list(MODELS))


def test_two_ranks_match_single_process_with_one_collective_per_block_and_direction(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_filter:run_all", 2, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=resnet20", "model.depth=8"],
            "parallel=filter: the 16 filters of stem.0 cannot be divided evenly among 3 processes; use 2 or 4 or 8",
        ),
        (["model=mlp", "model.widths=[9,8]"], "parallel=filter: the 8 units of layer2.linear cannot be"),
        (["model=mlp", "model.widths=[]"], "parallel=filter: the 128 inputs of head cannot be"),
        (["model=vit"], "parallel=filter: embedding is a PatchEmbedding, which is not supported"),
    ],
)
def test_unsupported_models_raise_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        Splitter(FirstOf(3)).split(build(*overrides))


def test_unsupported_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"^parallel=filter: 1 is a Bilinear, which is not supported"):
        Splitter(FirstOf(3)).split(nn.Sequential(nn.Flatten(), nn.Bilinear(3, 3, 3)))
    with pytest.raises(UserError, match=r"^parallel=filter: 0 is a grouped convolution"):
        Splitter(FirstOf(3)).split(nn.Sequential(nn.Conv2d(6, 6, 1, groups=2)))
