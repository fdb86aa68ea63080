"""`dlopt judge`: what is refused, what runs, what is printed, and what the ledger answers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml

from dlopt.basics.errors import RunError
from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.lab.judge import command
from dlopt.lab.judge.ledger import Ledger
from dlopt.lab.judge.proposal import read_base, read_change, words_of
from dlopt.lab.judge.running import Judgement, PairedRun, _with_code
from dlopt.lab.judge.sequential import rate_of
from dlopt.sweeps.pool import Pool, find_local
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.workload import build_workload
from tests.support.folders import make_run
from tests.support.judging import make_pair
from tests.support.line import dlopt, refused

BASE = "model=mlp epochs=2 device=cpu"
Accuracy = Callable[[PairedRun], float]


@pytest.fixture
def trains(monkeypatch: pytest.MonkeyPatch) -> Callable[[Accuracy], list[PairedRun]]:
    """Returns a function that makes runs of these accuracies in place of training; it returns those that were made."""

    def install(accuracy: Accuracy, **more: Any) -> list[PairedRun]:
        made: list[PairedRun] = []

        def run(judgement: Judgement, pool: Pool, plan_job: object) -> None:
            while trials := judgement.waiting():
                made.extend(trials)
                for trial in trials:
                    make_pair(judgement, trial, accuracies=(0.1, accuracy(trial)), **more)

        monkeypatch.setattr(command, "run", run)
        return made

    return install


def test_words_are_split_before_keys_and_may_be_quoted_for_the_shell() -> None:
    quoted = """epochs=5 'optimizer.groups=[{match:"*bias", lr:0.1}]' "name='a b'" note='c' """
    assert words_of(quoted) == ["epochs=5", 'optimizer.groups=[{match:"*bias", lr:0.1}]', "name='a b'", "note='c'"]
    assert words_of("epochs=5 'seed=1") == ["epochs=5", "'seed=1"]


def better(trial: PairedRun) -> float:
    return 0.5 + 0.1 * (trial.side == "change") + 0.01 * (trial.seed % 3 if trial.side == "base" else 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "BASE and CHANGE missing: "),
        ([BASE], "CHANGE missing: "),
        ([".", "optimizer.lr=0.2"], ".: not the folder of a run, which has a readable config.yaml"),
        ([BASE, "optimizer.lr=0.1"], "the base and the change are equal: "),
        ([BASE, "device=cpu threads=1 optimizer=sgd"], "the base and the change are equal: "),
        ([BASE, "seed=3"], "seed=3: `dlopt judge` sets the seeds: "),
        ([BASE, "monitor=val_loss"], "monitor=val_loss: alters the metric or how it is measured; "),
        ([BASE, "evaluate.every_epochs=2"], "evaluate.every_epochs=2: alters the metric or how it is measured; "),
        ([BASE, "data.val_split=0.2"], "data.val_split=0.2: other data than the base's (0.1) are not comparable"),
        ([BASE, "data=breast_cancer"], "data._target_=dlopt.data.tables.table.breast_cancer: other data than "),
        ([f"{BASE} monitor=val_loss", "loss.label_smoothing=0.1"], "loss.label_smoothing=0.1: alters the metric val_"),
        ([BASE, "optimizer.lr=0.2", "seeds=3"], "seeds=3: proposal 1 against this base takes 7 pairs or more: "),
        ([BASE, "optimizer.lr=0.2", "error_rate=1"], "error_rate=1: input should be less than 1; "),
        ([BASE, "optimizer.lr=0.2", "hydra/launcher=slurm"], "hydra/launcher=slurm: the runs are started on this "),
        ([BASE, "epochs=5min"], "epochs=5min: the base has epochs=2, and a time is that of both sides"),
        ([f"{BASE} epochs=5min", "epochs=3"], "epochs=3: the base has epochs=5min, and a time is that of both sides"),
        (
            [f"{BASE} epochs=5min parallel=ddp parallel.processes=2", "optimizer.lr=0.2"],
            "epochs=5min: for runs of several processes, train the base first, and judge against its folder",
        ),
        ([BASE, "code=nowhere"], "code=nowhere: must be a folder with Python files"),
        ([BASE, "unfinished", "optimizer.lr=0.2"], "unfinished optimizer.lr=0.2: a change is one run, or overrides"),
        (["unfinished", "optimizer.lr=0.2"], "unfinished: the base has not finished (unfinished): "),
        (["lecture/momentum", "optimizer.lr=0.2"], "experiment=lecture/momentum: a comparison of several runs"),
        (["nowhere", "optimizer.lr=0.2"], "nowhere: no such folder or recipe; BASE may also be overrides in quotes"),
    ],
)
def test_wrong_input_is_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "unfinished", status=None)
    assert refused(tmp_path, "judge", *words).startswith(f"dlopt: {message}")


def test_a_gain_is_found_and_then_answered_from_the_ledger(
    trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path
) -> None:
    made = trains(better)
    result = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", "output=out")
    assert result.code == 0, result.err
    assert "\nBetter by 9.00 points of validation accuracy (" in result.out
    assert ") in 7 pairs of runs.\nOf 100 changes that do nothing, at most 4 are called better or worse;" in result.out
    assert "of 100 bases with many changes each, at most 5 get any such wrong verdict.\n" in result.out
    assert len(made) == len(set(made)) == 14  # no seed twice
    assert {each.seed for each in made} == set(range(1000, 1007))
    assert all((tmp_path / "out/1" / name).is_file() for name in ("judge.png", "judge.svg", "judge.json"))
    # The same change in other words, and with more pairs allowed.
    again = dlopt(tmp_path, "judge", "epochs=2 device=cpu model=mlp", "optimizer.lr=2e-1", "seeds=50", "output=out")
    assert (again.code, len(made)) == (0, 14), again.err
    assert "from the ledger: proposal 1, out/1" in again.out
    # Another change has fresh seeds and a smaller rate.
    trains(lambda trial: 1 - better(trial))
    worse = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.3", "output=out", "--json")
    document = json.loads(worse.out)
    assert (worse.code, document["verdict"], document["proposal"], document["pairs"]) == (3, "worse", 2, 9)
    assert document["gain"] < document["high"] < 0
    assert document["error_rate"] == pytest.approx(0.05 * 6 / 3.14159265**2 / 4)
    assert (tmp_path / "out/2/change/2008").is_dir()


def test_an_undecided_change_continues_with_more_pairs(
    trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path
) -> None:
    made = trains(lambda trial: 0.5 + 0.1 * (trial.seed % 2 if trial.side == "base" else 1 - trial.seed % 2))
    for seeds, pairs in ((8, 8), (8, 8), (12, 12)):
        result = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", f"seeds={seeds}")
        assert result.code == 4 and f"in {pairs} pairs" in result.out, result.err
        assert len(made) == len(set(made)) == 2 * pairs
    assert "Undecided: a gain of " in result.out and "to continue, repeat the command with seeds=24" in result.out
    late = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", "seeds=30", "minutes=1e-9")
    assert late.code == 4 and "in 12 pairs" in late.out and late.out.endswith("to continue, repeat the command\n")


def test_equal_pairs_do_not_end_a_judgement(trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path) -> None:
    """A change that acts in every tenth run: two equal pairs are no evidence of the others."""
    acts = {1009, 1019, 1020, 1021, 1022, 1023, 1024, 1025}
    made = trains(lambda trial: 0.5 + 0.1 * (trial.side == "change" and trial.seed in acts))
    same = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", "seeds=9")
    assert (same.code, len(made)) == (4, 18), same.err
    assert "Undecided: the change has done nothing so far: 9 pairs of runs have exactly equal metrics." in same.out
    assert "to continue, repeat the command with seeds=18" in same.out
    some = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", "seeds=20")
    assert (some.code, len(made)) == (4, 40), some.err
    assert "Undecided: a gain of 0.00 points of validation accuracy (" in some.out and "in 20 pairs" in some.out


def test_a_change_that_diverges_is_worse_and_one_that_fails_ends_the_command(
    trains: Callable[..., list[PairedRun]], tmp_path: Path
) -> None:
    trains(lambda trial: 0.5, status="failed")
    failed = dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert "the loss is nan; the same command runs it again" in failed.err

    judgement = _judgement(tmp_path / "diverged", "optimizer.lr=0.2")
    for number in range(7):
        base, change = judgement.pair(number)
        make_pair(judgement, base)
        path = make_pair(judgement, change, status="failed")
        (path / "summary.json").write_text(json.dumps({"status": "failed", "diverged": True}))
    judgement.collect()
    assert judgement.verdict == "worse"
    assert judgement.concluded().metric == "val_accuracy"


def test_a_second_judge_of_a_change_is_refused_with_the_process_of_the_first(
    trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path
) -> None:
    made = trains(better)
    words = ("judge", BASE, "optimizer.lr=0.2", "output=out")
    assert dlopt(tmp_path, *words, "minutes=1e-9").code == 4
    before = (tmp_path / "out/ledger.jsonl").read_bytes()
    with RunFolder(tmp_path / "out/1").lock():
        message = refused(tmp_path, *words)
        assert f"out/1: process {os.getpid()} is judging this change; repeat the command when it has" in message
        assert (tmp_path / "out/ledger.jsonl").read_bytes() == before and not made
        assert dlopt(tmp_path, *words[:2], "optimizer.lr=0.3", "output=out").code == 0  # another change
    assert dlopt(tmp_path, *words).code == 0


def test_a_verdict_of_another_judge_meanwhile_is_not_replaced(
    trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second judge with a smaller budget has read the ledger before the first has decided."""
    made = trains(lambda trial: 0.5 + 0.1 * (trial.side == "change" and trial.seed >= 1008))
    words = ("judge", BASE, "optimizer.lr=0.2", "output=out")
    lock = command._lock

    def later(home: Path) -> IO[str]:
        with monkeypatch.context() as first:
            first.setattr(command, "_lock", lock)
            assert dlopt(tmp_path, *words, "seeds=40").code == 0
        return lock(home)

    monkeypatch.setattr(command, "_lock", later)
    second = dlopt(tmp_path, *words, "seeds=8")
    assert (second.code, len(made)) == (0, len(set(made))), second.err
    assert "from the ledger: proposal 1" in second.out
    assert json.loads((tmp_path / "out/ledger.jsonl").read_text().splitlines()[-1])["verdict"] == "better"


@pytest.mark.slow
def test_two_judges_of_one_base_at_once(tmp_path: Path) -> None:
    """Real processes: of different changes, both decide; of the same change, one is refused or answered."""
    base = "model=mlp epochs=1 data.subset=300 tracking=[] threads=1 device=cpu"
    changes = ("optimizer.lr=1e-5", "optimizer.lr=1e-6", "optimizer.lr=1e-5")
    line = [sys.executable, "-m", "dlopt", "judge", base]
    judges = [
        subprocess.Popen([*line, each, "output=out"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for each in changes
    ]
    said = [judge.communicate(timeout=300)[0].decode() for judge in judges]
    codes = [judge.returncode for judge in judges]
    assert codes[1] == 3 and sorted((codes[0], codes[2])) in ([2, 3], [3, 3]), said
    entries = Ledger(tmp_path / "out", [], 0.05).entries()
    assert sorted(each.number for each in entries) == [1, 2] and {each.verdict for each in entries} == {"worse"}
    for each in entries:
        seeds = {int(path.name) for path in (tmp_path / f"out/{each.number}/change").iterdir()}
        assert {1000 * each.number + i for i in range(each.pairs)} <= seeds
        assert all(seed // 1000 == each.number for seed in seeds)


def test_runs_of_another_change_are_refused(trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path) -> None:
    made = trains(better)
    dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", "output=other")
    run = tmp_path / "other/1/change/1003"
    edits: dict[str, dict[str, Any]] = {
        "seed=1003": {"lr": 0.3},
        "optimizer.lr=0.2": {"seed": 1004},
        'tags=["judge-': {"seed": 1004, "lr": 0.3},
        "epochs=9": {"seed": 1004, "lr": 0.3, "tags": True, "epochs": 9},
    }
    for number, (found, edit) in enumerate(edits.items()):
        name = f"out{number}"
        path = tmp_path / name / "1/change/1004"
        dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.3", f"output={name}", "minutes=1e-9")
        shutil.copytree(run, path)
        _edit(path / "config.yaml", **edit)
        before = len(made)
        message = refused(tmp_path, "judge", BASE, "optimizer.lr=0.3", f"output={name}")
        assert f"1/change/1004: is not a run of this proposal ({found}" in message
        assert "output=DIR" in message and len(made) == before and path.is_dir()


def _edit(path: Path, *, lr: float | None = None, tags: bool = False, **more: Any) -> None:
    """Makes the config of a run more like that of the run with seed 1004 of the change optimizer.lr=0.3."""
    config = yaml.safe_load(path.read_text()) | more
    config |= dict.fromkeys(("seed", "init_seed", "order_seed", "augmentation_seed"), config["seed"])
    config["optimizer"]["lr"] = lr or config["optimizer"]["lr"]
    ledger = path.parents[3] / "ledger.jsonl"
    if tags:
        config["tags"] = ["judge-" + json.loads(ledger.read_text().splitlines()[1])["key"]]
    path.write_text(yaml.safe_dump(config))


def test_a_verdict_does_not_outlive_its_data(trains: Callable[[Accuracy], list[PairedRun]], tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("x,y\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40)))
    made = trains(better)
    words = ("judge", "data=table data.file=t.csv data.target=y model=mlp epochs=2", "optimizer.lr=0.2", "output=out")
    assert dlopt(tmp_path, *words).code == 0
    assert "from the ledger: proposal 1" in dlopt(tmp_path, *words).out
    table.write_text(table.read_text().replace("7,b", "7.5,b"))
    other = dlopt(tmp_path, *words)
    assert other.code == 0 and "from the ledger" not in other.out, other.err
    assert "proposal 1 was this change with other data: its verdict and its runs do not count" in other.out
    assert [each.seed // 1000 for each in made] == [1] * 14 + [2] * 18
    table.write_text(table.read_text().replace("7.5,b", "7,b"))
    assert "from the ledger: proposal 1" in dlopt(tmp_path, *words).out


def test_data_that_change_during_a_judgement_end_it(tmp_path: Path) -> None:
    """Not those of a test set, nor of a named validation set, which the judgement has not read."""
    judgement = _judgement(tmp_path, "optimizer.lr=0.2")
    judgement.data = {"train": {"content": "one"}, "test": {"content": "x"}}
    for trial, content in zip(judgement.pair(0), ("one", "two"), strict=True):
        path = make_pair(judgement, trial) / "environment.json"
        data = {"identity": {"train": {"content": content}, "test": {"content": content}, "validation.b": {}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    with pytest.raises(RunError, match=r"change/1000: the data were changed during the judgement; the same command "):
        judgement.collect()


def _judgement(folder: Path, *change: str) -> Judgement:
    composer = Composer()
    base = read_base(composer, BASE)
    sides = {"base": base, "change": read_change(composer, base, change)}
    ledger = Ledger(folder, base.lines, 0.05)
    return Judgement(folder, sides, ledger.propose("x", change, None, 0.0, 20, "d"), 20)


def test_a_pair_shares_the_initial_weights_and_the_order_of_the_data(tmp_path: Path) -> None:
    judgement = _judgement(tmp_path, "optimizer=adamw")
    made = []
    for trial in judgement.pair(3):
        run_config, _ = command.Line(Composer(), []).run_config(judgement.line(trial))
        workload = build_workload(run_config)
        made.append((workload, next(training_batches(workload).epoch(1))))
    (one, batch), (other, same) = made
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, batch, same))  # inputs and targets


def test_a_choice_replaces_the_group_of_the_base() -> None:
    composer = Composer()
    base = read_base(composer, "optimizer.lr=0.3 model=mlp optimizer.momentum=0.5 optimizer.weight_decay=0.03")
    change = read_change(composer, base, ["optimizer=adamw data.batch_size=32", "epochs=3"])
    saved = change.plan.saved
    assert saved["optimizer"]["lr"] != 0.3 and saved["optimizer"]["weight_decay"] != 0.03
    assert (saved["data"]["batch_size"], saved["epochs"]) == (32, 3)
    same = read_base(
        composer, f"model=mlp optimizer.momentum=0.5 optimizer.lr=3e-1 optimizer.weight_decay=0.03 tags=[{'a' * 300}]"
    )  # longer than the name of a file
    assert same.hash == base.hash != change.hash


def test_the_code_of_a_change_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    composer = Composer()
    base = read_base(composer, BASE)
    first = read_change(composer, base, [f"code={tmp_path}"])
    pool = _with_code(Pool(1, lambda *_: pytest.fail("not by the pool"), find_local), tmp_path)
    (tmp_path / "mine.py").write_text("x = 2\n")
    assert read_change(composer, base, [f"code={tmp_path}"]).hash != first.hash != base.hash
    with pytest.raises(RunError, match="was changed while it is being judged"):
        pool.start(0, tmp_path / "change" / "1000", {})


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (BASE, ["optimizer=of_trust.Mine", "allow_packages=[of_trust]"]),
        (BASE, ["allow_packages=[of_trust]", "optimizer=of_trust.Mine optimizer.lr=0.1"]),
        (f"{BASE} optimizer=of_trust.Mine", ["optimizer.lr=0.1", "allow_packages=[of_trust]"]),
        (f"{BASE} optimizer=of_trust.Mine allow_packages=[of_trust]", ["optimizer.lr=0.1"]),
        (f"{BASE} allow_packages=[dlopt] optimizer=of_trust.Mine", ["optimizer.lr=0.1", "allow_packages=[of_trust]"]),
    ],
)
def test_trust_holds_for_both_sides(
    base: str, change: list[str], tmp_path: Path, trains: Callable[[Accuracy], list[PairedRun]]
) -> None:
    (tmp_path / "of_trust.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    trains(better)
    result = dlopt(tmp_path, "judge", base, *change)
    assert result.code == 0 and "Better by" in result.out, result.err
    assert not any("allow_packages" in word for word in ledger_of(tmp_path)[0]["change"])


def test_trust_of_a_change_is_no_other_base(tmp_path: Path, trains: Callable[[Accuracy], list[PairedRun]]) -> None:
    """All changes of a base share its ledger, whatever packages they need."""
    trains(better)
    for name in ("of_trust_1", "of_trust_2"):
        (tmp_path / f"{name}.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
        change = [f"optimizer={name}.Mine", f"allow_packages=[{name}]"]
        assert dlopt(tmp_path, "judge", BASE, *change).code == 0
    assert dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.01").code == 0
    assert [entry["proposal"] for entry in ledger_of(tmp_path)] == [1, 2, 3]


def test_trust_that_is_no_list(tmp_path: Path) -> None:
    message = refused(tmp_path, "judge", BASE, "optimizer.lr=0.1", "allow_packages=mine")
    assert message.strip() == "dlopt: allow_packages=mine: must be a list: allow_packages=[mine]"


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the documents of the proposals of the only ledger below `folder`."""
    [ledger] = (folder / "outputs/judge").iterdir()
    return [
        json.loads((ledger / name / "judge.json").read_text())
        for name in sorted(each.name for each in ledger.iterdir() if each.is_dir())
    ]


@pytest.mark.slow
def test_runs_of_a_change_import_its_code_first(tmp_path: Path) -> None:
    model = (
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, *, input_shape, classes):\n"
        "        super().__init__()\n        self.a = nn.Linear(64, classes)\n\n"
        "    def forward(self, x):\n        return self.a(x.flatten(1))\n"
    )
    (tmp_path / "of_judge.py").write_text(model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/of_judge.py").write_text(f"import pathlib\n{model}\npathlib.Path('imported').touch()\n")
    base = "model=of_judge.Net allow_packages=[of_judge] epochs=1 data.subset=100 device=cpu threads=1 tracking=[]"
    result = dlopt(tmp_path, "judge", base, "code=other", "seeds=7")
    assert result.code == 4 and "the change has done nothing so far: 7 pairs" in result.out, result.err
    assert (tmp_path / "imported").exists()


def test_the_ledger_of_a_base_and_why_each_change_was_proposed(
    tmp_path: Path, trains: Callable[..., list[PairedRun]]
) -> None:
    trains(better)
    because = "because=faster, (says) 'a paper': 100 %"
    assert dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.2", because).code == 0
    assert dlopt(tmp_path, "judge", BASE, "optimizer.lr=0.3").code == 0
    read = dlopt(tmp_path, "judge", "ledger", BASE)
    assert read.code == 0 and len(read.out.splitlines()) == 3
    head, first, second = read.out.splitlines()
    assert head.split() == ["verdict", "gain", "interval", "pairs", "time", "change"]
    assert first.startswith("1  better   +9.00 points")
    assert first.endswith(f"optimizer.lr=0.2 ({because.replace('=', ': ')})")
    assert second.startswith("2  better") and second.endswith("  optimizer.lr=0.3")
    document = json.loads(dlopt(tmp_path, "judge", "ledger", BASE, "--json").out)
    assert document["proposals"] == 2 and [each["proposal"] for each in document["newest"]] == [2, 1]
    assert document["newest"][1]["because"] == because.partition("=")[2]
    other = dlopt(tmp_path, "judge", "ledger", f"{BASE} data.batch_size=7")
    assert other.code == 2 and "no change was judged against this base" in other.err


def test_the_document_of_a_long_ledger_is_short(tmp_path: Path, trains: Callable[..., list[PairedRun]]) -> None:
    trains(better)
    for number in range(1, 13):
        assert (
            dlopt(tmp_path, "judge", BASE, f"optimizer.lr=0.{number}1", f"because={'why ' * 40}", "minutes=1e-9").code
            == 4
        )
    document = json.loads(text := dlopt(tmp_path, "judge", "ledger", BASE, "--json").out)
    assert document["proposals"] == 12 and document["newest"][0]["proposal"] == 12
    assert 3 < len(document["newest"]) < 12 and len(json.dumps(document)) < 2300, text


def test_each_part_of_a_better_change_is_taken_back(tmp_path: Path, trains: Callable[..., list[PairedRun]]) -> None:
    """In the same ledger, whose later proposals have smaller rates; the whole change takes the place of the base."""

    def of_parts(trial: PairedRun) -> float:
        if trial.seed >= 3000:  # the proposal without the second part: as good
            return 0.6 + 0.01 * ((trial.seed * (2 if trial.side == "base" else 3)) % 5)
        return better(trial) if trial.seed < 2000 else 0.6 - 0.1 * (trial.side == "change") + 0.001 * (trial.seed % 3)

    trains(of_parts)
    words = ["optimizer.lr=0.2 optimizer.momentum=0.8", "ablate=true"]
    result = dlopt(tmp_path, "judge", BASE, *words, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["verdict"] == "better"
    parts = {each["without"]: each for each in document["ablations"]}
    assert parts["optimizer.lr=0.2"]["verdict"] == "worse" and parts["optimizer.lr=0.2"]["of"] == 1
    assert parts["optimizer.lr=0.2"]["change"] == ["optimizer.momentum=0.8"]
    assert parts["optimizer.momentum=0.8"]["verdict"] in ("undecided", "same")
    assert "optimizer.lr=0.2 is needed: the change is worse without it\n" in result.err
    rates = [document["error_rate"], *(each["error_rate"] for each in document["ablations"])]
    assert rates == [rate_of(number, 0.05) for number in (1, 2, 3)]
    listed = dlopt(tmp_path, "judge", "ledger", BASE).out
    assert "1 without a part: optimizer.momentum=0.8" in listed
    refused_line = refused(tmp_path, "judge", BASE, "optimizer.lr=0.25", "ablate=true")
    assert "ablate=true: needs a change of two or more overrides" in refused_line


def test_a_time_is_counted_once_for_both_sides(tmp_path: Path, trains: Callable[..., list[PairedRun]]) -> None:
    trains(better)
    timed = BASE.replace("epochs=2", "epochs=1s")
    for change in ("optimizer.lr=0.2", "model.widths=[4]"):
        assert dlopt(tmp_path, "judge", timed, change, "output=out").code == 0
    updates = json.loads((tmp_path / "out/updates.json").read_text())["updates"]
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "out").glob("*/*/*/config.yaml")]
    assert len(configs) > 4 and {config["steps"] for config in configs} == {updates} and updates > 0
    assert "model.widths=[4]" in dlopt(tmp_path, "judge", "ledger", timed, "output=out").out
