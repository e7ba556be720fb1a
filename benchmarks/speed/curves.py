"""How time and memory grow with what a user can turn up: the points of the plots in docs/performance.md.

Each point is a process of its own, so that its peak memory is its own; the turns of a curve's points are interleaved.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any

from contest import interleave
from stages import HERE, Entry

if TYPE_CHECKING:
    from bench import Bench

MPC = {"members": 7, "candidates": 256, "horizon": 5, "states": 100}
SIZE = {"layers": 3, "width": 128, "heads": 4, "context": 20, "batch": 64, "tokens": "step"}
GROWTH: Mapping[str, tuple[str, Mapping[str, Any], Sequence[int]]] = {
    "candidates": ("plan", MPC, (32, 64, 128, 256, 512)),
    "horizon": ("plan", MPC, (1, 2, 5, 10, 20)),
    "members, planning": ("plan", MPC, (2, 4, 7, 10)),
    "members, world model": ("world_model", {}, (2, 4, 7, 10)),
    "context": ("distill", SIZE, (5, 10, 20, 40)),
}
"""By name: a contestant of ours, its other options, and the values; the name's first word is the option."""
TURNS = 3


def measure(bench: Bench) -> dict[str, Any]:
    """Points by curve: `x`, and of each `seconds` an item and `bytes` at most."""
    found: dict[str, Any] = {}
    for name, (work, options, values) in GROWTH.items():
        option = name.split(",")[0]
        entries = [Entry(str(v), "ours.py", work, {**options, option: v}) for v in values]
        found[name] = _points(bench, entries, values)
        _say(name, found[name])
    found["dataset size"] = _loading(bench)
    _say("dataset size", found["dataset size"])
    for name, points in _parallel(bench):
        found[name] = points
        _say(name, points)
    return {"curves": found}


def _points(bench: Bench, entries: Sequence[Entry], values: Sequence[int], **extra: Any) -> dict[str, Any]:
    with ExitStack() as stack:
        contestants = [bench.contestant(entry, extra) for entry in entries]
        for contestant in contestants:
            stack.callback(contestant.close)
            contestant.ready()
        turns = interleave(contestants, TURNS, bench.seconds)
    rows = list(turns.values())
    return {
        "x": list(values), "seconds": [median(t.seconds / t.items for t in row) for row in rows],
        "bytes": [max(t.peak for t in row) for row in rows],
    }  # fmt: skip


def _loading(bench: Bench) -> dict[str, Any]:
    """Reading kept columns again: seconds in all."""
    from bench import SIZES

    points: dict[str, Any] = {"x": list(SIZES), "seconds": [], "bytes": []}
    for steps in SIZES:
        one = _points(bench, [Entry(str(steps), "ours.py", "load_again")], [steps], **bench.dataset(steps))
        points["seconds"].append(one["seconds"][0] * steps)
        points["bytes"].append(one["bytes"][0])
    return points


def _parallel(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of an imagined step by actors, and of a distilled window by Ray Train workers, as a run takes them."""
    from bench import installed, say

    counts = [n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)]
    dataset = bench.dataset(100_000)["dataset"]
    kinds = [("actors", "local"), *((kind, "ray") for kind in ("actors", "workers") if installed("ray"))]
    if len(kinds) == 1:
        say("  SKIPPED: curves over Ray's actors and workers: ray is not installed")
    for kind, engine in kinds:
        command = [sys.executable, str(HERE / "parallel.py"), kind, engine, dataset, str(bench.folder / "parallel"),
                   ",".join(map(str, counts))]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=bench.environment())
        seconds = [float(x) for x in done.stdout.splitlines()[-1].split()]
        yield f"{kind}, {engine} engine", {"x": counts, "seconds": seconds}


def _say(name: str, points: Mapping[str, Any]) -> None:
    from bench import say

    pairs = zip(points["x"], points["seconds"], strict=True)
    say(f"  {name}: " + ", ".join(f"{x:g} {1e3 * seconds:.3g} ms" for x, seconds in pairs))
