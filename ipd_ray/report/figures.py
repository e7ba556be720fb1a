"""Figures as SVG texts that follow the page: its font, its ink, its dark mode. Each takes plain numbers.

Colours are Okabe and Ito's, told apart with any colour vision; the page maps them to lighter ones where it is dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ipd_ray.text import readable

INK, MUTED, LINE = "#1b1f24", "#6b7281", "#d8dce3"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY)
_KNOWN = {"data": MUTED, "policy": BLUE, "BC": ORANGE, "no imagination": GREEN}
"""One colour for one thing, in every figure."""
_PAGE = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    SKY: "var(--sky)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "grid.alpha": 1.0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.unicode_minus": True,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.useoffset": False,
}
_WIDTH, _WIDE, _HEIGHT = 4.5, 5.2, 2.75
_SCATTER_DPI = 220

Floats = NDArray[np.float64]


class _Canvas:
    """A figure with one axes; `svg` ends it."""

    def __init__(self, height: float = _HEIGHT, width: float = _WIDTH):
        with matplotlib.rc_context(_STYLE):
            self.figure = Figure(figsize=(width, height), layout="constrained")
            FigureCanvasSVG(self.figure)
            self.axes: Axes = self.figure.add_subplot()

    def svg(self, alt: str) -> str:
        text = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": alt}):
            self.figure.savefig(text, format="svg", transparent=True, dpi=_SCATTER_DPI, metadata=nothing)
        return _for_page(text.getvalue(), alt)


def _for_page(svg: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', svg)
    named = f'{box.group(0) if box else ""} role="img" aria-label="{html.escape(alt)}"'
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {named}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend|\w*Collection)_\d+"', "", svg
    )
    for colour, variable in _PAGE.items():
        svg = svg.replace(colour, variable)
    return svg


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, alt: str) -> str:
    """Lines by name: (steps, values). Logarithmic where all are positive and span more than a decade."""
    canvas = _Canvas()
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        values = np.concatenate([np.asarray(v, np.float64) for _, v in series.values()])
        if (values > 0).all() and values.max() > 10 * values.min():
            ax.set_yscale("log")
        for colour, (name, (steps, line)) in zip(_colours(series), series.items(), strict=True):
            ax.plot(steps, line, color=colour, label=name, marker="o" if len(steps) < 6 else "")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _labels(ax, x, y)
        if len(series) > 1:
            _legend_above(ax, len(series))
    return canvas.svg(alt)


def histograms(groups: Mapping[str, Floats], *, x: str, alt: str) -> str:
    """One row a group on one axis: a histogram, and its mean as a tick with the value."""
    canvas = _Canvas(height=0.9 + 0.62 * len(groups), width=_WIDE)
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        everything = np.concatenate(list(groups.values()))
        low, high = float(everything.min()), float(everything.max())
        bins = np.linspace(low, high if high > low else low + 1.0, 31)
        ax.grid(False, axis="y")
        for row, (colour, values) in enumerate(zip(_colours(groups), groups.values(), strict=True)):
            base = len(groups) - 1 - row
            share = np.histogram(values, bins)[0] / len(values)
            height = 0.72 * share / max(float(share.max()), 1e-9)
            ax.bar(bins[:-1], height, np.diff(bins), bottom=base, align="edge", color=colour, alpha=0.55, linewidth=0)
            ax.plot([bins[0], bins[-1]], [base, base], color=LINE, linewidth=0.7, zorder=0)
            mean = float(values.mean())
            ax.plot([mean, mean], [base, base + 0.8], color=INK, linewidth=1.4)
            right = mean > 0.5 * (bins[0] + bins[-1])
            ax.annotate(
                readable(mean),
                (mean, base + 0.8),
                xytext=(-3 if right else 3, -1),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=8,
            )
        ax.set_yticks(np.arange(len(groups))[::-1] + 0.3, [f"{name}\n{len(v)} episodes" for name, v in groups.items()])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(-0.12, len(groups))
        _labels(ax, x, "")
    return canvas.svg(alt)


def bars(
    values: Mapping[str, float],
    *,
    x: str,
    alt: str,
    own: Sequence[str] = (),
    percent: bool = False,
    shown: str = "{:.2f}",
) -> str:
    """Horizontal bars with their values; those in `own` coloured, what they are compared with grey."""
    canvas = _Canvas(height=0.75 + 0.3 * len(values))
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        rows = np.arange(len(values))[::-1]
        sizes = np.asarray(list(values.values()))
        colours = [BLUE if name in own or not own else MUTED for name in values]
        ax.barh(rows, sizes, 0.62, color=colours, alpha=0.85, linewidth=0)
        for row, size in zip(rows, sizes, strict=True):
            text = f"{100 * size:.1f} %" if percent else shown.format(size)
            ax.annotate(
                text, (max(float(size), 0.0), row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        ax.set_yticks(rows, list(values))
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.set_xlim(min(0.0, float(sizes.min()) * 1.05), max(float(sizes.max()), 1e-9) * 1.18)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if percent:
            ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
        _labels(ax, x, "")
    return canvas.svg(alt)


def decile_bars(values: Sequence[float], *, x: str, y: str, alt: str) -> str:
    """Vertical bars around zero, one a decile."""
    canvas = _Canvas()
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        at = np.arange(1, len(values) + 1)
        ax.bar(at, values, 0.7, color=[ORANGE if v > 0 else BLUE for v in values], alpha=0.85, linewidth=0)
        ax.axhline(0.0, color=INK, linewidth=0.8)
        ax.set_xticks(at)
        ax.grid(False, axis="x")
        _labels(ax, x, y)
    return canvas.svg(alt)


def scatter(
    groups: Mapping[str, tuple[Floats, Floats]], *, x: str, y: str, alt: str, log: bool = False, diagonal: str = ""
) -> str:
    """Points by group, the first in grey where there are several; a diagonal where both axes have one unit."""
    canvas = _Canvas(height=3.1)
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        if log:
            ax.set_xscale("log")
            ax.set_yscale("log")
        colours = (BLUE,) if len(groups) == 1 else (MUTED, *CYCLE[1:])
        total = max(sum(len(a) for a, _ in groups.values()), 1)
        alpha = float(np.clip(400 / total, 0.15, 0.6))
        for colour, (name, (across, up)) in zip(colours, groups.items(), strict=False):
            # points are a picture, which the page can only make lighter where it is dark
            ax.scatter(across, up, s=7, color=colour, alpha=alpha, linewidths=0, rasterized=True)
            if len(groups) > 1:
                ax.scatter([], [], s=14, color=colour, label=f"{name} ({len(across):,})")
        if diagonal:
            ends = (min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1]))
            ax.plot(ends, ends, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=diagonal)
            ax.set(xlim=ends, ylim=ends)  # one unit, one range: the distance to the line can be read
        if len(groups) > 1 or diagonal:
            _legend_above(ax, len(groups) + bool(diagonal))
        _labels(ax, x, y)
    return canvas.svg(alt)


def depth_lines(
    lines: Mapping[str, Sequence[float]], *, y: str, alt: str, percent: bool = False, mark: int | None = None
) -> str:
    """Values by depth 1, 2, …; `mark` draws where segments end."""
    canvas = _Canvas()
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        for colour, (name, values) in zip((BLUE, MUTED, *CYCLE[1:]), lines.items(), strict=False):
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, label=name, marker="o")
        if mark is not None:
            ax.axvline(mark, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"imagine.length = {mark}")
        ax.set_ylim(bottom=0.0)
        if percent:
            ax.set_ylim(0.0, 1.03)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if len(lines) > 1 or mark is not None:
            _legend_above(ax, len(lines) + (mark is not None))
        _labels(ax, "depth, steps", y)
    return canvas.svg(alt)


def score_dots(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], *, best: Mapping[str, float], x: str, alt: str
) -> str:
    """Dots with intervals. rows: (run, [(kind, mean, half width of the interval)]); best: best data episode by run.

    One run: its kinds are named at the left. Several: the runs are, and the kinds told apart by colour.
    """
    kinds = list(dict.fromkeys(kind for _, dots in rows for kind, _, _ in dots))
    colour = dict(zip(kinds, _colours(kinds), strict=True))
    several = len(rows) > 1
    count = sum(len(dots) for _, dots in rows) + 0.8 * len(rows)
    canvas = _Canvas(height=0.8 + (0.19 if several else 0.3) * count, width=_WIDE if several else _WIDTH)
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        height, ticks = 0.0, []
        for run, dots in rows:
            first = height
            for kind, mean, half in dots:
                ax.errorbar([mean], [height], xerr=[half], fmt="o", color=colour[kind], capsize=0, markersize=5)
                if not several:
                    ticks.append((height, kind))
                height -= 1.0
            if run in best:
                ax.plot([best[run]], [first], "D", color=MUTED, fillstyle="none", markersize=4.5)
            if several:
                ticks.append((0.5 * (first + height + 1.0), run))
            height -= 0.8
        for kind in kinds if several else ():
            ax.plot([], [], "o", color=colour[kind], markersize=5, label=kind)
        ax.plot([], [], "D", color=MUTED, fillstyle="none", markersize=4.5, label="best data episode")
        ax.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.set_ylim(height + 1.1, 0.7)
        _legend_above(ax, 5)
        _labels(ax, x, "")
    return canvas.svg(alt)


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def intervals(
    points: Sequence[tuple[Any, float, float]], *, x: str, y: str, alt: str, percent: bool = False, log: bool = False
) -> str:
    """Values with intervals over a setting; a line joins the means of equal ones.

    points: (setting, mean, half width); settings that are no numbers are put side by side, without a line.
    """
    canvas = _Canvas(width=_WIDE)
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        settings = list(dict.fromkeys(setting for setting, _, _ in points))
        numbers = _are_numbers(settings)
        across = {s: float(s) if numbers else float(i) for i, s in enumerate(settings)}
        if numbers:
            settings.sort()
            if log and all(s > 0 for s in settings):
                ax.set_xscale("log")
        else:
            ax.set_xticks(list(across.values()), [str(s) for s in settings])
        at = [across[setting] for setting, _, _ in points]
        means, halves = (np.asarray([p[i] for p in points], np.float64) for i in (1, 2))
        several = len(settings) < len(points)
        ax.errorbar(
            at, means, yerr=np.nan_to_num(halves), fmt="o", color=MUTED if several else BLUE, capsize=0, markersize=4
        )
        if numbers:
            joined = [float(np.mean([m for s, m, _ in points if s == setting])) for setting in settings]
            ax.plot([across[s] for s in settings], joined, color=BLUE)
        if percent:
            ax.set_ylim(bottom=0.0)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        _labels(ax, x, y)
    return canvas.svg(alt)


def parallel(
    axes: Mapping[str, Sequence[Any]], scores: Sequence[float], *, best: int, score: str, alt: str
) -> str:
    """Parallel coordinates: a line a point across its settings to its score; the best in colour, better ones darker.

    axes: the points' values by setting. best: index of the point that is drawn in colour.
    """
    canvas = _Canvas(width=2 * _WIDE, height=1.2 * _HEIGHT)
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        ax.grid(False)
        columns = {**axes, score: scores}
        heights = []
        for i, values in enumerate(columns.values()):
            numbers = _are_numbers(values)
            levels: list[Any] = sorted(set(values)) if numbers else list(dict.fromkeys(map(str, values)))
            place: dict[Any, float] = {v: k / max(len(levels) - 1, 1) for k, v in enumerate(levels)}
            if numbers and len(levels) > 6:  # drawn from a range
                low, high = levels[0], levels[-1]
                place = {v: (v - low) / (high - low) for v in levels}
                levels = [low, high]
            ax.axvline(i, color=LINE, linewidth=0.9)
            for level in levels:
                text = readable(level) if numbers else str(level)
                ax.annotate(text, (i, place[level]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            heights.append([place[v if numbers else str(v)] for v in values])
        order = np.argsort(scores)
        for rank, row in enumerate(order):
            shade = 0.25 + 0.5 * rank / max(len(order) - 1, 1)
            colour, alpha, width = (BLUE, 1.0, 2.2) if row == best else (MUTED, shade, 1.1)
            ax.plot(range(len(columns)), [h[row] for h in heights], color=colour, alpha=alpha, linewidth=width)
        ax.set_xticks(range(len(columns)), list(columns))
        ax.set_yticks([])
        ax.set_ylim(-0.06, 1.06)
        ax.set_xlim(-0.1, len(columns) - 0.6)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(axis="x", length=0)
    return canvas.svg(alt)


def bundle(
    lines: Sequence[tuple[Sequence[float], Sequence[float]]], *, best: Sequence[int], named: str, x: str, y: str,
    alt: str,
) -> str:
    """Many lines (steps, values) in grey, those of the best in colour."""
    canvas = _Canvas()
    with matplotlib.rc_context(_STYLE):
        ax = canvas.axes
        for i, (steps, values) in sorted(enumerate(lines), key=lambda item: item[0] in best):
            look: dict[str, Any] = {"color": BLUE} if i in best else {"color": MUTED, "alpha": 0.5, "linewidth": 1.0}
            mark = "o" if len(steps) < 6 else ""
            ax.plot(steps, values, marker=mark, label=named if i == min(best, default=-1) else "", **look)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if best:
            _legend_above(ax, 1)
        _labels(ax, x, y)
    return canvas.svg(alt)


def _colours(names: Iterable[str]) -> list[str]:
    every = list(names)
    free = [c for c in CYCLE if c not in {_KNOWN.get(name) for name in every}] or CYCLE
    unknown = cycle(free)
    return [_KNOWN.get(name) or next(unknown) for name in every]


def _labels(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def _legend_above(ax: Axes, columns: int) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(columns, 3), borderaxespad=0.2, columnspacing=1.2)
