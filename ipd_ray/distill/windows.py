"""Windows of the log and of spliced plans, in 64 slices that workers share out.

Shapes: T steps of the log, W positions and windows of it, P positions of spliced plans, M windows over them, K
context, B windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ipd_ray.config import SLICES, DistillConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Bools, Floats, Ints, Log
from ipd_ray.layers import block_generator

_WIDE, _NARROW = ("observation", "action"), ("prompt", "weight")
_STREAM = 55


class Rows(Protocol):
    """A column in memory or in a file, of which rows can be read."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows as a tensor."""


@dataclass(frozen=True)
class Prompts:
    """Prompt of every step of the log and of every imagined step."""

    log: Floats
    """(T,)"""
    imagined: Floats
    """(S, L)"""


@dataclass(frozen=True)
class Mixture:
    """How many windows there are to draw, and how many of a batch are over plans."""

    log_windows: int
    """W, over the log."""
    plan_windows: int
    """M"""
    imagined_steps: int = 0
    imagined_ratio: float = 0.0
    """Share of the imitated positions that are imagined."""
    imagined_per_batch: float = 0.0
    """Windows over plans that a batch holds, on average."""


def flatten(
    log: Log,
    segments: Segments,
    accepted: Bools,
    lengths: Ints,
    pass_rate: float,
    prompts: Prompts,
    weight: Floats,
    imagined_weight: Floats,
    config: DistillConfig,
    context: int,
) -> tuple[dict[str, Tensor], Mixture]:
    """Return the columns that windows are cut from, and how they mix.

    Columns are `log.*` (W, ...), `plan.*` (P, ...) and `plan.end` (M,), the positions at which windows over imagined
    steps end, in order. Windows of the log end at every position of it: its steps, and K - 1 positions of weight 0
    behind each episode, so that every step lies in K windows, an episode's last ones too. Every accepted segment is
    spliced onto its real past: the K - 1 steps of the log before its start (fewer at an episode's beginning) are its
    context, timesteps count on, and only imagined steps are imitated. Where a policy walked, the past holds what it
    did, and imitated is what its actor would have done: so it learns to come back from errors that it sees.

    accepted, lengths: (S,) which segments count, and how far. pass_rate: share of all that passed the tests; the
    imagined share is never larger, since where few pass, chance has picked them. weight, imagined_weight: (T,) and
    (S, L) imitation weight of the log's and of imagined steps.
    """
    t = log.transitions
    plans = _splice(log, segments, np.flatnonzero(accepted), lengths, prompts, imagined_weight, context)
    at = np.arange(len(t)) + t.episode * (context - 1)
    log_windows = len(t) + t.episodes * (context - 1)

    def padded(column: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = np.zeros((log_windows, *column.shape[1:]), np.float32)
        rows[at] = column
        return rows

    begin = t.episode_start[:-1] + np.arange(t.episodes) * (context - 1)
    columns = {
        "log.observation": padded(t.observation),
        "log.action": padded(t.action),
        "log.prompt": padded(prompts.log),
        "log.timestep": (np.arange(log_windows) - np.repeat(begin, t.episode_length + context - 1)).astype(np.int32),
        "log.weight": padded(weight),
        "plan.observation": plans.observation,
        "plan.action": plans.action,
        "plan.imitated": plans.imitated,
        "plan.prompt": plans.prompt,
        "plan.timestep": plans.timestep.astype(np.int32),
        "plan.weight": plans.weight,
        "plan.end": plans.ends,
    }
    steps, ends, imagined = len(t), len(plans.ends), int((~plans.is_real).sum())
    mixture = Mixture(log_windows, ends, imagined)
    if ends and config.imagined_ratio > 0:
        cap = config.reuse_cap * imagined
        ratio = min(config.imagined_ratio, pass_rate, cap / (steps + cap))
        real = context * steps / log_windows  # imitated in a window of the log, on average
        odds = ratio * real / max((1.0 - ratio) * imagined / ends, 1e-9)
        per_batch = min(config.batch_size - 1.0, config.batch_size * odds / (1.0 + odds))
        mixture = Mixture(log_windows, ends, imagined, ratio, per_batch)
    return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}, mixture


@dataclass(frozen=True)
class Batch:
    """B windows of K positions, those before an episode's first step not valid, those after its last of weight 0."""

    prompt: Tensor
    observation: Tensor
    action: Tensor
    """(B, K, A) what was done: the past that the policy sees, with its errors where a policy walked."""
    imitated: Tensor
    """(B, K, A) what is to be done: the same, but where a policy walked what its actor would have done."""
    timestep: Tensor
    valid: Tensor
    weight: Tensor
    """(B, K) imitation weight; 0 outside the episode and on the real past of a plan."""
    noise: Tensor | None = None
    """(B,) odd 32-bit number of each drawn window, by which its dropout differs from that of the others."""


class Windows:
    """One worker's slices on the device: their positions, and those before them that windows look back on.

    Slice k holds the positions from floor(k W / 64) up to ceil((k + 1) W / 64), so one on the border lies in two. The
    draw is uniform over them all the same, however few: see `_draw`.
    """

    def __init__(
        self,
        columns: Mapping[str, Rows],
        mixture: Mixture,
        *,
        batch_size: int,
        context: int,
        seed: int,
        device: str,
        rank: int = 0,
        world: int = 1,
    ):
        self.mixture, self._batch_size, self._seed, self._device = mixture, batch_size, seed, device
        self._slices = rank * SLICES // world, (rank + 1) * SLICES // world
        begin, end = self._held(mixture.log_windows)
        log = slice(max(0, begin - context + 1), end)
        first, last = self._held(mixture.plan_windows)
        ends = columns["plan.end"][first:last]
        plan = slice(max(0, int(ends[0]) - context + 1), int(ends[-1]) + 1) if len(ends) else slice(0, 0)
        self._timestep = torch.cat([columns["log.timestep"][log], columns["plan.timestep"][plan]]).to(device)
        self._widths = [columns[f"log.{name}"][:0].shape[1] for name in _WIDE] + [1, 1]
        self._rows = torch.empty((len(self._timestep), sum(self._widths)), device=device)  # side by side: one gather
        behind = log.stop - log.start  # the log's positions come first
        for kind, rows, into in (("log", log, self._rows[:behind]), ("plan", plan, self._rows[behind:])):
            wide, narrow = ([columns[f"{kind}.{n}"][rows].to(device) for n in names] for names in (_WIDE, _NARROW))
            torch.cat([*wide, *(column[:, None] for column in narrow)], 1, out=into)
        self._imitated, self._behind = columns["plan.imitated"][plan].to(device), behind
        self._first, self._first_plan = log.start, first
        self.imagined_ends = ends + (behind - plan.start)
        """Where the windows over plans end, as `gather` takes it."""
        self._back = torch.arange(1 - context, 1, device=device)

    def draw(self, step: int) -> Batch:
        """Return this worker's part of the global batch of update `step`, which is the same whatever their number."""
        generator = block_generator(self._seed, _STREAM, step)
        plans = int(self.mixture.imagined_per_batch + float(torch.rand((), generator=generator)))  # right on average
        noise = torch.randint(-(2**30), 2**30, (self._batch_size,), generator=generator, dtype=torch.int32) * 2 + 1
        of_log, of_plans = noise.split([self._batch_size - plans, plans])
        mine, positions = self._draw(len(of_log), self.mixture.log_windows, generator)
        ends, noise = positions - self._first, of_log[mine]
        if plans:
            mine, windows = self._draw(plans, self.mixture.plan_windows, generator)
            ends = torch.cat([ends, self.imagined_ends[windows - self._first_plan]])
            noise = torch.cat([noise, of_plans[mine]])
        return self.gather(ends, noise)

    def gather(self, ends_B: Tensor, noise_B: Tensor | None = None) -> Batch:
        """Return the windows that end at these of the held positions."""
        ends_B = ends_B.to(self._device)
        timestep = self._timestep[ends_B].long()[:, None] + self._back
        valid = timestep >= 0
        position = torch.where(valid, ends_B[:, None] + self._back, ends_B[:, None])
        rows = self._rows.index_select(0, position.flatten()).unflatten(0, position.shape) * valid[..., None]
        observation, action, prompt, weight = rows.split(self._widths, -1)
        imitated = action
        if len(self._imitated):
            of_plan = position - self._behind
            imitated = torch.where((of_plan >= 0)[..., None], self._imitated[of_plan.clamp(min=0)], action)
        return Batch(
            prompt=prompt[..., 0],
            observation=observation,
            action=action,
            imitated=imitated,
            timestep=torch.where(valid, timestep, 0),
            valid=valid,
            weight=weight[..., 0],
            noise=None if noise_B is None else noise_B.to(self._device),
        )

    def spread(self, count: int) -> Tensor:
        """Return this worker's part of about `count` windows of the log at equal distances, as `gather` takes them."""
        windows = self.mixture.log_windows
        ends = torch.arange(0, windows, max(1, windows // count))
        owner = ends * SLICES // windows
        return ends[(owner >= self._slices[0]) & (owner < self._slices[1])] - self._first

    @property
    def bytes(self) -> int:
        """What the worker holds."""
        return self._rows.nbytes + self._imitated.nbytes + self._timestep.nbytes + self.imagined_ends.nbytes

    def _held(self, population: int) -> tuple[int, int]:
        """Return the first of a population that this worker's slices hold, and the one after the last."""
        first, last = self._slices
        return first * population // SLICES, -(-last * population // SLICES)

    def _draw(self, count: int, population: int, generator: Generator) -> tuple[slice, Tensor]:
        """Return which of `count` global draws fall into this worker's slices, and what they are of the population.

        Draws go to slices by systematic sampling: each slice, and each run of slices, has its share to within one. In
        slice k the draw is floor((k + u) population / 64), u uniform in [0, 1): over all slices exactly uniform.
        """
        offset = int(torch.randint(SLICES, (), generator=generator))
        inside = torch.randint(population, (count,), generator=generator).numpy()
        owner = (np.arange(count) * SLICES + offset) // count
        begin, end = np.searchsorted(owner, self._slices)
        drawn = (owner[begin:end] * population + inside[begin:end]) // SLICES
        return slice(begin, end), torch.from_numpy(drawn)


@dataclass(frozen=True)
class _Spliced:
    observation: Floats
    action: Floats
    imitated: Floats
    prompt: Floats
    timestep: Ints
    weight: Floats
    is_real: Bools
    ends: Ints
    """Positions at which a window over imagined steps may end, in order."""


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
        imitated=pick(t.action[source], segments.imitated[row, k]),
        prompt=pick(prompts.log[source], prompts.imagined[row, k]).astype(np.float32),
        timestep=segments.timestep[row] + place - past[owner],
        weight=np.where(is_real, 0.0, weight[row, k]).astype(np.float32),
        is_real=is_real,
        ends=np.sort(np.concatenate(ends)).astype(np.int64) if ends else np.zeros(0, np.int64),
    )
