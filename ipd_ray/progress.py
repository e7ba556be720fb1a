"""What a run says while it works: learning curves are tailed from the workspaces and handed to listeners."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Listener(Protocol):
    """Hears of a run: the terminal, the run's own files, W&B, TensorBoard."""

    def note(self, text: str) -> None:
        """A line to read."""

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
    """Reads what a worker appends to its `metrics.jsonl`; begins anew where a resume cut the file back."""

    def __init__(self, step: str, workspace: Path, listener: Listener):
        self._step, self._file, self._listener = step, workspace / "metrics.jsonl", listener
        self._seen = -1
        self._offset = 0

    def __call__(self) -> None:
        try:
            size = self._file.stat().st_size
        except FileNotFoundError:
            return
        if size < self._offset:
            self._offset = 0
        if size == self._offset:
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            row: dict[str, Any] = json.loads(line)
            step = int(row.pop("step"))
            if step > self._seen:
                self._seen = step
                total = int(row.pop("total"))
                row.pop("time", None)
                self._listener.progress(self._step, step, total, row)
