"""Generates the results of the optimizer benchmark from the file that comes with dlopt."""

import re
from pathlib import Path

from markup import code, table, text

from dlopt.lab.benchmark import agreement, formats, tuning
from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.results import Results, load_reference
from dlopt.lab.benchmark.scores import Interval, Summary, summarize
from dlopt.lab.benchmark.symptoms import RANGE_HEADS, range_rows
from dlopt.lab.benchmark.table import score_rows, update_rows


def results() -> str:
    """The scores of the optimizers, what they show, the updates to every target, and how the results were made."""
    found = load_reference("small")
    if found is None:
        return ""
    summary = summarize(found)
    facts = found.facts
    commands = [each for each in str(facts["command"]).split("; ") if each]
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if key != "command")
    trials = sum(len(cell.records) for cell in found.cells.values())
    return "\n".join([
        _scores(found, summary),
        "The score is 1 for the fastest optimizer on all workloads and 0 for one that reaches no target, with its 95 %",
        "interval over studies. *Targets* counts the workloads whose target it reaches, *Trials* the trials that do.",
        "The score in evaluations counts those of the loss and its gradient; some optimizers need several per update.",
        "*Cost* is the time of an update relative to SGD, *State* the memory relative to the parameters.",
        "",
        *(f"- {text(each.text)}" for each in findings(found, summary)),
        "",
        "Updates to the target, as the median over studies (-: not reached):",
        "",
        _updates(found, summary),
        *_tuning(found, summary),
        "The search spaces. Draws from a range are uniform in the logarithm:",
        "",
        _spaces(found, summary),
        "The workloads whose best trials lie at an end of a range (median over studies). A wider range may make the",
        "optimizer faster; a single workload may be chance:",
        "",
        _ends(found, summary),
        f"{trials:,} trials, made by {' and '.join(map(code, commands))}, with {text(made)}.",
    ])  # fmt: skip


def predicts() -> str:
    """The rank correlation of the scores with published leagues, what it means, and the sources."""
    found = load_reference("small")
    if found is None:
        return ""
    agreed = agreement.agreements(found)
    return "\n".join([
        table(agreement.HEADS, [list(map(text, map(_unbroken, row))) for row in agreement.rows(agreed)]),
        *map(text, agreement.texts(found, agreed, "note")),
        "",
        *(f"- {text(each)}" for each in agreement.texts(found, agreed, "findings")),
        "",
        "The published results:",
        "",
        *(f"- {text(each)}" for each in agreement.texts(found, agreed, "sources")),
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


def _updates(found: Results, summary: Summary) -> str:
    return table(["Optimizer", *map(code, found.workloads)], update_rows(found, summary, code))


def _spaces(found: Results, summary: Summary) -> str:
    """The keys of each optimizer with their ranges or values, and why, from the comment of its file."""
    rows = []
    for name in summary.order:
        lines = (Path(tuning.__file__).parent / f"space/{name}.yaml").read_text(encoding="utf-8").splitlines()
        why = " ".join(line.removeprefix("# ").rstrip(".") + "." for line in lines if line.startswith("#"))
        keys = [
            f"{code(key.removeprefix('optimizer.'))} {text(_range(each))}" for key, each in found.spaces[name].items()
        ]
        rows.append([code(name), ", ".join(keys), text(why)])
    return table(["Optimizer", "Searched", "Source and reason"], rows)


def _ends(found: Results, summary: Summary) -> str:
    rows = range_rows(found, summary.order)
    cells = [[code(name), code(key.removeprefix("optimizer.")), *map(text, rest)] for name, key, *rest in rows]
    return table([*RANGE_HEADS], cells)


def _range(space: str) -> str:
    """Returns a space in words; a range is logarithmic."""
    if found := re.fullmatch(r"tag\(log,interval\((.+),(.+)\)\)", space):
        return f"{float(found[1]):g} to {float(found[2]):g}"
    if found := re.fullmatch(r"choice\((.+)\)", space):
        return " or ".join(found[1].split(","))
    return f"= {space}"


def _tuning(found: Results, summary: Summary) -> list[str]:
    """The expected scores against the number of trials, and the best expected metric of each workload."""
    tuned = tuning.tuning(found)
    heads = tuning.heads(tuned)
    league = tuning.league_rows(tuned, summary.order, code, _interval)
    best = [[code(name), *map(text, cells)] for name, *cells in tuning.best_results(tuned, found.workloads)]
    return [
        "How much tuning does it take? The expected score of the best of N trials, where one trial means no tuning.",
        "The score of a trial is 1 for the fastest trial of all on the workload, and falls with the ratio of their",
        "updates to the target, to 0 at 4. With bootstrap intervals over the trials (nominally 95 %, they cover about",
        f"92 %) where an optimizer has at least {tuning.PER_TRY} N trials; a resample cannot beat the best trial, so",
        "that larger N have no interval:",
        "",
        table(["Optimizer", *heads], league),
        *(f"- {text(each)}" for each in tuning.leaders(tuned)),
        "",
        "The best expected validation metric of the best of N trials, each trained to the end, and its optimizer:",
        "",
        table(["Workload", *heads], best),
    ]
