"""The functions of dlopt that start a program, with the origin of its arguments: a file must not decide what runs."""

from pathlib import Path

ROOT = Path(__file__).parents[2] / "dlopt"

CALLERS = "the callers'"
FIXED = "fixed words"
FOLDER = "fixed words, and the absolute path of a folder after -C"
OWN = "a module of dlopt, and folders that were typed or that this command has made"
IDS = "fixed words, and job ids that are numbers"
TYPED = "the words of the command line"
COMPILER = "torch's own, for the code that it generates"
PYTHON = "Python's own"

# By file and function.
STARTED = {
    "commands/report.py:report": "the address of the page that this process serves",
    "commands/shared/processes.py:over_processes": TYPED,
    "data/batches.py:Batches.__init__": COMPILER,
    "data/loading.py:Loader._start": PYTHON,
    "instruments/lr_range.py:measure": OWN,
    "instruments/measuring_ranks.py:run_ranks": CALLERS,
    "lab/judge/running.py:_with_code.start": OWN,
    "lab/scaling/contention.py:measure": OWN,
    "lab/scaling/modes.py:_run": OWN,
    "lab/scaling/network_command.py:time_all_reduce": TYPED,
    "lab/trajectory/paths.py:animate": "ffmpeg, and the output that was typed",
    "machine/device.py:visible_gpus": FIXED,
    "parallel/processes/launch.py:run_group": OWN,
    "parallel/processes/launch.py:run_processes": CALLERS,
    "parallel/processes/launch.py:start_rank": CALLERS,
    "parallel/processes/rendezvous.py:slurm_master": "the names of nodes in a variable of Slurm",
    "run/environment.py:_diff": "fixed words, a folder after -C, and names of filters, which -c sets to nothing",
    "run/environment.py:versions": FOLDER,
    "run/environment.py:_processor": PYTHON,
    "run/environment.py:git": CALLERS,
    "run/environment.py:machine": PYTHON,
    "run/environment.py:repository": FIXED,
    "sweeps/code_copy.py:_listed": f"{FOLDER}; names of files after --",
    "sweeps/code_copy.py:_repository": FOLDER,
    "sweeps/pool.py:warm_up": PYTHON,
    "sweeps/slurm.py:Slurm.submit": "the launcher, of which a file sets LAUNCHER_OPTIONS only: --key=value",
    "sweeps/slurm.py:_Step.__init__": OWN,
    "sweeps/slurm.py:requeue_element": "fixed words, and the job id in a variable of Slurm",
    "sweeps/slurm_queue.py:cancel": IDS,
    "sweeps/slurm_queue.py:ended_early": IDS,
    "sweeps/slurm_queue.py:max_array_size": FIXED,
    "sweeps/slurm_queue.py:queued_elements": IDS,
    "sweeps/slurm_queue.py:run_tool": CALLERS,
    "sweeps/submission.py:become_worker": "a submission whose SHA-256 this user has submitted or typed",
    "training/builders/speed.py:compiled": COMPILER,
}
