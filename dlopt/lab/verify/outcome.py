"""What comes out of a check."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "undecided", "not applicable", "measured"]


@dataclass(frozen=True)
class CheckOutcome:
    """What came out of a check; `reproduction`: PyTorch that shows a failure."""

    status: Status
    reason: str = ""
    reproduction: str = ""
