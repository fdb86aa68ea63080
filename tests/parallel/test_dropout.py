import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dlopt.parallel.batch_shards import MicroBatchShard, local_slice
from dlopt.parallel.collectives import ShardSpec
from dlopt.parallel.dropout import CurrentShard, GlobalDropout, convert_dropout

ELEMENTWISE = [nn.Dropout, nn.AlphaDropout]
CHANNELWISE = [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout]


def converted(dropout: nn.Module, current: CurrentShard | None = None, spec: ShardSpec | None = None) -> nn.Module:
    specs = None if spec is None else {dropout: lambda inputs: spec}
    convert_dropout(dropout, current or CurrentShard(), specs)
    return dropout


@pytest.mark.parametrize("kind", [*ELEMENTWISE, *CHANNELWISE])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_masks_match_single_process(kind: type[nn.Dropout], memory_format: torch.memory_format, ranks: int) -> None:
    inputs = torch.randn(7, 3, 5, 5, dtype=torch.float64).to(memory_format=memory_format)
    torch.manual_seed(3)
    full, next_draw = converted(kind(0.4))(inputs.contiguous()), torch.rand(())
    current = CurrentShard()
    dropout = converted(kind(0.4), current)
    outputs = []
    for rank in range(ranks):
        local = local_slice(0, 7, rank, ranks)
        current.shard = MicroBatchShard(7, local)
        torch.manual_seed(3)
        outputs.append(dropout(inputs[local]))
        assert torch.equal(torch.rand(()), next_draw)  # the generator state does not depend on the shard
    assert torch.equal(torch.cat(outputs), full)
    assert not torch.equal(full, inputs)


@pytest.mark.parametrize("kind", [*ELEMENTWISE, *CHANNELWISE])
@pytest.mark.parametrize("dim", [1, 2])
def test_masks_of_sharded_features_match(kind: type[nn.Dropout], dim: int) -> None:
    inputs = torch.randn(4, 6, 6, 5)
    torch.manual_seed(3)
    full, next_draw = converted(kind(0.4))(inputs), torch.rand(())
    shards = []
    for index in (slice(0, 1), torch.tensor([1, 2]), slice(3, 6)):
        spec = ShardSpec(dim, index, 6)
        torch.manual_seed(3)
        shards.append(converted(kind(0.4), spec=spec)(spec.select(inputs)))
        assert torch.equal(torch.rand(()), next_draw)
    assert torch.equal(torch.cat(shards, dim), full)


@pytest.mark.parametrize("kind", [*ELEMENTWISE, *CHANNELWISE])
def test_values_are_those_of_torch(kind: type[nn.Dropout]) -> None:
    """Kept and dropped activations have torch's values, channel by channel where torch drops channels."""
    inputs = torch.randn(4096, 5, 9, dtype=torch.float64)
    if kind is not nn.Dropout1d:
        inputs = inputs.view(4096, 5, 3, 3, 1) if kind is nn.Dropout3d else inputs.view(4096, 5, 3, 3)
    expected, actual = kind(0.25)(inputs), converted(kind(0.25))(inputs)

    def parts(outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mask, and the coefficients of the kept activations with the value of the dropped ones."""
        values, counts = outputs.unique(return_counts=True)
        dropped = values[counts.argmax()]  # the only value that occurs twice
        kept = outputs != dropped
        x, y = inputs[kept], outputs[kept]
        slope = (y[1:] - y[0]) / (x[1:] - x[0])
        assert slope.std() < 1e-6 and abs(dropped - expected_drop(kind, 0.25)) < 1e-12
        return ~kept, slope.median()

    (mask, slope), (torch_mask, torch_slope) = parts(actual), parts(expected)
    assert abs(slope - torch_slope) < 1e-9
    for each in (mask, torch_mask):
        channels = each.flatten(2).double().mean(-1)
        assert bool(((channels == 0) | (channels == 1)).all()) == (kind in CHANNELWISE)
    deviation = math.sqrt(0.25 * 0.75 / (mask.numel() / (9 if kind in CHANNELWISE else 1)))
    assert abs(mask.double().mean() - 0.25) < 4 * deviation


def expected_drop(kind: type[nn.Module], p: float) -> float:
    """The value of a dropped activation: zero, or that of Klambauer et al. 2017, equation 12."""
    if kind not in (nn.AlphaDropout, nn.FeatureAlphaDropout):
        return 0.0
    limit = -1.0507009873554805 * 1.6732632423543772
    return limit * (1 - p) / math.sqrt((1 - p) * (1 + p * limit**2))


def test_masks_are_independent() -> None:
    """Samples, neighbouring features, the corners of rectangles and consecutive calls: products of signs average 0.

    A mask is made of one key per row and one per column; without a good hash the corners would depend on each other.
    """
    torch.manual_seed(0)
    dropout = converted(nn.Dropout(0.5))
    inputs = torch.ones(512, 512, dtype=torch.float64)
    first, second = (dropout(inputs) - 1 for _ in range(2))  # -1 or 1
    pairs = {
        "samples": first[1:] * first[:-1],
        "features": first[:, 1:] * first[:, :-1],
        "rectangles": first[1:, 1:] * first[:-1, 1:] * first[1:, :-1] * first[:-1, :-1],
        "words": first[:, 2:] * first[:, :-2],
        "calls": first * second,
        "share": first,
    }
    for name, products in pairs.items():
        assert abs(products.mean()) < 4 / math.sqrt(products.numel()), name
    rows, columns = first.mean(1), first.mean(0)
    for means in (rows, columns):  # of 512 independent signs
        assert abs(means.var() * 512 - 1) < 4 * math.sqrt(2 / 512)


def test_gradients_match_the_local_mask() -> None:
    current = CurrentShard()
    current.shard = MicroBatchShard(4, slice(1, 3))
    inputs = torch.randn(2, 6, requires_grad=True)
    outputs = converted(nn.Dropout(0.5), current)(inputs)
    [gradient] = torch.autograd.grad(outputs.sum(), inputs)
    assert torch.equal(gradient, torch.where(outputs == 0, 0.0, 2.0))


@pytest.mark.parametrize("shape", [(0, 4), (3,), (3, 1), (2, 7)])
def test_any_number_of_samples_and_features(shape: tuple[int, ...]) -> None:
    assert converted(nn.Dropout(0.5))(torch.randn(shape)).shape == shape


def test_probability_of_zero_and_one_draws_nothing() -> None:
    inputs = torch.randn(4, 6)
    state = torch.get_rng_state()
    assert converted(nn.Dropout(0.0))(inputs) is inputs
    assert converted(nn.Dropout(0.5)).eval()(inputs) is inputs
    assert not converted(nn.Dropout(1.0))(inputs).any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 1.0])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
@pytest.mark.parametrize("total", [4, 9])
def test_discard_draws_as_a_call(p: float, kind: type[nn.Dropout], total: int) -> None:
    """Also where the rank has four samples of more: model groups with different samples draw for all of them."""
    current = CurrentShard()
    current.shard = MicroBatchShard(total, slice(0, 4))
    inputs, dropout = torch.randn(4, 6, 3), converted(kind(p), current)
    assert isinstance(dropout, GlobalDropout)
    for module in (dropout, copy.deepcopy(dropout).eval()):
        torch.manual_seed(0)
        module(inputs)
        expected = torch.rand(())
        torch.manual_seed(0)
        module.discard(inputs.shape, inputs.device)
        assert torch.rand(()) == expected


def test_converts_torch_dropouts_in_place() -> None:
    class Own(nn.Dropout):
        pass

    shared = nn.Dropout(0.3)
    inner = nn.Sequential(shared, nn.Dropout1d(0.1))
    model = nn.Sequential(nn.Linear(2, 2), shared, inner, Own())
    names = list(model.state_dict())
    current = CurrentShard()
    for _ in range(2):
        convert_dropout(model, current)
        assert model[1] is inner[0] is shared
        assert isinstance(shared, GlobalDropout) and isinstance(shared, nn.Dropout) and shared.p == 0.3
        assert isinstance(inner[1], GlobalDropout) and isinstance(inner[1], nn.Dropout1d)
        assert type(model[3]) is Own
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model)[1].current is current


def test_wrong_leading_dimension_is_refused() -> None:
    current = CurrentShard()
    current.shard = MicroBatchShard(4, slice(0, 2))
    with pytest.raises(RuntimeError, match="leading dimension"):
        converted(nn.Dropout(0.5), current)(torch.ones(5, 2))
