"""A package of choices and commands, as users write their own."""

from pathlib import Path

from tests.support.processes import Done, run_dlopt

HERE = Path(__file__).parents[1] / "extending"


def dlopt(place: Path, *arguments: str) -> Done:
    environment = {"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return run_dlopt(place, *arguments, environment=environment)
