"""The command line: sub-commands only. Each parses, hands over, and turns the outcome into an exit code.

torch is imported no sooner than a command needs it: `--help`, `--version` and completion answer at once.
"""

import os
import sys
from collections.abc import Callable, Sequence

import dlopt
from dlopt.errors import RunError, UserError

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
        code = 2
    except RunError as error:
        print(f"dlopt: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # `dlopt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("dlopt: stopped", file=sys.stderr)
        code = 75
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
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"dlopt {dlopt.__version__}")
        return 0
    command, rest = arguments[0], list(arguments[1:])
    asked = [each for each in arguments if each in ("-sc", "--shell-completion")]
    if asked:  # `dlopt -sc install=bash`; Hydra's users type it behind the sub-command
        from dlopt.commands.completion import complete

        return complete(list(arguments[arguments.index(asked[0]) :]), list(commands()))
    found = commands().get(command)
    if found is None:
        raise UserError(f"{command}: there is no such command; allowed: {', '.join(commands())}")
    return found(rest)


def commands() -> dict[str, Callable[[list[str]], int]]:
    """The sub-commands: what each makes of its arguments, to an exit code."""
    return {
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "export": _export,
        "consolidate": _consolidate,
        "show-batch": _show_batch,
        "trajectory": _trajectory,
        "find-lr": _find_lr,
        "summary": _summary,
        "diagnose": _diagnose,
        "bench": _bench,
        "report": _report,
        "runs": _runs,
        "options": _options,
    }


def _train(arguments: list[str]) -> int:
    from dlopt.commands.train import train

    return train(arguments)


def _eval(arguments: list[str]) -> int:
    from dlopt.commands.eval import evaluate

    return evaluate(arguments)


def _predict(arguments: list[str]) -> int:
    from dlopt.commands.predict import predict

    return predict(arguments)


def _export(arguments: list[str]) -> int:
    from dlopt.commands.export import export

    return export(arguments)


def _consolidate(arguments: list[str]) -> int:
    from dlopt.commands.consolidate import consolidate

    return consolidate(arguments)


def _show_batch(arguments: list[str]) -> int:
    from dlopt.commands.show_batch import show_batch

    return show_batch(arguments)


def _trajectory(arguments: list[str]) -> int:
    from dlopt.commands.trajectory import trajectory

    return trajectory(arguments)


def _find_lr(arguments: list[str]) -> int:
    from dlopt.commands.find_lr import find_lr

    return find_lr(arguments)


def _summary(arguments: list[str]) -> int:
    from dlopt.commands.summary import summary

    return summary(arguments)


def _diagnose(arguments: list[str]) -> int:
    from dlopt.commands.diagnose import diagnose

    return diagnose(arguments)


def _bench(arguments: list[str]) -> int:
    from dlopt.commands.bench import bench

    return bench(arguments)


def _report(arguments: list[str]) -> int:
    from dlopt.commands.report import report

    return report(arguments)


def _runs(arguments: list[str]) -> int:
    from dlopt.commands.runs import runs

    return runs(arguments)


def _options(arguments: list[str]) -> int:
    from dlopt.commands.options import options

    return options(arguments)
