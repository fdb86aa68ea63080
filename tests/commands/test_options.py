"""`dlopt options`: layout and contents."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.commands.options import options
from dlopt.config.choices import Catalogue

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Catalogue()


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(*arguments: str, columns: int | None = None) -> str:
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", str(columns))
        assert options(list(arguments)) == 0
        return capsys.readouterr().out

    return run


def test_lists_each_choice_and_marks_the_default(printed: Callable[..., str]) -> None:
    lines = printed().splitlines()
    for group, default in CATALOGUE.groups().items():
        begin = lines.index(group)
        end = lines.index("", begin)
        choices = CATALOGUE.choices(group)
        rows = [line for line in lines[begin + 1 : end] if line[:2] in ("  ", "* ")]
        expected = {
            choice.name: f"{'*' if choice.name == default else ' '} {choice.name}  {choice.description}"
            for choice in choices
        }
        shown = {line[2:].split()[0]: re.sub(r"(?<=\S) {2,}", "  ", line) for line in rows}
        assert shown == (expected or {"(no": "  (no choices)"})


def test_optimizers_are_listed_by_families(printed: Callable[..., str]) -> None:
    """That of the default first, and the default first in it; a choice of the user's own is in no family."""
    lines = printed("optimizer").splitlines()
    families = [line for line in lines[1:] if line.endswith(":") and not line.startswith(" ")]
    assert families[0] == "first order:" and families[-1] == "other:" and lines[2].startswith("* sgd ")
    assert {"adaptive:", "matrix:", "second order:"} < {*families}
    other = lines[lines.index("other:") + 1 :]
    assert other[0].split()[0] == "custom" and not other[1].startswith("  ")


@pytest.mark.parametrize("columns", [60, 90, 120])
def test_wraps_to_the_width(printed: Callable[..., str], columns: int) -> None:
    for arguments in ((), ("model", "optimizer=*", "schedule=wsd")):
        narrow, wide = printed(*arguments, columns=columns), printed(*arguments)
        assert max(map(len, narrow.splitlines())) <= columns
        assert narrow.split() == wide.split()
        assert "\033" not in narrow


def test_group_lists_one_line_per_choice_and_how_to_list_keys(printed: Callable[..., str]) -> None:
    lines = printed("model").splitlines()
    choices = CATALOGUE.choices("model")
    assert lines[0] == "model" and [line[2:].split()[0] for line in lines[1 : len(choices) + 1]] == [
        choice.name for choice in choices
    ]
    assert len(lines) == len(choices) + 5  # two blank lines, the names of the keys, the commands
    assert "* resnet20 " in "\n".join(lines)
    assert lines[-3].startswith("keys (model.KEY=VALUE): ") and "norm, " in lines[-3]
    assert re.search(r", and \d+ more$", lines[-3])
    assert "`dlopt options model=resnet20` lists the keys of a choice" in lines[-1]
    assert "`dlopt options clip=adaptive` lists the keys" in printed("clip")  # the default, none, has no keys
    run_configs = printed("experiment")
    assert len(run_configs.splitlines()) == len(CATALOGUE.choices("experiment")) + 3 and "* default" not in run_configs


def test_wildcard_lists_the_keys_of_several_choices(printed: Callable[..., str]) -> None:
    text = printed("model=vgg*")
    assert "\nvgg11: " in text and "\nvgg11_bn: " in text and "resnet20" not in text.partition("\nvgg11: ")[2]
    assert re.search(r"norm=batch +batch, layer, group", text)


def test_choices_list_keys_defaults_and_comments(printed: Callable[..., str]) -> None:
    text = printed("schedule=*", "stopping=early")
    common, _, rest = text.partition("\nconstant: ")
    assert re.search(r"warmup_epochs=null +length of the warmup in epochs", common)
    wsd = rest[rest.index("\nwsd: ") :]
    assert "warmup_epochs=null" not in wsd and re.search(r"warmup_fraction=0\.1 +10 % of the run", wsd)
    assert re.search(r"final=0\.0 +final learning rate as a fraction of optimizer\.lr", wsd)
    assert "\n* cosine_warmup: Linear warmup" in rest
    assert "stopping=early" in rest and re.search(r"patience=\d+ +\w", rest)


def test_lists_config_dir(printed: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("# My own\n_target_: mine.Mine\nlr: 1 # rate\n")
    assert re.search(r"\n  mine +My own\n", printed(f"--config-dir={tmp_path}"))
    assert re.search(r"mine: My own\n +lr=1 +rate\n", printed("optimizer=mine", "--config-dir", str(tmp_path)))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("optimiser", "did you mean optimizer? `dlopt options` lists all"),
        ("zzzz", "zzzz: unknown group, choice or key; allowed: model, data, optimizer, "),
        ("weight_decai", "did you mean optimizer.weight_decay? "),
        ("adamv", "did you mean optimizer=adam? "),
        ("optimizer=adamv", "optimizer=adamv: unknown choice; did you mean optimizer=adam? allowed: "),
        ("optimizer=_full_batch", "unknown choice"),
        ("--width=3", "unrecognized arguments: --width=3"),
    ],
)
def test_unknown_names_get_suggestions(typed: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        options([typed])


def test_imports_neither_torch_nor_hydra() -> None:
    code = "import sys; from dlopt.cli import find; options, words = find(['options']); options(words)"
    code += "; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert "dlopt.commands.options" in imported and not imported & {"torch", "hydra", "pydantic", "numpy"}
    assert done.stderr.count("\n") == 1 and "optimizer\n" in done.stdout


def test_finds_keys(printed: Callable[..., str]) -> None:
    """By their last part, by their whole name, and by a part of it."""
    found = printed("lr")
    assert re.search(
        r"^  optimizer.lr=0.1 +learning rate \(optimizer=sgd and \d\d more choices\)$", found, re.MULTILINE
    )
    assert "\n  optimizer.lr=0.1 " in printed("optimizer.lr")
    assert "\n  tracking=[tensorboard] " in printed("tracking")
    assert "  schedule.warmup_epochs=null " in printed("warmup")


def test_finds_terms_of_the_field_and_of_other_tools(printed: Callable[..., str]) -> None:
    for words in (["weight decay"], ["weight", "decay"], ["Weight-Decay"]):
        found = printed(*words)
        assert "\n  optimizer.weight_decay=0.0 " in found and "\n  optimizer=adamw  " in found
    assert "\n  use stopping=early\n" in printed("early", "stopping")
    assert "\n  use device=cuda\n" in printed("gpu")
    assert "\n  use model.norm=batch (or layer, group, instance, none)\n" in printed("batchnorm")
    assert "  schedule=cosine_warmup " in printed("warmup") and "\n  use " not in printed("lr")
    assert "  ... and " in printed("batchnorm")
    metrics = {"auc": "roc_auc", "recall": "balanced_accuracy", "roc": "roc_auc", "precision": "average_precision",
               "brier": "brier_score", "f1": "macro_f1", "log loss": "log_loss"}  # fmt: skip
    for word, name in metrics.items():
        assert re.search(rf"^  {name} +test metric: ", printed(*word.split()), re.MULTILINE), word
    assert "process" not in printed("roc"), "short terms begin a word"


def test_lists_first_what_people_look_for(printed: Callable[..., str]) -> None:
    groups = [line for line in printed().splitlines() if re.fullmatch(r"[a-z]+", line)]
    assert groups[:4] == ["model", "data", "optimizer", "schedule"] and "normalize" in groups
    assert "keys (optimizer.KEY=VALUE): lr, weight_decay, " in printed("optimizer")


@pytest.mark.parametrize(
    ("term", "found"),
    [
        ("weight averaging", "ema=0.999"),
        ("time to target", "stopping=target"),
        ("layerwise", "optimizer.layer_decay"),
        ("schema", "dlopt template"),
    ],
)
def test_terms_of_the_field(printed: Callable[..., str], term: str, found: str) -> None:
    assert found in printed(*term.split())
