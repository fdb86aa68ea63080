"""Losses: modules (outputs, targets) -> scalar mean over the samples.

Losses divide by the number of samples, never by a sum of class weights: the losses of micro-batches, weighted by their
samples, then add up to the loss of the batch.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Fraction, NonNegative, Positive, Probability


class CrossEntropy(nn.Module):
    """-sum_k q_k log softmax(outputs)_k, mean over samples (of a text: over tokens, in nats).

    outputs [N, K] or [N, T, K]; targets int64 [N] or [N, T], or probabilities [N, K] (mixed samples). Label smoothing e
    replaces q by q (1 - e) + e / K (Szegedy et al. 2016); class weights multiply the terms. Both apply in training
    only: evaluation uses the plain loss, so that runs can be compared.

    `class_weights`: one per class, or balanced (see `balanced_weights`). `class_counts`: training samples per class,
    as the sampler draws them; None if the data are not loaded, so the loss is used for evaluation.

    Large outputs (text with a large vocabulary) are processed in chunks: see `processes_in_chunks`.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        label_smoothing: Fraction,
        class_weights: tuple[NonNegative, ...] | Literal["balanced"] | None,
        classes: int | None,
        class_counts: Sequence[int] | None = None,
        labels: int | None = None,
    ) -> None:
        super().__init__()
        if labels is not None:
            raise UserError("loss=cross_entropy: a sample may have several labels; use loss=binary_cross_entropy")
        if classes is None:
            raise UserError("loss=cross_entropy: the targets are numbers, not classes; use loss=mse for regression")
        if classes == 1:
            raise UserError(
                "loss=cross_entropy: all samples have the same class, so the loss is always 0; "
                "use data with two classes or more"
            )
        if class_weights == "balanced":
            class_weights = None if class_counts is None else balanced_weights(class_counts)
        if class_weights is not None and len(class_weights) != classes:
            raise UserError(
                f"loss.class_weights={list(class_weights)}: {len(class_weights)} weights for {classes} classes; "
                "use one weight per class"
            )
        self.label_smoothing = label_smoothing
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim == 3:
            outputs, targets = outputs.flatten(0, 1), targets.flatten()
        if processes_in_chunks(outputs, targets):
            smoothing, weight = (self.label_smoothing, self.weight) if self.training else (0.0, None)
            return _ChunkedCrossEntropy.apply(outputs, targets, weight, smoothing)
        if not self.training:
            return F.cross_entropy(outputs, targets)
        if self.weight is None:
            return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        wide = torch.promote_types(outputs.dtype, torch.float32)  # bf16 would round a weight of 0.3 to 0.3008
        outputs, weight = outputs.to(wide), self.weight.to(wide)
        loss = F.cross_entropy(outputs, targets, weight, label_smoothing=self.label_smoothing, reduction="sum")
        return loss / len(outputs)


def balanced_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Returns the weights n / (K n_k) of K classes with n_k of n samples, whose mean over the samples is 1.

    As in scikit-learn, after King & Zeng 2001. Raises `UserError` for a class without samples.
    """
    if 0 in counts:
        raise UserError(
            f"loss.class_weights=balanced: class {list(counts).index(0)} has no training samples; "
            "use loss.class_weights=null or a larger data.subset"
        )
    return tuple(sum(counts) / (len(counts) * count) for count in counts)


_MAX_CHUNK = 1 << 24  # outputs: 64 MiB in fp32


def processes_in_chunks(outputs: Tensor, targets: Tensor) -> bool:
    """Returns whether cross entropy processes these outputs in chunks of rows, from 2^24 outputs on.

    It then has no tensor in fp32 of the size of bf16 or fp16 outputs [N, K], and keeps no log probabilities for the
    backward pass: only the outputs and their log sum of exponentials [N].
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain loss without these tensors
        return False
    is_large = outputs.numel() > _MAX_CHUNK and not targets.is_floating_point()
    return is_large and not torch._C._are_functorch_transforms_active()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`CrossEntropy` for labels and outputs [N, K]. For second derivatives, the backward pass uses the plain loss."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        weight = None if weight is None else weight.to(wide)
        rows, classes = max(_MAX_CHUNK // outputs.shape[1], 1), outputs.shape[1]
        normalizers, sums = [], []
        for part, labels in zip(outputs.split(rows), targets.split(rows), strict=True):
            values = part.to(wide)
            normalizer = values.logsumexp(1)
            losses = normalizer - values.gather(1, labels.unsqueeze(1)).squeeze(1)
            if weight is not None:
                losses = losses * weight[labels]
            if smoothing:
                spread = (
                    normalizer * classes - values.sum(1)
                    if weight is None
                    else (normalizer * weight.sum() - (values * weight).sum(1))
                )
                losses = losses * (1 - smoothing) + spread * (smoothing / classes)
            normalizers.append(normalizer)
            sums.append(losses.sum())
        ctx.save_for_backward(outputs, targets, weight, torch.cat(normalizers))
        ctx.smoothing, ctx.rows = smoothing, rows
        return torch.stack(sums).sum() / len(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        outputs, targets, weight, normalizers = ctx.saved_tensors
        smoothing, classes = ctx.smoothing, outputs.shape[1]
        if torch.is_grad_enabled():  # to be differentiated again
            values = outputs.to(normalizers.dtype)
            loss = F.cross_entropy(values, targets, weight, label_smoothing=smoothing, reduction="sum") / len(outputs)
            return torch.autograd.grad(loss, outputs, gradient, create_graph=True)[0], None, None, None
        result = torch.empty_like(outputs)
        parts = (tensor.split(ctx.rows) for tensor in (outputs, targets, normalizers, result))
        for part, labels, normalizer, slot in zip(*parts, strict=True):
            # The softmax times the sum of the target distribution, minus the target distribution.
            values = part.to(normalizer.dtype).sub(normalizer.unsqueeze(1)).exp_()
            hits = normalizer.new_full((len(labels),), 1 - smoothing)
            if weight is not None:
                hits *= weight[labels]
                total = hits + smoothing * weight.mean()
                values = values.mul_(total.unsqueeze(1)).sub_(weight * (smoothing / classes))
            elif smoothing:
                values.sub_(smoothing / classes)
            index = labels.unsqueeze(1)
            values.scatter_(1, index, values.gather(1, index) - hits.unsqueeze(1))
            slot.copy_(values.mul_(gradient / len(outputs)))
        return result, None, None, None


class TrainedTeacher(Protocol):
    """Maps a micro-batch to the outputs of a trained model. `normalize`: of its inputs; None for that of the run."""

    @property
    def normalize(self) -> nn.Module | None: ...

    def __call__(self, batch: Any) -> Tensor: ...


class Distillation(nn.Module):
    """(1 - w) CE(o, y) + w T^2 KL(softmax(t / T) || softmax(o / T)), mean over predictions.

    Of outputs o, targets y (see `CrossEntropy`) and the outputs t of a teacher, with the temperature T and the weight w
    (Hinton, Vinyals & Dean 2015, section 2: T^2 keeps the scale of the gradients, whatever T is). Training only:
    evaluation uses the cross-entropy, so that runs can be compared.

    The step passes the teacher's outputs, which `further` computes, of the samples of a micro-batch.

    Attributes:
        trained: the teacher (`dlopt.trained.distillation.Teacher`), not a submodule; None if not loaded.

    Args:
        teacher: run folder or checkpoint.
        teacher_sha256: of the checkpoint, set when a run is composed, so that a resumed run detects another teacher.
    """

    def __init__(
        self,
        *,
        teacher: str,
        temperature: Positive,
        weight: Probability,
        teacher_sha256: str | None,
        classes: int | None,
    ) -> None:
        super().__init__()
        if classes is None:
            raise UserError("loss=distillation: a teacher's predictions are classes, those of this data are not")
        self.teacher, self.teacher_sha256 = teacher, teacher_sha256
        self.temperature, self.weight = temperature, weight
        self.cross_entropy = CrossEntropy(label_smoothing=0.0, class_weights=None, classes=classes)
        self.trained: TrainedTeacher | None = None

    def further(self, batch: Any) -> dict[str, Tensor]:
        """Returns the third argument of `forward` for a micro-batch; nothing without a teacher."""
        return {} if self.trained is None else {"teacher_outputs": self.trained(batch)}

    def forward(self, outputs: Tensor, targets: Tensor, teacher_outputs: Tensor | None = None) -> Tensor:
        plain: Tensor = self.cross_entropy(outputs, targets)
        if not self.training:
            return plain
        if teacher_outputs is None:
            raise UserError(
                "loss=distillation: the outputs of the teacher are known in training only; use loss=cross_entropy here"
            )
        wide = torch.promote_types(outputs.dtype, torch.float32)
        own, soft = (
            (each.to(wide) / self.temperature).flatten(0, -2).log_softmax(1) for each in (outputs, teacher_outputs)
        )
        divergence = F.kl_div(own, soft, reduction="batchmean", log_target=True)
        return (1 - self.weight) * plain + self.weight * self.temperature**2 * divergence


class Weighted(nn.Module):
    """Mean over the samples of weight x loss, of a loss that is itself a mean over independent samples.

    weight: floating-point [N], of mean 1 over the training set. A batch has no normalizer of its own, so that the
    losses of micro-batches and processes add up to that of the batch.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor, weight: Tensor, **further: Tensor) -> Tensor:
        return (self.of_samples(outputs, targets, **further) * weight).mean()

    def of_samples(self, outputs: Tensor, targets: Tensor, **further: Tensor) -> Tensor:
        """Returns the loss of each sample [N], as a batch of one."""
        single = lambda o, t, more: self.loss(o[None], t[None], **{name: each[None] for name, each in more.items()})  # noqa: E731
        return torch.vmap(single)(outputs, targets, further)


class MSE(nn.Module):
    """Mean over samples of the mean over outputs of (outputs - targets)^2.

    outputs [N, K]. Classification: targets int64 [N], used as one-hot vectors, or probabilities [N, K]. Regression and
    reconstruction (classes is None): targets float [N, K], or [N] if K = 1. A text: [N, T, K] and int64 [N, T].
    """

    def __init__(self, *, classes: int | None) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.classes is not None and not targets.is_floating_point():
            targets = F.one_hot(targets, self.classes)
        elif targets.ndim == outputs.ndim - 1:
            targets = targets.unsqueeze(-1)
        if targets.shape != outputs.shape:
            raise UserError(
                f"loss=mse: the model outputs {list(outputs.shape[1:])} numbers per sample, the targets have "
                f"{list(targets.shape[1:])}"
            )
        # Targets keep float32 next to outputs in bf16, which would round 1003 to 1004.
        return F.mse_loss(outputs, targets.to(torch.promote_types(outputs.dtype, torch.float32)))


class BinaryCrossEntropy(nn.Module):
    """-t log sigmoid(o) - (1 - t) log(1 - sigmoid(o)), mean over the labels of a sample and over samples.

    outputs [N, K]; targets float [N, K] in 0..1: whether the sample has each label, or the mean of mixed samples. Label
    smoothing e replaces t by t (1 - e) + e / 2; positive weights multiply the first term. Both apply in training only:
    evaluation uses the plain loss, so that runs can be compared.

    `pos_weight`: one per label, or balanced: the number of training samples without the label, divided by the number
    with it. `label_fractions`: of the training samples, as the sampler draws them; None if the data are not loaded, so
    the loss is used for evaluation.
    """

    pos_weight: Tensor | None

    def __init__(
        self,
        *,
        label_smoothing: Fraction,
        pos_weight: tuple[Positive, ...] | Literal["balanced"] | None,
        labels: int | None,
        label_fractions: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if labels is None:
            raise UserError(
                "loss=binary_cross_entropy: a sample has no labels of its own, but a class or values; use "
                "loss=cross_entropy or loss=mse, or data with several labels per sample (data.labels=several)"
            )
        if pos_weight == "balanced":
            pos_weight = None if label_fractions is None else balanced_pos_weight(label_fractions)
        if pos_weight is not None and len(pos_weight) != labels:
            raise UserError(
                f"loss.pos_weight={list(pos_weight)}: {len(pos_weight)} weights for {labels} labels; "
                "use one weight per label"
            )
        self.label_smoothing = label_smoothing
        weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
        self.register_buffer("pos_weight", weight, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        outputs, targets = outputs.to(wide), targets.to(wide)
        if not self.training:
            return F.binary_cross_entropy_with_logits(outputs, targets)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        weight = None if self.pos_weight is None else self.pos_weight.to(wide)
        return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weight)


def balanced_pos_weight(fractions: Sequence[float]) -> tuple[float, ...]:
    """Returns (1 - p) / p for labels that a fraction p of the samples has: both terms then weigh the same.

    Raises `UserError` for a label that no sample or every sample has.
    """
    for label, fraction in enumerate(fractions):
        if fraction in (0, 1):
            which = "no training sample has" if fraction == 0 else "all training samples have"
            raise UserError(f"loss.pos_weight=balanced: {which} label {label}; use loss.pos_weight=null or other data")
    return tuple((1 - fraction) / fraction for fraction in fractions)


class PixelCrossEntropy(nn.Module):
    """-t log sigmoid(o) - (1 - t) log(1 - sigmoid(o)), mean over the pixels of a reconstruction and over samples.

    outputs [N, K]; targets float [N, K] in 0..1. The minimum is the entropy of the targets, which is above 0 for grey.
    """

    predicts_pixels: ClassVar[bool] = True

    def __init__(self, *, classes: int | None) -> None:
        super().__init__()
        if classes is not None:
            raise UserError("loss=pixel_cross_entropy: the targets are classes; use loss=cross_entropy")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        return F.binary_cross_entropy_with_logits(outputs, targets.to(wide))


def sampled_cross_entropy(outputs: Tensor, noise: Tensor) -> Tensor:
    """-log softmax(outputs)_y, mean over predictions, for classes y drawn from the softmax itself.

    outputs [..., K]; noise [...]: uniform on [0, 1); y is the class in whose interval of the cumulative distribution
    the noise lies. Gradients do not flow through the draw.
    """
    with torch.no_grad():
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        cumulative = wide.softmax(-1).cumsum(-1)
        drawn = noise.to(cumulative.dtype).unsqueeze(-1) * cumulative[..., -1:]
        classes = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=outputs.shape[-1] - 1)
    return F.cross_entropy(outputs.flatten(0, -2), classes.flatten())


def sampling_obstacle(loss: nn.Module) -> str | None:
    """Returns why `sampled_cross_entropy` does not have the curvature of `loss`; None if it has.

    Label smoothing and mixed labels change the target distribution only, on which the Gauss-Newton matrix of a softmax
    does not depend.
    """
    if isinstance(loss, Distillation):
        return "loss=distillation: labels drawn from the model say nothing about the teacher; use loss=cross_entropy"
    if not isinstance(loss, CrossEntropy):
        return f"loss={type(loss).__name__}: the outputs are no class probabilities; use loss=cross_entropy"
    if loss.weight is not None:
        return "loss.class_weights: the curvature depends on the labels; set loss.class_weights=null"
    return None


def reconstructions(outputs: Tensor, loss: nn.Module) -> Tensor:
    """Returns the reconstructed values [N, K] from the outputs: their sigmoid, after training with cross-entropy."""
    return outputs.sigmoid() if isinstance(loss, PixelCrossEntropy) else outputs


def probabilities(outputs: Tensor, loss: nn.Module) -> Tensor:
    """Returns class probabilities [..., K] from the outputs.

    Their softmax; after training with MSE, outputs estimate the probabilities directly and are clamped to 0..1.
    """
    return outputs.clamp(0, 1) if isinstance(loss, MSE) else outputs.softmax(-1)


def label_probabilities(outputs: Tensor, loss: nn.Module) -> Tensor:
    """Returns the probability of each label [N, K], the sigmoid of the outputs; a sample may have several labels.

    After training with MSE: see `probabilities`.
    """
    return outputs.clamp(0, 1) if isinstance(loss, MSE) else outputs.sigmoid()
