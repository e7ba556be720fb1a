"""Step 4: one shard of imagined segments. Shapes: S segments, L steps, O observation, A action."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipd_ray.config import ImagineConfig, PlannerConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Bools, Floats, Ints, Log
from ipd_ray.imagine.actor import Actor
from ipd_ray.imagine.planner import ImaginationDynamics, Values, plan
from ipd_ray.layers import block_generator
from ipd_ray.world_model.uncertainty import ensemble_uncertainty

_STREAM = 44


@dataclass(frozen=True)
class ShardSpec:
    """What one task imagines: identity alone, no data."""

    shard: int
    index: Ints
    """(S,) steps of the log to start from."""
    control: Bools
    """(S,) of the control group."""


def shard_specs(index: Ints, control: Bools, shard_size: int) -> list[ShardSpec]:
    """Cut the starts into shards of `shard_size`; the last may be smaller."""
    cuts = range(0, len(index), shard_size)
    return [ShardSpec(i, index[c : c + shard_size], control[c : c + shard_size]) for i, c in enumerate(cuts)]


def segment_length(log: Log, imagine: ImagineConfig) -> int:
    """L: no longer than an episode may last."""
    return log.transitions.within_limit(imagine.length)


@torch.no_grad()
def imagine_shard(
    spec: ShardSpec,
    log: Log,
    dynamics: ImaginationDynamics,
    values: Values,
    planner: PlannerConfig,
    imagine: ImagineConfig,
    *,
    seed: int,
    device: str,
    actor: Actor | None = None,
    replay: bool = False,
) -> Segments:
    """Roll the planner out for L steps from every start of the shard (all rows together; ended rows are masked).

    Noise is keyed by (seed, shard, step). actor: acts instead of a plan, where planner.kind=actor. replay: take the
    log's own actions instead of planned ones (the test of acceptance: hardly any such segment may pass).
    """
    t = log.transitions
    L = segment_length(log, imagine)
    s = torch.from_numpy(t.observation[spec.index]).to(device)
    observations, rewards, actions, ended_at, uncertainty = [s], [], [], [], []
    unit = torch.from_numpy(log.action_unit).to(device)
    value = [values.v(s)]
    alive = torch.ones(len(s), dtype=torch.bool, device=device)
    for k in range(L):
        generator = block_generator(seed, _STREAM, spec.shard * 10_000 + k)
        if replay:
            at = np.minimum(spec.index + k, log.episode_end[spec.index])
            action = torch.from_numpy(t.action[at]).to(device)
        elif actor is not None:
            action = actor.act(s)
        else:
            found = plan(s, dynamics, values, planner, discount=log.discount, generator=generator, action_unit=unit)
            action = found.action
        following, reward, ended, gaussians = dynamics.step_together(s, action)
        ends = alive & (ended > 0.5)
        s = torch.where(alive[:, None], following, s)
        observations.append(s)
        actions.append(action)
        rewards.append(torch.where(alive, reward, 0.0))
        ended_at.append(ends)
        uncertainty.append(torch.where(alive, ensemble_uncertainty(*gaussians, imagine.uncertainty), 0.0))
        alive = alive & ~ends
        value.append(torch.where(alive, values.v(s), 0.0))
    own = own_steps(log, spec.index, L)
    own_value = values.v(torch.from_numpy(own.observation).to(device))

    def column(parts: list[Tensor]) -> np.ndarray:
        return torch.stack(parts, 1).cpu().numpy()

    taken = column(actions)
    return Segments(
        index=spec.index,
        episode=t.episode[spec.index],
        timestep=t.timestep[spec.index],
        control=spec.control,
        observation=column(observations),
        action=taken,
        imitated=taken,
        reward=column(rewards),
        terminal=column(ended_at),
        uncertainty=column(uncertainty),
        value=column(value),
        own_reward=own.reward,
        own_terminal=own.terminal,
        own_length=own.length,
        own_value=own_value.cpu().numpy(),
    )


@dataclass(frozen=True)
class OwnSteps:
    """The log's own continuation of S starts."""

    observation: Floats
    """(S, L + 1, O); the last one repeated where the episode ended."""
    reward: Floats
    """(S, L), transformed; 0 after the end."""
    terminal: Bools
    """(S, L)"""
    length: Ints
    """(S,) steps until the episode's end, at most L."""


def own_steps(log: Log, index: Ints, length: int) -> OwnSteps:
    """Return what the log did next from each start."""
    t = log.transitions
    end = log.episode_end[index]
    own_length = np.minimum(end - index + 1, length)
    at = np.minimum(index[:, None] + np.arange(length), end[:, None])
    inside = np.arange(length) < own_length[:, None]
    observation = np.concatenate([t.observation[index][:, None], t.next_observation[at]], 1)
    return OwnSteps(
        observation, np.where(inside, log.reward[at], 0.0).astype(np.float32), t.terminal[at] & inside, own_length
    )
