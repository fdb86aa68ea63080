"""What searches draw, against Optuna's own samplers and scipy's sequences; and which jobs they stop early."""

import math
import pickle
import statistics
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from scipy.stats import qmc

from dlopt.basics.errors import UserError
from dlopt.sweeps import samplers
from dlopt.sweeps.samplers import Sampler
from dlopt.sweeps.space import Space
from tests.support.checkpoints import Payload
from tests.sweeps.spaces import space

Draws = list[dict[str, Any]]


def drawn(
    sampler: Sampler, searched: Space, count: int, value: Callable[[dict[str, Any]], float], direction: str = "minimize"
) -> Draws:
    study = optuna.create_study(direction=direction)
    draws = []
    for number in range(count):
        study.sampler = sampler(number)
        trial = study.ask()
        draws.append({key: trial._suggest(key, each) for key, each in searched.searched.items()})
        study.tell(trial, value(draws[-1]))
    return draws


def bowl(values: dict[str, Any]) -> float:
    return (math.log10(values["lr"]) + 2) ** 2 + (values["momentum"] - 0.9) ** 2


@pytest.fixture
def two() -> Space:
    return space("lr=tag(log,interval(0.0001,1))", "momentum=interval(0,0.99)")


def test_random_and_tpe_equal_optuna_with_the_same_seeds(two: Space) -> None:
    """With the seed that a job's number gives, and the results so far, Optuna's own sampler draws the same."""
    settings = {"startup_trials": 3, "multivariate": True, "constant_liar": True}
    ours = drawn(samplers.tpe(space=two, seed=5, **settings), two, 8, bowl)  # type: ignore[arg-type]
    study = optuna.create_study()
    for number, expected in enumerate(ours):
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=3, multivariate=True, constant_liar=True, seed=samplers._seed(5, number)
        )
        trial = study.ask(two.searched)  # type: ignore[arg-type]
        assert trial.params == expected
        study.tell(trial, bowl(trial.params))
    plain = drawn(samplers.random(space=two, seed=5), two, 3, bowl)
    assert plain == ours[:3]  # TPE's first draws are random ones


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(("sigma", "population"), [(None, None), (0.3, 4)])
def test_cmaes_equals_optuna_with_the_same_seeds(direction: str, sigma: float | None, population: int | None) -> None:
    """Up to rounding, for floats, integers and steps, beside choices; sampled one after another."""
    searched = space(
        "lr=tag(log,interval(0.0001,1))", "momentum=interval(0,0.99)", "width=tag(log,int(interval(8,512)))",
        "depth=int(interval(1,9))", "kind=a,b",
    )  # fmt: skip
    sampler = samplers.cmaes(space=searched, seed=5, startup_trials=2, sigma=sigma, population=population)
    ours = drawn(sampler, searched, 25, bowl, direction)

    def of_optuna(number: int) -> BaseSampler:
        seed = samplers._seed(5, number)
        return optuna.samplers.CmaEsSampler(
            n_startup_trials=2, sigma0=sigma, popsize=population, seed=seed, warn_independent_sampling=False
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = drawn(of_optuna, searched, 25, bowl, direction)
    for a, b in zip(ours, theirs, strict=True):
        assert a == {key: value if isinstance(value, str) else pytest.approx(value) for key, value in b.items()}


def test_cmaes_computes_one_state_in_all_processes(two: Space) -> None:
    """Six jobs run at once and end in another order; each is drawn by a process that has only the study."""
    sampler = samplers.cmaes(space=two, seed=5, startup_trials=1, sigma=None, population=5)
    study = optuna.create_study()
    for start in range(0, 30, 6):
        trials = []
        for number in range(start, start + 6):
            study.sampler = sampler(number)
            trials.append(study.ask(two.searched))  # type: ignore[arg-type]
        for trial in reversed(trials):
            study.tell(trial, bowl(trial.params))
    generations = [trial.system_attrs.get("cma:generation") for trial in study.trials]
    assert generations == [None] * 6 + [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    ended = [trial.number for trial in sorted(study.trials, key=lambda trial: trial.datetime_complete or datetime.max)]
    assert ended[6:9] == [11, 10, 9]
    unit = {"lr": lambda x: (math.log10(x) + 4) / 4, "momentum": lambda x: x / 0.99}
    optimizer = cmaes.CMA(mean=np.full(2, 0.5), sigma=1 / 6, bounds=np.array([[0, 1], [0, 1]]), population_size=5)
    for start in range(6, 30, 6):
        ended_first = [study.trials[number] for number in ended[start : start + 5]]
        optimizer.tell(
            [(np.array([unit[key](trial.params[key]) for key in unit]), bowl(trial.params)) for trial in ended_first]
        )
    seed = np.random.RandomState(samplers._seed(5, 30)).randint(1, 2**16) + 30
    optimizer._rng.seed(seed)
    study.sampler = sampler(30)
    params = study.ask(two.searched).params  # type: ignore[arg-type]
    assert [unit[key](params[key]) for key in unit] == pytest.approx(list(optimizer.ask()))


def test_pickles_in_a_study_are_not_loaded(two: Space, tmp_path: Path) -> None:
    """Optuna's sampler loads the state of CMA-ES from attributes of the trials, which may be a stranger's."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    pickled = pickle.dumps(Payload(tmp_path / "started")).hex()
    for number in range(3):
        study.sampler = samplers.random(space=two, seed=1)(number)
        trial = study.ask(two.searched)  # type: ignore[arg-type]
        storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", pickled)
        storage.set_trial_system_attr(trial._trial_id, "cma:generation", [number])
        study.tell(trial, 1.0)
    for make in (
        samplers.tpe(space=two, seed=1, startup_trials=1, multivariate=True, constant_liar=True),
        samplers.cmaes(space=two, seed=1, startup_trials=1, sigma=None, population=None),
    ):
        study.sampler = make(3)
        assert study.ask(two.searched).relative_params.keys() == two.searched.keys()  # type: ignore[arg-type]
    assert not (tmp_path / "started").exists()
    study.sampler = optuna.samplers.CmaEsSampler()
    study.ask(two.searched)  # type: ignore[arg-type]
    assert (tmp_path / "started").exists(), "the payload works"


@pytest.mark.parametrize("name", ["random", "sobol", "halton", "grid"])
def test_values_depend_only_on_the_job_number(name: str, two: Space) -> None:
    searched = space("a=range(0,3)", "b=x,y") if name == "grid" else two
    options = {"scramble": True} if name in ("sobol", "halton") else {}
    sampler = getattr(samplers, name)(space=searched, seed=1, **options)
    whole = drawn(sampler, searched, 6, lambda values: 0.0)
    study = optuna.create_study()
    study.sampler = sampler(4)  # as another process draws it, without the others
    trial = study.ask()
    assert {key: trial._suggest(key, each) for key, each in searched.searched.items()} == whole[4]


@pytest.mark.parametrize("name, engine", [("sobol", qmc.Sobol), ("halton", qmc.Halton)])
@pytest.mark.parametrize("scramble", [True, False])
def test_sequences_equal_scipy(name: str, engine: Any, scramble: bool) -> None:
    searched = space("lr=tag(log,interval(0.001,1))", "width=range(0,4)", "kind=a,b,c")
    draws = drawn(getattr(samplers, name)(space=searched, seed=3, scramble=scramble), searched, 16, lambda _: 0.0)
    points = engine(3, scramble=scramble, seed=np.random.default_rng(3)).random(16)
    assert [d["lr"] for d in draws] == pytest.approx(10 ** (-3 + 3 * points[:, 0]))
    assert [d["width"] for d in draws] == list(np.floor(points[:, 1] * 4).astype(int))
    assert [d["kind"] for d in draws] == ["abc"[int(x * 3)] for x in points[:, 2]]
    if name == "sobol":  # 16 points: as many in each quarter
        assert sorted(d["width"] for d in draws) == sorted([0, 1, 2, 3] * 4)


def test_grid_is_the_full_product() -> None:
    searched = space("a=range(0,3)", "b=x,y")
    draws = drawn(samplers.grid(space=searched, seed=0), searched, 6, lambda _: 0.0)
    assert draws == searched.points()


def test_learning_samplers_beat_random_ones(two: Space) -> None:
    """Median best of 40 jobs over five seeds, on a bowl."""

    def best(make: Callable[[int], Sampler]) -> float:
        return statistics.median(min(map(bowl, drawn(make(seed), two, 40, bowl))) for seed in range(5))

    random = best(lambda seed: samplers.random(space=two, seed=seed))
    cmaes = best(lambda seed: samplers.cmaes(space=two, seed=seed, startup_trials=1, sigma=None, population=None))
    tpe = best(
        lambda seed: samplers.tpe(space=two, seed=seed, startup_trials=10, multivariate=True, constant_liar=True)
    )
    assert cmaes < random / 2 and tpe < random / 2, (random, cmaes, tpe)


def test_samplers_reject_unsupported_spaces(two: Space) -> None:
    with pytest.raises(UserError, match=r"lr: .*grid needs choice"):
        samplers.grid(space=two, seed=0)
    with pytest.raises(UserError, match="needs numbers"):
        samplers.cmaes(space=space("a=x,y"), seed=0, startup_trials=1, sigma=None, population=None)


# -- pruners: what stopping jobs early saves, and what it must not cost

EPOCHS = 27
JOBS = 40
SPACE = space(
    "lr=tag(log,interval(0.0001,1))", "decay=tag(log,interval(0.000001,0.1))", "momentum=interval(0,0.99)",
    "width=tag(log,int(interval(8,512)))",
)  # fmt: skip

Values = dict[str, Any]


def accuracy(values: Values, epoch: int) -> float:
    """A learning curve. Its end is best at one point of the space; smaller rates learn more slowly, so that the order
    of two jobs may change on the way."""
    misses = (
        math.log10(values["lr"]) + 2,
        (math.log10(values["decay"]) + 4) / 1.5,
        2 * (values["momentum"] - 0.9),
        (math.log10(values["width"]) - 2) / 1.5,
    )
    final = 0.95 * math.exp(-0.3 * sum(miss**2 for miss in misses))
    speed = 0.4 + 0.1 * math.log10(values["lr"] / 0.0001)
    return final * (1 - math.exp(-speed * epoch)) + 0.01 * math.sin(1e4 * values["lr"] + epoch) / epoch


def search(pruner: optuna.pruners.BasePruner, seed: int, jobs: int, enough: float = math.inf) -> tuple[float, float]:
    """Returns (best final metric, epochs spent) of `jobs` jobs in sequence, or until one reaches `enough`."""
    study = optuna.create_study(direction="maximize", pruner=pruner)
    sampler, best, spent = samplers.random(space=SPACE, seed=seed), -math.inf, 0
    for number in range(jobs):
        study.sampler = sampler(number)
        trial = study.ask()
        values = {key: trial._suggest(key, each) for key, each in SPACE.searched.items()}
        for epoch in range(1, EPOCHS + 1):
            spent += 1
            metric = accuracy(values, epoch)
            trial.report(metric, epoch)
            if epoch < EPOCHS and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            best = max(best, metric)
            study.tell(trial, metric)
        if best >= enough:
            break
    return best, spent


@pytest.mark.slow
def test_asha_needs_fewer_epochs_than_random_search() -> None:
    """The metric that random search has after `JOBS` jobs; random search's epochs are counted up to the job that had
    it, not to the last one."""
    shares = []
    for seed in range(20):
        target, _ = search(samplers.none(), seed, JOBS)
        _, spent = search(samplers.none(), seed, JOBS, target)
        best, needed = search(samplers.asha(min_epochs=1, reduction_factor=3, grace_rungs=0), seed, 4 * JOBS, target)
        shares.append(needed / spent if best >= target else math.inf)
    assert statistics.median(shares) < 0.5, sorted(shares)


@pytest.mark.parametrize(
    "pruner",
    [
        samplers.asha(min_epochs=1, reduction_factor=3, grace_rungs=0),
        samplers.hyperband(min_epochs=1, max_epochs=EPOCHS, reduction_factor=3),
        samplers.median(startup_trials=3, warmup_epochs=1),
    ],
)
def test_pruners_save_epochs_and_keep_good_jobs(pruner: optuna.pruners.BasePruner) -> None:
    best, spent = search(pruner, 0, JOBS)
    whole, all_epochs = search(samplers.none(), 0, JOBS)
    assert all_epochs == JOBS * EPOCHS
    assert spent < 0.7 * all_epochs and best > whole - 0.05
