"""`dlopt train experiment=...` with a `comparison`: a sweep over variants, axes and seeds, one plot, and claims.

Only this command reads the key `comparison` of an experiment file.
"""

import gc
import re
import shlex
from argparse import Namespace
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dlopt.basics.folders import FolderSnapshot
from dlopt.basics.plain_values import flatten
from dlopt.config.choices import Choice
from dlopt.config.flags import parse_arguments
from dlopt.config.reads import refuse_unread_hydra
from dlopt.config.resolve import choices_of
from dlopt.extend import (
    Composer,
    Names,
    Plan,
    Role,
    RunFolder,
    Stored,
    UserError,
    check_arguments,
    group_of,
    key_of,
    role_of,
    short_path,
    show,
    without,
    write_atomically,
    write_json,
)
from dlopt.lab.comparison.claims import TEST_METRICS, Claim, parse
from dlopt.lab.comparison.comparison import Comparison, Results, VariantRun
from dlopt.lab.comparison.findings import check, evaluate, record
from dlopt.lab.comparison.frozen import (
    FROZEN,
    claims_hash,
    is_changed,
    recipe_hash,
    recipe_path,
    rerun_hint,
    stated_time,
)
from dlopt.lab.comparison.plots import draw
from dlopt.lab.comparison.probes import PROBES
from dlopt.lab.comparison.published import check_published, describe_published
from dlopt.lab.comparison.running import BEFORE, NAMES, TEACHER, VariantJobs, references
from dlopt.lab.comparison.sentences import sentence
from dlopt.metrics.names import monitored_directions, split_of
from dlopt.results import drawing
from dlopt.sweeps.jobs import Job, PlanJob, list_jobs
from dlopt.sweeps.matching import distance_of_jobs
from dlopt.sweeps.pool import Pool
from dlopt.sweeps.submitting import refuse_different_environments, submit_grid
from dlopt.sweeps.sweep import check_folder, request_series
from dlopt.tracking.console import Screen

PICTURE = "comparison"
_READS_OF_HYDRA = ("hydra.run", "hydra.mode", "hydra.job.name", "hydra.launcher")
_HINTS = {
    "hydra.sweep": "use hydra.run.dir",
    "hydra.job.env_set": "set the variable in the shell",
    "hydra.searchpath": "use --config-dir",
}
_METRICS = (
    "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "gap", "accuracy_gap",
    "epochs", "steps",
)  # fmt: skip
_PREVIEW = "A preview of fewer runs; without comparison.quick=true, the claims are judged."

Plans = Mapping[VariantRun, Plan]


def compare(composer: Composer, parsed: Namespace, config: DictConfig) -> int:
    """Runs the comparison, prints a table and saves the plot; returns the exit code.

    Raises `UserError` before it creates any file, and after the first run for a metric that it does not have.
    """
    refuse_unread_hydra(parsed.overrides, "a comparison", _READS_OF_HYDRA, _HINTS)
    overrides = _with_quick_overrides(config, parsed.overrides)
    if overrides != parsed.overrides:
        config = composer.compose(overrides)
    request = request_series(composer, config, overrides, "comparison", later=NAMES)
    comparison = comparison_of(composer, config, overrides)
    # The claims do not hold if an override changes the comparison or fixes one of its axes.
    axes = config.comparison.get("along") or {}
    changes = [key for key in map(key_of, overrides) if group_of(key) == "comparison" or key in axes]
    claims = check(comparison, overridden=bool(changes))
    plans = _plans(comparison, overrides, request.plan_job)
    is_submitted = not isinstance(request.launcher, Pool)
    pool = _pool(request.launcher, str(config.hydra.runtime.choices["hydra/launcher"]), [*plans.values()])
    if config.dry_run:
        for number, plan in enumerate(plans.values()):
            print(f"job {number}: {' '.join(without(plan.texts, 'dry_run'))}")
        print(_first_lines(composer, config, comparison, len(plans), request.path)[0])
        return request.rehearse(next(iter(plans.values())), len(plans)).code
    request.check_tracking(plans.values())
    before = FolderSnapshot(request.path)
    folder = request.find_folder(
        lambda candidate: _distance(candidate, [*_jobs(comparison, plans, candidate.path).values()]),
        lambda path, key: check_folder(
            RunFolder(path),
            key,
            [*_jobs(comparison, plans, path).values()],
            config.resume,
            "comparison",
            joins=is_submitted,
        ),
    )
    jobs = _jobs(comparison, plans, folder)
    with RunFolder(folder).lock():  # before the claims are frozen: a second start must not judge by other claims
        frozen = _freeze(composer, config, folder)
        if is_submitted and any(not (job.is_done or job.folder.has_diverged()) for job in jobs.values()):
            submit_grid(request, folder, [*jobs.values()], before)
            place = shlex.quote(f"hydra.run.dir={short_path(folder)}")
            print(f"for the verdicts, once all have ended: this command with {place} resume=auto")
            return 0
        list_jobs(folder, [*jobs.values()])
        request.begin(folder, "comparison")
        runs = VariantJobs(folder, comparison, jobs, request.plan_job)
        for line in _first_lines(composer, config, comparison, len(plans), folder):
            runs.screen.message(line)
        gc.freeze()  # speeds up the full collection after each run: it skips the objects of the imported libraries
        try:
            if code := runs.run(pool):
                return code
        finally:
            gc.unfreeze()
        _conclude(Results(comparison, runs.outcomes), claims, frozen, folder, runs.screen)
    return 0


def _first_lines(composer: Composer, config: DictConfig, comparison: Comparison, count: int, folder: Path) -> list[str]:
    """Says what happens, how long it takes if the recipe states it, how to make it short, and what to look at."""
    recipe = choices_of(config).get("experiment")
    header = [] if recipe is None else Choice("experiment", recipe, recipe_path(recipe, composer.config_dir)).header
    time = stated_time(header)
    shorter = "a preview of about ten seconds" if time else "a preview"
    if comparison.quick:
        time = time and "about ten seconds"
    elif not any(f"{count} runs, " in line for line in header):  # overrides have changed the number of runs
        time = ""
    return [
        f"{comparison.title}: {', '.join(filter(None, [f'{count} runs', time]))} in {short_path(folder)}",
        *([] if comparison.quick else [f"{shorter}: comparison.quick=true"]),
        f"what to look at: {comparison.see}",
    ]


def _conclude(
    results: Results, claims: Sequence[Claim], frozen: Mapping[str, Any], folder: Path, screen: Screen
) -> None:
    """Evaluates the claims; writes comparison.json and the pictures, and prints the table and the verdicts."""
    comparison = results.comparison
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
    directions = monitored_directions(flatten(OmegaConf.to_container(config, resolve=False)))
    claims = [parse(f"comparison.claims.{i}", claim, directions) for i, claim in enumerate(written.pop("claims", []))]
    arguments = check_arguments("comparison", Comparison, written, frozenset({"claims", "directions"}))
    comparison = Comparison(**arguments, claims=claims, directions=directions)
    comparison = replace(comparison, variants=_chosen(comparison, composer.parse(overrides)))
    _refuse_invalid(comparison)
    overridden: dict[str, Any] = {key_of(each): each.value() for each in composer.parse(overrides)}
    _refuse_varied(comparison, overridden)
    along = {key: values for key, values in comparison.along.items() if key not in overridden}
    if along == comparison.along:
        check_published(comparison)
    else:  # the published values include all points
        comparison = replace(comparison, published={})
    return replace(comparison, along=along, seeds=[overridden["seed"]] if "seed" in overridden else comparison.seeds)


def _refuse_invalid(comparison: Comparison) -> None:
    """Raises `UserError` for values that contradict each other."""
    for metric in comparison.all_metrics:
        if metric not in (*_METRICS, *PROBES) and split_of(metric) != "val":
            raise Names("metric", (*_METRICS, *PROBES)).unknown(metric, f"comparison.metrics=[{metric}]")
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
            raise Names("variant", [*map(_quoted, comparison.variants)]).unknown(name, f"comparison.only=[{name}]")
    return {name: comparison.variants[name] for name in comparison.only or replaced or comparison.variants}


def _quoted(name: str) -> str:
    """Returns the label of a variant as it is typed in a list."""
    return name if re.fullmatch(r"[\w. -]+", name) else f'"{name}"'


def _refuse_protected(line: str, key: str) -> None:
    """Raises `UserError` for keys that may only be given on the command line."""
    if role_of(key) is Role.COMMAND or group_of(key) == "hydra":
        raise UserError(f"comparison: {line}: may only be given on the command line")


def _plans(comparison: Comparison, overrides: list[str], plan_job: PlanJob) -> Plans:
    """Composes and checks all runs. Raises `UserError`."""
    common = [line for line in overrides if key_of(line) != "seed" and group_of(line) not in ("comparison", "hydra")]
    common.append("comparison=null")  # what a run records can be typed: with the recipe's comparison, it is refused
    plans = {
        cell: plan_job([*common, *parse_arguments(comparison.overrides(cell)).overrides], number)
        for number, cell in enumerate(comparison.cells())
    }
    order = [*comparison.before, *comparison.variants]
    for cell, plan in plans.items():
        for key, value in references(plan.saved).items():
            is_before, name = value.startswith(BEFORE), value.partition(":")[2]
            names = comparison.before if is_before else comparison.variants
            allowed = [each for each in order[: order.index(cell.variant)] if each in names]
            if name not in allowed:
                kind = "entry of comparison.before" if is_before else "variant"
                raise UserError(
                    f"{key}={value}: must name an earlier {kind} than {cell.variant}; "
                    f"allowed: {', '.join(allowed) or 'none'}"
                )
    return plans


def _pool(launcher: object, name: str, plans: Collection[Plan]) -> Pool | None:
    """Returns the pool of the launcher that was typed; None if the runs share this process, or are submitted.

    Raises `UserError` if runs read earlier ones that the processes of this launcher do not find.
    """
    if isinstance(launcher, Pool) and name == "serial" and launcher.slots == 1:
        return None
    named = {key: value for plan in plans for key, value in references(plan.saved).items()}
    if isinstance(launcher, Pool):
        named.pop(TEACHER, None)
    for key, value in named.items():
        reason = f"runs in other processes cannot read {key}={value}"
        raise UserError(f"hydra/launcher={name}: {reason}; leave out hydra.launcher")
    if isinstance(launcher, Pool):
        return replace(launcher, stop_on_failure=False)  # a diverged run is a result
    refuse_different_environments([*plans])
    return None


def _jobs(comparison: Comparison, plans: Plans, folder: Path) -> dict[VariantRun, Job]:
    """Returns the runs as the jobs of a sweep in `folder`, in the subfolders 0, 1, ..."""
    keys = [key.rpartition(".")[2] for key in comparison.along]  # short: a line of 80 characters has the metrics, too
    jobs = {}
    for number, (cell, plan) in enumerate(plans.items()):
        labels = [cell.variant, *(f"{key}={show(value)}" for key, value in zip(keys, cell.point, strict=False))]
        jobs[cell] = Job(number, RunFolder(folder / plan.subfolder), plan, f"{', '.join(labels)}, seed {cell.seed}")
    return jobs


def _distance(folder: RunFolder, jobs: Sequence[Job]) -> int | None:
    """Returns how far the folder is from these runs, if it contains some of them but no results yet; else None."""
    if (folder.path / f"{PICTURE}.json").exists() or not any(job.folder.has_run() for job in jobs):
        return None
    if any(each.is_live() for each in (folder, *(job.folder for job in jobs))):
        return None
    return distance_of_jobs(folder, jobs)


def _freeze(composer: Composer, config: DictConfig, folder: Path) -> dict[str, Any]:
    """Writes claims.json before the first run: the recipe and the hash of its claims, and returns its contents.

    With `changed_after_results`, if the claims have changed since the first run. Raises `UserError` if it is damaged.
    """
    node = OmegaConf.to_container(config.comparison, resolve=True)
    assert isinstance(node, dict)
    current = claims_hash({str(key): value for key, value in node.items()})
    cure = "restore it, for it says which claims the runs were to test, or start again in another folder"
    stored = Stored[dict[str, Any]](folder / FROZEN, dict, cure=cure)
    if (frozen := stored.read()) is None:
        recipe = choices_of(config).get("experiment")
        frozen = {} if recipe is None else {"recipe": recipe}
        if recipe is not None and composer.config_dir is not None:
            own = Path(composer.config_dir).absolute()
            frozen |= {"config_dir": str(own)} if recipe_path(recipe, str(own)).is_relative_to(own) else {}
        frozen |= {"claims_hash": current}
        frozen |= {} if recipe is None else {"recipe_hash": recipe_hash(recipe, frozen.get("config_dir"))}
        write_json(stored.path, frozen, indent=1)
    return frozen if frozen.get("claims_hash") == current else frozen | {"changed_after_results": True}
