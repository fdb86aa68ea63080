"""Numbers that describe a network at fixed weights, for the probes of comparisons."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlopt.extend import UserError, Workload, evaluation_batches
from dlopt.instruments.curvature import hessian_product, largest_eigenvalues, losses_along
from dlopt.instruments.layers import LayerProbe, LayerStatistics
from dlopt.lab.diagnosis.probes import TimeLagProbe
from dlopt.models.layers import frozen_statistics
from dlopt.models.order import forward_order
from dlopt.optim.parameters import in_order

_SAMPLES = 256  # training samples of a measurement
_COMPANIES = 8  # batches in which a sample's gradient is measured
_LANCZOS = 40  # Hessian-vector products for the largest eigenvalue
_MAX_PARAMETERS = 1000  # of a Hessian
_IDLE = 1e-4  # a unit is idle if the loss changes by less than this fraction when it is removed


def spread_samples(workload: Workload, count: int = _SAMPLES) -> tuple[Tensor, Tensor]:
    """Returns normalized inputs and targets of evenly spaced training samples."""
    train = workload.dataset.train
    indices = torch.linspace(0, len(train) - 1, min(count, len(train))).long()
    batches = list(evaluation_batches(workload, train.select(indices)).epoch(0))
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return inputs, targets


def gradient(workload: Workload, loss: Tensor) -> Tensor:
    parameters = [p for p in workload.module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def _batch_size(workload: Workload) -> int:
    size, most = workload.run_config.data_settings.batch_size, min(_SAMPLES, len(workload.dataset.train))
    return most if size == "full" else min(size, most)


def sample_dependence(workload: Workload) -> float:
    """Measures how much the gradient of a sample's loss depends on the other samples of its batch.

    sqrt(E ||g - E g||^2) / ||E g|| over random batches that contain the sample, in training mode; mean over samples. 0
    without batch norm (with batches of the run's size).
    """
    inputs, targets = spread_samples(workload)
    size, generator = _batch_size(workload), torch.Generator().manual_seed(0)
    workload.module.train()
    ratios = []
    with frozen_statistics(workload.module):
        for sample in range(min(_COMPANIES, len(targets))):
            gradients = []
            for _ in range(_COMPANIES):
                others = torch.randperm(len(targets), generator=generator)
                batch = torch.cat([torch.tensor([sample]), others[others != sample][: size - 1]])
                outputs = workload.module(inputs[batch])
                gradients.append(gradient(workload, workload.loss(outputs[:1], targets[batch][:1])))
            rows = torch.stack(gradients)
            variance = (rows - rows.mean(0)).square().sum() / (len(rows) - 1)
            ratios.append(variance.sqrt() / rows.mean(0).norm())
    return float(torch.stack(ratios).mean())


def gradient_bias(workload: Workload) -> float:
    """Measures the bias of batch gradients: ||E g_B - g|| / ||g||, where g is the gradient of all samples in one batch.

    E is exact over a partition of 256 training samples into batches of the run's size, and averaged over ten
    partitions, in training mode. Without batch norm the gradient of the mean is the mean of the gradients: 0.
    """
    inputs, targets = spread_samples(workload)
    size, generator = _batch_size(workload), torch.Generator().manual_seed(0)
    count = len(targets) // size * size
    inputs, targets = inputs[:count], targets[:count]
    workload.module.train()
    with frozen_statistics(workload.module):
        whole = gradient(workload, workload.loss(workload.module(inputs), targets))
        parts = [
            gradient(workload, workload.loss(workload.module(inputs[batch]), targets[batch]))
            for _ in range(10)
            for batch in torch.randperm(count, generator=generator).split(size)
        ]
    return float((torch.stack(parts).mean(0) - whole).norm() / whole.norm())


def condition_number(workload: Workload) -> float:
    """Measures the condition number of the Hessian of the loss on all training samples, in float64, in evaluation mode.

    The ratio of the largest to the smallest eigenvalue; infinite if an eigenvalue is not positive. Raises `UserError`
    for models with more than 1,000 parameters.
    """
    module = copy.deepcopy(workload.module).double().eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    if count > _MAX_PARAMETERS:
        raise UserError(
            f"comparison.metrics: condition_number computes the whole Hessian, of at most {_MAX_PARAMETERS:,} "
            f"parameters; the model has {count:,}"
        )
    inputs, targets = spread_samples(workload, len(workload.dataset.train))
    targets = targets.double() if targets.is_floating_point() else targets
    product = hessian_product(workload.loss(module(inputs.double()), targets), parameters)
    hessian = torch.stack([product(row) for row in torch.eye(count, dtype=torch.float64)])
    eigenvalues = torch.linalg.eigvalsh(hessian)
    return float(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else math.inf


def gradient_ratio(workload: Workload) -> float:
    """Measures the gradient norm of the first weight matrix relative to the last one's: small if gradients vanish."""
    inputs, targets = spread_samples(workload)
    names = in_order(workload.module, forward_order(workload.module, inputs[:2]))
    matrices = [p for p in map(workload.module.get_parameter, names) if p.requires_grad and p.ndim > 1]
    workload.module.train()
    with frozen_statistics(workload.module):
        loss = workload.loss(workload.module(inputs), targets)
        first, last = torch.autograd.grad(loss, [matrices[0], matrices[-1]])
    return float(first.norm() / last.norm())


def _hidden_layer(workload: Workload, number: int, name: str) -> LayerStatistics:
    """Returns the statistics of a layer with an activation on training samples, in training mode.

    `number`: from 1, counted from the input; -1: the last one. Raises `UserError` if the model has no such layer.
    """
    inputs, _ = spread_samples(workload)
    workload.module.train()
    probe = LayerProbe(workload.module, gradients=False)
    with torch.no_grad(), frozen_statistics(workload.module), probe.recording():
        workload.module(inputs)
    layers = [layer for layer in probe.layers if layer.activation is not None]
    if len(layers) < abs(number):
        raise UserError(
            f"comparison.metrics: {name} needs at least {abs(number)} layers with an activation; has {len(layers)}"
        )
    return layers[number - 1 if number > 0 else number]


def saturated(workload: Workload, number: int, name: str) -> float:
    """Measures the fraction of saturated values of a hidden layer (see `_hidden_layer`), over samples and units.

    Saturated: where the slope of the tanh or sigmoid is below 5 % of its largest slope, for a sigmoid at inputs beyond
    +-4.4. Raises `UserError` for other activations.
    """
    fraction = _hidden_layer(workload, number, name).saturated
    if fraction is None:
        raise UserError(f"comparison.metrics: {name} needs model.activation=tanh or sigmoid")
    return fraction


def activation_std(workload: Workload) -> float:
    """Measures the standard deviation of the last hidden layer's activations over samples and units."""
    return _hidden_layer(workload, -1, "activation_std").outputs.std


def _closure(workload: Workload) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    """Returns the loss of 256 training samples in one batch, as a function of the trained parameters, and these.

    In training mode: the derivatives include the statistics of batch norm.
    """
    inputs, targets = spread_samples(workload)
    workload.module.train()

    def loss() -> Tensor:
        value: Tensor = workload.loss(workload.module(inputs), targets)
        return value

    return loss, [p for p in workload.module.parameters() if p.requires_grad]


def largest_eigenvalue(workload: Workload) -> float:
    """Measures the largest eigenvalue of the Hessian of the training loss, by Lanczos, from below."""
    loss, parameters = _closure(workload)
    with frozen_statistics(workload.module):
        return float(largest_eigenvalues(loss, parameters, count=1, iterations=_LANCZOS).eigenvalues[0])


def higher_order_effect(workload: Workload) -> float:
    """Measures how far a gradient step is from its first-order prediction: |L(w - lr g) - L(w) + lr g'g| / (lr g'g).

    The step has the run's `optimizer.lr`. The difference is the effect of all higher orders (Goodfellow et al. 2016,
    section 8.7.1): for small rates lr |g'Hg| / (2 g'g).
    """
    loss, parameters = _closure(workload)
    rate = float(workload.run_config.optimizer.arguments["lr"])
    with frozen_statistics(workload.module):
        gradients = torch.autograd.grad(loss(), parameters)
        predicted = rate * float(sum(g.double().square().sum() for g in gradients))
        before, after = losses_along(loss, parameters, [-rate * g for g in gradients], (0.0, 1.0))
    return abs(after - before + predicted) / predicted if predicted else math.nan


def memory_gradient(workload: Workload) -> float:
    """Measures the gradient of the loss at the first state of a recurrent layer relative to that at its last state.

    Raises `UserError` for other models.
    """
    inputs, targets = spread_samples(workload)
    workload.module.train()
    probe = TimeLagProbe(workload.module)
    with probe.recording():
        gradient(workload, workload.loss(workload.module(inputs), targets))
    if not (lags := probe.lags()):
        raise UserError("comparison.metrics: memory_gradient needs a recurrent model (model=rnn, model=lstm)")
    first, last = lags[0].states[-1], lags[0].states[0]
    return first / last if last else math.nan


def _removed(layer: nn.Module, unit: int) -> RemovableHandle:
    """Sets the output of one unit of the activation `layer` to 0 until the handle's context ends."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[:, unit] = 0
        return output

    return layer.register_forward_hook(hook)


@torch.no_grad()
def _losses_without_units(workload: Workload) -> tuple[float, Tensor]:
    """Returns the loss on training samples, and the losses without each hidden unit of an MLP.

    Raises `UserError` for models without such units, and for sequences, whose second dimension is the position.
    """
    inputs, targets = spread_samples(workload, 1000)
    workload.module.eval()
    widths: dict[nn.Module, int] = {}
    dimensions: set[int] = set()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        widths[module] = output.shape[1]
        dimensions.add(output.ndim)

    hooks = [m.register_forward_hook(count) for m in workload.module.modules() if isinstance(m, _ACTIVATIONS)]
    loss = float(workload.loss(workload.module(inputs), targets))
    for hook in hooks:
        hook.remove()
    if not widths or dimensions != {2}:
        raise UserError("comparison.metrics: unit_dependence and idle_units need a model=mlp with hidden units")
    losses = []
    for layer, width in widths.items():
        for unit in range(width):
            with _removed(layer, unit):
                losses.append(workload.loss(workload.module(inputs), targets))
    return loss, torch.stack(losses)


_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def unit_dependence(workload: Workload) -> float:
    """Measures how much the network relies on single hidden units: the mean relative increase of the training loss
    when one unit is removed, over all units."""
    loss, without = _losses_without_units(workload)
    return float((without / loss - 1).mean())


def idle_units(workload: Workload) -> float:
    """Measures the fraction of hidden units whose removal changes the training loss by less than 0.01 %."""
    loss, without = _losses_without_units(workload)
    return float(((without / loss - 1).abs() < _IDLE).double().mean())


def input_sensitivity(workload: Workload) -> float:
    """Measures the mean Frobenius norm of the Jacobian of the outputs with respect to the normalized inputs.

    Raises `UserError` for texts, which have no derivative.
    """
    inputs, _ = spread_samples(workload)
    if not inputs.is_floating_point():
        raise UserError("comparison.metrics: input_sensitivity needs data of real numbers; texts have no derivative")
    inputs = inputs.clone().requires_grad_()
    workload.module.eval()
    outputs = workload.module(inputs)
    columns = range(outputs.shape[1])
    squares = [torch.autograd.grad(outputs[:, k].sum(), inputs, retain_graph=True)[0].flatten(1) for k in columns]
    return float(torch.stack(squares).square().sum((0, 2)).sqrt().mean())
