"""Ray clusters of several raylets on this machine: one whose nodes are killed by hand, one that an autoscaler grows."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
OBJECT_STORE = 100 * 2**20
ACTOR, TRAIN_WORKER = "ray::Worker", "ray::RayTrainWorker"
"""How the processes of imagination actors and of Ray Train's workers call themselves."""


class Nodes:
    """A head without CPUs, where drivers live, and nodes of one CPU each."""

    def __init__(self, count: int):
        os.environ.update(QUIET)
        from ray.cluster_utils import Cluster

        small: dict[str, Any] = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        self._nodes: list[Any] = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """Start a node."""
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE))

    def take(self, rng: random.Random) -> bool:
        """Take a node away that has an actor or a training worker, with all its processes, as a spot machine goes."""
        held = [n for n in self._nodes if any(_called(pid, ACTOR, TRAIN_WORKER) for pid in _children(_raylet(n)))]
        if not held:
            return False
        node = rng.choice(held)
        self._nodes.remove(node)
        workers = list(_children(_raylet(node)))
        os.kill(_raylet(node), signal.SIGKILL)
        _kill(workers)
        self._cluster.remove_node(node, allow_graceful=False)
        return True

    def kill_worker(self, title: str, rng: random.Random) -> bool:
        """Kill one process of that title, if there is one."""
        found = [pid for node in self._nodes for pid in _children(_raylet(node)) if _called(pid, title)]
        if not found:
            return False
        _kill([rng.choice(sorted(found))])
        return True

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray.experimental.internal_kv import _initialize_internal_kv

        self._cluster.shutdown()
        if ray.is_initialized():  # to another cluster, whose client that has reset
            _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


class AutoscaledNodes:
    """A head without CPUs, and Ray's own autoscaler with a provider that starts raylets of one CPU on this machine."""

    def __init__(self, folder: Path, most: int, idle_minutes: float = 0.1):
        """most: nodes it may start. idle_minutes: after which it takes one away."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.address = f"{_own_ip()}:{port}"
        kinds = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, "object_store_memory": OBJECT_STORE}, "node_config": {},
                       "min_workers": 0, "max_workers": most},
        }
        empty_lists = ("file_mounts_sync_continuously", "cluster_synced_files", "rsync_exclude", "rsync_filter",
                       "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
                       "head_start_ray_commands", "worker_start_ray_commands")
        config = {
            "cluster_name": "fake", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": idle_minutes,
            "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                         "disable_launch_config_check": True, "gcs_address": self.address},
            "available_node_types": kinds, "head_node_type": "ray.head.default", "docker": {}, "auth": {},
            "file_mounts": {}, "head_node": {}, "worker_nodes": {}, **{name: [] for name in empty_lists},
        }
        file = folder / "autoscaler.json"
        file.write_text(json.dumps(config))
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}", "--num-cpus=0",
             f"--autoscaling-config={file}", f"--object-store-memory={OBJECT_STORE}", "--include-dashboard=false",
             "--block"],
            env={**os.environ, **QUIET, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                 "RAY_enable_autoscaler_v2": "0"},
            stdout=(folder / "ray.log").open("w"), stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 60.0
        while not _listens(self.address):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the head did not start:\n{(folder / 'ray.log').read_text()}")
            time.sleep(0.2)

    def __enter__(self) -> AutoscaledNodes:
        return self

    def __exit__(self, *_: object) -> None:
        ours = list(_descendants(self._process.pid))
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20.0)
        _kill([*ours, self._process.pid])
        self._process.wait()


def driver_environment() -> dict[str, str]:
    """What a driver of these clusters needs."""
    return {**os.environ, **QUIET, "OMP_NUM_THREADS": "1"}


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _own_ip() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _children(parent: int) -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # it ended meanwhile
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(status.parent.name)


def _descendants(parent: int) -> Iterator[int]:
    for child in _children(parent):
        yield child
        yield from _descendants(child)


def _called(pid: int, *titles: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().startswith(titles)
    except OSError:
        return False


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
