"""The names of dlopt that packages may import, the laboratory like any other. Other modules may change in any version.

Errors and exit codes
    UserError, RunError: one line for the user; exit code 2, and 1. DONE, FAILED, INTERRUPTED: codes of a command.
    Names: the names that are allowed in a place, and what to type instead of an unknown one.
Types of arguments and keys, with ranges
    Count, Natural (from 0), Seed; Positive, NonNegative, Fraction (below 1), Probability; NotEmpty[Count]: a list.
Files
    RunFolder: the paths and states of a run. read_json, write_json, write_atomically: None or whole files.
    Stored: a file of dlopt's own, read by its type.
Commands
    on_config, on_checkpoint: turn a function into a command; its keyword-only parameters are the command's keys.
    Line: its overrides, parsed and composed. output_folder, writing: what commands share.
    key_of, group_of, value_of, without: take overrides apart. keys_of_train: completes them.
Configs
    Composer, Plan, plan, RunConfig: from overrides to a checked config. Component: a callable with checked arguments.
    check_arguments: checks values against a signature. show: formats a value as typed. Role, role_of: what a key is.
Runs and models
    build_workload, Workload: data, model and loss of a config. training_batches, evaluation_batches: its batches.
    probe_trainer, Trainer: a training without output, for measurements. load_checkpoint: a verified `Checkpoint`.
Results
    Record, read_run: a finished run. lower_is_better: the direction of a metric. Section: a part of `dlopt report`.
    Table, short_path, printable: texts.
Components
    OptimizerTraits, LossClosure: of an optimizer. RunObserver: methods of an observer. Dataset: splits of a data set.
    Samples: base of a source of data. GroupMode: base of a parallel mode. UserTask, Draws: a task of the user, and its
    random numbers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, RunError, UserError
from dlopt.basics.files import read_json, write_atomically, write_json
from dlopt.basics.folders import RunFolder
from dlopt.basics.formats import printable
from dlopt.basics.names import Names
from dlopt.basics.ranges import Count, Fraction, Natural, NonNegative, NotEmpty, Positive, Probability, Seed
from dlopt.basics.roles import Role

if TYPE_CHECKING:
    from dlopt.basics.folders import short_path
    from dlopt.basics.stored import Stored
    from dlopt.commands.completion import keys_of_train
    from dlopt.commands.shared.command_line import (
        Line,
        on_checkpoint,
        on_config,
        output_folder,
        writing,
    )
    from dlopt.config.compose import Composer
    from dlopt.config.keys import role_of
    from dlopt.config.overrides import group_of, key_of, value_of, without
    from dlopt.config.parameters import show
    from dlopt.config.plan import Plan, plan
    from dlopt.config.run_config import RunConfig
    from dlopt.config.schema import Component, check_arguments
    from dlopt.data.samples import Dataset, Samples
    from dlopt.metrics.names import lower_is_better
    from dlopt.optim import LossClosure, OptimizerTraits
    from dlopt.parallel.mode import GroupMode
    from dlopt.results.leaderboard import Record
    from dlopt.results.reading import read as read_run
    from dlopt.results.tables import Section, Table
    from dlopt.tasks.draws import Draws
    from dlopt.tasks.user import UserTask
    from dlopt.training.builders.batches import evaluation_batches, training_batches
    from dlopt.training.builders.trainer import probe_trainer
    from dlopt.training.builders.workload import Workload, build_workload
    from dlopt.training.checkpoint.checkpoints import load as load_checkpoint
    from dlopt.training.checkpoint.content import Checkpoint
    from dlopt.training.loop import Trainer
    from dlopt.training.user_observers import RunObserver

_MODULES = {  # imported on first use, because most of them import torch
    "dlopt.commands.completion": "keys_of_train",
    "dlopt.commands.shared.command_line": "Line on_checkpoint on_config output_folder writing",
    "dlopt.config.compose": "Composer",
    "dlopt.config.run_config": "RunConfig",
    "dlopt.config.keys": "role_of",
    "dlopt.config.overrides": "group_of key_of value_of without",
    "dlopt.config.plan": "Plan plan",
    "dlopt.config.schema": "Component check_arguments",
    "dlopt.config.parameters": "show",
    "dlopt.data.samples": "Dataset Samples",
    "dlopt.metrics.names": "lower_is_better",
    "dlopt.optim": "LossClosure OptimizerTraits",
    "dlopt.parallel.mode": "GroupMode",
    "dlopt.results.leaderboard": "Record",
    "dlopt.results.reading": "read_run:read",
    "dlopt.results.tables": "Section Table",
    "dlopt.tasks.draws": "Draws",
    "dlopt.tasks.user": "UserTask",
    "dlopt.basics.folders": "short_path",
    "dlopt.basics.stored": "Stored",
    "dlopt.training.builders.batches": "evaluation_batches training_batches",
    "dlopt.training.builders.workload": "Workload build_workload",
    "dlopt.training.checkpoint.checkpoints": "load_checkpoint:load",
    "dlopt.training.checkpoint.content": "Checkpoint",
    "dlopt.training.loop": "Trainer",
    "dlopt.training.builders.trainer": "probe_trainer",
    "dlopt.training.user_observers": "RunObserver",
}
_LATER = {
    name: (module, inner or name)
    for module, names in _MODULES.items()
    for name, _, inner in (each.partition(":") for each in names.split())
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _LATER[name]
    return getattr(import_module(module), inner)
