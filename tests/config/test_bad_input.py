"""Invalid command lines are rejected with one message that names the key, the value and what is allowed."""

import contextlib
import io
import os
import shlex
from pathlib import Path
from random import Random

import pytest
import torch
from omegaconf import OmegaConf

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import flatten
from dlopt.config.compose import Composer
from dlopt.config.flags import parse_arguments
from dlopt.config.plan import plan
from tests.support.line import dlopt, refused

TINY = ("model=mlp", "model.widths=[4]", "data.subset=40", "steps=1", "threads=1", "tracking=[]")

# arguments of `dlopt train` -> substrings of the message
KEYS = {
    "optimizer.lrr=1": ("optimizer.lrr=1", "did you mean optimizer.lr?", "`dlopt options optimizer` lists all"),
    "lrr=1": ("lrr=1", "did you mean optimizer.lr? `dlopt train --help` lists all"),
    "optimzer=adamw": ("optimzer=adamw: unknown key; did you mean optimizer? `dlopt train --help` lists all",),
    "tracking.wandb=true": ("tracking.wandb=true: unknown key; tracking holds a value, not keys",),
    "precision=half": ("precision=half: unknown value; allowed: fp32 | ",),
    "resume=true": ("resume=true: unknown value; allowed: auto | ",),
    "lr=1": ("lr=1: unknown key; use optimizer.lr=1",),
    "epochs={_target_:torch.nn.ReLU}": ('epochs={"_target_": "torch.nn.ReLU"}: must be a value; allowed: an integer',),
    "epochs={_target_:null}": ("epochs=null: ", "allowed: an integer"),
    "model.widths=[{_target_:torch.nn.ReLU}]": ("must be values; allowed: a list",),
    "model=nope": ("model=nope", "unknown choice", "`dlopt options model` lists all"),
    "data=.": ("data=.", "data=image_folder data.root=."),
    "data=/etc/passwd": ("data=/etc/passwd", "a file is not a choice; `dlopt options data` lists"),
    "data=table data.root=x": ("data.root=x", "have it; allowed: file, "),
    "data.root=.": ("data.root=.: unknown key", "image_folder", "have it", "`dlopt options data` lists all"),
    "optimizer=adam optimizer.momentum=0.9": ("optimizer.momentum=0.9: unknown key", "optimizer=", "sgd", "eps"),
    "clip.max_norm=1": ("clip.max_norm=1: unknown key; clip=norm has it; the chosen clip has no keys",),
    "sampler=sequential sampler.nope=1": ("sampler.nope=1: unknown key; the chosen sampler has no keys",),
    "optimizer=SGD": ("did you mean optimizer=sgd?",),
    "OPTIMIZER=sgd": ("did you mean optimizer?",),
    "Optimizer.lr=1": ("did you mean optimizer.lr?",),
    "+optimizer.lr=1": ("this key exists", "without the plus sign: optimizer.lr=1"),
    "+model.x=1": ("model.x=1", "unknown key", "widths"),
    "+x=1": ("x=1", "unknown key"),
    "~model": ("~model", "cannot be deleted", "`dlopt options model` lists all"),
    "~optimizer.lr": ("~optimizer.lr", "cannot be deleted"),
    "~seed": ("~seed",),
    "optimizer=null": ("optimizer=null", "`dlopt options optimizer` lists all"),
    "experiment=null": ("experiment=null", "allowed: autoencoder_digits, "),
    "optimizer=": ("optimizer=", "`dlopt options optimizer` lists all"),
    "model={}": ("model={}", "`dlopt options model` lists all"),
    "optimizer={lr:1}": ("optimizer=", "`dlopt options optimizer` lists all"),
    "model=[]": ("model=[]", "`dlopt options model` lists all"),
    "model=_norm": ("model=_norm", "unknown choice"),
    "optimizer=../data/digits": ("unknown choice",),
    "optimizer@model=sgd": ("optimizer@model=sgd",),
    "hydra/launcher=nope": ("hydra/launcher=nope: unknown choice", "gpus, joblib, serial, slurm"),
    "hydra.launcher.gpus=1": ("hydra.launcher.gpus=1: unknown key; hydra/launcher=gpus has it",),
    "-m hydra/launcher=slurm hydra.launcher.gpus=1": ("did you mean hydra.launcher.gpus_per_node?",),
    "optimizer.betaz=1": ("optimizer.betaz=1: unknown key; optimizer=adabelief,", "more have betas; allowed: lr,"),
    "partition=x": ("partition=x: unknown key", "hydra/launcher=slurm hydra.launcher.partition=x"),
    "hydra/sweeper=nope": ("hydra/sweeper=nope: unknown choice; allowed: basic, dlopt_optuna\n",),
    "hydra/sweeper=dlopt_optuna hydra/sweeper/sampler=cma": ("did you mean hydra/sweeper/sampler=cmaes?",),
    "evaluate={}": ("evaluate={}", "one by one"),
    "evaluate=1": ("evaluate=1", "every_epochs"),
    "checkpoint=null": ("checkpoint=null", "keep"),
    "optimizer.lr.x=1": ("optimizer.lr.x", "holds a value"),
    "recovery.x.y=1": ("recovery.x.y=1: unknown key; allowed: attempts",),
    "parallel.nope=3": ("parallel.nope=3",),
    "optimizer.lr=???": ("optimizer.lr", "a value is required"),
    "data=image_folder": ("data.root", "a value is required"),
    "'optimizer.lr=${nope}'": ("optimizer.lr=${nope}", "not found", "for the text ${...} itself, write \\${...}"),
    "'hydra.run.dir=${nope}'": ("hydra.run.dir: Interpolation key 'nope' not found",),
    "-m seed=0,1 'name=${nope}'": ("hydra.sweep.dir: Interpolation key 'nope' not found",),
    "--cfg job --resolve 'name=${nope}'": ("Interpolation key 'nope' not found",),
    "'optimizer.lr=${optimizer.lr}'": ("optimizer.lr=${optimizer.lr}", "ecursive"),
    "'seed=${order_seed}'": ("seed=${", "ecursive"),
    "'optimizer.lr=${oc.env:NO_SUCH_VARIABLE}'": ("NO_SUCH_VARIABLE", "not found"),
    "\"epochs='3'\"": ("epochs=3: input should be a valid integer", "type ${oc.decode:${oc.env:NAME}}"),
    "'optimizer.lr=${oops'": ("optimizer.lr=${oops", "quoted"),
    "foo": ("foo", "key=value"),
    "optimizer.lr": ("optimizer.lr", "key=value"),
    "=1": ("=1", "key=value"),
    "optimizer..lr=1": ("optimizer..lr",),
    "optimizer.lr 0.1": ("optimizer.lr 0.1", "optimizer.lr=0.1"),
    "--nope": ("--nope",),
    "--epochs 5": ("--epochs 5", "key=value, without dashes; use epochs=5"),
    "--batch-size=32 --nope": ("--batch-size=32", "use data.batch_size=32"),
    "seed=1 --lr 0.1": ("--lr 0.1", "use optimizer.lr=0.1"),
    "--cfg nope": ("--cfg", "nope", "job"),
    "--package model": ("--package: needs --cfg",),
    "--config-dir nowhere": ("--config-dir=nowhere", "no such folder"),
    "--config-name nope": ("--config-name=nope", "no such file"),
    "--config-path .": ("--config-path", "--config-dir"),
    f"--config-dir {'x' * 300}": ("--config-dir=xxx", "File name too long"),
    f"optimizer={'x' * 300}": ("unknown choice",),
    f"data={'x' * 300}": ("unknown choice",),
    "hydra.runtime.choices.experiment='${nope}'": ("does not read this key",),
}
TYPES = {
    "optimizer.lr=abc": ("optimizer.lr=abc", "a number > 0"),
    "optimizer.lr=true": ("optimizer.lr=true", "a number > 0"),
    "optimizer.lr=[1]": ("optimizer.lr=[1]", "a number > 0"),
    "optimizer.lr={a:1}": ("optimizer.lr", "a number > 0"),
    "optimizer.lr=1e-3x": ("optimizer.lr=1e-3x", "a number > 0"),
    "optimizer.lr=": ("optimizer.lr=", "a number > 0"),
    "optimizer.lr=null": ("optimizer.lr=null", "a number > 0"),
    "epochs=5m": ("epochs=5m", "allowed: an integer >= 1 | a time > 0 (90s, 5min, 1.5h)"),
    "epochs=0s": ("epochs=0s", "a time > 0 (90s, 5min, 1.5h)"),
    "epochs=-5min": ("epochs=-5min", "a time > 0 (90s, 5min, 1.5h)"),
    "epochs=5min steps=3": ("epochs=5min: steps=3 sets the number of updates; leave one out",),
    "epochs=1.5": ("epochs=1.5", "an integer >= 1"),
    "epochs=true": ("epochs=true", "an integer >= 1"),
    "data.batch_size=null": ("data.batch_size=null", "an integer >= 1 and <= 16777216 | full"),
    "seed=1.2": ("seed=1.2", "an integer >= 0"),
    "optimizer=adam optimizer.betas=[0.9]": ("optimizer.betas=[0.9]", "too few", "a list"),
    "optimizer=adam optimizer.betas=[0.9,0.9,0.9]": ("optimizer.betas", "a list"),
    "optimizer=adam optimizer.betas=0.9": ("optimizer.betas=0.9", "a list"),
    "optimizer=adam optimizer.betas=[0.9,x]": ("optimizer.betas", "a number >= 0 and < 1"),
    "compile=yes": ("compile=yes", "true | false | auto"),
    "device=tpu": ("device=tpu", "cpu | cuda"),
    "precision=FP32": ("precision=FP32", "fp32 | tf32"),
    "tracking=tensorbord": ("tracking=tensorbord", "a list"),
    "tracking=[nope]": ("tracking", "tensorboard"),
    "tracking=[wandb,trackio]": ('"trackio"]: unknown value', "use tracking=[wandb] (or mlflow, or observers="),
    "name=true": ("name=true", "a string"),
    "resume=false": ("resume=false", "a string | null"),
    "allow_packages=1": ("allow_packages=1", "a list"),
    "on_divergence=nope": ("on_divergence=nope", "stop | skip"),
    "check=always": ("check=always", "auto | step"),
    "on_out_of_memory=true": ("on_out_of_memory=true", "stop | halve"),
    "activation_checkpointing=true": ("activation_checkpointing=true", "none | blocks | all"),
    "checkpoint.asynchronous=maybe": ("checkpoint.asynchronous=maybe", "true | false"),
    "model.activation=foo": ("model.activation=foo", "tanh"),
    "model.widths=wide": ("model.widths=wide", "a list"),
    "model=torchvision.models.resnet18 model.weights=DEFAULT": (
        "model.weights=DEFAULT: unknown value; allowed: ResNet18_Weights | null; pretrained weights: model=torchvision",
    ),
}
RANGES = {
    "optimizer.lr=-1": ("optimizer.lr=-1", "a number > 0"),
    "optimizer.lr=0": ("optimizer.lr=0", "a number > 0"),
    "optimizer.lr=nan": ("optimizer.lr=nan", "finite"),
    "optimizer.lr=inf": ("optimizer.lr=inf", "finite"),
    "optimizer.lr=1e400": ("optimizer.lr=inf", "finite"),
    "optimizer.momentum=1.5": ("optimizer.momentum=1.5", "< 1"),
    "optimizer.weight_decay=-1": ("optimizer.weight_decay=-1", ">= 0"),
    "optimizer=adam optimizer.betas=[0.9,1.0]": ("optimizer.betas", "< 1"),
    "epochs=0": ("epochs=0", ">= 1"),
    "epochs=-1": ("epochs=-1", ">= 1"),
    "steps=0": ("steps=0", ">= 1"),
    "max_time=0": ("max_time=0", "> 0"),
    "epochs=1000000000000000000000000000000": ("epochs=1000000000000000000000000000000", "64-bit"),
    "model.widths=[9223372036854775808]": ("model.widths=[9223372036854775808]", "64-bit"),
    "model=resnet20 model.depth=20000": ("model.depth=20000", "<= 10000"),
    "data.image_size=100000": ("data.image_size=100000", "<= 16384"),
    "data.batch_size=0": ("data.batch_size=0", ">= 1"),
    "data.batch_size=1000000000": ("data.batch_size=1000000000", "16777216 | full"),
    "data.batch_size=-4": ("data.batch_size=-4", ">= 1"),
    "seed=-1": ("seed=-1", ">= 0"),
    f"seed={'9' * 5000}": ("seed=999", "a number has at most 4300 digits"),
    "seed=18446744073709551616": ("seed=18446744073709551616", "< 9223372036854775808"),
    "init_seed=-1": ("init_seed=-1",),
    "data.split_seed=-1": ("data.split_seed=-1", ">= 0"),
    "model.dropout=1.1": ("model.dropout=1.1", "< 1"),
    "model.widths=[0]": ("model.widths=[0]", ">= 1"),
    "model.norm_groups=0": ("model.norm_groups=0", ">= 1"),
    "loss.label_smoothing=2": ("loss.label_smoothing=2",),
    "data.workers=-1": ("data.workers=-1", ">= 0"),
    "data.workers=1000000": ("data.workers=1000000", "cores", "at most"),
    "threads=1000000": ("threads=1000000", "cores", "at most"),
    "clip=norm clip.max_norm=-1": ("clip.max_norm=-1", "> 0"),
    "clip=adaptive clip.clipping=0": ("clip.clipping=0", "> 0"),
    "accumulate=0": ("accumulate=0", ">= 1 | a block {micro_batches, steps, epochs, samples}"),
    "accumulate={steps:[4]}": ("accumulate=", "too few values"),
    "accumulate={micro_batches:[1,2],updates:[4]}": ("accumulate=", "unexpected keyword argument"),
    "accumulate={micro_batches:[1,2]}": ("needs milestones in one unit: steps, epochs or samples",),
    "accumulate={micro_batches:[1,2],steps:[4],epochs:[1]}": ("needs milestones in one unit",),
    "accumulate={micro_batches:[1,2],steps:[4,5]}": ("micro_batches needs one number more than steps",),
    "accumulate={micro_batches:[2,1],steps:[4]}": ("micro_batches and steps must increase",),
    "accumulate={micro_batches:[2,3],steps:[4]}": ("3 is no multiple of 2",),
    "recovery.attempts=0": ("recovery.attempts=0", ">= 1"),
    # Gone, with what to do instead
    "optimizer.state_dtype=bf16": ("optimizer.state_dtype=bf16: unknown key; use precision=bf16_pure",),
    "on_divergence=rollback": ("allowed: stop | skip; use on_divergence=stop (a run that diverges prints",),
    "recovery.lr_factor=0.1": ("recovery.lr_factor=0.1: unknown key; use on_divergence=stop",),
    "checkpoint.keep=0": ("checkpoint.keep=0", ">= 1"),
    "checkpoint.every_epochs=0": ("checkpoint.every_epochs=0", ">= 1"),
    "evaluate.every_epochs=0": ("evaluate.every_epochs=0", ">= 1"),
    "log_every_steps=0": ("log_every_steps=0", ">= 1"),
    "ema=1.5": ("ema=1.5", "< 1"),
    "data.image_size=0": ("data.image_size=0", ">= 1"),
    "data.image_size=[8]": ("data.image_size=[8]", "too few"),
    "data.val_split=1": ("data.val_split=1", "< 1"),
    "data.val_split=1.2": ("data.val_split=1.2", "< 1"),
    "data.subset=0": ("data.subset=0", ">= 1"),
    "data.subset=1.5": ("data.subset=1.5", "<= 1"),
    "data.subset=1000000": ("data.subset=1000000", "only 1438"),
    "data.subset=9": ("data.subset=9", "10 classes"),
    "stopping=early stopping.patience=0": ("stopping.patience=0", ">= 1"),
    "schedule=cosine_restarts schedule.T_0_epochs=0": ("schedule.T_0_epochs=0", "> 0"),
    "schedule=cosine_restarts schedule.T_mult=0": ("schedule.T_mult=0", ">= 1"),
    "schedule=cosine_restarts schedule.cycles=1000000000": ("schedule.cycles=1000000000",),
    "schedule=multistep schedule.milestones_epochs=[5,3]": ("milestones", "increase"),
}
COMBINATIONS = {
    "parallel=ddp parallel.processes=1000000": ("parallel.processes=1000000", "cores"),
    "activation_checkpointing=blocks": ("activation_checkpointing=blocks: model=mlp has no repeated blocks",),
    "optimizer=newton model=resnet20": ("optimizer=newton", "newton_cg"),
    "schedule=cosine schedule.warmup_epochs=20 epochs=2 steps=null": ("schedule.warmup_epochs=20", "longer"),
    "accumulate=100 data.batch_size=10": ("accumulate=100", "data.batch_size=10"),
    "accumulate={micro_batches:[1,2],steps:[4]} data.batch_size=36": ("a batch of 60 samples is larger than an epoch",),
    "stopping=early data.val_split=0": ("stopping=early", "data.val_split"),
    "stopping=early stopping.monitor=train_loss": ("stopping.monitor=train_loss", "val_loss"),
    "stopping=early stopping.monitor=val_foo": ("stopping.monitor=val_foo", "val_accuracy"),
    "monitor=val_foo": ("monitor=val_foo", "val_accuracy"),
    "data.batch_size=1": ("data.batch_size=1", "norm"),
    "data=image_folder data.root=/nonexistent": ("data.root=/nonexistent", "missing"),
    "data=image_folder data.root=/etc/passwd": ("data.root=/etc/passwd", "not a folder"),
    "data=mnist data.root=/nonexistent data.download=false": ("data=mnist", "/nonexistent", "data.root"),
    "data=cifar10 data.root=/nonexistent data.download=false": ("data=cifar10", "/nonexistent"),
    "data=csv data.file=/nonexistent": ("data.file=/nonexistent",),
    # Of a user that this machine does not have
    "\"data='~nobody_here'\"": ("data='~nobody_here'", "unknown choice"),
    "data=csv \"data.file='~nobody_here/x'\"": ("data.file=~nobody_here/x",),
    "data=table \"data.file='~nobody_here/x'\"": ("data.file=~nobody_here/x",),
    "data=text model=gpt_nano \"data.file='~nobody_here/x'\"": ("data.file=~nobody_here/x",),
    "data=image_folder \"data.root='~nobody_here/x'\"": ("data.root=~nobody_here/x",),
    "data=mnist \"data.root='~nobody_here/x'\" data.download=false": ("~nobody_here/x",),
    "loss=distillation \"loss.teacher='~nobody_here/x'\"": ("loss.teacher=~nobody_here/x",),
    "resume=/nonexistent/last.pt": ("resume=/nonexistent/last.pt", "no such file"),
    "resume=/tmp": ("resume=/tmp", "folder", "last.pt"),
    "resume=/etc/passwd": ("resume=/etc/passwd", "init_from=/etc/passwd"),
    "resume=/last.pt": ("resume=/last.pt", "no such file"),
    "resume=": ("resume=",),
    "init_from=/nonexistent": ("init_from=/nonexistent",),
    "init_from=/tmp": ("init_from=/tmp",),
    "init_from=/etc/passwd": ("init_from=/etc/passwd",),
    "init_from=": ("init_from=",),
}
PATHS = {
    "name=../x": ("name='../x'", "slashes"),
    "name=/abs": ("name='/abs'", "slashes"),
    "name=..": ("name='..'",),
    "name=.": ("name='.'",),
    "name=a/b": ("name='a/b'",),
    "name=": ("name=", "between 1 and"),
    "\"name='   '\"": ("name=", "between 1 and"),
    "\"name='a\nb'\"": ("control",),
    "\"name='a\0b'\"": ("control",),
    f"name={'x' * 300}": ("name=xxx", "bytes"),
    "hydra.run.dir=": ("hydra.run.dir=", "folder"),
    "hydra.run.dir=null": ("hydra.run.dir=null",),
    "hydra.run.dir=/etc/passwd": ("hydra.run.dir=/etc/passwd", "file"),
    "hydra.run.dir=/etc/passwd/x": ("hydra.run.dir=/etc/passwd/x", "cannot create this folder"),
    "hydra.run.dir=/proc/x/y": ("hydra.run.dir=/proc/x/y", "cannot create this folder"),
}
SWEEPS = {
    "optimizer.lr=0.1,0.2": ("optimizer.lr=0.1,0.2", "-m", "[a,b]"),
    "optimizer=adam,sgd": ("optimizer=adam,sgd", "-m"),
    "'seed=range(1,5)'": ("seed=range(1,5)", "-m"),
    "-m optimizer.lr=": ("optimizer.lr=", "> 0"),
    "-m optimizer.lr=,": ("optimizer.lr=,",),
    "-m 'seed=range(0,0)'": ("empty",),
    "-m 'optimizer.lr=choice()'": ("optimizer.lr=choice()",),
    "-m 'optimizer.lr=interval(0,1)'": ("needs listed values", "dlopt_optuna"),
    "-m optimizer.lr=0.1,-1": ("optimizer.lr=-1", "> 0"),
    "-m optimizer=sgd,nope": ("optimizer=nope", "unknown choice"),
    "-m name=a/b,c": ("name='a/b'",),
    "-m resume=/x/last.pt seed=1,2": ("resume=/x/last.pt", "resume=auto"),
    "-m seed=1,2 hydra.sweep.subdir=x": ("hydra.sweep.subdir=x", "different for each job"),
    "-m seed=1,2 hydra.sweep.dir=": ("hydra.sweep.dir=", "folder"),
    "-m seed=1,2,1": ("seed=1,2,1", "duplicate"),
    "-m hydra/launcher=joblib,serial": ("hydra/launcher=joblib,serial", "one value"),
    "hydra.run.dir=a,b": ("hydra.run.dir=a,b", "one value"),
    "'normalize=${oc.create:[1]}'": ("normalize=${oc.create:[1]}: unknown choice",),
    "'evalu\nate.tta=none'": ("'evalu\\nate.tta=none'", "not a valid key"),
    "hydra=1": ("hydra=1", "one by one"),
    "hydra.mode=x": ("hydra.mode=x", "expected one of [RUN, MULTIRUN]"),
    "hydra.job.num=x": ("hydra.job.num=x", "could not be converted to Integer"),
    "hydra.sweep.subdir={a:1}": ("hydra.sweep.subdir={a:1}",),
    "hydra.job.env_set.A=1": ("hydra.job.env_set.A=1", "+hydra.job.env_set.A=1"),
    "hydra.job.env_copy=[NO_SUCH_VARIABLE]": ("hydra.job.env_copy", "inherit"),
    "hydra.run.dir=~/x": (f"'{Path.home()}/x'",),
    "-m seed=1,2 hydra.sweeper.max_batch_size=0": ("hydra.sweeper.max_batch_size=0", "> 0"),
    "-m seed=1,2 hydra.job.chdir=true": ("hydra.job.chdir=true", "sweep"),
    "-m experiment=study/optimizers,study/schedules": ("experiment=study/optimizers", "one at a time"),
    "name=größe,klein": ("name='größe',klein", "-m"),
}
ALL = KEYS | TYPES | RANGES | COMBINATIONS | PATHS | SWEEPS


def command(line: str) -> list[str]:
    """Adds the overrides of a tiny run, except those that the line sets itself."""
    typed = shlex.split(line)
    keys = {each.partition("=")[0].lstrip("+~").lower() for each in typed}
    small = [each for each in TINY if each.partition("=")[0] not in keys]
    if "model" in keys:
        small = [each for each in small if not each.startswith("model")]
    return ["train", *small, *typed]


@pytest.mark.parametrize("line", ALL, ids=lambda line: line[:60].encode("unicode_escape").decode())
def test_rejects_with_one_message(line: str, tmp_path: Path) -> None:
    message = refused(tmp_path, *command(line))
    for part in ALL[line]:
        assert part in message, f"{part!r} is not in {message}"


def test_covers_many_mistakes() -> None:
    assert len(ALL) >= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path: Path) -> None:
    assert "device=cuda" in refused(tmp_path, *command("device=cuda"))


def test_resume_from_a_weights_file_suggests_init_from(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    message = refused(tmp_path, *command("resume=weights.pt"))
    assert "resume=weights.pt" in message and "init_from=weights.pt" in message


def test_rejects_undecodable_arguments(tmp_path: Path) -> None:
    message = refused(tmp_path, *command("name=x"), "name=\udcff")
    assert "name=" in message


# -- unusual but valid command lines


@pytest.mark.parametrize(
    "line",
    [
        "data.batch_size=16777216",  # one batch of all samples; nothing of that size is allocated
        "data.batch_size=full",
        "\"name='with spaces'\"",
        "\"name='a=b'\"",
        "name=größe-大",
        "name=.hidden",
        "seed=9223372036854775807",
        "optimizer=adam optimizer=sgd",  # as everywhere on a command line, the last one counts
        "seed=1 seed=2",
    ],
)
def test_accepted(line: str, tmp_path: Path) -> None:
    result = dlopt(tmp_path, *command(line))
    assert (result.code, result.err) == (0, "")
    assert len(list(tmp_path.glob("outputs/*/*/summary.json"))) == 1


SPECIAL = ["data=csv data.file=f", "data=table data.file=f", "data=parquet data.file=f", "init_from=f",
    "data=webdataset data.file=f data.input=jpg data.target=cls", "data=text data.file=f model=gpt_nano"]  # fmt: skip


@pytest.mark.parametrize("line", SPECIAL)
def test_does_not_wait_for_a_pipe(line: str, tmp_path: Path) -> None:
    if "parquet" in line:
        pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / "f")
    message = refused(tmp_path, "train", *line.split())
    assert "data.file=f" in message or "data.file: f" in message or "init_from=f" in message


# -- dlopt eval

EVAL = {
    "": ("checkpoint", "a path is needed"),
    "checkpoint=": ("checkpoint", "a path is needed"),
    "checkpoint=/nonexistent.pt": ("checkpoint=/nonexistent.pt", "no such file"),
    "checkpoint=/tmp": ("checkpoint=/tmp", "folder"),
    "checkpoint=/etc/passwd": ("checkpoint=/etc/passwd",),
    "--nope": ("--nope", "key=value"),
    "--tta flip": ("--tta flip", "use tta=flip"),
    "runs/best.pt": ("runs/best.pt", "checkpoint=runs/best.pt"),
    "checkpoint=x.pt optimizer.lr=1": ("optimizer.lr", "may be changed"),
    "checkpoint=x.pt ~data": ("~data", "may be changed"),
    "checkpoint=x.pt data.batch_size=1,2": ("data.batch_size=1,2", "one value"),
}


@pytest.mark.parametrize("line", EVAL)
def test_eval_rejects_with_one_message(line: str, tmp_path: Path) -> None:
    message = refused(tmp_path, "eval", *shlex.split(line))
    for part in EVAL[line]:
        assert part in message


# -- random command lines: accepted or refused, never another exception

VALUES = (
    "", "null", "true", "-1", "0", "1e400", "nan", ".5", "1_0", "0x10", "1e-3x", "9" * 30, "9" * 5000, "x" * 300,
    "[]", "{}", "[1,[2]]", "{a:1}", "{lr:1}", "{a:{b:[1]}}", "{null:1}", "{1:2}", "[null,true]", "[[[[1]]]]", "[" * 200,
    "'a b'", '"x"', "a b", "a,b", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "sort(3,1)", "shuffle(1,2)",
    "int(x)", "tag(a,1)", "extend_list(1)", "${seed}", "${nope}", "${oc.env:NOPE}", "${", "${}", "${oc.create:{a:1}}",
    "${.x}", "${..}", "${oc.decode:1}", "${optimizer}", "${hydra:run.dir}", "\\${x}", "???", "größe", "\udcff", "\0",
    "\t", "\n", "'", '"', "]", "}", "(", ")", "=", "==", "a=b", ":", "\\", "#", "@", "~", "!!python/name:os.system",
    "..", "/", "~/x", "s3://x", "{_target_:os.system}", "{_target_:null}", "{_args_:[1]}", "auto", "full", "none",
    "mlp", "adam", "2026-01-01", "1:30", "yes", "off", "-inf", "007", "\u0661", "\u202e",
)  # fmt: skip
OTHER_KEYS = (
    "hydra.run.dir", "hydra.job.num", "hydra.job.env_set", "hydra.searchpath", "hydra.launcher", "hydra/launcher",
    "hydra.runtime.choices.experiment", "hydra.verbose", "hydra", "nope", "optimizer.nope", "model.widths.0",
    "optimizer@model", "experiment", "from", "_target_", "optimizer._target_", "optimizer._partial_", "defaults", "",
    ".", "seed.x", "1", "é", "-x", "--x", "x" * 300, f"{'x' * 300}.y",
)  # fmt: skip
LETTERS = "aZ0_ ,:=[]{}()'\"\\$#~+-.%@?*é\t\n&!|<>/"
FLAGS = (
    "-m", "--cfg", "--info", "--config-dir", "--config-name", "--help", "--resolve", "-p", "-cp", "--nope", "-", "--",
    "-1", "--cfg=", "-mc", "--é", "-\udcff", "job", "x=\udcff", "=", "\0", "model=mlp", "x" * 300, "x" * 300,
    "--config-dir", "--config-dir",
)  # fmt: skip


def random_value(draw: Random) -> str:
    one, other = draw.choice(VALUES), draw.choice(VALUES)
    letters = "".join(draw.choices(LETTERS, k=draw.randrange(12)))
    joined = draw.choice([f"[{one},{other}]", f"{{a:{one}}}", f"{one}{other}", f"{one},{other}", f"choice({one})"])
    return draw.choice([one, one, letters, joined])


def random_override(draw: Random, keys: list[str]) -> str:
    key = draw.choice(keys)
    if draw.random() < 0.1:
        at = draw.randrange(len(key) + 1)
        key = key[:at] + draw.choice(LETTERS) + key[at:]
    return draw.choice(["", "", "", "+", "++", "~"]) + key + draw.choice(["=", "=", "=", "=", ""]) + random_value(draw)


def test_random_overrides() -> None:
    draw, composer, accepted, rejected = Random(0), Composer(), 0, 0
    bases = (["model=mlp"], ["model=mlp", "optimizer=adam"])
    configs = [OmegaConf.to_container(composer.compose(base), resolve=False) for base in bases]
    keys = [*dict.fromkeys(key for config in configs for key in (*config, *flatten(config))), *2 * OTHER_KEYS]
    for _ in range(200):
        line = [*draw.choice(bases), *(random_override(draw, keys) for _ in range(draw.choice([1, 1, 1, 2, 3])))]
        try:
            plan(composer, line)
            accepted += 1
        except UserError:
            rejected += 1
        except Exception as error:
            pytest.fail(f"{type(error).__name__} for {[each[:200] for each in line]}: {error!s:.200}")
    assert accepted > 2 and rejected > 60


def test_random_flags() -> None:
    draw = Random(0)
    for _ in range(200):
        line = draw.choices(FLAGS, k=draw.randrange(1, 5))
        with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
            parse_arguments(line)
