"""The table and the plots: what bench.py measured, as text and as docs/performance.md.

The same results give the same files, byte for byte. What people write in the page stays: only what lies between the
markers is replaced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from contest import Ratio
from stages import STAGES, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
START_OVER_RAY, START_LOCAL = 5.0, 10.0
"""Seconds to the first training step: over bare Ray's, and in all with the local engine."""
MEMORY_GB = 4.0
"""Of a step on a million transitions, its worker and the process that drives it."""
MILLION = "1000000"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    stage: str
    beside: str
    found: str
    goal: str
    met: bool | None
    share: str = ""
    """Of the limit."""


def rates(stage: Mapping[str, Any], name: str) -> list[float]:
    """Items a second, by the stage's clock, of a contestant's turns."""
    return [turn["items"] / turn[stage["clock"]] for turn in stage["samples"].get(name, [])]


def limit_share(stage: Mapping[str, Any], name: str, product: str) -> float | None:
    """Floating-point operations a second over those of the matrix product, median over turns; None where not known."""
    flops = stage["about"].get(name, {}).get("flops")
    ours, most = rates(stage, name), rates(stage, product)
    return Ratio.of([flops * rate for rate in ours], most).median if flops and ours and most else None


def race_rows(stage: Stage, found: Mapping[str, Any], cuda: bool) -> Iterator[Row]:
    """A line a goal."""
    for goal in stage.goals:
        title = f"{stage.title}{': ' * bool(goal.text)}{goal.text}"
        least = goal.gpu if cuda else goal.cpu
        wanted = "" if least is None else f"{least:g}x"
        ours, other = rates(found, goal.ours), rates(found, goal.other)
        if not ours or not other:
            absent = goal.ours if not ours else goal.other
            yield Row(title, goal.other, f"skipped: {found['missing'].get(absent, 'not measured')}", wanted, None)
            continue
        ratio = Ratio.of(ours, other)
        shown = f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
        shown += f", {median(ours):.4g} {stage.unit}/s" * cuda
        share, bound = None, ""
        if goal.ours in stage.limits:
            share = limit_share(found, goal.ours, stage.limits[goal.ours])
        if share is not None:
            bound = f"{100 * share:.0f} %" + (f" (goal {100 * stage.share[cuda]:.0f} %)" if stage.share else "")
        yield Row(title, goal.other, shown, wanted, None if least is None else ratio.median >= least, bound)


def start_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    seconds = found["seconds"]
    local = seconds["ipd_ray, local engine"]
    yield Row("start to the first training step, cached: local engine", "", _spread(local, "s"),
              f"at most {START_LOCAL:g} s", median(local) <= START_LOCAL)  # fmt: skip
    title, goal = "start to the first training step, cached: ray engine", f"at most {START_OVER_RAY:g} s over"
    if "bare Ray" not in seconds:
        yield Row(title, "bare Ray", f"skipped: {found['missing']['bare Ray']}", goal, None)
        return
    over = [a - b for a, b in zip(seconds["ipd_ray, ray engine"], seconds["bare Ray"], strict=True)]
    about = f"ray.init and an empty TorchTrainer: {_spread(seconds['bare Ray'], 's')}"
    yield Row(title, about, _spread(over, "s") + " over", goal, median(over) <= START_OVER_RAY)


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{median(values):.1f} {unit} [{min(values):.1f}, {max(values):.1f}]"


def slope(bytes_of: Mapping[str, float]) -> tuple[float, float]:
    """Bytes a transition, from the shortest to the longest log, and the largest distance of a log between from that
    line, as a share of what the longest takes."""
    sizes = sorted(bytes_of, key=int)
    first, last = sizes[0], sizes[-1]
    each = (bytes_of[last] - bytes_of[first]) / (int(last) - int(first))
    off = [abs(bytes_of[s] - bytes_of[first] - each * (int(s) - int(first))) for s in sizes[1:-1]]
    return each, max(off, default=0.0) / bytes_of[last]


def memory_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for step, by_size in found["bytes"].items():
        if MILLION not in by_size:
            continue
        total = {size: float(sum(parts.values())) for size, parts in by_size.items()}
        each, off = slope(total)
        at_million = by_size[MILLION]
        shown = (f"{total[MILLION] / 1e9:.2f} GB (worker {at_million['worker'] / 1e9:.2f}), {each:.0f} bytes a "
                 f"transition, {100 * off:.0f} % off the line")  # fmt: skip
        yield Row(f"peak memory at 1M transitions: {step}", "", shown, f"{MEMORY_GB:g} GB, linear",
                  total[MILLION] <= 1e9 * MEMORY_GB and off < 0.1)  # fmt: skip


def rows(content: Mapping[str, Any]) -> list[Row]:
    """The table of one machine, of what was measured there."""
    stages, cuda = content["stages"], content["machine"]["kind"] == "cuda"
    found = [row for stage in STAGES if stage.name in stages for row in race_rows(stage, stages[stage.name], cuda)]
    found += start_rows(stages["start"]) if "start" in stages else []
    return found + (list(memory_rows(stages["memory"])) if "memory" in stages else [])


def word(row: Row) -> str:
    return {True: "met", False: "not met", None: ""}[row.met]


def heading(content: Mapping[str, Any]) -> str:
    """What it was measured on."""
    about, stages = content["machine"], content["stages"].values()
    threads = sorted({s["threads"] for s in stages if "threads" in s})
    loads = [s["load"] for s in stages]
    versions = {f"{n} {v}" for s in stages for n, v in s["versions"].items() if n in ("python", "ray", "torch")}
    return (
        f"{about['device']}, {about['cores']} cores, {about['memory_gib']:g} GiB, {about['instructions']}; "
        f"{' or '.join(map(str, threads)) or '-'} thread(s) a contestant; load average when a stage began "
        f"{min(loads):.1f} to {max(loads):.1f}; {', '.join(sorted(versions))}; "
        f"{', '.join(sorted({s['date'] for s in stages}))}, commits "
        f"{', '.join(sorted({s['commit'] for s in stages}))}"
    )


HEADER = ("stage", "beside", "times as fast: median [quartiles]", "goal", "", "share of the limit")


def cells(row: Row) -> tuple[str, ...]:
    return row.stage, row.beside, row.found, row.goal, word(row), row.share


def as_text(content: Mapping[str, Any]) -> str:
    table = [HEADER, *map(cells, rows(content))]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(["", heading(content), "", lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(content: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    lines = [f"Measured on: {heading(content)}.", "", "| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|"]
    for row in rows(content):
        shown = list(cells(row))
        shown[4] = f"**{shown[4]}**" if shown[4] else ""
        lines.append("| " + " | ".join(shown) + " |")
    for name, picture in pictures.items():
        lines += ["", f"![{name}]({picture})", "", *(f"- {line}" for line in readings(content, name))]
    return "\n".join(lines)


# ---- how it grows

PLOTS = {
    "planning": ("candidates", "horizon", "members, planning"),
    "learning": ("members, world model", "context", "dataset size"),
    "workers": ("actors, local engine", "actors, ray engine", "workers, ray engine"),
}
"""Panels by plot; `memory` is drawn from the stage of that name."""
SHOWN: Mapping[str, tuple[float, str, str]] = {
    "candidates": (1e3, "ms a planned state", "candidates"),
    "horizon": (1e3, "ms a planned state", "horizon"),
    "members, planning": (1e3, "ms a planned state", "members"),
    "members, world model": (1e3, "ms an update", "members"),
    "context": (1e3, "ms a window", "context"),
    "dataset size": (1.0, "s to read it again", "transitions"),
    "actors, local engine": (1e3, "ms an imagined step", "processes"),
    "actors, ray engine": (1e3, "ms an imagined step", "Ray actors"),
    "workers, ray engine": (1e3, "ms a distilled window", "Ray Train workers"),
}
"""Factor, unit and axis of each curve."""


def growth(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of y ~ x^k over the upper half of the points."""
    middle = len(x) // 2 if len(x) > 2 else 0
    return math.log(y[-1] / y[middle]) / math.log(x[-1] / x[middle])


def readings(content: Mapping[str, Any], plot: str) -> Iterator[str]:
    """One line a panel."""
    stages = content["stages"]
    if plot == "memory":
        for step, by_size in stages["memory"]["bytes"].items():
            total = {size: float(sum(parts.values())) for size, parts in by_size.items()}
            yield f"{step}: {min(total.values()) / 1e9:.2f} GB to {max(total.values()) / 1e9:.2f} GB."
        return
    curves = stages["curves"]["curves"]
    for name in PLOTS[plot]:
        if name not in curves:
            continue
        points, (factor, unit, axis) = curves[name], SHOWN[name]
        x, y = points["x"], [factor * s for s in points["seconds"]]
        line = f"{axis} {x[0]:,} to {x[-1]:,}: {y[0]:.3g} to {y[-1]:.3g} {unit}"
        if plot == "workers":
            line += f", {y[0] / y[-1]:.2f} times as fast" if len(x) > 1 else ""
        else:
            line += f", in the upper half as their power {growth(x, y):.2f}"
        if "bytes" in points:
            line += f"; memory {points['bytes'][0] / 1e9:.2f} to {points['bytes'][-1] / 1e9:.2f} GB"
        yield line + "."


def draw(content: Mapping[str, Any], folder: Path, prefix: str) -> dict[str, str]:
    """Write the plots there is something to show in; return the files relative to the page, by name."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stages, written = content["stages"], {}
    panels: dict[str, list[Callable[[Axes], None]]] = {}
    if "memory" in stages:
        panels["memory"] = [lambda ax: _memory_panel(ax, stages["memory"]["bytes"])]
    if "curves" in stages:
        curves = stages["curves"]["curves"]
        for plot, names in PLOTS.items():
            if there := [n for n in names if n in curves]:
                panels[plot] = [lambda ax, n=n: _curve_panel(ax, n, curves[n]) for n in there]  # type: ignore[misc]
    folder.mkdir(parents=True, exist_ok=True)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "ipd_ray", "font.size": 8.5, "axes.grid": True,
                  "grid.linewidth": 0.4, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    for plot, drawn in panels.items():
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(2.9 * max(len(drawn), 1.5), 2.4), layout="constrained", facecolor="white")
            FigureCanvasSVG(figure)
            for ax, panel in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
                panel(ax)
            path = folder / f"{prefix}-{plot}.svg"
            figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        written[plot] = f"{folder.name}/{path.name}"
    return written


def _curve_panel(ax: Axes, name: str, points: Mapping[str, Any]) -> None:
    factor, unit, axis = SHOWN[name]
    ax.plot(points["x"], [factor * s for s in points["seconds"]], marker="o", markersize=3.5, color="#0072b2")
    ax.set_xlabel(axis)
    ax.set_ylabel(unit)
    if points["x"][-1] >= 10 * points["x"][0]:  # both by powers: a straight line of slope 1 is growth in proportion
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.minorticks_off()
    else:
        ax.set_ylim(bottom=0)
    ax.set_xticks(points["x"], [f"{x:,}" for x in points["x"]])


def _memory_panel(ax: Axes, bytes_of: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
    for (step, by_size), colour in zip(bytes_of.items(), itertools.cycle(colours), strict=False):
        sizes = sorted(by_size, key=int)
        ax.plot([int(s) for s in sizes], [sum(by_size[s].values()) / 1e9 for s in sizes], marker="o", markersize=3.5,
                label=step, color=colour)  # fmt: skip
    ax.set_xlabel("transitions")
    ax.set_ylabel("GB at most")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=6.5, ncol=2, loc="lower right")


# ---- the page


def replaced(page: str, text: str) -> str:
    """Put text between the markers; everything else stays. Raises ValueError unless each marker is there once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"docs/performance.md must hold {BEGIN} and, after it, {END}, each once.")
    return f"{page[: page.index(BEGIN) + len(BEGIN)]}\n{text.strip()}\n{page[page.index(END) :]}"


def write(root: Path, machines: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write docs/performance.md between its markers, and the plots, of every machine; return what was written."""
    page, blocks, files = root / "docs" / "performance.md", [], []
    text = page.read_text()
    for content in machines:
        prefix = "-".join(content["machine"]["device"].lower().split())
        pictures = draw(content, page.with_suffix(""), prefix)
        blocks.append(as_markdown(content, pictures))
        files += [page.parent / picture for picture in pictures.values()]
    page.write_text(replaced(text, "\n\n".join(blocks) or "Nothing was measured yet: `make bench`."))
    return [page, *files]
