"""What tests share: a small log, models learned from it, and one Ray cluster a session."""

from __future__ import annotations

import os

# Before ray is imported anywhere, and inherited by its workers.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.05", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="180", WANDB_MODE="offline",
    MUJOCO_GL="disable", RAY_worker_niceness="0",  # beside other tests Ray's workers, nice by 15, would hardly run
    OMP_NUM_THREADS="1",  # each process has a core; sums that ask for threads set them
)

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import OneProcess, open_bucket

import ipd_ray.api
from ipd_ray import testing
from ipd_ray.artifacts import Store
from ipd_ray.config import (
    AcceptConfig,
    DataConfig,
    DistillConfig,
    ImagineConfig,
    PlannerConfig,
    PolicyConfig,
    SelectConfig,
    ValuesConfig,
    WorldModelConfig,
)
from ipd_ray.data.columns import write_columns
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.engine import Task
from ipd_ray.imagine.rollout import ShardSpec
from ipd_ray.steps import (
    DistillJob,
    LogRef,
    Place,
    finish_imagination,
    run_select,
    run_shard,
    run_values,
    run_world_model,
)

PLACE = Place("cpu", 1, 30.0)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job, and so would be what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """In parallel (`pytest -n 2`), all that needs Ray goes to one process, which has the cluster; else a file does.

    Not at `pytest_collection_modifyitems`: pytest-xdist reads the groups there, and would do so first.
    """
    item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.stem))


def point_mass(episodes: int = 12, length: int = 40, seed: int = 0) -> Transitions:
    """A log of a point (position, velocity) that is pushed to the origin, by controllers from bad to good."""
    rng = np.random.default_rng(seed)
    state = np.zeros((episodes, length + 1, 2), np.float32)
    action = np.zeros((episodes, length, 1), np.float32)
    state[:, 0] = rng.uniform(-1.0, 1.0, (episodes, 2))
    skill = np.linspace(0.0, 1.0, episodes)[:, None]
    for t in range(length):
        x, v = state[:, t, :1], state[:, t, 1:]
        action[:, t] = np.clip(-skill * (x + v) + rng.normal(0.0, 0.3, x.shape), -0.99, 0.99)
        v = 0.9 * v + 0.3 * action[:, t] + rng.normal(0.0, 0.01, v.shape)
        state[:, t + 1] = np.concatenate([x + 0.2 * v, v], 1)
    space = {"type": "Box", "shape": [2], "dtype": "float32"}
    return Transitions(
        observation=state[:, :-1].reshape(-1, 2), action=action.reshape(-1, 1),
        reward=(1.0 - (state[:, 1:, 0] ** 2) - 0.1 * action[..., 0] ** 2).reshape(-1).astype(np.float32),
        next_observation=state[:, 1:].reshape(-1, 2), terminal=np.zeros(episodes * length, bool),
        episode_start=np.arange(episodes + 1) * length,
        spec=Spec("test/point-mass-v0", space, [-1.0], [1.0], [1], "float32"),
    )


@pytest.fixture(scope="session")
def tiny_log(tmp_path_factory: pytest.TempPathFactory) -> LogRef:
    """A converted log of 480 steps."""
    path = tmp_path_factory.mktemp("log") / "log.safetensors"
    write_columns(path, point_mass())
    return LogRef(str(path), DataConfig(holdout_fraction=0.25), 0)


@dataclass(frozen=True)
class Method:
    """The method on the tiny log up to imagination: what tests of engines start from."""

    log: LogRef
    values: str
    world_model: str
    imagination: str
    specs: list[ShardSpec]
    imagine: ImagineConfig
    planner: PlannerConfig

    def shard_tasks(self, work: Path, place: Place = PLACE) -> list[Task]:
        """One task a shard."""
        work.mkdir(parents=True, exist_ok=True)
        common: dict[str, Any] = {
            "work": str(work), "place": place, "log": self.log, "values": self.values, "world_model": self.world_model,
            "planner": self.planner, "imagine": self.imagine, "seed": 0,
        }
        return [Task(f"shard {s.shard}", run_shard, {**common, "spec": s}) for s in self.specs]

    def job(
        self, work: Path, kind: Callable[..., DistillJob] = DistillJob, *, every: float = 30.0, dropout: float = 0.1,
        **more: Any,
    ) -> DistillJob:
        """Step 5 with 60 updates, of which every third is logged. every: seconds between checkpoints."""
        return kind(
            work=str(work), place=Place("cpu", 1, every), log=self.log, values=self.values,
            world_model=self.world_model, imagination=self.imagination, uncertainty=self.imagine.uncertainty,
            regret_share=0.3,
            accept=AcceptConfig(threshold=1e6, min_length=1, margin=0.0, range_margin=10.0),
            policy=PolicyConfig(context=4, layers=1, heads=2, width=16, dropout=dropout),
            distill=DistillConfig(updates=60, batch_size=16, warmup=5, eta=0.5), seed=0, **more,
        )


@pytest.fixture(scope="session")
def tiny_method(tmp_path_factory: pytest.TempPathFactory, tiny_log: LogRef) -> Method:
    """Values, world model and imagined shards of the tiny log, in a few seconds."""
    store, key = Store(tmp_path_factory.mktemp("store")), "0" * 64

    def commit(step: str) -> str:
        return str(store.commit(step, key, version=1, parts={}).path)

    values = ValuesConfig(updates=200, batch_size=64, width=16)
    run_values(str(store.folder("values", key)), PLACE, tiny_log, values, 0)
    model = WorldModelConfig(members=3, elites=2, width=16, layers=2, max_updates=60, eval_every=30)
    run_world_model(str(store.folder("world_model", key)), PLACE, tiny_log, model, 0)
    imagine = ImagineConfig(length=4, shard_size=10)
    work = store.folder("imagine", key).path
    values_path, model_path = commit("values"), commit("world_model")
    specs = run_select(str(work), PLACE, tiny_log, values_path, SelectConfig(starts=40, episode_cap=0.5), imagine, 0)
    planner = PlannerConfig(candidates=8, horizon=3)
    method = Method(tiny_log, values_path, model_path, "", specs, imagine, planner)
    for task in method.shard_tasks(work):
        task.function(**task.arguments)
    finish_imagination(PLACE.workspace(str(work)), len(specs))
    return Method(tiny_log, values_path, model_path, commit("imagine"), specs, imagine, planner)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Runs of a module's tests in this process, where engines are not what they are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipd_ray.api, "make_engine", lambda *_: OneProcess())
        yield


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave an empty page where reports are not what a test is about: its figures take seconds."""
    monkeypatch.setattr("ipd_ray.report.build_report", lambda runs, path: path.write_text(""))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3-compatible server over HTTP on loopback; its address."""
    pytest.importorskip("moto.server", reason="no S3-compatible server: pip install 'moto[s3]' flask flask-cors")
    with testing.s3_server() as address:
        yield address


@pytest.fixture
def bucket(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> str:
    """An empty bucket, and an empty mirror; its URI."""
    return open_bucket(s3_server, request.node.nodeid, tmp_path / "mirror", monkeypatch)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local cluster of two CPUs; its address."""
    import ray

    ray.init(
        address="local", num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False, log_to_driver=False,
        logging_level="WARNING",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
