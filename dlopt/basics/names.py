"""Names that users type, and what a message says about a name that does not exist."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from dlopt.basics.errors import UserError

_LISTED = 5  # names in a message that also gives the command that lists all
_KINDS = {"key": "unknown_key", "choice": "unknown_choice"}
_MOST = 100  # names that an error holds as data
_SIMILAR = 0.6  # ratio of difflib


@dataclass(frozen=True)
class Names:
    """The names that are allowed in one place of a command line or file, and what to type instead of another name.

    Attributes:
        title: what each of them names: choice, key, command.
        known: the names.
        command: lists them all; "": messages list them all.
        prefix: what is typed before a name: "optimizer=".
        forms: name -> what is typed for it, where that is not `prefix` and the name; also of names that are not `known`
            but may be meant: lr -> optimizer.lr.
        instead: returns the advice for an unknown name that has its own, such as one of another tool; "" for others.
    """

    title: str
    known: Collection[str]
    command: str = ""
    prefix: str = ""
    forms: Mapping[str, str] = field(default_factory=dict)
    instead: Callable[[str], str] = lambda name: ""

    def check(self, name: str, typed: str = "") -> None:
        """Raises `UserError` for an unknown name; see `unknown`."""
        if name not in self.known:
            raise self.unknown(name, typed)

    def unknown(self, name: str, typed: str = "") -> UserError:
        """Returns the error for a name. `typed`: the word or place that the message begins with."""
        return self.error(f"{typed or self.prefix + name}: unknown {self.title}; {self.hint(name)}", name)

    def error(self, message: str, name: str) -> UserError:
        """Returns an error about a name, which holds as data what to type instead."""
        advice = self.forms.get(name) or self.instead(name).partition(" (")[0].removeprefix("use ")
        use = advice or self.similar(name)
        allowed = [*self.known] if len(self.known) <= _MOST else []
        return UserError(message, _KINDS.get(self.title, "unknown_name"), allowed, [use] if use else [])

    def hint(self, name: str) -> str:
        """Says what to type for an unknown name: its own advice, or else the most similar name, and what is allowed."""
        if name in self.forms:
            return f"use {self.forms[name]}"
        question = self.question(name)
        return self.instead(name) or question + self.listed(name, is_like_one=bool(question))

    def question(self, name: str) -> str:
        """Returns "did you mean PREFIX+NAME? " for the most similar name; "" if none is similar."""
        similar = self.similar(name)
        return f"did you mean {similar}? " if similar else ""

    def similar(self, name: str) -> str:
        """Returns what to type for the most similar name; "" if none is similar.

        In this order: a name with this last part (optimizer.lr for lr), a misspelled one, the shortest one that has the
        word in it (val_accuracy for acc), `known` ones first.
        """
        names, word = [*self.known, *self.forms], name.lower()
        found = [each for each in names if each.rpartition(".")[2] == word]
        found += get_close_matches(word, names, n=1, cutoff=_SIMILAR)
        longer = [each for each in names if word in each and len(word) > 2]
        found += sorted(longer, key=lambda each: (each not in self.known, len(each)))
        return self.forms.get(found[0], f"{self.prefix}{found[0]}") if found else ""

    def listed(self, name: str, *, is_like_one: bool = False) -> str:
        """Lists the names; of many, those like `name`, or the first, and the command that lists all.

        `is_like_one`: the message suggests a name; then the list has no names that are not like `name`.
        """
        names = [*self.known]
        if len(names) <= _LISTED or not self.command:
            return f"allowed: {', '.join(names) or 'none'}"
        shown = get_close_matches(name.lower(), names, n=_LISTED, cutoff=_SIMILAR)
        if is_like_one and len(shown) < 2:
            return f"`{self.command}` lists all"
        return f"allowed: {', '.join(shown or names[:_LISTED])}, ...; `{self.command}` lists all"
