from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import Normalize

from dlopt.basics.errors import UserError
from dlopt.data.images.files import Files, ImageList
from dlopt.data.normalization import Fixed, MeanImage, MeanPixel, Nothing, ScaleShift, Standardize, Unit, moments
from dlopt.data.samples import InMemory
from dlopt.data.whitening import PCA, PCAWhiten, ZCAWhiten


def samples(inputs: Tensor) -> InMemory:
    return InMemory(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def images(count: int = 40, channels: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([20, 100, 256])[:channels].view(-1, 1, 1)
    return (torch.rand(count, channels, 6, 5, generator=draw) * spread).to(torch.uint8)


def fitted(kind: type[ScaleShift], inputs: Tensor, dtype: torch.dtype = torch.float64) -> ScaleShift:
    keys = {"per": "channel"} if kind is Standardize else {}
    module = kind(**keys, input_shape=tuple(inputs.shape[1:])).to(dtype)
    module.fit(samples(inputs))
    return module


def test_standardized_channels_have_mean_0_and_deviation_1() -> None:
    inputs = images()
    result = fitted(Standardize, inputs)(inputs)
    assert torch.allclose(result.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(result.var((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-12)


def test_standardized_pixels_have_mean_0_and_deviation_1_each() -> None:
    inputs = images()
    inputs[:, 0, 0, 0] = 7  # constant
    module = Standardize(per="pixel", input_shape=(3, 6, 5)).double()
    module.fit(samples(inputs))
    result = module(inputs)
    deviation = result.std(0, correction=0)
    assert float(result[:, 0, 0, 0].abs().max()) < 1e-12 and float(deviation[0, 0, 0]) < 1e-12
    deviation[0, 0, 0] = 1
    assert torch.allclose(result.mean(0), torch.zeros(3, 6, 5).double(), atol=1e-12)
    assert torch.allclose(deviation, torch.ones(3, 6, 5).double())
    with pytest.raises(UserError, match=r"normalize\.per=pixel: fitted to samples of \[3, 6, 5\], not \[3, 4, 4\]"):
        module(torch.zeros(2, 3, 4, 4))


def test_standardized_features() -> None:
    inputs = torch.randn(50, 7) * torch.logspace(-3, 3, 7) + torch.logspace(3, -3, 7)
    result = fitted(Standardize, inputs)(inputs)
    assert result.shape == (50, 7) and result.dtype == torch.float64
    assert torch.allclose(result.mean(0), torch.zeros(7).double(), atol=1e-9)
    assert torch.allclose(result.std(0, correction=0), torch.ones(7).double(), atol=1e-9)


@given(count=st.integers(1, 30), chunk=st.integers(1, 9), offset=st.floats(-1e6, 1e6))
def test_moments_do_not_depend_on_the_chunks(count: int, chunk: int, offset: float) -> None:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) + offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlopt.data.loading._CHUNK_BYTES", 4 * chunk)
        mean, deviation = moments(samples(inputs))
    exact = inputs.double()
    assert torch.allclose(mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    if count > 1 and len(inputs.unique(dim=0)) == count:
        assert torch.allclose(deviation, exact.std(0, correction=0), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1, -3.7])
@pytest.mark.parametrize("kind", [Standardize, Unit])
def test_constants_become_0(kind: type[ScaleShift], value: float) -> None:
    inputs = torch.randn(1001, 3)
    inputs[:, 1] = value
    result = fitted(kind, inputs)(inputs)
    assert result.isfinite().all() and result[:, 1].abs().max() < 1e-6 and result[:, 0].abs().max() > 0.1


@pytest.mark.parametrize("kind", [Standardize, Unit, Nothing])
def test_one_sample_and_a_black_channel(kind: type[ScaleShift]) -> None:
    inputs = images(1)
    inputs[:, 0] = 0
    result = fitted(kind, inputs)(inputs)
    assert result.isfinite().all() and result[:, 0].abs().max() == 0


def test_unit_images_and_features() -> None:
    inputs = images()
    assert torch.equal(fitted(Unit, inputs)(inputs), inputs * torch.tensor(1 / 255, dtype=torch.float64))
    vectors = torch.randn(30, 4)
    result = fitted(Unit, vectors)(vectors)
    assert torch.allclose(result.amin(0), torch.zeros(4).double()) and torch.allclose(
        result.amax(0), torch.ones(4).double()
    )


def test_nothing_only_converts() -> None:
    inputs = images()
    result = fitted(Nothing, inputs)(inputs)
    assert result.dtype == torch.float64 and torch.equal(result, inputs.double())


@pytest.mark.parametrize("kind", [Standardize, Unit, Nothing])
def test_inputs_are_not_changed(kind: type[ScaleShift]) -> None:
    inputs = torch.randn(10, 4)
    before = inputs.clone()
    fitted(kind, inputs, torch.float32)(inputs).add_(1 if kind is not Nothing else 0)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_has_the_modules_dtype_and_the_batchs_layout(dtype: torch.dtype) -> None:
    inputs = images().contiguous(memory_format=torch.channels_last)
    result = fitted(Standardize, inputs, dtype)(inputs)
    assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)


def test_state_dict_is_complete() -> None:
    inputs = images()
    module = fitted(Standardize, inputs)
    other = Standardize(per="channel", input_shape=(3, 6, 5)).double()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(inputs), module(inputs))


def test_statistics_of_files_equal_those_in_memory(tmp_path: Path, write_images: Callable[..., list[Path]]) -> None:
    files = Files(ImageList.of([str(path) for path in write_images(tmp_path, 9)], torch.zeros(9)), None, 3)
    a, b = Standardize(per="channel", input_shape=files.shape), Standardize(per="channel", input_shape=files.shape)
    a.fit(files)
    b.fit(samples(files.fetch(torch.arange(9))))
    assert torch.equal(a.scale, b.scale) and torch.equal(a.shift, b.shift)


KINDS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "standardize": lambda shape: Standardize(per="channel", input_shape=shape),
    "per_pixel": lambda shape: Standardize(per="pixel", input_shape=shape),
    "unit": lambda shape: Unit(input_shape=shape),
    "mean_pixel": lambda shape: MeanPixel(values=None, scale=0.5, input_shape=shape),
    "fixed_mean": lambda shape: MeanPixel(values=(16_000_004.3, 0.1), scale=0.5, input_shape=shape),
    "fixed": lambda shape: Fixed(mean=(16_000_004.3, 0.1), std=(3.0, 2.0), input_shape=shape),
    "mean_image": lambda shape: MeanImage(scale=0.5, input_shape=shape),
    "pca": lambda shape: PCA(input_shape=shape),
    "pca_whiten": lambda shape: PCAWhiten(epsilon=1e-3, input_shape=shape),
    "zca_whiten": lambda shape: ZCAWhiten(epsilon=1e-3, input_shape=shape),
}


def far_from_zero() -> tuple[Tensor, Tensor]:
    """Returns samples of which one feature is 16,000,000 to 16,000,009, which fp32 holds, and one is ordinary."""
    rng = np.random.default_rng(0)
    inputs = np.stack([16_000_000 + rng.integers(0, 10, 500), rng.normal(size=500).astype(np.float32)], 1)
    return torch.from_numpy(inputs), torch.from_numpy(inputs).float()


def reference(name: str, x: Tensor) -> Tensor:
    """Computes the normalization of [N, 2] in float64."""
    mean, deviation, low, high = x.mean(0), x.std(0, correction=0), x.amin(0), x.amax(0)
    match name:
        case "standardize" | "per_pixel":
            return (x - mean) / deviation
        case "unit":
            return (x - low) / (high - low)
        case "mean_pixel" | "mean_image":
            return 0.5 * (x - mean)
        case "fixed_mean":
            return 0.5 * (x - torch.tensor([16_000_004.3, 0.1], dtype=torch.float64))
        case "fixed":
            return (x - torch.tensor([16_000_004.3, 0.1], dtype=torch.float64)) / torch.tensor([3.0, 2.0])
    variances, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(2)])
    scales = {"pca": np.ones(2)}.get(name, 1 / np.sqrt(variances + 1e-3))
    rotation = vectors.T if name == "zca_whiten" else np.eye(2)
    return torch.from_numpy((x - mean).numpy() @ (vectors * scales) @ rotation)


@pytest.mark.parametrize("name", KINDS)
def test_features_far_from_zero_keep_their_differences(name: str) -> None:
    exact, inputs = far_from_zero()
    module, double = KINDS[name]((2,)), KINDS[name]((2,)).double()
    module.fit(samples(inputs))
    double.fit(samples(inputs))
    expected = reference(name, exact)
    assert torch.allclose(module(inputs).double(), expected, atol=2e-6)
    assert torch.allclose(double(inputs), expected, atol=1e-6), "fp64 needs no center"
    assert "center" in module.state_dict() and "center" not in double.state_dict()

    # A checkpoint gives equal outputs; that of fp64 keeps its precision in fp32, as in an export.
    loaded, narrowed = KINDS[name]((2,)), KINDS[name]((2,))
    loaded.load_state_dict(module.state_dict())
    narrowed.load_state_dict(double.state_dict())
    assert torch.equal(loaded(inputs), module(inputs))
    assert torch.allclose(narrowed(inputs).double(), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["standardize", "per_pixel", "unit", "mean_pixel", "mean_image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_have_no_center(name: str, dtype: torch.dtype) -> None:
    inputs = images()
    inputs[:, 0, 0, 0] = 255
    module = KINDS[name]((3, 6, 5)).to(dtype)
    module.fit(samples(inputs))
    state = module.state_dict()
    assert state.keys() == ({"mean"} if name == "mean_image" else {"scale", "shift"})
    with torch.no_grad():
        sums = (inputs - state["mean"]) * 0.5 if name == "mean_image" else inputs * state["scale"] + state["shift"]
    assert torch.equal(module(inputs), sums)
    module.load_state_dict(state)
    assert torch.equal(module(inputs), sums)


def test_a_center_of_another_state_is_removed_and_checked() -> None:
    _, inputs = far_from_zero()
    module, plain = fitted(Standardize, inputs, torch.float32), fitted(Standardize, inputs[:, 1:], torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch for center"):
        module.load_state_dict(module.state_dict() | {"center": torch.zeros(3)})
    other = fitted(Standardize, inputs - inputs.mean(0), torch.float32)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(inputs), other(inputs)) and "center" not in plain.state_dict()


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("fixed")])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_named(name: str, value: float) -> None:
    inputs = torch.randn(20, 2)
    inputs[7, 1], inputs[8, 1] = value, -value
    with pytest.raises(UserError, match=rf"data: feature 2 of training sample 8 is {value}: it is not a finite number"):
        KINDS[name]((2,)).fit(samples(inputs))


def test_differences_that_fp32_cannot_scale_are_refused() -> None:
    inputs = torch.randn(20, 2)
    inputs[:, 1] *= 1e-41
    with pytest.raises(UserError, match=r"normalize: the values of feature 2 differ by too little for torch.float32"):
        fitted(Standardize, inputs, torch.float32)


def test_mean_pixel_computed_and_fixed() -> None:
    inputs = images()
    module = MeanPixel(values=None, scale=1.0, input_shape=(3, 6, 5)).double()
    module.fit(samples(inputs))
    assert torch.allclose(module(inputs), inputs - inputs.double().mean((0, 2, 3)).view(3, 1, 1))
    fixed = MeanPixel(values=(124.96, 115.97, 106.13), scale=1.0, input_shape=(3, 6, 5))
    fixed.fit(samples(inputs))
    assert torch.equal(fixed(inputs), inputs - torch.tensor([124.96, 115.97, 106.13]).view(3, 1, 1))
    with pytest.raises(UserError, match=r"normalize.values=\[1.0\]: has 1 values; the data has 3 channels"):
        MeanPixel(values=(1.0,), scale=1.0, input_shape=(3, 6, 5))


@pytest.mark.parametrize("kind", [MeanImage, partial(MeanPixel, values=None)])
def test_scale_multiplies_the_result(kind: Any) -> None:
    inputs = images()
    plain, scaled = (kind(scale=scale, input_shape=(3, 6, 5)) for scale in (1.0, 1 / 255))
    plain.fit(samples(inputs)), scaled.fit(samples(inputs))
    assert torch.allclose(scaled(inputs), plain(inputs) / 255, atol=1e-6)
    assert plain(inputs).abs().max() > 1 > scaled(inputs).abs().max()


def test_mean_image() -> None:
    inputs = images()
    module = MeanImage(scale=1.0, input_shape=(3, 6, 5)).double()
    module.fit(samples(inputs))
    assert torch.allclose(module(inputs), inputs - inputs.double().mean(0))
    with pytest.raises(UserError, match=r"normalize=mean_image: the mean image is \[3, 6, 5\].*\[3, 4, 4\]"):
        module(inputs[..., :4, :4])


def test_fixed_constants_equal_torchvisions_normalize() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inputs = images()
    module = fitted(partial(Fixed, mean=mean, std=std), inputs)  # type: ignore[arg-type]
    expected = Normalize(mean, std)(inputs.double() / 255)
    torch.testing.assert_close(module(inputs), expected, rtol=1e-12, atol=1e-12)
    grey = fitted(partial(Fixed, mean=mean, std=std), inputs[:, :1])  # type: ignore[arg-type]
    torch.testing.assert_close(grey(inputs[:, :1]), Normalize([0.449], [0.226])(inputs[:, :1].double() / 255))
    white = fitted(partial(Fixed, mean=(1.0,) * 3, std=(1.0,) * 3), inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(white(inputs), inputs.double() / 255 - 1, rtol=1e-12, atol=1e-12)
    vectors = torch.tensor([[1.0, 200.0], [3.0, 100.0]])
    features = fitted(partial(Fixed, mean=(2.0, 150.0), std=(1.0, 50.0)), vectors)  # type: ignore[arg-type]
    assert torch.equal(features(vectors), torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double())


@pytest.mark.parametrize(
    ("mean", "std", "error"),
    [
        ((0.5, 0.5), (1.0, 1.0, 1.0), r"normalize\.mean=\[0\.5, 0\.5\]: has 2 values; the data has 3 channels"),
        ((0.5, 0.5, 0.5), (1.0,), r"normalize\.std=\[1\.0\]: has 1 values; the data has 3 channels"),
        ((123.7, 116.3, 103.5), (58.0, 57.0, 57.0), r"normalize\.mean=.*range 0\.\.1 here; divide by 255"),
    ],
)
def test_fixed_constants_must_fit_the_images(mean: tuple[float, ...], std: tuple[float, ...], error: str) -> None:
    with pytest.raises(UserError, match=error):
        fitted(partial(Fixed, mean=mean, std=std), images())  # type: ignore[arg-type]


def test_fixed_constants_of_floating_point_images() -> None:
    """Images 0..255 in float32 are those in uint8; images 0..1 are taken as they are."""
    pixels = images()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = ((pixels.double() / 255).movedim(1, -1) - torch.tensor(mean)) / torch.tensor(std)
    for inputs in (pixels, pixels.float(), pixels.float() / 255):
        module = Fixed(mean=mean, std=std, input_shape=tuple(pixels.shape[1:])).double()
        module.fit(samples(inputs))
        assert torch.allclose(module(inputs.double()).movedim(1, -1), expected, atol=1e-6)


def test_given_means_need_no_training_samples() -> None:
    module = MeanPixel(values=(1.0, 2.0), scale=3.0, input_shape=(2, 1, 1))
    assert module(torch.full((1, 2, 1, 1), 5.0)).flatten().tolist() == [12.0, 9.0]
