"""The command line: help, version, listings, completion, start-up time."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from omegaconf import OmegaConf

import dlopt as package
from dlopt import cli
from dlopt.commands.command_table import every_command
from tests.support.line import SMALL, dlopt, entries, refused
from tests.support.runs import in_fork

DLOPT = [sys.executable, "-m", "dlopt"]
ROOT = Path(package.__file__).parents[1]


def process(*arguments: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*DLOPT, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# -- without a sub-command


def test_version(tmp_path: Path) -> None:
    for arguments in (["--version"], ["-V"], ["train", "--version"]):
        result = dlopt(tmp_path, *arguments)
        assert (result.code, result.out) == (0, f"dlopt {package.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(arguments: list[str], tmp_path: Path) -> None:
    result = dlopt(tmp_path, *arguments)
    assert result.code == 0
    assert all(f"\n  {name} " in result.out for name in every_command())


def test_unknown_command(tmp_path: Path) -> None:
    message = refused(tmp_path, "trian")
    assert "did you mean train?" in message and "`dlopt --help` lists all" in message


def test_commands_of_other_tools_and_former_names(tmp_path: Path) -> None:
    assert "use `dlopt train -m optimizer.lr=0.1,0.2`" in refused(tmp_path, "sweep", "optimizer.lr=0.1,0.2")
    assert refused(tmp_path, "bench", "allreduce=[1]") == "dlopt: bench: unknown command; use dlopt scaling\n"
    assert not cli.SYNONYMS.keys() & every_command().keys()
    assert {line.split()[0] for line in cli.SYNONYMS.values()} <= every_command().keys()


@pytest.mark.parametrize(
    "line",
    [
        "report PATH",
        "runs PATH",
        "train hydra.run.dir=PATH",
        "train --config-dir PATH",
        "train data=image_folder data.root=PATH",
        "train data=text data.file=PATH model=gpt_nano",
        "train init_from=PATH model=mlp",
    ],
)
def test_path_that_the_system_refuses(line: str, tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path, *line.replace("PATH", "x" * 300).split())


# -- after the sub-command


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_train_help(flag: str, tmp_path: Path, conf_dir: Path) -> None:
    text = dlopt(tmp_path, "train", flag).out
    for path in conf_dir.glob("*/*.yaml"):
        elsewhere = path.parent.name in ("experiment",)  # too many for a page
        assert path.stem in text or path.stem.startswith("_") or elsewhere
    assert "recipes: `dlopt options experiment`" in text
    assert " _" not in text  # fragments are no choices
    config = yaml.safe_load((conf_dir / "train.yaml").read_text())
    keys = config.keys() - {"defaults", "hydra"} - {path.name for path in conf_dir.iterdir()}
    assert len(keys) > 20
    for key in keys:
        assert f"  {key}" in text
    assert "passes over the training set" in text  # the comment of the key
    assert entries(tmp_path) == set()


def test_eval_help(tmp_path: Path) -> None:
    for flag in ("--help", "-h"):
        result = dlopt(tmp_path, "eval", flag)
        assert result.code == 0 and "checkpoint=PATH" in result.out


def test_cfg_job_shows_the_config(tmp_path: Path) -> None:
    for line in (["--cfg", "job", "optimizer=adamw", "seed=3"], ["optimizer=adamw", "seed=3", "-c", "job"]):
        result = dlopt(tmp_path, "train", *line)
        assert result.code == 0
        config = OmegaConf.create(result.out)
        assert config.optimizer._target_ == "dlopt.optim.adamw" and config.order_seed == 3
        assert "hydra" not in config
    assert entries(tmp_path) == set()


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("defaults", "optimizer/adamw"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("config", "optimizer/adamw"), ("searchpath", "conf"), ("defaults-tree", "optimizer"))
        ),
    ],
)
def test_info(kind: str, part: str, tmp_path: Path) -> None:
    result = process("train", "--info", kind, "optimizer=adamw", folder=tmp_path)
    assert result.returncode == 0 and part in result.stdout, result.stderr
    assert entries(tmp_path) == set()


def test_cfg_and_info_explain_errors(tmp_path: Path) -> None:
    for flags in (["--cfg", "job"], ["--info", "config"]):
        assert "did you mean optimizer.lr?" in refused(tmp_path, "train", *flags, "optimizer.lrr=1")
    result = dlopt(tmp_path, "train", "--cfg", "job", "--package", "nope")
    assert result.code == 2 and "--package=nope: no such block" in result.err


def test_cfg_shows_interpolations_that_this_machine_cannot_resolve(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", "--cfg", "job", "name=${oc.env:NOT_THERE}", "note=lr ${nope}")
    assert result.code == 0, result.err
    assert "name: ${oc.env:NOT_THERE}\n" in result.out and "note: lr ${nope}\n" in result.out


def test_a_pipe_that_nobody_reads_any_more_is_no_error() -> None:
    """`dlopt options | head -1`; the broken pipe of something else is one."""

    def work(is_output: bool) -> None:
        reader, writer = os.pipe()
        os.dup2(writer if is_output else os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.close(writer)
        os.close(reader)

        def command(arguments: list[str]) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        with mock.patch("dlopt.cli.find", lambda arguments: (command, [])):
            try:
                cli.main()
            except BrokenPipeError:
                os._exit(1)
            except SystemExit as end:
                os._exit(int(end.code or 0))

    assert in_fork(lambda: work(True)) == 0
    assert in_fork(lambda: work(False)) != 0


def test_accepts_flags_at_any_position(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", *SMALL[:2], "-m", *SMALL[2:], "epochs=1", "hydra.sweep.dir=sweep")
    assert result.code == 0, result.err
    assert (tmp_path / "sweep/0/summary.json").is_file()


# -- as processes: fast, without importing torch


SLOW = {"torch", "torchvision", "numpy", "scipy", "sklearn", "pandas", "PIL", "matplotlib", "tensorboard"}
HEAVY = {"hydra", "omegaconf", "pydantic", "jinja2"}  # of composing and checking a config, and of a page
QUICK = (
    ["--version"],
    ["--help"],
    *([name, "--help"] for name in every_command()),
    ["train", "--cfg", "job"],
    ["train", "-sc", "install=bash"],
)


def imports(folder: Path, *arguments: str) -> tuple["subprocess.CompletedProcess[str]", set[str]]:
    """Runs a command; returns its result and the imported modules (the last line of stderr)."""
    probe = "import sys, dlopt.cli\ntry: dlopt.cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", probe, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return result, set(result.stderr.splitlines()[-1].split())


def is_repetition(arguments: list[str]) -> bool:
    """Whether the line does what that of `train` does, for another command."""
    return arguments[0] not in ("train", "benchmark", "options", "runs", "template") and len(arguments) == 2


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(each, marks=pytest.mark.slow if is_repetition(each) else ()) for each in QUICK],
    ids=" ".join,
)
def test_starts_fast(arguments: list[str], tmp_path: Path) -> None:
    """Imports dominate the start-up time; counting modules, unlike timing, does not depend on the machine's load."""
    result, imported = imports(tmp_path, *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)  # no warnings
    assert "dlopt.cli" in imported and not imported & SLOW
    is_help = arguments[-1] == "--help"
    assert not is_help or not imported & HEAVY
    limits = {"--version": 100, "--help": 200}  # --help reads entry points
    assert len(imported) < limits.get(arguments[0], 400 if is_help else 600)


def test_what_only_reads_folders_starts_fast(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("[]")
    for command in (["sweep", "status", "."], ["runs", "."]):
        result, imported = imports(tmp_path, *command)
        assert result.returncode == 0, result.stderr
        assert not imported & (SLOW | HEAVY)


def test_reports_errors_before_importing_training_dependencies(tmp_path: Path) -> None:
    result, imported = imports(tmp_path, "train", "optimizer.lr=0")
    assert result.returncode == 2 and result.stderr.count("\n") == 2 and "optimizer.lr=0" in result.stderr
    assert not imported & SLOW
    assert entries(tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        "train --help",
        *(pytest.param(f"train {flag}", marks=pytest.mark.slow) for flag in ("--info config", "--cfg job")),
    ],
)
def test_closed_pipe(arguments: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m dlopt {arguments} | head -n 1"
    result = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in result.stderr and "Logging error" not in result.stderr


# -- completion


def completed(folder: Path, *typed: str) -> list[set[str]]:
    """Returns the completions that the function of `-sc install=bash` proposes in a real bash, for each typed line."""
    script = f"""
        PATH={folder}:$PATH
        eval "$(dlopt -sc install=bash)"
        for COMP_LINE in "$@"; do
            COMP_POINT=${{#COMP_LINE}}
            read -ra COMP_WORDS <<< "$COMP_LINE"
            COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
            case "$COMP_LINE" in *" ") COMP_CWORD=$(( COMP_CWORD + 1 ));; esac
            COMPREPLY=()
            hydra_bash_completion
            echo "${{COMPREPLY[@]}}"
        done
        """
    command = folder / "dlopt"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m dlopt "$@"\n')
    command.chmod(0o755)
    line = ["bash", "-c", script, "bash", *typed]
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    assert result.stderr == ""
    return [set(proposed.split()) for proposed in result.stdout.splitlines()]


COMPLETIONS = (
    ("dlopt ", {"train", "eval"}, {"optimizer="}),
    ("dlopt tr", {"train"}, {"eval"}),
    ("dlopt train optim", {"optimizer=", "optimizer."}, {"model="}),
    ("dlopt train optimizer=", {"optimizer=sgd", "optimizer=adamw"}, {"optimizer=_full_batch"}),
    ("dlopt train optimizer=ad", {"optimizer=adam", "optimizer=adamw"}, {"optimizer=sgd"}),
    ("dlopt train optimizer.", {"optimizer.lr=", "optimizer.momentum="}, {"optimizer._target_="}),
    ("dlopt train optimizer=adamw optimizer.e", {"optimizer.eps="}, {"optimizer.momentum="}),
    ("dlopt train -m   see", {"seed="}, set()),
    ("dlopt eval ch", {"checkpoint="}, {"checkpoint."}),
    ("dlopt eval tt", {"tta="}, {"tta.shift="}),
    ("dlopt find-lr up", {"updates="}, {"optimizer="}),
    ("dlopt find-lr optim", {"optimizer=", "optimizer."}, {"updates="}),
    ("dlopt runs --p", {"--paths"}, {"--yes"}),
    ("dlopt options opt", {"optimizer"}, {"optimizer="}),
    ("dlopt template ", {"slurm", "kubernetes", "docker"}, {"optimizer="}),
)


@pytest.mark.slow
def test_completion_in_bash(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/last.pt").touch()
    (tmp_path / "outputs/last.pt.sha256").touch()
    of_files = ("dlopt eval checkpoint=out", "dlopt eval checkpoint=outputs/")
    found = completed(tmp_path, *(typed for typed, _, _ in COMPLETIONS), *of_files)
    for (typed, some, none), completions in zip(COMPLETIONS, found, strict=False):
        assert some <= completions and not none & completions, typed
    assert found[len(COMPLETIONS) :] == [{"checkpoint=outputs/"}, {"checkpoint=outputs/last.pt"}]


def test_refuses_wrong_completion_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    for line in (["-sc", "foo"], ["train", "-sc", "install=tcsh"], ["-sc"], ["-sc", "query=bash"]):
        assert "-sc" in refused(tmp_path, *line)
