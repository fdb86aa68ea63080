"""Models whose maps are cut into strips against the whole ones."""

from pathlib import Path

from dlopt.parallel.spatial import split_rows
from tests.parallel.models import build, compare
from tests.parallel.ranks import run_ranks

MODELS = {
    "basic": ["model=resnet20", "model.depth=8", "model.dropout=0.2"],
    "plain": ["model=plain20", "model.depth=8", "model.norm=none"],
    "wide": ["model=wrn_16_4", "model.depth=10", "model.widen=1", "model.dropout=0.3"],
    "vgg": ["model=vgg11_bn", "model.dropout=0.3"],
    "alexnet": ["model=alexnet", "model.hidden=32", "model.norm=batch"],
    "locally connected": ["model=locally_connected", "model.channels=[4,8]", "model.dropout=0.2"],
    "mlp": ["model=mlp", "model.widths=[12,8]", "model.dropout=0.3", "model.norm=batch"],
}


def all_models(names: list[str], shape: list[int]) -> None:
    compare({name: build(*MODELS[name], shape=tuple(shape)) for name in names}, split_rows, shape)


def test_split_models_equal_whole_ones(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_spatial:all_models", 2, tmp_path, list(MODELS), [2, 8, 8])


def test_uneven_strips_and_ranks_without_rows(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_spatial:all_models", 4, tmp_path, ["basic", "vgg"], [2, 11, 7])
