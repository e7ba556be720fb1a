"""Actors that carry tasks out. One call in flight each; who dies is not restarted: `drive` starts its task again."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError, RayTaskError

from ipd_ray.artifacts import numeric_platform
from ipd_ray.distributed.cluster import cpus
from ipd_ray.engine import ATTEMPTS, Outcome, Task
from ipd_ray.errors import TaskError, UserError


class Worker:
    """What an actor is."""

    def hello(self, device: str) -> tuple[dict[str, str], str]:
        """Return the numeric platform and the node; the first call, so that an answer also says the worker is up."""
        return numeric_platform(device), ray.get_runtime_context().get_node_id()

    def call(self, task: Task) -> tuple[Any, str | None]:
        """Return (result, None), or (None, traceback): exceptions of all kinds travel as text."""
        try:
            return task.function(**task.arguments), None
        except Exception:
            return None, traceback.format_exc()


@dataclass(eq=False)
class _Actor:
    handle: Any
    node: str | None = None
    """Where it is; None until it is up."""
    task: int | None = None


class ActorPool:
    """Grows by what waits; actors that find no room are the autoscaler's demand. Idle ones go when nothing waits."""

    def __init__(
        self, limit: Callable[[], int], *, threads: int, gpus: float, labels: Mapping[str, str] | None = None
    ):
        """limit: how many actors there may be, asked again and again. threads, gpus: what each one takes. labels: of
        the nodes that they may live on."""
        self._limit = limit
        # DEFAULT: in a Tune trial, its placement group would take actors in, and has no room for them.
        options: dict[str, Any] = {
            "num_cpus": cpus(threads), "num_gpus": gpus, "label_selector": dict(labels or {}),
            "scheduling_strategy": "DEFAULT",
        }
        self._device = "cuda" if gpus else "cpu"
        self._make: Any = ray.remote(max_restarts=0, **options)(Worker)
        self.least = 0
        """Actors that are started and kept even where fewer tasks wait."""
        self._actors: set[_Actor] = set()
        self._idle: list[_Actor] = []
        self._calls: dict[Any, _Actor] = {}
        """By reference of the call in flight: a task, or hello."""
        self._waiting = 0
        self._platform: dict[str, str] | None = None
        self._failed_starts = 0

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def starting(self) -> int:
        """Actors that are not up yet, most of them for want of room."""
        return sum(a.node is None for a in self._actors)

    def capacity(self, waiting: int) -> int:
        self._waiting = waiting
        wanted = min(max(waiting + self._busy(), self.least), max(1, self._limit()))
        for _ in range(len(self._actors), wanted):
            actor = _Actor(self._make.remote())
            self._actors.add(actor)
            self._calls[actor.handle.hello.remote(self._device)] = actor
        return len(self._idle)

    def start(self, number: int, task: Task) -> None:
        actor = self._idle.pop()
        actor.task = number
        self._calls[actor.handle.call.remote(task)] = actor
        self._waiting -= 1

    def wait(self, seconds: float) -> list[Outcome]:
        if self._waiting <= 0:
            # At once: an idle actor holds what a training, or another run that this one waits for, may need.
            free = sorted((a for a in self._actors if a.task is None), key=lambda a: a.node is not None)
            for actor in free[: max(0, len(self._actors) - self.least)]:
                self._remove(actor)
        calls = list(self._calls)
        ended = ray.wait(calls, timeout=seconds)[0]
        if ended:
            ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return [o for call in ended if (o := self._collect(call)) is not None]

    def clear(self) -> None:
        """Kill every actor and forget what it did."""
        for actor in list(self._actors):
            self._remove(actor)
        self._waiting = 0

    def _busy(self) -> int:
        return sum(a.task is not None for a in self._calls.values())

    def _collect(self, call: Any) -> Outcome | None:
        actor = self._calls.pop(call)
        number, actor.task = actor.task, None
        try:
            answer = ray.get(call)
        except RayTaskError as error:  # the call itself failed: its arguments or result could not be read
            if number is None:
                self._start_failed(actor, error)
                return None
            self._idle.append(actor)
            return Outcome(number, error=str(error))
        except RayError as error:  # actor, worker or node died or is out of reach
            if number is None:
                self._start_failed(actor, error)
                return None
            self._remove(actor)
            return Outcome(number, error=str(error), lost="machine" if _machine_gone(actor, error) else "worker")
        if number is None:
            self._failed_starts = 0
            platform, actor.node = answer
            self._admit(platform)
        self._idle.append(actor)
        return None if number is None else Outcome(number, *answer)

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
        if _machine_gone(actor, error):
            return
        self._failed_starts += 1
        if self._failed_starts >= ATTEMPTS:
            raise TaskError(
                f"{ATTEMPTS} actors in a row died while starting; is this version of ipd_ray installed on every node?\n"
                f"{error}"
            ) from error

    def _remove(self, actor: _Actor) -> None:
        self._actors.discard(actor)
        with suppress(ValueError):
            self._idle.remove(actor)
        for call in [c for c, a in self._calls.items() if a is actor]:
            del self._calls[call]
        with suppress(RayError):
            ray.kill(actor.handle)


def _machine_gone(actor: _Actor, error: RayError) -> bool:
    """Whether an actor was lost with its machine, which is out of reach first and dead later."""
    if isinstance(error, (ActorUnavailableError, NodeDiedError)) or (
        isinstance(error, RayActorError) and error.preempted
    ):
        return True
    return actor.node is not None and actor.node not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}
