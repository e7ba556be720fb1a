"""The engine on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ipd_ray.config import RuntimeConfig, label_selector
from ipd_ray.distributed import cluster
from ipd_ray.distributed.distill import at_work, distill
from ipd_ray.distributed.nodes import require_storage
from ipd_ray.distributed.pool import ActorPool
from ipd_ray.engine import Task, drive, raise_failures
from ipd_ray.steps import DistillJob
from ipd_ray.storage import Folder

AHEAD = 16
"""Workers asked for at least beyond the room there is, where an autoscaler may make room."""
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
        self._training: DistillJob | None = None
        self._gpus = runtime.gpus_per_actor if self._cuda else 0.0
        self._actor_labels, self._worker_labels = map(label_selector, (runtime.actor_labels, runtime.worker_labels))
        self._pool = ActorPool(self._limit, threads=runtime.threads, gpus=self._gpus, labels=self._actor_labels)

    def run_steps(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        raise_failures(tasks, self._drive(tasks, tick))

    def map_shards(
        self, tasks: Sequence[Task], done: Callable[[int, Any], None], tick: Callable[[], None]
    ) -> dict[int, str]:
        self._pool.least = min(self._runtime.min_actors, len(tasks))
        try:
            return self._drive(tasks, tick, done)
        finally:
            self._pool.least = 0

    def distill(self, job: DistillJob, tick: Callable[[], None]) -> None:
        _require_absolute("distill", job.work)
        most, gpus = self._runtime.workers, float(self._cuda)
        fewest = self._runtime.min_workers or most
        if not self._runtime.train_threads:  # all cores over the workers: the cluster's cores, not the driver's
            offered = self._look().where(self._worker_labels)
            threads = offered.threads(min(most, max(fewest, offered.slots(1, gpus))), gpus)
            job = replace(job, place=replace(job.place, threads=threads))
        self._training = job
        try:
            distill(job, (fewest, most), tick, labels=self._worker_labels)
        finally:
            self._training = None

    def require_storage(self, places: Sequence[str]) -> None:
        require_storage(
            places, "give runtime.store and --run-dir a mount that every node has, or a URI such as s3://bucket/runs "
            "with credentials on every node"
        )

    def crew(self) -> tuple[int, int]:
        starting = self._pool.starting
        up, more = at_work(self._training) if self._training else (0, 0)
        return len(self._pool) - starting + up, starting + more

    def close(self) -> None:
        self._pool.clear()
        if self._ours:
            self._ours = False
            cluster.disconnect()

    def _drive(
        self, tasks: Sequence[Task], tick: Callable[[], None], done: Callable[[int, Any], None] | None = None
    ) -> dict[int, str]:
        for task in tasks:
            if "work" in task.arguments:
                _require_absolute(task.name, str(task.arguments["work"]))
        try:
            return drive(tasks, self._pool, tick=tick, done=done, retry_errors=done is not None)
        finally:
            self._pool.clear()  # after Ctrl-C: nothing may go on that nobody waits for

    def _limit(self) -> int:
        now = self._look().where(self._actor_labels)
        return most_actors(self._runtime, now.slots(self._runtime.threads, self._gpus), now.autoscaled)

    def _look(self) -> cluster.Cluster:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._cluster, self._looked = cluster.inspect(), time.monotonic()
        return self._cluster


def most_actors(runtime: RuntimeConfig, room: int, autoscaled: bool) -> int:
    """Return how many actors there may be: as many as the user says; else as many as are asked for."""
    return runtime.actors or max(asked_for(room, autoscaled), runtime.min_actors)


def asked_for(room: int, autoscaled: bool) -> int:
    """Return how many workers are asked for: as many as there is room for, and as many again where a cluster may grow.
    What they find no room for is the autoscaler's demand: it doubles the cluster by and by."""
    return room + max(AHEAD, room) * autoscaled


def _require_absolute(name: str, path: str) -> None:
    if Folder.of(path).uri != path.rstrip("/"):
        raise ValueError(f"{name}: work={path!r} must be an absolute path or a URI: workers have folders of their own.")
