"""Secrets of the environment in stored files."""

import csv
import html
import io
import json
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
import yaml
from PIL import Image

from dlopt.basics import secrets
from dlopt.basics.errors import UserError
from dlopt.basics.files import write_atomically, write_json, write_yaml
from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.config.overrides import storable
from dlopt.config.resolve import to_plain
from dlopt.config.resuming import differences
from dlopt.sweeps.study import describe_differences
from tests.support.line import dlopt
from tests.support.processes import run_dlopt
from tests.support.sizes import TINY

CANARY = "Canary-7f3a9"
HARD = 'it\'s "a\\b" 50% <x>&\tü/Zq7-inner'  # quotes, a backslash, markup, a tab


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets the secrets of a test, and those of the machine."""
    monkeypatch.setattr(secrets, "_replacements", {})
    monkeypatch.setattr(secrets, "_pattern", None)
    for name in [name for name in os.environ if secrets.is_secret_name(name)]:
        monkeypatch.delenv(name)
    yield


def leaks(folder: Path, *canaries: str) -> list[str]:
    """Lists the files below a folder, of any kind, that contain one of the texts, and names of files that do."""
    found = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        found += [str(path) for canary in canaries if canary.encode() in data or canary in path.name]
    return found


# -- redact


def test_forms_of_a_secret() -> None:
    secrets.note(HARD, "${oc.env:X}")
    table = io.StringIO()
    csv.writer(table).writerow([HARD])
    forms = {
        "text": HARD, "repr": repr(HARD), "ascii": ascii(HARD), "JSON": json.dumps(HARD),
        "UTF-8 JSON": json.dumps(HARD, ensure_ascii=False), "JSON of a repr": json.dumps(repr(HARD)),
        "JSON in JSON": json.dumps(json.dumps(HARD)), "URL": f"https://me:{quote(HARD, safe='')}@host/",
        "path of a URL": quote(HARD), "form": quote_plus(HARD),
        "lower-case URL": re.sub("%..", lambda code: code[0].lower(), quote(HARD, safe="")),
        "HTML": html.escape(HARD), "CSV": table.getvalue(), "shell": shlex.quote(HARD), "within": f"x{HARD}y{HARD}",
    }  # fmt: skip
    for name, text in forms.items():
        hidden = secrets.redact(text)
        assert "${oc.env:X}" in hidden and "zq7" not in hidden.lower(), (name, hidden)
    assert secrets.redact("nothing here") == "nothing here"
    assert secrets.redact_bytes(b"\xff" + HARD.encode()) == b"\xff${oc.env:X}"


def test_lines_of_a_secret() -> None:
    """Error messages show one line, or join them."""
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\n  kqhkiG9w0BAQ\n-----END KEY-----\n"
    secrets.note(key, "${oc.env:PEM}")
    for text in (key, " ".join(key.split()), "x MIIEvQIBADANBg", "kqhkiG9w0BAQ"):
        assert "MII" not in secrets.redact(text) and "kqh" not in secrets.redact(text)


def test_longest_secret_first_and_once() -> None:
    secrets.note("abcdef1", "${oc.env:SHORT}")
    secrets.note("abcdef123", "${oc.env:LONG}")
    secrets.note("oc.env:LONG", "${oc.env:ODD}")
    assert secrets.redact("abcdef123 abcdef1") == "${oc.env:LONG} ${oc.env:SHORT}"


@pytest.mark.parametrize(
    "value", ["", "1", "cuda", "0.001", "123456789", "-1e-10", "1_000_000", "true", "val_loss", "digits", "2026-11-26"]
)
def test_common_values_are_no_secrets(value: str) -> None:
    secrets.note(value, "${oc.env:X}")
    assert secrets.redact(f"a{value}b {value}") == f"a{value}b {value}"


@pytest.mark.parametrize(
    ("name", "value", "is_hidden"),
    [
        ("WANDB_API_KEY", "abcdef", True), ("HF_TOKEN", "hunter", True), ("PGPASSWORD", "swordfish", True),
        ("MY_SECRET", "opensesame", True), ("DB_PASS", "opensesame", True), ("SECRET_2", "opensesame", True),
        ("WANDB_API_KEY", "abc", False), ("HF_TOKEN", "123456", False),
        ("KEYBOARD", "qwertz-de", False), ("TOKENIZERS_PARALLELISM", "false-1", False), ("MONKEY", "banana-1", False),
        ("DATABASE", "postgresql://me:pa-ss1@host/db", True),
        # Of dlopt: choices, keys, metrics, a status, words of the report's page.
        ("KEY", "resnet20", False), ("X_PASS", "cifar10", False), ("KEY", "optimizer", False),
        ("KEY", "fashion", False), ("AUTH", "val_accuracy", False), ("TOKEN", "stopped_early", False),
        ("KEY", "function", False), ("AUTH", "basic1", True),
    ],
)  # fmt: skip
def test_variables_that_are_secrets_by_their_name(name: str, value: str, is_hidden: bool) -> None:
    secrets.note_environment(variables={name: value})
    text = "pa-ss1" if "://" in value else value
    assert (text not in secrets.redact(f"a {value} b")) == is_hidden


@pytest.mark.parametrize(
    ("url", "stored"),
    [
        ("https://me:pa55-Word@host/x", "https://me:***@host/x"),
        ("postgresql+psycopg://me:12@h:5432/db", "postgresql+psycopg://me:***@h:5432/db"),
        ("https://:pa55-Word@host", "https://:***@host"),
        ("https://ghp_0123456789abcdefghij@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("https://host/x?token=abc&size=3", "https://host/x?token=***&size=3"),
        ("https://host/x?size=3&api_key=abc#part", "https://host/x?size=3&api_key=***#part"),
        (
            "s3://b/x?X-Amz-Signature=abc&X-Amz-Security-Token=d/e",
            "s3://b/x?X-Amz-Signature=***&X-Amz-Security-Token=***",
        ),
        (r"note=x\ https\://me\:pa55@h/?token\=a", r"note=x\ https\://me\:***@h/?token\=***"),  # Hydra's own quoting
        ("[https://a:b@c,https://d:e@f]", "[https://a:***@c,https://d:***@f]"),
        ("https://me@host:80/x?size=3 https://host:80/a@b", None),
        ("https://me:${oc.env:PASSWORD}@host/?token=${oc.env:TOKEN}", None),
        ("see a:b@c, x?token=1", None),
    ],
)
def test_passwords_and_tokens_in_urls(url: str, stored: str | None) -> None:
    """Of any URL: one that was typed has no variable to refer to."""
    assert secrets.redact(url) == (url if stored is None else stored)
    assert secrets.redact(secrets.redact(url)) == secrets.redact(url)
    assert secrets.redacted({"a": [url]}) == {"a": [secrets.redact(url)]}


def test_variables_that_are_set_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As python-dotenv does it after the import of dlopt; also a new value of a variable."""
    assert secrets.redact("first-Value second-Value") == "first-Value second-Value"
    monkeypatch.setenv("LATER_TOKEN", "first-Value")
    assert secrets.redact("first-Value second-Value") == "${oc.env:LATER_TOKEN} second-Value"
    monkeypatch.setitem(os.environ, "LATER_TOKEN", "second-Value")
    both = "${oc.env:LATER_TOKEN}"
    assert secrets.redacted(["first-Value second-Value"]) == [f"{both} {both}"]
    monkeypatch.setenv("NAMES_KEY", "of-my-classes")
    secrets.forget(["of-my-classes"])
    assert secrets.redact("of-my-classes") == "of-my-classes"


def test_a_url_with_a_secret_is_no_config_of_another_process(tmp_path: Path) -> None:
    """A job reads its config from a file; and what was stored cannot be typed again."""
    key = "data=image_folder", "data.root"
    for words in (("-m", "seed=0,1", key[0], f"{key[1]}=https://a:b@c"), (key[0], f"{key[1]}=https://a:***@c")):
        result = dlopt(tmp_path, "train", "data.subset=null", *words)
        assert result.code == 2 and "data.root=https://a:***@c: " in result.err and "oc.env:NAME" in result.err, result
    assert not list(tmp_path.iterdir())


def test_writers_redact(tmp_path: Path) -> None:
    secrets.note(HARD, "${oc.env:X}")
    content = {"a": [f"x {HARD}", (HARD,)], HARD: {"b": 1.5, "c": None, "d": True}}
    hidden = {"a": ["x ${oc.env:X}", ["${oc.env:X}"]], "${oc.env:X}": {"b": 1.5, "c": None, "d": True}}
    write_json(tmp_path / "a.json", content)
    write_yaml(tmp_path / "a.yaml", content)
    assert json.loads((tmp_path / "a.json").read_text()) == hidden
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == hidden
    write_atomically(tmp_path / "text", HARD)
    write_atomically(tmp_path / "bytes", HARD.encode())
    assert (tmp_path / "text").read_text() == "${oc.env:X}" and (tmp_path / "bytes").read_text() == HARD


def test_stream_redacts(capsys: pytest.CaptureFixture[str]) -> None:
    secrets.note(CANARY, "${oc.env:X}")
    stream = secrets.RedactedStream(sys.stdout)
    print("a", CANARY, file=stream, flush=True)
    stream.writelines([f"{CANARY}\n"])
    assert capsys.readouterr().out == "a ${oc.env:X}\n${oc.env:X}\n" and not stream.isatty()


# -- configs


def saved(*overrides: str) -> dict[str, object]:
    return to_plain(Composer(words=overrides).compose(overrides))[1]


def test_secrets_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", CANARY)
    monkeypatch.setenv("BLOCK", "{a: inner-5ecret, b: [0.5, other-5ecret]}")
    monkeypatch.setenv("MODEL", "resnet20")
    config = saved(
        "data=image_folder", "data.root=/x/${oc.env:PLACE}", "note='${oc.decode:${oc.env:BLOCK}}'",
        "name=${oc.env:MODEL}", f"init_from=/typed/{CANARY}/last.pt", "model=mlp",
    )  # fmt: skip
    assert CANARY not in str(config) and "5ecret" not in str(config)
    assert config["init_from"] == "/typed/${oc.env:PLACE}/last.pt"
    text = f"{CANARY} inner-5ecret other-5ecret 0.5 resnet20"
    hidden = "${oc.env:PLACE} ${oc.decode:${oc.env:BLOCK}} ${oc.decode:${oc.env:BLOCK}} 0.5 resnet20"
    assert secrets.redact(text) == hidden


def test_secrets_that_are_typed_for_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    line = [f"+hydra.job.env_set.WANDB_API_KEY={CANARY}", "+hydra.job.env_set.PIN_TOKEN=12", "+hydra.job.env_set.A=b"]
    block = ["+hydra.job.env_set={HF_TOKEN:abc,A:b}"]
    assert storable(line) == [
        "+hydra.job.env_set.WANDB_API_KEY=${oc.env:WANDB_API_KEY}",
        "+hydra.job.env_set.PIN_TOKEN=${oc.env:PIN_TOKEN}", line[2],
    ]  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "again")
    [stored] = storable(block)
    assert "abc" not in stored
    assert dict(Composer(words=[stored]).compose([stored]).hydra.job.env_set) == {"HF_TOKEN": "again", "A": "b"}
    Composer(words=line).compose(line)
    assert secrets.redact(CANARY) == "${oc.env:WANDB_API_KEY}"


def test_a_stored_command_without_its_variable_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"WANDB_API_KEY' not found.*set this variable"):
        word = "+hydra.job.env_set.WANDB_API_KEY=${oc.env:WANDB_API_KEY}"
        Composer(words=[word]).compose([word])


# -- whole commands

IN_FOLDER = ("data=image_folder", "data.root=/x/${oc.env:PLACE}", "data.channels=1", "model=mlp", "threads=1")


def test_no_file_of_a_run_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", CANARY)
    monkeypatch.setenv("HARD_SECRET", HARD)
    typed = f"+hydra.job.env_set.WANDB_API_KEY={CANARY}-typed"
    note = "note='a ${oc.env:PLACE} b ${oc.env:HARD_SECRET} https://me:Url-Word-8@host/?token=Url-Word-9'"
    line = ["train", *TINY[:-1], typed, note, "hydra.run.dir=run"]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot log in as {os.environ['WANDB_API_KEY']!r} {CANARY} {HARD!r} {HARD}")

    first = dlopt(tmp_path, *line)
    assert first.code == 0, first.out[-600:]
    with monkeypatch.context() as patch:
        patch.setattr("dlopt.training.loop.Trainer.fit", fail)
        assert dlopt(tmp_path, *line[:-1], "hydra.run.dir=failed").code == 1
    assert dlopt(tmp_path, "report", ".", "format=[html,csv,latex,markdown,svg]").code == 0
    assert dlopt(tmp_path, "eval", "checkpoint=run", "output=eval").code == 0
    assert leaks(tmp_path, CANARY, "Zq7", "Url-Word") == []
    reason = (RunFolder(tmp_path / "failed").summary() or {})["reason"]
    assert reason.startswith("RuntimeError: cannot log in as '${oc.env:WANDB_API_KEY}' ${oc.env:PLACE} ")
    assert "${oc.env:PLACE}" in (tmp_path / "failed/traceback.txt").read_text()
    assert (tmp_path / "report/index.html").exists() and (tmp_path / "failed/train.log").exists()
    # Resumed with the variable set, and refused without it.
    more = ["resume=auto", "epochs=3", "schedule_epochs=3"]
    history = [word for word in RunFolder(tmp_path / "run").typed() if not word.startswith(("hydra.run", "epochs"))]
    assert "WANDB_API_KEY" in dlopt(tmp_path, "train", *history, *more, "hydra.run.dir=run").err
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-typed")
    resumed = dlopt(tmp_path, "train", *history, *more, "hydra.run.dir=run")
    assert resumed.code == 0, resumed.err
    assert leaks(tmp_path, CANARY) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "journal", "sqlite"])
def test_no_file_of_a_sweep_has_a_secret(kind: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PLACE": CANARY, "MY_SECRET": HARD}
    more = ["seed=0,1", "optimizer.lr=0.1"]
    if kind != "grid":
        pytest.importorskip("optuna")
        more = ["hydra/sweeper=dlopt_optuna", "hydra.sweeper.n_trials=2", "optimizer.lr=interval(0.01,0.1)"]
        more += ["hydra.sweeper.storage=sqlite:///study.db"] if kind == "sqlite" else []
    package = tmp_path / "mine"
    package.mkdir()
    code = (
        "import os, warnings\nimport torch\n"
        "class Odd(torch.optim.SGD):\n"
        "    def __init__(self, params, lr: float, place: str, weight_decay: float = 0.0):\n"
        "        warnings.warn(f'at {place}')\n        print(place, os.environ['MY_API_KEY'])\n"
        "        raise ValueError(f'not here: {place!r} ' + os.environ['MY_SECRET'] + os.environ['MY_API_KEY'])\n"
    )
    (package / "__init__.py").write_text(code)
    line = [
        "train", "-m", *TINY[:-1], *more, "optimizer._target_=mine.Odd", "allow_packages=[mine]",
        "+optimizer.place=/x/${oc.env:PLACE}", "note='a ${oc.env:MY_SECRET}'",
        "+hydra.job.env_set.MY_API_KEY=Typed-5ecret", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    done = run_dlopt(tmp_path, *line, environment={**environment, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    report = run_dlopt(tmp_path, "report", "sweep", environment=environment)
    assert report.returncode == 0, report.stderr
    output = (tmp_path / "sweep/0/output.log").read_text()
    assert "/x/${oc.env:PLACE} ${oc.env:MY_API_KEY}" in output and "not here" in output
    assert "not here" in (RunFolder(tmp_path / "sweep/0").summary() or {})["reason"]
    if kind == "sqlite":
        with sqlite3.connect(tmp_path / "study.db") as database:
            rows = database.execute("select value_json from trial_user_attributes").fetchall()
        assert any("not here" in row[0] for row in rows)
    assert leaks(tmp_path, CANARY, "Zq7", "5ecret") == []


def test_secrets_with_ordinary_values_change_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its files, nor what its config means once the variables are unset."""
    line = ["train", *TINY[:-1], "name=first-run", "schedule_epochs=4", "hydra.run.dir=run"]
    values = {"KEY": "digits", "X_PASS": "finished", "MY_TOKEN": "first-run", "AUTH": "val_accuracy", "PAT": "widths"}
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        secrets.note_environment()
        for more in ([], ["resume=auto", "epochs=3"]):
            done = dlopt(tmp_path, *line, *more)
            assert done.code == 0, done.err
        assert dlopt(tmp_path, "report", "run", "output=report").code == 0
    assert leaks(tmp_path, "${oc.env") == []
    monkeypatch.setattr(secrets, "_replacements", {})
    monkeypatch.setattr(secrets, "_pattern", None)
    done = dlopt(tmp_path, *line, "resume=auto", "epochs=4")
    assert done.code == 0, done.err
    assert [json.loads(each)["epoch"] for each in (tmp_path / "run/metrics.jsonl").open()] == [1, 2, 3, 4]
    assert dlopt(tmp_path, "eval", "checkpoint=run", "output=eval").code == 0


def test_a_new_secret_changes_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was saved before its variable was set."""
    before = saved(f"+optimizer.place={CANARY}/x")
    monkeypatch.setenv("PLACE_KEY", CANARY)
    secrets.note_environment()
    after = saved(f"+optimizer.place={CANARY}/x")
    assert CANARY not in str(after) and differences(before, after) == {}
    assert describe_differences({"total": f"{CANARY}"}, {"total": "${oc.env:PLACE_KEY}"}) == ""


def test_typed_paths_and_names_are_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that does not refer to a variable does not begin to depend on it."""
    (tmp_path / "basic1").mkdir()
    values = {"AUTH": "basic1", "MY_KEY": "first-run", "MY_TOKEN": str(tmp_path)}
    secrets.note_environment(variables=values)
    assert "oc.env" not in str(saved("data=image_folder", f"data.root={tmp_path}/basic1", "name=first-run"))
    text = f"{tmp_path}/basic1/a.png first-run"
    assert secrets.redact(text) == text
    # Unless the config refers to it.
    monkeypatch.setenv("AUTH", "basic1")
    saved("data=image_folder", f"data.root={tmp_path}/${{oc.env:AUTH}}")
    assert secrets.redact("a basic1") == "a ${oc.env:AUTH}"


def test_classes_of_the_data_are_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASS", "zeppelin")
    secrets.note_environment()
    for name in ("zeppelin", "horses"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), 40 * number).save(tmp_path / f"data/train/{name}/{number}.png")
    line = ["data=image_folder", "data.root=data", "data.channels=1", "data.image_size=8", "evaluate.test=false"]
    done = dlopt(tmp_path, "train", *TINY[:2], *line, "epochs=1", "threads=1", "tracking=[]", "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert dlopt(tmp_path, "predict", "checkpoint=run", "images=data/train/zeppelin").code == 0
    assert "zeppelin" in (tmp_path / "predictions.csv").read_text() and leaks(tmp_path, "MY_PASS") == []


def test_the_path_of_a_file_is_no_secret(tmp_path: Path) -> None:
    """Unless the config refers to it: the shell sets PWD and SSH_AUTH_SOCK, and PWD is a part of many paths."""
    (tmp_path / "socket").touch()
    secrets.note_environment(variables={"SSH_AUTH_SOCK": str(tmp_path / "socket"), "PWD": "/no/such/folder"})
    text = f"{tmp_path}/socket /no/such/folder/data"
    assert secrets.redact(text) == text
    secrets.note_environment(["FOLDER_KEY", "HOME"], {"FOLDER_KEY": str(tmp_path), "HOME": "/no/such/folder"})
    assert secrets.redact(text) == "${oc.env:FOLDER_KEY}/socket /no/such/folder/data"
