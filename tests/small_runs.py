"""A log and settings so small that the whole method takes seconds: for tests of what surrounds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np

from ipd_ray.data.export import episode_buffer, write_minari

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
