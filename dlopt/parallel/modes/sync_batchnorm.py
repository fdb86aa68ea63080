"""Batch norm across ranks: synchronized over the global batch, or with averaged running statistics.

torch's SyncBatchNorm supports GPUs only; `SyncBatchNorm` here is for the other devices.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.basics.errors import UserError
from dlopt.parallel.shards import local

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """`BatchNorm1d/2d/3d` over the global batch; exact for unequal and empty shards.

    Inputs [b, C, ...], with b local samples. All ranks call forward and backward together in training. State and
    evaluation are as in torch's batch norm. The gradient of the input accounts for the global batch; the gradients of
    weight and bias are this rank's terms of the sum, as for any other layer. `group`: None for all ranks.
    """

    def __init__(self, norm: _BatchNorm, group: distributed.ProcessGroup | None = None) -> None:
        """Shares the parameters and buffers of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.group = group

    def _check_input_dim(self, inputs: Tensor) -> None:
        if inputs.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {inputs.ndim}")

    def forward(self, inputs: Tensor) -> Tensor:
        self._check_input_dim(inputs)
        is_single = not distributed.is_initialized() or distributed.get_world_size(self.group) == 1
        if is_single or not (self.training or self.running_mean is None):
            return super().forward(inputs)
        outputs, mean, variance, count = _Normalize.apply(inputs, self.weight, self.bias, self.eps, self.group)
        if self.training and self.track_running_stats:
            # As in torch: the batch is normalized by the biased variance; the running average is of the unbiased one.
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            # Without a momentum, a cumulative average: the counter is read on the host, as in torch's batch norm.
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        return outputs


def moments(values: Tensor, group: distributed.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean [C], variance [C] and count [] of the values [b, C, ...] of all ranks; b may be 0.

    Each rank's mean and sum of squared deviations are merged as in Chan, Golub & LeVeque 1983, equation 2.1: the
    difference E[x^2] - E[x]^2 would lose digits where the mean is far from zero.
    """
    channels, local_count = values.shape[1], values.numel() // values.shape[1]
    sums = values.new_zeros(2 * channels + 1)
    if local_count:
        variance, mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
        sums[:channels], sums[channels:-1], sums[-1] = mean, variance * local_count, local_count
    gathered = sums.new_empty(distributed.get_world_size(group) * len(sums))
    distributed.all_gather_into_tensor(gathered, sums, group=group)
    gathered = gathered.view(-1, len(sums))
    means, squares, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    return mean, (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / count, count


class _Normalize(torch.autograd.Function):
    """Ioffe & Szegedy 2015, algorithm 1."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: distributed.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))  # bf16 is too coarse for sums
        mean, variance, count = moments(values, group)
        scale = torch.rsqrt(variance + eps)
        shape = (1, len(mean), *(1 for _ in inputs.shape[2:]))
        gain = scale if weight is None else scale * weight
        outputs = (values - mean.view(shape)) * gain.view(shape)
        if bias is not None:
            outputs = outputs + bias.view(shape)
        ctx.group = group
        ctx.save_for_backward(inputs, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return outputs.to(inputs.dtype), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        inputs, weight, mean, scale, count = ctx.saved_tensors
        channels, axes = inputs.shape[1], [0, *range(2, inputs.ndim)]
        shape = (1, channels, *(1 for _ in axes[1:]))
        gradient = gradient.to(mean.dtype)
        # Recomputed from the inputs, which are kept anyway: saves another tensor of their size.
        normalized = (inputs.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        bias_grad, weight_grad = gradient.sum(axes), (gradient * normalized).sum(axes)
        # The input gradient needs both sums over the global batch; weight and bias gradients stay local terms.
        sums = torch.cat([bias_grad, weight_grad])
        distributed.all_reduce(sums, group=ctx.group)
        mean_gradient, mean_product = sums[:channels] / count, sums[channels:] / count
        gain = scale if weight is None else scale * weight
        input_grad = (gradient - mean_gradient.view(shape) - normalized * mean_product.view(shape)) * gain.view(shape)
        input_grad = input_grad.to(inputs.dtype)
        if weight is None:
            return input_grad, None, None, None, None
        return input_grad, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None, None


def synchronize(module: nn.Module, device: torch.device, group: distributed.ProcessGroup | None = None) -> None:
    """Replaces the batch norms in `module` by synchronized ones: torch's on a GPU, `SyncBatchNorm` elsewhere.

    `group`: None for all ranks. Raises `UserError` for ghost batch norm, which does not normalize the device's batch.
    """
    for name, norm in module.named_modules():
        if isinstance(norm, _BatchNorm) and type(norm) not in (*_PLAIN, SyncBatchNorm, nn.SyncBatchNorm):
            raise UserError(
                f"parallel.sync_batchnorm=true: {name} is a {type(norm).__name__}, which cannot be synchronized; set "
                "parallel.sync_batchnorm=false or model.norm_ghost_batch=null"
            )
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
        return
    replaced: dict[nn.Module, SyncBatchNorm] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if type(child) in _PLAIN:
                assert isinstance(child, _BatchNorm)
                parent._modules[name] = replaced.setdefault(child, SyncBatchNorm(child, group))


def buffer_averaging(
    model: nn.Module, size: int, group: distributed.ProcessGroup | None = None
) -> Callable[[], None] | None:
    """Returns a hook that averages the running statistics of unsynchronized batch norms over the group's `size` ranks.

    None if there are none. (DDP's default is to broadcast rank 0's statistics before each forward.)
    """
    # After every update: averaging less often would change them by rounding only, but then an interrupted run would not
    # be bitwise identical to an uninterrupted one.
    synchronized = (SyncBatchNorm, nn.SyncBatchNorm)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, synchronized)]
    both = [b for norm in norms if norm.track_running_stats for b in (norm.running_mean, norm.running_var)]
    buffers = [local(b) for b in both if b is not None]
    if not buffers or size == 1:
        return None
    sizes = [b.numel() for b in buffers]

    @torch.no_grad()
    def average() -> None:
        flat = torch.cat(buffers)
        distributed.all_reduce(flat, group=group)
        flat /= size
        torch._foreach_copy_(buffers, flat.split(sizes))

    return average
