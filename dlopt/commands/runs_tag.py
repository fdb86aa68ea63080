"""`dlopt runs tag`: changes the tags and the note of runs."""

from pathlib import Path
from typing import Annotated

from dlopt.basics.errors import DONE, RunError, UserError
from dlopt.basics.files import write_yaml
from dlopt.basics.folders import RunFolder, short_path
from dlopt.basics.formats import format_value, printable
from dlopt.basics.locks import locked_folder
from dlopt.commands.shared.command_line import take_command_keys
from dlopt.config.settings_rules import check_tags
from dlopt.results import reading
from dlopt.results.leaderboard import Record


def tag(arguments: list[str]) -> int:
    """Runs `dlopt runs tag` with the given arguments. Raises `UserError` before it changes any run."""
    values, rest = take_command_keys(edit, arguments, "runs")
    count = next((i for i, argument in enumerate(rest) if not Path(argument).is_dir()), len(rest))
    if count == 0:
        missing = f"{rest[0]}: no such folder; " if rest else ""
        raise UserError(f"{missing}runs tag needs the folder of a run: dlopt runs tag outputs/train/DATE good")
    return edit([Path(argument) for argument in rest[:count]], rest[count:], **values)


def edit(
    folders: list[Path],
    tags: list[str],
    *,
    note: Annotated[str | None, "TEXT: replace the note; note= removes it"] = None,
    remove: Annotated[bool, "--: remove the tags instead of adding them"] = False,
) -> int:
    """Adds or removes tags, and sets the note. Raises `UserError` before it changes any run."""
    check_tags(tags)
    if note is None and not tags:
        raise UserError("runs tag: needs tags to add, or note=TEXT: dlopt runs tag outputs/train/DATE good")
    for record in [reading.read_intact(folder, "; nothing was changed") for folder in folders]:
        print(_write(record, tags, note, remove=remove))
    return DONE


def _write(record: Record, tags: list[str], note: str | None, *, remove: bool) -> str:
    """Replaces the tags and the note in config.yaml; returns the line to print. Raises `RunError`."""
    try:
        # Without the lock, one of two commands at once would write tags that it read before the other had written.
        with locked_folder(record.path):
            config = RunFolder(record.path).config()
            if config is None:
                raise RunError(f"{record.path / 'config.yaml'}: is no longer readable")
            before = config["tags"] if isinstance(config.get("tags"), list) else []
            after = [each for each in before if each not in tags] if remove else list(dict.fromkeys([*before, *tags]))
            config["tags"] = after
            if note is not None:
                config["note"] = note or None
            write_yaml(record.path / "config.yaml", config)
    except OSError as error:
        raise RunError(f"{record.path / 'config.yaml'}: cannot be written: {error.strerror}") from None
    shown = f" note={config['note']}" if config.get("note") else ""
    return printable(f"{short_path(record.path)}: tags={format_value(after)}{shown}")
