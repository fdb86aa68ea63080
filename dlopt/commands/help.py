"""`dlopt train --help`: groups and their choices, keys of the run, flags."""

from collections.abc import Sequence

from dlopt.commands.options import SWEEPS, choices_of
from dlopt.commands.usage import two_columns
from dlopt.config.choices import Catalogue, Choice, config_folder

_FLAGS = (
    ("-m, --multirun", "run a sweep, one run per combination: optimizer.lr=0.1,0.01 seed=0,1"),
    ("-c, --cfg job", "print the composed config and exit"),
    ("--info defaults", "print which file each part of the config comes from; --info config: the complete config"),
    ("-cd, --config-dir DIR", "folder with your own choices: DIR/optimizer/mine.yaml is optimizer=mine"),
    ("-cn, --config-name NAME", "primary config (default: train)"),
    ("--hydra-help", "list the other flags of Hydra"),
)
_INTRODUCTION = """\
Train a model, or run a sweep with -m

Usage: dlopt train [group=choice] [key=value] [flags]

Examples:
  dlopt train model=mlp optimizer=adamw epochs=5
  dlopt train -m optimizer.lr=0.01,0.03,0.1 seed=0,1,2
  dlopt train resume=auto"""


def help_page(config_dir: str | None) -> str:
    """Returns the help text, with the choices of `config_dir`."""
    catalogue = Catalogue(config_dir)
    groups = catalogue.groups()
    lines = [*_INTRODUCTION.splitlines(), "", "Groups and choices (* default):"]
    lines += two_columns([(group, _names(catalogue.choices(group), default)) for group, default in groups.items()])
    lines += ["", "`dlopt options optimizer=sgd` lists the keys of a choice.", "", "Keys of the run:"]
    primary = Choice("", "train", config_folder() / "train.yaml")
    keys = [key for key in catalogue.keys(primary) if key.name.split(".")[0] not in (*groups, "hydra")]
    keys = [key for key in keys if "/" not in key.name]  # the defaults list itself
    lines += two_columns([(f"{key.name}={key.value}", key.comment) for key in keys])
    lines += two_columns(
        [("from=RUN", "start from the config of the run in folder RUN, changed by the other overrides")]
    )
    rows = [("hydra/sweeper=dlopt_optuna", "search with Optuna: interval(a,b), choice(a,b), tag(log,interval(a,b))")]
    others = [(group, default) for group, default in SWEEPS.items() if group != "hydra/sweeper"]
    rows += [(group, _names(choices_of(Catalogue(), group), default)) for group, default in others]  # dlopt's own
    lines += ["", "Sweeps (-m; * default):", *two_columns(rows)]
    lines += ["", "Flags:", *two_columns(_FLAGS), ""]
    lines += ["Write lists as [a,b]. Quote values with spaces or commas twice: name=\"'two words'\""]
    return "\n".join(lines)


def _names(choices: Sequence[Choice], default: str | None) -> str:
    return ", ".join(f"{each.name}*" if each.name == default else each.name for each in choices) or "no choices yet"
