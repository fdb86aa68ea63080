"""Observers of the updates of a run: diagnostics and the profiler."""

from collections.abc import Sequence
from pathlib import Path

from dlopt.basics.errors import UserError
from dlopt.basics.length import Length
from dlopt.instruments.diagnostics import Diagnostics
from dlopt.instruments.profiling import Profiling
from dlopt.tracking.tracking import Tracking
from dlopt.training.builders.workload import Workload
from dlopt.training.step import Observer


def observers(workload: Workload, length: Length, tracking: Tracking, folder: Path) -> Sequence[Observer]:
    """Builds the observers that `diagnostics` and `profile` enable. Raises `UserError` for unsupported settings."""
    settings = workload.run_config.settings
    enabled: list[Observer] = []
    if settings.diagnostics:
        enabled.append(Diagnostics(workload, settings.diagnostics, settings.diagnostics_every, tracking.diagnostics))
    if settings.profile:
        first, last = settings.profile_steps
        if last > length.updates:
            raise UserError(
                f"profile_steps=[{first},{last}]: the run has only {length.updates} updates; choose earlier ones"
            )
        if length.done > first:  # count from where the run resumes
            first, last = first + length.done, last + length.done
        if last > length.updates:
            left = length.updates - length.done
            tracking.message(f"profile=true: only {left} updates are left, too few for profile_steps; none is profiled")
            return enabled
        enabled.append(Profiling(workload, (first, last), folder / "profile", tracking.message))
    return enabled
