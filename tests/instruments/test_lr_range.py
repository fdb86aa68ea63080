"""Learning-rate range test: known rates, restored model, same result on all ranks."""

import json
import math
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.instruments.lr_range import (
    LearningRates,
    RangeTest,
    check,
    describe_end,
    draw,
    find,
    middle_of_descent,
    steepest_slope,
    trial,
    write,
)
from dlopt.optim import Muon
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.workload import build_workload
from tests.support.ranks import run_ranks
from tests.support.runs import SMALL, metrics, result, resume, run_config, same, start

QUICK = RangeTest(updates=40)


def test_rates_are_logarithmically_spaced() -> None:
    keys = RangeTest(min_lr=1e-4, max_lr=1.0, updates=5)
    assert [keys.rate(i) for i in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_suggestions_for_a_known_curve() -> None:
    rates = [10 ** (-5 + i / 10) for i in range(51)]
    falling = [2 - 1.5 / (1 + math.exp(-(i - 25) / 3)) if i <= 40 else 0.5 + (i - 40) for i in range(51)]
    assert steepest_slope(rates, falling) == pytest.approx(rates[25])
    assert middle_of_descent(rates, falling) == pytest.approx(rates[20])  # the descent goes from 0 to 40
    for suggestion in (steepest_slope, middle_of_descent):
        assert suggestion(rates, [1.0 + i for i in range(51)]) is None
        assert suggestion([], []) is None


def test_valley_tolerates_noise() -> None:
    rates = [float(i + 1) for i in range(8)]
    valley = middle_of_descent(rates, [5, 5.5, 4, 4.5, 3, 3.5, 2, 9])  # 5 4 3 2, from the first to the seventh
    assert valley is not None and 2 <= valley <= 6


def test_restores_model_and_stops_at_divergence() -> None:
    typed = run_config(*SMALL, "data.batch_size=25", "model.dropout=0.3", "augmentation=crop_flip", "optimizer.lr=0.7")
    workload = build_workload(typed)
    before = {name: value.clone() for name, value in workload.module.state_dict().items()}
    generator = torch.get_rng_state()
    keys = RangeTest(updates=60, max_lr=1e6)
    result = find(workload, keys)
    assert same(before, dict(workload.module.state_dict())) and torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in workload.module.parameters())
    assert result.diverged and len(result.rates) < 60
    assert len(result.rates) == len(result.losses) == len(result.smoothed)
    assert result.valley is not None and result.steepest is not None
    assert 1e-5 < result.steepest < 10
    again = find(workload, keys)
    assert again == result


def test_losses_match_training_with_these_rates() -> None:
    """Compares with manual SGD without momentum on the same batches."""
    typed = run_config(*SMALL, "precision=fp64", "optimizer.momentum=0", "optimizer.weight_decay=0")
    workload = build_workload(typed)
    result = find(workload, RangeTest(updates=10, max_lr=0.1))
    losses = []
    batches = training_batches(workload)
    stream = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    for rate, (inputs, targets) in zip(result.rates, stream, strict=False):
        workload.module.zero_grad()
        loss = workload.loss(workload.module(inputs), targets)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in workload.module.parameters():
                p -= rate * p.grad  # type: ignore[operator]
    assert result.losses == pytest.approx(losses, rel=1e-12)


def test_rates_that_do_not_depend_on_lr_are_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def step(optimizer: Muon, closure: object = None) -> None:
        rates.append({group["use_muon"]: group["lr"] for group in optimizer.param_groups})

    monkeypatch.setattr(Muon, "step", step)
    workload = build_workload(run_config(*SMALL, "optimizer=muon", "optimizer.rest_lr=0.003"))
    found = find(workload, QUICK)
    assert [each[False] for each in rates] == [0.003] * len(rates)
    assert [each[True] for each in rates] == pytest.approx(found.rates)


def test_describes_the_end_as_the_plot_shows_it() -> None:
    def of(*smoothed: float, diverged: bool = False) -> LearningRates:
        rates = [10.0 ** (i - 3) for i in range(len(smoothed))]
        return LearningRates(rates, list(smoothed), list(smoothed), None, None, diverged)

    assert describe_end(of(2.0, 1.0, 0.5, 0.52)) == "the loss did not rise; try a larger max_lr"
    assert describe_end(of(2.0, 0.5, 1.0)) == "the loss rose to 1 after its minimum of 0.5 at lr 0.01"
    assert describe_end(of(2.0, 1.5, 2.5)).startswith("the loss rose above its initial value after its minimum of 1.5")
    assert describe_end(of(2.0, 1.0, 9.0, diverged=True)) == "the loss diverged after its minimum of 1 at lr 0.01"
    assert describe_end(of()) == "the first loss is not finite"
    figure = draw(of(2.0, 1.0, 900.0, diverged=True), "")
    assert figure.axes[0].get_ylim()[1] < 10 and [text.get_text() for text in figure.axes[0].texts] == ["diverges"]
    assert not draw(of(2.0, 1.0, 2.5), "").axes[0].texts  # in the frame


def test_rejects_invalid_keys() -> None:
    with pytest.raises(UserError, match="max_lr=1e-07: must be > min_lr"):
        check(RangeTest(max_lr=1e-7))
    with pytest.raises(UserError, match=r"scale_lr=linear with optimizer\.lr=auto"):
        run_config("optimizer.lr=auto", "scale_lr=linear")
    with pytest.raises(UserError, match="only `dlopt train` runs a range test"):
        build_optimizer(build_workload(run_config(*SMALL, "optimizer.lr=auto")))
    with pytest.raises(UserError, match=r"optimizer\.line_search_fn=strong_wolfe: the line search chooses"):
        trial(run_config("optimizer=lbfgs"), QUICK)
    trial(run_config("optimizer=lbfgs", "optimizer.line_search_fn=null"), QUICK)
    multiplied = trial(run_config("optimizer.lr=auto"), QUICK)
    assert multiplied.optimizer.arguments["lr"] == 1.0 and not multiplied.auto_lr


def test_writes_plot_and_json(tmp_path: Path) -> None:
    result = LearningRates([1e-3, 1e-2, 1e-1], [2.0, 1.0, 3.0], [2.0, 1.5, 1.7], 1e-2, 1e-3, True)
    figure = draw(result, "title")
    assert len(figure.axes[0].lines) == 2 + 2 * 2  # losses, smoothed, a mark and a line for each suggestion
    paths = write(result, tmp_path, "title")
    assert {path.name for path in paths} == {"find_lr.png", "find_lr.svg", "find_lr.json"}
    assert json.loads((tmp_path / "find_lr.json").read_text())["steepest"] == 1e-2
    assert len(draw(LearningRates([1e-3], [1.0], [1.0], None, None, False), "none").axes[0].lines) == 2


def test_auto_lr_is_kept_after_resume(tmp_path: Path) -> None:
    typed = [*SMALL, "optimizer.lr=auto", "schedule=constant", "epochs=2"]
    summary = start(tmp_path / "whole", *typed)
    rate = summary["found_lr"]
    assert {line["lr"] for line in metrics(tmp_path / "whole")} == {rate}
    assert json.loads((tmp_path / "whole" / "find_lr.json").read_text())["steepest"] == rate
    # The training is identical to one with this learning rate on the command line.
    start(tmp_path / "typed", *[f"optimizer.lr={rate!r}" if each == "optimizer.lr=auto" else each for each in typed])
    actual, given = result(tmp_path / "whole"), result(tmp_path / "typed")
    actual["progress"].pop("found_lr"), given["progress"].pop("found_lr")
    assert same(actual, given)
    start(tmp_path / "parts", *typed[:-1], "epochs=1")
    (tmp_path / "parts" / "find_lr.json").unlink()
    assert resume(tmp_path / "parts", *typed)["found_lr"] == rate
    assert not (tmp_path / "parts" / "find_lr.json").exists()  # no second range test
    assert same(result(tmp_path / "whole")["model"], result(tmp_path / "parts")["model"])


def rank() -> None:
    """Runs the range test on one of two ranks."""
    from dlopt.instruments.lr_range import test_range

    typed = run_config(*SMALL, "data.batch_size=24", "parallel=ddp", "precision=fp64", "model.norm=none")
    print(json.dumps(vars(test_range(typed, QUICK))))


def test_two_processes_match_one(tmp_path: Path) -> None:
    first, second = (json.loads(text.splitlines()[-1]) for text in run_ranks(f"{__name__}:rank", 2, tmp_path))
    assert first == second
    alone = run_config(*SMALL, "data.batch_size=24", "precision=fp64", "model.norm=none")
    result = find(build_workload(alone), QUICK)
    assert first["losses"] == pytest.approx(result.losses, rel=1e-9)
    assert first["steepest"] == result.steepest and first["valley"] == result.valley
