"""`dlopt trajectory function=...`: optimizer paths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dlopt.config.choices import extensions
from dlopt.lab.trajectory.command import trajectory
from dlopt.lab.trajectory.paths import Trajectory
from dlopt.results import drawing
from tests.support.choices import names
from tests.support.line import dlopt, refused, run

MUON = {"muon", "dmuon"}
OPTIMIZERS = [name for name in names("optimizer") if name not in MUON]
VARIED = {"adamw", "lbfgs", "newton", "rprop", "sam", "schedule_free_adamw"}
FRESH = {"shampoo": ["optimizer.update_every=1"]}  # inverse roots of the first gradient fit few of 15 steps


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Arguments of the plot, which is not drawn."""
    arguments: dict[str, Any] = {}

    def draw(function: Any, paths: Mapping[str, Trajectory], **words: Any) -> None:
        arguments.update(words, function=function, paths=dict(paths))

    monkeypatch.setattr("dlopt.lab.trajectory.paths.draw_trajectories", draw)
    monkeypatch.setattr(drawing, "save", lambda figure, folder, name: [folder / f"{name}.png"])
    monkeypatch.chdir(tmp_path)
    return arguments


@pytest.mark.drawn
def test_documented_example(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "trajectory", "function=quadratic", "optimizer=momentum,newton", "output=x")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["path", "lr", "updates", "evaluations", "distance"]
    assert {*lines[1]} == {"─"} and lines[2].startswith("momentum, lr ") and lines[3].startswith("newton  ")
    assert lines[-2:] == ["x/paths.png", "x/paths.svg"]
    assert all((tmp_path / path).stat().st_size > 10_000 for path in lines[-2:])


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=() if name in VARIED else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_every_optimizer_approaches_the_minimum(drawn: dict[str, Any], optimizer: str) -> None:
    more = FRESH.get(optimizer, [])
    assert trajectory(["function=quadratic", "function.condition=5", f"optimizer={optimizer}", "steps=15", *more]) == 0
    [path] = drawn["paths"].values()
    assert len(path.points) == 16
    assert float(path.distances[-1]) < 0.5 * float(path.distances[0])


def test_passes_keys_to_function_optimizer_and_schedule(drawn: dict[str, Any]) -> None:
    typed = "function=quadratic function.condition=9 optimizer=gradient_descent optimizer.lr=0.1,0.2 schedule=constant"
    assert trajectory([*typed.split(), "function.start=[1,1]", "steps=1"]) == 0
    assert [path.points[1].tolist() for path in drawn["paths"].values()] == [
        pytest.approx([0.9, 0.1]),
        pytest.approx([0.8, -0.8]),
    ]
    assert list(drawn["paths"]) == ["lr=0.1", "lr=0.2"]
    assert drawn["title"] == "Paths on quadratic (condition number 9)" and "function.start=[1,1]" in drawn["subtitle"]
    assert not {"function.condition=9", "steps=1"} & {*drawn["subtitle"].split()}  # the title and the axis show them


def test_weight_decay_is_off_by_default(drawn: dict[str, Any]) -> None:
    line = ["function=himmelblau", "optimizer=sgdw", "optimizer.lr=0.01", "optimizer.momentum=0", "steps=1"]
    ends = []
    for more in ([], ["optimizer.weight_decay=0"], ["optimizer.weight_decay=0.5"]):
        assert trajectory([*line, *more]) == 0
        [path] = drawn["paths"].values()
        ends.append(path.points[1].tolist())
    assert ends[0] == ends[1] != ends[2]


def test_several_batch_sizes_and_skipped_keys(drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = "function=digits function.batch_size=1,full optimizer=gradient_descent optimizer.lr=1 steps=30"
    assert trajectory(line.split()) == 0
    single, full = drawn["paths"].values()
    assert list(drawn["paths"]) == ["batch_size=1", "batch_size=full"]
    assert single.reversal_fraction() > 0.2 > full.reversal_fraction() == 0
    assert trajectory(["function=quadratic", "optimizer=adam,momentum", "optimizer.betas=[0.5,0.9]", "steps=2"]) == 0
    assert "optimizer.betas: ignored for momentum (no such key)" in capsys.readouterr().out


def test_reports_how_learning_rates_were_chosen(drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = "function=quadratic optimizer=gradient_descent,momentum,adam steps=60"
    assert trajectory(line.split()) == 0
    descent, momentum, adam = drawn["paths"]
    assert descent == "gradient_descent, lr 0.0198" and momentum == "momentum, lr 0.1, momentum 0.669"
    assert adam.startswith("adam, lr ") and drawn["paths"][momentum].updates_to_minimum() == 48
    out = capsys.readouterr().out
    assert "Polyak 1964" in out and "2 / (L + mu)" in out and "whose path stays in the picture" in out
    assert all(path.stays_in_the_plot(drawn["function"]) for path in drawn["paths"].values())
    assert trajectory([*line.split(), "optimizer.momentum=0.9", "optimizer.lr=0.1"]) == 0
    assert "closed form" not in capsys.readouterr().out
    assert trajectory(["function=saddle", "optimizer=newton_undamped", "function.start=[-1.5,0.1]"]) == 0
    [saddle] = drawn["paths"].values()
    assert float(saddle.points[-1].norm()) < 1e-9


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("function=quad", "did you mean function=quadratic?"),
        ("function=quadratic function.condition=-1", "function.condition=-1: input should be greater than 0"),
        ("function=quadratic function.condition=5,50", "one plot shows one function"),
        ("function=quadratic,beale", "one plot shows one function"),
        ("function=quadratic steps=1,2", "one value is needed, the same for all paths"),
        ("function=quadratic stps=3", "stps=3: unknown key of optimizer paths; did you mean steps?"),
        ("function=quadratic model=mlp", "model=mlp: unknown key of optimizer paths; "),
        ("function=quadratic animation=avi", "animation=avi: "),
        ("function=quadratic steps=0", "steps=0: "),
        ("function=quadratic steps=1000000000000", "allowed: an integer >= 1 and <= 100000"),
        ("function=quadratic optimizer.lr=range(1,10)", "9 curves; at most 7"),
        ("function=quadratic optimizer=dmuon", "optimizer=dmuon: orthogonalizes matrices, not vectors; use function="),
        ("function=matrix animation=gif", "animation=gif: only for functions of two variables"),
        ("function=matrix function.curvatures=[1,2]", "one for each of function.curvatures=[1.0, 2.0] is needed"),
        ("function=quadratic optimizer=adamm", "did you mean optimizer=adam?"),
        ("function=quadratic allow_packages=[os] function._target_=os.system", "function._target_=os.system"),
    ],
)
def test_refused(tmp_path: Path, typed: str, message: str) -> None:
    assert message in refused(tmp_path, "trajectory", *typed.split())


def test_help_lists_all_functions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trajectory --help") == 0
    text = capsys.readouterr().out
    assert all(path.stem in text for path in (extensions()["dlopt.lab"] / "function").glob("*.yaml"))


def test_shows_the_search_for_a_learning_rate_in_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert trajectory(["function=beale", "optimizer=momentum", "steps=2"]) == 0
    shown = capsys.readouterr().err
    assert "\rmomentum: learning rate 2 of at most 24\033[K" in shown and shown.endswith("\r\033[K")
