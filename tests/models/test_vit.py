from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlopt.basics.errors import UserError
from dlopt.models.layers import Norm
from dlopt.models.vit import FullAttention, SelfAttention, TransformerBlock

Build = Callable[..., nn.Module]


def tokens() -> torch.Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_vit_b_16_has_torchvisions_parameters(build: Build) -> None:
    with torch.device("meta"):
        keys = ["patch=16", "width=768", "depth=12", "heads=12"]
        ours = build("vit", *keys, input_shape=(3, 224, 224), classes=1000)
        theirs = torchvision.models.vit_b_16()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_attention_matches_torch() -> None:
    ours, theirs = SelfAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.project.weight,
            "out_proj.bias": ours.project.bias,
        }
    )
    torch.testing.assert_close(ours(tokens()), theirs(tokens(), tokens(), tokens(), need_weights=False)[0])


def test_many_tokens_are_attended_to_by_a_fused_kernel() -> None:
    """The weights of 197 tokens (224 x 224 pixels) are not stored, and the result and its derivatives are the same."""
    attend, tokens = FullAttention(), 197
    q, k, v = (torch.randn(2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = attend(q, k, v)
    assert all(shape[-2:] != (tokens, tokens) for shape in kept)
    expected = attend.weights(q, k) @ v
    torch.testing.assert_close(output, expected)
    gradients = (torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (output, expected))
    torch.testing.assert_close(*gradients)
    with sdpa_kernel(SDPBackend.MATH):  # as `Step.loss` does for second derivatives
        (first,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), q)[0].any()


@pytest.mark.parametrize("pre_norm", [True, False])
def test_block_matches_torchs_encoder_layer(pre_norm: bool) -> None:
    norm = Norm(norm="layer", norm_affine=True, norm_groups=1, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1)
    ours = TransformerBlock(12, 3, 2.0, pre_norm=pre_norm, dropout=0.0, norm=norm).double()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre_norm
    ).double()
    names = {"attention.qkv.": "self_attn.in_proj_", "attention.project": "self_attn.out_proj"}
    names |= {"mlp.0": "linear1", "mlp.3": "linear2"}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))


def test_second_derivatives(build: Build) -> None:
    keys = ["width=12", "depth=1", "heads=2"]
    model = build("vit", *keys, input_shape=(1, 8, 8), classes=3).double()
    loss = model(torch.randn(2, 1, 8, 8, dtype=torch.float64)).square().sum()
    weight = model.get_parameter("block1.attention.qkv.weight")
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.isfinite().all() and second.any()


def test_positions_matter_and_blocks_can_start_as_the_identity(build: Build) -> None:
    keys = ["width=12", "depth=2", "heads=2"]
    model = build("vit", *keys, input_shape=(1, 8, 8), classes=3).double().eval()
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model(image), model(image.roll(4, 3)))
    block = model.get_submodule("block1")
    assert isinstance(block, TransformerBlock)
    block.zero_init_last()
    assert torch.equal(block(tokens()), tokens())


def test_rejects_invalid_settings(build: Build) -> None:
    with pytest.raises(UserError, match=r"model\.patch=5: does not divide the image size 8x8"):
        build("vit", "patch=5", input_shape=(1, 8, 8), classes=3)
    with pytest.raises(UserError, match=r"model\.heads=5"):
        build("vit", "heads=5", input_shape=(1, 8, 8), classes=3)


@pytest.mark.parametrize("choice", ["vit", "gpt"])
def test_rejects_an_mlp_without_features(build: Build, choice: str) -> None:
    shape, vocabulary = ((1, 8, 8), None) if choice == "vit" else ((8,), 5)
    with pytest.raises(UserError, match=r"model\.expansion=0\.01: leaves no hidden features at model\.width=12"):
        build(choice, "width=12", "heads=2", "expansion=0.01", input_shape=shape, classes=5, vocabulary=vocabulary)
