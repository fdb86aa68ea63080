"""GPT: a decoder-only transformer (Radford et al. 2019) with the options of its successors."""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Depth, Fraction, Positive
from dlopt.models.layers import activation, hidden_features
from dlopt.models.linear import Linear, WideLinear

Positions = Literal["learned", "rotary"]
NormChoice = Literal["layer", "rms"]
AttentionScale = Literal["sqrt", "linear"]
MlpActivation = Literal["gelu", "relu2", "swiglu"]

_EPS = 1e-5
_ROTARY_BASE = 10_000.0


class KeyValueCache:
    """Keys and values [B, heads, T, d] of the tokens that a layer has read, for sampling."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all keys and values."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


class TokenEmbedding(nn.Module):
    """Tokens [B, T] -> [B, T, width], plus learned positions if `context` is given."""

    is_one_layer = True  # see `dlopt.optim.parameters`

    def __init__(self, vocabulary: int, width: int, context: int | None, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = None if context is None else nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """`start`: position of the first token."""
        features = self.tokens(tokens)
        if self.positions is not None:
            features = features + self.positions(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        return self.dropout(features)


class CausalAttention(nn.Module):
    """softmax(q k^T * scale) v over the present and earlier tokens; q, k, v: [B, heads, T, d].

    Queries may be fewer than keys: with a cache, they are the last tokens.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        if 1 < queries < keys:  # is_causal would align the first query with the first key, not the last with the last
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=self.scale)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns the attention weights [B, heads, T, T] of as many queries as keys, which `forward` never stores."""
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        return (q @ k.transpose(2, 3) * self.scale).masked_fill(later, -torch.inf).softmax(3)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2) on [B, T, width].

    The rows of `qkv` are ordered by head, then query, key, value: a slice of them holds whole heads. `qk_norm`
    normalizes each query and key to unit root mean square (Henry et al. 2020; Dehghani et al. 2023), without gamma.
    """

    def __init__(
        self, width: int, heads: int, *, rotary: bool, qk_norm: bool, scale: AttentionScale, bias: bool
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.rotary = rotary
        self.qk_norm = qk_norm
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.attend = CausalAttention(self.head_width ** (-0.5 if scale == "sqrt" else -1.0))
        self.project = Linear(width, width, bias=bias)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        qkv = self.qkv(tokens).unflatten(2, (-1, 3, self.head_width))
        q, k, v = qkv.transpose(1, 2).unbind(3)  # [B, heads, T, d]
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_width,), eps=_EPS), F.rms_norm(k, (self.head_width,), eps=_EPS)
        if self.rotary:
            start = 0 if cache is None else len(cache)
            q, k = rotate(q, start), rotate(k, start)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.project(self.attend(q, k, v).transpose(1, 2).flatten(2))


def rotate(vectors: Tensor, start: int) -> Tensor:
    """Applies rotary position embedding (Su et al. 2021, equation 34) to [B, heads, T, d] from position `start`.

    Element i of the first half and of the second half of d are one pair, rotated by position * 10000^(-2 i / d).
    """
    half = vectors.shape[3] // 2
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    positions = torch.arange(start, start + vectors.shape[2], device=vectors.device, dtype=dtype)
    frequencies = _ROTARY_BASE ** (-torch.arange(half, device=vectors.device, dtype=dtype) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], 3)


class FeedForward(nn.Module):
    """down(gelu(up(x))), down(relu(up(x))^2), or down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer 2020, equation 6), on
    [B, T, width]."""

    def __init__(self, width: int, hidden: int, kind: MlpActivation, *, bias: bool) -> None:
        super().__init__()
        gated = kind == "swiglu"
        self.up = Linear(width, hidden, bias=bias)
        self.gate = Linear(width, hidden, bias=bias) if gated else None
        self.activation = activation("silu" if kind == "swiglu" else kind)
        self.down = Linear(hidden, width, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(tokens)))
        return self.down(self.activation(self.gate(tokens)) * self.up(tokens))


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on [B, T, width]."""

    is_one_layer = True  # see `dlopt.optim.parameters`

    def __init__(
        self, attention: CausalSelfAttention, mlp: FeedForward, norm1: nn.Module, norm2: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = norm2
        self.mlp = mlp
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        tokens = tokens + self.dropout1(self.attention(self.norm1(tokens), cache))
        return tokens + self.dropout2(self.mlp(self.norm2(tokens)))

    @property
    def residual_projections(self) -> tuple[nn.Linear, ...]:
        """The layers whose outputs are added to the residual stream."""
        return self.attention.project, self.mlp.down

    def zero_init_last(self) -> None:
        """Makes both branches start at zero."""
        for layer in self.residual_projections:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


class GPT(nn.Sequential):
    """Token embedding, `depth` pre-norm blocks, a last norm and a linear layer. Tokens [B, T] -> logits [B, T, V].

    Args:
        input_shape: (T,): the largest number of tokens.
        vocabulary: V; None if the data is not a text.
        tied_embeddings: the last layer uses the weights of the token embedding (Press & Wolf 2017).
        attention_scale: 1/sqrt(d) or, for muP, 1/d (Yang et al. 2021, definition 4.1), with d features per head.

    Errors: UserError for data other than text, or if `heads` does not divide `width`, `expansion` leaves no hidden
    features, or rotary positions have an odd number of features per head.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        vocabulary: int | None,
        width: Count,
        depth: Depth,
        heads: Count,
        expansion: Positive,
        norm: NormChoice,
        positions: Positions,
        activation: MlpActivation,
        qk_norm: bool,
        attention_scale: AttentionScale,
        tied_embeddings: bool,
        bias: bool,
        dropout: Fraction,
    ) -> None:
        if vocabulary is None:
            raise UserError(
                f"model=gpt: reads text, but the samples have the shape {list(input_shape)}; use data=python_source, "
                "data=text or data=tokens, or another model"
            )
        if width % heads:
            raise UserError(f"model.heads={heads}: must divide model.width={width}")
        if positions == "rotary" and width // heads % 2:
            raise UserError(f"model.positions=rotary: needs an even number of features per head, not {width // heads}")
        hidden = hidden_features(width, expansion)

        def normalization() -> nn.Module:
            return nn.LayerNorm(width, eps=_EPS, bias=bias) if norm == "layer" else nn.RMSNorm(width, eps=_EPS)

        modules: OrderedDict[str, nn.Module] = OrderedDict()
        learned = input_shape[0] if positions == "learned" else None
        modules["embedding"] = embedding = TokenEmbedding(vocabulary, width, learned, dropout)
        for index in range(depth):
            attention = CausalSelfAttention(
                width, heads, rotary=positions == "rotary", qk_norm=qk_norm, scale=attention_scale, bias=bias
            )
            mlp = FeedForward(width, hidden, activation, bias=bias)
            modules[f"block{index + 1}"] = GPTBlock(attention, mlp, normalization(), normalization(), dropout)
        modules["norm"] = normalization()
        modules["head"] = head = WideLinear(width, vocabulary, bias=False)
        if tied_embeddings:
            head.weight = embedding.tokens.weight
        super().__init__(modules)
        self.vocabulary = vocabulary
        self.depth = depth

    def next_logits(self, tokens: Tensor, caches: list[KeyValueCache]) -> Tensor:
        """Reads tokens [B, T] after those in the caches, one per block; returns the last token's logits [B, V]."""
        embedding, *blocks, norm, head = self
        features = embedding(tokens, start=len(caches[0]))
        for block, cache in zip(blocks, caches, strict=True):
            features = block(features, cache)
        logits: Tensor = head(norm(features[:, -1]))
        return logits
