"""Who starts a program, and with whose words: a file must not decide what runs.

`tests/support/programs.py` lists every function that starts a program, or another interpreter, with the origin of the
arguments. Where a function passes on the arguments of its callers, each of them is listed as well.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.programs import CALLERS, ROOT, STARTED

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
    passing = frozenset(place.rpartition(":")[2] for place, origin in STARTED.items() if origin == CALLERS)
    words = re.compile("|".join(rf"\b{name.rpartition('.')[2]}\b" for name in STARTERS | OF_MODULES | passing))
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
    return {
        f"{path.relative_to(ROOT)}:{name}"
        for path, source in sources.items()
        if words.search(source) is not None  # parsing takes longer
        for name in starts(source, passing)
    }


def test_every_start_of_a_program_has_the_origin_of_its_arguments() -> None:
    assert not found() - {*STARTED}, "say where the arguments come from; a file must not decide what runs"
    assert not {*STARTED} - found(), "starts no program any more"


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
