"""A log of any length, made on the spot, for all environments: needs numpy alone. Shapes: T steps, O, A."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

OBSERVATION, ACTION = 11, 3
"""Of Hopper."""
EPISODE = 500
"""Steps an episode; D4RL's hopper-medium has 457 on average."""


def made_up(steps: int, observation: int = OBSERVATION, action: int = ACTION, episode: int = EPISODE) -> dict[str, Any]:
    """Random walks that the actions push; every second episode ends in a termination, the others are cut.

    observations, next_observations (T, O), actions (T, A) in [-1, 1], rewards (T,), terminals and timeouts (T,), all of
    whole episodes: T is `steps` rounded up to these. Float32 and bool.
    """
    rng = np.random.default_rng(0)
    episodes = max(2, -(-steps // episode))
    shape = (episodes, episode)
    actions = rng.uniform(-1.0, 1.0, (*shape, action)).astype(np.float32)
    push: NDArray[np.float32] = rng.normal(size=(action, observation)).astype(np.float32)
    walk = rng.standard_normal((episodes, episode + 1, observation), np.float32)
    walk[:, 1:] += actions @ push
    walk *= 0.1
    np.cumsum(walk, 1, out=walk)
    last = np.zeros(shape, bool)
    last[:, -1] = True
    ends = last & (np.arange(episodes) % 2 == 0)[:, None]

    def flat(column: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(column.reshape(episodes * episode, *column.shape[2:]))

    return {
        "observations": flat(walk[:, :-1]), "next_observations": flat(walk[:, 1:]), "actions": flat(actions),
        "rewards": flat(np.tanh(walk[:, 1:, 0])), "terminals": flat(ends), "timeouts": flat(last & ~ends),
    }  # fmt: skip
