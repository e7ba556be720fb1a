"""What commands write: tables and JSON to standard output, everything said beside it to standard error."""

from __future__ import annotations

import json
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
    right = [all(cell in ("", "-") or cell.lstrip("-")[:1].isdigit() for cell in column[1:]) for column in columns]
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in [header, *rows]:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in cells).rstrip())
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])
