"""Contestants are processes that do a named piece of work again and again, and say what each time cost.

Ours, and peers in environments of their own, take turns in short runs, so that what else the machine does falls on all
alike; ratios are taken within a turn. This file needs nothing but the standard library, since all environments read it.

One line of JSON each way. A contestant first says {"ready": {...}} or {"missing": why}; then, for every
{"units": n}, {"seconds": wall, "cpu": of this process, "items": done, "peak": bytes it has held at most}.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Missing(Exception):
    """What a contestant needs is not here; the message says what and how to get it."""


# ---- in the contestant's process


@dataclass(frozen=True)
class Work:
    """A piece of work, ready to begin."""

    run: Callable[[int], float]
    """Do so many units; returns the items done, such as updates, states or windows. Waits for the device."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What is worth knowing: floating-point operations of an item (`flops`), sizes."""


def serve(build: Callable[[], Work]) -> None:
    """Be a contestant until the other side hangs up. What libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        work = build()
    except Missing as reason:
        return say(missing=str(reason))
    say(ready=dict(work.about))
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        items = work.run(int(json.loads(line)["units"]))
        took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        say(**took, items=items, peak=peak_memory())


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- on the other side


@dataclass(frozen=True)
class Turn:
    """What one run of a contestant cost."""

    seconds: float
    cpu: float
    """Processor seconds of the contestant's process, of all its threads."""
    items: float
    peak: int
    """Bytes that the process has held at most."""


class Contestant:
    """A process that waits for its turn. Call `ready` before the first."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.name, self.units = name, 1
        self.about: dict[str, Any] = {}
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip

    def ready(self) -> None:
        """Wait until it can work. Raises Missing where it cannot take part."""
        first = self._hear()
        if "missing" in first:
            raise Missing(first["missing"])
        self.about = first["ready"]

    def turn(self, units: int | None = None) -> Turn:
        """Work for so many units."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"units": units or self.units}) + "\n")
        self._process.stdin.flush()
        return Turn(**self._hear())

    def settle(self, seconds: float) -> None:
        """Warm up, and find how many units take about so long."""
        while True:
            took = self.turn().seconds
            if took > 0.3 * seconds:
                break
            self.units = max(self.units + 1, round(self.units * min(10.0, 0.7 * seconds / max(took, 1e-4))))
        self.units = max(1, round(self.units * seconds / took))

    def close(self) -> None:
        """Hang up."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._printed.close()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._printed.seek(0)
            printed = self._printed.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"{self.name} died (exit code {code}):\n{printed}")
        return dict(json.loads(line))


def interleave(contestants: Sequence[Contestant], turns: int, seconds: float) -> dict[str, list[Turn]]:
    """Let all take turns, the first one to begin changing from turn to turn."""
    for contestant in contestants:
        contestant.settle(seconds)
    found: dict[str, list[Turn]] = {c.name: [] for c in contestants}
    for i in range(turns):
        first = i % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            found[contestant.name].append(contestant.turn())
    return found


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the median over turns, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """ours, theirs: rates of the same turns."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        if len(ratios) < 2:
            return cls(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)
