"""`dlopt judge BASE CHANGE`: trains pairs of runs until it is clear whether the change is a gain."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from dlopt.basics.folders import LOCK, make
from dlopt.basics.formats import format_count
from dlopt.basics.plain_values import read_regular
from dlopt.basics.status_line import waiting
from dlopt.commands.shared.command_line import read_line, with_document
from dlopt.commands.shared.usage import command_key_names
from dlopt.config.overrides import is_hydra, quoted_plain
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
    key_of,
    keys_of_train,
    read_json,
    role_of,
    short_path,
    show,
    value_of,
    without,
    write_json,
)
from dlopt.lab.claimed_trials import build_pool, results_folder, without_hydra
from dlopt.lab.judge.equal import check_equal, equal_length, updates_of
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
from dlopt.lab.judge.wording import COSTS, cost_lines, cost_warning, ledger_lines, ledger_row, sentences
from dlopt.parallel.processes.rendezvous import refuse_ranks
from dlopt.results import drawing
from dlopt.run.environment import changed_versions
from dlopt.sweeps import series
from dlopt.sweeps.jobs import PlanJob
from dlopt.sweeps.pool import Pool

if TYPE_CHECKING:
    from dlopt.extend import Composer
    from dlopt.lab.judge.ledger import Entry, Ledger

USAGE = """\
Decide whether a change is a gain, or was luck

Usage:
  dlopt judge BASE CHANGE [key=value] [--json]
  dlopt judge ledger BASE [--json]

Examples:
  dlopt judge outputs/train/DATE optimizer.lr=0.2
  dlopt judge "model=mlp epochs=3" "optimizer=adamw optimizer.lr=0.003"
  dlopt judge autoencoder_digits optimizer.lr=0.002 margin=0.001 seeds=30
  dlopt judge outputs/train/DATE optimizer=sam equal=time
  dlopt judge outputs/train/DATE code=../my-branch
  dlopt judge outputs/train/DATE optimizer.lr=0.2 model.activation=gelu because="sharper kinks" ablate=true
  dlopt judge ledger outputs/train/DATE

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
_LEDGER = "ledger"
_LEDGER_BYTES = 2000  # of its document: a program reads it before each proposal
_PARTS = {  # what the verdict on a change without an override says of it
    "better": "loses: the change is better without it", "worse": "is needed: the change is worse without it",
    "equal": "makes no difference above the margin", "same": "has done nothing", "undecided": "may or may not matter",
}  # fmt: skip


def complete(words: Sequence[str]) -> list[str]:
    """Completes an override of the change."""
    typed = [each for each in words[:-1] if "=" in each and " " not in each]
    return keys_of_train([*without(typed, *command_key_names(_judge), CODE), words[-1]])


def judge(arguments: list[str]) -> int:
    """Runs `dlopt judge` with the given arguments; returns the exit code. Raises `UserError` and `RunError`."""
    if arguments[:1] == [_LEDGER]:
        return with_document(arguments[1:], _ledger)
    return with_document([_as_text(each) for each in arguments], _read)


def _as_text(word: str) -> str:
    """Quotes the text of because=..., which Hydra's grammar would parse."""
    return f"because={quoted_plain(value_of(word))}" if key_of(word) == "because" else word


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
    because: Annotated[str | None, "TEXT: why the change should gain, for the ledger"] = None,
    ablate: Annotated[
        bool, "true|false: if the change is better, judge it without each of its overrides, too, in the same ledger"
    ] = False,
    output: Annotated[str | None, "DIR: folder of the ledger and the runs (default: outputs/judge/HASH)"] = None,
) -> tuple[int, dict[str, Any]]:
    """Judges a change; returns the exit code and the document. Raises `UserError` and `RunError`."""
    from dlopt.lab.judge.ledger import Ledger  # with pydantic, which the help does not need
    from dlopt.lab.judge.sequential import fewest_pairs, rate_of

    if equal is not None:
        check_equal(base, change, equal)
    parts = [each for side in typed for each in words_of(side)]
    if ablate and (len(parts) < 2 or equal is not None or change.code is not None):
        raise UserError("ablate=true: needs a change of two or more overrides, without equal= and code=")
    epochs, epochs_of_change = (side.plan.saved["epochs"] for side in (base, change))
    if epochs != epochs_of_change and isinstance(epochs if isinstance(epochs, str) else epochs_of_change, str):
        raise UserError(f"epochs={epochs_of_change}: the base has epochs={epochs}, and a time is that of both sides")
    start = time.monotonic()
    pool, plan_job, _ = build_pool(line, base.lines)
    if not isinstance(pool, Pool) or (change.code is not None and line.overrides):
        raise UserError(f"{line.overrides[0]}: the runs are started on this machine, one per core; leave it out")
    ledger = Ledger(results_folder(output, "judge", base.hash), base.lines, error_rate)
    ledger.entries()  # damage is reported before the data are read
    if base.plan.run_config.settings.budget is not None:
        updates = updates_of(base, ledger.folder)
        base, change = (with_length(line.composer, side, updates) for side in (base, change))
    campaign = _Campaign(
        line.composer, ledger, pool, plan_job, words, _data_of(base), margin, seeds,
        math.inf if minutes is None else start + 60 * minutes,
    )  # fmt: skip
    length: dict[str, Any] = {}
    if equal is not None and not campaign.knows(base, change, equal):
        with waiting("measuring the costs of both sides ..."):
            length = equal_length(base, change, equal)
    entry, code = campaign.judge(base, change, typed, because=because or "", **{"equal": equal, **length})
    document = _document(entry, ledger)
    if ablate and entry.verdict == "better":
        document["ablations"] = []
        left = fewest_pairs(rate_of(len(ledger.entries()) + len(parts), error_rate))
        print(f"\nablation: {len(parts)} more proposals, of which the last takes {left} pairs or more")
        for number, override in enumerate(parts):
            rest = [*parts[:number], *parts[number + 1 :]]
            print(f"\nwithout {override}:")
            try:
                part, stopped = campaign.judge(change, read_change(line.composer, base, rest), rest, of=entry.number)
            except UserError as error:  # the rest alone is no config, or fewer pairs cannot decide
                document["ablations"].append({"without": override, "error": str(error)})
                print(error)
                continue
            document["ablations"].append({"without": override, **_document(part, ledger)})
            if stopped == INTERRUPTED:
                return INTERRUPTED, document
            print(f"{override} {_PARTS[part.verdict]}")
    return code, document


@dataclass(frozen=True)
class _Campaign:
    """The proposals of a ledger, and how their pairs run.

    Attributes:
        words: of the command line.
        data: identity of the data.
        end: time (time.monotonic) after which no pair starts.
    """

    composer: "Composer"
    ledger: "Ledger"
    pool: Pool
    plan_job: PlanJob
    words: Sequence[str]
    data: Mapping[str, Any]
    margin: float
    seeds: int
    end: float

    def _key(self, base: Side, change: Side, equal: Equal | None) -> tuple[str, str]:
        what = [base.hash, change.identity, self.margin, *([] if equal is None else [equal])]
        return hash_of(what), hash_of(trained_on(self.data))

    def knows(self, base: Side, change: Side, equal: Equal | None) -> bool:
        key = self._key(base, change, equal)
        return any((each.key, each.data) == key for each in self.ledger.entries())

    def judge(
        self,
        base: Side,
        change: Side,
        typed: Sequence[str],
        *,
        equal: Equal | None = None,
        because: str = "",
        **more: Any,
    ) -> tuple["Entry", int]:
        """Proposes a change and runs its pairs; returns its entry and the exit code. Raises `UserError`, `RunError`."""
        ledger, seeds = self.ledger, self.seeds
        key, data = self._key(base, change, equal)
        lengths = [each for each in differing(base, change) if role_of(each) is Role.LENGTH]
        entry = ledger.propose(
            key, typed, change.identity.get(CODE), self.margin, seeds, data, because=because, equal=equal, **more
        )
        if because and entry.because != because:
            ledger.record(entry := replace(entry, because=because))
        if entry.updates is not None:
            cost = f"an update of the change costs {entry.update_cost:.3g} times that of the base"
            print(f"equal={entry.equal}: {cost}; the change trains {format_count('updates', entry.updates)}")
            change = with_length(self.composer, change, entry.updates)
        for former in ledger.entries()[: entry.number - 1]:
            if former.key == key:
                print(
                    f"proposal {former.number} was this change with other data: its verdict and its runs do not count"
                )
        home = ledger.folder / str(entry.number)
        judgement = Judgement(home, dict(zip(SIDES, (base, change), strict=True)), entry, seeds, data=self.data)
        _warn_of_conditions(judgement)
        is_answered = _is_answered(entry, seeds)
        if not is_answered:
            make(home, "output", exist_ok=True)
            judgement.end = self.end
            with _lock(home):
                # The judge that held the lock until now may have gone further than this one would.
                entry = judgement.entry = ledger.entries()[entry.number - 1]
                is_answered = _is_answered(entry, seeds)
                if not is_answered:
                    judgement.refuse_foreign()
                    series.begin(home, "judge", ["judge", *self.words], len(SIDES) * seeds)
                    print(f"proposal {entry.number} against this base, in {short_path(home)}", flush=True)
                    try:
                        run(judgement, self.pool, self.plan_job)
                    except KeyboardInterrupt:
                        print("interrupted; the same command continues", file=sys.stderr)
                        return entry, INTERRUPTED
                    entry = judgement.concluded()
                    ledger.record(entry)
                    _draw(judgement, entry)
        print("\n".join([*sentences(entry, ledger.rate), *(cost_lines(entry) if entry.pairs else [])]))
        if (warning := cost_warning(entry, lengths)) is not None:
            print(warning, file=sys.stderr)
        if is_answered:
            print(f"from the ledger: proposal {entry.number}, {short_path(home)}")
        elif not entry.is_final:
            more_seeds = f" with seeds={2 * seeds}" if entry.pairs >= seeds else ""
            print(f"to continue, repeat the command{more_seeds}")
        if home.is_dir():
            write_json(home / "judge.json", _document(entry, ledger))
        return entry, EXIT.get(entry.verdict, UNDECIDED)


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


def _document(entry: "Entry", ledger: "Ledger") -> dict[str, Any]:
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
        "because": entry.because or None,
        "of": entry.of,
        "folder": str(ledger.folder / str(entry.number)),
    }


# -- the ledger


def _ledger(words: list[str]) -> tuple[int, dict[str, Any]]:
    """Prints the proposals of a base; returns their document. Raises `UserError`."""
    line = read_line(words, several="one base is needed")
    values, rest = line.take(_read_ledger)
    if len(rest.overrides) != 1:
        raise UserError("BASE missing: dlopt judge ledger BASE; the base as it was typed, or its folder")
    base = read_base(line.composer.with_words(*trusting(line.composer)), rest.overrides[0])
    return DONE, _read_ledger(base, **values)


def _read_ledger(
    base: Side, *, output: Annotated[str | None, "DIR: folder of the ledger (default: outputs/judge/HASH)"] = None
) -> dict[str, Any]:
    from dlopt.lab.judge.ledger import Ledger

    folder = results_folder(output, "judge", base.hash)
    entries = Ledger(folder, base.lines, 0.0).entries()
    if not entries:
        raise UserError(f"{short_path(folder)}: no change was judged against this base")
    for text in ledger_lines(entries):
        print(text)
    shown = [ledger_row(each) for each in reversed(entries)]
    while len(json.dumps(shown)) > _LEDGER_BYTES:  # the oldest are in the file
        shown.pop()
    return {"folder": str(folder), "proposals": len(entries), "newest": shown}
