"""`dlopt judge BASE CHANGE`: trains pairs of runs until it is clear whether the change is a gain."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from dlopt.basics.folders import LOCK, make
from dlopt.basics.formats import format_count
from dlopt.basics.plain_values import read_regular
from dlopt.basics.status_line import waiting
from dlopt.commands.shared.command_line import read_line, with_document
from dlopt.commands.shared.usage import command_key_names
from dlopt.config.overrides import is_hydra
from dlopt.extend import (
    DONE,
    INTERRUPTED,
    Count,
    Line,
    NonNegative,
    Positive,
    Role,
    RunFolder,
    UserError,
    keys_of_train,
    read_json,
    role_of,
    short_path,
    show,
    without,
    write_json,
)
from dlopt.lab.claimed_trials import build_pool, results_folder, without_hydra
from dlopt.lab.judge.equal import check_equal, equal_length
from dlopt.lab.judge.proposal import (
    CODE,
    SIDES,
    TRUST,
    Equal,
    Side,
    differing,
    hash_of,
    read_base,
    read_change,
    trusting,
    with_length,
    words_of,
)
from dlopt.lab.judge.running import Judgement, run, trained_on
from dlopt.lab.judge.wording import COSTS, cost_lines, cost_warning, sentences
from dlopt.parallel.processes.rendezvous import refuse_ranks
from dlopt.results import drawing
from dlopt.run.environment import changed_versions
from dlopt.sweeps import series
from dlopt.sweeps.pool import Pool

if TYPE_CHECKING:
    from dlopt.lab.judge.ledger import Entry, Ledger

USAGE = """\
Decide whether a change is a gain, or was luck

Usage: dlopt judge BASE CHANGE [key=value] [--json]

Examples:
  dlopt judge outputs/train/DATE optimizer.lr=0.2
  dlopt judge "model=mlp epochs=3" "optimizer=adamw optimizer.lr=0.003"
  dlopt judge autoencoder_digits optimizer.lr=0.002 margin=0.001 seeds=30
  dlopt judge outputs/train/DATE optimizer=sam equal=time
  dlopt judge outputs/train/DATE code=../my-branch

Trains the base and the change with the same seed, then with the next one, until it is clear whether the change gains
or loses more than the margin in the monitored metric, or the budget ends. However many changes are judged against one
base, the probability of a wrong verdict is at most error_rate. A change that was judged before is answered from the
ledger. Below the verdict are the costs of both sides. Exit code: 0 better, 3 worse, 4 undecided; 1 a run failed; 2
wrong input.

  BASE :: the folder of a finished run, a recipe, or overrides in quotes
  CHANGE :: overrides of the base, or the folder of another run
  allow_packages=[a,b] :: packages that BASE or CHANGE names callables of
  code=FOLDER :: (as CHANGE, or with overrides) folder of another checkout of a package, which the change imports first
  {_judge}
  --json :: print one JSON document; progress goes to stderr
"""

METHOD = "pseudomedian of the paired differences, with the confidence sequence of a sequential test of their symmetry"
EXIT = {"better": DONE, "worse": 3}
UNDECIDED = 4


def complete(words: Sequence[str]) -> list[str]:
    """Completes an override of the change."""
    typed = [each for each in words[:-1] if "=" in each and " " not in each]
    return keys_of_train([*without(typed, *command_key_names(_judge), CODE), words[-1]])


def judge(arguments: list[str]) -> int:
    """Runs `dlopt judge` with the given arguments; returns the exit code. Raises `UserError` and `RunError`."""
    return with_document(arguments, _read)


def _read(words: list[str]) -> tuple[int, dict[str, Any]]:
    line = read_line(words, several="a change is one config; judge one after the other")
    refuse_ranks("dlopt judge", "all runs")
    values, rest = line.take(_judge)
    typed = without_hydra(rest, "dlopt judge", _judge)
    sides = without(typed, TRUST)
    if len(sides) < 2:
        missing = "CHANGE" if sides else "BASE and CHANGE"
        raise UserError(f"{missing} missing: dlopt judge outputs/train/DATE optimizer.lr=0.2; see `dlopt judge --help`")
    composer = line.composer.with_words(*(word for side in typed for word in words_of(side)))
    line = replace(line, composer=composer.with_words(*trusting(composer)))
    base = read_base(line.composer, sides[0])
    change = read_change(line.composer, base, sides[1:])
    hydra = replace(line, overrides=[each for each in rest.overrides if is_hydra(each)])
    return _judge(hydra, words, base, change, sides[1:], **values)


def _judge(
    line: Line,
    words: Sequence[str],
    base: Side,
    change: Side,
    typed: Sequence[str],
    *,
    margin: Annotated[
        NonNegative, "X: better is a gain above X, worse below -X, in the metric; 0.01 is one point of accuracy"
    ] = 0.0,
    equal: Annotated[
        Equal | None, "updates|flops|time: train the change to this cost of the base (default: each its own length)"
    ] = None,
    seeds: Annotated[Count, "N: pairs of runs after which the change stays undecided"] = 20,
    minutes: Annotated[Positive | None, "N: start no pair after N minutes; the same command continues"] = None,
    error_rate: Annotated[
        float,
        Interval(gt=0, lt=1),
        "X: probability of a wrong verdict among all changes proposed against this base",
    ] = 0.05,
    output: Annotated[str | None, "DIR: folder of the ledger and the runs (default: outputs/judge/HASH)"] = None,
) -> tuple[int, dict[str, Any]]:
    """Judges a change; returns the exit code and the document. Raises `UserError` and `RunError`."""
    from dlopt.lab.judge.ledger import Ledger  # with pydantic, which the help does not need

    if equal is not None:
        check_equal(base, change, equal)
    if any(side.plan.run_config.settings.budget for side in (base, change)):
        raise UserError(f"epochs={change.plan.saved['epochs']}: train the base first, and judge against its folder")
    start = time.monotonic()
    pool, plan_job, _ = build_pool(line, base.lines)
    if not isinstance(pool, Pool) or (change.code is not None and line.overrides):
        raise UserError(f"{line.overrides[0]}: the runs are started on this machine, one per core; leave it out")
    ledger = Ledger(results_folder(output, "judge", base.hash), base.lines, error_rate)
    ledger.entries()  # damage is reported before the data are read
    data = _data_of(base)
    what = [base.hash, change.identity, margin, *([] if equal is None else [equal])]
    key, data_hash = hash_of(what), hash_of(trained_on(data))
    lengths = [each for each in differing(base, change) if role_of(each) is Role.LENGTH]
    length: dict[str, Any] = {}
    if equal is not None and not any((each.key, each.data) == (key, data_hash) for each in ledger.entries()):
        with waiting("measuring the costs of both sides ..."):
            length = equal_length(base, change, equal)
    entry = ledger.propose(key, typed, change.identity.get(CODE), margin, seeds, data_hash, **length)
    if entry.updates is not None:
        cost = f"an update of the change costs {entry.update_cost:.3g} times that of the base"
        print(f"equal={entry.equal}: {cost}; the change trains {format_count('updates', entry.updates)}")
        change = with_length(line.composer, change, entry.updates)
    for former in ledger.entries()[: entry.number - 1]:
        if former.key == key:
            print(f"proposal {former.number} was this change with other data: its verdict and its runs do not count")
    home = ledger.folder / str(entry.number)
    judgement = Judgement(home, dict(zip(SIDES, (base, change), strict=True)), entry, seeds, data=data)
    _warn_of_conditions(judgement)
    is_answered = _is_answered(entry, seeds)
    if not is_answered:
        make(home, "output", exist_ok=True)
        judgement.end = math.inf if minutes is None else start + 60 * minutes
        with _lock(home):
            # The judge that held the lock until now may have gone further than this one would.
            entry = judgement.entry = ledger.entries()[entry.number - 1]
            is_answered = _is_answered(entry, seeds)
            if not is_answered:
                judgement.refuse_foreign()
                series.begin(home, "judge", ["judge", *words], len(SIDES) * seeds)
                print(f"proposal {entry.number} against this base, in {short_path(home)}", flush=True)
                try:
                    run(judgement, pool, plan_job)
                except KeyboardInterrupt:
                    print("interrupted; the same command continues", file=sys.stderr)
                    return INTERRUPTED, _document(entry, ledger, home)
                entry = judgement.concluded()
                ledger.record(entry)
                _draw(judgement, entry)
    print("\n".join([*sentences(entry, error_rate), *(cost_lines(entry) if entry.pairs else [])]))
    if (warning := cost_warning(entry, lengths)) is not None:
        print(warning, file=sys.stderr)
    if is_answered:
        print(f"from the ledger: proposal {entry.number}, {short_path(home)}")
    elif not entry.is_final:
        more = f" with seeds={2 * seeds}" if entry.pairs >= seeds else ""
        print(f"to continue, repeat the command{more}")
    document = _document(entry, ledger, home)
    if home.is_dir():
        write_json(home / "judge.json", document)
    return EXIT.get(entry.verdict, UNDECIDED), document


def _is_answered(entry: "Entry", seeds: int) -> bool:
    return entry.is_final or entry.pairs >= seeds


def _lock(home: Path) -> IO[str]:
    """Locks a proposal: a second judge of the change would run the same pairs. Raises `UserError` if one is running."""
    try:
        return RunFolder(home).lock()
    except UserError:
        if not RunFolder(home).is_live():
            raise
        try:
            holder = f"process {int(read_regular(home / LOCK, 20))}"
        except (OSError, ValueError):  # it has not written its number yet
            holder = "another process"
    advice = "repeat the command when it has ended, and the ledger answers"
    raise UserError(f"{short_path(home)}: {holder} is judging this change; {advice}")


def _data_of(base: Side) -> Mapping[str, Any]:
    """Reads the data and identifies them, as every run does. Raises `UserError`."""
    from dlopt.training.builders.dataset import read_source  # imports torch

    with waiting("reading the data ..."):
        return read_source(base.plan.run_config, None, ("train", "val")).identity or {}


def _warn_of_conditions(judgement: Judgement) -> None:
    """Warns if the runs of an earlier command had other versions, or another device: pairs of both are compared."""
    folders = map(judgement.run_folder, judgement.pair(max(judgement.entry.pairs - 1, 0)))
    for folder in folders:
        before, config = read_json(folder.path / "environment.json"), folder.config()
        if before is None or config is None:
            continue
        saved = judgement.sides["base"].plan.saved
        changed = changed_versions(before)
        changed += [
            f"{key}={show(saved[key])} (was {show(config[key])})"
            for key in ("device", "threads")
            if key in config and config[key] != saved[key]
        ]
        if changed:
            words = f"warning: earlier runs of this proposal had other conditions: {', '.join(changed)}"
            print(f"{words}; output=DIR starts again", file=sys.stderr)
        return


def _draw(judgement: Judgement, entry: "Entry") -> None:
    if judgement.looks:
        from dlopt.lab.judge.picture import draw

        words = " ".join(entry.change)
        title = drawing.literal(f"{words[:60]}: {entry.verdict}")
        made = draw(title, entry.metric, entry.gains, judgement.looks, entry.margin)
        for path in drawing.save(made, judgement.folder, "judge"):
            print(short_path(path))


def _document(entry: "Entry", ledger: "Ledger", folder: Path) -> dict[str, Any]:
    """Returns the document of --json; gains are positive where the change is better."""
    return {
        "verdict": entry.verdict,
        "reason": " ".join(sentences(entry, ledger.rate)),
        "metric": entry.metric,
        "gain": entry.estimate,
        "low": entry.low,
        "high": entry.high,
        "pairs": entry.pairs,
        "gains": list(entry.gains),
        "margin": entry.margin,
        "proposal": entry.number,
        "error_rate": entry.rate,
        "ledger_error_rate": ledger.rate,
        "change": list(entry.change),
        "code_sha256": entry.code_sha256,
        "equal": entry.equal,
        "update_cost": entry.update_cost,
        "updates": entry.updates,
        "costs": {
            **{side: {name: entry.cost(side, name) for name in COSTS} for side in SIDES},
            "ratio": {name: entry.times(name) for name in COSTS},
        },
        "method": METHOD,
        "folder": str(folder),
    }
