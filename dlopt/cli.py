"""The command line: sub-commands only. Each parses, hands over, and turns the outcome into an exit code.

torch is imported no sooner than a command needs it: `--help`, `--version` and completion answer at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import dlopt
from dlopt.errors import DONE, FAILED, INTERRUPTED, USER_ERROR, RunError, UserError, suggest

COMMANDS = {  # each takes its arguments and returns the exit code
    "train": "dlopt.commands.train:train",
    "eval": "dlopt.commands.eval:evaluate",
    "predict": "dlopt.commands.predict:predict",
    "export": "dlopt.commands.export:export",
    "consolidate": "dlopt.commands.consolidate:consolidate",
    "show-batch": "dlopt.commands.show_batch:show_batch",
    "trajectory": "dlopt.commands.trajectory:trajectory",
    "find-lr": "dlopt.commands.find_lr:find_lr",
    "summary": "dlopt.commands.summary:summary",
    "diagnose": "dlopt.commands.diagnose:diagnose",
    "bench": "dlopt.commands.bench:bench",
    "report": "dlopt.commands.report:report",
    "runs": "dlopt.commands.runs:runs",
    "options": "dlopt.commands.options:options",
}

USAGE = f"""\
dlopt {dlopt.__version__}: runs experiments on the optimization of deep networks

  dlopt train [group=choice] [key=value] [-m]    train; `dlopt train --help` lists every group, choice and key
  dlopt eval checkpoint=PATH [tta=CHOICE]        test a checkpoint, or the mean of several; with many crops
  dlopt predict checkpoint=PATH images=FOLDER    label images
  dlopt export checkpoint=PATH format=FORMAT     a model for other tools: safetensors, onnx, torch_export
  dlopt consolidate checkpoint=PATH              one file of a checkpoint in shards
  dlopt show-batch [group=choice] [key=value]    draw what an augmentation does to images
  dlopt trajectory function=F optimizer=a,b      draw the paths of optimizers; or schedule=a,b, or checkpoint=PATH
  dlopt find-lr [group=choice] [key=value]       a learning-rate range test; `dlopt train optimizer.lr=auto` uses it
  dlopt summary model=CHOICE [key=value]         a model's layers: shapes, parameters, operations, memory
  dlopt diagnose [group=choice] [key=value]      activations, gradients and curvature of a model; a verdict per layer
  dlopt bench parallel=a,b processes=1,2         speed, memory and communication of parallel modes; of devices
  dlopt report DIR... [key=value]                compare runs and sweeps: a table, pictures, a page (--open, --watch)
  dlopt runs [DIR...] [condition...]             list and find runs; `dlopt runs clean` removes spare checkpoints
  dlopt options [group | group=choice]           every choice of every group; a group's keys with their defaults

  dlopt train optimizer=adamw schedule=cosine_warmup epochs=20
  dlopt train -m optimizer.lr=0.01,0.03,0.1 seed=0,1,2
  dlopt train resume=auto
  dlopt train from=outputs/train/DATE optimizer.lr=0.01

Completion for bash: eval "$(dlopt train -sc install=bash)"
"""


def main() -> None:
    """The `dlopt` command."""
    _open_streams()
    try:
        code = _main(sys.argv[1:])
    except UserError as error:
        print(f"dlopt: {error}", file=sys.stderr)
        code = USER_ERROR
    except RunError as error:
        print(f"dlopt: {error}", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:  # `dlopt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except KeyboardInterrupt:
        print("dlopt: stopped", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _open_streams() -> None:
    """Puts nothing in the place of streams that were closed (`<&- >&-`, some cron daemons).

    Or else the next files that are opened take their numbers, and what a library writes to stderr goes into them.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
            setattr(sys, name, os.fdopen(number, mode))


def _main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return DONE
    if arguments[0] in ("-V", "--version"):
        print(f"dlopt {dlopt.__version__}")
        return DONE
    for place, each in enumerate(arguments):  # `dlopt -sc install=bash`; Hydra's users type it after the sub-command
        if each in ("-sc", "--shell-completion"):
            from dlopt.commands.completion import complete

            return complete(list(arguments[place:]), list(COMMANDS))
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"{name}: unknown command; {suggest(name, COMMANDS, 'dlopt --help')}")
    module, _, function = COMMANDS[name].partition(":")
    code: int = getattr(importlib.import_module(module), function)(list(arguments[1:]))
    return code
