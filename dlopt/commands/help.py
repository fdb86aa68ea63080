"""`dlopt train --help`: groups with their choices, the run's own keys, the flags."""

import shutil
import textwrap

from dlopt.config.choices import Catalogue, Choice, config_folder

_FLAGS = (
    ("-m, --multirun", "one run for each combination of comma lists: optimizer.lr=0.1,0.01 seed=0,1"),
    ("-c, --cfg job", "show the composed config and do nothing"),
    ("--info defaults", "show which file each part of the config comes from; --info config: the whole of it"),
    ("-cd, --config-dir DIR", "a folder of your own choices: DIR/optimizer/mine.yaml is optimizer=mine"),
    ("-cn, --config-name NAME", "another primary config than train.yaml"),
    ("--hydra-help", "the other flags of Hydra, which composes the config"),
)


def help_page(config_dir: str | None = None) -> str:
    catalogue = Catalogue(config_dir)
    groups = catalogue.groups()
    lines = ["dlopt train [group=choice] [key=value] [flags]", "", "Groups and their choices (* the default)"]
    rows = []
    for group, default in groups.items():
        names = [f"{choice.name}*" if choice.name == default else choice.name for choice in catalogue.choices(group)]
        rows.append((group, ", ".join(names) or "no choices yet"))
    lines += _table(rows)
    lines += ["", "The keys of a group's choices, each with its meaning: dlopt options optimizer=sgd", ""]
    lines += ["Keys of the run"]
    primary = Choice("", "train", config_folder() / "train.yaml")
    keys = [key for key in catalogue.keys(primary) if key.name.split(".")[0] not in (*groups, "hydra")]
    keys = [key for key in keys if "/" not in key.name]  # the defaults list itself
    lines += _table([(f"{key.name}={key.value}", key.comment) for key in keys])
    lines += _table(
        [("from=RUN", "start from the config of an earlier run, by its folder; what else is typed comes on top")]
    )
    lines += ["", "Sweeps, with -m (* the default)", *_table(_sweeps())]
    lines += ["", "Flags", *_table(_FLAGS), ""]
    lines += ["Lists are typed [a,b]; a value with spaces or commas is quoted twice: name=\"'two words'\""]
    return "\n".join(lines)


def _sweeps() -> list[tuple[str, str]]:
    """How sweeps choose their jobs, and where these run."""
    folder = config_folder() / "hydra"
    defaults = {"launcher": "serial", "sweeper/sampler": "tpe", "sweeper/pruner": "none"}
    rows = [("hydra/sweeper=dlopt_optuna", "draw values from interval(a,b), choice(a,b), tag(log,...): see its file")]
    for group, default in defaults.items():
        names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        rows.append((f"hydra/{group}", ", ".join(f"{name}*" if name == default else name for name in names)))
    return rows


def _table(rows: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> list[str]:
    """Two columns, the right one wrapped to the terminal."""
    width = max(shutil.get_terminal_size().columns, 60)
    column = min(max(len(left) for left, _ in rows), 34)
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, width - column - 4, break_on_hyphens=False) or [""]
        if len(left) > column:
            lines.append(f"  {left}")
            left = ""
        lines += [
            f"  {begin:{column}}  {text}".rstrip() for begin, text in zip([left] + [""] * 99, wrapped, strict=False)
        ]
    return lines
