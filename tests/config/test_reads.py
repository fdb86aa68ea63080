"""A command accepts no key that it does not read."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import flatten, is_below
from dlopt.commands import eval, export, find_lr, predict, sample, show_batch, summary
from dlopt.commands import train as train_command
from dlopt.commands.command_table import every_command
from dlopt.config.compose import Composer
from dlopt.config.keys import ROLES
from dlopt.config.overrides import key_of
from dlopt.config.packages import entries
from dlopt.config.reads import COMPOSITION, LEARNING_RATE, UPDATE, refuse_unread, refuse_untested
from dlopt.config.resolve import to_plain
from dlopt.lab import claimed_trials
from dlopt.lab.comparison import command as comparison
from dlopt.lab.diagnosis import command as diagnose
from dlopt.lab.scaling import command as scaling
from dlopt.lab.trajectory import command as trajectory
from dlopt.lab.verify import command as verify
from dlopt.python.api import train
from dlopt.sweeps import sweep as sweeps
from tests.support.line import SMALL, dlopt, refused, run

HYDRA = (
    "hydra.run.dir", "hydra.sweep.dir", "hydra/launcher", "hydra/sweeper", "hydra.launcher.n_jobs",
    "hydra.sweeper.params", "hydra.job.env_set.A", "hydra.job.chdir", "hydra.output_subdir", "hydra.verbose",
)  # fmt: skip
# Command lines -> the keys of a run and the own keys that they read.
ON_CONFIGS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "find-lr": (find_lr._READS, ()),
    "summary": (summary._READS, ()),
    "show-batch": (show_batch._READS, ()),
    "diagnose": (diagnose.READS, ()),
    "scaling": (scaling._READS, ()),
    "scaling allreduce=[1]": ((), ("device",)),
    "scaling device=[cpu]": ((), ("device", "precision", "threads")),
    "scaling simulate=true": ((), ()),
    "trajectory schedule=step": (trajectory._READS, ()),
    "verify optimizer=sgd": (verify.READS, ()),
    "trajectory function=quadratic": (("optimizer", "schedule", "allow_packages"), ("seed", "steps")),
    "eval init_from=x.pt": (eval._READS_OF_WEIGHTS, ("tta",)),
}
ON_CHECKPOINTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "eval": (eval._READS, ()),
    "predict images=x": (predict._READS, ()),
    "sample": (sample._READS, ("seed",)),
    "export format=onnx": (export._READS, ()),
    "consolidate": ((), ()),
    "diagnose": (diagnose._READS_OF_CHECKPOINTS, ()),
    "trajectory": (trajectory._READS_OF_LANDSCAPES, ("seed",)),
}
# These pass on the keys of a run. Of Hydra's keys they read:
OF_RUNS: Mapping[str, Sequence[str]] = {
    "train": (*COMPOSITION, *train_command._READS_OF_HYDRA),
    "train -m seed=0,1": sweeps._READS_OF_HYDRA,
    "train experiment=lecture/capacity": comparison._READS_OF_HYDRA,
    "benchmark optimizer=sgd": claimed_trials.READS_OF_HYDRA,
    "ladder optimizer=sgd model=gpt": claimed_trials.READS_OF_HYDRA,
    "judge model=mlp optimizer.lr=0.2": claimed_trials.READS_OF_HYDRA,
}
OTHERS = {"train", "benchmark", "ladder", "judge", "grid"}  # the tests below; grid prints what train reads
OF_RESULTS = {"report", "runs", "sweep"}  # any key may select runs
WITHOUT_CONFIG = {"options", "template"}


@cache
def keys_of_a_run() -> tuple[str, ...]:
    plain, _ = to_plain(Composer().compose(["parallel=ddp", "clip=norm", "stopping=early"]))
    of_groups = {key.partition(".")[0] for key in ROLES if "." not in key and key not in plain}
    return (*flatten(plain), *sorted(of_groups - {"hydra", "from"}), *entries("dlopt.series"), *HYDRA)


def test_every_command_is_here() -> None:
    here = {line.split()[0] for line in (*ON_CONFIGS, *ON_CHECKPOINTS)}
    assert here | OTHERS | OF_RESULTS | WITHOUT_CONFIG == set(every_command())


@pytest.mark.parametrize("line", ON_CONFIGS)
def test_a_command_refuses_what_it_does_not_read(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reads, own = ON_CONFIGS[line]
    unread = [key for key in keys_of_a_run() if not is_below(key, (*reads, *own))]
    assert len(unread) > 20
    for key in unread:
        with pytest.raises(UserError) as caught:
            run(f"{line} {key}=1")
        message = str(caught.value)
        assert message.startswith(f"{key}=1: ") and ("does not read this key" in message or "`dlopt train`" in message
            or "unknown key of" in message), message  # fmt: skip
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("line", ON_CHECKPOINTS)
def test_a_command_on_a_checkpoint_refuses_what_it_does_not_read(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").touch()
    reads, own = ON_CHECKPOINTS[line]
    for key in (key for key in keys_of_a_run() if not is_below(key, (*reads, *own))):
        with pytest.raises(UserError) as caught:
            run(f"{line} checkpoint=x.pt {key}=1")
        assert str(caught.value).startswith(f"{key}"), caught.value


@pytest.mark.parametrize("line", OF_RUNS)
def test_what_runs_do_not_read_of_hydra_is_refused(line: str, tmp_path: Path) -> None:
    values = {"hydra/launcher": "joblib", "hydra/sweeper": "dlopt_optuna", "hydra.job.chdir": "true"}
    values["hydra.sweeper.params"] = "null"
    unread = [key for key in HYDRA if not is_below(key_of(key), OF_RUNS[line])]
    assert unread
    for key in unread:
        typed = f"{'+' if 'env_set' in key else ''}{key}={values.get(key, '1')}"
        message = refused(tmp_path, *line.split(), typed)
        assert message.startswith(f"dlopt: {typed}: ") and "does not read this key" in message


@pytest.mark.parametrize("line", ["options", "template slurm", "template schema", "report ."])
def test_a_command_without_runs_refuses_all_keys(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_of_each_group = {key.partition(".")[0]: key for key in keys_of_a_run()}
    for key in one_of_each_group.values():
        with pytest.raises(UserError) as caught:
            run(f"{line} {key}=none")
        assert key in str(caught.value)


@pytest.mark.parametrize("line", [*ON_CONFIGS, *ON_CHECKPOINTS])
def test_a_command_reads_keys_that_exist(line: str) -> None:
    reads, _ = {**ON_CONFIGS, **ON_CHECKPOINTS}[line]
    for key in reads:
        assert any(is_below(known, [key]) for known in (*ROLES, *keys_of_a_run())), key


def test_only_typed_keys_are_refused() -> None:
    refuse_unread(["+experiment=a", "model.x=1", "unknown=1"], "it", ["model", "experiment"])
    with pytest.raises(UserError, match=r"^\+\+model/x=1: it does not read this key; why$"):
        refuse_unread(["++model/x=1"], "it", ["data"], hints={"model": "why"})
    with pytest.raises(UserError, match=r"^from=x: only available in `dlopt train`$"):
        refuse_unread(["from=x"], "it", ["data"])
    assert not set(UPDATE) & set(LEARNING_RATE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("find-lr hydra.run.dir=x", "set output= instead"),
        ("show-batch hydra.run.dir=x", "set output= instead"),
        ("diagnose hydra.run.dir=x", "set output= instead"),
        ("scaling hydra.run.dir=x", "set output= instead"),
        ("scaling simulate=true hydra.run.dir=x", "set output= instead"),
        ("trajectory schedule=step hydra.run.dir=x", "set output= instead"),
        ("trajectory function=saddle hydra.run.dir=x", "set output= instead"),
        ("benchmark optimizer=sgd hydra.sweep.dir=x", "dlopt benchmark does not read this key; set output= instead"),
        ("summary hydra.run.dir=x", "dlopt summary does not read this key\n"),
        ("find-lr epochs=3", "dlopt find-lr does not read this key; updates=N sets the length of the test"),
        ("find-lr schedule.warmup_epochs=1", "the test raises the learning rate from min_lr to max_lr"),
        ("find-lr ema=0.9", "ema=0.9: dlopt find-lr does not read this key"),
        ("find-lr stopping=early", "stopping=early: dlopt find-lr does not read this key"),
        ("find-lr max_time=1", "max_time=1: dlopt find-lr does not read this key"),
        ("find-lr scale_lr=linear", "scale_lr=linear: the test finds the learning rate for this batch size"),
        ("summary epochs=3", "epochs=3: dlopt summary does not read this key"),
        ("show-batch model=mlp", "model=mlp: dlopt show-batch does not read this key"),
        ("trajectory schedule=step model=mlp", "model=mlp: dlopt trajectory schedule=... does not read this key"),
        ("trajectory checkpoint=x.pt --config-dir=.", "--config-dir=.: not read with checkpoint="),
        ("diagnose checkpoint=x.pt --config-dir=.", "--config-dir=.: not read with checkpoint="),
        ("diagnose checkpoint=x.pt --config-name=trajectory", "--config-name=trajectory: not read with checkpoint="),
        ("diagnose checkpoint=x.pt init_from=y.pt", "does not read this key; the weights are those of the checkpoint"),
        ("grid 0 -m seed=0,1", "-m: not needed here"),
        ("grid 0 --cfg=job seed=0,1", "--cfg: only available in `dlopt train`"),
        ("grid 0 --info=all seed=0,1", "--info: only available in `dlopt train`"),
        ("train -m seed=0,1 hydra.run.dir=x", "hydra.run.dir=x: a sweep does not read this key; use hydra.sweep.dir"),
        ("train hydra.sweep.dir=x", "hydra.sweep.dir=x: dlopt train does not read this key; add -m"),
        ("train hydra/sweeper=dlopt_optuna", "hydra/sweeper=dlopt_optuna: dlopt train does not read this key; add -m"),
        ("train hydra.sweeper.max_batch_size=1", "dlopt train does not read this key; add -m"),
        ("train hydra/launcher=joblib", "dlopt train does not read this key; add -m"),
        ("train hydra/launcher=joblib hydra.launcher.n_jobs=1", "dlopt train does not read this key; add -m"),
        ("train hydra.output_subdir=x", "dlopt train does not read this key\n"),
        ("train experiment=lecture/capacity +hydra.job.env_set.A=1", "a comparison does not read this key; set the"),
        ("train experiment=lecture/capacity hydra.job.chdir=true", "a comparison does not read this key\n"),
        ("train experiment=lecture/capacity hydra.sweep.dir=x", "a comparison does not read this key; use hydra.run"),
        ("train -m seed=0,1 dry_run=true resume=auto", "dry_run=true with resume=auto: a dry run"),
        ("train evaluate.test=false evaluate.tta=flip", "evaluate.tta=flip: belongs to the final test"),
        ("train -m seed=0,1 evaluate.test=false evaluate.tta=flip", "evaluate.tta=flip: belongs to the final test"),
        ("train evaluate.test=false evaluate.average=logits", "checkpoint=PATH average=logits`"),
    ],
)  # fmt: skip
def test_combinations_that_do_nothing(line: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, *line.split())


@pytest.mark.parametrize(
    "key", ["+hydra.job.env_set.A=1", "hydra.job.chdir=true", "hydra.sweep.dir=x", "hydra.verbose=true"]
)
def test_python_api_refuses_what_it_does_not_read(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"train\(\) does not read this key"):
        train([*SMALL, key])
    assert not [*tmp_path.iterdir()]


def test_a_recipe_may_set_what_a_command_does_not_read(tmp_path: Path) -> None:
    line = ["experiment=resnet20_fashion_mnist_cosine", "input_shape=[1,28,28]", "classes=10"]
    assert "input 1x28x28" in dlopt(tmp_path, "summary", *line).out


def test_a_recipe_with_test_time_augmentation_may_leave_out_the_test() -> None:
    config = {"evaluate": {"test": False, "tta": "flip"}}
    refuse_untested(config, ["experiment=x", "evaluate.test=false"])
    with pytest.raises(UserError, match="`dlopt eval checkpoint=PATH tta=flip`"):
        refuse_untested(config, ["experiment=x", "evaluate.test=false", "evaluate.tta=flip"])
