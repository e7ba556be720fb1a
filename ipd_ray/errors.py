"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: the message names the field, the value, the bound and the remedy (exit code 2)."""


class PartialError(RuntimeError):
    """The run ended, but a part of it is missing: what was set aside and why is in the message (exit code 3)."""


def near_name(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest valid names, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
