from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.choices import names

CONF = Path(__file__).parents[2] / "conf" / "model"
CHOICES = names("model")
SHAPES = {"polynomial": (1,), "two_column_alexnet_224": (3, 224, 224)}

DEEP = {"resnet110", "resnet101"}
# Small models of all families: other keys of a choice, and the shape of a sample.
FAMILIES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "mlp": (["widths=[16,12]", "activation=tanh"], (1, 8, 8)),
    "residual_mlp": (["width=16", "blocks=2", "activation=tanh"], (1, 8, 8)),
    "resnet20": (["depth=8"], (1, 16, 16)),
    "plain20": (["depth=8"], (1, 16, 16)),
    "resnet18": ([], (1, 16, 16)),
    "resnet50": ([], (1, 16, 16)),
    "wrn_16_4": (["depth=10", "widen=1"], (3, 8, 8)),
    "preact_resnet20": (["depth=8"], (3, 8, 8)),
    "preact_resnet20, bottlenecks": (["depth=11", "block=bottleneck"], (3, 8, 8)),
    "vgg11": ([], (1, 28, 28)),
    "vgg11_bn": ([], (1, 8, 8)),
    "airbench94": (["widths=[4,4,4]"], (3, 32, 32)),
    "alexnet": (["hidden=32"], (1, 16, 16)),
    "two_column_alexnet": (["hidden=32"], (1, 16, 16)),
    "locally_connected": ([], (1, 8, 8)),
    "vit": (["width=12", "depth=2", "heads=2", "dropout=0.1"], (1, 8, 12)),
    "vit, norms after the sums": (["width=12", "depth=2", "heads=2", "pre_norm=false"], (1, 8, 12)),
    "rnn": (["layers=2", "hidden=16", "dropout=0.1"], (3, 8, 6)),
    "lstm": (["layers=2", "hidden=16", "dropout=0.1"], (3, 8, 6)),
}
LARGE = {"resnet18", "resnet50", "vgg11"}  # initialized in half a second; their blocks are those of other families
NORMS = ["batch", "layer", "group", "instance", "none"]
UNSUPPORTED = {(name, "instance") for name in ("mlp", "residual_mlp", "vgg11", "vgg11_bn")}
UNSUPPORTED |= {(name, kind) for name in ("rnn", "lstm") for kind in ("batch", "group", "instance")}
CASES = [(name, kind) for name in FAMILIES for kind in NORMS if (name, kind) not in UNSUPPORTED]


@pytest.mark.parametrize(
    "choice", [pytest.param(choice, marks=[pytest.mark.slow] if choice in DEEP else []) for choice in CHOICES]
)
def test_every_choice_builds_on_meta_and_maps_a_batch_to_outputs(build: Callable[..., nn.Module], choice: str) -> None:
    if choice == "timm":
        pytest.importorskip("timm")
    shape = SHAPES.get(choice, (3, 32, 32))
    vocabulary = 7 if choice.startswith("gpt") else None
    with torch.device("meta"):
        model = build(choice, input_shape=shape if vocabulary is None else (16,), classes=7, vocabulary=vocabulary)
        if vocabulary is None:
            assert model(torch.empty(2, *shape)).shape == (2, 7)
        else:
            for samples in (2, 0):  # 0: the shard of a rank that gets none of the last batch
                assert model(torch.zeros(samples, 16, dtype=torch.int64)).shape == (samples, 16, 7)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert choice in ("timm", "torchvision") or isinstance(model.get_submodule("head"), nn.Linear)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_forward_and_backward_with_every_norm(build: Callable[..., nn.Module], name: str, kind: str) -> None:
    keys, shape = FAMILIES[name]
    counts = []
    for affine in ("true", "false"):
        overrides = [*keys, f"norm={kind}", f"norm_affine={affine}"]
        is_counted_only = name in LARGE and affine == "false"
        with torch.device("meta" if is_counted_only else "cpu"):
            model = build(name.partition(",")[0], *overrides, input_shape=shape, classes=3)
        if not is_counted_only:
            check_gradients(model, name, shape)
            check_an_empty_shard(model, shape)
        norms = [module for module in model.modules() if hasattr(module, "eps")]
        counts.append((len(norms), sum(1 for module in norms for _ in module.parameters(recurse=False))))
        biases = [module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert "resnet" not in name or any(biases) == (kind == "none")
    assert counts == ([(0, 0)] * 2 if kind == "none" else [(counts[0][0], 2 * counts[0][0]), (counts[0][0], 0)])
    assert kind == "none" or counts[0][0] > 0


def check_gradients(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    samples = 2 if "resnet" in name else 5
    output = model(torch.randn(samples, *shape))
    assert output.shape == (samples, 3)
    output.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any() or "mlp" not in name, parameter_name


def check_an_empty_shard(model: nn.Module, shape: tuple[int, ...]) -> None:
    model.zero_grad()
    output = model(torch.empty(0, *shape))
    assert output.shape == (0, 3)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_first_line_of_every_choice_describes_it() -> None:
    assert {name.partition(",")[0] for name in FAMILIES} < set(CHOICES)
    for choice in CHOICES:
        assert (CONF / f"{choice}.yaml").read_text().splitlines()[0].startswith("# "), choice
