import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dlopt import init
from dlopt.basics.errors import UserError
from dlopt.models.mlp import MLP
from dlopt.models.resnet import CifarResNet
from tests.support.choices import names
from tests.support.norm import NORM

CONF = Path(__file__).parents[1] / "conf" / "init"
CHOICES = [name for name in names("init") if name != "alexnet"]  # for its model only
DATA_DRIVEN = {"lsuv", "whitening", "whitening_dirac"}


def resnet(**changes: Any) -> CifarResNet:
    keys = {"input_shape": (3, 16, 16), "classes": 10, "depth": 8, "width": 32, "residual": True, "dropout": 0.0}
    keys["shortcut_padding"] = "end"
    return CifarResNet(**{**keys, **NORM, **changes})


def mlp(activation: str = "relu", **changes: Any) -> MLP:
    keys = {"input_shape": (3, 16, 16), "classes": 10, "widths": (200, 300), "activation": activation, "dropout": 0.0}
    return MLP(**{**keys, **NORM, "norm": "none", **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 64) -> torch.Tensor:
    """Returns correlated noise, similar to the pixels of images."""
    noise = torch.randn(count, 3, 18, 18, generator=generator(7))
    return nn.functional.avg_pool2d(noise, 3, stride=1) * 3 + 0.3 * noise[:, :, 1:-1, 1:-1]


def values(choice: str) -> dict[str, Any]:
    """Returns the keys of a choice's YAML file, including inherited ones."""
    keys: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{choice}.yaml"))
    before = [each for each in keys.pop("defaults", []) if each != "_self_"]
    return {key: value for each in before for key, value in values(each).items()} | keys


def apply(choice: str, model: nn.Module, seed: int = 0, **changes: Any) -> nn.Module:
    """Applies `init=choice` with the values of its YAML file."""
    keys = values(choice)
    scheme = getattr(init, keys.pop("_target_").removeprefix("dlopt.init."))
    if choice in DATA_DRIVEN:
        keys["inputs"] = images()
    if choice == "mup":
        keys["growth"] = init.WidthGrowth(32, frozenset(), frozenset({"head.weight"}))
    scheme(model, generator(seed), **{**keys, **changes})
    return model


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_depends_only_on_the_generator_and_trains(choice: str) -> None:
    first, again, other = (apply(choice, resnet(), seed).state_dict() for seed in (0, 0, 1))
    if choice not in {"default", "whitening", "whitening_dirac"}:  # these leave what the layers drew
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        assert not torch.equal(first["head.weight"], other["head.weight"])
    model = apply(choice, resnet())
    model(images(4)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


SCHEMES: dict[str, Callable[[int, int], float]] = {
    "normal": lambda fan_in, fan_out: 0.01**2,
    "uniform": lambda fan_in, fan_out: 0.05**2 / 3,
    "fan_in_normal": lambda fan_in, fan_out: 1 / fan_in,
    "fan_in_uniform": lambda fan_in, fan_out: 1 / fan_in,
    "fan_out_normal": lambda fan_in, fan_out: 1 / fan_out,
    "fan_out_uniform": lambda fan_in, fan_out: 1 / fan_out,
    "xavier_normal": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "xavier_uniform": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "kaiming_normal": lambda fan_in, fan_out: 2 / fan_in,
    "kaiming_uniform": lambda fan_in, fan_out: 2 / fan_in,
}


@pytest.mark.parametrize("choice", SCHEMES)
def test_variances_of_layers(choice: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 48, 5),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, groups=4),
        nn.ConvTranspose2d(96, 24, 3),
        nn.Linear(200, 400),
        nn.BatchNorm1d(7),
    )
    apply(choice, model)
    real = {0: (16 * 25, 48 * 25), 2: (12 * 9, 24 * 9), 3: (96 * 9, 24 * 9), 4: (200, 400)}
    for index, (fan_in, fan_out) in real.items():
        weight, bias = model[index].get_parameter("weight"), model[index].get_parameter("bias")
        expected = SCHEMES[choice](fan_in, fan_out)
        # The relative standard error of a measured variance is at most sqrt(2 / numel); four of them.
        assert weight.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / weight.numel())), index
        assert abs(weight.mean().item()) < 4 * math.sqrt(expected / weight.numel())
        assert not bias.any()
        if choice.endswith("uniform"):
            assert weight.abs().max().item() == pytest.approx(math.sqrt(3 * expected), rel=0.01)
        else:
            assert weight.abs().max() > 3 * math.sqrt(expected)
    assert model[5].get_parameter("weight").eq(1).all()


def test_kaiming_modes_and_gain() -> None:
    for changes, expected in (({"mode": "fan_out"}, 2 / 300), ({"mode": "fan_in", "gain": 3.0}, 9 / 200)):
        weight = apply("kaiming_normal", mlp(), **changes).get_parameter("layer2.linear.weight")
        assert weight.var().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), math.sqrt(2)),
        (nn.LeakyReLU(), math.sqrt(2 / (1 + 0.01**2))),
        (nn.LeakyReLU(0.5), math.sqrt(2 / (1 + 0.5**2))),
        (nn.Tanh(), 5 / 3),
        (nn.Sigmoid(), 1),
        (nn.SELU(), 0.75),
        (nn.Identity(), 1),
        # of other packages: 1 / sqrt(E[f(z)^2]), by integration over z
        (nn.ReLU6(), math.sqrt(2)),
        (nn.Hardswish(), 1.73666),
        (nn.PReLU(init=0.25), math.sqrt(2 / (1 + 0.25**2))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gains(activation: nn.Module, expected: float) -> None:
    """As torch's where it has one."""
    rel = 1e-3 if isinstance(activation, nn.ReLU6 | nn.Hardswish) else 1e-6
    assert init.activation_gain(nn.Sequential(nn.Linear(3, 3), activation)) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "silu", "elu", "mish", "softplus", "softsign"])
def test_other_gains_preserve_the_second_moment(activation: str) -> None:
    model = mlp(activation)
    z = torch.randn(2_000_000, dtype=torch.float64, generator=generator())
    after = model.get_submodule("layer1.activation")(z)
    assert init.activation_gain(model) ** 2 * after.square().mean().item() == pytest.approx(1, rel=0.01)


def test_orthogonal_has_orthonormal_rows_or_columns_times_the_gain() -> None:
    for gain, expected in ((1.0, 1.0), (None, 2.0)):
        model = apply("orthogonal", mlp(), gain=gain)
        wide = model.get_parameter("layer1.linear.weight")  # 200 x 768
        tall = model.get_parameter("layer2.linear.weight")  # 300 x 200
        torch.testing.assert_close(wide @ wide.T, expected * torch.eye(200), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tall.T @ tall, expected * torch.eye(200), atol=1e-5, rtol=1e-5)


def test_dirac_convolutions_are_the_identity() -> None:
    model = apply("dirac", nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 5, padding=2), nn.Linear(9, 5)))
    maps = images(2)
    torch.testing.assert_close(model[0](maps), torch.cat([maps, maps], 1))  # type: ignore[index]
    torch.testing.assert_close(model[1](model[0](maps)), torch.cat([maps, maps[:, :1]], 1))  # type: ignore[index]
    assert model.get_parameter("2.weight").unique().numel() == 45


@pytest.mark.parametrize("model", [resnet(norm="none"), mlp("tanh"), resnet(norm="batch", norm_affine=False)])
def test_lsuv_gives_every_layer_unit_variance(model: nn.Module) -> None:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    apply("lsuv", model)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    variances = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
            variances[name] = output.var().item()

        return hook

    for weight in init.weights(model):
        weight.layer.register_forward_hook(measure(weight.name))
    model.train()(images())
    assert len(variances) in {3, 8}
    assert all(abs(variance - 1) < 0.11 for variance in variances.values()), variances


def test_lsuv_rejects_constant_outputs() -> None:
    with pytest.raises(UserError, match=r"init=lsuv: the output of layer1\.linear is constant"):
        apply("lsuv", mlp(), inputs=torch.zeros(8, 3, 16, 16))


@pytest.mark.parametrize("width", [16, 27, 32, 64])
def test_whitening_decorrelates_the_patches(width: int) -> None:
    model = resnet(width=width)
    before = model.get_parameter("stem.0.weight").clone()
    apply("whitening", model, epsilon=0.0)
    after = model.get_parameter("stem.0.weight")
    responses = nn.functional.conv2d(images().double(), after.double())
    whitened = responses[:, :27].transpose(0, 1).flatten(1)
    second_moments = whitened @ whitened.T / whitened.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(min(width, 27)).double(), atol=1e-3, rtol=0)
    negatives = min(width, 54) - 27
    if negatives > 0:
        assert torch.equal(after[27 : 27 + negatives], -after[:negatives])
    assert torch.equal(after[54:], before[54:])
    # The largest eigenvalue comes first: a smooth filter of small weights, as the patches vary most along it.
    assert after[0].norm() < after[min(width, 27) - 1].norm()


def test_whitening_matches_numpys_eigendecomposition() -> None:
    """Filter i is the i-th eigenvector divided by the root of its eigenvalue, up to the sign."""
    model = apply("whitening", resnet(width=64), epsilon=0.01)
    batch = images().double().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(batch, (3, 3), axis=(2, 3))  # [B, C, H', W', 3, 3]
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    eigenvalues, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    expected = (vectors / np.sqrt(eigenvalues + 0.01)).T[::-1]
    found = model.get_parameter("stem.0.weight").detach().double().numpy()[:27].reshape(27, 27)
    signs = np.sign((found * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(found, signs * expected, rtol=0, atol=1e-4)


def test_whitening_dirac_copies_channels_and_rescales_the_head() -> None:
    """Filter i of another convolution is one at the kernel's centre of channel i and zero elsewhere; the filters beyond
    the channels stay as they were drawn."""
    model = resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply("whitening_dirac", model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convolutions[1:]:
        weight, old = model.get_parameter(f"{name}.weight"), before[f"{name}.weight"]
        inputs = weight.shape[1]
        expected = torch.zeros_like(weight[:inputs])
        for i in range(inputs):
            expected[i, i, 1, 1] = 1.0
        assert torch.equal(weight[:inputs], expected) and torch.equal(weight[inputs:], old[inputs:])
    head = model.get_parameter("head.weight")
    assert head.std().item() == pytest.approx(1.0)
    torch.testing.assert_close(head / head.norm(), before["head.weight"] / before["head.weight"].norm())


def test_whitening_dirac_copies_the_channels_of_every_group() -> None:
    model = apply(
        "whitening_dirac", nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4, padding=1)), head_std=None
    )
    maps = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(model[1](maps), maps + model.get_parameter("1.bias").view(8, 1, 1))  # type: ignore[index]


@pytest.mark.parametrize("choice", ["kaiming_normal", "whitening"])
@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_computed_from_other_parameters_are_refused(wrap: Callable[..., nn.Module], choice: str) -> None:
    """No scheme would reach them: they were left as they are, and the older weight_norm got random norms."""
    model = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match="init: 0 computes its weights from other parameters"):
        apply(choice, model)
    apply("default", model)


def test_head_std_requires_another_layer() -> None:
    with pytest.raises(UserError, match=r"init\.head_std=1: the model has one layer only"):
        apply("whitening_dirac", nn.Sequential(nn.Conv2d(3, 8, 3)))


class _GatedConvolutions(nn.Module):
    """Its linear layer is a gate, registered last and called before the head, a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem, self.gate = nn.Conv2d(8, 5, 1), nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        gates = self.gate(maps.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(maps * gates).mean((2, 3))


def test_head_std_rescales_the_layer_of_the_outputs() -> None:
    model = _GatedConvolutions()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply("whitening", model, head_std=0.5)
    assert model.head.weight.std().item() == pytest.approx(0.5)
    torch.testing.assert_close(model.gate.weight, before["gate.weight"], rtol=0, atol=0)


def test_whitening_requires_a_convolution_of_the_image() -> None:
    with pytest.raises(UserError, match="init=whitening"):
        apply("whitening", mlp())


@pytest.mark.parametrize("choice", CHOICES)
def test_every_scheme_supports_zero_last_gamma(choice: str) -> None:
    for on in (True, False):
        model = apply(choice, resnet(), zero_last_gamma=on)
        last = [parameter for name, parameter in model.named_parameters() if name.endswith("norm2.weight")]
        others = [parameter for name, parameter in model.named_parameters() if name.endswith("norm1.weight")]
        assert len(last) == len(others) == 3
        assert all(parameter.eq(0 if on else 1).all() for parameter in last)
        assert all(parameter.eq(1).all() for parameter in others)


def test_zero_last_gamma_requires_residual_blocks() -> None:
    with pytest.raises(UserError, match=r"init\.zero_last_gamma=true"):
        apply("kaiming_normal", mlp(), zero_last_gamma=True)


def test_embeddings_are_not_changed() -> None:
    embedding = nn.Embedding(5, 4)
    before = embedding.weight.clone()
    apply("normal", nn.Sequential(embedding, nn.Linear(4, 2)))
    assert torch.equal(embedding.weight, before)


def test_norms_over_several_dimensions_are_not_changed() -> None:
    model = apply("kaiming_normal", nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 8, 8])))
    assert model.get_parameter("1.weight").eq(1).all()


def test_dirac_repeats_channels_without_a_remainder_of_zeros() -> None:
    """3 channels to 16: zero filters before a ReLU would never get a gradient."""
    maps = images(2)
    model = apply("dirac", nn.Conv2d(3, 16, 3, padding=1))
    torch.testing.assert_close(model(maps), maps.repeat(1, 6, 1, 1)[:, :16])
    grouped = apply("dirac", nn.Conv2d(6, 8, 3, padding=1, groups=2))
    six = torch.cat([maps, -maps], 1)
    torch.testing.assert_close(grouped(six), torch.cat([maps, maps[:, :1], -maps, -maps[:, :1]], 1))


def test_orthogonal_treats_the_groups_of_a_convolution_separately() -> None:
    """The filters of a depthwise convolution have the norm `gain`, whatever their number."""
    model = apply("orthogonal", nn.Conv2d(64, 64, 3, groups=64), gain=2.0)
    torch.testing.assert_close(model.get_parameter("weight").flatten(1).norm(dim=1), torch.full((64,), 2.0))


def test_gain_of_an_activation_in_place() -> None:
    assert init.activation_gain(nn.ELU(1.0, inplace=True)) == pytest.approx(init.activation_gain(nn.ELU()))


def test_lsuv_refuses_layers_with_several_outputs() -> None:
    with pytest.raises(UserError, match="init=lsuv: LSTM returns more than one tensor"):
        apply("lsuv", nn.LSTM(16, 4), inputs=torch.randn(8, 3, 16))
