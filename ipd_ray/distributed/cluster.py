"""Joining a Ray cluster, what it can give, and refusing beforehand what it never can."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray._private.services import get_ray_address_from_environment
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get

from ipd_ray.config import RuntimeConfig, label_selector
from ipd_ray.errors import UserError, first_line

NODE_ID = "ray.io/node-id"
"""Label that every node has, each its own."""


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
        with _sigterm_kept():
            ray.init(address="local", include_dashboard=dashboard, **quiet)
        return True
    found = address
    try:
        if address == "auto":  # RAY_ADDRESS, or the last cluster that was started or joined here, which may be gone
            found = get_ray_address_from_environment(address, None)
        knock(found)
        with _sigterm_kept():
            ray.init(address=found, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        where = "there" if found == address else f"at {found}"
        raise UserError(
            f"runtime.address={address!r}: no Ray cluster can be joined {where} ({first_line(error)}): start one with "
            "`ray start --head`, or leave runtime.address out for a cluster of this machine."
        ) from error
    return True


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep a handler of SIGTERM: ray.init puts its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before):
        with suppress(ValueError):  # not the main thread: Ray has left it alone, too
            signal.signal(signal.SIGTERM, before)


def knock(address: str) -> None:
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
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Node:
        """Read one of ray.nodes()."""
        offered = node["Resources"]
        return cls(offered.get("CPU", 0.0), offered.get("GPU", 0.0), node["Labels"])

    def slots(self, threads: int, gpus: float) -> int:
        """Return how many workers of `threads` CPUs and `gpus` GPUs fit."""
        fit = int(self.cpus // threads)
        return min(fit, int(self.gpus) * int(1.0 / gpus + 1e-6)) if gpus else fit  # none spans two GPUs


@dataclass(frozen=True)
class Cluster:
    """The machines that are there now."""

    nodes: tuple[Node, ...]
    autoscaled: bool
    """More may come, of kinds and numbers that the cluster does not tell."""

    def where(self, labels: Mapping[str, str]) -> Cluster:
        """Return the part of it that has these labels."""
        return replace(self, nodes=tuple(n for n in self.nodes if labels.items() <= n.labels.items()))

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
    return Cluster(tuple(Node.of(node) for node in ray.nodes() if node["Alive"]), _autoscaled())


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
    actors = _labelled(cluster, "actor_labels", runtime.actor_labels)
    workers = _labelled(cluster, "worker_labels", runtime.worker_labels)
    cuda = device.startswith("cuda")
    if cuda and not actors.slots(1, runtime.gpus_per_actor):
        raise UserError(
            f"runtime.device={device} needs a GPU beside a CPU, the cluster has {actors}: add a node with a GPU, or "
            "set runtime.device=cpu."
        )
    per_actor = runtime.gpus_per_actor if cuda else 0.0
    if not actors.slots(runtime.threads, per_actor):
        most = int(max((n.cpus for n in actors.nodes), default=0.0))
        raise UserError(
            f"runtime.threads={runtime.threads} must be at most {most}, the CPUs of the largest node: lower "
            "runtime.threads or add a larger node."
        )
    threads, per_worker = max(1, runtime.train_threads), 1.0 if cuda else 0.0
    most, fewest = workers.slots(threads, per_worker), runtime.min_workers or runtime.workers
    if fewest > most:
        field = "min_workers" if runtime.min_workers else "workers"
        each = f"{threads} CPU{'s' * (threads > 1)}" + " and a GPU" * cuda
        raise UserError(
            f"runtime.{field}={fewest} must be at most {most}: each takes {each}, the cluster has {workers}: "
            f"lower runtime.{field}{' or runtime.train_threads' * (threads > 1)}, or add nodes."
        )


def _labelled(cluster: Cluster, name: str, labels: str) -> Cluster:
    """Return the nodes with these labels. Raises UserError where there is none."""
    found = cluster.where(label_selector(labels))
    if not found.nodes:
        have = sorted({f"{k}={v}" for n in cluster.nodes for k, v in n.labels.items() if k != NODE_ID})
        raise UserError(
            f"runtime.{name}={labels}: no node has these labels, there are {', '.join(have) or 'none'}: start one with "
            f"`ray start --labels {labels}`, or leave runtime.{name} out."
        )
    return found
