"""What the name of a metric says about it."""

# Last words of names. Metrics of the user's own (`evaluate.metrics`) need one of these to be monitored.
HIGHER = ("accuracy", "f1", "r2", "kappa", "score", "auc", "precision", "recall", "iou", "dice", "correlation")
LOWER = ("loss", "error", "mae", "mse", "rmse", "perplexity", "distance", "divergence")


def lower_is_better(metric: str) -> bool:
    """Returns whether a smaller value of the metric (`val_loss`, `best_val_macro_f1`, `seconds`) is a better one.

    Accuracies, F1, R^2 and the others of `HIGHER` are better when larger; gaps between them, like everything else, when
    smaller.
    """
    return not _ends(metric, HIGHER)


def has_direction(metric: str) -> bool:
    """Returns whether the name says which values are better."""
    return _ends(metric, (*HIGHER, *LOWER))


def _ends(metric: str, words: tuple[str, ...]) -> bool:
    name = metric.partition("/")[0]  # a class may be named "loss" (val_class_accuracy/loss)
    return f"_{name}".endswith(tuple(f"_{word}" for word in words))
