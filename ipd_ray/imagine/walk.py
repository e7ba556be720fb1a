"""Step 5, where planner.kind=actor: where a policy gets to inside the world model, and what its actor would do there.

A policy that imitates an actor errs a little, and the same way each time its gait comes round: after some hundred steps
it is where no plan has been. So it walks there, and learns what the actor would do (DAgger, arXiv:1011.0686).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ipd_ray.config import CorrectConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Floats, Log
from ipd_ray.imagine.actor import Actor, Rollouts
from ipd_ray.imagine.rollout import own_steps
from ipd_ray.layers import block_generator

VERSION = 1
_STREAM = 35


class Player(Protocol):
    """What is asked of a policy that plays inside the world model; see `acting.Policy`."""

    def reset(self, mask: Any = None) -> None: ...

    def act_flat(self, observation: Floats, reward: Any = None) -> Any: ...


def act_of(player: Player, log: Log, s: Tensor, reward: Tensor | None) -> Tensor:
    """Return what a player does in states (N, O): (N, A) in [-1, 1].

    reward: transformed rewards (N,) of the step before, which it is told as raw ones; None at the first.
    """
    earned = None if reward is None else (reward / log.reward_scale).cpu().numpy()
    action = log.transitions.spec.rescale_action(player.act_flat(s.cpu().numpy(), earned))
    return torch.from_numpy(action).to(s.device)


def walk(policy: Player, actor: Actor, rollouts: Rollouts, config: CorrectConfig) -> tuple[Segments, dict[str, float]]:
    """Return episodes of the policy inside the world model as segments, in which what the actor would do is to be
    imitated, and what there is to say of them.

    N segments of up to L steps, from first observations of the log. Each stays inside one elite; every second one has
    the actor's noise. U is infinite where a walk leaves what is known: there it is cut.
    """
    log, device = rollouts.log, rollouts.device
    length = log.transitions.within_limit(config.length)
    index = log.first_steps(rollouts.rows(config.walks))

    policy.reset()
    act, generator = partial(act_of, policy, log), block_generator(rollouts.seed, _STREAM, 0)
    walked = rollouts.walk(act, rollouts.observation[index], length, generator)
    policy.reset()
    lives, left, ended = (torch.stack(x, 1) for x in (walked.lives, walked.left, walked.ended))
    observation, action = torch.stack(walked.observations, 1), torch.stack(walked.actions, 1)
    with torch.no_grad():
        imitated = actor.act(observation[:, :-1])
        value = rollouts.values.v(observation)
    own = own_steps(log, index, length)
    own_value = rollouts.values.v(torch.from_numpy(own.observation).to(device))
    uncertainty = torch.stack(walked.uncertainty, 1).masked_fill(left, torch.inf)
    over = torch.cat([torch.zeros_like(ended[:, :1]), ended.cumsum(1) > 0], 1)
    t = log.transitions
    segments = Segments(
        index=index, episode=t.episode[index], timestep=t.timestep[index], control=np.zeros(len(index), bool),
        observation=observation.cpu().numpy(), action=action.cpu().numpy(), imitated=imitated.cpu().numpy(),
        reward=torch.where(lives, torch.stack(walked.rewards, 1), 0.0).cpu().numpy(), terminal=ended.cpu().numpy(),
        uncertainty=torch.where(lives, uncertainty, 0.0).cpu().numpy(),
        value=torch.where(over, 0.0, value).cpu().numpy(),
        own_reward=own.reward, own_terminal=own.terminal, own_length=own.length, own_value=own_value.cpu().numpy(),
    )  # fmt: skip
    error = (action - imitated).square().mean(-1)[::2][lives[::2]]  # of the undisturbed
    return segments, {
        "imitation_rmse": float(error.mean().sqrt()), "ended": float(ended.any(1).float().mean()),
        "left": float(left.any(1).float().mean()), "length_mean": float(lives.sum(1).float().mean()),
    }
