"""The README's table of groups and choices, from the YAML files in conf/.

.venv/bin/python scripts/choices.py                     print it
.venv/bin/python scripts/choices.py --write README.md   put it between <!-- choices --> and <!-- /choices -->
"""

import argparse
import re
from pathlib import Path

from dlopt.commands.options import markdown
from dlopt.config.choices import Catalogue

_BETWEEN = re.compile(r"(<!-- choices -->\n).*?(<!-- /choices -->)", re.DOTALL)


def with_table(text: str, table: str) -> str:
    """`text` with `table` between the markers. Raises ValueError where it does not hold them exactly once."""
    changed, count = _BETWEEN.subn(lambda found: f"{found[1]}\n{table}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"<!-- choices --> and <!-- /choices --> are needed once; they are there {count} times")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description="Table of groups and choices")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this file")
    path = parser.parse_args().write
    table = markdown(Catalogue())
    if path is None:
        print(table, end="")
        return
    try:
        path.write_text(with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{path}: {error}\n")


if __name__ == "__main__":
    main()
