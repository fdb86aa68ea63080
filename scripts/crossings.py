"""Tries features together: every pair of them keeps the laws of a run, or is refused in one line.

    python scripts/crossings.py [--seed 0] [--rows N] [--strength 1|2|3] [--slow] [--law NAME ...] [--only NUMBER]

Draws a covering array of tests/support/crossings/features.py: rows in which every pair of values occurs (or, with
--strength 1 or 3, every value, or every three). Each row trains a tiny model for some updates, and the laws of
tests/support/crossings/laws.py are asked of it. A row that is refused is tried again without the value that is refused.
A row that breaks a law, or diverges, is shown with the fewest features that do. Exits with 1 if there is one.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from tests.support.crossings.campaign import Campaign, shown  # noqa: E402
from tests.support.crossings.drawn_files import write_files  # noqa: E402
from tests.support.crossings.features import array  # noqa: E402
from tests.support.crossings.laws import LAWS  # noqa: E402
from tests.support.crossings.trial import warm_up  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="number of rows to try, of those that cover most first")
    parser.add_argument("--only", type=int, help="number of one row to try, from 1")
    parser.add_argument("--strength", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--slow", action="store_true", help="also the laws that take several processes")
    parser.add_argument("--law", choices=[law.name for law in LAWS], nargs="+", help="only these")
    typed = parser.parse_args()
    laws = [
        law for law in LAWS if law.name in (typed.law or [law.name]) and (typed.law or typed.slow or not law.is_slow)
    ]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), laws, typed.seed)
        rows = enumerate(itertools.islice(array(typed.seed, campaign.files, typed.strength), typed.rows), 1)
        count = 0
        write_files(campaign.files)
        warm_up(campaign.files)
        for number, row in rows:
            if typed.only in (None, number):
                campaign.check(number, row)
                count += 1
                print(f"row {number}: done after {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    found = campaign.found
    print(f"{count} rows, {sum(found.checked.values())} checks in {time.monotonic() - begin:.0f} s")
    for name, times in found.checked.items():
        print(f"  {times:4} {name}")
    print(f"{len(found.refused) + len(found.refused_by_law)} refusals:")
    for refusal, row in found.refused.items():
        print(f"  {shown(row)}\n    {refusal}")
    for refusal, name in found.refused_by_law.items():
        print(f"  {name}\n    {refusal}")
    print(f"{len(found.broken)} broken laws")
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
