"""Environment variables that a submitted job is handed in the memory of the cluster's head, and nowhere else.

Ray's own way, `env_vars`, would keep the values in its job table, show them to every client, and write them in clear
into the log files of every node. Here a job's env_vars hold a random name; under it the values lie in the head's
key-value store (in Redis, where the head keeps its state there) until the job ends.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

from ipd_ray.distributed import cluster

VARIABLE = "IPD_RAY_CREDENTIALS"
"""Environment variable of a job: the name that its values lie under."""
HOOK = f"{__name__}.take"
"""What Ray calls in every worker of a job as it starts."""


def new_name() -> str:
    """Return a name that nobody can guess, as the job server's packages are named."""
    return f"ipd-ray-{uuid.uuid4().hex}"


def as_bytes(values: Mapping[str, str]) -> bytes:
    """Return what lies in the head's memory. Begins with a fixed text: Ray's errors quote the first 15 bytes."""
    return json.dumps({"environment of a job": dict(values)}).encode()


def runtime_env(name: str) -> dict[str, Any]:
    """Return the part of a job's runtime_env with which its processes find the values."""
    return {"env_vars": {VARIABLE: name}, "worker_process_setup_hook": HOOK}


def take() -> None:
    """Set the values as environment variables of this process, which is connected to the cluster."""
    data = _internal_kv_get(_key())
    if data is None:
        raise RuntimeError("what --env handed to this job is gone (did the head restart?): submit the job again.")
    os.environ.update(json.loads(data)["environment of a job"])


@contextmanager
def held() -> Iterator[None]:
    """Have the values in the job's own process meanwhile, connected to the cluster; afterwards they are deleted."""
    ours = cluster.connect("auto")
    take()
    try:
        yield
    finally:
        with suppress(RayError, RuntimeError):  # the cluster is gone
            _internal_kv_del(_key())
        if ours:
            cluster.disconnect()


def _key() -> str:
    return f"gcs://{os.environ[VARIABLE]}"
