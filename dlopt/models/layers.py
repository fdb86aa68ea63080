"""Shared by the models: normalization, activations, small layers, and checks of the input's shape."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Positive, PositiveFraction

NormKind = Literal["batch", "layer", "group", "instance", "none"]
Activation = Literal[
    "relu", "relu2", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "sigmoid",
    "identity",
]  # fmt: skip


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (So et al. 2021, "Primer")."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.relu(input).square()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
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
        virtual_batches = len(input) // self.ghost_batch if self.training else 1
        normalize = super().forward
        if virtual_batches < 2:
            return normalize(input)
        return torch.cat([normalize(batch) for batch in input.tensor_split(virtual_batches)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch={self.ghost_batch}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Ghost batch normalization (Hoffer, Hubara & Soudry 2017, algorithm 1) of [B, F] or [B, F, T].

    In training, each virtual batch of about `ghost_batch` adjacent samples is normalized by its own statistics. The
    batch is split into B // ghost_batch virtual batches whose sizes differ by at most one, so there is no tiny
    remainder. The running averages are updated by one virtual batch after the other, as in the paper. In evaluation
    it is ordinary batch normalization.
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """`GhostBatchNorm1d` for feature maps [B, C, H, W]."""


class _InstanceNorm(_NormBase):
    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 0:
            return super().forward(input)
        # The empty shard of a rank, which torch's instance norm refuses. One channel per group is the same function.
        return nn.functional.group_norm(input, self.num_features, self.weight, self.bias, self.eps)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`nn.InstanceNorm1d` that also accepts an empty batch [0, F, T]."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` that also accepts an empty batch [0, C, H, W]."""


class ChannelsFirst(nn.Module):
    """Applies a normalization of [B, F, T] to tokens [B, T, F]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.transpose(1, 2)).transpose(1, 2)


class NormKeys(TypedDict):
    """The normalization keys of a model."""

    norm: NormKind
    norm_affine: bool
    norm_groups: Count
    norm_ghost_batch: Count | None
    norm_eps: Positive
    norm_momentum: PositiveFraction  # weight of the newest batch in the running statistics


class Norm:
    """Builds the normalization layers of a model from its keys `norm` and `norm_...`.

    A layer before a normalization has no bias: batch and instance normalization subtract it, and the beta of the others
    replaces it. With `norm_affine=false` there is therefore neither bias nor gamma and beta.

    Errors: UserError for ghost batches without batch normalization, or a normalization that features do not support.
    """

    def __init__(self, **keys: Unpack[NormKeys]) -> None:
        self.kind = keys["norm"]
        self.affine = keys["norm_affine"]
        self.groups = keys["norm_groups"]
        self.ghost_batch = keys["norm_ghost_batch"]
        self.eps = keys["norm_eps"]
        self.momentum = keys["norm_momentum"]
        if self.ghost_batch is not None and self.kind != "batch":
            raise UserError(
                f"model.norm_ghost_batch={self.ghost_batch}: virtual batches need model.norm=batch, "
                f"not {self.kind}; set model.norm_ghost_batch=null"
            )

    @property
    def bias(self) -> bool:
        """Whether the layer before the normalization has a bias."""
        return self.kind == "none"

    def groups_of(self, channels: int) -> int:
        """Returns the largest divisor of `channels`, at most `groups`, with two or more channels per group.

        A group of one channel would be instance normalization, whose output is zero for maps of one pixel.
        """
        limit = max(1, min(self.groups, channels // 2))
        return next(count for count in range(limit, 0, -1) if channels % count == 0)

    def _batch_norm(self, features: int, batch_norm: type[_BatchNorm], ghost: type[_GhostBatchNorm]) -> nn.Module:
        keys: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum, "affine": self.affine}
        if self.ghost_batch is None:
            return batch_norm(features, **keys)
        return ghost(features, ghost_batch=self.ghost_batch, **keys)

    def maps(self, channels: int) -> nn.Module:
        """Builds it for maps [B, C, H, W]. `layer` is one group of all channels, with gamma and beta per channel."""
        match self.kind:
            case "batch":
                return self._batch_norm(channels, nn.BatchNorm2d, GhostBatchNorm2d)
            case "layer" | "group":
                groups = 1 if self.kind == "layer" else self.groups_of(channels)
                return nn.GroupNorm(groups, channels, eps=self.eps, affine=self.affine)
            case "instance":
                return InstanceNorm2d(channels, eps=self.eps, affine=self.affine)
        return nn.Identity()

    def vectors(self, features: int) -> nn.Module:
        """Builds it for feature vectors [B, F]."""
        match self.kind:
            case "batch":
                return self._batch_norm(features, nn.BatchNorm1d, GhostBatchNorm1d)
            case "layer":
                return nn.LayerNorm(features, eps=self.eps, elementwise_affine=self.affine)
            case "instance":
                raise UserError(
                    "model.norm=instance: requires feature maps, but this model has feature vectors; "
                    "use batch, layer, group or none"
                )
        return self.maps(features)

    def tokens(self, features: int) -> nn.Module:
        """Builds it for tokens [B, T, F]: `layer` normalizes each token, the others treat T as the pixels."""
        match self.kind:
            case "layer":
                return nn.LayerNorm(features, eps=self.eps, elementwise_affine=self.affine)
            case "instance":
                return ChannelsFirst(InstanceNorm1d(features, eps=self.eps, affine=self.affine))
            case "none":
                return nn.Identity()
        return ChannelsFirst(self.vectors(features))


def activation(name: Activation) -> nn.Module:
    """Builds an elementwise activation by name. Never in place, so that hooks see the unchanged input."""
    return ACTIVATIONS[name]()


class GlobalAveragePool(nn.Module):
    """[B, C, H, W] -> [B, C]. Unlike AdaptiveAvgPool2d, the mean has a deterministic backward on a GPU."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    """Builds a convolution with an odd kernel and "same" padding: output size is ceil(size / stride)."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int, norm: Norm, *, stride: int = 1
) -> tuple[nn.Conv2d, nn.Module, nn.ReLU]:
    """Builds a convolution (see `conv`), its normalization, and ReLU."""
    return conv(inputs, outputs, kernel, stride=stride, bias=norm.bias), norm.maps(outputs), nn.ReLU()


def image_shape(input_shape: tuple[int, ...], model: str) -> tuple[int, int, int]:
    """Returns (C, H, W) of the input. Errors: UserError for samples that are not images."""
    if len(input_shape) != 3:
        raise UserError(
            f"model: {model} requires images [channels, height, width], but the samples have the shape "
            f"{list(input_shape)}; use model=mlp or other data"
        )
    return input_shape[0], input_shape[1], input_shape[2]


def hidden_features(width: int, expansion: float) -> int:
    """Returns the hidden features of a transformer's MLP. Errors: UserError if `expansion` leaves none."""
    hidden = round(width * expansion)
    if hidden == 0:
        raise UserError(f"model.expansion={expansion:g}: leaves no hidden features at model.width={width}; increase it")
    return hidden


def example_inputs(model: nn.Module, shape: tuple[int, ...], *, count: int, device: torch.device | str) -> Tensor:
    """Returns zeros [count, *shape] of the model's input type: tokens (int64), or the dtype of its weights."""
    reads_tokens = getattr(model, "vocabulary", None) is not None
    dtype = torch.int64 if reads_tokens else next(model.parameters()).dtype
    return torch.zeros(count, *shape, device=device, dtype=dtype)


def copied_state(model: nn.Module, device: torch.device | str) -> dict[str, Tensor]:
    """Copies the parameters and buffers to a device, for `functional_call`, which takes tied ones by one name only."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().to(device, copy=True) for name, tensor in tensors}


def check_instance_norm(model: nn.Module, input_shape: tuple[int, ...], norm: NormKind) -> None:
    """Raises UserError if instance normalization gets maps of one pixel, by a forward pass on the meta device."""
    if norm != "instance":
        return
    state = copied_state(model, "meta")
    images = torch.empty(2, *input_shape, device="meta", dtype=next(model.parameters()).dtype)
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, (images,))
    except ValueError as error:
        height, width = input_shape[-2:]
        raise UserError(
            f"model.norm=instance: images of {height}x{width} become maps of one pixel in this model, which cannot be "
            "normalized; use batch, layer, group or none, or a larger data.image_size"
        ) from error


def zero_branch(norm: nn.Module, layer: nn.Module) -> None:
    """Makes a residual branch ending in `layer`, `norm` output zero: gamma = 0 (Goyal et al. 2017, section 5.1).

    Without normalization, zeroes the layer itself (Fixup's first rule; Zhang, Dauphin & Ma 2019).
    Errors: UserError if the normalization has no gamma.
    """
    gamma = getattr(norm, "weight", None)
    if gamma is not None:
        nn.init.zeros_(gamma)
    elif isinstance(norm, nn.Identity):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    else:
        raise UserError(
            "init.zero_last_gamma=true: the blocks have no gamma with model.norm_affine=false; "
            "set model.norm_affine=true or model.norm=none"
        )


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Context in which all layers are in evaluation mode; restores the mode of each layer afterwards."""
    training = {layer: layer.training for model in models for layer in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train(training[model])  # a layer may do more than set its mode, such as splitting merged weights
        for layer, was_training in training.items():
            layer.training = was_training


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context in which these layers have other methods `forward`. Unlike hooks, they change nothing else of a layer."""
    own = {layer: vars(layer).get("forward") for layer in forwards}  # of a layer to which another package gave its own
    try:
        for layer, forward in forwards.items():
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, former in own.items():
            vars(layer)["forward"] = former
            if former is None:
                del vars(layer)["forward"]


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Context in which torch's transformer layers call their parts in evaluation mode, too.

    Their fused kernels would only read the weights: hooks for all modules (`register_module_forward_hook`), which torch
    does not see, would miss the parts.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which batch norm uses the batch's statistics and does not update its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.momentum = 0.0  # instance norm ignores track_running_stats
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.track_running_stats = True
            norm.momentum = momentum
