"""Who has looked at a table: a verdict holds for a number of seeds that was fixed before.

The end of a sweep and `dlopt report` write what they have shown to `.looks.json` in the folder of the runs. A later
table with more seeds spends its error rate over all of them (`simultaneous.rate_of`).
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from dlopt.basics.files import read_json, write_json
from dlopt.results.leaderboard import Leaderboard, Look, Record, look_of

LOOKS = ".looks.json"


def looks(folders: Iterable[Path], records: Iterable[Record]) -> list[Look]:
    """Returns what was shown of the folders, and of those below that have the runs."""
    tops = [folder.absolute() for folder in folders]
    below = [each for record in records for each in record.path.absolute().parents if _is_within(each, tops)]
    found: list[Look] = []
    for folder in dict.fromkeys([*tops, *below]):
        content = (read_json(folder / LOOKS) or {}).get("looks")
        for look in content if isinstance(content, list) else ():
            if isinstance(look, dict):
                found.append({key: seeds for key, seeds in look.items() if type(seeds) is int})
    return found


def remember(board: Leaderboard, folders: Iterable[Path], known: Sequence[Look]) -> None:
    """Records that a table was shown, unless the same was recorded before."""
    look = look_of(board)
    if not look or look in known:
        return
    for folder in folders:
        with contextlib.suppress(OSError):  # such as a folder of others, which can be read only
            content = (read_json(folder / LOOKS) or {}).get("looks")
            write_json(folder / LOOKS, {"looks": [*(content if isinstance(content, list) else ()), look]})


def _is_within(folder: Path, tops: Iterable[Path]) -> bool:
    return any(folder.is_relative_to(top) for top in tops)
