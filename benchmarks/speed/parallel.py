"""Imagination by actors, or distillation by workers, as a run carries them out.

    python benchmarks/speed/parallel.py actors local made-up/steps-v0 DIR 1,2

Prints the seconds of an imagined step (by gradient plans), or of a distilled window, for each count. What starts an
actor or a worker is left out: imagination counts from its second shard on, distillation from its second line.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from footprint import settings

from ipd_ray.api import run
from ipd_ray.config import RunConfig
from ipd_ray.progress import Listener

SHARD, SHARDS, LENGTH = 50, 10, 20
"""Segments of a shard, shards, and steps of a segment: short enough that a log of 100,000 steps has room for all."""
WINDOWS = 64
"""Of a batch."""


class Clock:
    """When each line of a step came, and how far the step was."""

    def __init__(self, step: str):
        self._step = step
        self.lines: list[tuple[float, int]] = []

    def progress(self, step: str, done: int, total: int, metrics: Any) -> None:
        if step == self._step:
            self.lines.append((time.perf_counter(), done))

    def note(self, text: str) -> None: ...

    def end(self, step: str, seconds: float, reused: bool) -> None: ...

    def close(self) -> None: ...

    def seconds(self, skip: int) -> float:
        """Seconds a unit of progress, from line `skip` to the last."""
        (begin, first), (end, last) = self.lines[skip], self.lines[-1]
        return (end - begin) / (last - first)


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    )


def main(kind: str, engine: str, dataset: str, folder: str, counts: str) -> None:
    """Each count needs a key of its own, so a number that hardly matters varies."""
    small = changed(
        settings(), planner={"kind": "gradient"}, imagine={"shard_size": SHARD, "length": LENGTH},
        select={"starts": SHARD * SHARDS},
    )  # fmt: skip
    run(dataset, small, run_dir=f"{folder}/run", until="imagine")  # what all share
    found = []
    for i, count in enumerate(map(int, counts.split(","))):
        vary = 1e-6 * (1 + i + 10 * (engine == "ray"))
        if kind == "actors":
            clock, until = Clock("imagine"), "imagine"
            config = changed(small, planner={"reach": 0.3 + vary}, runtime={"actors": count, "engine": engine})
        else:
            clock, until = Clock("distill"), "distill"
            config = changed(small, distill={"updates": 400, "learning_rate": 5e-4 + vary},
                             runtime={"workers": count, "engine": engine, "train_threads": 1})  # fmt: skip
        listeners: list[Listener] = [clock]
        run(dataset, config, run_dir=str(Path(folder) / f"{kind}-{engine}-{count}"), until=until, listeners=listeners)
        items = SHARD * LENGTH if kind == "actors" else WINDOWS
        found.append(clock.seconds(count - 1 if kind == "actors" else 4) / items)
    print(*found)


if __name__ == "__main__":
    main(*sys.argv[1:])
