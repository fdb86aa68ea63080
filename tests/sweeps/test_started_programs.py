"""The programs that commands start, as an audit hook sees them: each is of a place that says who chose its words."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support import processes
from tests.support.line import dlopt
from tests.support.programs import ROOT, STARTED
from tests.support.sizes import TINY
from tests.sweeps.fake_slurm import SMALL, SUBMIT, WriteTool


def starting(folder: str, *lines: list[str]) -> None:
    """Runs commands, and prints each program that they start, with the function of dlopt that starts it."""
    programs: set[tuple[str, str]] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "pty.spawn"):
            return
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(f"{ROOT}{os.sep}"):
            frame = frame.f_back  # type: ignore[assignment]
        place = frame and f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_code.co_qualname}"
        programs.add((Path(os.fsdecode(arguments[0])).name, str(place).replace(".<locals>", "")))

    sys.addaudithook(note)  # stays: this is a process of its own
    for line in lines:
        result = dlopt(Path(folder), *line)
        assert result.code in (0, 75), result
    print(json.dumps(sorted(programs)))


def test_commands_start_only_the_listed_programs(tmp_path: Path, write_tool: WriteTool) -> None:
    for tool in ("sbatch", "squeue", "scontrol", "scancel", "uname"):
        write_tool(tool, "echo 7")
    write_tool("git", "exit 128")  # as outside of a repository
    words = [each for each in SUBMIT if "n_jobs" not in each]
    done = processes.run(
        starting, str(tmp_path), ["train", *TINY, "hydra.run.dir=run"], [*words, *SMALL, "epochs=1", "seed=0,1"],
        ["sweep", "status", "sweep"], ["sweep", "stop", "sweep"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    programs = [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]
    assert {"sbatch", "squeue"} <= {name for name, _ in programs}
    assert {place for _, place in programs} <= {*STARTED}, programs
