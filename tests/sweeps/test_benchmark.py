"""Plan of a benchmark: candidates, draws, overrides of trials, claims."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.lab.benchmark.protocol import Track, WorkloadSpec, load_space, load_tier, trials_of
from dlopt.lab.benchmark.results import load_reference
from dlopt.lab.benchmark.trials import Candidate, TrialRequest, candidate
from dlopt.lab.claimed_trials import claim


class WithoutKeys(torch.optim.Optimizer):
    """An optimizer that has nothing to tune."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


class OnlyRate(torch.optim.SGD):
    """An optimizer with a learning rate, but without weight decay."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.fixture(scope="module")
def sgd(composer: Composer) -> Candidate:
    return candidate(composer, "sgd", [])


@pytest.mark.slow
def test_every_space_composes_on_a_workload(composer: Composer) -> None:
    folder = Path(__file__).parents[2] / "dlopt/lab/benchmark/space"
    names = sorted(path.stem for path in folder.glob("[!_]*.yaml"))
    assert len(names) >= 10
    for name in names:
        track: Track = "self_tuning" if name.endswith("_self_tuning") else "external_tuning"
        chosen = candidate(composer, name.removesuffix("_self_tuning"), [], track)
        lines = ["experiment=benchmark/mlp", *chosen.overrides, *chosen.space.overrides(chosen.values(1, 3))]
        parse(*to_plain(composer.compose(lines)))


@pytest.mark.parametrize("track", ["external_tuning", "self_tuning"])
def test_shipped_results_are_those_of_the_present_spaces(composer: Composer, track: Track) -> None:
    """Other spaces draw other trials: `--check` and the reports would compare what was never run."""
    shipped = load_reference("small", track)
    assert shipped is not None
    for name, space in shipped.spaces.items():
        assert candidate(composer, name, [], track).describe() == space, name


@pytest.mark.parametrize("tier", ["small", "small_held_out", "medium", "large"])
def test_tiers_name_experiments(tier: str) -> None:
    conf = Path(__file__).parents[2] / "conf/experiment"
    workloads = load_tier(tier, None).workloads
    assert len(workloads) >= 7 and all((conf / f"{spec.experiment}.yaml").is_file() for spec in workloads.values())


def test_every_variant_of_the_held_out_workloads_composes(composer: Composer) -> None:
    content = yaml.safe_load((Path(__file__).parents[2] / "dlopt/lab/benchmark/tier/small_held_out.yaml").read_text())
    assert content["workloads"].keys() == load_tier("small", None).workloads.keys()
    for name, workload in content["workloads"].items():
        base = [f"experiment={workload['experiment']}"]
        for variant in workload["variants"]:
            varied = to_plain(composer.compose([*base, *variant]))
            parse(*varied)
            assert varied[0] != to_plain(composer.compose(base))[0], f"{name}: {variant} changes nothing"


def test_the_version_of_a_tier_draws_a_variant_of_each_workload(tmp_path: Path) -> None:
    path = tmp_path / "benchmark/tier/mine.yaml"
    path.parent.mkdir(parents=True)
    variants = [["model.widths=[8]"], ["model.widths=[16]"], ["model.widths=[32]"]]
    one = {"experiment": "benchmark/mlp", "metric": "val_loss", "target": 0.5, "variants": variants}
    drawn = []
    for version in range(20):
        path.write_text(yaml.safe_dump({"version": version, "workloads": {"a": one, "b": one}}))
        workloads = load_tier("mine", str(tmp_path)).workloads
        drawn.append((workloads["a"].overrides, workloads["b"].overrides))
        assert workloads == load_tier("mine", str(tmp_path)).workloads
    assert all(each in variants for pair in drawn for each in pair)
    assert {tuple(first) for first, _ in drawn} == {tuple(each) for each in variants}
    assert any(first != second for first, second in drawn)  # the workloads draw on their own


def test_an_optimizer_without_a_space_gets_the_keys_that_it_has(composer: Composer) -> None:
    trusted = ["allow_packages=[tests]"]
    composer = composer.with_words(*trusted)
    assert [*candidate(composer, "gradient_descent", []).space.searched] == ["optimizer.lr", "optimizer.weight_decay"]
    assert [*candidate(composer, f"{__name__}.OnlyRate", trusted).space.searched] == ["optimizer.lr"]
    with pytest.raises(UserError, match="has none of the keys of the default search space"):
        candidate(composer, f"{__name__}.WithoutKeys", trusted)


@given(study=st.integers(0, 50), number=st.integers(0, 100))
def test_draws_are_in_the_space_and_depend_on_study_and_number_only(sgd: Candidate, study: int, number: int) -> None:
    values = sgd.values(study, number)
    assert 0.003 <= values["optimizer.lr"] <= 10.0 and values["optimizer.momentum"] in ("0.8", "0.9", "0.95", "0.98")
    assert values == sgd.values(study, number) and values != sgd.values(study + 1, number)


def test_trials_of_a_study_cover_the_range_of_learning_rates(sgd: Candidate) -> None:
    for study in range(3):
        rates = sorted(sgd.values(study, number)["optimizer.lr"] for number in range(10))
        decades = [sum(low <= rate < 10 * low for rate in rates) for low in (0.003, 0.03, 0.3)]
        assert min(decades) >= 2  # of ten; independent draws leave a decade empty in one of twenty studies


def test_a_larger_budget_contains_the_smaller_one() -> None:
    small = list(trials_of(["a", "b"], ["x"], 2, 3))
    large = list(trials_of(["a", "b"], ["x"], 3, 5))
    assert len(small) == 12 and set(small) < set(large)
    assert {trial.number for trial in small[:4]} == {0}  # an interrupted benchmark has a smaller budget everywhere


def test_a_trial_stops_at_the_target_and_is_not_tested(tmp_path: Path, sgd: Candidate, composer: Composer) -> None:
    workloads = {"mlp": WorkloadSpec(experiment="benchmark/mlp", metric="val_loss", target=0.25)}
    [trial] = trials_of(["mlp"], ["sgd"], 1, 1)
    lines = TrialRequest(tmp_path, workloads, {"sgd": sgd}, [trial], ["precision=fp64"], full=False).line(trial)
    experiment = parse(*to_plain(composer.compose(lines)))
    assert experiment.stopping.arguments == {"monitor": "val_loss", "value": 0.25}
    assert not experiment.settings.evaluate.test and experiment.settings.precision == "fp64"
    assert experiment.optimizer.arguments["nesterov"] is True and experiment.settings.seed == 0
    full = TrialRequest(tmp_path, workloads, {"sgd": sgd}, [trial], [], full=True).line(trial)
    assert not any(line.startswith("stopping") for line in full)


def test_a_claim_is_released(tmp_path: Path) -> None:
    first = claim(tmp_path / "0-0")
    assert first is not None
    first.close()
    second = claim(tmp_path / "0-0")
    assert second is not None
    second.close()


def test_spaces_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "benchmark/space/mine.yaml"
    path.parent.mkdir(parents=True)
    for text in ("- a\n", "optimizer.lr: {low: 1}\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="must map keys to ranges or values"):
            load_space("mine", str(tmp_path))
