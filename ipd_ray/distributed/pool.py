"""Actors that carry tasks out. One call in flight each; who dies is not restarted: `drive` starts its task again."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ipd_ray.artifacts import numeric_platform
from ipd_ray.distributed.cluster import cpus
from ipd_ray.engine import ATTEMPTS, Outcome, Task, TaskError
from ipd_ray.errors import UserError


class Worker:
    """What an actor is: nothing of Ray in it."""

    def platform(self) -> dict[str, str]:
        """Return the numeric platform; the first call, so that an answer also says the worker is up."""
        return numeric_platform()

    def call(self, task: Task) -> tuple[Any, str | None]:
        """Return (result, None), or (None, traceback): exceptions of all kinds travel as text."""
        try:
            return task.function(**task.arguments), None
        except Exception:
            return None, traceback.format_exc()


@dataclass(eq=False)
class _Actor:
    handle: Any
    call: Any
    """Reference of the call in flight; None where idle."""
    task: int | None = None


class ActorPool:
    """Grows by what waits; actors that find no room are the autoscaler's demand. Idle ones go when nothing waits."""

    def __init__(self, limit: Callable[[], int], *, threads: int, gpus: float):
        """limit: how many actors there may be, asked again and again. threads, gpus: what each one takes."""
        self._limit = limit
        # DEFAULT: in a Tune trial, its placement group would take actors in, and has no room for them.
        self._make: Any = ray.remote(
            num_cpus=cpus(threads), num_gpus=gpus, max_restarts=0, scheduling_strategy="DEFAULT"
        )(Worker)
        self._actors: list[_Actor] = []
        self._waiting = 0
        self._platform: dict[str, str] | None = None
        self._failed_starts = 0

    def __len__(self) -> int:
        return len(self._actors)

    def capacity(self, waiting: int) -> int:
        self._waiting = waiting
        busy = sum(a.task is not None for a in self._actors)
        wanted = min(waiting + busy, max(1, self._limit()))
        while len(self._actors) < wanted:
            handle = self._make.remote()
            self._actors.append(_Actor(handle, handle.platform.remote()))
        return sum(a.call is None for a in self._actors)

    def start(self, number: int, task: Task) -> None:
        actor = next(a for a in self._actors if a.call is None)
        actor.call, actor.task = actor.handle.call.remote(task), number
        self._waiting -= 1

    def wait(self, seconds: float) -> list[Outcome]:
        if self._waiting <= 0:
            # At once: an idle actor holds what a training, or another run that this one waits for, may need.
            for actor in [a for a in self._actors if a.task is None]:
                self._remove(actor)
        calls = {a.call: a for a in self._actors if a.call is not None}
        if ray.wait(list(calls), timeout=seconds)[0]:
            ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        else:
            ended = []
        return [o for call in ended if (o := self._collect(calls[call])) is not None]

    def clear(self) -> None:
        """Kill every actor and forget what it did."""
        for actor in list(self._actors):
            self._remove(actor)
        self._waiting = 0

    def _collect(self, actor: _Actor) -> Outcome | None:
        number, call = actor.task, actor.call
        actor.task = actor.call = None
        try:
            answer = ray.get(call)
        except RayTaskError as error:  # the call itself failed: its arguments or result could not be read
            if number is None:
                self._start_failed(actor, error)
                return None
            return Outcome(number, error=str(error))
        except RayError as error:  # actor, worker or node died or is out of reach
            if number is None:
                self._start_failed(actor, error)
                return None
            self._remove(actor)
            return Outcome(number, lost=True)
        if number is None:
            self._failed_starts = 0
            self._admit(answer)
            return None
        return Outcome(number, *answer)

    def _admit(self, platform: dict[str, str]) -> None:
        """Bit-equality holds on one numeric platform only."""
        self._platform = self._platform or platform
        if platform != self._platform:
            raise UserError(
                f"the cluster's nodes compute differently: an actor came up on {platform}, the first one on "
                f"{self._platform}. Results would depend on who computes what: give the cluster one type of node."
            )

    def _start_failed(self, actor: _Actor, error: RayError) -> None:
        self._remove(actor)
        self._failed_starts += 1
        if self._failed_starts >= ATTEMPTS:
            raise TaskError(
                f"{ATTEMPTS} actors in a row died while starting; is this version of ipd_ray installed on every node?\n"
                f"{error}"
            ) from error

    def _remove(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        with suppress(RayError):
            ray.kill(actor.handle)
