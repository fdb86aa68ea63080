"""`dlopt verify`: a certificate of an optimizer, anybody's."""

import platform
from typing import TYPE_CHECKING, Annotated, Any

from dlopt.basics.status_line import status_line, waiting
from dlopt.commands.shared.command_line import read_line, with_document
from dlopt.extend import DONE, FAILED, Line, Names, UserError, key_of

if TYPE_CHECKING:
    from dlopt.extend import Component
    from dlopt.lab.verify.checks import Check
    from dlopt.lab.verify.outcome import CheckOutcome
    from dlopt.lab.verify.subject import Subject

READS = ("optimizer", "allow_packages")
USAGE = """\
Check that an optimizer is what it says

Usage:
  dlopt verify optimizer=NAME [optimizer.KEY=VALUE] [paper=NAME] [--json]

Examples:
  dlopt verify optimizer=mine.MyOptimizer allow_packages=[mine]
  dlopt verify optimizer=mine.MyMuon allow_packages=[mine] paper=muon
  dlopt verify optimizer=torch.optim.ASGD
  dlopt verify optimizer=lion optimizer.cautious=true

Runs thirteen checks on small tensors, on a CPU: updates beside the paper's, descent, the learning rate, weight decay,
missing gradients, resume, groups, fused implementations, precision, NaN and other unusual input, cost, and defaults. A
check passes, fails, is undecided, or does not apply; a failure comes with at most ten lines of PyTorch that show it.
Exit code 1 if a check fails.

  optimizer=NAME :: a choice of the group optimizer, or the dotted name of a class, with allow_packages
  {_verify}
  --json :: print a JSON document
and these keys of `dlopt train`:
    {READS}
"""


def verify(arguments: list[str]) -> int:
    """Verifies an optimizer; returns the exit code: 1 if a check fails. Raises `UserError`."""
    return with_document(arguments, _read)


def _read(words: list[str]) -> tuple[int, dict[str, Any]]:
    from dlopt.config.run_config import GROUPS  # imports torch

    several = "verify one optimizer at a time"
    line = read_line(words, several=several)
    if "optimizer" not in map(key_of, line.overrides):
        raise UserError("dlopt verify: name the optimizer: optimizer=adamw, or optimizer=mine.MyOptimizer")
    for override in line.overrides:
        if key_of(override).removeprefix("optimizer.").split(".")[0] in GROUPS["optimizer"].common_names:
            raise UserError(f"{override}: `dlopt verify` makes its own parameters; this key is of `dlopt train`")
    subject, paper, results = line.call(_verify, "dlopt verify", READS, several=several)
    _print(subject, results)
    failed = any(outcome.status == "fail" for _, outcome in results)
    return FAILED if failed else DONE, document(subject, paper, results)


Results = list[tuple["Check", "CheckOutcome"]]


def _verify(
    line: Line,
    *,
    paper: Annotated[
        str | None, "NAME: compare with the updates of this method (default: by the name of the class)"
    ] = None,
) -> tuple["Subject", str | None, Results]:
    """Runs all checks on the optimizer of the line. Raises `UserError`."""
    run_config, _ = line.run_config()
    with waiting("loading the methods ..."):
        from dlopt.lab.verify.methods import METHODS, known

    if paper is not None:
        Names("method", METHODS, prefix="paper=").check(paper)
    subject = subject_of(run_config.optimizer)
    method = METHODS[paper] if paper is not None else known(subject.target, subject.keys)
    return subject, paper, certify(subject, method)


def subject_of(component: "Component") -> "Subject":
    """Returns what to verify of an optimizer's component."""
    from dlopt.extend import Component
    from dlopt.lab.verify.subject import Subject

    arguments = dict(component.arguments)
    bases = {key: value for key, value in arguments.items() if isinstance(value, Component)}
    if not bases:
        return Subject(component.target, arguments)
    [(key, base)] = bases.items()
    own = {**{each: value for each, value in arguments.items() if each != key}, "lr": None}
    return Subject(component.target, own, (key, base.target, dict(base.arguments)))


def certify(subject: "Subject", method: Any) -> Results:
    """Runs all checks; an optimizer with which no update succeeds fails the descent, and no other check applies."""
    with waiting("loading the checks ..."):
        from dlopt.lab.verify.checks import CHECKS, message_of, run
        from dlopt.lab.verify.outcome import CheckOutcome
        from dlopt.lab.verify.subject import find

    try:
        subject = find(subject)
    except Exception as error:
        none = CheckOutcome("not applicable", "no update succeeds")
        return [
            (check, CheckOutcome("fail", message_of(error)) if check.name == "descent" else none) for check in CHECKS
        ]
    results = []
    with status_line() as show:
        for number, check in enumerate(CHECKS, 1):
            show(f"check {number}/{len(CHECKS)}: {check.name}")
            results.append((check, run(check, subject, method)))
    return results


def document(subject: "Subject", paper: str | None, results: Results) -> dict[str, Any]:
    """Returns the results as plain values, for docs/howto/json.md."""
    import torch

    from dlopt.lab.verify.subject import literal

    return {
        "optimizer": f"{subject.target.__module__}.{subject.target.__name__}",
        "keys": {key: value if _is_plain(value) else literal(value) for key, value in subject.keys.items()},
        "paper": paper,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "failed": [check.name for check, outcome in results if outcome.status == "fail"],
        "checks": [
            {
                "name": check.name,
                "meaning": check.meaning,
                "tolerance": check.tolerance,
                "status": outcome.status,
                "reason": outcome.reason,
                "reproduction": outcome.reproduction or None,
            }
            for check, outcome in results
        ],
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


def _print(subject: "Subject", results: Results) -> None:
    from dlopt.tracking.terminal_text import FittedTable, plain_table, standard_output

    console = standard_output()
    table = plain_table(left=["check", "result"], fold=["meaning"])
    styles = {"pass": "green", "fail": "bold red", "undecided": "yellow", "not applicable": "dim"}
    for check, outcome in results:
        said = outcome.reason if outcome.status != "pass" or not check.meaning else check.meaning
        if outcome.status == "pass" and outcome.reason:
            said += f" ({outcome.reason})"
        table.add_row(check.name, outcome.status, said, style=styles.get(outcome.status, ""))
    console.print(FittedTable(table))
    for check, outcome in results:
        if outcome.reproduction:
            console.print(f"\n{check.name}: run this to see it", style="bold")
            console.print(outcome.reproduction, soft_wrap=True, highlight=False, markup=False)
