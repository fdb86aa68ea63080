"""Linear layers whose matrix products run in the library that is faster on the processor."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.machine.device import prefers_onednn

_PREFERS_ONEDNN = prefers_onednn()
_WIDE = 1024  # number of outputs above which padding saves more than it costs
_ALIGNED = 8  # outputs in 16 bytes of bf16
_PADDED = 64  # multiple to which outputs are padded: a tile of the matrix product
_MIN_MULTIPLICATIONS = 1 << 22  # of a product; below, the conversion of its operands takes longer than oneDNN saves


class Linear(nn.Linear):
    """`nn.Linear` on [..., inputs], with oneDNN instead of MKL where that is faster (see `prefers_onednn`).

    The results of the two libraries differ by rounding. Other types than fp32, small products, exported programs and
    transforms of torch.func use torch's kernels.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _PREFERS_ONEDNN and self._suits_onednn(input):
            output: Tensor = _OneDNNLinear.apply(input, self.weight, self.bias)
            return output
        return super().forward(input)

    def _suits_onednn(self, input: Tensor) -> bool:
        return (
            not _is_exporting()  # the program should not need dlopt
            and input.numel() * len(self.weight) >= _MIN_MULTIPLICATIONS
            and input.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and type(self.weight) in (Tensor, nn.Parameter)
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
        )


class WideLinear(Linear):
    """`Linear` for as many outputs as a vocabulary has tokens, which need not be a multiple of anything.

    Tensor cores read 16 bytes at a time: with the 50,257 tokens of GPT-2, the product in bf16, and the two of its
    backward pass, run at a fraction of their rate. On CUDA the weight is padded with zeros for the product, and the
    outputs of the padding are cut off. Parameters, gradients and outputs are the same as without padding.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._padded(input) if needs_padding(self, input) else super().forward(input)

    def _padded(self, input: Tensor) -> Tensor:
        outputs = len(self.weight)
        missing = -outputs % _PADDED
        weight = F.pad(self.weight, (0, 0, 0, missing))
        bias = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(input, weight, bias)[..., :outputs]


def needs_padding(layer: nn.Linear, input: Tensor) -> bool:
    """Returns whether the product is large, and its rows of outputs are not aligned."""
    outputs = len(layer.weight)
    return (
        input.is_cuda
        and outputs >= _WIDE
        and outputs % _ALIGNED != 0
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not _is_exporting()
    )


def _is_exporting() -> bool:
    # torch 2.11's compiler takes the function `torch.compiler.is_exporting()` for true; it reads the flag correctly.
    return torch.compiler._is_exporting_flag


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _onednn_linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        [grad] = grads
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        # oneDNN's operator has no derivative. Autograd is enabled here if a second derivative is wanted.
        linear = F.linear if torch.is_grad_enabled() else _onednn_linear
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if of_input else None,
            linear(rows.t(), input.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


# An operator of our own, because torch.compile expects weights in oneDNN's format in the one that it calls.
torch.library.define("dlopt::onednn_linear", "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
_onednn_linear = torch.ops.dlopt.onednn_linear


@torch.library.impl("dlopt::onednn_linear", "cpu")
def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


@torch.library.register_fake("dlopt::onednn_linear")
def _describe(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], len(weight))
