"""Prints the lines of Python in each room of dlopt/ and in the tests, largest first.

.venv/bin/python scripts/rooms.py
"""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    lines: Counter[str] = Counter()
    for path in (*(ROOT / "dlopt").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        top, *parts = path.relative_to(ROOT).parts
        room = top if top == "tests" else parts[0].removesuffix(".py")
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    for room, count in [*lines.most_common(), ("dlopt", lines.total() - lines["tests"])]:
        print(f"{count:7,}  {room}")


if __name__ == "__main__":
    main()
