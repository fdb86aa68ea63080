"""Selects the normalization and the image size with which a pretrained model was trained."""

from collections.abc import Iterable

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dlopt.config.overrides import group_of, key_of

_DEFAULT = "standardize"  # the choice of `normalize` in conf/train.yaml; a recipe may have another one


def pretrained_overrides(config: DictConfig, overrides: Iterable[Override]) -> list[str]:
    """Returns the overrides of `normalize` and `data.image_size` for which the model's weights were trained.

    Values from the command line (`overrides`) or a recipe take precedence. Empty without pretrained weights.
    """
    if not OmegaConf.select(config, "model.pretrained", throw_on_resolution_failure=False):
        return []
    from dlopt.models.third_party import pretrained_inputs  # imports torch

    model = config.model
    inputs = pretrained_inputs(str(model.get("_target_")), str(model.get("name")), model.pretrained)
    if inputs is None:
        return []
    typed = {key_of(override) for override in overrides}
    lines = []
    is_default = config.hydra.runtime.choices.get("normalize") == _DEFAULT
    if is_default and not any(group_of(key) == "normalize" for key in typed):
        mean, std = (",".join(map(repr, values)) for values in (inputs.mean, inputs.std))
        lines += ["normalize=fixed", f"normalize.mean=[{mean}]", f"normalize.std=[{std}]"]
    if "data.image_size" not in typed and config.data.get("image_size", 0) is None:
        lines.append(f"data.image_size=[{inputs.size[0]},{inputs.size[1]}]")
    return lines
