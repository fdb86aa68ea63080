"""`dlopt train experiment=...` with a `comparison`: a series of small runs and one plot.

The runs share this process, because each takes a second or less, and starting a process takes as long as several runs.
Only this command reads the key `comparison` of an experiment file.
"""

import gc
import re
from argparse import Namespace
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dlopt.basics.errors import USER_ERROR
from dlopt.basics.folders import inside, make, make_new, newest
from dlopt.basics.plain_values import flatten
from dlopt.config.compose import typed_folder
from dlopt.config.flags import parse_arguments
from dlopt.config.plan import checked
from dlopt.config.reads import refuse_unread_hydra, refuse_untested
from dlopt.config.resolve import choices_of
from dlopt.config.resuming import differences, refuse_other_config
from dlopt.config.saved import checkpoint_file
from dlopt.extend import (
    FAILED,
    INTERRUPTED,
    Composer,
    Plan,
    Role,
    RunFolder,
    UserError,
    check_arguments,
    group_of,
    key_of,
    read_json,
    role_of,
    short_path,
    show,
    without,
    write_atomically,
    write_json,
)
from dlopt.lab.comparison.claims import TEST_METRICS, parse
from dlopt.lab.comparison.comparison import Comparison, Results, VariantOutcome, VariantRun, format_final, read
from dlopt.lab.comparison.findings import check, evaluate, record
from dlopt.lab.comparison.frozen import FROZEN, claims_hash, is_changed, recipe_hash, recipe_path, rerun_hint
from dlopt.lab.comparison.plots import draw
from dlopt.lab.comparison.probes import PROBES
from dlopt.lab.comparison.published import check_published, describe_published
from dlopt.lab.comparison.sentences import sentence
from dlopt.metrics.names import monitored_modes, split_of
from dlopt.results import drawing
from dlopt.run.runner import exit_code
from dlopt.sweeps.estimate import print_estimate
from dlopt.sweeps.sweep import refuse_ranks
from dlopt.tracking.console import Screen
from dlopt.tracking.remote import check as check_tracking
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import Run

PICTURE = "comparison"
_READS_OF_HYDRA = ("hydra.run", "hydra.mode", "hydra.job.name")  # its runs share this process and its environment
_HINTS = {
    "hydra.sweep": "use hydra.run.dir",
    "hydra.job.env_set": "set the variable in the shell",
    "hydra.searchpath": "use --config-dir",
}
_METRICS = (
    "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "gap", "accuracy_gap",
    "epochs", "steps",
)  # fmt: skip

# In `init_from` and `loss.teacher`: the run of the same seed, of `comparison.before` or of a variant at the same point.
_BEFORE, _VARIANT = "before:", "variant:"
_TEACHER = "loss.teacher"
_PREVIEW = "A preview of fewer runs; without comparison.quick=true, the claims are judged."

Plans = Mapping[VariantRun, Plan]


def compare(composer: Composer, parsed: Namespace, config: DictConfig) -> int:
    """Runs the comparison, prints a table and saves the plot; returns the exit code.

    Raises `UserError` before it creates any file, and after the first run for a metric that it does not have.
    """
    refuse_ranks("comparison", "the comparison")
    refuse_unread_hydra(parsed.overrides, "a comparison", _READS_OF_HYDRA, _HINTS)
    overrides = _with_quick_overrides(config, parsed.overrides)
    if overrides != parsed.overrides:
        config = composer.compose(overrides)
    comparison = comparison_of(composer, config, overrides)
    # The claims do not hold if an override changes the comparison or fixes one of its axes.
    axes = config.comparison.get("along") or {}
    changes = [key for key in map(key_of, overrides) if group_of(key) == "comparison" or key in axes]
    claims = check(comparison, overridden=bool(changes))
    plans = _plan(composer, comparison, overrides)
    if config.dry_run is True:
        for number, plan in enumerate(plans.values()):
            print(f"job {number}: {' '.join(without(plan.lines, 'dry_run'))}")
        first, *_ = plans.values()
        print_estimate([plan.saved for plan in plans.values()], first.choices, len(plans), in_process=True)
        return 0
    if config.resume is None:
        check_tracking(config.tracking, config.name)
    folder = _folder(config, overrides, [plan.saved for plan in plans.values()])
    frozen = _freeze(composer, config, folder)
    screen = Screen()
    screen.message(f"{comparison.title}: {len(plans)} runs in {short_path(folder)}")
    gc.freeze()  # speeds up the full collection after each run: it skips the objects of the imported libraries
    try:
        results, code = _execute(plans, folder, comparison, screen)
    finally:
        gc.unfreeze()
    if code:
        return code
    findings = evaluate(results, claims)
    write_atomically(folder / f"{PICTURE}.json", record(results, findings, frozen))
    for line in (
        *results.table(),
        *describe_published(results),
        comparison.see,
        *map(sentence, findings),
        *([rerun_hint()] if is_changed(frozen) else []),
        *(f"Not evaluated: {claim.text}." for claim in comparison.claims if claim not in claims),
        *([_PREVIEW] if comparison.quick else []),
    ):
        screen.message(line)
    for path in drawing.save(draw(results), folder, PICTURE):
        print(short_path(path))
    return 0


def _with_quick_overrides(config: DictConfig, overrides: list[str]) -> list[str]:
    """Returns the overrides, after those of the quick form if `comparison.quick` is true; the typed ones win."""
    if not OmegaConf.is_dict(config.comparison) or config.comparison.get("quick") is not True:
        return overrides
    lines = config.comparison.get("quick_overrides")
    if not OmegaConf.is_list(lines) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"comparison.quick_overrides={lines}: allowed: a list of overrides [epochs=2]")
    for line in lines:
        if group_of(line) != "comparison":
            _refuse_protected(line, key_of(line))
    typed = set(map(key_of, overrides))
    return [*(line for line in lines if key_of(line) not in typed), *overrides]


def comparison_of(composer: Composer, config: DictConfig, overrides: list[str]) -> Comparison:
    """Builds the comparison of an experiment file, without overridden axes; an overridden `seed` replaces its seeds."""
    if not OmegaConf.is_dict(config.comparison):
        raise UserError(f"comparison={config.comparison}: allowed: a mapping, or null for a single run")
    node = OmegaConf.to_container(config.comparison, resolve=True)
    assert isinstance(node, dict)
    written = {str(key): value for key, value in node.items()}
    if isinstance(labels := written.get("variants"), list):
        shown = f"[{','.join(map(show, labels))}]"
        raise UserError(f"comparison.variants={shown}: to choose variants by their labels, set comparison.only={shown}")
    modes = monitored_modes(flatten(OmegaConf.to_container(config, resolve=False)))
    claims = [parse(f"comparison.claims.{i}", claim, modes) for i, claim in enumerate(written.pop("claims", []))]
    arguments = check_arguments("comparison", Comparison, written, frozenset({"claims", "modes"}))
    comparison = Comparison(**arguments, claims=claims, modes=modes)
    comparison = replace(comparison, variants=_chosen(comparison, composer.parse(overrides)))
    _refuse_invalid(comparison)
    overridden: dict[str, Any] = {key_of(each): each.value() for each in composer.parse(overrides)}
    _refuse_varied(comparison, overridden)
    along = {key: values for key, values in comparison.along.items() if key not in overridden}
    if along == comparison.along:
        check_published(comparison)
    else:  # the published values are those of all points
        comparison = replace(comparison, published={})
    return replace(comparison, along=along, seeds=[overridden["seed"]] if "seed" in overridden else comparison.seeds)


def _refuse_invalid(comparison: Comparison) -> None:
    """Raises `UserError` for values that contradict each other."""
    for name in ("variants", "seeds", "metrics"):
        if not getattr(comparison, name):
            raise UserError(f"comparison.{name}: needs at least one entry")
    for metric in comparison.all_metrics:
        if metric not in (*_METRICS, *PROBES) and split_of(metric) != "val":
            allowed = ", ".join((*_METRICS, *PROBES))
            raise UserError(f"comparison.metrics: unknown metric {metric}; allowed: {allowed}")
        comparison.is_higher_better(metric)  # refuses a metric of the user's own whose direction is unknown
    if both := comparison.before.keys() & comparison.variants.keys():
        raise UserError(f"comparison.before: {', '.join(both)} is the name of a variant; use another name")
    if comparison.choose in TEST_METRICS:
        raise UserError(f"comparison.choose={comparison.choose}: must be a validation or training metric")
    if len(comparison.along) > 2:
        raise UserError(f"comparison.along: {len(comparison.along)} keys; at most two fit in a plot")
    if len(comparison.along) == 2 and len(comparison.metrics) > 1:
        raise UserError("comparison.metrics: a heat map shows one metric")


def _refuse_varied(comparison: Comparison, overridden: Container[str]) -> None:
    """Raises `UserError` for a key that the comparison varies and that is overridden, or that it must not set."""
    points: dict[str, list[str]] = {}
    for key, values in comparison.along.items():
        if isinstance(values, dict):
            points |= {f"{key} {label}": lines for label, lines in values.items()}
        else:
            _refuse_protected(key, key)
    for line in (line for lines in comparison.before.values() for line in lines):
        _refuse_protected(line, key_of(line))  # these keys may be overridden, for the variants
    for variant, lines in {**points, **comparison.variants}.items():
        for line in lines:
            _refuse_protected(line, key_of(line))
            if key_of(line) in overridden:
                raise UserError(f"{key_of(line)}: cannot be overridden; varied by {variant} ({line})")


def _chosen(comparison: Comparison, overrides: Iterable[Override]) -> dict[str, list[str]]:
    """Returns the variants named by `comparison.only`, in its order, or else those of `comparison.variants={...}`.

    Raises `UserError` for unknown names.
    """
    blocks = [each.value() for each in overrides if each.key_or_group == "comparison.variants" and not each.is_add()]
    replaced = [str(name) for block in blocks if isinstance(block, dict) for name in block]
    for name in comparison.only:
        if name not in comparison.variants:
            allowed = ", ".join(map(_quoted, comparison.variants))
            raise UserError(f"comparison.only: unknown variant {name}; allowed: {allowed}")
    return {name: comparison.variants[name] for name in comparison.only or replaced or comparison.variants}


def _quoted(name: str) -> str:
    """Returns the label of a variant as it is typed in a list."""
    return name if re.fullmatch(r"[\w. -]+", name) else f'"{name}"'


def _refuse_protected(line: str, key: str) -> None:
    """Raises `UserError` for keys that may only be given on the command line."""
    if role_of(key) is Role.COMMAND or group_of(key) == "hydra":
        raise UserError(f"comparison: {line}: may only be given on the command line")


def _plan(composer: Composer, comparison: Comparison, overrides: list[str]) -> Plans:
    common = [line for line in overrides if key_of(line) != "seed" and group_of(line) not in ("comparison", "hydra")]
    plans: dict[VariantRun, Plan] = {}
    # Composing takes as long as a small run, and the runs of a setting differ only in their seed.
    for _, cells in groupby(comparison.cells(), lambda cell: (cell.variant, cell.point)):
        config = None
        for cell in cells:
            lines = [*common, *parse_arguments(comparison.overrides(cell)).overrides]
            config = composer.compose(lines) if config is None else config
            config.seed = cell.seed
            plans[cell] = plan = checked(
                config, lines, overrides, composer.flags, has_teacher=_TEACHER not in _references(config)
            )
            refuse_untested(plan.saved, overrides)
    _check_references(comparison, plans)
    return plans


def _references(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Returns the values that name earlier runs of the comparison, by key: `before:NAME` and `variant:NAME`."""
    values = {"init_from": config.get("init_from"), _TEACHER: (config.get("loss") or {}).get("teacher")}
    return {key: str(value) for key, value in values.items() if str(value).startswith((_BEFORE, _VARIANT))}


def _check_references(comparison: Comparison, plans: Plans) -> None:
    """Raises `UserError` if a run names a run that the comparison does not have, or has later."""
    order = [*comparison.before, *comparison.variants]
    for cell, plan in plans.items():
        for key, value in _references(plan.saved).items():
            is_before, name = value.startswith(_BEFORE), value.partition(":")[2]
            names = comparison.before if is_before else comparison.variants
            allowed = [each for each in order[: order.index(cell.variant)] if each in names]
            if name not in allowed:
                kind = "entry of comparison.before" if is_before else "variant"
                raise UserError(
                    f"{key}={value}: must name an earlier {kind} than {cell.variant}; "
                    f"allowed: {', '.join(allowed) or 'none'}"
                )


def _with_paths(plan: Plan, cell: VariantRun, plans: Plans, folder: Path) -> Plan:
    """Returns the plan of a run with the paths of the runs that it names, which have ended.

    The saved config keeps `before:NAME`, which is the same for all seeds and folders.
    """
    references, config = _references(plan.saved), plan.config
    if not references:
        return plan
    assert config is not None
    config.seed = cell.seed
    for key, value in references.items():
        name = value.partition(":")[2]
        run = VariantRun(name, (), cell.seed) if value.startswith(_BEFORE) else replace(cell, variant=name)
        path = folder / str([*plans].index(run))
        OmegaConf.update(config, key, str(path if key == _TEACHER else checkpoint_file(path)))
    made = checked(config, plan.lines, None, plan.flags)
    saved = {**made.saved, "init_from": plan.saved["init_from"]}
    return replace(made, run_config=replace(made.run_config, config=saved))


def _as_planned(saved: Mapping[str, Any], planned: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config in a run's folder without the hash of a teacher that was not trained when it was planned."""
    return {**flatten(saved), f"{_TEACHER}_sha256": None} if _TEACHER in _references(planned) else saved


def _folder(config: DictConfig, overrides: list[str], configs: Sequence[Mapping[str, Any]]) -> Path:
    """Returns the folder of the comparison, created if missing; its runs are in subfolders 0, 1, ...

    `configs`: of the runs, to save.
    """
    path, is_typed = typed_folder(config, "hydra.run.dir", overrides)
    if not is_typed:
        unfinished = (
            newest(path.parent, lambda each: _is_unfinished(each, configs)) if config.resume == "auto" else None
        )
        return make_new(path, "hydra.run.dir") if unfinished is None else unfinished.path
    if not path.is_dir():
        return make(path, "hydra.run.dir")
    for number, saved in enumerate(configs):
        folder = RunFolder(path / str(number))
        if folder.has_begun():
            if saved["resume"] != "auto":
                raise UserError(f"hydra.run.dir={path}: this folder contains runs; resume them with resume=auto")
            old = folder.config()
            refuse_other_config(
                saved if old is None else _as_planned(old, saved), saved, str(folder.path), folder.typed()
            )
    return path


def _freeze(composer: Composer, config: DictConfig, folder: Path) -> dict[str, Any]:
    """Writes claims.json before the first run: the recipe and the hash of its claims, and returns its contents.

    With `changed_after_results`, if these claims are not those before the first run.
    """
    node = OmegaConf.to_container(config.comparison, resolve=True)
    assert isinstance(node, dict)
    current = claims_hash({str(key): value for key, value in node.items()})
    path = folder / FROZEN
    if (frozen := read_json(path)) is None:
        if RunFolder(folder / "0").has_run():
            return {}  # begun by an earlier version: unknown
        recipe = choices_of(config).get("experiment")
        frozen = {} if recipe is None else {"recipe": recipe}
        if recipe is not None and composer.config_dir is not None:
            own = Path(composer.config_dir).absolute()
            frozen |= {"config_dir": str(own)} if recipe_path(recipe, str(own)).is_relative_to(own) else {}
        frozen |= {"claims_hash": current}
        frozen |= {} if recipe is None else {"recipe_hash": recipe_hash(recipe, frozen.get("config_dir"))}
        write_json(path, frozen, indent=1)
    return frozen if frozen.get("claims_hash") == current else frozen | {"changed_after_results": True}


def _is_unfinished(comparison: RunFolder, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether the folder contains some of the runs but no results yet."""
    folders = [RunFolder(comparison.path / str(number)) for number in range(len(configs))]
    if (comparison.path / f"{PICTURE}.json").exists() or not any(folder.has_run() for folder in folders):
        return False
    if any(folder.is_live() for folder in folders):
        return False
    pairs = [(folder.config(), saved) for folder, saved in zip(folders, configs, strict=True)]
    return not any(old is not None and differences(_as_planned(old, new), new) for old, new in pairs)


def _execute(plans: Plans, folder: Path, comparison: Comparison, screen: Screen) -> tuple[Results, int]:
    """Runs all cells; returns their results and the exit code. A diverged run counts, any other failure stops."""
    outcomes: dict[VariantRun, VariantOutcome] = {}
    for number, (cell, planned) in enumerate(plans.items()):
        plan = _with_paths(planned, cell, plans, folder)
        subfolder = RunFolder(inside(folder, str(number), f"hydra.run.dir={folder}"))
        if not (subfolder.has_run() and subfolder.is_done(plan.saved)):
            subfolder.path.mkdir(exist_ok=True)
            newest = Checkpoints(subfolder.checkpoints).load_newest() if subfolder.has_run() else None
            job = Run(plan.run_config, subfolder.path, newest, plan.choices, plan.typed)
            code = exit_code(job, console=False, may_diverge=True)
            diverged = (subfolder.summary() or {}).get("diverged")
            if code == INTERRUPTED:
                screen.message(f"stopped after {number} of {len(plans)} runs; resume with resume=auto")
            if code in (INTERRUPTED, USER_ERROR) or (code == FAILED and not diverged):
                return Results(comparison, outcomes), code
        outcome = outcomes[cell] = read(subfolder.path, comparison.all_metrics)
        for name in comparison.all_metrics if cell.variant in comparison.variants else ():
            if not outcome.may_have(name):  # it would be shown as diverged
                available = ", ".join(outcome.metrics)
                raise UserError(
                    f"comparison.metrics: the runs have no {name}; they have {available}; more: evaluate.metrics"
                )
        labels = [cell.variant, *(f"{k}={show(v)}" for k, v in zip(comparison.along, cell.point, strict=False))]
        metrics = ", ".join(f"{name} {format_final(outcome.final(name))}" for name in comparison.metrics)
        screen.message(f"  {number + 1}/{len(plans)} {', '.join(labels)}, seed {cell.seed}: {metrics}")
    return Results(comparison, outcomes), 0
