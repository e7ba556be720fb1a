"""Logs, segments and models small enough to check by hand, for the tests of the method's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipd_ray.artifacts import TENSORS, Artifact, Workspace, load_tensors
from ipd_ray.config import ValuesConfig, WorldModelConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Log, Spec, Transitions
from ipd_ray.training import set_threads
from ipd_ray.values.fit import fit_values, load_values
from ipd_ray.values.networks import ValueFunctions
from ipd_ray.world_model.ensemble import WorldModel
from ipd_ray.world_model.fit import fit_world_model, load_world_model

Episode = tuple[Any, Any, Any, bool]
"""Observations (T + 1, O), actions (T, A) in [-1, 1], rewards (T,), and whether it terminated."""


def spec_of(observation_dim: int, action_dim: int, **changes: Any) -> Spec:
    """An environment of flat boxes, actions in [-1, 1]."""
    columns: dict[str, Any] = {
        "dataset": "test/by-hand-v0",
        "observation_space": {"type": "Box", "shape": [observation_dim], "dtype": "float32"},
        "action_low": [-1.0] * action_dim, "action_high": [1.0] * action_dim, "action_shape": [action_dim],
        "action_dtype": "float32",
    }
    return Spec(**{**columns, **changes})


def log_of(
    episodes: Sequence[Episode], *, discount: float = 0.5, reward_scale: float = 1.0, holdout: Sequence[int] = ()
) -> Log:
    """A log of these episodes."""
    observations = [np.asarray(s, np.float32) for s, *_ in episodes]
    actions = [np.asarray(a, np.float32) for _, a, *_ in episodes]
    lengths = [len(a) for a in actions]
    terminal = np.zeros(sum(lengths), bool)
    terminal[np.cumsum(lengths) - 1] = [ended for *_, ended in episodes]
    transitions = Transitions(
        observation=np.concatenate([s[:-1] for s in observations]), action=np.concatenate(actions),
        reward=np.concatenate([np.asarray(r, np.float32) for _, _, r, _ in episodes]),
        next_observation=np.concatenate([s[1:] for s in observations]), terminal=terminal,
        episode_start=np.concatenate([[0], np.cumsum(lengths)]),
        spec=spec_of(observations[0].shape[1], actions[0].shape[1]),
    )
    held = np.zeros(len(episodes), bool)
    held[list(holdout)] = True
    return Log(transitions, discount, reward_scale, held)


def counting_log(lengths: Sequence[int], **options: Any) -> Log:
    """A log in which step t of the whole log has observation t, action t / 100 and reward t."""
    episodes: list[Episode] = []
    first = 0
    for length in lengths:
        steps = np.arange(first, first + length, dtype=np.float32)
        observation = np.append(steps, first + length - 0.5)[:, None]
        episodes.append((observation, steps[:, None] / 100.0, steps, False))
        first += length
    return log_of(episodes, **options)


def segments_of(index: Sequence[int], length: int, log: Log | None = None, **columns: Any) -> Segments:
    """Segments of `length` steps whose columns are zero where they are not given; the log says what it knows."""
    S = len(index)
    at = np.asarray(index, np.int64)
    width, actions = (log.transitions.observation_dim, log.transitions.spec.action_dim) if log else (1, 1)
    plain: dict[str, Any] = {
        "index": at, "episode": log.transitions.episode[at] if log else np.zeros(S, np.int64),
        "timestep": log.transitions.timestep[at] if log else at, "control": np.zeros(S, bool),
        "observation": np.zeros((S, length + 1, width), np.float32),
        "action": np.zeros((S, length, actions), np.float32),
        "reward": np.zeros((S, length), np.float32), "terminal": np.zeros((S, length), bool),
        "uncertainty": np.zeros((S, length), np.float32), "value": np.zeros((S, length + 1), np.float32),
        "own_reward": np.zeros((S, length), np.float32), "own_terminal": np.zeros((S, length), bool),
        "own_length": np.full(S, length), "own_value": np.zeros((S, length + 1), np.float32),
    }
    plain["imitated"] = columns.get("action", plain["action"])
    for name, values in columns.items():
        plain[name] = np.asarray(values, plain[name].dtype)
        assert plain[name].shape == (S, *np.shape(values)[1:]), name
    plain["imitated"] = np.asarray(plain["imitated"], np.float32)
    return Segments(**{f.name: plain[f.name] for f in fields(Segments)})


@dataclass
class Line:
    """A point on a line that moves by its action: s' = s + a; every elite knows it."""

    reward: Callable[[Tensor, Tensor], Tensor]
    """(s, s') to reward."""
    ended: Callable[[Tensor], Tensor] = torch.zeros_like
    """s' to the probability of having ended."""
    elites: int = 2

    def step(self, observation_EBO: Tensor, action_EBA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        following = observation_EBO + action_EBA
        s, s2 = observation_EBO[..., 0], following[..., 0]
        return following, self.reward(s, s2), self.ended(s2)

    def step_together(self, observation_BO: Tensor, action_BA: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        following, reward, ended = self.step(observation_BO, action_BA)
        zero = torch.zeros(self.elites, len(observation_BO), 2)
        return following, reward, ended, (zero, zero)


@dataclass
class KnownValues:
    """Values given as functions of a one-dimensional state and action."""

    value: Callable[[Tensor], Tensor] = torch.zeros_like
    action_value: Callable[[Tensor, Tensor], Tensor] = lambda s, a: torch.zeros_like(s)
    policy: Callable[[Tensor], Tensor] = torch.zeros_like

    def v(self, observation: Tensor) -> Tensor:
        return self.value(observation[..., 0])

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        q = self.action_value(observation[..., 0], action[..., 0])
        return torch.stack([q, q + 1.0])

    def act(self, observation: Tensor) -> Tensor:
        return self.policy(observation)


def pendulum_log(episodes: int = 30, length: int = 100, seed: int = 0) -> Log:
    """Pendulum (cos, sin, speed), swung by controllers from clumsy to fair; time-outs only."""
    rng = np.random.default_rng(seed)
    angle, speed = rng.uniform(-np.pi, np.pi, episodes), rng.uniform(-1.0, 1.0, episodes)
    skill = np.linspace(0.0, 1.0, episodes)
    observations, actions, rewards = [], [], []
    for t in range(length + 1):
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        observations.append(np.stack([np.cos(angle), np.sin(angle), speed], 1))
        if t == length:
            break
        upright = -(4.0 * wrapped + 1.2 * speed)
        swing = 0.2 * (15.0 - 0.5 * speed**2 - 15.0 * np.cos(angle)) * speed
        wanted = skill * np.where(np.abs(wrapped) < 0.5, upright, swing)
        torque = np.clip(wanted + rng.normal(0.0, 0.8, episodes), -2.0, 2.0)
        rewards.append(-(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2))
        speed = np.clip(speed + 0.05 * (15.0 * np.sin(angle) + 3.0 * torque), -8.0, 8.0)
        angle = angle + 0.05 * speed
        actions.append(torque[:, None] / 2.0)
    s, a, r = np.stack(observations, 1), np.stack(actions, 1), np.stack(rewards, 1)
    every = [(s[i], a[i], r[i], False) for i in range(episodes)]
    returns = r.sum(1)
    scale = 1000.0 / float(returns.max() - returns.min())
    return log_of(every, discount=0.97, reward_scale=scale, holdout=range(2, episodes, 5))


@dataclass(frozen=True)
class Learned:
    """Step 1 and 2 on a log."""

    log: Log
    values: ValueFunctions
    value_std: float
    world_model: WorldModel
    holdout_uncertainty: np.ndarray
    diagnostics: dict[str, Any]
    """Of the world model."""


@lru_cache(maxsize=1)
def learned_pendulum() -> Learned:
    """Values and a world model of the pendulum, learned once a session in some seconds."""
    set_threads(1)
    log = pendulum_log()
    with TemporaryDirectory() as folder:
        v, m = Path(folder) / "values", Path(folder) / "world_model"
        config = ValuesConfig(updates=1500, width=32, batch_size=128, learning_rate=2e-3, polyak=0.02)
        fit_values(log, config, seed=0, device="cpu", workspace=Workspace(v))
        model = WorldModelConfig(
            members=3, elites=3, width=48, layers=2, max_updates=1200, eval_every=400, batch_size=128
        )
        fit_world_model(log, model, seed=0, device="cpu", workspace=Workspace(m))
        values, world_model = (described(f) for f in (v, m))
        tensors = tensors_of(world_model)
        return Learned(
            log, load_values(tensors_of(values), content(values), "cpu"),
            content(values)["diagnostics"]["v_std"],
            load_world_model(tensors, content(world_model), "cpu"), tensors["holdout_uncertainty"].numpy(),
            content(world_model)["diagnostics"],
        )


def described(folder: Path) -> Artifact:
    """What a step left in its work folder, not yet committed."""
    return Artifact(folder)


def tensors_of(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of a folder that is not yet committed, so has no digest."""
    return load_tensors(artifact.path / TENSORS)[0]


def content(artifact: Artifact) -> dict[str, Any]:
    """result.json of a folder that is not yet committed, so has no schema."""
    import json

    return dict(json.loads((artifact.path / "result.json").read_text()))
