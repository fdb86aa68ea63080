import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.models.layers import ACTIVATIONS, GhostBatchNorm1d, GhostBatchNorm2d, Norm, activation, evaluation_mode

MAPS = torch.randn(12, 8, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 2
EPS = 1e-5


def norm(kind: str, **changes: object) -> Norm:
    keys = {"affine": True, "groups": 4, "ghost_batch": None, "eps": 1e-5, "momentum": 0.1, **changes}
    return Norm(norm=kind, **{f"norm_{name}": value for name, value in keys.items()})  # type: ignore[arg-type]


def standardized(maps: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return (maps - maps.mean(dims, keepdim=True)) / (maps.var(dims, correction=0, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize(("kind", "dims"), [("batch", (0, 2, 3)), ("layer", (1, 2, 3)), ("instance", (2, 3))])
def test_each_kind_averages_over_its_own_dimensions(kind: str, dims: tuple[int, ...]) -> None:
    torch.testing.assert_close(norm(kind).maps(8).double()(MAPS), standardized(MAPS, dims))


def test_group_norm_averages_over_a_group_of_channels() -> None:
    expected = standardized(MAPS.unflatten(1, (4, 2)), (2, 3, 4)).flatten(1, 2)
    torch.testing.assert_close(norm("group").maps(8).double()(MAPS), expected)


def test_none_is_the_identity_and_needs_a_bias() -> None:
    assert norm("none").bias and not norm("batch").bias
    assert norm("none").maps(8)(MAPS) is MAPS


@pytest.mark.parametrize("kind", ["batch", "layer", "group", "instance"])
@pytest.mark.parametrize("affine", [True, False])
def test_affine_means_gamma_and_beta_per_channel(kind: str, affine: bool) -> None:
    shapes = [tuple(parameter.shape) for parameter in norm(kind, affine=affine).maps(8).parameters()]
    assert shapes == ([(8,), (8,)] if affine else [])


@given(channels=st.integers(1, 200), groups=st.integers(1, 64))
def test_the_number_of_groups_divides_and_leaves_two_channels_in_each(channels: int, groups: int) -> None:
    count = norm("group", groups=groups).groups_of(channels)
    assert channels % count == 0 and count <= groups
    assert channels // count >= 2 or channels == 1
    if channels % (2 * groups) == 0:
        assert count == groups


def test_rejects_instance_norm_of_vectors() -> None:
    with pytest.raises(UserError, match=r"model\.norm=instance"):
        norm("instance").vectors(8)


@pytest.mark.parametrize("kind", ["batch", "layer", "group", "instance", "none"])
def test_tokens_keep_their_shape_and_layer_norm_is_per_token(kind: str) -> None:
    tokens = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = norm(kind).tokens(8).double()(tokens)
    dims = {"batch": (0, 1), "layer": (2,), "instance": (1,)}
    assert output.shape == tokens.shape
    if kind in dims:
        torch.testing.assert_close(output, standardized(tokens, dims[kind]))


def test_ghost_batches_are_normalized_separately() -> None:
    layer = norm("batch", ghost_batch=4).maps(8).double()
    assert isinstance(layer, GhostBatchNorm2d)
    expected = torch.cat([standardized(part, (0, 2, 3)) for part in MAPS.split(4)])
    torch.testing.assert_close(layer(MAPS), expected)
    assert not torch.allclose(layer(MAPS), standardized(MAPS, (0, 2, 3)))


def test_ghost_batches_update_the_running_averages_one_after_the_other() -> None:
    ghost, plain = norm("batch", ghost_batch=4).maps(8).double(), nn.BatchNorm2d(8).double()
    ghost(MAPS)
    for part in MAPS.split(4):
        plain(part)
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ghost.eval()(MAPS), plain.eval()(MAPS), rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "sizes"), [(3, [3]), (7, [7]), (8, [4, 4]), (11, [6, 5]), (14, [5, 5, 4])])
def test_remainder_is_distributed_over_the_virtual_batches(batch: int, sizes: list[int]) -> None:
    vectors = torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer = norm("batch", ghost_batch=4).vectors(6).double()
    assert isinstance(layer, GhostBatchNorm1d)
    expected = torch.cat([standardized(part, (0,)) for part in vectors.split(sizes)])
    torch.testing.assert_close(layer(vectors), expected)


def test_ghost_batches_require_batch_norm() -> None:
    with pytest.raises(UserError, match=r"model\.norm_ghost_batch=4"):
        norm("group", ghost_batch=4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_not_in_place(name: str) -> None:
    before = torch.linspace(-3, 3, 13)
    after = before.clone()
    assert activation(name)(after).shape == before.shape  # type: ignore[arg-type]
    assert torch.equal(before, after)


class _Merging(nn.Linear):
    """Merges its weights for the evaluation, like adapters of other packages."""

    merged = False

    def train(self, mode: bool = True) -> "_Merging":
        self.merged = not mode
        return super().train(mode)


def test_after_evaluation_mode_each_layer_has_its_own_mode() -> None:
    merging, frozen, loss = _Merging(2, 2), nn.Dropout(0.5).eval(), nn.MSELoss()
    model = nn.Sequential(merging, frozen)
    with evaluation_mode(model, loss):
        assert merging.merged and not any(layer.training for layer in (*model.modules(), loss))
    assert merging.training and not merging.merged and not frozen.training and loss.training
