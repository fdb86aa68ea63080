"""What a run does about numbers that are not finite: it stops, leaves the update out, or goes back and goes slower."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from dlopt.engine.divergence import Diverged

Policy = Literal["stop", "skip", "rollback"]


class Recovery:
    """Counts and decides; its state belongs to the checkpoint.

    Args:
        attempts: rollbacks of a run, or updates left out in a row, after which it stops all the same.
        lr_factor: by which each rollback multiplies the learning rate.
        newest: the newest checkpoint, on all ranks; None: there is none.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        attempts: int,
        lr_factor: float,
        newest: Callable[[], Mapping[str, Any] | None],
        tell: Callable[[str], None],
    ) -> None:
        self.policy = policy
        self.attempts = attempts
        self.lr_factor = lr_factor
        self.newest = newest
        self.tell = tell
        self.rollbacks = 0
        self.skipped = 0
        self.lr_scale = 1.0  # by which the rollbacks have multiplied the learning rate
        self._in_a_row = self._last_skipped = 0

    def skip(self, error: Diverged) -> bool:
        """Whether the update is left out, which is then counted."""
        if self.policy != "skip":
            return False
        self._in_a_row = self._in_a_row + 1 if error.step == self._last_skipped + 1 else 1
        if self._in_a_row > self.attempts:
            return False
        self.skipped += 1
        self._last_skipped = error.step
        self.tell(f"update {error.step} is left out: {_found(error)}")
        return True

    def goal(self, error: Diverged) -> Mapping[str, Any]:
        """The checkpoint to go back to, which is counted, and the learning rate set to fall. Raises `error` again."""
        if self.policy != "rollback":
            raise error
        if self.rollbacks == self.attempts:
            raise Diverged(
                f"{error}; recovery.attempts={self.attempts} rollbacks did not help", error.step, before_update=False
            ) from error
        state = self.newest()
        if state is None:
            raise error
        self.rollbacks += 1
        self.lr_scale *= self.lr_factor
        self.tell(
            f"{_found(error)}; rollback {self.rollbacks} of {self.attempts}: back to update "
            f"{state['progress']['step']}, the learning rate is {self.lr_scale:g} times the configured one"
        )
        return state

    def summary(self) -> dict[str, int]:
        counts = {"rollback": {"rollbacks": self.rollbacks}, "skip": {"skipped_updates": self.skipped}}
        return counts.get(self.policy, {})

    def state_dict(self) -> dict[str, Any]:
        return {
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "lr_scale": self.lr_scale,
            "in_a_row": self._in_a_row,
            "last_skipped": self._last_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollbacks, self.skipped, self.lr_scale = state["rollbacks"], state["skipped"], state["lr_scale"]
        self._in_a_row, self._last_skipped = state["in_a_row"], state["last_skipped"]


def _found(error: Diverged) -> str:
    """Without the advice, which is about to be taken."""
    return str(error).partition("; try ")[0]
