"""Step 6: which policy is kept, by how candidates do inside the world model. Shapes: N episodes, E elites, O, A."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ipd_ray.config import ChooseConfig
from ipd_ray.data.transitions import Floats, Log
from ipd_ray.imagine.accept import widened
from ipd_ray.imagine.planner import ImaginationDynamics
from ipd_ray.imagine.walk import Player, act_of
from ipd_ray.layers import block_generator
from ipd_ray.world_model.uncertainty import Trust, ensemble_uncertainty

VERSION = 9
_STREAM = 77


def behind_the_best(returns_CN: Floats) -> tuple[Floats, Floats]:
    """(C,) how much less candidates earn than the best of them, and its standard error, by pairs of episodes.

    returns_CN: of C candidates in N episodes that begin alike, with the same noise.
    """
    lack = returns_CN[returns_CN.mean(1).argmax()] - returns_CN
    return lack.mean(1), lack.std(1) / np.sqrt(lack.shape[1])


def first_as_good(returns_CN: Floats, tolerance: float) -> int:
    """Index of the first candidate within `tolerance` standard errors of the best (Breiman's rule): what roll-outs
    cannot tell apart, their order decides."""
    lack, error = behind_the_best(returns_CN)
    return next(i for i, (x, e) in enumerate(zip(lack, error, strict=True)) if x <= tolerance * e)


@torch.no_grad()
def imagined_returns(
    policy: Player,
    log: Log,
    dynamics: ImaginationDynamics,
    config: ChooseConfig,
    trust: Trust,
    *,
    seed: int,
    device: str,
) -> tuple[Floats, float, float]:
    """Undiscounted raw return (N,) of the policy's episodes inside the world model, the share that ended, and the share
    that was halted.

    Off-policy evaluation by the model. Each step of each episode is answered by an elite drawn for it (TS1, Chua et al.
    2018), and each action carries noise, the same for every policy. An episode is halted at a step whose U is over
    the trusted (MOReL, arXiv:2005.05951): what lies beyond is the model's invention, which policies that were made
    inside the model have learned to please; every step from there on earns the log's poorest reward (1 % quantile),
    and never more than an end would: where all that is logged is paid, leaving is not. Noise is in units of
    `Log.action_unit`. A state beyond the trusted range is held at its bound. N is `config.episodes`, rounded up to a
    multiple of the elites.
    """
    t, E = log.transitions, dynamics.elites
    N = -(-config.episodes // E) * E
    s = torch.from_numpy(t.observation[log.first_steps(N)]).to(device)
    least, most = (torch.from_numpy(x).to(device) for x in widened(*log.step_ranges[:2], trust.range_margin))
    alive = torch.ones(N, dtype=torch.bool, device=device)
    halted = torch.zeros_like(alive)
    total = torch.zeros(N, device=device)
    poorest = min(0.0, float(np.quantile(log.reward, 0.01)))
    length = t.within_limit(config.length)
    noise_std = config.noise_std * torch.from_numpy(log.action_unit).to(device)
    reward: Tensor | None = None
    policy.reset()
    for k in range(length):
        generator = block_generator(seed, _STREAM, k)
        action = act_of(policy, log, s, reward)
        noise = torch.randn(action.shape, generator=generator).to(device)
        action = (action + noise_std * noise).clamp(-1.0, 1.0)
        gaussians = dynamics.step_together(s, action)[3]
        halts = alive & (ensemble_uncertainty(*gaussians, trust.uncertainty) > trust.threshold)
        total += torch.where(halts, poorest * (length - k), 0.0)
        halted |= halts
        alive &= ~halts
        order = torch.randperm(N, generator=generator).to(device)
        back = torch.argsort(order)
        following, reward, ended = dynamics.step(
            s[order].reshape(E, N // E, -1), action[order].reshape(E, N // E, -1)
        )
        reward = reward.reshape(N)[back]
        total += torch.where(alive, reward, 0.0)
        alive &= ended.reshape(N)[back] <= 0.5
        following = torch.minimum(torch.maximum(following.reshape(N, -1)[back], least), most)
        s = torch.where(alive[:, None], following, s)
        if not alive.any():
            break
    policy.reset()
    ended = ~alive & ~halted
    return (total / log.reward_scale).cpu().numpy(), float(ended.float().mean()), float(halted.float().mean())
