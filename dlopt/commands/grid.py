"""`python -m dlopt.commands.grid NUMBER [group=choice] [key=a,b]`: prints the arguments of one job of a sweep.

For job arrays: NUMBER is the index of a combination of values, in the order of `dlopt train -m`.
"""

import sys

from dlopt.config.compose import Composer, grid, parse_arguments
from dlopt.errors import DONE, USER_ERROR, UserError


def overrides_of(number: int, arguments: list[str]) -> list[str]:
    """Returns the overrides of job `number`, after the flags that name config files. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    jobs = grid(Composer(parsed.config_name, parsed.config_dir).parse(parsed.overrides))
    if not 0 <= number < len(jobs):
        raise UserError(f"job {number}: the sweep has jobs 0 to {len(jobs) - 1}: {' '.join(arguments)}")
    flags = {"--config-dir": parsed.config_dir, "--config-name": parsed.config_name}
    return [*(f"{flag}={value}" for flag, value in flags.items() if value is not None), *jobs[number]]


if __name__ == "__main__":
    try:
        print("\n".join(overrides_of(int(sys.argv[1]), sys.argv[2:])))
    except UserError as error:
        print(f"dlopt: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(DONE)
