"""`dlopt template`: prints job scripts, a manifest, container files, a guide for programs, and the JSON schema."""

from collections.abc import Sequence

from dlopt._version import ROOT
from dlopt.basics.errors import DONE, UserError
from dlopt.basics.names import Names
from dlopt.commands.shared.command_line import read_line
from dlopt.config.overrides import parts_of

TEMPLATES = {  # name -> file in dlopt/templates/
    "slurm": "train.sbatch",
    "kubernetes": "kubernetes.yaml",
    "docker": "Dockerfile",
    "apptainer": "dlopt.def",
    "agents": "AGENTS.md",
}

SCHEMA = "schema"
_FLAGS = ("--config-dir", "-cd", "--config-name", "-cn")

USAGE = """\
Print a job script, a manifest, a container file, a guide for programs, or the JSON schema of experiment files

Usage: dlopt template NAME > FILE
       dlopt template schema [--config-dir DIR] > dlopt.schema.json

  slurm :: job script of sbatch: several nodes, requeue on preemption and timeout
  kubernetes :: manifest: Job, Service, volume for outputs, memory for /dev/shm
  docker :: Dockerfile
  apptainer :: definition file
  agents :: guide for a program that proposes changes in a loop: the commands, what not to read, exit codes, costs
  schema :: JSON schema with which editors complete and check experiment files, also with the choices in DIR

Fill in the marked lines; the comments at the top of each file show how to use it.

Examples:
  dlopt template slurm > train.sbatch
  dlopt template kubernetes > train.yaml
"""


def complete(_: Sequence[str]) -> list[str]:
    """Completes the name of a template."""
    return [*TEMPLATES, SCHEMA]


def template(arguments: list[str]) -> int:
    """Prints the template that the argument names. Raises `UserError`."""
    names = [*TEMPLATES, SCHEMA]
    words = arguments[1:]
    key = parts_of(words[0])[0] if words else ""
    if arguments[:1] == ["slurm"] and words and (key.startswith("-") or key != words[0]) and key not in _FLAGS:
        flags = " ".join(words) if words[0].startswith("-") else " ".join(f"--{each}" for each in words)
        raise UserError(
            f"template {' '.join(arguments)}: a template takes no options; pass them to sbatch, whose options win over "
            f"the script's: sbatch {flags} train.sbatch"
        )
    line = read_line(arguments, several="template prints one file")
    if len(line.overrides) != 1:
        typed = " ".join(["template", *arguments])
        raise UserError(f"{typed}: needs one name; allowed: {', '.join(names)}")
    [name] = line.overrides
    if name == SCHEMA:
        from dlopt.config.json_schema import text

        print(text(line.composer.config_dir), end="")
        return DONE
    line.refuse_config_files("by this template; `dlopt template schema` reads it")
    Names("template", names).check(name)
    print((ROOT / "templates" / TEMPLATES[name]).read_text(encoding="utf-8"), end="")
    return DONE
