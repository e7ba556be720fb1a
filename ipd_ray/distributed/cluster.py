"""Joining a Ray cluster, what it can give, and refusing beforehand what it never can."""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get

from ipd_ray.config import RuntimeConfig
from ipd_ray.errors import UserError


def connect(address: str | None, *, dashboard: bool = False) -> bool:
    """Join the cluster at `address`, or start one on this machine; return whether `disconnect` is ours to call.

    A process that is connected already (a Tune trial, a test) stays as it is. dashboard: for a cluster of this machine;
    a gigabyte of memory, and sweeps need it.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning a worker
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address is None:
        # "local": without it a stale cluster that Ray remembers would be joined.
        ray.init(address="local", include_dashboard=dashboard, **quiet)
        return True
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"runtime.address={address!r}: no Ray cluster can be joined there ({_first_line(error)}): start one with "
            "`ray start --head`, or leave runtime.address out for a cluster of this machine."
        ) from error
    return True


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10.0).close()


def disconnect() -> None:
    """Stop the cluster that `connect` started, or leave the one that it joined: that goes on."""
    ray.shutdown()


def cpus(threads: int) -> float:
    """Return the CPUs that a worker of so many threads asks for: a little less, which a Tune trial beside it holds."""
    return threads - 0.05


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster offers in all, whoever uses it."""

    cpus: float
    gpus: float

    def slots(self, threads: int, gpus: float) -> int:
        """Return how many workers of `threads` CPUs and `gpus` GPUs fit."""
        fit = int(self.cpus // threads)
        return min(fit, int(self.gpus / gpus + 1e-6)) if gpus else fit


@dataclass(frozen=True)
class Cluster:
    """The machines that are there now."""

    nodes: tuple[Node, ...]
    autoscaled: bool
    """More may come, of kinds and numbers that the cluster does not tell."""

    def slots(self, threads: int, gpus: float) -> int:
        """Return how many workers of `threads` CPUs and `gpus` GPUs fit now."""
        return sum(n.slots(threads, gpus) for n in self.nodes)

    def threads(self, workers: int, gpus: float) -> int:
        """Return the most threads that `workers` workers can have each, at least 1: all cores over the workers."""
        most = int(max((n.cpus for n in self.nodes), default=1))
        return next((t for t in range(most, 0, -1) if self.slots(t, gpus) >= workers), 1)

    def __str__(self) -> str:
        total = f"{sum(n.cpus for n in self.nodes):g} CPUs and {sum(n.gpus for n in self.nodes):g} GPUs"
        return f"{total} on {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"


def inspect() -> Cluster:
    """Return what the joined cluster is."""
    resources = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return Cluster(tuple(Node(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in resources), _autoscaled())


def _autoscaled() -> bool:
    """Whether machines have a type name, which only an autoscaler gives; without one they are called node_<id>."""
    if ray.util.client.ray.is_connected():
        return True  # a client cannot ask: better to wait than to refuse
    status = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")  # the first autoscaler
    report = status.get("autoscaler_report") or {}
    names = [*(report.get("active_nodes") or {}), *(report.get("idle_nodes") or {})]
    try:
        second = get_cluster_status(ray.get_runtime_context().gcs_address)
        names += [n.ray_node_type_name for n in (*second.active_nodes, *second.idle_nodes)]
    except (RuntimeError, ValueError, OSError):  # too young to have a status
        pass
    return any(not name.startswith("node_") for name in names)


def check(runtime: RuntimeConfig, device: str, cluster: Cluster) -> None:
    """Raise UserError for what the cluster can never give. An autoscaler may give anything."""
    if cluster.autoscaled:
        return
    cuda = device.startswith("cuda")
    if cuda and not cluster.slots(1, runtime.gpus_per_actor):
        raise UserError(
            f"runtime.device={device} needs a GPU beside a CPU, the cluster has {cluster}: add a node with a GPU, or "
            "set runtime.device=cpu."
        )
    per_actor = runtime.gpus_per_actor if cuda else 0.0
    if not cluster.slots(runtime.threads, per_actor):
        most = int(max((n.cpus for n in cluster.nodes), default=0.0))
        raise UserError(
            f"runtime.threads={runtime.threads} must be at most {most}, the CPUs of the largest node: lower "
            "runtime.threads or add a larger node."
        )
    threads, per_worker = max(1, runtime.train_threads), 1.0 if cuda else 0.0
    most, fewest = cluster.slots(threads, per_worker), runtime.min_workers or runtime.workers
    if fewest > most:
        field = "min_workers" if runtime.min_workers else "workers"
        each = f"{threads} CPU{'s' * (threads > 1)}" + " and a GPU" * cuda
        raise UserError(
            f"runtime.{field}={fewest} must be at most {most}: each takes {each}, the cluster has {cluster}: "
            f"lower runtime.{field}{' or runtime.train_threads' * (threads > 1)}, or add nodes."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
