"""`dlopt trajectory schedule=...`: learning-rate curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.lab.trajectory.command import trajectory
from dlopt.lab.trajectory.learning_rates import Curve
from dlopt.results import drawing
from tests.support.line import run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Arguments of the plot, which is not drawn."""
    arguments: dict[str, Any] = {}

    def draw(curves: Sequence[Curve], **words: Any) -> None:
        arguments.update(words, curves={each.label: each for each in curves})

    monkeypatch.setattr("dlopt.lab.trajectory.learning_rates.draw_schedules", draw)
    monkeypatch.setattr(drawing, "save", lambda figure, folder, name: [folder / f"{name}.png"])
    monkeypatch.chdir(tmp_path)
    return arguments


def test_one_curve_per_schedule(drawn: dict[str, Any]) -> None:
    typed = "schedule=linear,time_decay epochs=4 schedule.warmup_epochs=1 steps_per_epoch=2 optimizer.lr=0.6 log_y=true"
    assert trajectory(typed.split()) == 0
    linear, decay = drawn["curves"]["linear"], drawn["curves"]["time_decay"]
    ramp = [0.6 / 3, 0.6 * 2 / 3]
    assert linear.epochs == decay.epochs == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert linear.rates == pytest.approx([*ramp, *(0.6 * (1 - i / 6) for i in range(6)), 0.1])
    assert decay.rates[:-1] == pytest.approx([*ramp, *(0.6 / (1 + 0.1 * i / 2) for i in range(6))])
    assert drawn["title"] == "Learning-rate schedules over 4 epochs" and drawn["log_y"] is True
    assert drawn["steps_per_epoch"] == 2 and "schedule.warmup_epochs=1" in drawn["subtitle"]


def test_default_schedule_and_folder(drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert trajectory(["steps=50"]) == 0
    assert list(drawn["curves"]) == ["cosine_warmup"] and drawn["curves"]["cosine_warmup"].epochs[-1] == 0.5
    path = Path(capsys.readouterr().out.strip())
    assert path.name == "learning_rates.png" and path.parent.parent == Path("outputs/trajectory")
    assert path.parent.is_dir()


def test_several_values_and_skipped_keys(drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert trajectory(["schedule=constant,step", "schedule.gamma=0.1,0.5", "epochs=2", "output=x"]) == 0
    assert list(drawn["curves"]) == ["constant", "step, gamma=0.1", "step, gamma=0.5"]
    assert capsys.readouterr().out.splitlines() == [
        "x/learning_rates.png",
        "schedule.gamma: ignored for constant (no such key)",
    ]
    last = {label: each.rates[-1] / each.rates[0] for label, each in drawn["curves"].items()}
    assert last == pytest.approx({"constant": 1, "step, gamma=0.1": 1e-3, "step, gamma=0.5": 0.125})


def test_glob_matches_choices_but_not_fragments(drawn: dict[str, Any], conf_dir: Path) -> None:
    assert trajectory(["schedule=glob(c*)", "schedule.warmup_fraction=0.5", "epochs=1"]) == 0
    names = {path.stem for path in (conf_dir / "schedule").glob("c*.yaml")} - {"custom"}
    assert set(drawn["curves"]) == names and len(names) > 3
    assert trajectory(["schedule=glob([_w*,pl*])", "epochs=1"]) == 0
    assert list(drawn["curves"]) == ["plateau (without improvement)"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("schedule=cosin,step", "did you mean schedule=cosine?"),
        ("schedule=_warmup", "schedule"),
        ("schedule=step,cosine schedule.gama=1", "schedule.gama"),
        ("schedule=step,cosine schedule.gamma=2", "schedule.gamma=2"),
        ("schedule=step schedule.warmup_epochs=9 epochs=3", "longer than the training"),
        ("steps_per_epoch=0", "steps_per_epoch=0: "),
        ("log_y=1", "log_y=1: "),
        ("output=a,b", "output=a,b: one value is needed"),
        ("scale_lr=linear", "scale_lr=linear: "),
        ("optimizer.lr=range(1,40)", "39 curves; at most 28"),
    ],
)
def test_refused_before_writing(drawn: dict[str, Any], typed: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        trajectory(typed.split())
    assert not list(Path().iterdir())


def test_output_folder_cannot_be_created(drawn: dict[str, Any]) -> None:
    Path("file").touch()
    with pytest.raises(UserError, match="output=file/x: cannot create this folder: Not a directory"):
        trajectory(["output=file/x"])


def test_help_lists_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trajectory --help") == 0
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in ("steps_per_epoch", "log_y", "output"))
