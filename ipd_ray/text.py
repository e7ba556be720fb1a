"""What people read: numbers; tables and JSON on standard output, everything said beside it on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any


def say(text: str) -> None:
    """Write to standard error."""
    print(text, file=sys.stderr, flush=True)


def answer(text: str, to_stderr: bool = False) -> None:
    """Write to standard output, or where that holds a JSON document to standard error."""
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def answer_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    print(json.dumps(document, indent=1, default=str), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; what looks like a number is set to the right."""
    columns = list(zip(header, *rows, strict=True))
    right = [all(cell in ("", "-", "–") or cell.lstrip("-−")[:1].isdigit() for cell in col[1:]) for col in columns]
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in [header, *rows]:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in cells).rstrip())
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])


def readable(value: float | None) -> str:
    """A number to read: three digits or more, thousands apart, a true minus; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    value = value or 0.0  # zero has no sign
    if float(value).is_integer() or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def counted(number: int, noun: str) -> str:
    """Return 1 and episode as 1 episode, 2 as 2 episodes."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
