"""Several values for any key, all in one picture: what `dlopt trajectory` makes of a command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlopt.config.compose import Composer, grid
from dlopt.errors import UserError


@dataclass(frozen=True)
class Job:
    """The overrides of one curve: those to compose with, those of them that vary, those its choices have no key for."""

    overrides: list[str]
    varied: list[str]
    skipped: list[str]

    def label(self, choices: Mapping[str, str], subject: str) -> str:
        """What varies, names of `choices` (group -> choice) without their group; where nothing does, the subject's."""
        words = [choices[group] for group in choices if any(line.startswith(f"{group}=") for line in self.varied)]
        keys = [line for line in self.varied if line.partition("=")[0] not in choices]
        for group in choices:
            keys = [line.removeprefix(f"{group}.") for line in keys]
        return ", ".join([*words, *keys]) or choices[subject]


def jobs(composer: Composer, overrides: list[str], groups: Sequence[str], most: int) -> list[Job]:
    """One job per combination of values. A key that only some of the choices of a group have is left to these."""
    parsed = composer.parse(overrides)
    combinations = grid(parsed)
    sweeps = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    fragments = tuple(f"{group}=_" for group in groups)
    whole = [lines for lines in combinations if not any(line.startswith(fragments) for line in lines)]
    combinations = whole or combinations  # glob(*) finds fragments too
    if len(combinations) > most:
        raise UserError(f"{' '.join(overrides)}: {len(combinations)} curves; {most} at most can be told apart")
    offered = [_offered(composer, lines, groups) for lines in combinations]
    known = set[str]().union(*offered)
    found = []
    for lines, keys in zip(combinations, offered, strict=True):
        skipped = [line for line in lines if _group_key(line, groups) in known - keys]
        kept = [line for line in lines if line not in skipped]
        found.append(Job(kept, [line for line in kept if line.split("=")[0] in sweeps], skipped))
    return found


def _offered(composer: Composer, lines: list[str], groups: Sequence[str]) -> set[str]:
    """The keys of the chosen choices of those groups of which a key is typed."""
    typed = {_group_key(line, groups).partition(".")[0] for line in lines} - {""}
    if not typed:
        return set()
    config = composer.compose([line for line in lines if not _group_key(line, groups)])
    return {f"{group}.{key}" for group in typed for key in config[group]}


def _group_key(line: str, groups: Sequence[str]) -> str:
    """schedule.x of schedule.x.y=...; nothing of other overrides."""
    parts = line.lstrip("+").partition("=")[0].split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[0] in groups else ""


def fixed(composer: Composer, overrides: list[str]) -> list[str]:
    """What was typed once for all curves."""
    return [str(each.input_line) for each in composer.parse(overrides) if not each.is_sweep_override()]


def tell_skipped(skipped: Sequence[tuple[str, Job]]) -> list[str]:
    """A line for each key that some of the labelled jobs do not have."""
    names: dict[str, list[str]] = {}
    for label, job in skipped:
        for line in job.skipped:
            names.setdefault(line.split("=")[0], []).append(label)
    return [
        f"{key}: there is no such key in {', '.join(dict.fromkeys(those))}, drawn without it"
        for key, those in names.items()
    ]
