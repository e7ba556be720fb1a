"""What a run says while it works: learning curves are tailed from the workspaces and handed to listeners."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ipd_ray.storage import METRICS, Folder

NOTE = "note: "


class Listener(Protocol):
    """Hears of a run: the terminal, the run's own files, W&B, TensorBoard."""

    def note(self, text: str) -> None:
        """A line to read; one that begins with `note: ` is a remark, which may call for something to be done."""

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A line of a learning curve, or a count of shards."""

    def end(self, step: str, seconds: float, reused: bool) -> None:
        """A step is over."""

    def close(self) -> None:
        """The run is over."""


class Listeners:
    """Many listeners as one."""

    def __init__(self, listeners: Sequence[Listener] = ()):
        self._listeners = list(listeners)

    def note(self, text: str) -> None:
        for listener in self._listeners:
            listener.note(text)

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        for listener in self._listeners:
            listener.progress(step, done, total, metrics)

    def end(self, step: str, seconds: float, reused: bool) -> None:
        for listener in self._listeners:
            listener.end(step, seconds, reused)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


class CurveTail:
    """Reads what a worker appends to its `metrics.jsonl`, which a resume cuts back: always from its beginning."""

    REMOTE_SECONDS = 2.0
    """How often an object store is asked."""

    def __init__(self, step: str, workspace: Folder, listener: Listener):
        self._step, self._folder, self._listener = step, workspace, listener
        self._seen = -1
        self._size = 0
        self._asked = 0.0

    def __call__(self) -> None:
        text = self._changed()
        for line in text[: text.rfind("\n") + 1].splitlines():
            try:
                row: dict[str, Any] = json.loads(line)
            except ValueError:  # a resume wrote the file anew, and this began in the middle of a line
                continue
            step = int(row.pop("step"))
            if step > self._seen:
                self._seen = step
                total = int(row.pop("total"))
                row.pop("time", None)
                self._listener.progress(self._step, step, total, row)

    def _changed(self) -> str:
        """Return the file where it has another length than before, else nothing."""
        if self._folder.remote:
            now = time.monotonic()
            if now - self._asked < self.REMOTE_SECONDS:
                return ""
            self._asked = now
        else:
            try:
                if (self._folder.path / METRICS).stat().st_size == self._size:
                    return ""
            except FileNotFoundError:
                return ""
        text = self._folder.read_text(METRICS) or ""
        changed, self._size = len(text) != self._size, len(text)
        return text if changed else ""


class Crew:
    """Says how many workers of a step are up where some are not: an autoscaler takes minutes, others' work hours."""

    LOOK = 10.0
    """Seconds between two looks."""
    AGAIN = 60.0
    """Seconds after which it is said again that nobody is up."""

    def __init__(self, step: str, crew: Callable[[], tuple[int, int]], listener: Listener):
        """crew: workers that are up, and those still asked for."""
        self._step, self._crew, self._listener = step, crew, listener
        self._looked = self._said = time.monotonic()
        self._told = (0, 0)

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._looked < self.LOOK:
            return
        self._looked = now
        up, starting = crew = self._crew()
        changed = crew != self._told and (starting or self._told[1])
        if changed or (starting and not up and now - self._said >= self.AGAIN):
            self._told, self._said = crew, now
            others = ", the others start or wait for room: `ray status` shows what is asked for" if starting else ""
            self._listener.note(f"{self._step}: {up} of {up + starting} workers are up{others}")


class ShardProgress:
    """Counts shards as they come in, and says what they come to and who is at work."""

    def __init__(self, done: int, total: int, crew: Callable[[], tuple[int, int]], listener: Listener):
        """done: shards that were there before. crew: workers that are up, and those still asked for."""
        self._done, self._total, self._crew, self._listener = done, total, crew, listener
        self.tick = Crew("imagine", crew, listener)
        self._began = time.monotonic()
        self._steps = self._segments = self._accepted = 0

    def add(self, shard: Mapping[str, Any]) -> None:
        """Hear of a shard: its manifest entry, and how many of its segments would be accepted."""
        self._done += 1
        self._steps += shard["steps"]
        self._segments += shard["segments"]
        self._accepted += shard["accepted"]
        self._listener.progress("imagine", self._done, self._total, {
            "imagined_steps_per_second": self._steps / max(time.monotonic() - self._began, 1e-9),
            "accept_rate": self._accepted / max(self._segments, 1),
            "reward_gain": shard["reward_gain"],
            "actors": self._crew()[0],
        })
