"""A command reads every key that it declares: what it accepts is not ignored.

`tests/config/test_reads.py` tests that all other keys are refused.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dlopt.commands import eval, export, find_lr, predict, sample, show_batch, summary
from dlopt.commands.command_table import every_command
from dlopt.config import parsing
from dlopt.config.overrides import key_of
from dlopt.config.run_config import RunConfig
from dlopt.config.settings import Settings
from dlopt.lab.diagnosis import command as diagnose
from dlopt.lab.trajectory import command as trajectory
from dlopt.trained import restore
from tests.support.line import SMALL, dlopt, run

TINY = [each for each in SMALL if not each.startswith(("epochs", "tracking"))]
LINES: Sequence[tuple[str, Sequence[str]]] = [
    ("find-lr updates=10 output=out", find_lr._READS),
    ("summary", summary._READS),
    ("show-batch augmentation=crop_flip output=out.png", show_batch._READS),
    ("diagnose updates=1 eigenvalues=0 batches=1 scale_lr=linear output=out", diagnose.READS),
    ("trajectory schedule=step output=out", trajectory._READS),
    ("trajectory checkpoint=digits points=3 output=out", trajectory._READS_OF_LANDSCAPES),
    (
        "diagnose checkpoint=digits updates=1 eigenvalues=0 batches=1 scale_lr=linear output=out",
        diagnose._READS_OF_CHECKPOINTS,
    ),
    ("eval checkpoint=digits", eval._READS),
    ("eval init_from=digits/checkpoints/best.pt", eval._READS_OF_WEIGHTS),
    ("export checkpoint=digits format=torch_export", export._READS),
    ("predict checkpoint=images images=train output=out.csv", predict._READS),
    ("sample checkpoint=text length=1", sample._READS),
]
READ_EARLIER = {
    "seed": "the default of the other seeds",
    "experiment": "sets other keys",
    "allow_packages": "read while the config is checked",
}
NOT_ON_A_CPU = ["check"]
ELSEWHERE = {
    **dict.fromkeys(("train", "benchmark", "ladder", "judge", "grid"), "every key is read by a training"),
    **dict.fromkeys(("report", "runs", "options", "template", "consolidate", "sweep"), "no keys of a run"),
    "verify": "only the optimizer's",
    "scaling": "its ranks read the keys, in processes of their own",
}
FIELDS = {"data_settings": "data", "grouping": "optimizer", "warmup": "schedule"}  # of an experiment -> key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on digits, on image files and on text."""
    folder = tmp_path_factory.mktemp("runs")
    for label in "ab":
        (folder / "train" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 40 * number + 100 * (label == "b")).save(folder / f"train/{label}/{number}.png")
    (folder / "text.txt").write_text("def f(x): return x\n" * 100)
    gpt = ["model=gpt_nano", "model.width=12", "model.depth=1", "data.sequence_length=8", "threads=1", "tracking=[]"]
    for name, line in {
        "digits": SMALL,
        "images": [*SMALL, "data.subset=null", "data=image_folder", "data.root=.", "data.val_split=0"],
        "text": [*gpt, "data=text", "data.file=text.txt", "steps=1"],
    }.items():
        result = dlopt(folder, "train", *line, f"hydra.run.dir={name}", "device=cpu")
        assert result.code == 0, result.err
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Collects the keys that are read from an experiment, other than while its config is checked."""
    seen: set[str] = set()
    checking = False

    def watch(schema: type) -> None:
        names = {field.name for field in dataclasses.fields(schema)}

        def get(self: object, name: str) -> Any:
            is_copy = sys._getframe(1).f_code.co_filename == dataclasses.__file__  # `replace` reads all
            if name in names and not checking and not is_copy:
                seen.add(FIELDS.get(name, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(schema, "__getattribute__", get)

    def unwatched(parse: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
        def parsed(*arguments: Any, **keys: Any) -> RunConfig:
            nonlocal checking
            checking = True
            try:
                return parse(*arguments, **keys)
            finally:
                checking = False

        return parsed

    for module in (parsing, restore):
        monkeypatch.setattr(module, "parse", unwatched(parsing.parse))
    watch(Settings)
    watch(RunConfig)
    yield seen


@pytest.mark.parametrize(("line", "declared"), LINES, ids=[line for line, _ in LINES])
def test_a_command_reads_the_keys_that_it_declares(
    line: str, declared: Sequence[str], folder: Path, reads: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    on_checkpoint = "checkpoint=" in line
    declares = [each for each in TINY if key_of(each).partition(".")[0] in declared]
    assert run(" ".join([line, *([] if on_checkpoint else declares)])) == 0
    expected = {key.partition(".")[0] for key in declared} - READ_EARLIER.keys() - {*NOT_ON_A_CPU}
    if line.startswith(("eval", "predict")):
        expected -= {"parallel"}  # taken before the config is changed: tested with processes
    assert sorted(expected - reads) == []


def test_every_command_is_here() -> None:
    assert {line.split()[0] for line, _ in LINES} | ELSEWHERE.keys() == every_command().keys()
