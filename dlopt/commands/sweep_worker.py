"""The process of an element or a worker: `python -m dlopt.commands.sweep_worker FOLDER SHA256 OPTIONS`.

Slurm starts it, and `dlopt sweep work FOLDER` becomes one. OPTIONS is a JSON object (`dlopt.sweeps.worker.Options`).
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dlopt.basics.errors import DONE, INTERRUPTED, ReportedError, RunError, UserError
from dlopt.basics.interruption import end_on_signals, flush_streams, print_message
from dlopt.commands.command_table import every_command
from dlopt.config.packages import function
from dlopt.run.job import redact_output
from dlopt.sweeps import slurm, submission
from dlopt.sweeps.worker import Options, work


def run_command(words: Sequence[str]) -> int:
    """Runs a command of dlopt; returns its exit code."""
    code: int = function(every_command()[words[0]])(list(words[1:]))
    return code


def main() -> int:
    """Runs the process given by `sys.argv`; returns its exit code."""
    end_on_signals()
    redact_output()  # Slurm stores it beside the sweep
    sweep, digest, options = Path(sys.argv[1]), sys.argv[2], Options(**json.loads(sys.argv[3]))
    try:
        submitted = submission.read(sweep)
        if submitted.digest != digest:
            print(f"{sweep}: submitted again since; nothing to do")
            return DONE
        submitted.check(sweep)
        code = work(sweep, submitted, options, run_command)
    except (UserError, RunError) as error:
        print_message(str(error))
        return error.code
    except ReportedError as error:
        return error.code
    except KeyboardInterrupt as error:  # before the first job
        print_message(str(error) or "interrupted")
        code = INTERRUPTED
    if code == INTERRUPTED and submission.stop_reason(sweep) is None:
        flush_streams()
        slurm.requeue_element()
    return code


if __name__ == "__main__":
    exit_code = main()
    flush_streams()
    os._exit(exit_code)
