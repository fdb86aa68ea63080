"""What only the command line may set is refused from every file whose content becomes overrides, or a config.

The files are found in the code: every function that reads YAML or JSON is either tried here, or listed with the reason
why nothing of what it reads is composed.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.overrides import quoted_plain
from dlopt.config.typed import COMMAND_LINE_ONLY, IN_PART
from dlopt.results.ranking import command
from dlopt.results.reading import read as read_run
from dlopt.sweeps import sweep
from tests.support.folders import make_run
from tests.support.line import dlopt, refused
from tests.support.programs import ROOT
from tests.support.sizes import TINY

KEYS: dict[str, Any] = {
    "allow_packages": ["evil"],
    "hydra.callbacks.x._target_": "evil.Callback",
    "hydra.hydra_logging.handlers.file.filename": ".bashrc",
    "hydra.job.env_set.LD_PRELOAD": "evil.so",
    "hydra.job_logging.handlers.file..baseFilename": ".bashrc",
    "hydra.job_logging.handlers.file.filename": ".bashrc",
    "hydra.launcher": "slurm",
    "hydra.launcher.account": "--wrap=id",
    "hydra.launcher.extra.wrap": "id",
    "hydra.searchpath": ["pkg://evil"],
    "hydra.sweeper._target_": "hydra_plugins.evil.Sweeper",
}


def test_every_guarded_key_is_tried() -> None:
    for block in (*COMMAND_LINE_ONLY, *IN_PART):
        assert any(key == block or key.startswith(f"{block}.") for key in KEYS), block


def override(key: str) -> tuple[str, str]:
    """Returns the key as it is typed, and the value."""
    typed = "hydra/launcher" if key == "hydra.launcher" else f"{'+' * ('.' in key)}{key}"
    return typed, quoted_plain(KEYS[key])


def nested(key: str) -> dict[str, Any]:
    """Returns the content of a config file that sets the key; of a choice, by the defaults list."""
    if key == "hydra.launcher":
        return {"defaults": [{"override /hydra/launcher": KEYS[key]}]}
    content = KEYS[key]
    for part in reversed(key.split(".")):
        content = {part: content}
    return dict(content)


def write(path: Path, content: Any, head: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(content, sort_keys=False))


GLOBAL = "# @package _global_\n"
OWN = ("--config-dir", "conf")


def recipe(key: str) -> list[str]:
    write(Path("conf/experiment/evil.yaml"), nested(key), GLOBAL)
    return ["train", *OWN, "experiment=evil", *TINY]


def recipe_of_a_sweep(key: str) -> list[str]:
    return [*recipe(key), "-m", "seed=0,1", "dry_run=true"]


def recipe_of_some_jobs(key: str) -> list[str]:
    recipe(key)
    write(Path("conf/experiment/good.yaml"), {"seed": 1}, GLOBAL)
    return ["train", "-m", *OWN, "experiment=good,evil", *TINY]


def beside_a_typed_value(key: str) -> list[str]:
    return [*recipe(key), "-m", "seed=0,1", "+hydra.job.env_set.A=1", "hydra.launcher.stop_on_failure=true"]


def primary_config(key: str) -> list[str]:
    content = nested(key)
    write(Path("conf/evil.yaml"), {"defaults": ["train", *content.pop("defaults", []), "_self_"], **content})
    return ["train", *OWN, "--config-name=evil", *TINY]


def choice_of_a_group(key: str) -> list[str]:
    write(Path("conf/stopping/evil.yaml"), nested(key), GLOBAL)
    return ["train", *OWN, "stopping=evil", *TINY]


def parameters_of_a_sweep(key: str) -> list[str]:
    typed, value = override(key)
    write(Path("conf/experiment/evil.yaml"), {"hydra": {"sweeper": {"params": {typed: value, "seed": "0,1"}}}}, GLOBAL)
    return ["train", "-m", *OWN, "experiment=evil", *TINY]


def parameters_in_zip(key: str) -> list[str]:
    typed, value = override(key)
    pairs = {"pair": f"zip({typed}=[{value},{value}],seed=[0,1])"}
    write(Path("conf/experiment/evil.yaml"), {"hydra": {"sweeper": {"params": pairs}}}, GLOBAL)
    return ["train", "-m", *OWN, "experiment=evil", *TINY]


def job_of_a_grid(key: str) -> list[str]:
    return ["grid", "0", *parameters_of_a_sweep(key)[2:]]


def space(key: str) -> list[str]:
    typed, value = override(key)
    write(Path("evil.yaml"), {"optimizer=sgd": {typed: value, "optimizer.lr": "0.1,0.2"}})
    return ["train", "-m", "optimizer=sgd", "space=evil.yaml", *TINY, "dry_run=true"]


def points_to_try_first(key: str) -> list[str]:
    typed, value = override(key)
    write(Path("evil.yaml"), [{"optimizer.lr": 0.5, typed: value}])
    searched = ["hydra/sweeper=dlopt_optuna", "optimizer.lr=interval(0.1,1)", "hydra.sweeper.enqueue=evil.yaml"]
    return ["train", "-m", *searched, *TINY]


def run(key: str) -> list[str]:
    if not Path("original").exists():
        assert dlopt(Path.cwd(), "train", *TINY, "checkpoint.keep=9", "hydra.run.dir=original").code == 0
        Path("original").rename("run")
        Path("run/original.yaml").write_text(Path("run/config.yaml").read_text())
        Path("original").mkdir()
    content = yaml.safe_load(Path("run/original.yaml").read_text())
    more = {"hydra": {"launcher": KEYS[key]}} if key == "hydra.launcher" else nested(key)
    write(Path("run/config.yaml"), {**content, **more})
    return ["train", "from=run", *TINY]


def stem_of_branches(key: str) -> list[str]:
    run(key)
    return ["train", "-m", "from=run", "at=1", *[each for each in TINY if "epochs" not in each]]


def base_of_a_judge(key: str) -> list[str]:
    run(key)
    return ["judge", "run", "optimizer.lr=0.2"]


def run_to_summarize(key: str) -> list[str]:
    run(key)
    return ["summary", "run"]


def comparison(key: str) -> list[str]:
    return compare(variants={"a": ["seed=1"], "b": ["=".join(override(key))]})


def compare(**content: Any) -> list[str]:
    defaults = ["/experiment/lecture/_comparison", "_self_"]
    shared = {"title": "T", "see": "S", "variants": {"a": ["model.norm=none"]}, "along": {}, "seeds": [0]}
    content = {"comparison": {**shared, "metrics": ["train_loss"], "claims": [], **content}}
    write(Path("conf/experiment/evil.yaml"), {"defaults": defaults, **content}, GLOBAL)
    return ["train", *OWN, "experiment=evil", *TINY]


def quick_comparison(key: str) -> list[str]:
    return [*compare(quick_overrides=["=".join(override(key))]), "comparison.quick=true"]


def axis_of_a_comparison(key: str) -> list[str]:
    typed, value = override(key)
    return compare(along={typed: {"a": [f"{typed}={value}"]}})


def run_before_a_comparison(key: str) -> list[str]:
    return compare(before={"first": ["=".join(override(key))]})


def workload_of_a_benchmark(key: str) -> list[str]:
    workload = {"experiment": "benchmark/mlp", "metric": "val_loss", "target": 0.1}
    variants = [["=".join(override(key))]]
    write(Path("conf/benchmark/tier/evil.yaml"), {"workloads": {"evil": {**workload, "variants": variants}}})
    return ["benchmark", *OWN, "optimizer=sgd", "tier=evil", "budget=tiny", "dry_run=true"]


def space_of_a_benchmark(key: str) -> list[str]:
    typed, value = override(key)
    write(Path("conf/optimizer/evil.yaml"), yaml.safe_load(Path(ROOT.parent, "conf/optimizer/sgd.yaml").read_text()))
    write(Path("conf/benchmark/space/evil.yaml"), {"optimizer.lr": "interval(0.1,1)", typed: value})
    return ["benchmark", *OWN, "optimizer=evil", "workloads=[mlp]", "budget=tiny", "dry_run=true"]


def keys_of_a_self_tuning_optimizer(key: str) -> list[str]:
    typed, value = override(key)
    space_of_a_benchmark(key)
    write(Path("conf/benchmark/space/evil_self_tuning.yaml"), {"optimizer.lr": 0.1, typed: value})
    return ["benchmark", *OWN, "optimizer=evil", "workloads=[mlp]", "track=self_tuning", "studies=1", "dry_run=true"]


def rung_of_a_ladder(key: str) -> list[str]:
    family = yaml.safe_load((ROOT / "lab/ladder/gpt.yaml").read_text())
    family["rungs"] = {name: [*lines, "=".join(override(key))] for name, lines in family["rungs"].items()}
    write(Path("conf/ladder/evil.yaml"), family)
    return ["ladder", *OWN, "optimizer=adamw", "model=evil", "rungs=2", "dry_run=true"]


def optimizer_of_a_ladder(key: str) -> list[str]:
    family = yaml.safe_load((ROOT / "lab/ladder/gpt.yaml").read_text())
    write(Path("conf/ladder/evil.yaml"), {**family, "optimizers": {"adamw": ["=".join(override(key))]}})
    return ["ladder", *OWN, "optimizer=adamw", "model=evil", "rungs=2", "dry_run=true"]


def space_of_a_ladder(key: str) -> list[str]:
    space_of_a_benchmark(key)
    return ["ladder", *OWN, "optimizer=evil", "model=gpt", "rungs=2", "dry_run=true"]


def function_of_a_trajectory(key: str) -> list[str]:
    write(Path("conf/function/evil.yaml"), nested(key), GLOBAL)
    return ["trajectory", *OWN, "function=evil", "optimizer=sgd", "steps=3"]


FILES: list[Callable[[str], list[str]]] = [
    recipe, recipe_of_a_sweep, recipe_of_some_jobs, beside_a_typed_value, primary_config, choice_of_a_group,
    parameters_of_a_sweep, parameters_in_zip, job_of_a_grid, space, points_to_try_first, run, stem_of_branches,
    base_of_a_judge, run_to_summarize, comparison, quick_comparison, axis_of_a_comparison,
    run_before_a_comparison, workload_of_a_benchmark, space_of_a_benchmark,
    keys_of_a_self_tuning_optimizer, rung_of_a_ladder, optimizer_of_a_ladder, space_of_a_ladder,
    function_of_a_trajectory,
]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=[each.__name__ for each in FILES])
def test_no_file_sets_what_must_be_typed(
    file: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys of three kinds of files, and every fourth key of the others, which share the check."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write(Path("evil/__init__.py"), None)
    Path("evil/__init__.py").write_text("open('ran', 'w')\n")
    place = FILES.index(file)
    for key in KEYS if file in (recipe, parameters_of_a_sweep, run) else [*KEYS][place % 4 :: 4]:
        line = file(key)
        message = refused(tmp_path, *line)
        names = (key, key.replace(".", "/"), "hydra", "the invalid key", "not in 'BasicLauncherConf'")
        assert any(name in message for name in names), f"{key}: {message}"
        assert not Path("ran").exists(), key


@pytest.mark.parametrize("key", [key for key in KEYS if ".." not in key and not key.endswith("_target_")])
def test_the_same_may_be_typed(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").touch()
    word = "=".join(override(key)).replace("+hydra.job_logging", "hydra.job_logging")
    words = ["hydra/launcher=slurm", "hydra/job_logging=default", word]
    composer = Composer(config_dir=str(tmp_path), words=words)
    assert composer.compose([*words, "hydra.verbose=true"]).hydra.launcher.n_jobs == 16
    with pytest.raises(UserError, match="accepted from the command line only"):
        Composer(config_dir=str(tmp_path)).compose(words)


@pytest.mark.parametrize("key", KEYS)
def test_a_trial_of_a_study_is_a_job_like_any_other(key: str, tmp_path: Path) -> None:
    """Another process may have written any text into the study, which becomes an override (`Space._lines`)."""
    words = ["hydra/sweeper=dlopt_optuna", "p=zip(seed=[0,1],data.batch_size=[8,9])", *TINY]
    request = sweep.request(Composer(words=words), words)
    assert request.plan_job(["seed=1", "data.batch_size=9"], 0).saved["seed"] == 1
    with pytest.raises(UserError, match=key.split(".")[-1]):
        request.plan_job(["=".join(override(key))], 0)


def test_a_recorded_command_is_repeated_without_them(tmp_path: Path) -> None:
    lines = ["=".join(override(key)) for key in KEYS]
    run = make_run(tmp_path / "run", overrides=["optimizer=sgd", *lines, "seed=3"])
    assert command(read_run(run)) == "dlopt train optimizer=sgd seed=3"


# -- who reads files

TRIED: dict[str, list[Callable[[str], list[str]]]] = {
    "config/compose.py:Composer._refuse_search_path": [primary_config],
    "config/config_dir.py": [
        recipe, recipe_of_a_sweep, recipe_of_some_jobs, choice_of_a_group, comparison, function_of_a_trajectory
    ],
    "config/inherit.py": [run, stem_of_branches, run_to_summarize],
    "lab/benchmark/protocol.py": [
        workload_of_a_benchmark, space_of_a_benchmark, keys_of_a_self_tuning_optimizer, space_of_a_ladder
    ],
    "lab/judge/proposal.py": [base_of_a_judge],
    "lab/ladder/family.py": [rung_of_a_ladder, optimizer_of_a_ladder],
    "sweeps/axes.py": [space],
    "sweeps/search.py:_enqueued": [points_to_try_first],
}  # fmt: skip

SHIPPED = "a file of dlopt"
COMPARED = "compared with a config that was composed, or shown"
RESULTS = "results and states, no settings"
SUBMITTED = "of a submission: its SHA-256 and packages are what this user has submitted or typed"
DESCRIBED = "a job that this command has composed, checked and described"

NOT_COMPOSED = {
    "commands/runs_tag.py": "labels",
    "commands/shared/processes.py": SHIPPED,
    "config/compose.py:installed": SHIPPED,
    "config/recall.py": SHIPPED,
    "config/resolve.py:_set_by_recipe": "names of keys and callables of a recipe that is composed",
    "config/resuming.py": COMPARED,
    "config/saved.py": SHIPPED,
    "config/synonyms.py": SHIPPED,
    "instruments/measuring_ranks.py": DESCRIBED,
    "lab/benchmark/costs.py": DESCRIBED,
    "lab/benchmark/results.py": RESULTS,
    "lab/benchmark/trials.py": COMPARED,
    "lab/comparison": COMPARED,
    "lab/diagnosis/report.py": RESULTS,
    "lab/judge/command.py": COMPARED,
    "lab/judge/equal.py": RESULTS,
    "lab/judge/ledger.py": RESULTS,
    "lab/judge/running.py": COMPARED,
    "lab/benchmark/reading.py": RESULTS,
    "lab/ladder/ladder.py": RESULTS,
    "python/runs.py": RESULTS,
    "results": RESULTS,
    "run/environment.py": SUBMITTED,
    "run/folder.py": COMPARED,
    "run/job.py": DESCRIBED,
    "run/record.py": COMPARED,
    "sweeps/array.py": SUBMITTED,
    "sweeps/branches.py": "the saved config of the run of from=, which has been composed; its schedule is drawn",
    "sweeps/element.py": SUBMITTED,
    "sweeps/jobs.py": COMPARED,
    "sweeps/matching.py": COMPARED,
    "sweeps/search.py:_check_folder": COMPARED,
    "sweeps/search.py:search": COMPARED,
    "sweeps/series.py:read": "its command runs only if its SHA-256 is of a series that this user has started",
    "sweeps/slurm.py": DESCRIBED,
    "sweeps/status.py": RESULTS,
    "sweeps/submission.py": SUBMITTED,
    "sweeps/sweep.py": COMPARED,
    "sweeps/sweep_file.py": COMPARED,
    "trained/decision.py": RESULTS,
    "training/budget.py:count_updates": RESULTS,
    "training/checkpoint/checkpoints.py": COMPARED,
    "training/reporting.py": COMPARED,
}

READERS = {
    "load_yaml", "load_json", "read_json", "parse_json", "check_yaml", "read_space", "find_space", "safe_load",
    "Stored",
}  # fmt: skip
# Rooms that cannot import `dlopt.config`, and so cannot make overrides.
PARTS = (
    "tracking", "augment", "init", "adapt", "data", "models", "tasks", "losses", "schedules", "metrics", "optim",
    "machine", "basics",
)  # fmt: skip


def readers() -> Iterator[str]:
    """Yields the functions that read YAML or JSON, or the config or the overrides of a run folder."""

    def visit(node: ast.AST, name: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
            if isinstance(child, ast.Call):
                called = ast.unparse(child.func).partition("[")[0]  # Stored[dict](...)
                last = called.rpartition(".")[2]
                is_of_run = last in ("config", "typed") and last != called and not child.args and not child.keywords
                if last in READERS or called == "OmegaConf.load" or is_of_run:
                    yield name
            elif isinstance(child, ast.Name) and child.id in READERS and isinstance(node, ast.Call):
                yield name  # is passed on
            yield from visit(child, ".".join(filter(None, [name, inner])))

    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT)
        if file.parts[0].removesuffix(".py") not in PARTS:
            yield from (f"{file}:{name}" for name in visit(ast.parse(path.read_text(encoding="utf-8")), ""))


def is_of(function: str, entry: str) -> bool:
    """Returns whether a function is this one, or in this file or folder."""
    return function == entry or function.startswith((f"{entry}:", f"{entry}/"))


def test_every_reader_of_a_file_is_tried_or_makes_no_overrides() -> None:
    listed, found = [*TRIED, *NOT_COMPOSED], {*readers()}
    unknown = {each for each in found if not any(is_of(each, entry) for entry in listed)}
    assert not unknown, "does it become overrides? try each key through its file, or say why nothing is composed"
    assert not {entry for entry in listed if not any(is_of(each, entry) for each in found)}
    assert {file for files in TRIED.values() for file in files} <= {*FILES}
