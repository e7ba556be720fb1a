"""What tests and benchmarks share and other processes can import.

Tasks that die or fail, distillations that are killed or slow, an object store on loopback.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs
from torch import Tensor

from ipd_ray.data.shards import Segments, write_shard
from ipd_ray.distill.fit import Corpus, DistillTrainer, Reducer
from ipd_ray.steps import DistillJob
from ipd_ray.storage import Folder, probe


@contextmanager
def s3_server(log: Path | None = None) -> Iterator[str]:
    """An S3-compatible server over HTTP on loopback (moto's); yields its address. log: of its requests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with (log or Path(os.devnull)).open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        end = time.monotonic() + 60.0
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def s3_bucket(address: str, name: str) -> dict[str, str]:
    """Make a bucket; return the environment variables with which s3://name is found."""
    fs.S3FileSystem(
        access_key="test", secret_key="test-secret", region="us-east-1", endpoint_override=address,
        allow_bucket_creation=True,
    ).create_dir(name)
    return {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": address,
    }


def square(value: int, seconds: float = 0.0) -> int:
    """Return the square, after a while."""
    time.sleep(seconds)
    return value * value


def trivial_shard(work: str, shard: int) -> dict[str, Any]:
    """Write a shard of one segment of one step with its manifest entry, as imagination would; return the entry."""
    one, none = np.zeros((1, 1), np.float32), np.zeros((1, 1), bool)
    at, state, value = np.full(1, shard, np.int64), np.zeros((1, 2, 1), np.float32), np.zeros((1, 2), np.float32)
    segments = Segments(
        index=at, episode=at, timestep=at, control=none[0], observation=state, action=state[:, :1],
        imitated=state[:, :1], reward=one, terminal=none, uncertainty=one, value=value, own_reward=one,
        own_terminal=none, own_length=at, own_value=value,
    )
    return write_shard(Folder.of(work), shard, segments, {"steps": 1, "reward_gain": 0.0})


def timed(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Call a function in the worker; return its result with the seconds it took there."""
    begun = time.perf_counter()
    result = function(**arguments)
    return {**result, "worker_seconds": time.perf_counter() - begun}


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


def die(number: int = signal.SIGKILL) -> None:
    """Kill this process by a signal; as a lack of memory would, where none is given."""
    os.kill(os.getpid(), number)


def die_unless(marker: str) -> None:
    """Kill this process unless the file exists; make it first."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    die()


def probe_where_writable(uri: str) -> None:
    """Probe a folder, as if it could be read only where IPD_RAY_TEST_READ_ONLY is set."""
    if os.environ.get("IPD_RAY_TEST_READ_ONLY"):
        raise PermissionError(errno.EACCES, "Permission denied", uri)
    probe(uri)


def broken_pendulum(**kwargs: Any) -> Any:
    """An environment that cannot be made."""
    raise RuntimeError("the motor is gone")


def write_pid(path: str, seconds: float) -> None:
    """Tell who works here, then take long."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)


def _before_each_update(trainer: DistillTrainer, action: Callable[[int], None]) -> DistillTrainer:
    """Return the trainer, which does something before each update."""
    update = trainer.update

    def later_update(step: int) -> dict[str, Tensor]:
        action(step)
        return update(step)

    trainer.update = later_update  # type: ignore[method-assign]
    return trainer


@dataclass(frozen=True)
class MortalJob(DistillJob):
    """A distillation whose worker of one rank is killed once, in the middle."""

    marker: str
    """File that says it happened."""
    rank: int
    step: int
    """Update in which it happens."""

    def trainer(self, corpus: Corpus, reducer: Reducer | None = None) -> DistillTrainer:
        def die_at(step: int) -> None:
            if step == self.step and (reducer.rank if reducer else 0) == self.rank:
                die_unless(self.marker)

        return _before_each_update(super().trainer(corpus, reducer), die_at)


@dataclass(frozen=True)
class SlowJob(DistillJob):
    """A distillation whose updates take a while."""

    seconds: float

    def trainer(self, corpus: Corpus, reducer: Reducer | None = None) -> DistillTrainer:
        return _before_each_update(super().trainer(corpus, reducer), lambda _: time.sleep(self.seconds))


@dataclass(frozen=True)
class ElasticJob(DistillJob):
    """A distillation that waits before some updates until it has a certain number of workers."""

    gates: dict[int, int]
    """Update to workers."""

    def trainer(self, corpus: Corpus, reducer: Reducer | None = None) -> DistillTrainer:
        world = reducer.world if reducer else 1

        def wait_at_gate(step: int) -> None:
            end = time.monotonic() + 180.0
            while self.gates.get(step, world) != world:  # Ray ends this process to change their number
                if time.monotonic() > end:
                    raise TimeoutError(f"update {step} waited in vain for {self.gates[step]} workers")
                time.sleep(0.05)

        return _before_each_update(super().trainer(corpus, reducer), wait_at_gate)


@dataclass(frozen=True)
class LocatedJob(DistillJob):
    """A distillation whose workers tell on which node they are, by the process id of its raylet."""

    found: str
    """Folder that gets a file of that name."""

    def trainer(self, corpus: Corpus, reducer: Reducer | None = None) -> DistillTrainer:
        (Path(self.found) / os.environ["RAY_RAYLET_PID"]).touch()
        return super().trainer(corpus, reducer)
