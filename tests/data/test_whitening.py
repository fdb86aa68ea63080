import numpy as np
import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.samples import InMemory
from dlopt.data.whitening import PCA, PCAWhiten, ZCAWhiten, mean_and_covariance


def correlated(count: int = 200, features: int = 6, offset: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=draw, dtype=torch.float64)
    return (torch.randn(count, features, generator=draw, dtype=torch.float64) @ mix + offset).float()


def fitted(module: PCA, inputs: Tensor) -> PCA:
    module = module.double()
    module.fit(InMemory(inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    return module


def covariance(result: Tensor) -> Tensor:
    return torch.from_numpy(np.cov(result.numpy().T, bias=True))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_mean_and_covariance_match_numpy(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.data.loading._CHUNK_BYTES", 6 * 7)  # chunks of 7 rows
    inputs = correlated(offset=offset)
    mean, spread = mean_and_covariance(InMemory(inputs, torch.zeros(200)), torch.device("cpu"))
    assert torch.allclose(mean, inputs.double().mean(0), rtol=1e-12)
    assert torch.allclose(spread, covariance(inputs.double()), rtol=1e-7, atol=1e-9)


def test_pca_decorrelates_and_only_rotates() -> None:
    inputs = correlated()
    result = fitted(PCA(input_shape=(6,)), inputs)(inputs)
    spread = covariance(result)
    expected = torch.linalg.eigvalsh(covariance(inputs.double())).flip(0)
    assert torch.allclose(spread, torch.diag(expected), atol=1e-9) and result.mean(0).abs().max() < 1e-9
    assert torch.allclose(torch.pdist(inputs.double()), torch.pdist(result))


@pytest.mark.parametrize("kind", [PCAWhiten, ZCAWhiten])
def test_whitened_data_has_identity_covariance(kind: type[PCAWhiten]) -> None:
    inputs = correlated()
    result = fitted(kind(epsilon=1e-12, input_shape=(6,)), inputs)(inputs)
    assert torch.allclose(covariance(result), torch.eye(6).double(), atol=1e-6)


def test_zca_is_the_inverse_square_root_of_the_covariance() -> None:
    inputs = correlated()
    module = fitted(ZCAWhiten(epsilon=0.5, input_shape=(6,)), inputs)
    values, vectors = np.linalg.eigh(covariance(inputs.double()).numpy())
    expected = vectors @ np.diag((values + 0.5) ** -0.5) @ vectors.T
    assert np.allclose(module.matrix.numpy(), expected) and torch.allclose(module.matrix, module.matrix.T)


def test_images_keep_their_shape_and_constant_pixels_do_not_explode() -> None:
    inputs = torch.randint(0, 256, (50, 3, 4, 2), dtype=torch.uint8)
    inputs[:, :, 0] = 9
    result = fitted(ZCAWhiten(epsilon=1e-3, input_shape=(3, 4, 2)), inputs)(inputs)
    assert result.shape == inputs.shape and result[:, :, 0].abs().max() < 1e-9
    assert (result[:, :, 1:].var((0, 2, 3)) - 1).abs().max() < 0.1


def test_images_are_scaled_to_0_to_1() -> None:
    inputs = torch.randint(0, 256, (50, 1, 3, 2), dtype=torch.uint8)
    a = fitted(PCAWhiten(epsilon=0.01, input_shape=(1, 3, 2)), inputs)(inputs)
    b = fitted(PCAWhiten(epsilon=0.01, input_shape=(6,)), (inputs / 255).flatten(1))((inputs / 255.0).flatten(1))
    assert torch.allclose(a.flatten(1), b, atol=1e-5)


def test_fewer_samples_than_features() -> None:
    inputs = correlated(3)
    assert fitted(PCAWhiten(epsilon=1e-3, input_shape=(6,)), inputs)(inputs).isfinite().all()


@pytest.mark.parametrize("kind, name", [(PCA, "pca"), (PCAWhiten, "pca_whiten"), (ZCAWhiten, "zca_whiten")])
def test_rejects_large_images(kind: type[PCA], name: str) -> None:
    options = {} if kind is PCA else {"epsilon": 1e-3}
    with pytest.raises(UserError, match=rf"normalize={name}: needs the covariance of all 150528"):
        kind(input_shape=(3, 224, 224), **options)


def test_accepts_as_many_features_as_the_message_allows() -> None:
    with torch.device("meta"):  # allocates nothing
        assert PCA(input_shape=(8192,)).matrix.shape == (8192, 8192)
        with pytest.raises(UserError, match="all 8193 values of a sample; at most 8192 are allowed"):
            PCA(input_shape=(8193,))


def test_statistics_are_computed_on_the_cpu_of_machines_without_cuda() -> None:
    samples = InMemory(torch.rand(4, 2), torch.zeros(4))
    found = mean_and_covariance(samples, torch.device("meta"))
    assert [each.device.type for each in found] == ["cpu", "cpu"] and found[0].dtype == torch.float64
