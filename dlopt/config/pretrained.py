"""Selects the normalization and the image size with which a pretrained model was trained."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dlopt.config.overrides import group_of, key_of
from dlopt.config.schema import dotted_name

if TYPE_CHECKING:
    from dlopt.config.experiment import Experiment

_DEFAULT = "standardize"  # the choice of `normalize` in conf/train.yaml; a recipe may have another one


def pretrained_overrides(config: DictConfig, overrides: Iterable[Override]) -> list[str]:
    """Returns the overrides of `normalize` and `data.image_size` for which the model's weights were trained.

    Values from the command line (`overrides`) or a recipe take precedence. Empty without pretrained weights.
    """
    if not OmegaConf.select(config, "model.pretrained", throw_on_resolution_failure=False):
        return []
    inputs = _inputs(config.model)
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


def describe_pretrained(experiment: "Experiment", shape: tuple[int, ...]) -> str:
    """Describes the images for which pretrained weights were trained, and how those of this run differ.

    `shape`: of the model's input. Empty without pretrained weights.
    """
    model, normalize = experiment.model, experiment.normalize
    inputs = _inputs({"_target_": dotted_name(model.target), **model.arguments})
    if inputs is None:
        return ""
    height, width = inputs.size
    text = f"pretrained on images of {height}x{width} with mean {_shown(inputs.mean)} and std {_shown(inputs.std)}"
    constants = {name: tuple(normalize.arguments.get(name, ())) for name in ("mean", "std")}
    differences = []
    if constants != {"mean": inputs.mean, "std": inputs.std}:
        differences.append("another normalization")
    if tuple(shape[1:]) != inputs.size:
        differences.append(f"images of {'x'.join(map(str, shape[1:]))}")
    return f"{text}; this run uses {' and '.join(differences) or 'the same'}"


def _inputs(model: Mapping[str, Any] | DictConfig) -> Any:
    if not model.get("pretrained"):
        return None
    from dlopt.models.third_party import pretrained_inputs  # imports torch

    return pretrained_inputs(str(model.get("_target_")), str(model.get("name")), model["pretrained"])


def _shown(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values)}]"
