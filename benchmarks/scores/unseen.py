"""Logs on which no default, preset or rule was ever chosen, made on the spot: does the method hold elsewhere?

    python benchmarks/scores/unseen.py                # makes the sets, a minute or two each
    python benchmarks/scores/run.py --tier unseen

A linear policy is improved by the cross-entropy method on the real task. Three of its stages, early, middle and last,
fill the log, each episode with Gaussian action noise of a scale drawn for it. Frozen: the numbers are not tuned on what
any policy reaches. The references are the mean returns of uniformly random actions (0) and of the last stage without
noise (100), so 100 is no ceiling.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ipd_ray.data.export import episode_buffer, write_minari
from ipd_ray.data.minari_source import local_ids

GENERATOR = 1


@dataclass(frozen=True)
class Task:
    """A log: its environment, and how far its collector got."""

    environment: str
    steps: int
    """Of the log, at least."""
    iterations: int = 30
    stages: tuple[int, ...] = (6, 15, 30)
    noise: tuple[float, float] = (0.1, 0.6)
    """Bounds of an episode's action noise, in half ranges of the action."""
    random: tuple[float, float] | None = None
    """Uniformly random actions alone, and the references of their log."""


TASKS = {
    "unseen/reacher/mixed-v0": Task("Reacher-v5", 20_000),
    "unseen/mountain-car/mixed-v0": Task("MountainCarContinuous-v0", 50_000),
    "unseen/double-pendulum/mixed-v0": Task("InvertedDoublePendulum-v5", 50_000),
    "unseen/walker2d/mixed-v0": Task("Walker2d-v5", 100_000),
    "unseen/hopper/random-v0": Task("Hopper-v5", 100_000, random=(-20.272305, 3234.3)),  # D4RL's references
}
CANDIDATES, ELITES, EPISODES = 32, 8, 2
Act = Callable[[NDArray[Any]], NDArray[Any]]


def rolled(env: gymnasium.Env[Any, Any], act: Act, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], bool]:
    """One episode: observations (l + 1, o), actions (l, a), rewards (l,), whether it terminated."""
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards = [observation], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        action = np.clip(act(observation), -1.0, 1.0).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
    return np.stack(observations), np.stack(actions), np.array(rewards), terminated


def make(dataset: str, task: Task) -> None:
    """Improve a collector, and write what its stages did."""
    plain = gymnasium.make(task.environment)
    env = gymnasium.wrappers.RescaleAction(plain, np.float32(-1.0), np.float32(1.0))
    space: Any = plain.action_space
    rng = np.random.default_rng(GENERATOR)
    dim, width = space.shape[0], plain.observation_space.shape[0]

    def uniform(_: NDArray[Any]) -> NDArray[Any]:
        return rng.uniform(-1.0, 1.0, dim)

    if task.random:
        log(dataset, task, env, lambda _: uniform, rng, task.random, "uniformly random actions")
        return
    random = [rolled(env, uniform, i) for i in range(20)]
    seen = np.concatenate([observations for observations, *_ in random])
    mean, std = seen.mean(0), seen.std(0) + 1e-3

    def linear(weights: NDArray[Any], noise: float = 0.0) -> Act:
        matrix = weights.reshape(dim, width + 1)

        def act(observation: NDArray[Any]) -> NDArray[Any]:
            known = np.append(np.clip((observation - mean) / std, -10.0, 10.0), 1.0)
            return matrix @ known + noise * rng.normal(size=dim)

        return act

    centre, spread = np.zeros(dim * (width + 1)), np.full(dim * (width + 1), 0.5)
    stages: dict[int, NDArray[Any]] = {}
    for iteration in range(1, task.iterations + 1):
        drawn = centre + spread * rng.normal(size=(CANDIDATES, len(centre)))
        seeds = rng.integers(2**31, size=EPISODES)
        scores = [np.mean([rolled(env, linear(w), int(s))[2].sum() for s in seeds]) for w in drawn]
        best = drawn[np.argsort(scores)[-ELITES:]]
        centre, spread = best.mean(0), best.std(0) + 0.25 * 0.9**iteration
        if iteration in task.stages:
            stages[iteration] = centre.copy()
    top = float(np.mean([rolled(env, linear(centre), 10_000 + i)[2].sum() for i in range(20)]))
    low = float(np.mean([rewards.sum() for _, _, rewards, _ in random]))

    def drawn_one(number: int) -> Act:
        return linear(stages[task.stages[number % len(task.stages)]], rng.uniform(*task.noise))

    told = "stages of a linear policy under the cross-entropy method, with action noise"
    log(dataset, task, env, drawn_one, rng, (low, top), told)


def log(
    dataset: str, task: Task, env: gymnasium.Env[Any, Any], actor: Callable[[int], Act], rng: np.random.Generator,
    references: tuple[float, float], told: str,
) -> None:
    """Write what the actor of each episode, by its number, does in an environment of actions in [-1, 1]."""
    space: Any = env.unwrapped.action_space
    low, top = references
    episodes, steps, returns = [], 0, []
    while steps < task.steps:
        act = actor(len(episodes))
        observations, actions, rewards, terminated = rolled(env, act, int(rng.integers(2**31)))
        scaled = space.low + (actions + 1.0) / 2.0 * (space.high - space.low)
        episodes.append(episode_buffer(observations, scaled.astype(space.dtype), rewards, terminated))
        steps += len(rewards)
        returns.append(rewards.sum())
    write_minari(
        dataset, episodes, observation_space=env.observation_space, action_space=space, description=told,
        env_spec=env.unwrapped.spec.to_json() if env.unwrapped.spec else None, ref_scores=references,
        metadata={"unseen_generator": GENERATOR},
    )
    print(f"{dataset}: {len(episodes)} episodes, {steps:,} steps; return {np.mean(returns):.0f} in the mean, "
          f"{np.quantile(returns, 0.9):.0f} at 90 %, {max(returns):.0f} at most; 0 is {low:.0f}, 100 is {top:.0f}")


def main() -> None:
    """Make the sets that are not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--datasets", default=",".join(TASKS), help="comma-separated")
    for dataset in parser.parse_args().datasets.split(","):
        if dataset not in local_ids():
            make(dataset, TASKS[dataset])


if __name__ == "__main__":
    main()
