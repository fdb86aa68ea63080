"""The surface of dlopt has a budget. A change that raises a number says in the same line what was taken away for it.

The numbers are what existed when the budget was made, and after the plus sign what was promised then.
"""

import ast
from pathlib import Path

import pytest
import yaml

from dlopt.basics.plain_values import flatten
from dlopt.commands.command_table import COMMANDS, of_packages
from dlopt.commands.options import choices_of, every_group
from dlopt.config.choices import Catalogue, config_folder
from dlopt.config.overrides import SWEEP_WORDS

BUDGET = {
    "commands of the runner": 14 + 1,  # sweep
    "commands of the laboratory": 5 + 2,  # verify, judge; scaling replaces bench
    "keys of conf/train.yaml": 61
    + 1  # evaluate.train_accuracy replaces train_token_accuracy in every run of a text
    + 1,  # validation: instead of a run of `dlopt eval` for each further set and epoch
    "words of a sweep": 0
    + 4  # space: instead of the promised group; seeds, trials: plan.with_params went; wait: submitit
    + 1,  # at: instead of a command with resume=, epochs= and schedule_epochs= for each length
    "groups": 18 + 2 + 1,  # decay, debug; task
    "choices": 235
    + 5
    + 3  # of decay; debug: fast, overfit, profile
    + 1  # function=matrix: NorMuon, SOAP-Muon, AdamH, MuonH and SOAP-H are keys, not choices
    - 9  # depths and widths of six models are keys
    + 3,  # of these nine: task=auto, task=custom, data=drawn
    "recipes": 118,  # verdicts and their luck for resnet44_cifar10, which is resnet20_cifar10 with model=resnet44
    "names of dlopt.extend": 56 + 1 + 2,  # Checkpoint replaces the nine keys of its file; UserTask, Draws
}


def counts() -> dict[str, int]:
    catalogue, config = Catalogue(), yaml.safe_load((config_folder() / "train.yaml").read_text())
    choices = {group: len(choices_of(catalogue, group)) for group in every_group(catalogue)}
    extend = ast.parse((Path(__file__).parents[2] / "dlopt/extend.py").read_text())
    imports = [each for each in ast.walk(extend) if isinstance(each, ast.ImportFrom) and each.module]
    return {
        "commands of the runner": len(COMMANDS),
        "commands of the laboratory": len(of_packages()),
        "keys of conf/train.yaml": sum(key.split(".")[0] not in ("defaults", "hydra") for key in flatten(config)),
        "words of a sweep": len(SWEEP_WORDS),
        "recipes": choices.pop("experiment"),
        "groups": len(choices),
        "choices": sum(choices.values()),
        "names of dlopt.extend": sum(len(each.names) for each in imports if str(each.module).split(".")[0] == "dlopt"),
    }


@pytest.mark.parametrize("what", BUDGET)
def test_the_surface_is_within_its_budget(what: str) -> None:
    count = counts()[what]
    assert 0 < count <= BUDGET[what], f"{count} {what}, of {BUDGET[what]}: take one away, or say what was taken away"
