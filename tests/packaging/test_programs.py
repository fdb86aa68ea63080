"""Who starts a program, and with whose words: a file must not decide what runs.

Every function that starts a program, or another interpreter, is listed here with the origin of the arguments. Where a
function passes on the arguments of its callers, each of them is a place of its own.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dlopt"

# By their last part, because they may be imported alone; the second ones only of their module.
STARTERS = {
    "Popen", "check_call", "check_output", "getoutput", "getstatusoutput", "posix_spawn", "posix_spawnp", "forkpty",
    *(f"{kind}{form}" for kind in ("exec", "spawn") for form in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    "create_subprocess_exec", "create_subprocess_shell", "ensure_running", "FFMpegWriter", "DataLoader", "find_library",
}  # fmt: skip
OF_MODULES = {
    "subprocess.run", "subprocess.call", "os.system", "os.popen", "os.startfile", "pty.spawn", "torch.compile",
    "webbrowser.open", "webbrowser.open_new", "webbrowser.open_new_tab", "platform.platform", "platform.processor",
    "platform.uname",
}  # fmt: skip

CALLERS = "the callers'"
FIXED = "fixed words"
FOLDER = "fixed words, and the absolute path of a folder after -C"
OWN = "a module of dlopt, and folders that were typed or that this command has made"
IDS = "fixed words, and job ids that are numbers"
TYPED = "the words of the command line"
COMPILER = "torch's own, for the code that it generates"
PYTHON = "Python's own"

# By file and function.
PLACES = {
    "commands/report.py:report": "the address of the page that this process serves",
    "commands/shared/processes.py:over_processes": TYPED,
    "data/batches.py:Batches.__init__": COMPILER,
    "data/loading.py:Loader._start": PYTHON,
    "instruments/lr_range.py:_measure_in_ranks": OWN,
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
    "run/environment.py:_dlopt_commit": FOLDER,
    "run/environment.py:_processor": PYTHON,
    "run/environment.py:git": CALLERS,
    "run/environment.py:machine": PYTHON,
    "run/environment.py:repository": FIXED,
    "sweeps/code_copy.py:_listed": f"{FOLDER}; names of files after --",
    "sweeps/code_copy.py:_sources": FOLDER,
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


def starts(source: str, more: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the functions that start a program. `more`: functions that start what they are passed."""
    tree = ast.parse(source)
    names = STARTERS | more
    for node in (each for each in ast.walk(tree) if isinstance(each, ast.ClassDef)):
        if any(ast.unparse(base).startswith("subprocess.Popen") for base in node.bases):
            names = names | {node.name}

    def visit(node: ast.AST, name: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
            if isinstance(child, ast.Call):
                called = ast.unparse(child.func)
                if called in OF_MODULES or called.rpartition(".")[2] in names:
                    yield name
            yield from visit(child, ".".join(filter(None, [name, inner])))

    yield from visit(tree, "")


@cache
def found() -> set[str]:
    passing = frozenset(place.rpartition(":")[2] for place, origin in PLACES.items() if origin == CALLERS)
    words = re.compile("|".join(rf"\b{name.rpartition('.')[2]}\b" for name in STARTERS | OF_MODULES | passing))
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
    return {
        f"{path.relative_to(ROOT)}:{name}"
        for path, source in sources.items()
        if words.search(source) is not None  # parsing takes longer
        for name in starts(source, passing)
    }


def test_every_place_that_starts_a_program_says_where_its_arguments_come_from() -> None:
    assert not found() - {*PLACES}, "say where the arguments come from; a file must not decide what runs"
    assert not {*PLACES} - found(), "starts no program any more"


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(x)", "from subprocess import Popen\nPopen(x)", "os.execvp(a, b)", "os.system(x)",
        "def f():\n  webbrowser.open(x)", "launch.start_rank(x)",
        "class A(subprocess.Popen[bytes]):\n  pass\ndef f():\n  return A([x])",
    ],
)  # fmt: skip
def test_what_counts_as_starting(source: str) -> None:
    assert len([*starts(source, frozenset({"start_rank"}))]) == 1
    assert not [*starts("line.run(x)\nline.call(y)\nposition.open(z)")]
