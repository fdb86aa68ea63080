"""Fails when names or prose use words that the project replaced by the field's terms.

    .venv/bin/python scripts/words.py [FILE...]    (default: all files that git tracks)

Checks the identifiers that Python files define, and the prose: docstrings, comments and messages in Python, comments in
YAML and shell files, and the text of Markdown pages (without code). Add a row to `NAMES` or `PROSE` when a word should
stay out, and an exception to `ALLOWED` only where it is the field's term.
"""

import argparse
import ast
import contextlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SELF = "scripts/words.py"

NAMES = {  # part of an identifier -> what to write
    "told": "passed, reported",
    "says": "reports, prints",
    "asked": "requested",
    "wanted": "requested, enabled",
    "besides": "also, extra",
    "everyones": "gathered, all_ranks",
    "figures": "metrics",
    "landmark": "snapshot, kept checkpoint",
    "portion": "shard, slice",
    "portions": "shards, slices",
    "pieces": "shards, chunks",
    "attentive": "loss-aware",
    "meeting": "rendezvous",
    "company": "contention",
    "crew": "worker pool",
    "places": "slots",
    "pace": "step timing",
    "unseen": "dry run",
    "setup": "build",
    "aligning": "buffer synchronization",
    "polled": "synchronized",
    "member": "rank, process group",
}
PROSE = {  # regular expression -> what to write
    r"figures?(?! ?\d| \()": "metric (figure: a picture, or of a paper with its number)",
    r"told": "passed, reported",
    r"besides": "also, in addition",
    r"(?<!left )(?<!leaves )behind": "after",
    r"(goes|went|going) on( with)?": "resumes, continues",
    r"(what )?(goes|went) (wrong|bad)": "the error; fails; is non-finite (NaN/Inf)",
    r"stands? (for|in|there|at|beside)": "is; means; expands to",
    r"lies (in|at|there|beside|below|above)": "is",
    r"everyones?": "of all ranks, gathered",
    r"landmarks?": "kept checkpoint, snapshot",
    r"crew": "worker pool",
    r"a person|somebody|someone|one types|one's own": "you; the user",
    r"by itself": "automatically, by default, alone",
    r"dear": "expensive",
    r"nothing is lost|takes nothing with it": "no data is lost; does not affect the others",
    r"anew": "again",
    r"(a|one) tenth of a second": "100 ms",
    r"(twice|three times|ten times) as long": "2x, 3x, 10x",
    r"whatever stands": "whatever is",
    r"the run of a line": "the run, the command",
    r"is answered by": "prints, returns",
    r"thereupon|whither|whence|wherein|hitherto": "(plain words)",
    r"others are met|meets? the others": "rendezvous",
}
ALLOWED = {  # file or folder -> words that are the field's there
    "dlopt/sweeps/hydra_plugins/": {"setup"},  # Hydra's interface
    "docs/conf.py": {"setup"},  # Sphinx's interface
    "dlopt/commands/eval.py": {"member"},  # of an ensemble
    **{  # of matplotlib
        f"{top}/{room}/": {"figure", "figures"}
        for top in ("dlopt", "tests")
        for room in ("instruments", "lab", "results")
    },
}
_CODE = re.compile(r"`[^`\n]*`")


def tracked() -> list[Path]:
    with contextlib.suppress(OSError):  # there is no git
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if listing.returncode == 0:  # not a source archive
            return [ROOT / name for name in listing.stdout.split("\0") if name]
    folders = [ROOT / name for name in (".ci", ".github", "conf", "dlopt", "docs", "scripts", "tests")]
    files = (path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return [*ROOT.glob("*.*"), *files]


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of functions, classes, parameters and variables that the file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of comments and of strings that hold a sentence."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        string = token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
        if token.type == tokenize.COMMENT or (string and " " in token.string):
            for offset, line in enumerate(token.string.split("\n")):
                yield token.start[0] + offset, line


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) outside of code blocks."""
    in_code = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, line


def comments(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if (found := re.search(r"(^|\s)#(?!!)(.*)", line)) is not None:
            yield number, found[2]


def check(path: Path) -> Iterator[str]:
    """Yields a message for every word that should not be there."""
    if path.suffix not in {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ""}:
        return
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    allowed = {word for place, words in ALLOWED.items() if name.startswith(place) for word in words}
    prose: Iterator[tuple[int, str]]
    if path.suffix == ".py":
        for line, identifier in defined_names(ast.parse(text)):
            words = {word.lower() for word in re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", identifier)}
            for word in sorted((words & NAMES.keys()) - allowed):
                yield f"{name}:{line}: name {identifier}: write {NAMES[word]}"
        prose = python_prose(text)
    elif path.suffix == ".md":
        prose = markdown_prose(text)
    else:
        prose = comments(text)
    for line, sentence in prose:
        for found in _PROSE.finditer(_CODE.sub("", sentence)):
            if found[0].lower() not in allowed:
                yield f"{name}:{line}: {found[0]!r}: write {_advice(found[0])}"


_PROSE = re.compile(r"\b(" + "|".join(f"(?:{pattern})" for pattern in PROSE) + r")\b", re.IGNORECASE)


def _advice(found: str) -> str:
    return next(better for pattern, better in PROSE.items() if re.fullmatch(pattern, found, re.IGNORECASE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    files = [path.resolve() for path in parser.parse_args().files] or tracked()
    messages = [message for path in files if path.is_file() and path != ROOT / SELF for message in check(path)]
    print("\n".join(messages) or f"{len(files)} files: no forbidden word")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
