"""The range test finds known rates, leaves no trace, and every rank finds the same."""

import json
import math
from pathlib import Path

import pytest
import torch

from dlopt.analysis.lr_range import LearningRates, RangeTest, check, draw, find, suggestions, trial, write
from dlopt.errors import UserError
from dlopt.training.build import build_workload, training_batches
from dlopt.training.optimizer import build_optimizer
from tests.parallel.ranks import run_ranks
from tests.training.runs import SMALL, experiment, metrics, result, resume, same, start

QUICK = RangeTest(updates=40)


def test_rates_are_spread_evenly_on_a_logarithmic_scale() -> None:
    keys = RangeTest(min_lr=1e-4, max_lr=1.0, updates=5)
    assert [keys.rate(i) for i in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_suggestions_of_a_curve_that_is_known() -> None:
    rates = [10 ** (-5 + i / 10) for i in range(51)]
    falling = [2 - 1.5 / (1 + math.exp(-(i - 25) / 3)) if i <= 40 else 0.5 + (i - 40) for i in range(51)]
    steepest, valley = suggestions(rates, falling)
    assert steepest == pytest.approx(rates[25])
    assert valley == pytest.approx(rates[20])  # the descent goes from 0 to 40
    assert suggestions(rates, [1.0 + i for i in range(51)]) == (None, None)
    assert suggestions([], []) == (None, None)


def test_the_longest_descent_may_be_interrupted() -> None:
    rates = [float(i + 1) for i in range(8)]
    _, valley = suggestions(rates, [5, 5.5, 4, 4.5, 3, 3.5, 2, 9])  # 5 4 3 2, from the first to the seventh
    assert valley is not None and 2 <= valley <= 6


def test_the_model_is_put_back_and_a_divergence_ends_the_test(tmp_path: Path) -> None:
    typed = experiment(*SMALL, "data.batch_size=25", "model.dropout=0.3", "augmentation=crop_flip", "optimizer.lr=0.7")
    workload = build_workload(typed)
    before = {name: value.clone() for name, value in workload.module.state_dict().items()}
    generator = torch.get_rng_state()
    keys = RangeTest(updates=60, max_lr=1e6)
    found = find(workload, keys, tmp_path)
    assert same(before, dict(workload.module.state_dict())) and torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in workload.module.parameters()) and not list(tmp_path.iterdir())
    assert found.diverged and len(found.rates) < 60
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert found.valley is not None and found.steepest is not None
    assert 1e-5 < found.steepest < 10
    again = find(workload, keys, tmp_path)
    assert again == found


def test_the_losses_are_those_of_a_training_with_these_rates(tmp_path: Path) -> None:
    """SGD by hand, without momentum, on the same batches."""
    typed = experiment(*SMALL, "precision=fp64", "optimizer.momentum=0", "optimizer.weight_decay=0")
    workload = build_workload(typed)
    found = find(workload, RangeTest(updates=10, max_lr=0.1), tmp_path)
    losses = []
    batches = training_batches(workload)
    stream = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    for rate, (inputs, targets) in zip(found.rates, stream, strict=False):
        workload.module.zero_grad()
        loss = workload.loss(workload.module(inputs), targets)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in workload.module.parameters():
                p -= rate * p.grad  # type: ignore[operator]
    assert found.losses == pytest.approx(losses, rel=1e-12)


def test_bad_keys_are_refused() -> None:
    with pytest.raises(UserError, match="max_lr=1e-07: must be > min_lr"):
        check(RangeTest(max_lr=1e-7))
    with pytest.raises(UserError, match="updates=3"):
        check(RangeTest(updates=3))
    with pytest.raises(UserError, match=r"scale_lr=linear: optimizer\.lr=auto"):
        experiment("optimizer.lr=auto", "scale_lr=linear")
    with pytest.raises(UserError, match="only `dlopt train` looks for"):
        build_optimizer(build_workload(experiment(*SMALL, "optimizer.lr=auto")))
    multiplied = trial(experiment("optimizer.lr=auto"), QUICK)
    assert multiplied.optimizer.arguments["lr"] == 1.0 and not multiplied.auto_lr


def test_the_picture_and_the_file(tmp_path: Path) -> None:
    found = LearningRates([1e-3, 1e-2, 1e-1], [2.0, 1.0, 3.0], [2.0, 1.5, 1.7], 1e-2, 1e-3, True)
    figure = draw(found, "title")
    assert len(figure.axes[0].lines) == 2 + 2 * 2  # losses, smoothed, a mark and a line for each suggestion
    paths = write(found, tmp_path, "title")
    assert {path.name for path in paths} == {"find_lr.png", "find_lr.svg", "find_lr.json"}
    assert json.loads((tmp_path / "find_lr.json").read_text())["steepest"] == 1e-2
    assert len(draw(LearningRates([1e-3], [1.0], [1.0], None, None, False), "none").axes[0].lines) == 2


def test_a_training_finds_its_rate_and_a_resumed_one_keeps_it(tmp_path: Path) -> None:
    typed = [*SMALL, "optimizer.lr=auto", "schedule=constant", "epochs=2"]
    summary = start(tmp_path / "whole", *typed)
    rate = summary["found_lr"]
    assert {line["lr"] for line in metrics(tmp_path / "whole")} == {rate}
    assert json.loads((tmp_path / "whole" / "find_lr.json").read_text())["steepest"] == rate
    # The training itself is that with the number typed.
    start(tmp_path / "typed", *[f"optimizer.lr={rate!r}" if each == "optimizer.lr=auto" else each for each in typed])
    found, given = result(tmp_path / "whole"), result(tmp_path / "typed")
    found["progress"].pop("found_lr"), given["progress"].pop("found_lr")
    assert same(found, given)
    start(tmp_path / "parts", *typed[:-1], "epochs=1")
    (tmp_path / "parts" / "find_lr.json").unlink()
    assert resume(tmp_path / "parts", *typed)["found_lr"] == rate
    assert not (tmp_path / "parts" / "find_lr.json").exists()  # nothing was looked for again
    assert same(result(tmp_path / "whole")["model"], result(tmp_path / "parts")["model"])


def rank(folder: str) -> None:
    """What each rank of two does."""
    from dlopt.analysis.lr_range import test_range

    typed = experiment(*SMALL, "data.batch_size=24", "parallel=ddp", "precision=fp64", "model.norm=none")
    print(json.dumps(vars(test_range(typed, QUICK, Path(folder)))))


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = (
        json.loads(text.splitlines()[-1]) for text in run_ranks(f"{__name__}:rank", 2, tmp_path, str(tmp_path))
    )
    assert first == second
    alone = experiment(*SMALL, "data.batch_size=24", "precision=fp64", "model.norm=none")
    found = find(build_workload(alone), QUICK, tmp_path)
    assert first["losses"] == pytest.approx(found.losses, rel=1e-9)
    assert first["steepest"] == found.steepest and first["valley"] == found.valley
