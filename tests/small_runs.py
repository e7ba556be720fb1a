"""A log and settings so small that the whole method takes seconds, and where to run it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from ipd_ray import testing
from ipd_ray.data.export import episode_buffer, write_minari
from ipd_ray.engine import Task, distill_task
from ipd_ray.steps import DistillJob

LOG = "test/pendulum-v0"
SETTINGS = [
    "values.updates=100", "values.width=16", "values.batch_size=32",
    "world_model.members=3", "world_model.elites=2", "world_model.width=16", "world_model.layers=2",
    "world_model.max_updates=60", "world_model.eval_every=30", "world_model.batch_size=32",
    "select.starts=24", "select.episode_cap=0.5", "planner.candidates=8", "planner.horizon=2",
    "imagine.length=4", "imagine.shard_size=8",
    "accept.threshold=1000.0", "accept.range_margin=2.0", "accept.min_length=1", "accept.margin=0.0",
    "policy.width=16", "policy.layers=1", "policy.heads=2", "policy.context=4",
    "distill.updates=40", "distill.batch_size=16", "distill.warmup=5", "distill.eta=0.5",
    "choose.episodes=4", "choose.length=20",
    "evaluate.episodes=2", "evaluate.max_steps=30", "runtime.train_threads=1",
    "runtime.actors=1",  # each more would import torch first
]


def write_log(root: Path, name: str = LOG, episodes: int = 8, steps: int = 40, seed: int = 0) -> str:
    """Write a Minari dataset of random torques on Pendulum-v1, rewards over 0: V rises along segments."""
    env = gymnasium.make("Pendulum-v1")
    rng = np.random.default_rng(seed)
    logged = []
    for _ in range(episodes):
        observations = [env.reset(seed=int(rng.integers(2**31)))[0]]
        actions = rng.uniform(-2.0, 2.0, (steps, 1)).astype(np.float32)
        rewards = []
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(float(reward) + 17.0)
        logged.append(episode_buffer(np.stack(observations), actions, np.array(rewards), terminated=False))
    write_minari(
        name, logged, observation_space=env.observation_space, action_space=env.action_space, description="random",
        root=root, env_spec=env.spec.to_json() if env.spec else None, ref_scores=(-1200.0, -150.0),
    )
    return name


def ipd_ray(*words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, as a shell would."""
    import os

    return subprocess.Popen(
        [sys.executable, "-m", "ipd_ray.cli", *words], cwd=cwd, env={**os.environ, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )


class OneProcess:
    """An engine that does its tasks here, one after the other: a worker would import torch first."""

    def run_steps(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        self.map_shards(tasks, lambda *_: None, tick)

    def map_shards(
        self, tasks: Sequence[Task], done: Callable[[int, Any], None], tick: Callable[[], None]
    ) -> dict[int, str]:
        for number, task in enumerate(tasks):
            done(number, task.function(**task.arguments))
            tick()
        return {}

    def distill(self, job: DistillJob, tick: Callable[[], None]) -> None:
        self.run_steps([distill_task(job)], tick)

    def require_storage(self, places: Sequence[str]) -> None:
        return

    def crew(self) -> tuple[int, int]:
        return 1, 0

    def close(self) -> None:
        return


def open_bucket(server: str, name: str, mirror: Path, patch: pytest.MonkeyPatch) -> str:
    """A bucket of that server that this process and its children may use, and where they mirror it; its URI."""
    name = hashlib.sha256(name.encode()).hexdigest()[:12]
    for variable, value in {**testing.s3_bucket(server, name), "IPD_RAY_CACHE": str(mirror)}.items():
        patch.setenv(variable, value)
    return f"s3://{name}"
