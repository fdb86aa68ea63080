"""The order in which layers compute decides what is a later layer, not the order in which they are registered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.models.order import forward_order, output_layer
from dlopt.optim.parameters import Grouping, normalized_weights, parameter_groups, unused_parameters
from dlopt.training.clipping import Adaptive


class Net(nn.Module):
    """Layers by name, registered in the order of `names`, and a forward pass."""

    def __init__(self, parts: dict[str, nn.Module | nn.Parameter], forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def rates(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Name of each parameter -> how many layers it is away from the last one."""
    groups = parameter_groups(
        model,
        Grouping(groups=[], layer_decay=0.5),
        {"lr": 1.0},
        decay_norm_and_bias=True,
        uses=forward_order(model, inputs),
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    distances = {2.0**-n: n for n in range(20)}
    return {names[p]: distances[group.get("lr", 1.0)] for group in groups for p in group["params"]}


def test_a_head_that_is_registered_first_is_the_last_layer() -> None:
    model = Net(
        {"head": nn.Linear(3, 2), "norm": nn.LayerNorm(3), "body": nn.Linear(4, 3)},
        lambda self, x: self.head(self.norm(self.body(x))),
    )
    inputs = torch.zeros(2, 4)
    assert rates(model, inputs) == {
        "head.weight": 0, "head.bias": 0, "norm.weight": 1, "norm.bias": 1, "body.weight": 1, "body.bias": 1,
    }  # fmt: skip
    assert normalized_weights(model, forward_order(model, inputs)) == {"body.weight"}
    clip = Adaptive(model, clipping=0.1, eps=0.0, uses=forward_order(model, inputs))
    assert clip.exempt == {*model.head.parameters()}


def test_norms_registered_before_their_convolutions() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.norm2(self.conv2(self.norm1(self.conv1(x)))).mean((2, 3)))

    model = Net(
        {
            "norm1": nn.BatchNorm2d(3), "conv1": nn.Conv2d(1, 3, 1), "norm2": nn.BatchNorm2d(2, affine=False),
            "conv2": nn.Conv2d(3, 2, 1), "head": nn.Linear(2, 2),
        },
        forward,
    )  # fmt: skip
    found = normalized_weights(model, forward_order(model, torch.zeros(2, 1, 4, 4)))
    assert found == {"conv1.weight", "conv2.weight"}


def test_the_last_mlp_of_a_post_norm_block_is_normalized() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x)[0])
        return self.head(self.norm2(x + self.mlp(x)))

    model = Net(
        {
            "norm1": nn.LayerNorm(4), "attention": nn.MultiheadAttention(4, 2, batch_first=True),
            "norm2": nn.LayerNorm(4), "mlp": nn.Linear(4, 4), "head": nn.Linear(4, 2),
        },
        forward,
    )  # fmt: skip
    found = normalized_weights(model, forward_order(model, torch.zeros(2, 3, 4)))
    assert found == {"attention.in_proj_weight", "attention.out_proj.weight", "mlp.weight"}


def test_weights_that_no_layer_is_called_for() -> None:
    """Fused kernels read the weights of layers, and a model may use a parameter itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.to(self.last)  # reads the type only
        return self.encoder(x @ self.first).mean(1) @ self.last

    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = Net(
        {"last": nn.Parameter(torch.ones(4, 2)), "encoder": encoder, "first": nn.Parameter(torch.eye(4))}, forward
    )
    found = rates(model, torch.zeros(2, 3, 4))
    order = ["first", "encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight", "encoder.linear1.weight"]
    assert [found[name] for name in (*order, "encoder.linear2.weight", "last")] == [5, 4, 3, 2, 1, 0]


def test_recurrent_tied_repeated_and_unused_layers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        states, _ = self.cell(self.tokens(x))
        return self.head(self.shared(self.shared(states)))

    tokens = nn.Embedding(5, 4)
    model = Net(
        {
            "shared": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "cell": nn.LSTM(4, 4, batch_first=True),
            "tokens": tokens, "head": nn.Linear(4, 5),
        },
        forward,
    )  # fmt: skip
    model.head.weight = tokens.weight
    inputs = torch.zeros(2, 3, dtype=torch.int64)
    found = rates(model, inputs)
    assert found["tokens.weight"] > found["cell.weight_ih_l0"] > found["shared.weight"] > found["unused.weight"] == 0
    uses = forward_order(model, inputs)
    assert unused_parameters(model, uses) == ["unused.weight", "unused.bias"]
    clip = Adaptive(model, clipping=0.1, eps=0.0, uses=uses)
    assert clip.exempt == {*model.head.parameters()}


def test_the_pass_changes_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.norm(x))) + torch.rand(2)

    parts = {"head": nn.Linear(3, 2), "norm": nn.BatchNorm1d(3), "drop": nn.Dropout(0.5)}
    model = Net({**parts}, forward)
    model.register_buffer("calls", torch.zeros(()))
    model.norm.eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    forward_order(model, torch.ones(4, 3)[:, :3][:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.norm.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("choice", ["mlp", "resnet20", "preact_resnet20", "vit", "lstm", "airbench94"])
def test_dlopts_models_register_layers_in_the_order_of_the_computation(choice: str, build: Any) -> None:
    model = build(choice, input_shape=(3, 32, 32), classes=4)
    uses = forward_order(model, torch.zeros(2, 3, 32, 32))
    grouping, keys = Grouping(groups=[], layer_decay=0.5), {"lr": 1.0}
    found, registered = (
        parameter_groups(model, grouping, keys, decay_norm_and_bias=True, uses=each) for each in (uses, None)
    )
    assert [{k: v for k, v in group.items() if k != "params"} for group in found] == [
        {k: v for k, v in group.items() if k != "params"} for group in registered
    ]
    assert [[*map(id, group["params"])] for group in found] == [[*map(id, group["params"])] for group in registered]
    assert normalized_weights(model, uses) == normalized_weights(model)


def _gated(head: nn.Module) -> Net:
    """A head, then a squeeze-and-excitation block whose gates are registered last and called before it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        maps = self.stem(x)
        gates = self.gate(self.squeeze(maps.mean((2, 3))).relu()).sigmoid()
        return self.head(maps * gates[:, :, None, None]).mean((2, 3))

    parts: dict[str, nn.Module | nn.Parameter] = {"head": head, "stem": nn.Conv2d(1, 4, 3)}
    return Net(parts | {"squeeze": nn.Linear(4, 2), "gate": nn.Linear(2, 4)}, forward)


def _tied() -> Net:
    tokens = nn.Embedding(5, 4)
    head = nn.Linear(4, 5)
    head.weight = tokens.weight
    return Net(
        {"head": head, "tokens": tokens, "mlp": nn.Linear(4, 4)}, lambda self, x: self.head(self.mlp(self.tokens(x)))
    )


def _functional() -> Net:
    parts = {"tokens": nn.Embedding(5, 4), "mlp": nn.Linear(4, 4)}
    return Net(parts, lambda self, x: self.mlp(self.tokens(x)) @ self.tokens.weight.T)


def _listed() -> Net:
    layers = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)])
    return Net({"layers": layers}, lambda self, x: self.layers[0](self.layers[1](self.layers[2](x))))


def _scaled() -> Net:
    """What follows the head has no matrix: a gain of each output, in a shape that broadcasts, and a norm of maps."""
    parts: dict[str, nn.Module | nn.Parameter] = {
        "head": nn.Conv2d(1, 2, 1), "gain": nn.Parameter(torch.ones(1, 2, 1, 1)), "norm": nn.LayerNorm([2, 4, 4]),
    }  # fmt: skip
    return Net(parts, lambda self, x: self.norm(self.head(x) * self.gain).mean((2, 3)))


IMAGES, TOKENS = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, dtype=torch.int64)
HEADS: dict[str, tuple[nn.Module, Tensor, str]] = {
    "convolution": (_gated(nn.Conv2d(4, 3, 1)), IMAGES, "head"),
    "transposed": (_gated(nn.ConvTranspose2d(4, 3, 2)), IMAGES, "head"),
    "weight norm": (_gated(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 1))), IMAGES, "head"),
    "spectral norm": (_gated(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 3, 1))), IMAGES, "head"),
    "tied": (_tied(), TOKENS, "head"),
    "functional": (_functional(), TOKENS, "tokens"),
    "list": (_listed(), torch.zeros(2, 4), "layers.0"),
    "gain": (_scaled(), IMAGES, "head"),
    "one output": (Net({"head": nn.Linear(4, 1), "body": nn.Linear(4, 4)}, lambda s, x: s.head(s.body(x))),
                   torch.zeros(2, 4), "head"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_the_outputs_come_from(name: str) -> None:
    model, inputs, head = HEADS[name]
    uses = forward_order(model, inputs)
    assert output_layer(model, uses) is model.get_submodule(head)
    exempt = Adaptive(model, clipping=0.1, eps=0.0, uses=uses).exempt
    assert exempt == {*model.get_submodule(head).parameters()}


def test_the_outputs_of_a_parameter_of_the_model_itself() -> None:
    """Of what the model holds itself, only its direct parameters are those of the head."""
    parts: dict[str, nn.Module | nn.Parameter] = {"matrix": nn.Parameter(torch.ones(4, 2)), "body": nn.Linear(4, 4)}
    model = Net(parts, lambda self, x: self.body(x) @ self.matrix)
    clip = Adaptive(model, clipping=0.1, eps=0.0, uses=forward_order(model, torch.zeros(2, 4)))
    assert clip.exempt == {model.matrix}


def test_a_model_without_matrices_has_no_head() -> None:
    model = nn.Sequential(nn.LayerNorm([2, 4]))
    assert output_layer(model, forward_order(model, torch.zeros(2, 2, 4))) is None
    assert Adaptive(model, clipping=0.1, eps=0.0).exempt == set()
