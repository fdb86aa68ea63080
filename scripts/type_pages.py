#!/usr/bin/env python3
"""Types the commands of pages as a newcomer does, and compares what they print with what the pages show.

    scripts/type_pages.py BIN PAGE... [--record] [--keep FOLDER]

BIN is the folder of the command `dlopt`, of an installed wheel or of a checkout. Each page is typed in a new folder, in
which are only the tables that pages speak of: its files are written where it says, its lines of bash run one by one,
and each line of a block of text below them, in the same section, must be among what they printed. In a block of text,
lines that begin with `$` are typed, too. Digits and the widths of columns may differ, and `...` matches anything.
--record writes the date to docs/printed.yaml; the site shows it below the page, and a test asks for it again when the
commands or their output were edited. Needs only Python.
"""

import argparse
import datetime
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "printed.yaml"
# What a newcomer's machine lacks: Slurm, a server, several GPUs. And what would install the command another time.
NEEDS = re.compile(
    r"scripts/|slurm|sbatch|torchrun|tensorboard --|export PATH|\bgit\b|\bpip\b|device=cuda|processes=8|--watch"
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
WRITTEN = re.compile(r"`([\w./-]+\.(?:py|yaml|toml|csv))`")  # the last file named before a block is the one it shows
ENOUGH = 20 * 60  # seconds for one line
UNDECIDED = 3  # the exit status of `dlopt judge` for a change that is no gain


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    before: str  # what stands between it and the block above

    @property
    def lines(self) -> list[str]:
        return self.text.replace("\\\n", " ").splitlines()


def blocks(page: Path) -> Iterator[Block]:
    text, end = page.read_text(encoding="utf-8"), 0
    for found in BLOCK.finditer(text):
        yield Block(found[1], found[2], text[end : found.start()])
        end = found.end()


def digest(page: Path) -> str:
    """Changes with the commands of a page and the output that it shows."""
    content = "".join(f"{block.language}\n{block.text}" for block in blocks(page))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def shape(line: str) -> str:
    """A line without what differs between two runs: digits, units of time, the widths of columns."""
    line = re.sub(r"\d+(?:[.,:]\d+)*(?:e-?\d+)?(?: s\b)?", "0", line.replace("−", "-"))
    return re.sub(r"[\s─━-]+", " ", line).strip()


def missing(shown: str, printed: str) -> list[str]:
    """Returns the lines of `shown` that are not in `printed`."""
    shapes = [shape(line) for line in printed.splitlines()]
    whole = shape(printed)  # of a text that was wrapped elsewhere
    lacking = []
    for line in shown.splitlines():
        pattern = ".*".join(re.escape(shape(part)) for part in line.split("..."))
        if not any(re.search(pattern, each) for each in shapes) and ("..." in line or shape(line) not in whole):
            lacking.append(line)
    return lacking


class Newcomer:
    """Types pages in a folder, with the commands of BIN."""

    def __init__(self, bin: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "COLUMNS": "120"}

    def type_page(self, page: Path) -> list[str]:
        """Returns the problems, a line each."""
        problems = []
        printed: str | None = None  # by the last block of commands in this section; None: nothing of it ran
        for block in blocks(page):
            if re.search(r"^#", block.before, re.MULTILINE):
                printed = None
            if block.language == "bash":
                printed = None
                for line in block.lines:
                    if not line.strip() or line.startswith("#") or NEEDS.search(line):
                        continue
                    status, output = self.type_line(line)
                    if status and (extra := re.search(r"install .*\[(\w+)\]", output)):
                        print(f"{page.name}: needs the extra {extra[1]}: {line}")
                        continue
                    printed = (printed or "") + output
                    if status and not (status == UNDECIDED and " judge " in line):
                        problems.append(f"{page.name}: exit status {status}: {line}")
            elif block.language == "text":
                if any(line.startswith("$ ") for line in block.lines):
                    printed = self.type_session(block)
                if printed is not None:
                    lacking = missing(block.text, printed)
                    problems += [f"{page.name}: shown, but not printed: {line}" for line in lacking]
            elif block.language in ("python", "yaml", "toml") and (named := WRITTEN.findall(block.before)):
                self.write(named[-1], block)
        return problems

    def type_session(self, block: Block) -> str | None:
        """Types the lines of a block that begin with `$`; returns all of it as a terminal shows it."""
        shown = ""
        for line in block.lines:
            if line.startswith("$ "):
                if NEEDS.search(line):
                    return None
                shown += f"{line}\n{self.type_line(line[2:])[1]}"  # whatever the status: it may show an error
        return shown

    def type_line(self, line: str) -> tuple[int, str]:
        """Runs a line in the folder; returns its exit status and what it printed."""
        runs = sorted(path.parent for path in (self.folder / "outputs/train").glob("*/checkpoints"))
        if runs:
            line = line.replace("DATE", runs[-1].name)
        line = line.replace(" --open", "")  # it would serve the page until it is interrupted
        print(f"$ {line}", flush=True)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=ENOUGH,
        )
        print(done.stdout, end="", flush=True)
        return done.returncode, done.stdout

    def write(self, name: str, block: Block) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "python":
            for package in [*file.relative_to(self.folder).parents][:-1]:
                (self.folder / package / "__init__.py").touch()
        file.write_text(block.text, encoding="utf-8")


def write_tables(folder: Path) -> None:
    """Writes the tables that the pages take for the reader's own."""
    draw = random.Random(0)
    rows = ["width,length,species"]
    patients = ["patient,age,city,smoker,zip,visit,outcome"]
    for i in range(120):
        kind = i % 2
        rows.append(f"{draw.gauss(1 + 2 * kind, 1):.2f},{draw.gauss(5 - 2 * kind, 1):.2f},{'ab'[kind]}")
        age = "" if i in (10, 50) else draw.randint(20, 90)
        city = "" if i == 20 else draw.choice(["Bern", "Oslo", "Rome"])
        place = f"{city},{draw.choice(['True', 'False'])},{draw.choice(['190', '10115', '75001'])}"
        day = datetime.date(2024, 1, 1) + datetime.timedelta(days=draw.randrange(700))
        patients.append(f"p{i},{age},{place},{day},{draw.choice(['well', 'ill'])}")
    for name in ("measurements", "train", "shifted", "noisy", "new"):
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    (folder / "patients.csv").write_text("\n".join(patients) + "\n")


def record(pages: list[Path]) -> None:
    """Notes today for `pages`, beside what is noted for others."""
    entries = {}
    if RECORD.exists():
        for line in RECORD.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                name, _, rest = line.partition(": ")
                entries[name] = rest
    today = datetime.date.today().isoformat()
    for page in pages:
        entries[str(page.resolve().relative_to(ROOT))] = f"[{today}, {digest(page)}]"
    head = "# page: [day on which scripts/type_pages.py printed what it shows, digest of its blocks]"
    RECORD.write_text("\n".join([head, *(f"{name}: {rest}" for name, rest in sorted(entries.items()))]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--keep", type=Path, help="type in a subfolder of this folder, and leave it")
    options = parser.parse_args()
    problems, right = [], []
    for page in options.pages:
        folder = Path(tempfile.mkdtemp(prefix=f"{page.stem}-", dir=options.keep))
        try:
            write_tables(folder)
            found = Newcomer(options.bin.resolve(), folder).type_page(page)
        finally:
            if not options.keep:
                shutil.rmtree(folder)
        problems += found
        if not found:
            right.append(page)
    if options.record:
        record(right)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
