"""What the models share: the choice of normalization, activations, small layers, and checks of the input's shape."""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.errors import UserError
from dlopt.ranges import Count, Positive, PositiveFraction

NormKind = Literal["batch", "layer", "group", "instance", "none"]
Activation = Literal[
    "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "sigmoid", "identity"
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


class _GhostBatchNorm(_BatchNorm):
    def __init__(self, features: int, *, ghost_batch: int, **batch_norm: Any) -> None:
        super().__init__(features, **batch_norm)
        self.ghost_batch = ghost_batch

    def forward(self, input: Tensor) -> Tensor:
        parts = len(input) // self.ghost_batch if self.training else 1
        normalize = super().forward
        if parts < 2:
            return normalize(input)
        return torch.cat([normalize(part) for part in input.tensor_split(parts)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch={self.ghost_batch}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Ghost batch normalization (Hoffer, Hubara & Soudry 2017, algorithm 1) of [B, F] or [B, F, T].

    In training each virtual batch of about `ghost_batch` neighbouring samples is normalized by its own statistics.
    A batch that is no multiple is cut into B // ghost_batch virtual batches whose sizes differ by one at most, so no
    tiny remainder gets statistics of its own. The running averages see the virtual batches one after the other, as in
    the paper. In evaluation it is ordinary batch normalization.
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """The same as `GhostBatchNorm1d` for feature maps [B, C, H, W]."""


class ChannelsFirst(nn.Module):
    """Applies a normalization of [B, F, T] to tokens [B, T, F]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.transpose(1, 2)).transpose(1, 2)


class NormKeys(TypedDict):
    """The keys of a model that say how it normalizes."""

    norm: NormKind
    norm_affine: bool
    norm_groups: Count
    norm_ghost_batch: Count | None
    norm_eps: Positive
    norm_momentum: PositiveFraction


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The normalization that a model is built with: its keys `norm` and `norm_...`.

    A layer in front of a normalization has no bias: batch and instance normalization subtract it again, and the
    others' beta takes its place. `norm_affine=false` therefore leaves neither bias nor gamma and beta.

    Errors: UserError for ghost batches with another normalization than batch, or where a kind has no meaning.
    """

    kind: NormKind
    affine: bool
    groups: int
    ghost_batch: int | None
    eps: float
    momentum: float  # of the running statistics: the share of the newest batch

    @classmethod
    def of(cls, **keys: Unpack[NormKeys]) -> "Norm":
        return cls(
            kind=keys["norm"],
            affine=keys["norm_affine"],
            groups=keys["norm_groups"],
            ghost_batch=keys["norm_ghost_batch"],
            eps=keys["norm_eps"],
            momentum=keys["norm_momentum"],
        )

    def __post_init__(self) -> None:
        if self.ghost_batch is not None and self.kind != "batch":
            raise UserError(
                f"model.norm_ghost_batch={self.ghost_batch}: virtual batches need model.norm=batch, "
                f"not {self.kind}; set model.norm_ghost_batch=null"
            )

    @property
    def bias(self) -> bool:
        """Whether the layer in front has a bias."""
        return self.kind == "none"

    def groups_of(self, channels: int) -> int:
        """The largest divisor of `channels` that is at most `groups` and leaves two channels or more in a group.

        A group of one channel would be instance normalization, and zero where the map is a single pixel.
        """
        most = max(1, min(self.groups, channels // 2))
        return next(count for count in range(most, 0, -1) if channels % count == 0)

    def maps(self, channels: int) -> nn.Module:
        """For feature maps [B, C, H, W]. `layer` is one group over all channels, with gamma and beta per channel."""
        match self.kind:
            case "batch" if self.ghost_batch is not None:
                return GhostBatchNorm2d(
                    channels,
                    eps=self.eps,
                    momentum=self.momentum,
                    affine=self.affine,
                    ghost_batch=self.ghost_batch,
                )
            case "batch":
                return nn.BatchNorm2d(channels, eps=self.eps, momentum=self.momentum, affine=self.affine)
            case "layer":
                return nn.GroupNorm(1, channels, eps=self.eps, affine=self.affine)
            case "group":
                return nn.GroupNorm(self.groups_of(channels), channels, eps=self.eps, affine=self.affine)
            case "instance":
                return nn.InstanceNorm2d(channels, eps=self.eps, affine=self.affine)
        return nn.Identity()

    def vectors(self, features: int) -> nn.Module:
        """For feature vectors [B, F]."""
        match self.kind:
            case "batch" if self.ghost_batch is not None:
                return GhostBatchNorm1d(
                    features,
                    eps=self.eps,
                    momentum=self.momentum,
                    affine=self.affine,
                    ghost_batch=self.ghost_batch,
                )
            case "batch":
                return nn.BatchNorm1d(features, eps=self.eps, momentum=self.momentum, affine=self.affine)
            case "layer":
                return nn.LayerNorm(features, eps=self.eps, elementwise_affine=self.affine)
            case "group":
                return nn.GroupNorm(self.groups_of(features), features, eps=self.eps, affine=self.affine)
            case "instance":
                raise UserError(
                    "model.norm=instance: instance normalization averages over the pixels of one feature map, and this "
                    "model's features have no pixels; use batch, layer, group or none"
                )
        return nn.Identity()

    def tokens(self, features: int) -> nn.Module:
        """For sequences of tokens [B, T, F]: `layer` normalizes each token, the others take T for the pixels."""
        match self.kind:
            case "layer":
                return nn.LayerNorm(features, eps=self.eps, elementwise_affine=self.affine)
            case "instance":
                return ChannelsFirst(nn.InstanceNorm1d(features, eps=self.eps, affine=self.affine))
            case "none":
                return nn.Identity()
        return ChannelsFirst(self.vectors(features))


def activation(name: Activation) -> nn.Module:
    """The elementwise activation of that name. None works in place, so that hooks see what went in."""
    return ACTIVATIONS[name]()


class GlobalAveragePool(nn.Module):
    """[B, C, H, W] -> [B, C]. The mean has a deterministic backward on a GPU; AdaptiveAvgPool2d has none."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    """A convolution with an odd kernel that keeps the extent (divided by the stride, rounded up)."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)


def image_shape(input_shape: tuple[int, ...], model: str) -> tuple[int, int, int]:
    """(C, H, W) of the input. Errors: UserError where the data are no images."""
    if len(input_shape) != 3:
        raise UserError(
            f"model: {model} reads images [channels, height, width], but one sample of the data has the shape "
            f"{list(input_shape)}; use model=mlp or other data"
        )
    return input_shape[0], input_shape[1], input_shape[2]


def check_instance_norm(model: nn.Module, input_shape: tuple[int, ...], norm: Norm) -> None:
    """Refuses instance normalization over maps of one pixel, which a forward pass without data finds.

    Errors: UserError.
    """
    if norm.kind != "instance":
        return
    state = {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()}
    images = torch.empty(2, *input_shape, device="meta", dtype=next(model.parameters()).dtype)
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, (images,))
    except ValueError as error:
        height, width = input_shape[-2:]
        raise UserError(
            f"model.norm=instance: images of {height}x{width} become maps of one pixel in this model, over which "
            "nothing can be averaged; use batch, layer, group or none, or a larger data.image_size"
        ) from error


def zero_branch(norm: nn.Module, layer: nn.Module) -> None:
    """Makes a residual branch that ends in `layer`, `norm` output zero: gamma = 0 (Goyal et al. 2017, section 5.1).

    Without a normalization the layer itself becomes zero (Fixup's first rule; Zhang, Dauphin & Ma 2019).
    Errors: UserError where the normalization has no gamma.
    """
    gamma = getattr(norm, "weight", None)
    if gamma is not None:
        nn.init.zeros_(gamma)
    elif isinstance(norm, nn.Identity):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    else:
        raise UserError(
            "init.zero_last_gamma=true: with model.norm_affine=false the blocks have no gamma; "
            "set model.norm_affine=true or model.norm=none"
        )
