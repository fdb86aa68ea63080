"""`threshold=` of `dlopt eval`, the decision that `predict`, `export` and `dlopt.load` apply, and `columns=`."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dlopt as package
from dlopt.basics.errors import UserError
from dlopt.trained.decision import decision_of
from tests.support.line import dlopt, refused
from tests.support.ranks import run_ranks

LINE = ("data=table", "data.file=churn.csv", "data.target=churn", "data.ignore=[id]", "model=mlp", "model.widths=[8]")
SHORT = ("epochs=3", "threads=1", "device=cpu", "precision=fp64", "tracking=[]", "checkpoint.keep=3")
BEST = "run/checkpoints/best.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table of which 30 % are yes, its decision for a recall of 0.8, and the rows of its test set."""
    folder, draws = tmp_path_factory.mktemp("churn"), np.random.default_rng(0)
    usage = draws.normal(size=(600, 3)).round(2)
    score = usage @ [1.0, -1.0, 0.5] + draws.normal(size=600)
    part = np.where(np.arange(600) % 3, "train", np.where(np.arange(600) % 2, "val", "test"))
    label = np.where(score > np.quantile(score, 0.7), "yes", "no")
    rows = [(f"C{n:03}", *usage[n].tolist(), part[n], label[n]) for n in range(600)]
    names = ("id", "calls", "months", "bill", "part", "churn")
    for file, shown in (("churn.csv", rows), ("test.csv", [row for row in rows if row[4] == "test"])):
        with (folder / file).open("w", newline="") as opened:
            csv.writer(opened).writerows([names, *shown])
    for line in (
        ("train", *LINE, *SHORT, "data.split_column=part", "hydra.run.dir=run"),
        ("eval", "run", "threshold=recall:0.8"),
    ):
        result = dlopt(folder, *line)
        assert result.code == 0, result.err
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "moved")


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run/checkpoints/decision.json").read_text())
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_predictions_are_those_that_the_decision_was_reported_with(folder: Path) -> None:
    """In a folder that was moved: from the command in two processes, from Python, and in the metadata of an export."""
    result = dlopt(folder, "predict", "run", "file=test.csv", "probabilities=all", "batch_size=7")
    decision = kept(folder)
    text = f"yes from a probability of {decision['threshold']:.4f} on (recall:0.8 on 100 validation samples), "
    assert result.err.startswith(f"dlopt: decided by decision.json: {text}temperature {decision['temperature']:.4f}\n")
    rows = rows_of(folder / "predictions.csv")
    assert {row["prediction"] for row in rows} == {"no", "yes"}
    for row in rows:
        assert row["prediction"] == ("yes" if float(row["p(yes)"]) >= decision["threshold"] else "no")
        assert row["probability"] == row[f"p({row['prediction']})"]
    found = [row["churn"] for row in rows if row["prediction"] == "yes"]
    after, before = decision["test_after"], decision["test_before"]
    assert found.count("yes") / len(found) == pytest.approx(after["precision"])
    assert found.count("yes") / [row["churn"] for row in rows].count("yes") == pytest.approx(after["recall"])
    right = [row["churn"] == row["prediction"] for row in rows]
    assert sum(right) / len(rows) == pytest.approx(after["accuracy"]) != before["accuracy"]
    losses = [-np.log(float(row[f"p({row['churn']})"])) for row in rows]
    assert np.mean(losses) == pytest.approx(after["log_loss"], rel=1e-6)
    assert before["log_loss"] == json.loads((folder / "run/eval.json").read_text())["test_log_loss"]

    line = ["predict", "run", "file=test.csv", "columns=[id]", "output=two.csv"]
    run_ranks("tests.support.ranks:run_command", 2, folder / "store", str(folder), *line)
    assert [*rows_of(folder / "two.csv")[0]] == ["id", "prediction", "probability"]
    for row, two in zip(rows, rows_of(folder / "two.csv"), strict=True):
        assert (row["id"], row["prediction"]) == (two["id"], two["prediction"])
    for row, each in zip(rows, package.load(folder / "run").predict(rows), strict=True):
        assert row["prediction"] == each.label
        assert float(row["probability"]) == pytest.approx(each.probability)

    assert dlopt(folder, "export", "run", "format=safetensors", "output=model").code == 0
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["decision"]) == decision


def test_a_decision_belongs_to_one_checkpoint(folder: Path) -> None:
    name = min(path.name for path in folder.glob("run/checkpoints/step-*.pt"))
    other = f"checkpoint=run/checkpoints/{name}"
    for line in (("predict", other, "file=test.csv"), ("export", other, "format=safetensors")):
        assert refused(folder, *line) == (
            f"dlopt: run/checkpoints/decision.json: was chosen for best.pt, not for {name}; choose again: dlopt eval "
            f"{other} threshold=recall:0.8; or remove the file\n"
        )
    with pytest.raises(UserError, match=f"was chosen for best.pt, not for {name}"):
        package.load(folder / f"run/checkpoints/{name}")
    result = dlopt(folder, "eval", other, "output=out")
    assert result.code == 0
    assert "run/checkpoints/decision.json: is for `predict` and `export`; this test does not apply it" in result.out
    # Another model under the same name.
    for suffix in ("", ".sha256"):
        content = (folder / f"run/checkpoints/{name}{suffix}").read_bytes()
        (folder / f"{BEST}{suffix}").write_bytes(content.replace(name.encode(), b"best.pt") if suffix else content)
    assert "was chosen for an earlier best.pt; choose again" in refused(folder, "predict", "run", "file=test.csv")
    # The file of the other checkpoint is the same file now.
    before = kept(folder)
    assert dlopt(folder, "eval", "run", "threshold=most_probable").code == 0
    assert (kept(folder)["threshold"], before["threshold"] is None) == (None, False)
    for checkpoint in ("run", f"run/checkpoints/{name}"):
        assert dlopt(folder, "predict", checkpoint, "file=test.csv").code == 0
    assert [*kept(folder)["test_after"]] == ["accuracy", "log_loss", "calibration_error"]
    (folder / "run/checkpoints/decision.json").unlink()
    assert dlopt(folder, "predict", "run", "file=test.csv").err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "is damaged: temperature: Input should be greater than 0"),
        ({"threshold": 1.5}, "is damaged: threshold: Input should be less than or equal to 1"),
        ({"threshold": "0.5"}, "is damaged: threshold: Input should be a valid number"),
        ({"positive": 7}, "is damaged: positive: Input should be 1"),
        ({"rule": "; rm -r"}, "is damaged: must be f1, recall:R"),
        ({"format": 2}, "written by another version of dlopt"),
        ({"sha256": "0" * 64, "checkpoint": "\x1b[2J.pt"}, "was chosen for \ufffd[2J.pt, not for best.pt"),
    ],
)
def test_a_damaged_decision_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    file = folder / "run/checkpoints/decision.json"
    file.write_text(json.dumps({**kept(folder), **change}))
    with pytest.raises(UserError) as error:
        decision_of(folder / BEST)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["threshold=f2"], "threshold=f2: must be f1, recall:R with 0 < R <= 1 (recall:0.9), or most_probable"),
        (["threshold=f1", "init_from=w.pt"], "init_from and"),
        (["threshold=recall:0"], "threshold=recall:0: must be f1, recall:R"),
        (["threshold=recall:most"], "threshold=recall:most: must be f1, recall:R"),
        (["threshold=f1", "tta=flip"], "threshold with tta: only one of them may be set"),
        (["threshold=f1", "split=val"], "threshold with split: only one of them may be set"),
    ],
)
def test_what_cannot_be_decided_is_refused(folder: Path, line: list[str], message: str) -> None:
    before = kept(folder)
    assert message in refused(folder, "eval", "run", *line)
    assert kept(folder) == before


def test_other_models_have_no_decision(folder: Path) -> None:
    """More than two classes have a temperature alone."""
    small = ("data.subset=60", "epochs=1", "threads=1", "device=cpu", "tracking=[]", "model=mlp", "model.widths=[4]")
    for name, line in (
        ("digits", ("data=digits",)),
        ("squared", ("data=breast_cancer", "loss=mse")),
        ("values", ("data=diabetes", "loss=mse")),
        ("unvalidated", ("data=breast_cancer", "data.val_split=0")),
        ("untested", ("data=breast_cancer", "data.test_split=0")),
    ):
        assert dlopt(folder, "train", *line, *small, f"hydra.run.dir={name}").code == 0
    assert "threshold=f1: needs two classes, the data have 10; use threshold=most_probable" in refused(
        folder, "eval", "digits", "threshold=f1"
    )
    for name, message in (
        ("squared", "the model was trained with a squared error, whose outputs are no logits"),
        ("values", "only a classification has a decision, not a task of the kind regression"),
        ("unvalidated", "is chosen on the validation set, which data=breast_cancer lacks; train with data.val_split"),
        ("untested", "needs a test set to report on, which data=breast_cancer lacks; train with data.test_split"),
    ):
        assert f"threshold=f1: {message}" in refused(folder, "eval", name, "threshold=f1")
    result = dlopt(folder, "eval", "digits", "threshold=most_probable")
    assert result.code == 0 and "decision: the most probable class (most_probable on " in result.out
    found = json.loads((folder / "digits/checkpoints/decision.json").read_text())
    assert found["test_after"]["accuracy"] == found["test_before"]["accuracy"]
    assert found["temperature"] != 1.0
    # Of another kind of model.
    for name, message in (("values", "only a classification has"), ("digits", "needs two classes, the data have 10")):
        checkpoint = folder / name / "checkpoints/best.pt"
        digest = checkpoint.with_name("best.pt.sha256").read_text().split()[0]
        checkpoint.with_name("decision.json").write_text(json.dumps({**found, "sha256": digest, "threshold": 0.5}))
        assert f"decision.json: {message}" in refused(folder, "predict", name, "images=.")


def test_columns_of_the_table_in_the_output(folder: Path) -> None:
    (folder / "run/checkpoints/decision.json").unlink()
    for typed, names in (("[churn,id]", ["churn", "id"]), ("[]", []), ("id", ["id"])):
        for output in ("out.csv", "out.parquet"):
            result = dlopt(folder, "predict", "run", "file=test.csv", f"columns={typed}", f"output={output}")
            assert (result.code, result.err) == (0, "")
        assert [*rows_of(folder / "out.csv")[0]] == [*names, "prediction", "probability"]
        from pyarrow import parquet

        found = parquet.read_table(folder / "out.parquet")
        assert found.column_names == [*names, "prediction", "probability"] and len(found) == 100
        assert found.select(names).to_pylist() == [{n: r[n] for n in names} for r in rows_of(folder / "test.csv")]
    for typed, message in (
        ("columns=[ids]", "columns: 'ids': unknown column; did you mean id?"),
        ("columns=[id,id]", "columns: 'id' is listed twice"),
        ("images=.", "columns: needs file=FILE"),
    ):
        line = [typed, "columns=[id]"] if typed == "images=." else ["file=test.csv", typed]
        assert message in refused(folder, "predict", "run", *line)
