"""The engine on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipd_ray.config import RuntimeConfig
from ipd_ray.distributed import cluster
from ipd_ray.distributed.distill import distill
from ipd_ray.distributed.pool import ActorPool
from ipd_ray.engine import Task, drive, raise_failures
from ipd_ray.steps import DistillJob

AHEAD = 16
"""Actors asked for beyond the room there is, where an autoscaler may make room."""
LOOK_SECONDS = 5.0


class RayEngine:
    """Actors for steps and shards, Ray Train for step 5. All paths in tasks must be absolute and seen by every node."""

    def __init__(self, runtime: RuntimeConfig, device: str):
        """Join or start the cluster. Raises UserError where it can never give what `runtime` asks for."""
        self._runtime, self._cuda = runtime, device.startswith("cuda")
        self._ours = cluster.connect(runtime.address)
        try:
            self._cluster, self._looked = cluster.inspect(), time.monotonic()
            cluster.check(runtime, device, self._cluster)
        except BaseException:
            if self._ours:
                cluster.disconnect()
            raise
        self._gpus = runtime.gpus_per_actor if self._cuda else 0.0
        self._pool = ActorPool(self._limit, threads=runtime.threads, gpus=self._gpus)

    def run_steps(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        raise_failures(tasks, self._drive(tasks, tick))

    def map_shards(
        self, tasks: Sequence[Task], done: Callable[[int, Any], None], tick: Callable[[], None]
    ) -> dict[int, str]:
        return self._drive(tasks, tick, done)

    def distill(self, job: DistillJob, tick: Callable[[], None]) -> None:
        _require_absolute("distill", job.work)
        most, gpus = self._runtime.workers, float(self._cuda)
        fewest = self._runtime.min_workers or most
        if not self._runtime.train_threads:  # all cores over the workers: the cluster's cores, not the driver's
            now = self._look()
            threads = now.threads(min(most, max(fewest, now.slots(1, gpus))), gpus)
            job = replace(job, place=replace(job.place, threads=threads))
        distill(job, (fewest, most), tick)

    def close(self) -> None:
        self._pool.clear()
        if self._ours:
            self._ours = False
            cluster.disconnect()

    def _drive(
        self, tasks: Sequence[Task], tick: Callable[[], None], done: Callable[[int, Any], None] | None = None
    ) -> dict[int, str]:
        for task in tasks:
            _require_absolute(task.name, str(task.arguments.get("work", "/")))
        try:
            return drive(tasks, self._pool, tick=tick, done=done, retry_errors=done is not None)
        finally:
            self._pool.clear()  # after Ctrl-C: nothing may go on that nobody waits for

    def _limit(self) -> int:
        if self._runtime.actors:
            return self._runtime.actors
        now = self._look()
        return now.slots(self._runtime.threads, self._gpus) + AHEAD * now.autoscaled

    def _look(self) -> cluster.Cluster:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._cluster, self._looked = cluster.inspect(), time.monotonic()
        return self._cluster


def _require_absolute(name: str, path: str) -> None:
    if not Path(path).is_absolute():
        raise ValueError(f"{name}: work={path!r} must be an absolute path: workers have folders of their own.")
