"""Schedules of the choices in conf/schedule."""

import functools
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from dlopt.schedules import Schedule, Warmup, build

CONF = Path(__file__).parents[2] / "conf"


STEPS, EPOCH = 240, 24


@functools.cache
def values(name: str) -> dict[str, Any]:
    """Returns the keys of a choice, which the caller must not change."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[f"+schedule={name}"]).schedule
    loaded = OmegaConf.to_container(config)
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}


def make(name: str, steps: int = STEPS, epoch: float = EPOCH, **typed: Any) -> Schedule:
    assert not set(typed) - set(values(name)), typed
    keys = {**values(name), **typed}
    target = get_object(keys.pop("_target_"))
    warmup = Warmup(**{key: keys.pop(key) for key in Warmup.__dataclass_fields__})
    return build(partial(target, **keys), warmup, steps=steps, steps_per_epoch=epoch)
