"""What a sweep over the uncertainty threshold found: its table as JSON, its plot for docs/notes.md.

    python benchmarks/sweep/threshold.py SWEEP_FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ipd_ray.files import write_atomic
from ipd_ray.runs import SUMMARY
from ipd_ray.sweep import Sweep

NAME = "accept.survival"
HERE = Path(__file__).resolve().parent
RESULT, PLOT = HERE / "results" / "threshold.json", HERE.parents[1] / "docs" / "sweep" / "threshold.svg"


def main() -> None:
    """Read a finished sweep, write what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    summary = json.loads((args.folder / SUMMARY).read_text())
    kappas = {r["trial"]: r["kappa"] for r in Sweep(args.folder.absolute()).records() if r.get("kappa")}
    kept = {name: summary[name] for name in ("dataset", "objective", "seeds", "points", "reuse", "agreement")}
    for path in (args.result, args.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.result, json.dumps({**kept, "kappas": kappas}, indent=1) + "\n")
    draw(summary, args.plot)
    print(f"wrote {args.result} and {args.plot}")


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Return and accepted share against the threshold: each seed a dot, the mean a line, its 95 % interval a bar."""
    points = sorted(summary["points"], key=lambda p: p["settings"][NAME])
    at = [p["settings"][NAME] for p in points]
    style = {"svg.fonttype": "none", "svg.hashsalt": "ipd_ray", "font.size": 8.5, "axes.grid": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 2.8), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        for x, point in zip(at, points, strict=True):
            left.plot([x] * len(point["scores"]), point["scores"], "o", color="#6b7280", markersize=3.5)
        halves = [p["half"] or 0.0 for p in points]
        left.errorbar(at, [p["mean"] for p in points], yerr=halves, color="#0072b2", capsize=3)
        left.set_ylabel(f"mean return, {summary['seeds']} seeds")
        right.plot(at, [100 * p["accepted"] for p in points], "o-", color="#0072b2", markersize=3.5)
        right.set_ylabel("imagined segments accepted, %")
        for axes in (left, right):
            axes.set_xlabel(f"{NAME}: share of the log's windows under kappa")
            axes.set_ylim(bottom=0.0)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


if __name__ == "__main__":
    main()
