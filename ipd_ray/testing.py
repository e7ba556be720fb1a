"""Fakes for tests that other processes can import: tasks that die or fail, and a distillation that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ipd_ray.distill.fit import DistillTrainer, Reducer
from ipd_ray.steps import DistillJob


def square(value: int, seconds: float = 0.0) -> int:
    """Return the square, after a while."""
    time.sleep(seconds)
    return value * value


def meet(mine: str, other: str, seconds: float = 60.0) -> None:
    """Make a file and wait for another: two of these need each other to run."""
    Path(mine).touch()
    end = time.monotonic() + seconds
    while not Path(other).exists():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody made {other}")
        time.sleep(0.02)


def fail(message: str) -> None:
    """Always raise."""
    raise ValueError(message)


def unpicklable() -> Any:
    """Return what cannot travel."""
    return threading.Lock()


def die_once(value: int, marker: str) -> int:
    """Kill this process the first time, return the square the next."""
    die_unless(marker)
    return value * value


def die() -> None:
    """Kill this process as a lack of memory would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_unless(marker: str) -> None:
    """Kill this process unless the file exists; make it first."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    die()


def broken_pendulum(**kwargs: Any) -> Any:
    """An environment that cannot be made."""
    raise RuntimeError("the motor is gone")


def write_pid(path: str, seconds: float) -> None:
    """Tell who works here, then take long."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)


@dataclass(frozen=True)
class MortalJob(DistillJob):
    """A distillation whose worker of one rank is killed once, in the middle."""

    marker: str
    """File that says it happened."""
    rank: int
    step: int
    """Update in which it happens."""

    def trainer(self, reducer: Reducer | None = None) -> tuple[DistillTrainer, dict[str, Any]]:
        trainer, imagined = super().trainer(reducer)
        update = trainer.update

        def mortal_update(step: int) -> dict[str, Tensor]:
            if step == self.step and (reducer.rank if reducer else 0) == self.rank:
                die_unless(self.marker)
            return update(step)

        trainer.update = mortal_update  # type: ignore[method-assign]
        return trainer, imagined


@dataclass(frozen=True)
class SlowJob(DistillJob):
    """A distillation whose updates take a while."""

    seconds: float

    def trainer(self, reducer: Reducer | None = None) -> tuple[DistillTrainer, dict[str, Any]]:
        trainer, imagined = super().trainer(reducer)
        update = trainer.update

        def slow_update(step: int) -> dict[str, Tensor]:
            time.sleep(self.seconds)
            return update(step)

        trainer.update = slow_update  # type: ignore[method-assign]
        return trainer, imagined
