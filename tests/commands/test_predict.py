"""`dlopt predict`: predictions and unreadable files."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.basics.files import write
from dlopt.config.parsing import parse
from dlopt.trained.restore import restore
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.checkpoints import load
from tests.support.line import dlopt, entries, refused
from tests.support.ranks import run_ranks

CHECKPOINT = "run/checkpoints/best.pt"
RESIZED = "of 20 images: 20 resized and cropped to the centre, from 10x14 to 8x8 (height x width)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 10x14 images, resized to 8x8 and cropped to 6x6."""
    folder = tmp_path_factory.mktemp("trained")
    draws = np.random.default_rng(0)
    for label, low in (("bright, very", 120), ("dark", 0)):
        (folder / "data/train" / label).mkdir(parents=True)
        for i in range(10):
            pixels = draws.integers(low, low + 130, (10, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data/train" / label / f"{i}.png")
    line = ["data=image_folder", "data.root=data", "data.image_size=8", "data.batch_size=4", "augmentation=imagenet"]
    line += ["augmentation.operations.0.short_side=[8,9]", "augmentation.operations.0.size=6"]
    line += ["model=mlp", "model.widths=[8]", "epochs=3", "threads=1", "device=cpu", "hydra.run.dir=run"]
    result = dlopt(folder, "train", *line)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def workdir(trained: Path, tmp_path: Path) -> Path:
    """The checkpoint and images, without the training data."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "data/train", tmp_path / "images")
    return tmp_path


def table(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


def test_predictions_match_the_model(workdir: Path, trained: Path) -> None:
    (workdir / "images/dark/.thumbnails").mkdir()
    shutil.copy(workdir / "images/dark/0.png", workdir / "images/dark/.thumbnails")
    (workdir / "images/dark/up").symlink_to("..")
    result = dlopt(workdir, "predict", f"checkpoint={CHECKPOINT}", "images=images", "batch_size=7")
    assert (result.code, result.err) == (0, f"dlopt: {RESIZED}\n")
    assert result.out == "20 images classified: predictions.csv\n"
    head, rows = table(workdir / "predictions.csv")
    assert head == ["image", "class", "probability", "p(bright, very)", "p(dark)"]
    assert [row[0] for row in rows] == sorted(str(path.relative_to(workdir)) for path in workdir.glob("images/*/*.png"))

    checkpoint = load(workdir / CHECKPOINT)
    checkpoint.config["data"]["root"] = str(trained / "data")
    checkpoint.config["data"]["val_split"] = 0.0
    workload = build_workload(parse(checkpoint.config), checkpoint)
    workload.module.load_state_dict(checkpoint.model)
    workload.module.eval()
    images = workload.dataset.train.fetch(torch.arange(20))[:, :, 1:7, 1:7]
    with torch.no_grad():
        expected = workload.module(workload.normalize(images)).softmax(1)
    probabilities = np.array([[float(cell) for cell in row[3:]] for row in rows])
    np.testing.assert_allclose(probabilities, expected.numpy(), rtol=1e-4)
    assert [row[1] for row in rows] == [["bright, very", "dark"][i] for i in expected.argmax(1)]
    assert {row[1] for row in rows} == {"bright, very", "dark"}
    assert [float(row[2]) for row in rows] == probabilities.max(1).tolist()


def test_processes_divide_the_images(workdir: Path) -> None:
    """Into one file in the same order; rank 0 reports all unreadable files."""
    for number in (0, 7):
        (workdir / f"images/dark/{number}.png").write_bytes(b"damaged")
    line = ["predict", f"checkpoint={CHECKPOINT}", "images=images", "batch_size=5", "precision=fp64"]
    one = dlopt(workdir, *line, "output=one.csv")
    assert one.code == 0
    first, *others = run_ranks(
        "tests.support.ranks:run_command", 3, workdir / "store", str(workdir), *line, "output=three.csv"
    )
    assert others == ["", ""]
    assert sorted(first.splitlines()) == sorted((one.err + one.out.replace("one", "three")).splitlines())
    (head, rows), (other, expected) = table(workdir / "three.csv"), table(workdir / "one.csv")
    assert head == other and [row[:2] for row in rows] == [row[:2] for row in expected]
    # Batches of another size round otherwise.
    assert np.array([row[2:] for row in rows], float) == pytest.approx(np.array([row[2:] for row in expected], float))
    assert not [path for path in workdir.iterdir() if path.suffix not in (".csv", "")]


def test_files_that_are_left_out_are_counted(workdir: Path) -> None:
    shutil.copy(workdir / "images/dark/0.png", workdir / "images/dark/0.heic")
    (workdir / "images/notes.txt").write_text("")
    shutil.move(workdir / "images/dark/1.png", workdir / "images/dark/1.JFIF")
    result = dlopt(workdir, "predict", f"checkpoint={CHECKPOINT}", "images=images")
    assert (result.code, result.out) == (0, "20 images classified: predictions.csv\n")
    assert result.err == f"dlopt: left out: 2 files (1 *.heic, 1 *.txt)\ndlopt: {RESIZED}\n"


def test_single_image_and_other_output(workdir: Path) -> None:
    line = ["predict", f"checkpoint={CHECKPOINT}", "images=images/dark/3.png", "output=a/b.csv"]
    assert dlopt(workdir, *line).code == 0
    _, [row] = table(workdir / "a/b.csv")
    assert row[0] == "images/dark/3.png"


def test_skips_and_reports_unreadable_files(workdir: Path) -> None:
    (workdir / "images/dark/3.png").write_bytes(b"")
    (workdir / "images/text.jpg").write_text("no image")
    (workdir / "images/notes.txt").write_text("not meant")
    line = ["predict", f"checkpoint={CHECKPOINT}", "images=images"]
    result = dlopt(workdir, *line, "max_errors=2")
    assert result.code == 0 and "19 images classified, 2 skipped" in result.out
    left_out, *skipped, changed = result.err.splitlines()
    assert changed == f"dlopt: {RESIZED.replace('20', '19')}"
    assert left_out == "dlopt: left out: 1 file (1 *.txt)"
    assert [("images/dark/3.png" in each, "images/text.jpg" in each) for each in skipped] == [
        (True, False),
        (False, True),
    ]
    assert len(table(workdir / "predictions.csv")[1]) == 19
    before = entries(workdir)
    result = dlopt(workdir, *line, "max_errors=1", "output=none.csv")
    assert result.code == 1 and "max_errors=1" in result.err
    assert entries(workdir) == before


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["image=x.png"], ["image: did you mean images?"]),
        (["images=nowhere"], ["images=nowhere"]),
        (["images=run/tensorboard"], ["images=run/tensorboard", "no images"]),
        (["images=images", "output=images"], ["output=images", "folder"]),
        (["images=images", "max_errors=-1"], ["max_errors=-1"]),
        (["images=images", "optimizer.lr=1"], ["optimizer.lr", "may be changed"]),
        (["images=images", "device=tpu"], ["device=tpu", "cpu"]),
    ],
)
def test_refused(workdir: Path, line: list[str], parts: list[str]) -> None:
    message = refused(workdir, "predict", f"checkpoint={CHECKPOINT}", *line)
    for part in parts:
        assert part in message


def test_refuses_a_model_of_other_values_than_those_of_image_files(workdir: Path) -> None:
    state = load(workdir / CHECKPOINT).state
    state["progress"]["data"]["task"]["white"] = 1.0  # as of a data=custom that returns images in 0..1
    write(workdir / CHECKPOINT, lambda file: torch.save(state, file))
    message = refused(workdir, "predict", f"checkpoint={CHECKPOINT}", "images=images")
    assert "takes floating-point images" in message and "image files have values 0..255" in message


def test_no_checkpoint_and_no_readable_image(workdir: Path) -> None:
    assert "checkpoint: a path is needed" in refused(workdir, "predict", "images=images")
    (workdir / "empty.png").write_bytes(b"")
    result = dlopt(workdir, "predict", f"checkpoint={CHECKPOINT}", "images=empty.png")
    assert result.code == 2 and "none of the files" in result.err


# -- tables


@pytest.mark.parametrize("labels", ["class", "value"])
def test_a_table_gets_its_columns_back(tmp_path: Path, labels: str) -> None:
    """With the predictions of a forward pass of the checkpoint; a regression is in the unit of its label."""
    draws = np.random.default_rng(0)
    features = draws.normal(size=(60, 2)).round(3)
    answers = 1000 + 50 * features[:, 0] if labels == "value" else np.where(features[:, 0] > 0, "yes", "no")
    lines = [f"{a},{b},{c}" for (a, b), c in zip(features, answers, strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(["age,bmi,answer", *lines]) + "\n")
    loss = ["data.labels=value", "loss=mse"] if labels == "value" else []
    line = ["data=table", "data.file=train.csv", *loss, "model=mlp", "model.widths=[4]", "epochs=2", "threads=1"]
    assert dlopt(tmp_path, "train", *line, "device=cpu", "tracking=[]", "hydra.run.dir=run").code == 0
    new = [["Bonn; am Rhein", str(b), str(a)] for a, b in features[:20]]
    text = "\n".join(["city,bmi,age", *(",".join(row) for row in new)])
    (tmp_path / "new.csv").write_text(text + "\n")
    result = dlopt(tmp_path, "predict", "run", "file=new.csv", "batch_size=7", "precision=fp64")
    assert (result.code, result.out) == (0, "20 rows predicted: predictions.csv\n"), result.err
    assert result.err == "dlopt: not read by the model, kept in the output: city\n"
    head, rows = table(tmp_path / "predictions.csv")
    assert head[:4] == ["city", "bmi", "age", "prediction"] and [row[:3] for row in rows] == new

    trained = restore(tmp_path / "run/checkpoints/best.pt", {"precision": "fp64"})
    with torch.no_grad():
        outputs = trained.module(trained.normalize(torch.tensor(features[:20]).float().double()))
    if labels == "value":
        train = load(tmp_path / "run/checkpoints/best.pt").columns
        assert train is not None and abs(train.mean - 1000) < 50
        np.testing.assert_allclose([float(row[3]) for row in rows], outputs[:, 0] * train.scale + train.mean, rtol=1e-6)
    else:
        assert [row[3] for row in rows] == [["no", "yes"][i] for i in outputs.argmax(1)]
        np.testing.assert_allclose([float(row[4]) for row in rows], outputs.softmax(1).amax(1), rtol=1e-5)
    assert dlopt(tmp_path, "predict", "run", "file=new.csv", "output=b.csv", "precision=fp64").code == 0
    assert (tmp_path / "b.csv").read_text() == (tmp_path / "predictions.csv").read_text()
    (tmp_path / "lacks.csv").write_text("age\n1\n")
    assert "lacks the column bmi" in refused(tmp_path, "predict", "run", "file=lacks.csv")


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on dates with slashes, codes with zeros and numbers, of a target of 1e9 that differs by about 2."""
    folder, draws = tmp_path_factory.mktemp("survey"), np.random.default_rng(0)
    x = draws.normal(size=1500)
    days = [f"{1 + i % 28}/{1 + i * 12 // 1500}/2024" for i in range(1500)]  # of many rows, both orders are possible
    rows = zip(days, ["00501", "1234", "01234"] * 500, x.tolist(), (1e9 + 2 * x).tolist(), range(1500), strict=True)
    lines = [f"{day},{code},{a!r},{y!r},{number:05}" for day, code, a, y, number in rows]
    (folder / "t.csv").write_text("\n".join(["when,code,x,y,row", *lines, ""]))
    line = ["data=table", "data.file=t.csv", "data.target=y", "data.ignore=[row]", "data.labels=value", "loss=mse"]
    line += ["model=mlp", "model.widths=[8]", "epochs=3", "threads=1", "device=cpu", "tracking=[]", "hydra.run.dir=run"]
    result = dlopt(folder, "train", *line, "optimizer=adamw", "optimizer.lr=0.01")
    assert result.code == 0, result.err
    return folder


def test_predictions_have_all_digits(survey: Path) -> None:
    """CSV and Parquet have the same float64: the outputs of the model in the unit of the label."""
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    for name in ("p.csv", "p.parquet"):
        result = dlopt(survey, "predict", "run", "file=t.csv", f"output={name}", "precision=fp64")
        assert result.code == 0, result.err
    text = pandas.read_csv(survey / "p.csv", dtype={"code": str, "row": str}, float_precision="round_trip")
    typed = pandas.read_parquet(survey / "p.parquet")
    trained = restore(survey / "run/checkpoints/best.pt", {"precision": "fp64"})
    assert trained.columns is not None
    with torch.no_grad():
        inputs = trained.columns.matrix({name: list(text[name].astype(str)) for name in trained.columns.features}, str)
        outputs = trained.module(trained.normalize(torch.from_numpy(inputs).float().double()))[:, 0].numpy()
    expected = outputs * trained.columns.scale + trained.columns.mean
    assert len(np.unique(expected)) > 1000 and 1 < expected.std() < 3
    np.testing.assert_allclose(text.prediction - 1e9, expected - 1e9, atol=1e-5)
    assert np.array_equal(text.prediction, typed.prediction)
    assert [typed[name].dtype for name in ("x", "y", "prediction")] == [np.float64] * 3
    assert np.array_equal(typed.x, text.x) and np.array_equal(typed.y, text.y)
    assert typed.code.tolist() == ["00501", "1234", "01234"] * 500 and typed.row[7] == "00007"


def test_one_row_is_read_as_the_table_of_the_training(survey: Path) -> None:
    """Also the order of day and month, which the row alone does not show; the numbers of its codes keep their zeros."""
    whole = dlopt(survey, "predict", "run", "file=t.csv", "output=whole.csv", "precision=fp64")
    assert whole.code == 0, whole.err
    head, *lines = (survey / "t.csv").read_text().splitlines()
    _, rows = table(survey / "whole.csv")
    for number in (4, 900):  # 5/1/2024 and 5/8/2024
        (survey / "one.csv").write_text(f"{head}\n{lines[number]}\n")
        assert lines[number].startswith("5/")
        assert dlopt(survey, "predict", "run", "file=one.csv", "output=p1.csv", "precision=fp64").code == 0
        [row] = table(survey / "p1.csv")[1]
        assert float(row[-1]) - 1e9 == pytest.approx(float(rows[number][-1]) - 1e9, abs=1e-5)
    (survey / "us.csv").write_text(f"{head}\n3/25/2024,00501,1,1,1\n")
    message = refused(survey, "predict", "run", "file=us.csv", "output=p1.csv")
    assert "us.csv, line 2: when is '3/25/2024', not a date in the form 31/1/2024" in message
    (survey / "comma.csv").write_text(f'{head}\n1/1/2024,00501,"1,5",1,1\n')
    message = refused(survey, "predict", "run", "file=comma.csv", "output=p1.csv")
    assert "line 2: x is '1,5', not a finite number; write a decimal point" in message
    (survey / "large.csv").write_text(f"{head}\n1/1/2024,00501,{2**53 + 1},1,1\n")
    pytest.importorskip("pyarrow")
    message = refused(survey, "predict", "run", "file=large.csv", "output=large.parquet")
    assert "output: x has '9007199254740993', no number of float64; use output=predictions.csv" in message


def test_a_first_row_of_words_is_a_row(survey: Path) -> None:
    """As the training table had no units below its names."""
    (survey / "words.csv").write_text("when,code,x\nday,number,unknown\n" + "1/1/2024,00501,1\n" * 5)
    message = refused(survey, "predict", "run", "file=words.csv", "output=p1.csv")
    assert "words.csv, line 2: when is 'day', not a date" in message


# -- texts


def test_units_of_tokens_that_span_lines(tmp_path: Path) -> None:
    """A token belongs to the line of its first byte; perplexity and bits per byte follow from its losses."""
    pytest.importorskip("tokenizers")
    text = "ab\n\ncd\n\n\n" * 60 + "ab cd\n" * 5
    (tmp_path / "train.txt").write_text(text)
    line = ["data=text", "data.file=train.txt", "data.tokenizer=bpe", "data.vocabulary=280", "data.sequence_length=8"]
    line += ["model=gpt_nano", "steps=2", "threads=1", "device=cpu", "tracking=[]", "hydra.run.dir=run"]
    result = dlopt(tmp_path, "train", *line)
    assert result.code == 0, result.err
    trained = restore(tmp_path / "run/checkpoints/best.pt", {"precision": "fp64"})
    assert trained.tokenizer is not None
    new = "ab\n\ncd\nab cd\n\n\nab\ncd\n\nab\n"
    (tmp_path / "new.txt").write_text(new)
    tokens, lengths = trained.tokenizer.encode(new.encode(), "new"), trained.tokenizer.lengths
    ends = np.cumsum(lengths[tokens])
    starts = ends - lengths[tokens]
    assert ends[-1] == len(new) and any("\n" in new[a : b - 1] for a, b in zip(starts, ends, strict=True))
    losses = np.zeros(len(tokens))  # the first one has no prediction
    for first in range(0, len(tokens) - 1, 8):
        window = torch.from_numpy(tokens[first : first + 9].astype(np.int64))[None]
        outputs = trained.outputs(window[:, :-1])[0]
        losses[first + 1 : first + 9] = torch.nn.functional.cross_entropy(outputs, window[0, 1:], reduction="none")
    owner = [new[:start].count("\n") for start in starts]
    assert dlopt(tmp_path, "predict", "run", "file=new.txt", "per=line", "precision=fp64").code == 0
    head, rows = table(tmp_path / "predictions.csv")
    assert head == ["line", "tokens", "bytes", "loss", "bits_per_byte", "perplexity"]
    for number, row in enumerate(rows):
        mine = [i for i in range(1, len(tokens)) if owner[i] == number]
        size = int(lengths[tokens[mine]].sum())
        assert [int(cell) for cell in row[:3]] == [number + 1, len(mine), size]
        if mine:
            mean = losses[mine].mean()
            expected = [mean, losses[mine].sum() / size / np.log(2), np.exp(mean)]
            assert [float(cell) for cell in row[3:]] == pytest.approx(expected, rel=1e-6)
    assert len(rows) == new.count("\n")


def test_losses_of_a_text_are_those_of_eval(tmp_path: Path) -> None:
    """Of windows, whose sum is that of the lines, whatever the batch size."""
    lines = [f"{number} times {number} is {number * number}" for number in range(200)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "new.txt").write_text("\n".join(lines)[: 10 * 16 + 1])
    line = ["data=text", "data.file=train.txt", "data.sequence_length=16", "model=gpt_nano", "steps=2", "threads=1"]
    assert dlopt(tmp_path, "train", *line, "device=cpu", "tracking=[]", "hydra.run.dir=run").code == 0
    trained = restore(tmp_path / "run/checkpoints/best.pt", {"precision": "fp64"})
    tokens = torch.frombuffer(bytearray((tmp_path / "new.txt").read_bytes()), dtype=torch.uint8).long()
    windows = tokens.unfold(0, 17, 16)
    outputs = trained.outputs(windows[:, :-1])
    expected = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    totals = []
    for per, batch_size in (("window", 3), ("line", 7)):
        keys = ["file=new.txt", f"per={per}", f"batch_size={batch_size}", "precision=fp64"]
        assert dlopt(tmp_path, "predict", "run", *keys).code == 0
        head, rows = table(tmp_path / "predictions.csv")
        size, loss = (head.index(name) for name in ("bytes", "loss"))
        if per == "window":
            np.testing.assert_allclose([float(row[loss]) for row in rows], expected.view(10, 16).mean(1), rtol=1e-6)
        totals.append(sum(int(row[size]) * float(row[loss]) for row in rows))
    np.testing.assert_allclose(totals, float(expected.sum()), rtol=1e-6)

    # Documents of a Parquet file, with its columns; the loss of one does not depend on the others.
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [lines[3], "", "\n".join(lines[5:9]), "a zero byte\0 within", lines[3]]
    kept = {"id": [f"{i:03}" for i in range(5)], "text": documents, "n": [1, None, 3, 4, 5]}
    writer.write_table(arrow.table(kept), tmp_path / "documents.parquet", row_group_size=2)
    result = dlopt(tmp_path, "predict", "run", "file=documents.parquet", "precision=fp64")
    assert result.code == 0 and "5 documents predicted" in result.out, result.err
    found = writer.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert list(found) == ["id", "text", "n", "document", "bytes", "loss", "bits_per_byte"]
    assert {name: found[name] for name in kept} == kept and found["document"] == [1, 2, 3, 4, 5]
    for text, loss in zip(documents, found["loss"], strict=True):
        tokens = torch.tensor([[0, *text.encode(), 0]])
        sums = 0.0
        for start in range(0, tokens.shape[1] - 1, 16):
            window = tokens[:, start : start + 17]
            outputs = trained.outputs(window[:, :-1])[0]
            sums += float(torch.nn.functional.cross_entropy(outputs, window[0, 1:], reduction="sum"))
        assert loss == pytest.approx(sums / (tokens.shape[1] - 1), rel=1e-6)
    writer.write_table(arrow.table({"text": documents, "loss": [0] * 5}), tmp_path / "taken.parquet")
    assert "has a column 'loss', the name of" in refused(tmp_path, "predict", "run", "file=taken.parquet")
    writer.write_table(arrow.table({"text": documents, "tags": [["a"]] * 5}), tmp_path / "nested.parquet")
    message = refused(tmp_path, "predict", "run", "file=nested.parquet", "output=p.csv")
    assert "cannot have the column tags of the type list<" in message
