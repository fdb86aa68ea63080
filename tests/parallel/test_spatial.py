"""Models with feature maps sharded by rows against the same models on one process."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.lab.scaling.communication import Traffic
from dlopt.parallel.modes.model_parallel import all_reduce_buckets
from dlopt.parallel.modes.spatial import split_rows
from tests.support.ranks import run_ranks
from tests.support.split_models import FirstOf, build, compare, join_all, train_step

MODELS = {
    "basic": ["model=resnet20", "model.depth=8", "model.dropout=0.2"],
    "plain": ["model=plain20", "model.depth=8", "model.norm=none"],
    "wide": ["model=wrn_16_4", "model.depth=10", "model.widen=1", "model.dropout=0.3"],
    "alexnet": ["model=alexnet", "model.hidden=32", "model.norm=batch"],
    "locally connected": ["model=locally_connected", "model.channels=[4,8]", "model.dropout=0.2"],
    "mlp": ["model=mlp", "model.widths=[12,8]", "model.dropout=0.3", "model.norm=batch"],
}
VGG = {"vgg": ["model=vgg11_bn", "model.dropout=0.3"]}


def all_models(names: list[str], shape: list[int]) -> None:
    compare({name: build(*(MODELS | VGG)[name], shape=tuple(shape)) for name in names}, split_rows, shape)


@pytest.mark.slow
def test_uneven_strips_and_ranks_without_rows(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_spatial:all_models", 4, tmp_path, ["basic", "alexnet"], [2, 11, 7])


@pytest.mark.slow
def test_four_ranks_match_single_process(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_spatial:all_models", 4, tmp_path, [*MODELS, *VGG], [2, 16, 16])


def bytes_of_a_step() -> None:
    """Bytes sent in one training step by three models with layers of 4 feature maps of 16x16 pixels."""
    model_group, shape, channels = join_all(), (2, 16, 16), 4
    torch.manual_seed(0)
    convolutional = nn.Sequential(
        *(nn.Conv2d(2, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(channels * 256, 10)),
    )
    locally_connected = ["model=locally_connected", "model.channels=[4,4]", "model.stride=1", "model.norm=none"]
    dense = ["model=mlp", "model.widths=[1024,1024]", "model.norm=none"]
    models = {
        "convolution": convolutional,
        "local": build(*locally_connected, shape=shape),
        "dense": build(*dense, shape=shape),
    }
    sent = {}
    for name, model in models.items():
        plan = split_rows(model, shape, model_group)
        named = dict(model.named_parameters())
        with Traffic() as traffic:
            train_step(model, torch.randn(6, *shape))
            all_reduce_buckets([named[name].grad for name in plan.partial_grads], model_group.process_group)  # type: ignore[misc]
        sent[name] = traffic.sent / 4
    row, features, logits = channels * 16, channels * 256, 10
    shared = 2 * 4 * 9 + 4 + 4 * 4 * 9 + 4
    assert sent == {
        "local": 6 * (2 * row + logits),  # one boundary row before the second layer, and its gradient
        "convolution": 6 * (2 * row + logits) + shared,  # plus the gradients of the replicated filters
        "dense": 6 * (features + logits),  # half the features in forward, half the gradients in backward
    }


def run_all() -> None:
    bytes_of_a_step()
    all_models(list(MODELS), [2, 8, 8])


def test_two_ranks_match_single_process_and_send_only_boundary_rows(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_spatial:run_all", 2, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=resnet20", "model.norm=group"],
            "parallel=spatial: stem.1 is a GroupNorm, which averages over all pixels of a map, but each rank",
        ),
        (
            ["model=locally_connected"],
            "parallel=spatial: the 4 rows of filters of layer1.0 cannot be divided evenly among 3 processes",
        ),
        (["model=vit"], "parallel=spatial: embedding is a PatchEmbedding, which is not supported"),
        (["model=two_column_alexnet"], "parallel=spatial: the model is a TwoColumnAlexNet, which is not supported"),
    ],
)
def test_unsupported_models_raise_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        split_rows(build(*overrides), (2, 8, 8), FirstOf(3))
