"""The surface of dlopt has a budget. A change that raises a number says in the same line what was taken away for it.

The numbers are what existed when the budget was made, and after the plus sign what was promised then. The budget of
keys is the list of their names: what several choices share is one name to learn.
"""

import ast
import importlib
from pathlib import Path

import pytest
import yaml

from dlopt.basics.plain_values import flatten
from dlopt.commands.command_table import COMMANDS, every_command, of_packages
from dlopt.commands.options import choices_of, every_group
from dlopt.commands.shared.usage import command_keys, declaring
from dlopt.config.choices import Catalogue, Choice, config_folder
from dlopt.config.overrides import SWEEP_WORDS

BUDGET = {
    "commands of the runner": 14 + 1,  # sweep
    "commands of the laboratory": 5 + 2,  # verify, judge; scaling replaces bench
    "keys of conf/train.yaml": 61
    + 1  # evaluate.train_accuracy replaces train_token_accuracy in every run of a text
    + 1  # validation: instead of a run of `dlopt eval` for each further set and epoch
    + 1  # notify: instead of an observer of the user's own that posts, which a sweep would call once for each run
    - 2,  # optimizer.state_dtype, recovery.lr_factor
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
    "names of dlopt.extend": 56
    + 1
    + 2  # Checkpoint replaces the nine keys of its file; UserTask, Draws
    + 1  # Stored: instead of a reader for each file of a command's own; Names and NotEmpty replace two functions
    + 1,  # Samples: instead of 29 questions about the kind of a source
}

WORDS = {
    "data/_common.yaml": """
        batch_size drop_last fold folds image_size label_noise memory split_seed statistics_samples subset test_split
        val_split workers
    """,  # test_split replaces the keys of four data sets; folds and fold, a script that cuts the files
    "group data": """
        categories channels class_names classes column configuration dates delimiter download file function
        group ignore input interval intervals label_column label_separator labels length max_skips name noise
        numbers offline on_error order path_column pattern revision root seed sequence_length sequences split
        split_column standardize_target symbols target test test_file test_size tokenizer train_size val
        val_file val_size vocabulary weight
    """,  # sequences replaces a model's x[:, 0]; group and order, splits made by hand; weight, a written loss
    "group optimizer": """
        adapt_vectors adaptive adjust_lr_fn alpha amsgrad base.dampening base.lr base.momentum base.nesterov
        base.weight_decay beta2_decay betas bias_correction c1 c2 cautious centered constrained d d0 d_coef
        dampening damping decoupled_weight_decay eps etas gamma graft_eps groups hessian history_size hyperball
        initial_accumulator_value layer_decay line_search_fn lr lr_decay max_backtracks max_eval max_evaluations
        max_iter max_iterations max_parameters max_size max_weight_norm min_update_rate momentum momentum_decay
        nesterov normalize_weights ns_coefficients ns_steps orthogonalize precond_lr r radius rest rest_betas
        rest_eps rest_lr rest_momentum rest_radius rho row_beta safeguard_warmup seed shampoo_beta step_sizes
        tolerance tolerance_change tolerance_grad trust_coefficient update_every warmup weight_decay weight_lr_power
        xi
    """,
    "group schedule": """
        T_0_epochs T_0_steps T_mult anneal base_momentum cooldown cycle_momentum cycle_warmup_epochs
        cycle_warmup_fraction cycle_warmup_steps cycles decay decay_epochs decay_fraction decay_steps div_factor
        eta_min eta_min_factor every_epochs every_fraction every_steps factor final final_div_factor gamma k
        max_momentum milestones_epochs milestones_fraction milestones_steps min_factor mode monitor patience
        pct_start peak_factor power shape stable three_phase threshold threshold_mode timescale_steps unit
        warmup_epochs warmup_fraction warmup_shape warmup_start warmup_steps
    """,
    "dlopt sweep": "--json n_jobs part trust",
    "dlopt find-lr": "diverge max_lr min_lr output smoothing updates",
    "dlopt eval": "average checkpoint output split threshold tta",  # threshold: instead of a script over the outputs
    # columns: instead of a program that cuts the output
    "dlopt predict": "batch_size checkpoint columns file images max_errors output per probabilities",
    "dlopt sample": "checkpoint file length prompt samples seed temperature top_k",
    "dlopt export": "checkpoint format include input output",  # include: instead of a program before the graph
    "dlopt consolidate": "checkpoint output",
    # curve, points: instead of a program that thins metrics.jsonl
    "dlopt runs": "--json --paths --remove --yes columns curve limit note points sort",
    "dlopt report": "--json --open --watch by format output plot target test top",
    "dlopt summary": "classes input_shape vocabulary",
    "dlopt show-batch": "output tile",
    "dlopt benchmark": "budget dry_run full output reference seed studies tier track trials workloads",
    "dlopt ladder": "arms dry_run output rungs search seeds tokens_per_parameter",
    "dlopt trajectory": """
        allow_packages animation checkpoint directions log_y output points samples seed span steps steps_per_epoch
        tolerances tune_lr
    """,
    "dlopt diagnose": "batches checkpoint eigenvalues iterations output updates",
    "dlopt scaling": """
        allreduce bandwidth_between bandwidth_within batch bucket_mb channels device devices latency_between
        latency_within memory memory_bandwidth memory_limit_mb micro_batches model models output per_server
        precision processes profiled seconds simulate sizes speedup tflops threads training updates validate
        value_bytes variation warmup
    """,
    # because: instead of a file of notes beside the ledger; ablate: instead of a command typed for each part
    "dlopt judge": "ablate because equal error_rate margin minutes output seeds",
    "dlopt verify": "paper",
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


def words() -> dict[str, set[str]]:
    """Returns the names of keys, by what has them."""
    catalogue, common = Catalogue(), Choice("data", "_common", config_folder() / "data/_common.yaml")
    found = {
        f"group {group}": _keys(catalogue, choices_of(catalogue, group)) for group in ("data", "optimizer", "schedule")
    }
    found["data/_common.yaml"] = _keys(catalogue, [common])
    found["group data"] -= found["data/_common.yaml"]
    modules = {name: importlib.import_module(path.partition(":")[0]) for name, path in every_command().items()}
    del modules["train"]  # its keys are those of conf/train.yaml
    for name, module in modules.items():
        found[f"dlopt {name}"] = {key.label for target in declaring(module) for key in command_keys(target)}
    return {what: names for what, names in found.items() if names}


def _keys(catalogue: Catalogue, choices: list[Choice]) -> set[str]:
    keys = [(choice.group, key.name) for choice in choices for key in catalogue.keys(choice)]
    return {name.partition(".")[2] for group, name in keys if name.startswith(f"{group}.") and "_target_" not in name}


def test_keys_are_within_their_budget() -> None:
    found, budget = words(), {what: set(names.split()) for what, names in WORDS.items()}
    for what in sorted(found | budget):
        here, allowed = found.get(what, set()), budget.get(what, set())
        new, gone = ", ".join(sorted(here - allowed)), ", ".join(sorted(allowed - here))
        assert not new, f"{what}: {len(here)} keys, of {len(allowed)}; new: {new}: take as many away, and list these"
        assert not gone, f"{what}: {len(here)} keys, of {len(allowed)}; gone: {gone}: take them off the list"
