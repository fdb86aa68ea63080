"""`from=RUN` composes to the run's config, whatever it was, and to what is typed on top."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.inherit import inherit
from dlopt.config.resolve import choices_of, to_plain
from dlopt.run.record import describe
from tests.support.line import SMALL, dlopt, only, refused

RUN = (
    "optimizer=adamw", "optimizer.lr=0.02", "model=mlp", "model.widths=[4,8]", "seed=3", "ema=0.99", "order_seed=7",
    "schedule=step", "clip=norm", "name='it''s'", 'optimizer.groups=[{match: "head.*", lr: 10}]',
)  # fmt: skip


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


def compose(composer: Composer, lines: list[str]) -> dict[str, Any]:
    return to_plain(composer.compose(lines))[1]


def save(composer: Composer, folder: Path, lines: list[str]) -> dict[str, Any]:
    """The folder that a run of this command line has."""
    saved = compose(composer, lines)
    describe(folder, saved, lines, choices_of(composer.compose(lines)))
    return saved


@pytest.mark.parametrize(
    "typed",
    [
        [],
        [*RUN[:-2], RUN[-1], 'name="it\'s, [odd] größe\\\\"'],
        ["experiment=resnet20_cifar10_short", "seed=2"],
        ["optimizer=gradient_descent", "data.subset=40"],
        ["data=custom", "data.train._target_=torch.nn.Linear", "+data.train.in_features=3", "data.val=null"],
        ["optimizer.lr=1e-7", "max_time=5", "init_seed=9", "compile=auto", "schedule_epochs=2.5"],
    ],
)
def test_reproduces_the_config(composer: Composer, tmp_path: Path, typed: list[str]) -> None:
    saved = save(composer, tmp_path, typed)
    assert compose(composer, inherit(composer, [f"from={tmp_path}"])) == saved
    assert compose(composer, inherit(composer, [f"from={tmp_path}/config.yaml"])) == saved


def test_command_line_overrides_and_derived_seeds_follow(composer: Composer, tmp_path: Path) -> None:
    saved = save(composer, tmp_path, ["optimizer.lr=0.02", "seed=3", "order_seed=7"])
    found = compose(composer, inherit(composer, ["optimizer.lr=0.5", f"from={tmp_path}", "seed=4"]))
    expected = {"seed": 4, "init_seed": 4, "augmentation_seed": 4, "order_seed": 7}
    assert found == {
        **saved, **expected, "optimizer": {**saved["optimizer"], "lr": 0.5}, "data": {**saved["data"], "split_seed": 4}
    }  # fmt: skip


def test_new_choice_replaces_its_group(composer: Composer, tmp_path: Path) -> None:
    saved = save(composer, tmp_path, ["optimizer.lr=0.02", "model=mlp", "epochs=2"])
    found = compose(composer, inherit(composer, [f"from={tmp_path}", "optimizer=adamw"]))
    assert found["optimizer"] == compose(composer, ["optimizer=adamw"])["optimizer"]
    assert found["model"] == saved["model"] and found["epochs"] == 2


def test_keeps_environment_interpolations(composer: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_ROOT", "/data/secret")
    save(composer, tmp_path, ["data=image_folder", "data.root=${oc.env:MY_ROOT}"])
    lines = inherit(composer, [f"from={tmp_path}"])
    assert "secret" not in " ".join(lines)
    plain, saved = to_plain(composer.compose(lines))
    assert plain["data"]["root"] == "/data/secret" and saved["data"]["root"] == "${oc.env:MY_ROOT}"


def test_resume_is_not_inherited(composer: Composer, tmp_path: Path) -> None:
    save(composer, tmp_path, ["resume=auto", "epochs=3"])
    found = compose(composer, inherit(composer, [f"from={tmp_path}"]))
    assert found["resume"] is None and found["epochs"] == 3


def test_returns_overrides_unchanged_without_from(composer: Composer) -> None:
    assert inherit(composer, ["seed=1,2"]) == ["seed=1,2"]


def test_rejects_manipulated_files(composer: Composer, tmp_path: Path) -> None:
    saved = save(composer, tmp_path, ["model=mlp"])
    for changed, message in (
        ({"allow_packages": ["os"]}, "its config names callables of os; to trust them, set allow_packages=[os]"),
        ({"model": {**saved["model"], "_target_": "os.system"}}, "only callables of dlopt"),
        ({"hydra": {"job": {"env_set": {"X": "1"}}}}, "the invalid key 'hydra.job.env_set.X'"),
        ({"+hydra.job.env_set.X": "1"}, "invalid key"),
        ({"hydra/launcher": "odd"}, "invalid key"),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**saved, **changed}))
        assert message in refused(tmp_path, "train", f"from={tmp_path}")
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.system ['touch x']")
    assert "no readable config.yaml" in refused(tmp_path, "train", f"from={tmp_path}")


def test_mistakes_are_named(composer: Composer, tmp_path: Path) -> None:
    def message(*typed: str) -> str:
        with pytest.raises(UserError) as caught:
            inherit(composer, list(typed))
        return str(caught.value)

    save(composer, tmp_path / "run", [])
    assert "no readable config.yaml" in message(f"from={tmp_path}")
    assert "must be the folder of one run" in message("from=a,b")
    assert "must be the folder of one run" in message("from=a", "from=b")
    assert "experiment=resnet20_cifar10: a run's config is complete" in message(
        f"from={tmp_path}/run", "experiment=resnet20_cifar10"
    )
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    environment["choices"]["optimizer"] = "mine"
    (tmp_path / "run/environment.json").write_text(json.dumps(environment))
    assert "its choice optimizer=mine was not found; add the --config-dir" in message(f"from={tmp_path}/run")
    (tmp_path / "run/environment.json").write_text("{")
    assert "environment.json" in message(f"from={tmp_path}/run")


def test_inherits_from_an_inherited_run(tmp_path: Path) -> None:
    line = ["train", *SMALL, "tracking=[]", "optimizer=adamw", "optimizer.lr=0.02", "seed=5", "hydra.run.dir=first"]
    assert dlopt(tmp_path, *line).code == 0
    assert dlopt(tmp_path, "train", "from=first", "hydra.run.dir=second").code == 0
    assert dlopt(tmp_path, "train", "from=second", "optimizer.lr=0.01", "name=third").code == 0
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("first", "second"))

    def losses(text: str) -> list[Any]:
        return [json.loads(line)["val_loss"] for line in text.splitlines()]

    assert losses(first) == losses(second)
    third = yaml.safe_load((only(tmp_path, "outputs/third/*") / "config.yaml").read_text())
    saved = yaml.safe_load((tmp_path / "first/config.yaml").read_text())
    expected = {**saved, "name": "third", "optimizer": {**saved["optimizer"], "lr": 0.01}, "run_id": third["run_id"]}
    assert third == expected and third["run_id"] != saved["run_id"]


def test_axes_of_a_sweep_replace_what_the_run_sets(composer: Composer, tmp_path: Path) -> None:
    save(composer, tmp_path, [*RUN[:-2]])
    rates = "rates=zip(optimizer=[sgd,lion],optimizer.lr=[0.1,1e-4])"
    lines = inherit(composer, [f"from={tmp_path}", rates, "seeds=2"])
    assert lines[-2:] == [rates, "seeds=2"] and "model=mlp" in lines
    assert not any(line.startswith(("optimizer=", "optimizer.", "seed=")) for line in lines)
    assert "optimizer=adamw" not in inherit(composer, [f"from={tmp_path}", "optimizer=sgd,lion", "space=benchmark"])
    with pytest.raises(UserError, match="with space=, type optimizer= as well"):
        inherit(composer, [f"from={tmp_path}", "space=benchmark"])
