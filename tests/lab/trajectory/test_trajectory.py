"""Trajectories of optimizers on functions, and learning-rate curves of schedules."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim import SGD, Optimizer

from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.lab.trajectory.functions import Quadratic, Rosenbrock, Window
from dlopt.lab.trajectory.paths import (
    RATES,
    Trajectory,
    animate,
    best_rate,
    draw_trajectories,
    follow,
    optimum,
    table,
)
from dlopt.optim import BFGS, LBFGS, SGDW, Newton
from tests.support import own_optimizers

pytestmark = pytest.mark.drawn


def constant(t: int) -> float:
    return 1.0


def bowl(condition: float = 5.0, noise: float = 0.0) -> Quadratic:
    return Quadratic(
        condition=condition, angle=0.0, noise=noise, batch_size=1, start=(-4.0, 1.5), window=(-5.0, 2.0, -2.2, 2.2)
    )


def replaced_window(function: Quadratic, window: Window) -> Quadratic:
    function.window = window
    return function


def sgd(lr: float, momentum: float = 0.0) -> Any:
    return lambda params: SGD(params, lr=lr, momentum=momentum)


def run(build: Any, function: Any = None, steps: int = 20, seed: int = 0, factor: Any = constant) -> Trajectory:
    return follow(bowl() if function is None else function, build, steps=steps, seed=seed, factor=factor)


def test_gradient_descent_matches_closed_form() -> None:
    path = run(sgd(1 / 3))  # 2 / (1 + 5): the best step
    t = torch.arange(21, dtype=torch.float64)
    expected = torch.stack([-4 * (2 / 3) ** t, 1.5 * (-2 / 3) ** t], 1)
    assert torch.allclose(path.points, expected, rtol=1e-12, atol=0)
    assert torch.allclose(path.distances, expected.norm(dim=1))
    assert path.evaluations == list(range(21)) and not path.diverged
    assert path.updates_to_minimum() == 18  # (2/3)^18 < 1e-3
    assert path.reversal_fraction() > 0.3


@pytest.mark.parametrize("kind", own_optimizers.ONE_EVALUATION)
def test_optimizers_of_users_match_the_closed_form(kind: Any) -> None:
    path = run(lambda params: kind(params, lr=1 / 3))
    t = torch.arange(21, dtype=torch.float64)
    expected = torch.stack([-4 * (2 / 3) ** t, 1.5 * (-2 / 3) ** t], 1)
    assert torch.allclose(path.points, expected, rtol=1e-12, atol=0)
    assert path.evaluations == list(range(21))


def test_counts_the_evaluations_of_an_optimizer_of_the_user() -> None:
    assert run(own_optimizers.Twice, steps=3).evaluations == [0, 2, 4, 6]


@pytest.mark.parametrize("kind", own_optimizers.MISSING_CLOSURE)
def test_refuses_a_step_that_fails_without_a_closure(kind: Any) -> None:
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.step\(\): fails without a closure.*evaluations='many'"):
        run(kind)


@pytest.mark.parametrize("kind", own_optimizers.UNEVALUATED)
def test_refuses_an_update_without_an_evaluation(kind: Any) -> None:
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.step\(closure\): did not call its closure"):
        run(kind)


def test_newton_converges_in_one_step() -> None:
    path = run(lambda params: Newton(params, damping=0.0), steps=3)
    assert path.distances[1] < 1e-14 and path.updates_to_minimum() == 1 and path.reversal_fraction() == 0
    straight = run(lambda params: Newton(params, damping=1e-4), bowl(500.0), steps=1)
    assert straight.distances[1] < 1e-3


def test_quasi_newton_methods_converge() -> None:
    for build in (
        lambda params: BFGS(params),
        lambda params: LBFGS(params, max_iter=1, max_eval=25),
    ):
        assert (run(build).updates_to_minimum() or 99) <= 8
        valley = run(build, Rosenbrock(start=(-1.2, 1.0), window=(-2.0, 2.0, -1.0, 2.0)), steps=60)
        step = valley.updates_to_minimum()
        assert step is not None and step < 50
        assert valley.evaluations[step] > step  # the line search is counted


def test_momentum_matches_torch_formula() -> None:
    path = run(sgd(0.05, 0.9), steps=4)
    x, v = np.array([-4.0, 1.5]), np.zeros(2)
    for t in range(1, 5):
        v = 0.9 * v + np.array([1.0, 5.0]) * x
        x = x - 0.05 * v
        assert path.points[t].numpy() == pytest.approx(x, rel=1e-12)


def test_schedule_and_noise_depend_on_the_update() -> None:
    halved = run(sgd(0.2), factor=lambda t: 0.5 if t else 1.0, steps=2)
    assert float(halved.points[2, 0]) == pytest.approx(-4 * 0.8 * 0.9)
    noisy = [run(sgd(0.1), bowl(noise=1.0), seed=seed).points for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    longer = run(sgd(0.1), bowl(noise=1.0), steps=30).points
    assert torch.equal(noisy[0], longer[:21])


def test_reports_divergence() -> None:
    path = run(sgd(1.0), steps=200)
    assert path.diverged and 2 < len(path.points) < 20 and path.updates_to_minimum() is None
    lines = table({"sgd": path}, {"sgd": 1.0})
    assert "diverged after" in lines[2] and "a smaller optimizer.lr" in lines[2]


def test_best_rate() -> None:
    assert best_rate(lambda lr: run(sgd(lr)), bowl()) == 0.33
    assert best_rate(lambda lr: run(sgd(lr), bowl(50.0), steps=60), bowl(50.0)) in (0.033, 0.039)  # 2 / 51
    with pytest.raises(ValueError, match="diverges"):
        best_rate(lambda lr: run(sgd(1e5), steps=50), bowl())
    assert len(RATES) == 72 and RATES[0] == 1e-4 and RATES[-1] == 82.0


def test_best_rate_keeps_the_path_in_the_window() -> None:
    def trial(lr: float) -> Trajectory:
        return run(sgd(lr, momentum=0.9), steps=60)

    small = replaced_window(bowl(), (-4.1, 1.0, -1.6, 1.6))
    rate = best_rate(trial, small)
    assert trial(rate).stays_in_the_plot(small) and not trial(best_rate(trial, bowl())).stays_in_the_plot(small)
    nowhere = replaced_window(bowl(), (-4.1, -3.9, 1.4, 1.6))
    assert best_rate(trial, nowhere) > 1e-3  # none stays, except those that hardly move


def test_optimum_is_the_fastest_on_quadratics() -> None:
    """Compares with the spectral radius of the heavy ball's iteration matrix over a grid, and with SGDW's average."""

    def build_average(lr: float, momentum: float) -> Any:
        return lambda params: SGDW(params, lr=lr, momentum=momentum, weight_decay=0.0)

    def radius(lr: float, momentum: float, least: float, largest: float) -> float:
        def of(curvature: float) -> float:
            matrix = np.array([[1 + momentum - lr * curvature, -momentum], [1, 0]])
            return float(abs(np.linalg.eigvals(matrix)).max())

        return max(of(least), of(largest))

    keys = {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "lr": 0.1}
    heavy_ball = Component("optimizer", SGD, keys)
    for least, largest in ((1.0, 100.0), (0.2, 3.0)):
        grid = [(float(lr), float(m)) for lr in np.geomspace(1e-3, 4, 90) for m in np.linspace(0, 0.98, 50)]
        both = optimum(heavy_ball, least, largest, fixed_momentum=False)
        assert both is not None
        assert (
            radius(both["lr"], both["momentum"], least, largest)
            < min(radius(lr, m, least, largest) for lr, m in grid) + 1e-6
        )
        for momentum in (0.0, 0.3, 0.95):
            fixed = optimum(heavy_ball.partial(momentum=momentum), least, largest, fixed_momentum=True)
            assert fixed is not None and list(fixed) == ["lr"]
            best = min(radius(lr, momentum, least, largest) for lr in np.geomspace(1e-3, 4, 400))
            assert radius(fixed["lr"], momentum, least, largest) < best + 1e-6
        average = optimum(Component("optimizer", SGDW, {**keys}), least, largest, fixed_momentum=False)
        assert average is not None
        function = bowl(largest / least)
        paths = [
            run(sgd(both["lr"] * least, both["momentum"]), function),
            run(build_average(average["lr"] * least, average["momentum"]), function),
        ]
        assert torch.allclose(paths[0].points, paths[1].points, rtol=1e-9, atol=1e-9)
    assert optimum(heavy_ball.partial(nesterov=True), 1, 2, fixed_momentum=False) is None
    assert optimum(Component("optimizer", Newton, {"lr": 1.0}), 1, 2, fixed_momentum=False) is None


def test_momentum_zigzags_wider_and_arrives_sooner_as_in_closed_form() -> None:
    """The lecture's picture: both characteristic roots of the heavy ball are equal in size, (A + B t) r^t."""
    valley = Quadratic(
        condition=100.0, angle=0.0, noise=0.0, batch_size=1, start=(-4.0, 0.5), window=(-5.0, 2.0, -2.2, 2.2)
    )
    lr, momentum = 4 / 121, (9 / 11) ** 2
    t = torch.arange(401, dtype=torch.float64)
    expected = []
    for start, curvature in ((-4.0, 1.0), (0.5, 100.0)):
        root = (1 + momentum - lr * curvature) / 2
        slope = start * (1 - lr * curvature) / root - start
        expected.append((start + slope * t) * root**t)
    path, slow = run(sgd(lr, momentum), valley, steps=400), run(sgd(2 / 101), valley, steps=400)
    assert torch.allclose(
        path.points, torch.stack(expected, 1), rtol=1e-5, atol=1e-9
    )  # a double root is ill-conditioned
    assert float(path.points[:, 1].abs().max()) == pytest.approx(1.8536, abs=1e-4)
    assert float(slow.points[:, 1].abs().max()) == 0.5
    assert (path.updates_to_minimum(), slow.updates_to_minimum()) == (48, 346)


def test_momentum_beats_gradient_descent_at_condition_100() -> None:
    valley = bowl(100.0)
    slow, fast = run(sgd(2 / 101), valley, steps=400), run(sgd(4 / 121, (9 / 11) ** 2), valley, steps=400)
    assert (slow.updates_to_minimum(), fast.updates_to_minimum()) == (346, 53)


def test_counts_samples_and_extends_the_frame() -> None:
    noisy = Quadratic(
        condition=2.0, angle=0.0, noise=0.1, batch_size=16, start=(-4.0, 1.5), window=(-5.0, 2.0, -2.2, 2.2)
    )
    path = run(sgd(0.1), noisy, steps=3)
    assert path.cost == [0, 16, 32, 48] and run(sgd(0.1), steps=1).cost == [0, 1]
    lines = table({"a": path}, {"a": 0.1})
    assert lines[0].split()[3] == "samples" and lines[2].split()[3] == "48"
    axes = draw_trajectories(noisy, {"a": path}, title="").axes
    assert axes[2].get_xlabel() == "samples evaluated" and axes[0].get_xlim() == (-5, 2)
    far = run(sgd(0.3, momentum=0.9))
    frame = draw_trajectories(bowl(), {"a": far}, title="").axes[0]
    assert frame.get_xlim()[1] > float(far.points[:, 0].max()) > 2


def test_table_remarks() -> None:
    paths, rates = {"a": run(sgd(0.39)), "b": run(sgd(0.01))}, {"a": 0.39, "b": None}
    lines, narrow = table(paths, rates), table(paths, rates, 60)
    assert "zigzags" in lines[2] and "search" in lines[3] and "minimum not reached: 0.78" in lines[3]
    assert {*lines.pop(1), *narrow.pop(1)} == {"─"}
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(lines).split())
    assert max(map(len, narrow)) <= 60 and narrow[-2:] == [
        "updates and evaluations until the distance to a minimum",
        "stays below 0.001 of the initial distance",
    ]


@pytest.mark.filterwarnings("error")
def test_plots_a_path_that_starts_at_the_minimum() -> None:
    function = bowl()
    function.start = (0.0, 0.0)
    path = run(sgd(0.1), function, steps=3)
    assert path.distances.max() == 0
    draw_trajectories(function, {"still": path}, title="").canvas.draw()


def test_marks_the_start_of_every_path() -> None:
    other = bowl()
    other.start = (1.0, -1.0)
    starts = [list(bowl().start), [1.0, -1.0]]
    paths = {"a": run(sgd(0.1)), "b": run(sgd(0.2)), "c": run(sgd(0.1), other)}
    plane = draw_trajectories(bowl(), paths, title="").axes[0]
    circles = [line for line in plane.lines if line.get_markersize() == 11]
    assert [[float(line.get_xdata()[0]), float(line.get_ydata()[0])] for line in circles] == starts


def test_leaves_out_the_panel_of_evaluations_if_every_update_takes_one() -> None:
    figure = draw_trajectories(bowl(), {"slow": run(sgd(0.1)), "fast": run(sgd(1 / 3))}, title="Paths")
    assert [axes.get_xlabel()[:7] for axes in figure.axes] == ["x   (ci", "updates"]


def test_plots_trajectories_in_three_panels(tmp_path: Path) -> None:
    slow = run(sgd(0.1))
    paths = {"slow": replace(slow, evaluations=[2 * each for each in slow.evaluations]), "fast": run(sgd(1 / 3))}
    figure = draw_trajectories(bowl(), paths, title="Paths", subtitle="steps=20")
    plane, updates, evaluations = figure.axes
    for axes in (updates, evaluations):
        assert len(axes.lines) == 2 and axes.get_yscale() == "log"
    drawn = [line for line in plane.lines if line.get_label() in paths]
    assert [len(line.get_xdata()) for line in drawn] == [21, 21]
    assert len({line.get_color() for line in drawn}) == 2
    assert plane.get_xlim() == (-5, 2) and plane.get_xlabel().startswith("x")
    figure.savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50


@pytest.mark.slow
def test_animation_has_a_frame_per_update(tmp_path: Path) -> None:
    target = tmp_path / "paths.gif"
    animate(bowl(), {"a": run(sgd(0.1), steps=4)}, target, title="quadratic")
    with Image.open(target) as film:
        assert getattr(film, "n_frames", 1) >= 5


def test_a_matplotlibrc_names_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib reads the one of the current folder."""
    for name in ("ffmpeg", "evil"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/{name}.words\nexec cat >/dev/null\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = {"animation.ffmpeg_path": str(tmp_path / "evil"), "animation.ffmpeg_args": ["-evil"]}
    with matplotlib.rc_context(names):
        animate(bowl(), {"a": run(sgd(0.1), steps=1)}, tmp_path / "paths.mp4", title="x")
    assert not (tmp_path / "evil.words").exists()
    assert "-evil" not in (tmp_path / "ffmpeg.words").read_text().split()


def test_schedule_free_methods_use_averaged_weights() -> None:
    schedule_free = pytest.importorskip("dlopt.optim.schedule_free")

    def build(params: Sequence[torch.nn.Parameter]) -> Optimizer:
        result: Optimizer = schedule_free.ScheduleFreeSGD(params, lr=0.3)
        return result

    path = run(build, bowl(noise=1.0), steps=200)
    rough = run(sgd(0.3), bowl(noise=1.0), steps=200)
    assert float(path.distances[-50:].mean()) < 0.5 * float(rough.distances[-50:].mean())
