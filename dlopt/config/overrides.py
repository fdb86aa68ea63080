"""Overrides of the command line: the only module that takes them apart, quotes them and puts them together.

An override is passed on as Hydra's parsed `Override` where its value matters, and as its text where it is only kept,
shown or composed again.
"""

import copy
import functools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import UserError
from dlopt.basics.secrets import is_secret_name, redact, reference

if TYPE_CHECKING:  # Hydra is imported late: most commands only need the keys
    from hydra.core.override_parser.types import Override, RangeSweep

_CLOSED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\([^][(){}]*\)|\[[^][(){}]*\]|\{[^][(){}]*\}""")
_SENTENCES = ("note",)  # keys whose value is one text, commas and brackets included
TEXTS = (  # keys whose values are texts, never numbers: often dates
    "name", "note", "tags", "resume", "init_from", "output", "hydra.run.dir", "hydra.sweep.dir", "checkpoint", "images",
    "data.root", "data.file",
)  # fmt: skip
_NUMBER = r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d[\d_]*)?|nan|inf"  # as Hydra reads it
_TEXT_READ_OTHERWISE = rf"""(['"])({_NUMBER}|null|true|false|.*\\.*)\1"""  # without its quotes
_MOST_VALUES = 1_000_000  # of a range: more are a typing error, which would take all memory
OUTPUT = "output"  # the folder of a run or sweep, as of the other commands
# Words of a sweep, which are no keys of its jobs.
SEEDS, SPACE, TRIALS, WAIT, AT = "seeds", "space", "trials", "wait", "at"
BRANCH = "branch"  # the axis that `at` becomes
SWEEP_WORDS = (SEEDS, SPACE, TRIALS, WAIT, AT)


def key_of(override: "str | Override") -> str:
    """Returns the dotted key of an override: `hydra.launcher` of `hydra/launcher=joblib`, `model.x` of `+model.x=1`."""
    return re.split(r"[=@]", text_of(override).lstrip("+~"), maxsplit=1)[0].replace("/", ".")


def group_of(override: "str | Override") -> str:
    """Returns the group, or the first part of the key: `schedule` of `++schedule.warmup_epochs=1`."""
    return key_of(override).partition(".")[0]


def value_of(override: "str | Override") -> str:
    """Returns the text of the value: `1` of `+model.x=1`."""
    return text_of(override).partition("=")[2]


def parts_of(override: str) -> tuple[str, str]:
    """Returns the key or group as typed, and the text of the value: `hydra/launcher` and `joblib`."""
    key, _, value = override.partition("=")
    return key, value


def text_of(override: "str | Override") -> str:
    """Returns an override as typed."""
    return override if isinstance(override, str) else str(override.input_line)


def is_set(key: str, overrides: "Iterable[str | Override]") -> bool:
    """Returns whether one of the overrides sets the key or chooses for the group."""
    return any(key_of(override) == key for override in overrides)


def without(overrides: Iterable[str], *keys: str) -> list[str]:
    """Returns the overrides of all other keys."""
    return [override for override in overrides if key_of(override) not in keys]


def with_folder(overrides: Sequence[str], multirun: bool) -> list[str]:
    """Returns the overrides with `output=DIR` as Hydra's key of the folder of a run, or with `multirun` of a sweep.

    Raises `UserError` if the folder is set twice, or not quoted as it must be.
    """
    typed = [override for override in overrides if key_of(override) == OUTPUT]
    parse_overrides(typed)  # a message names the key that was typed
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    both = [override for override in overrides if override in typed or key_of(override) == key]
    if typed and len(both) > 1:
        raise UserError(f"{' '.join(both)}: set the folder once")
    return [f"{key}={value_of(override)}" if override in typed else override for override in overrides]


def storable(overrides: Iterable[str]) -> list[str]:
    """Returns the overrides as they may be stored: without the secrets of the environment.

    A secret that is typed for the environment (hydra.job.env_set.WANDB_API_KEY=...) becomes `${oc.env:WANDB_API_KEY}`:
    whoever repeats the command sets the variable.
    """
    return [redact(_without_secret(line)) for line in overrides]


def _without_secret(line: str) -> str:
    key, equals, _ = line.partition("=")
    name = re.sub(r"^hydra\.job\.env_set(\.|$)", "", key_of(line)) if equals else key_of(line)
    if name == key_of(line):
        return line
    if name:
        return f"{key}={reference(name)}" if is_secret_name(name) else line
    values = _parse(line).value()  # {WANDB_API_KEY:...}
    if not isinstance(values, Mapping):
        return line
    hidden = {str(each): reference(str(each)) for each in values if is_secret_name(str(each))}
    return f"{key}={quoted_plain({**{str(each): item for each, item in values.items()}, **hidden})}"


def is_hydra(override: "str | Override") -> bool:
    """Returns whether an override sets a key or a choice of Hydra's config."""
    return group_of(override) == "hydra"


def parse_overrides(overrides: "Iterable[str | Override]", choices: Any = None) -> "list[Override]":
    """Parses overrides; keeps overrides that are already parsed. Raises `UserError`.

    `choices`: lists the choices of a group for glob(*), like Hydra's config loader.
    """
    from hydra.errors import HydraException

    overrides, parsed = list(overrides), []
    for each, following in zip(overrides, [*overrides[1:], ""], strict=False):
        try:
            override = copy.copy(_parse(each) if isinstance(each, str) else each)
        except HydraException:
            raise UserError(explain_grammar(text_of(each), text_of(following))) from None
        except ValueError:  # of int(), for a number with more digits
            raise UserError(f"{text_of(each)}: a number has at most {sys.get_int_max_str_digits()} digits") from None
        override.config_loader = choices
        parsed.append(override)
    return parsed


@functools.lru_cache(maxsize=1000)
def _parse(line: str) -> "Override":
    """Parses a line; every job of a sweep has nearly the same."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import RangeSweep

    [override] = OverridesParser.create().parse_overrides([_with_texts(line)])
    override.input_line = line  # as typed: quotes within quotes would be hard to read
    value = override.value()
    if isinstance(value, RangeSweep):
        _check_range(line, value)
    return override


def _with_texts(line: str) -> str:
    """Quotes the numbers of a key that takes texts: Hydra reads name=2024_11_26 as 20241126."""
    key, equals, value = line.partition("=")
    if key_of(line) not in TEXTS or not value:
        return line
    inner = _inside(value) or value
    items = [f"'{item.strip()}'" if re.fullmatch(_NUMBER, item.strip(), re.I) else item for item in _items(inner)]
    return f"{key}{equals}{value.replace(inner, ','.join(items), 1)}"


def _inside(value: str) -> str | None:
    """Returns the values in `[a,b]` or `choice(a,b)` as typed; None for another value."""
    for start, end in (("[", "]"), ("choice(", ")")):
        if value.startswith(start) and value.endswith(end):
            return value[len(start) : -1]
    return None


def _check_range(line: str, sweep: "RangeSweep") -> None:
    """Raises `UserError` for a range without an end, and for one that Hydra's sort() changes (hydra#3228)."""
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    if not all(number.is_finite() for number in (start, stop, step)) or step == 0:
        raise UserError(f"{line}: a range needs finite numbers and a step other than 0: range(START,STOP,STEP)")
    if (stop - start) / step > _MOST_VALUES:
        raise UserError(f"{line}: more than {_MOST_VALUES} values")
    if "sort(" in value_of(line) and (stop - start) % step != 0:
        reason = "the step does not divide the range, of which Hydra's sort() would therefore change the values"
        raise UserError(f"{line}: {reason}; write the range in the order that you want")


def refuse_several(overrides: "Iterable[Override]", reason: str = "one value is needed") -> None:
    """Raises `UserError` for a key with several values."""
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: {reason}; write a list as [a,b]")


def single_values(overrides: "Iterable[Override]") -> dict[str, Any]:
    """Returns the values by key. Raises `UserError` for a key with several values."""
    overrides = list(overrides)
    refuse_several(overrides)
    return {override.get_key_element(): override.value() for override in overrides}


def listed_values(override: "Override") -> list[str]:
    """Returns the values of a list, range or glob as on the command line. Raises `UserError` for duplicates.

    The order of shuffle(...) is random but always the same: a sweep lists its values several times, when it is checked,
    run and resumed, and in every task of a job array.
    """
    values = list(override.sweep_string_iterator())
    if len(set(values)) < len(values):
        raise UserError(f"{override.input_line}: duplicate value in the list")
    if getattr(override.value(), "shuffle", False):
        values.sort()
        random.Random(0).shuffle(values)
    return values


def listed(override: "Override") -> str:
    """Returns the override with its values spelled out, in the order of `listed_values`."""
    if not override.is_sweep_override():
        return text_of(override)
    return f"{override.get_key_element()}={','.join(listed_values(override))}"


@dataclass(frozen=True)
class Axis:
    """A key of a sweep with its values, or the keys of zip(...), which take theirs together.

    Attributes:
        name: the name in zip(...), or the key as typed; with the condition, if there is one.
        overrides: the override of each key; all have the same number of values.
        when: the override of the jobs that have this axis, `optimizer=sgd`; "": all jobs have it.
    """

    name: str
    overrides: "tuple[Override, ...]"
    when: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(map(key_of, self.overrides))

    @property
    def is_zip(self) -> bool:
        return len(self.overrides) > 1

    @property
    def is_swept(self) -> bool:
        return self.is_zip or any(override.is_sweep_override() for override in self.overrides)

    @property
    def is_continuous(self) -> bool:
        return any(each.is_sweep_override() and not each.is_discrete_sweep() for each in self.overrides)

    def __str__(self) -> str:
        """Returns the axis as typed, for messages."""
        return f"{self.name}=zip(...)" if self.is_zip else text_of(self.overrides[0])

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the overrides of each value. Raises `UserError` for continuous ranges and duplicate values."""
        columns = []
        for override in self.overrides:
            key = override.get_key_element()
            if not override.is_sweep_override():
                values = [override.get_value_element_as_str()]
            elif not override.is_discrete_sweep():
                raise UserError(
                    f"{override.input_line}: a grid needs listed values; to sample, add hydra/sweeper=dlopt_optuna"
                )
            else:
                values = list(override.sweep_string_iterator()) if self.is_zip else listed_values(override)
            columns.append([f"{key}={value}" for value in values])
        return list(zip(*columns, strict=True))

    def applies(self, lines: Iterable[str]) -> bool:
        """Returns whether the job with these overrides has the axis."""
        return not self.when or any(is_equal(line, self.when) for line in lines)


def is_equal(line: str, other: str) -> bool:
    """Returns whether two overrides set the same key to the same value, however it is written."""
    return line == other or (key_of(line) == key_of(other) and bool(_parse(line).value() == _parse(other).value()))


def parse_axes(words: "Iterable[str | Override]", choices: Any = None) -> list[Axis]:
    """Parses the words of a sweep, zip(...) and seeds=N included. Raises `UserError`.

    Of a key that is given twice, the last one counts; two lists are refused. `choices`: see `parse_overrides`.
    """
    words = list(words)
    seeds = [word for word in words if "seed" in keys_of(text_of(word))]
    if len(seeds) > 1 and any(key_of(word) == SEEDS for word in seeds):
        raise UserError(f"{' '.join(map(text_of, seeds))}: set the seeds once")
    words = [_seeds(text_of(word)) if key_of(word) == SEEDS else word for word in words]
    plain = iter(parse_overrides([_with_all_texts(word) for word in words if not _is_zip(word)], choices))
    axes: dict[str, Axis] = {}
    for word in words:
        axis = _zipped(text_of(word), choices) if _is_zip(word) else _plain_axis(next(plain))
        for other in axes.values():
            is_zip = axis.is_zip or other.is_zip
            shared = set(axis.keys) & set(other.keys) or (is_zip and {axis.name} & {other.name})
            if shared and (is_zip or (axis.is_swept and other.is_swept)):
                raise UserError(f"{axis}: {min(shared)} is also set by {other}; an axis has one place")
        axes[axis.name] = axis
    return list(axes.values())


def _plain_axis(override: "Override") -> Axis:
    return Axis(str(override.get_key_element()), (override,))


def _with_all_texts(word: "str | Override") -> "str | Override":
    """Returns a word of a sweep in a form in which Hydra keeps each text a text.

    Its grammar has no letters beyond ASCII. Its choice() takes no null, and loses the quotes of texts: 'null' would
    become null.
    """
    if not isinstance(word, str):
        return word
    key, value = parts_of(word)
    items = _items(_inside(value) or "") if value.startswith("choice(") else []
    is_misread = any(
        not each.isascii() or re.fullmatch(f"null|{_TEXT_READ_OTHERWISE}", each.strip(), re.I) for each in items
    )
    return f"{key}={_with_ascii(','.join(items))}" if len(items) > 1 and is_misread else quoted(word)


def _seeds(word: str) -> str:
    """Returns the axis of `seeds=N`."""
    count = value_of(word)
    if not re.fullmatch(r"[1-9]\d{0,5}", count):
        raise UserError(f"{word}: must be a number of seeds: seeds=5 runs each job with seed=0 to seed=4")
    return f"seed=range(0,{count})"


def _is_zip(word: "str | Override") -> bool:
    value = value_of(word).strip()
    return isinstance(word, str) and value.startswith("zip(") and value.endswith(")") and not _unpaired(value)


def _zipped(word: str, choices: Any) -> Axis:
    """Parses `NAME=zip(KEY=VALUES,KEY=VALUES)`, the syntax that Hydra's docs/design/zipped_sweeps.md proposes."""
    name, value = parts_of(word)
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UserError(f"{word}: {name!r} names the axis, and must be one word: rates=zip(...)")
    overrides: list[Override] = []
    for item in _items(value.strip()[len("zip(") : -1]):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not key or not equals:
            raise UserError(f"{word}: {item.strip()!r} is not KEY=VALUES; write several values as [a,b]")
        if _is_zip(f"{key}={text}"):
            raise UserError(f"{word}: zip(...) cannot contain another one")
        inner = _inside(text)
        if inner is not None and not inner.strip():
            raise UserError(f"{word}: {key} has no values")
        # As the list of a plain axis: choice() of Hydra takes no null, and loses the quotes of texts.
        listing = quoted(f"{key}={text}") if inner is None else f"{key}={_with_ascii(inner)}"
        [override] = parse_overrides([listing], choices)
        is_single = inner is not None and len(_items(inner)) == 1 and not override.is_sweep_override()
        if not is_single and not (override.is_sweep_override() and override.is_discrete_sweep()):
            raise UserError(f"{word}: {key} needs listed values: [a,b], choice(a,b) or range(a,b)")
        if getattr(override.value(), "shuffle", False):
            raise UserError(f"{word}: shuffle() of {key} alone would separate values that belong together")
        overrides.append(override)
    axis = Axis(name, tuple(overrides))
    if len(overrides) < 2 or len(set(axis.keys)) < len(overrides):
        raise UserError(f"{word}: needs at least two different keys")
    lengths = [len(list(each.sweep_string_iterator())) if each.is_sweep_override() else 1 for each in overrides]
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{key} has {length}" for key, length in zip(axis.keys, lengths, strict=True))
        raise UserError(f"{word}: all keys need the same number of values; {counts}")
    if len(set(axis.rows())) < lengths[0]:
        raise UserError(f"{word}: the same values twice")
    return axis


def keys_of(word: str) -> list[str]:
    """Returns the keys that a word of a sweep sets: the keys in zip(...), or `seed` for seeds=N."""
    if not _is_zip(word):
        return ["seed" if key_of(word) == SEEDS else key_of(word)]
    return [key_of(item.strip()) for item in _items(value_of(word).strip()[len("zip(") : -1])]


def replaced(axes: Sequence[Axis], by: Sequence[Axis]) -> list[Axis]:
    """Returns the axes of a file with those `by` the command line in their places, or after them.

    Raises `UserError` if the command line sets some of the keys of a zip(...) in the file.
    """
    result, typed = list(axes), {key for axis in by for key in axis.keys}
    for axis in axes:
        if axis.name not in {each.name for each in by} and (left := set(axis.keys) - typed) and left < set(axis.keys):
            raise UserError(f"{axis} of the config file: also set {', '.join(sorted(left))}, or replace the whole axis")
    for axis in by:
        old = [each for each in result if each.name == axis.name or set(each.keys) & set(axis.keys)]
        place = result.index(old[0]) if old else len(result)
        result = [each for each in result if each not in old]
        result.insert(place, axis)
    return result


def grid(axes: Iterable[Axis]) -> list[list[str]]:
    """Returns the overrides of every combination of the listed values, in the order of Hydra's own sweeper.

    An axis with a condition comes after the one that decides. Raises `UserError` for continuous ranges and duplicate
    values.
    """
    jobs: list[list[str]] = [[]]
    for axis in axes:
        rows = axis.rows()
        jobs = [[*job, *row] for job in jobs for row in (rows if axis.applies(job) else [()])]
    return jobs


def quoted(line: str) -> str:
    """Quotes what Hydra's grammar rejects or splits: values with non-ASCII letters (name=größe,klein), sentences."""
    key, equals, text = line.partition("=")
    if key in _SENTENCES and equals and not re.fullmatch(r"\w+", text) and text[:1] not in ("'", '"', "$"):
        return f"{key}={quoted_plain(text)}"
    if not equals or text.isascii() or not text.isprintable() or re.search(r"""['"\[\]{}()$\\]""", text):
        return line
    return f"{key}={_with_ascii(text)}"


def _with_ascii(text: str) -> str:
    """Quotes the values of a list that have letters which Hydra's grammar rejects, unless they are quoted."""
    values = (value.strip() for value in _items(text))
    return ",".join(value if value.isascii() or value[:1] in "'\"[{" else repr(value) for value in values)


def explain_grammar(line: str, following: str) -> str:
    """Explains an override that Hydra's grammar rejects; `following`: the next one of the command line, or ""."""
    key, equals, value = line.partition("=")
    if re.fullmatch(r"\w+(\.\w+)*", line) and following and "=" not in following:
        return f"{line} {following}: an override is key=value: {line}={following}"
    if not equals and not key.startswith("~"):
        return f"{line}: an override is key=value or group=choice"
    if not re.fullmatch(r"[+~]{0,2}[\w/-]+([.@][\w/-]+)*", key):
        shown = line if line.isprintable() else repr(line)
        return f"{shown}: {key!r} is not a valid key or group name; an override is key=value or group=choice"
    sign = _unpaired(value)
    if (advice := _misspelled(key, value)) is not None:
        return f"{line}: {advice}"
    if "zip(" in value and not value.startswith("zip("):
        return f"{line}: zip(...) stands alone: {key}=zip(...)"
    if value.startswith("zip(") and not sign:
        return f"{line}: several values need `dlopt train -m` (one run each)"
    if value.startswith("zip("):
        fault = f"{sign} is not {'opened' if sign in ')]}' else 'closed'}; quote the whole argument, spaces included"
        return f"{line}: {fault}: '{key}=zip(...)'"
    if sign in ("[", "(", "{") and following and "=" not in following:
        return f"{line!r}: {sign} is not closed; a list has no spaces, or the whole argument is quoted: {line}..."
    correct = f"{key}={quoted_value(os.path.expanduser(value))}"
    advice = f"the value must be quoted for Hydra, inside the quotes for the shell: {correct!r}"
    fault = f"{sign} is not {'opened' if sign in ')]}' else 'closed'}; as plain text, " if sign else ""
    return f"{line!r}: {fault}{advice}"


def _misspelled(key: str, value: str) -> str | None:
    """Returns the advice for a text that is almost certainly a mistake: two overrides in one word, two `=`, (a,b)."""
    if value.startswith("="):
        return f"one equals sign: {key}={value.lstrip('= ')}"
    if re.fullmatch(r"\([^()]*,[^()]*\)", value):
        return f"lists have square brackets: {key}=[{value[1:-1].strip(', ')}]"
    others = re.split(r"[ ,;]+(?=[A-Za-z_][\w./]*=)", value)
    if len(others) > 1 and not re.search(r"""[][(){}'"]""", value) and not key.endswith((".dir", "output")):
        return f"several overrides are separate words: {key}={' '.join(each.strip(' ,;') for each in others)}"
    return None


def _unpaired(value: str) -> str:
    """Returns the first bracket or quote of `value` without its partner; "" if there is none."""
    removed = 1
    while removed:
        value, removed = _CLOSED.subn("", value)
    unpaired = re.search(r"""[][(){}'"]""", value)
    return unpaired.group() if unpaired else ""


def quoted_plain(value: Any) -> str:
    """Formats a plain value in Hydra's override grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(quoted_plain, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{quoted_plain(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def quoted_value(value: str) -> str:
    """Quotes a value for Hydra's grammar: [a=1,b=[2]] as ['a=1','b=[2]'], because a quoted list would be a string.

    Blocks, too: {a:[b=1],c:2} as {a:['b=1'],c:2}. Their keys cannot be quoted.
    """
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_quoted_item, _items(value[1:-1])))}]"
    if value.startswith("{") and value.endswith("}"):
        pairs = [item.partition(":") for item in _items(value[1:-1])]
        if all(colon for _, colon, _ in pairs):
            return f"{{{','.join(f'{key.strip()}:{_quoted_item(each)}' for key, _, each in pairs)}}}"
    return quoted_plain(value)


def _quoted_item(item: str) -> str:
    """Quotes an entry of a list or block, unless it is a list or block itself, or needs no quotes."""
    item = item.strip()
    if item[:1] in ("[", "{"):
        return quoted_value(item)
    return item if re.fullmatch(r"'[^']*'|\"[^\"]*\"", item) else repr(item)


def _items(text: str) -> list[str]:
    """Splits the inside of a list or block at its commas, but not within brackets or quotes."""
    items, depth, quote, is_escaped = [""], 0, "", False
    for letter in text:
        if is_escaped:
            is_escaped = False
        elif quote and letter == "\\":
            is_escaped = True
        elif letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        elif not quote:
            depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += letter
    return items if text.strip() else []
