"""Roles of config keys, declared with the type of each key: `profile: Annotated[bool, Role.WATCH]`."""

from enum import Enum


class Role(Enum):
    """What a key decides about a run. `dlopt.config.keys.role_of` looks it up."""

    IDENTITY = "what the run computes: equal when it is resumed, and what separates configurations"
    SEED = "a stream of random numbers: equal when the run is resumed; runs of a configuration differ in it"
    PROTOCOL = "how the run is evaluated and its best model selected: as IDENTITY; fixed in a benchmark"
    LENGTH = "how long the run trains: may change when it is resumed"
    PLACE = "where the run executes, reads and writes"
    WATCH = "what is checked, recorded and kept during the run, when it pauses, and how errors are handled"
    COMMAND = "what one command line does: not part of a run's config"
