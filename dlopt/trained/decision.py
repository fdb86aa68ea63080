"""decision.json: the temperature and the threshold that turn the outputs of one checkpoint into a class.

`dlopt eval threshold=RULE` chooses them (`dlopt.trained.deciding`); `predict`, `export` and `dlopt.load` apply them.
Imports no torch: a decision of another checkpoint is refused before torch is imported.
"""

import contextlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from dlopt.basics.errors import UserError
from dlopt.basics.files import recorded_digests, sha256
from dlopt.basics.folders import other_format, short_path
from dlopt.basics.formats import format_number, printable
from dlopt.basics.ranges import Condition, Count, Positive, Probability
from dlopt.basics.stored import Stored
from dlopt.metrics.declaration import predicted_classes

if TYPE_CHECKING:
    from torch import Tensor

FILE = "decision.json"
MOST_PROBABLE = "most_probable"


def least_recall(rule: str) -> float | None:
    """Returns R of recall:R; None for other rules. Raises ValueError."""
    name, _, recall = rule.partition(":")
    return float(recall) if name == "recall" else None


def _refusal(rule: str) -> str | None:
    with contextlib.suppress(ValueError):
        if rule in ("f1", MOST_PROBABLE) or 0 < (least_recall(rule) or 0.0) <= 1:
            return None
    return f"must be f1, recall:R with 0 < R <= 1 (recall:0.9), or {MOST_PROBABLE}"


Rule = Annotated[str, Condition(_refusal)]
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Decision:
    """How the outputs of a classifier become a class; the content of decision.json.

    Attributes:
        checkpoint: name of the checkpoint file, beside which the decision is kept.
        sha256: of that file.
        rule: by which the threshold was chosen.
        temperature: by which the outputs are divided.
        samples: of the validation set, on which temperature and threshold were chosen.
        threshold: the least probability of the positive class, at that temperature, from which on it is predicted;
            None: the most probable class is.
        positive: number of the positive class; None without a threshold.
        positive_class: its name.
        validation: metrics of the validation set with the decision.
        test_before, test_after: metrics of the test set without and with the decision.
    """

    format: int
    checkpoint: str
    sha256: str
    rule: Rule
    temperature: Positive
    samples: Count
    threshold: Probability | None = None
    positive: Literal[1] | None = None
    positive_class: str | None = None
    validation: Metrics = field(default_factory=dict)
    test_before: Metrics = field(default_factory=dict)
    test_after: Metrics = field(default_factory=dict)

    def scaled(self, outputs: "Tensor") -> "Tensor":
        """Returns the outputs divided by the temperature, the logits of calibrated probabilities, in float64."""
        return outputs.double() / self.temperature

    def predicted(self, outputs: "Tensor") -> "Tensor":
        """Returns the class of outputs [..., K]: int64 [...]; -1, none, where one is NaN."""
        best = predicted_classes(outputs)
        if self.threshold is None:
            return best
        return (self.positive_probability(outputs) >= self.threshold).long().where(best >= 0, best)

    def positive_probability(self, outputs: "Tensor") -> "Tensor":
        """Returns the calibrated probability of the second of two classes: float64 [...], for outputs [..., 2].

        From the difference of the outputs: equal differences have equal probabilities, which a softmax rounds apart.
        """
        return (outputs.double().diff(dim=-1).squeeze(-1) / self.temperature).sigmoid()

    @property
    def text(self) -> str:
        """yes from a probability of 0.3100 on (f1 on 240 validation samples), temperature 1.3200"""
        if self.threshold is None:
            chosen = "the most probable class"
        else:
            name = printable(self.positive_class or "the second class")
            chosen = f"{name} from a probability of {format_number(self.threshold)} on"
        on = f"{self.rule} on {self.samples:,} validation samples"
        return f"{chosen} ({on}), temperature {format_number(self.temperature)}"


def digest(checkpoint: Path) -> str:
    """Returns the SHA-256 of a checkpoint file, without which it is not loaded; "" if it cannot be read."""
    try:
        recorded = recorded_digests(checkpoint)
        return recorded[0] if len(recorded) == 1 else sha256(checkpoint)  # two, if a save was killed
    except OSError:
        return ""


def decision_of(checkpoint: Path) -> Decision | None:
    """Reads the decision for a checkpoint; None if its folder has none.

    Raises `UserError` for a damaged file, and for the decision of another checkpoint.
    """
    file = checkpoint.with_name(FILE)
    found = Stored(file, Decision, cure="remove it, or choose again with `dlopt eval`").read()
    if found is None or not checkpoint.is_file():  # a missing checkpoint is reported when it is loaded
        return None
    if (other := other_format(found.format, "format")) is not None:
        raise UserError(f"{short_path(file)}: {other}")
    if digest(checkpoint) != found.sha256:
        name = printable(found.checkpoint)[:80]
        which = f"an earlier {name}" if name == checkpoint.name else f"{name}, not for {checkpoint.name}"
        command = shlex.join(["dlopt", "eval", f"checkpoint={checkpoint}", f"threshold={found.rule}"])
        raise UserError(f"{short_path(file)}: was chosen for {which}; choose again: {command}; or remove the file")
    return found
