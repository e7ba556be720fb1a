"""Step 3: the states to plan from: where V promises more than the episode brought, and where a good policy is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipd_ray.config import SelectConfig
from ipd_ray.data.transitions import Bools, Floats, Ints, Log


@dataclass(frozen=True)
class Starts:
    """S start states, in order of step index."""

    index: Ints
    """(S,) steps of the log."""
    control: Bools
    """(S,) drawn uniformly, not by regret or V."""


def select_starts(log: Log, value: Floats, returns: Floats, config: SelectConfig, *, length: int, seed: int) -> Starts:
    """Draw start states: random parts of the steps of most regret and of highest V, and a uniform control group.

    value, returns: V(s_t) and bootstrapped G_t, (T,). In an episode, at most one start in any `length`
    consecutive steps, and at most `episode_cap` of all.
    """
    regret = value - returns
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    steps = len(log.transitions)
    share = max(1, int(config.regret_share * steps))
    top, frontier = (np.argsort(-by, kind="stable")[:share] for by in (regret, value))
    cap = max(1, int(config.episode_cap * config.starts))
    control_count, frontier_count = (round(s * config.starts) for s in (config.control_share, config.frontier_share))
    taken = np.zeros(steps, bool)
    per_episode = np.zeros(log.transitions.episodes, np.int64)
    episode, begin = log.transitions.episode, log.transitions.episode_start

    def draw(candidates: Ints, wanted: int) -> list[int]:
        chosen: list[int] = []
        for step in candidates[rng.permutation(len(candidates))]:
            if len(chosen) >= wanted:  # both shares rounded up can leave the flagged ones less than none
                break
            e = episode[step]
            near = slice(max(begin[e], step - length + 1), min(begin[e + 1], step + length))
            if per_episode[e] >= cap or taken[near].any():
                continue
            taken[step] = True
            per_episode[e] += 1
            chosen.append(int(step))
        return chosen

    control = draw(np.arange(steps), control_count)
    high = draw(frontier, frontier_count)
    flagged = draw(top, config.starts - control_count - frontier_count)
    index = np.array(control + high + flagged, np.int64)
    is_control = np.arange(len(index)) < len(control)
    order = np.argsort(index)
    return Starts(index[order], is_control[order])
