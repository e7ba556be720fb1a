"""Pieces of HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from ipd_ray.text import readable


def escape(value: Any) -> str:
    """Anything as text that is safe in HTML."""
    return html.escape(str(value), quote=True)


def maybe(value: float | None) -> str | None:
    """A number to read, or None."""
    return None if value is None else readable(value)


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.3g} %"


def remark(text: str) -> str:
    """A line in place of a figure."""
    return f'<p class="none">{text}</p>'


def panel(title: str, svg: str, note: str = "") -> str:
    """A figure with its title and a note."""
    return f"<figure><h4>{title}</h4>{svg}{f'<figcaption>{note}</figcaption>' if note else ''}</figure>"


def panels_of(panels: Iterable[str], wide: bool = False) -> str:
    """Figures side by side, as many as fit."""
    joined = "".join(panels)
    return f'<div class="panels{" wide" if wide else ""}">{joined}</div>' if joined else ""
