"""Generates the results of the optimizer benchmark from the file that comes with dlopt."""

from dataclasses import replace

from markup import code, table, text

from dlopt.lab.benchmark import formats, tuning
from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.results import Results, load_reference
from dlopt.lab.benchmark.scores import Interval, Summary, summarize
from dlopt.lab.benchmark.symptoms import SIDES, range_ends
from dlopt.lab.benchmark.table import score_rows, update_rows

SHOWN = 10  # rows of the tables after the first one


def results() -> str:
    """The scores of the optimizers, what they show, the updates to every target, and how the results were made."""
    found = load_reference("small")
    if found is None:
        return ""
    whole = summarize(found)
    summary = replace(whole, measures=[each for each in whole.measures if each != "evaluations"])
    facts = found.facts
    commands = [each for each in str(facts["command"]).split("; ") if each]
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if key != "command")
    trials = sum(len(cell.records) for cell in found.cells.values())
    return "\n".join([
        _scores(found, summary),
        "The score is 1 for the fastest optimizer on all workloads and 0 for one that reaches no target, with its 95 %",
        "interval over studies. *Targets* counts the workloads whose target it reaches, *Trials* the trials that do.",
        "*Cost* is the time of an update relative to SGD, *State* the memory relative to the parameters.",
        _evaluations(whole),
        "",
        *(f"- {text(each.text)}" for each in findings(found, summary)),
        "",
        f"Updates to the target, as the median over studies (-: not reached), of the first {SHOWN}. The others are in",
        "[small.json](../dlopt/lab/benchmark/reference/small.json), and in the report of your own benchmark:",
        "",
        _updates(found, summary),
        *_tuning(found, summary),
        "The files in `dlopt/lab/benchmark/space` have the search spaces with their sources and reasons. The best",
        "trials of some optimizers lie in a tenth of a range at its end (median over studies). A wider range may make",
        "them faster; a single workload may be chance:",
        "",
        *_ends(found, summary),
        "",
        f"{trials:,} trials, made by {' and '.join(map(code, commands))}, with {text(made)}.",
    ])  # fmt: skip


def self_tuning() -> str:
    """The scores of the optimizers without tuning, what they show, and the updates to every target."""
    found = load_reference("small", "self_tuning")
    if found is None:
        return ""
    summary = summarize(found)
    facts = found.facts
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if key != "command")
    keys = {name: ", ".join(f"{key}={value}" for key, value in space.items()) for name, space in found.spaces.items()}
    return "\n".join([
        _scores(found, summary),
        *(f"- {text(each.text)}" for each in findings(found, summary)),
        *(f"- `{name}` has the keys {code(typed)}." for name, typed in keys.items() if typed),
        "",
        _updates(found, summary),
        f"Made by {code(str(facts['command']))}, with {text(made)}.",
    ])  # fmt: skip


def _scores(found: Results, summary: Summary) -> str:
    heads = ["Optimizer", *(f"Score in {each}" for each in summary.measures), "Targets", "Trials", "Cost", "State"]
    return table(heads, score_rows(found, summary, code, _interval))


def _interval(score: Interval | None) -> str:
    return text(_unbroken(formats.interval(score)))


def _unbroken(interval: str) -> str:
    """Keeps an interval in one line of its cell, with no-break spaces."""
    return interval.replace(" ", "\N{NO-BREAK SPACE}")


def _evaluations(summary: Summary) -> str:
    """Says whose score in evaluations of the loss is not that in updates."""
    scores = {name: [summary.score(name, each) for each in ("updates", "evaluations")] for name in summary.order}
    others = [f"{code(name)} {_interval(each)}" for name, (updates, each) in scores.items() if each != updates]
    if not others:
        return "The scores in evaluations of the loss are those in updates."
    return f"The scores in evaluations of the loss are those in updates, except that of {', '.join(others)}."


def _updates(found: Results, summary: Summary) -> str:
    return table(["Optimizer", *map(code, found.workloads)], update_rows(found, summary, code)[:SHOWN])


def _ends(found: Results, summary: Summary) -> list[str]:
    """A line for each end of a key's ranges and workload: the optimizers whose best trials lie there."""
    optimizers: dict[tuple[str, str, str], list[str]] = {}
    for name in summary.order:
        for end in range_ends(found, name):
            for side in SIDES:
                for workload in end[side]:
                    optimizers.setdefault((side, end["key"], workload), []).append(code(name))
    return [
        f"- {code(key.removeprefix('optimizer.'))}, {side} end, {code(workload)}: {', '.join(names)}"
        for (side, key, workload), names in optimizers.items()
    ]


def _tuning(found: Results, summary: Summary) -> list[str]:
    """The expected scores against the number of trials."""
    tuned = tuning.tuning(found)
    heads = tuning.heads(tuned)
    league = tuning.league_rows(tuned, summary.order[:SHOWN], code, _interval)
    return [
        "How much tuning does it take? The [expected score](howto/benchmark.md#read-the-results) of the best of N",
        "trials, where one trial means no tuning:",
        "",
        table(["Optimizer", *heads], league),
        *(f"- {text(each)}" for each in tuning.leaders(tuned)),
        "",
    ]
