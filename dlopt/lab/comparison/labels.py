"""Labels and units of metrics and keys for readers, with those of the probes."""

from dlopt.metrics import shown
from dlopt.results import drawing

_LABELS = {
    "activation_std": "standard deviation of the layer's activations",
    "input_drift": "drift of the layers' inputs per epoch (standard deviations)",
    "gradient_variance": "variance of mini-batch gradients (1: random order)",
    "effective_rate": "effective learning rate (median weight)",
    "evaluated_gap": "gap: validation loss minus training loss, both in evaluation mode",
    "evaluated_train_loss": "training loss in evaluation mode",
    "condition_number": "condition number of the Hessian",
    "decay_correlation": "rank correlation of a weight's decay with its gradients",
    "decay_ratio": "decay of weights with small gradients / large gradients",
    "first_updates": "mean size of the first updates (learning rates)",
    "gradient_bias": "bias of batch gradients (relative)",
    "gradient_ratio": "gradient norm of the first layer / last layer",
    "higher_order_effect": "effect of the higher orders on an update (relative to the first)",
    "idle_units": "idle hidden units (fraction)",
    "input_sensitivity": "sensitivity to inputs (norm of the Jacobian)",
    "largest_eigenvalue": "largest eigenvalue of the Hessian",
    "memory_gradient": "gradient at the first step / last step",
    "sample_dependence": "dependence of a sample's gradient on its batch (relative)",
    "saturated_last": "saturated values of the layer (fraction)",
    **{f"saturated_{n}": f"saturated values, hidden layer {n} (fraction)" for n in (1, 2, 3)},
    "evaluate.tta": "test-time augmentation",
    "data.fraction": "samples of a rare class / of another class",
    "val_class_accuracy/8": "validation accuracy on the rare digit 8",
    "unit_dependence": "relative increase of the loss without one unit",
}


def label(name: str) -> str:
    """Returns the label of a metric, a probe or a config key."""
    return _LABELS.get(name) or drawing.label(name)


def is_percent(metric: str) -> bool:
    """Returns whether readers see the metric in percent; files have fractions. `val_error` is 1 - `val_accuracy`."""
    return metric == "val_error" or shown.is_percent(metric)


def scale(metric: str) -> float:
    """Returns the factor from a value in files to the value that readers see."""
    return 100.0 if is_percent(metric) else 1.0


def axis_label(metric: str) -> str:
    """Returns the label of a metric with its unit: validation accuracy (%), gap: ... (points)."""
    unit = " (points)" if metric.endswith("_gap") else " (%)"
    return label(metric) + unit * is_percent(metric)
