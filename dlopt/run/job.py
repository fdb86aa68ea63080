"""One run as a process: `python -m dlopt.run.job FOLDER [CHECKPOINT]`, by default from the folder's newest checkpoint.

Jobs of a sweep and ranks of a run are started this way: a job that is killed does not affect the others.
"""

import os
import sys
from pathlib import Path

from dlopt.basics.errors import FileError, RunError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import flush_streams, print_message
from dlopt.basics.secrets import RedactedStream, note_environment
from dlopt.machine.world import RANK, current
from dlopt.parallel.processes import launch, rendezvous
from dlopt.run.record import record_failure
from dlopt.run.runner import exit_code


def redact_output() -> None:
    """Redacts what this process prints: the output of a job is stored in its folder."""
    note_environment()  # of a forked job: not that of the server that has imported `dlopt.basics.secrets`
    for name in ("stdout", "stderr"):
        setattr(sys, name, RedactedStream(getattr(sys, name)))


def main() -> int:
    """Runs the job of `sys.argv`; returns its exit code."""
    if RANK in os.environ:
        launch.end_rank_with_parent()
    from dlopt.config.older import of_today
    from dlopt.config.parsing import parse
    from dlopt.config.resolve import refuse_hidden, resolve_saved
    from dlopt.training.checkpoint.checkpoints import load, load_of_run
    from dlopt.training.progress import TrainingRun

    folder = RunFolder(Path(sys.argv[1]))
    try:
        folder.refuse_other_format("dlopt.run.job")
        config = folder.config()
        refuse_hidden(config or {}, "a process reads its config from a file, which must not hold the password or token")
        if config is None:
            raise FileError(f"{folder.path}: config.yaml is missing or unreadable")
        config = of_today(config, trains=True)
        choices = folder.choices()
        run_config = parse(resolve_saved(config), config, choices)
        state = None
        if rendezvous.is_main():  # the other ranks receive the state from rank 0
            state = load(Path(sys.argv[2])) if sys.argv[2:] else load_of_run(folder, config)
        run = TrainingRun(run_config, folder.path, state, choices)
    except (UserError, RunError) as error:
        if rendezvous.is_main():
            print_message(str(error))
            record_failure(folder.path, str(error))
        return error.code
    return exit_code(run)


if __name__ == "__main__":
    redact_output()
    code = main()
    if current() is not None:
        rendezvous.end_process(code)
    flush_streams()
    sys.exit(code)
