"""Recurrent networks that read an image row by row, or a text token by token: tanh RNN and LSTM."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from dlopt.basics.ranges import Count, Fraction
from dlopt.models.layers import Norm, image_shape
from dlopt.models.linear import WideLinear

# Batch statistics differ between time steps, which have no pixels and no groups of channels.
RecurrentNorm = Literal["layer", "none"]


class Rows(nn.Module):
    """[B, C, H, W] -> [B, H, C*W]: one time step per row of pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.transpose(1, 2).flatten(2)


class LastStep(nn.Module):
    """[B, T, F] -> [B, F]: the features of the last time step."""

    def forward(self, sequence: Tensor) -> Tensor:
        return sequence[:, -1]


class RecurrentLayer(nn.Module):
    """h_t = tanh(norm(W x_t + U h_{t-1} + b)), h_0 = 0 (Elman 1990; the norm: Ba, Kiros & Hinton 2016, equation 4).

    [B, T, inputs] -> [B, T, hidden].
    """

    is_one_layer = True  # see `dlopt.optim.parameters`

    def __init__(self, inputs: int, hidden: int, norm: Norm) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, hidden, bias=norm.bias)
        self.hidden = nn.Linear(hidden, hidden, bias=False)
        self.norm = norm.vectors(hidden)
        self.activation = nn.Tanh()

    def forward(self, sequence: Tensor) -> Tensor:
        projected = self.input(sequence)
        state = projected.new_zeros(projected.shape[0], self.hidden.out_features)
        states = []
        for inputs in projected.unbind(1):
            state = self.activation(self.norm(inputs + self.hidden(state)))
            states.append(state)
        return torch.stack(states, 1)


class LSTMLayer(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000). [B, T, F] -> [B, T, H].

    i, f, g, o = norm(W x_t) + norm(U h_{t-1}) + b; c_t = s(f + forget_bias) c_{t-1} + s(i) tanh(g);
    h_t = s(o) tanh(norm(c_t)): the three normalizations of Ba, Kiros & Hinton 2016, equations 20 to 22.
    """

    is_one_layer = True  # see `dlopt.optim.parameters`

    def __init__(self, inputs: int, hidden: int, forget_bias: float, norm: Norm) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, 4 * hidden, bias=norm.bias)
        self.hidden = nn.Linear(hidden, 4 * hidden, bias=False)
        self.input_norm = norm.vectors(4 * hidden)
        self.hidden_norm = norm.vectors(4 * hidden)
        self.cell_norm = norm.vectors(hidden)
        self.activation = nn.Tanh()
        self.forget_bias = forget_bias

    def forward(self, sequence: Tensor) -> Tensor:
        projected = self.input_norm(self.input(sequence))
        cell = state = projected.new_zeros(projected.shape[0], self.hidden.in_features)
        states = []
        for inputs in projected.unbind(1):
            i, f, g, o = (inputs + self.hidden_norm(self.hidden(state))).chunk(4, dim=1)
            cell = torch.sigmoid(f + self.forget_bias) * cell + torch.sigmoid(i) * self.activation(g)
            state = torch.sigmoid(o) * self.activation(self.cell_norm(cell))
            states.append(state)
        return torch.stack(states, 1)


class RecurrentKeys(TypedDict):
    """The keys of both networks."""

    hidden: Count
    layers: Count
    dropout: Fraction
    norm: RecurrentNorm
    norm_affine: bool


class RNN(nn.Sequential):
    """`layers` tanh layers of `hidden` units over the rows, and a classifier on the last time step.

    Images [B, C, H, W] -> [B, classes]. For text, classifies every time step: tokens [B, T] -> [B, T, classes],
    with an embedding of each token in place of the rows. Does not use torch's fused kernels, which do not support
    second derivatives and every precision. Errors: UserError for samples that are not images or tokens.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        vocabulary: int | None = None,
        **keys: Unpack[RecurrentKeys],
    ) -> None:
        super().__init__(_network(RecurrentLayer, input_shape, classes, vocabulary, **keys))
        self.vocabulary = vocabulary


class LSTM(nn.Sequential):
    """`layers` LSTM layers of `hidden` units over the rows or tokens, and the classifier of `RNN`.

    `forget_bias` is added to the forget gate. It is not a parameter, so that no init scheme overwrites it (1:
    Jozefowicz et al. 2015). Images [B, C, H, W] -> [B, classes], tokens [B, T] -> [B, T, classes].
    Errors: UserError for samples that are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        vocabulary: int | None = None,
        forget_bias: float,
        **keys: Unpack[RecurrentKeys],
    ) -> None:
        def layer(inputs: int, hidden: int, norm: Norm) -> LSTMLayer:
            return LSTMLayer(inputs, hidden, forget_bias, norm)

        super().__init__(_network(layer, input_shape, classes, vocabulary, **keys))
        self.vocabulary = vocabulary


def _network(
    layer: Callable[[int, int, Norm], nn.Module],
    input_shape: tuple[int, ...],
    classes: int,
    vocabulary: int | None,
    *,
    hidden: int,
    layers: int,
    dropout: float,
    norm: RecurrentNorm,
    norm_affine: bool,
) -> OrderedDict[str, nn.Module]:
    """Builds the modules; `layer` builds a recurrent layer from (inputs, hidden units, normalization)."""
    inputs = hidden  # of an embedding
    if vocabulary is None:
        channels, _, width = image_shape(input_shape, "a recurrent net")
        inputs = channels * width
    normalize = Norm(
        norm=norm, norm_affine=norm_affine, norm_groups=1, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1
    )
    stack = [layer(hidden if index else inputs, hidden, normalize) for index in range(layers)]
    first = {"rows": Rows()} if vocabulary is None else {"embedding": nn.Embedding(vocabulary, hidden)}
    modules: OrderedDict[str, nn.Module] = OrderedDict(first)
    for index, recurrent in enumerate(stack):
        modules[f"layer{index + 1}"] = nn.Sequential(OrderedDict(recurrent=recurrent, dropout=nn.Dropout(dropout)))
    if vocabulary is None:
        modules["last"] = LastStep()
    modules["head"] = WideLinear(hidden, classes)
    return modules
