"""Step 6: which policy is kept, by how candidates do inside the world model. Shapes: N episodes, E elites, O, A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ipd_ray.config import ChooseConfig
from ipd_ray.data.transitions import Floats, Log
from ipd_ray.evaluate.acting import Policy
from ipd_ray.layers import block_generator

VERSION = 1
_STREAM = 77
_RANGE = 0.05
"""Share of the log's range by which an imagined state may lie outside it; it is held there."""


class Dynamics(Protocol):
    """What is asked of a world model."""

    @property
    def elites(self) -> int: ...

    def step(self, observation_EBO: Tensor, action_EBA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next observation, transformed reward and termination probability; elite e for row group e."""


def first_observations(log: Log, episodes: int) -> Floats:
    """(N, O) first observations of the log's episodes, evenly spaced and repeated where there are fewer."""
    first = log.transitions.episode_start[:-1]
    return log.transitions.observation[first[np.arange(episodes) * len(first) // episodes]]


@torch.no_grad()
def imagined_returns(
    policy: Policy,
    log: Log,
    dynamics: Dynamics,
    config: ChooseConfig,
    *,
    seed: int,
    device: str,
    progress: Callable[[int], None] = lambda step: None,
) -> tuple[Floats, float]:
    """Undiscounted raw return (N,) of the policy's episodes inside the world model, and the share that did not end.

    Off-policy evaluation by the model. Each step of each episode is answered by an elite drawn for it (TS1, Chua et al.
    2018), and each action carries noise, the same for every policy: one that stays up only undisturbed, in a model of
    its own errors, falls. N is `config.episodes`, rounded up to a multiple of the elites.
    """
    t, E = log.transitions, dynamics.elites
    N = -(-config.episodes // E) * E
    s = torch.from_numpy(first_observations(log, N)).to(device)
    low, high = t.observation.min(0), t.observation.max(0)
    slack = _RANGE * (high - low)
    least, most = (torch.from_numpy(x).to(device) for x in (low - slack, high + slack))
    alive = torch.ones(N, dtype=torch.bool, device=device)
    total = torch.zeros(N, device=device)
    policy.reset()
    for k in range(min(config.length, int(t.episode_length.max()))):
        generator = block_generator(seed, _STREAM, k)
        action = torch.from_numpy(t.spec.rescale_action(policy.act(s.cpu().numpy()))).to(device)
        noise = torch.randn(action.shape, generator=generator).to(device)
        action = (action + config.noise_std * noise).clamp(-1.0, 1.0)
        order = torch.randperm(N, generator=generator).to(device)
        back = torch.argsort(order)
        following, reward, ended = dynamics.step(
            s[order].reshape(E, N // E, -1), action[order].reshape(E, N // E, -1)
        )
        total += torch.where(alive, reward.reshape(N)[back], 0.0)
        alive &= ended.reshape(N)[back] <= 0.5
        following = torch.minimum(torch.maximum(following.reshape(N, -1)[back], least), most)
        s = torch.where(alive[:, None], following, s)
        progress(k + 1)
        if not alive.any():
            break
    policy.reset()
    return (total / log.reward_scale).cpu().numpy(), float(alive.float().mean())
