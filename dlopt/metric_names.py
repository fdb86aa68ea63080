"""What the name of a metric says about it."""


def lower_is_better(metric: str) -> bool:
    """Returns whether a smaller value of the metric (`val_loss`, `best_val_macro_f1`, `seconds`) is a better one.

    Accuracies, F1 and R^2 are better when larger; gaps between them, like everything else, when smaller.
    """
    name = metric.partition("/")[0]  # a class may be named "loss" (val_class_accuracy/loss)
    return not name.endswith(("accuracy", "_f1", "_r2"))
