"""A run as one value: composed and checked once, then run in this process, or described in the folder of a job.

The path of an override, `optimizer.lr=0.1`, from the command line to its use:

1. `flags.parse_arguments` separates Hydra's flags; `inherit` replaces `from=RUN` by the overrides of that run.
2. `overrides.parse_overrides` turns the text into Hydra's `Override`, which is passed on until it is saved. No other
   module takes the text apart. The words of a sweep become axes (`overrides.parse_axes`), which `dlopt.sweeps.axes`
   completes from files; they are the overrides of its jobs.
3. `compose.Composer` rejects overrides that Hydra accepts but that are almost certainly mistakes, and sets the value in
   the config of the choices.
4. `trust` checks what interpolations expand to and that Hydra's node names no code, before anything is resolved;
   `typed` checks that only the command line says whom to trust and what to start.
5. `resolve.to_plain` resolves the config to plain values; the form to save keeps secrets as interpolations.
6. `early_checks.check_early` checks what it can before torch is imported, which takes seconds; then
   `parsing.parse` checks each value against the signature of its callable (`schema`), then combinations (`conflicts`,
   `rules`).
7. The result, a `RunConfig` of components, is part of the `Plan`.

How `_target_` becomes a call: `conf/optimizer/sgdw.yaml` has `_target_: dlopt.optim.SGDW` and values for its arguments.
Step 6 imports the class (`schema.resolve_target`), checks the values against its signature (`schema.check_arguments`),
and keeps both as a `schema.Component`. When the run is built, `builders.optimizer.build_optimizer` calls
`run_config.optimizer.build(params=...)`, and `Component.build` calls the class with the checked values and with what is
known only then, the parameters. All other groups are built the same way.

A job of a sweep, or a rank of a parallel run, enters at step 5 with the config that `dlopt.run.record.describe` has
saved in the run's folder. It is not composed again: the job must run exactly the config that was checked.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.early_checks import check_early
from dlopt.config.overrides import parse_overrides, text_of
from dlopt.config.refusals import refused_together
from dlopt.config.resolve import choices_of, job_variables, refuse_hidden, to_plain
from dlopt.config.teacher import identify_teacher

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from dlopt.config.run_config import RunConfig

_UNSAFE = re.compile(r"[^\w.,=+@-]+")  # in a file name


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        overrides: of the command line, or of the job of a sweep, as Hydra has parsed them.
        choices: the choice of each config group.
        run_config: the checked config; `saved`: its form in config.yaml.
        environment: variables of the run's process (hydra.job.env_set).
        subfolder: of a job, below the folder of its sweep (hydra.sweep.subdir).
        flags: --config-dir and --config-name of the command line, which a command that repeats the run needs.
        config: as composed, with Hydra's node; None for a job of a sweep, which no longer needs it.
        branches_from: the checkpoint of another run from which a job of a sweep continues; "" for none.
    """

    overrides: "tuple[Override, ...]"
    choices: Mapping[str, str]
    run_config: "RunConfig"
    environment: Mapping[str, str] = field(default_factory=dict)
    subfolder: str = ""
    flags: tuple[str, ...] = ()
    config: DictConfig | None = field(default=None, repr=False, compare=False)
    branches_from: str = ""

    @property
    def saved(self) -> Mapping[str, Any]:
        return self.run_config.config

    @property
    def texts(self) -> list[str]:
        """The overrides as text."""
        return [text_of(override) for override in self.overrides]

    @property
    def typed(self) -> list[str]:
        """The words that compose this run again, for overrides.yaml."""
        return [*self.flags, *self.texts]


def plan(composer: Composer, overrides: "Iterable[str | Override]") -> Plan:
    """Composes and checks the run of a command line. Raises `UserError`."""
    overrides = list(overrides)
    with refused_together(composer, overrides):
        parsed = composer.parse(overrides)
        return checked(composer.compose(parsed), parsed, flags=composer.flags)


def checked(
    config: DictConfig,
    overrides: "Iterable[str | Override]",
    flags: tuple[str, ...] = (),
    later: tuple[str, ...] = (),
) -> Plan:
    """Checks a composed config and returns the plan of the run. Raises `UserError`.

    Args:
        overrides: of the run.
        later: path prefixes of teachers that this sweep trains first.
    """
    parsed = tuple(parse_overrides(overrides))
    plain, saved = to_plain(config)
    refuse_hidden(plain, "*** is what dlopt stores in place of a password or token")
    for each in (plain, saved):
        identify_teacher(each, later)
    choices = choices_of(config)
    check_early(plain, parsed)
    from dlopt.config.parsing import parse  # imports torch

    return Plan(parsed, choices, parse(plain, saved, choices), flags=flags, config=config)


def as_job(plan: Plan, number: int, overrides: "Iterable[str | Override]") -> Plan:
    """Returns the plan of job `number` of a sweep, with the overrides of the job alone. Raises `UserError`."""
    config = plan.config
    assert config is not None
    refuse_hidden(plan.saved, "a job reads its config from a file, which must not hold the password or token")
    with open_dict(config):
        config.hydra.job.num = number
        config.hydra.job.id = str(number)
    environment = job_variables(config)
    subfolder = folder_name(str(config.hydra.sweep.subdir))
    parsed = tuple(parse_overrides(overrides))
    return replace(plan, overrides=parsed, environment=environment, subfolder=subfolder, config=None)


def folder_name(subfolder: str) -> str:
    """Returns hydra.sweep.subdir with unsafe characters replaced. Raises `UserError` if it is not below the sweep."""
    parts = [_UNSAFE.sub("_", part)[:200] for part in subfolder.split("/") if part]
    if not parts or subfolder.startswith("/") or ".." in parts:
        raise UserError(f"hydra.sweep.subdir={subfolder}: must be a folder below hydra.sweep.dir")
    return "/".join(parts)
