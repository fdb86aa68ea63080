"""GPT against a plain float64 implementation, its cache, its sizes and its initialization."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.init import WidthGrowth, gpt2, mup
from dlopt.models import linear
from dlopt.models.gpt import GPT, KeyValueCache
from dlopt.models.linear import needs_padding
from tests.support.gpt import OPTIONS, gpt


def reference(model: GPT, tokens: list[int], options: dict[str, Any]) -> Tensor:
    """Returns the logits [T, V], written down token by token and head by head from the papers' formulas."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    zero = torch.zeros((), dtype=torch.float64)

    def linear(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", zero)

    def norm(name: str, x: Tensor) -> Tensor:
        if options.get("norm") == "rms":
            return x / ((x * x).mean() + 1e-5).sqrt() * weights[f"{name}.weight"]
        centred = x - x.mean()
        bias = weights.get(f"{name}.bias", zero)
        return centred / ((centred * centred).mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + bias

    def unit(x: Tensor) -> Tensor:
        return x / ((x * x).mean() + 1e-5).sqrt() if options.get("qk_norm") else x

    def turned(x: Tensor, position: int) -> Tensor:
        if options.get("positions") != "rotary":
            return x
        half = len(x) // 2
        pairs = torch.complex(x[:half], x[half:])
        angles = torch.tensor([position * 10000 ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
        pairs = pairs * torch.complex(angles.cos(), angles.sin())
        return torch.cat([pairs.real, pairs.imag])

    stream = [weights["embedding.tokens.weight"][token].clone() for token in tokens]
    if options.get("positions") != "rotary":
        stream = [x + weights["embedding.positions.weight"][t] for t, x in enumerate(stream)]
    for block in ("block1", "block2"):
        rows = [linear(f"{block}.attention.qkv", norm(f"{block}.norm1", x)) for x in stream]
        heads = [row.view(3, 3, 4) for row in rows]  # head, then q, k or v, then feature
        added = []
        for t in range(len(tokens)):
            outputs = []
            for head in range(3):
                q = turned(unit(heads[t][head, 0]), t)
                scores = [q @ turned(unit(heads[s][head, 1]), s) for s in range(t + 1)]
                scaled = torch.stack(scores) / (4 if options.get("attention_scale") == "linear" else 2)
                weight = scaled.exp() / scaled.exp().sum()
                outputs.append(sum((w * heads[s][head, 2] for s, w in enumerate(weight)), zero))
            added.append(linear(f"{block}.attention.project", torch.cat(outputs)))
        stream = [x + y for x, y in zip(stream, added, strict=True)]
        added = []
        for x in stream:
            y = norm(f"{block}.norm2", x)
            up = linear(f"{block}.mlp.up", y)
            if options.get("activation") == "swiglu":
                gate = linear(f"{block}.mlp.gate", y)
                hidden = gate / (1 + (-gate).exp()) * up
            elif options.get("activation") == "relu2":
                hidden = torch.stack([max(value, zero) ** 2 for value in up])
            else:
                hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
            added.append(linear(f"{block}.mlp.down", hidden))
        stream = [x + y for x, y in zip(stream, added, strict=True)]
    return torch.stack([linear("head", norm("norm", x)) for x in stream])


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_formulas(options: dict[str, Any]) -> None:
    model = gpt(**options)
    tokens = [3, 1, 4, 1, 5, 9, 2]
    torch.testing.assert_close(
        model(torch.tensor([tokens]))[0], reference(model, tokens, options), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("parts", [[3, 1, 1, 1, 1], [2, 3, 2]], ids=["token by token", "several tokens"])
def test_cached_logits_equal_uncached_ones(options: dict[str, Any], parts: list[int]) -> None:
    model = gpt(**options).eval()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [7, 2, 7, 1, 8, 2, 8]])
    caches = [KeyValueCache(), KeyValueCache()]
    cached = [model.next_logits(part, caches) for part in tokens.split(parts, dim=1)]
    last = [end - 1 for end in itertools.accumulate(parts)]
    torch.testing.assert_close(torch.stack(cached, 1), model(tokens)[:, last], rtol=1e-10, atol=1e-10)


def test_sizes() -> None:
    def parameters(choice: str, shape: tuple[int, ...], vocabulary: int) -> int:
        lines = [f"model={choice}"]
        run_config = parse(*to_plain(Composer().compose(lines)))
        with torch.device("meta"):
            model: nn.Module = run_config.model.build(input_shape=shape, classes=vocabulary, vocabulary=vocabulary)
        return sum(parameter.numel() for parameter in model.parameters())

    assert parameters("gpt2_small", (1024,), 50257) == 124_439_808  # Radford et al.'s smallest model, as published
    for name, millions in (("gpt_nano", 0.1), ("gpt", 0.9)):
        assert round(parameters(name, (256,), 256) / 1e6, 1) == millions


def test_gpt2_initialization() -> None:
    model = gpt(width=192, heads=3, depth=8, tied_embeddings=False)
    gpt2(model, torch.Generator().manual_seed(0), std=0.02, zero_last_gamma=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "norm" not in name:
            assert not parameter.any()
        elif "norm" not in name:
            scaled = name.endswith(("project.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if scaled else 1), rel=0.05), name
    gpt2(model, torch.Generator().manual_seed(0), std=0.02, zero_last_gamma=True)
    assert not model.block3.attention.project.weight.any()  # type: ignore[union-attr]


def test_refusals() -> None:
    for changed, message in (
        ({"heads": 5}, "model.heads=5: must divide model.width=12"),
        ({"heads": 12, "positions": "rotary"}, "model.positions=rotary"),
    ):
        with pytest.raises(UserError, match=message):
            gpt(**changed)
    with pytest.raises(UserError, match=r"model=gpt: reads text.*use data=python_source"):
        gpt(input_shape=(1, 8, 8), vocabulary=None)
    with pytest.raises(UserError, match=r"init=mup.*tied_embeddings=false"):
        growth = WidthGrowth(12, frozenset(), frozenset())
        mup(gpt(), torch.Generator(), growth=growth, std=0.02, base_width=32, zero_last_gamma=False)


@pytest.mark.parametrize(
    ("outputs", "on_cuda", "pads"),
    [(50_257, True, True), (50_257, False, False), (50_304, True, False), (50_264, True, False), (13, True, False)],
)
def test_a_large_head_that_is_not_aligned_is_padded_on_cuda(outputs: int, on_cuda: bool, pads: bool) -> None:
    layer = nn.Linear(4, outputs, device="meta")
    assert needs_padding(layer, SimpleNamespace(is_cuda=on_cuda)) is pads  # type: ignore[arg-type]


def test_a_compiled_head_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is on CUDA, but not in an exported program."""
    condition = linear.needs_padding
    as_on_cuda = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(linear, "needs_padding", lambda layer, _: condition(layer, as_on_cuda))  # type: ignore[arg-type]
    layer, graphs = linear.WideLinear(4, 1025), []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(layer, backend=record)(torch.zeros(2, 4))
    assert "pad" in graphs[0]
    for strict in (False, True):
        exported = torch.export.export(layer, (torch.zeros(2, 4),), strict=strict)
        assert "pad" not in str(exported.graph)


@pytest.mark.parametrize("changed", [{}, {"tied_embeddings": False}])
def test_a_padded_head_changes_no_number(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, with 13 tokens padded to 64: logits, loss, gradients; the names and shapes of the weights."""
    tokens = torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(0))
    results = []
    for pads in (False, True):
        monkeypatch.setattr(linear, "needs_padding", lambda *_, pads=pads: pads)
        model = gpt(**changed)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"logits": logits.detach(), "loss": loss.detach(), **gradients})
        products = {node.name() for node in _nodes(logits.grad_fn)}
        assert ("ConstantPadNdBackward0" in products) is pads
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def _nodes(start: Any) -> list[Any]:
    """Returns the nodes of an autograd graph."""
    nodes, waiting = [], [start]
    while waiting:
        nodes.append(node := waiting.pop())
        waiting += [each for each, _ in node.next_functions if each is not None and each not in nodes]
    return nodes
