"""Vision transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

from collections import OrderedDict
from typing import Unpack

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Depth, Fraction, Positive
from dlopt.models.layers import Norm, NormKeys, hidden_features, image_shape
from dlopt.models.linear import Linear

_FUSED_TOKENS = 128  # with the 65 of an image of 32 x 32, the fused kernel is hardly faster


class PatchEmbedding(nn.Module):
    """[B, C, H, W] -> [B, 1 + patches, width]: class token and one token per patch, plus learned positions."""

    is_one_layer = True  # see `dlopt.optim.parameters`

    def __init__(self, channels: int, width: int, patch: int, patches: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + patches, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.positions, std=0.02)

    def no_weight_decay(self) -> tuple[str, ...]:
        return "class_token", "positions"

    def forward(self, images: Tensor) -> Tensor:
        patches = self.project(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], 1)
        return self.dropout(tokens + self.positions)


class FullAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all tokens; q, k, v: [B, heads, T, d].

    Uses torch's fused kernel for many tokens, such as the 197 of an image of 224 x 224 in patches of 16. Its backward
    pass has no derivative: second-order optimizers select the kernel that has one (`Step.loss`).
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] >= _FUSED_TOKENS:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return self.weights(q, k) @ v

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns the attention weights [B, heads, T, T]."""
        return torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) on [B, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.attend = FullAttention()
        self.project = Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, d]
        return self.project(self.attend(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer MLP, each with a skip connection, on [B, T, width].

    `pre_norm`: x + f(norm(x)), as in the vision transformer; else norm(x + f(x)), as in Vaswani et al. 2017, which
    does not train without warmup (Xiong et al. 2020).
    """

    is_one_layer = True  # see `dlopt.optim.parameters`

    def __init__(self, width: int, heads: int, expansion: float, *, pre_norm: bool, dropout: float, norm: Norm) -> None:
        super().__init__()
        hidden = hidden_features(width, expansion)
        self.norm1 = norm.tokens(width)
        self.attention = SelfAttention(width, heads)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = norm.tokens(width)
        self.mlp = nn.Sequential(
            Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), Linear(hidden, width), nn.Dropout(dropout)
        )
        self.pre_norm = pre_norm

    def forward(self, tokens: Tensor) -> Tensor:
        if self.pre_norm:
            tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
            return tokens + self.mlp(self.norm2(tokens))
        tokens = self.norm1(tokens + self.dropout(self.attention(tokens)))
        return self.norm2(tokens + self.mlp(tokens))

    def zero_init_last(self) -> None:
        """Makes both branches start at zero."""
        for layer in (self.attention.project, self.mlp[3]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


class ClassToken(nn.Module):
    """[B, T, width] -> [B, width]: the first token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class ViT(nn.Sequential):
    """Patches of `patch` x `patch` pixels, a class token, learned positions, `depth` blocks, and a linear classifier.

    Images [B, C, H, W] of one fixed size -> [B, classes].
    Errors: UserError if `patch` does not divide the image size, `heads` does not divide `width`, `expansion` leaves no
    hidden features, or samples are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        patch: Count,
        width: Count,
        depth: Depth,
        heads: Count,
        expansion: Positive,
        pre_norm: bool,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, image_height, image_width = image_shape(input_shape, "a vision transformer")
        if image_height % patch or image_width % patch:
            raise UserError(
                f"model.patch={patch}: does not divide the image size {image_height}x{image_width}; "
                "use a divisor of both, or another data.image_size"
            )
        if width % heads:
            raise UserError(f"model.heads={heads}: must divide model.width={width}")
        normalize = Norm(**norm)
        patches = (image_height // patch) * (image_width // patch)
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        modules["embedding"] = PatchEmbedding(channels, width, patch, patches, dropout)
        for index in range(depth):
            modules[f"block{index + 1}"] = TransformerBlock(
                width, heads, expansion, pre_norm=pre_norm, dropout=dropout, norm=normalize
            )
        modules["norm"] = normalize.tokens(width) if pre_norm else nn.Identity()
        modules["pool"] = ClassToken()
        modules["head"] = Linear(width, classes)
        super().__init__(modules)
