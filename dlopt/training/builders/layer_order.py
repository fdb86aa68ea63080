"""The order of a model's layers, for the keys of a run that depend on it."""

import logging

from dlopt.models.layers import example_inputs
from dlopt.models.order import forward_order
from dlopt.optim.parameters import has_own_layers, unused_parameters
from dlopt.schedules.decay import corrected
from dlopt.training.builders.phases import CpuModel
from dlopt.training.clipping import Adaptive

log = logging.getLogger(__name__)


def layer_order(model: CpuModel) -> list[str] | None:
    """Returns the order in which the model computes if a key of the config depends on it, by a forward pass of zeros.

    Returns None if the config does not need the order, or if the model fails without its data or device; then layers
    are ordered by registration. Logs a warning about the failure, and about parameters outside the order.
    """
    run_config, is_main, keys = model.run_config, model.parallel.ranks.is_main, []
    grouping = run_config.grouping
    if grouping.layer_decay is not None and not has_own_layers(model.module):
        keys.append(f"optimizer.layer_decay={grouping.layer_decay:g}")
    if run_config.decay.target is corrected:
        keys.append(run_config.decay.choice)
    if run_config.clip.target is Adaptive:
        keys.append(run_config.clip.choice)
    if not keys:
        return None
    try:
        uses = forward_order(model.module, example_inputs(model.module, model.shape, count=2, device="cpu"))
    except Exception as error:
        if is_main:
            log.warning(
                "%s: the order of the layers is that in which the model registers them, because it fails for zeros on "
                "the CPU: %s", keys[0], str(error).strip().partition("\n")[0] or type(error).__name__)  # fmt: skip
        return None
    if is_main and grouping.layer_decay is not None and (unused := unused_parameters(model.module, uses)):
        log.warning(
            "%s: the forward pass does not use %s; such a parameter belongs to the layer of the one that the model "
            "registers before it",
            keys[0],
            unused[0] if len(unused) == 1 else f"{unused[0]} and {len(unused) - 1} others",
        )
    return uses
