"""Windows of the log and of spliced plans, gathered on the device. Shapes: F flat positions, K context, B windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ipd_ray.config import DistillConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Bools, Floats, Ints, Log
from ipd_ray.layers import block_generator

_STREAM = 55


@dataclass(frozen=True)
class Prompts:
    """Prompt of every step of the log and of every imagined step."""

    log: Floats
    """(T,)"""
    imagined: Floats
    """(S, L)"""


@dataclass(frozen=True)
class Batch:
    """B windows of K positions, left-padded."""

    prompt: Tensor
    observation: Tensor
    action: Tensor
    timestep: Tensor
    valid: Tensor
    weight: Tensor
    """(B, K) imitation weight; 0 on padding and on the real past of a plan."""


class Windows:
    """All positions as flat columns on the device, and where windows may end.

    Every accepted segment is spliced onto its real past: the K - 1 steps of the log before its start (fewer at an
    episode's beginning) are its context, timesteps count on, and only imagined steps are imitated.
    """

    def __init__(
        self,
        log: Log,
        segments: Segments,
        accepted: Bools,
        lengths: Ints,
        prompts: Prompts,
        weight: Floats,
        imagined_weight: Floats,
        config: DistillConfig,
        *,
        context: int,
        seed: int,
        device: str,
    ):
        """accepted, lengths: (S,) verdict on the segments. weight, imagined_weight: (T,) and (S, L) imitation weight of
        the log's and of imagined steps."""
        t = log.transitions
        self.context, self._seed = context, seed
        spliced = _splice(log, segments, np.flatnonzero(accepted), lengths, prompts, imagined_weight, context)
        columns = {
            "observation": np.concatenate([t.observation, spliced.observation]),
            "action": np.concatenate([t.action, spliced.action]),
            "prompt": np.concatenate([prompts.log, spliced.prompt]),
            "timestep": np.concatenate([t.timestep, spliced.timestep]),
            "weight": np.concatenate([weight, spliced.weight]),
            "begin": np.concatenate([t.episode_start[t.episode], len(t) + spliced.begin]),
        }
        self._columns = {name: torch.from_numpy(np.ascontiguousarray(c)).to(device) for name, c in columns.items()}
        self.real_ends = torch.arange(len(t), device=device)
        self.imagined_ends = torch.from_numpy(len(t) + spliced.ends).to(device)
        self.imagined_steps = int((~spliced.is_real).sum())
        self.imagined_per_batch = 0.0
        """Windows over plans that a batch holds, on average."""
        self.imagined_ratio = 0.0
        if len(self.imagined_ends) and config.imagined_ratio > 0:
            cap = config.reuse_cap * self.imagined_steps
            self.imagined_ratio = min(config.imagined_ratio, float(accepted.mean()), cap / (len(t) + cap))
            real = float(np.minimum(t.timestep + 1, context).mean())
            imagined = self.imagined_steps / len(self.imagined_ends)
            odds = self.imagined_ratio * real / max((1.0 - self.imagined_ratio) * imagined, 1e-9)
            self.imagined_per_batch = min(config.batch_size - 1.0, config.batch_size * odds / (1.0 + odds))
        self._batch_size = config.batch_size

    def draw(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return worker `rank`'s part of the global batch of update `step`, which is the same whatever `world`."""
        generator = block_generator(self._seed, _STREAM, step)
        plans = int(self.imagined_per_batch + float(torch.rand((), generator=generator)))  # right on average
        real = torch.randint(len(self.real_ends), (self._batch_size - plans,), generator=generator)
        ends = self.real_ends[real.to(self.real_ends.device)]
        if plans:
            imagined = torch.randint(len(self.imagined_ends), (plans,), generator=generator)
            ends = torch.cat([ends, self.imagined_ends[imagined.to(ends.device)]])
        return self.gather(ends[rank::world])

    def gather(self, ends_B: Tensor) -> Batch:
        """Return the windows that end at these flat positions."""
        back = torch.arange(1 - self.context, 1, device=ends_B.device)
        position = ends_B[:, None] + back
        valid = position >= self._columns["begin"][ends_B][:, None]
        position = torch.where(valid, position, ends_B[:, None])
        c = self._columns
        zero = valid[..., None]
        return Batch(
            prompt=torch.where(valid, c["prompt"][position], 0.0),
            observation=torch.where(zero, c["observation"][position], 0.0),
            action=torch.where(zero, c["action"][position], 0.0),
            timestep=torch.where(valid, c["timestep"][position], 0),
            valid=valid,
            weight=torch.where(valid, c["weight"][position], 0.0),
        )


@dataclass(frozen=True)
class _Spliced:
    observation: Floats
    action: Floats
    prompt: Floats
    timestep: Ints
    weight: Floats
    is_real: Bools
    begin: Ints
    """Flat position at which each position's sequence begins."""
    ends: Ints
    """Positions at which a window over imagined steps may end."""


def _splice(
    log: Log, segments: Segments, rows: Ints, lengths: Ints, prompts: Prompts, weight: Floats, context: int
) -> _Spliced:
    t = log.transitions
    past = np.minimum(context - 1, segments.timestep[rows])
    imagined = lengths[rows]
    total = past + imagined
    offset = np.concatenate([[0], np.cumsum(total)]).astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), total)
    place = np.arange(int(offset[-1])) - offset[owner]
    is_real = place < past[owner]
    row, k = rows[owner], np.maximum(place - past[owner], 0)
    source = segments.index[row] + np.minimum(place - past[owner], 0)

    def pick(real: NDArray, plan: NDArray) -> NDArray:
        chosen = is_real if real.ndim == 1 else is_real[:, None]
        return np.where(chosen, real, plan)

    # Windows end at a segment's last step and every `context` steps before it: each imagined step lies in one window.
    ends = [np.arange(offset[i + 1] - 1, offset[i] + past[i] - 1, -context) for i in range(len(rows))]
    return _Spliced(
        observation=pick(t.observation[source], segments.observation[row, k]),
        action=pick(t.action[source], segments.action[row, k]),
        prompt=pick(prompts.log[source], prompts.imagined[row, k]).astype(np.float32),
        timestep=segments.timestep[row] + place - past[owner],
        weight=np.where(is_real, 0.0, weight[row, k]).astype(np.float32),
        is_real=is_real,
        begin=offset[owner],
        ends=np.concatenate(ends).astype(np.int64) if ends else np.zeros(0, np.int64),
    )
