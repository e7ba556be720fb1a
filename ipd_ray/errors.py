"""How a run fails, and what a user can do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: the message names the field, the value, the bound and the remedy (exit code 2)."""


class PartialError(RuntimeError):
    """The run ended, but a part of it is missing: what was set aside and why is in the message (exit code 3)."""


class TaskError(RuntimeError):
    """A task failed for good: its name and traceback."""

    @property
    def reason(self) -> str:
        """The traceback's last line, which says it."""
        return str(self).strip().splitlines()[-1]

    @property
    def mistake(self) -> str | None:
        """What a user can mend, without the traceback; None for all else."""
        kind, _, message = self.reason.partition(": ")
        kind = kind.rpartition(".")[2]
        if kind == "UserError":
            return message
        if kind == "OSError" and ("No space left" in message or "[Errno 28]" in message):
            return f"{message}: free some space (`ipd-ray store prune`), then run the same again; it goes on."
        return None


def near_name(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest valid names, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
