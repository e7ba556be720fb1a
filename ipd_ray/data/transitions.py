"""The log as columns: one frozen type that every step reads. Shapes: T steps, E episodes, O observation, A action.

Observations are raw (flattened, float32); actions are rescaled to [-1, 1]; rewards are raw. `terminal` is true
termination only: it stops the bootstrap. An episode that ends any other way is truncated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipd_ray.config import DataConfig
from ipd_ray.errors import UserError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ACTION_LIMIT = 1.0 - 1e-6
"""Dataset actions are clipped to +- this, so that no log-probability is infinite."""


_ABOUT, _MANY = 0.99, 0.1
"""An episode is about as long as the longest from this share of its steps on, and many are where a tenth is."""


@dataclass(frozen=True)
class Spec:
    """What a log says of the environment: enough to act in it, with nothing else at hand."""

    dataset: str
    """Name of the dataset, such as bench/hopper/mixed-v0."""
    observation_space: dict[str, Any]
    """JSON form of the Gymnasium space: {"type": "Box", "shape", "dtype"}, or Dict with "spaces" by name."""
    action_low: list[float]
    """Bounds of the flattened action, in the environment's units."""
    action_high: list[float]
    action_shape: list[int]
    action_dtype: str
    env_spec: str | None = None
    """JSON of the environment's Gymnasium spec, where the dataset has one."""
    ref_min_score: float | None = None
    """Raw return that counts as 0."""
    ref_max_score: float | None = None
    """Raw return that counts as 100."""

    @property
    def action_dim(self) -> int:
        return len(self.action_low)

    @property
    def acting(self) -> dict[str, Any]:
        """What of it scores depend on, but nothing that is learned."""
        names = ("env_spec", "ref_min_score", "ref_max_score", "action_shape", "action_dtype")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        return cls(**json.loads(text))

    def flatten_observation(self, observation: Any) -> Floats:
        """Return observations as float32 (..., O): Dict entries in sorted key order, each raveled, concatenated.

        observation: an array (..., *shape), or for a Dict space a mapping of name to such arrays.
        """
        return _flatten(observation, self.observation_space)

    def rescale_action(self, action: Any) -> Floats:
        """Map actions (..., *action_shape) from the environment's bounds to [-1, 1], clipped to +-ACTION_LIMIT."""
        array = np.asarray(action, np.float64)
        lead = array.shape[: array.ndim - len(self.action_shape)]
        flat = array.reshape(*lead, self.action_dim)
        low, high = np.asarray(self.action_low), np.asarray(self.action_high)
        scaled = flat - low  # an array of its own: the rest of 2 (a - low) / (high - low) - 1 is in place
        scaled *= 2.0
        scaled /= high - low
        scaled -= 1.0
        return np.clip(scaled, -ACTION_LIMIT, ACTION_LIMIT, out=scaled).astype(np.float32)

    def unscale_action(self, action: Floats) -> NDArray[Any]:
        """Map actions (..., A) in [-1, 1] to the environment's units, shape, dtype and bounds."""
        low, high = np.asarray(self.action_low), np.asarray(self.action_high)
        raw = low + (np.asarray(action, np.float64) + 1.0) / 2.0 * (high - low)
        raw = np.clip(raw, low, high)
        if np.issubdtype(np.dtype(self.action_dtype), np.integer):
            raw = np.round(raw)
        return raw.reshape(*raw.shape[:-1], *self.action_shape).astype(self.action_dtype)

    def normalise(self, score: float) -> float | None:
        """Return the score as D4RL does, 100 * (raw - min) / (max - min), or None without reference scores."""
        if self.ref_min_score is None or self.ref_max_score is None or self.ref_max_score == self.ref_min_score:
            return None
        return 100.0 * (score - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)


def _flatten(observation: Any, space: Mapping[str, Any]) -> Floats:
    if space["type"] == "Dict":
        parts = [_flatten(observation[name], space["spaces"][name]) for name in sorted(space["spaces"])]
        return np.concatenate(parts, axis=-1)
    array = np.asarray(observation, np.float32)
    shape = tuple(space["shape"])
    lead = array.ndim - len(shape)
    if lead < 0 or array.shape[lead:] != shape:
        raise ValueError(f"observation of shape {array.shape} does not end in the space's shape {shape}")
    return array.reshape(*array.shape[:lead], int(np.prod(shape, dtype=np.int64)))


@dataclass(frozen=True)
class Transitions:
    """T transitions of E whole episodes, in order."""

    observation: Floats
    """(T, O), raw units."""
    action: Floats
    """(T, A), in [-1, 1]."""
    reward: Floats
    """(T,), raw."""
    next_observation: Floats
    """(T, O), built per episode: the last one is what followed the last action."""
    terminal: Bools
    """(T,), true only where the environment ended the episode."""
    episode_start: Ints
    """(E + 1,), first step of each episode, and T."""
    spec: Spec

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def episodes(self) -> int:
        return len(self.episode_start) - 1

    @property
    def observation_dim(self) -> int:
        return int(self.observation.shape[1])

    @cached_property
    def episode_length(self) -> Ints:
        """(E,) steps."""
        return np.diff(self.episode_start)

    @cached_property
    def original(self) -> Ints:
        """(E,) the first episode of the same observations, actions and rewards; its own index where it is no copy."""
        seen: dict[bytes, int] = {}
        columns = self.observation, self.action, self.reward
        cuts = zip(self.episode_start[:-1], self.episode_start[1:], strict=True)
        parts = (b"".join(column[a:b].tobytes() for column in columns) for a, b in cuts)
        return np.array([seen.setdefault(hashlib.sha256(part).digest(), i) for i, part in enumerate(parts)])

    @cached_property
    def longest_cut(self) -> int | None:
        """Steps of the longest episode, where it was cut; None where it ended itself."""
        longest = self.episode_length == self.episode_length.max()
        return int(self.episode_length.max()) if (longest & self._cut).any() else None

    @property
    def time_limit(self) -> int | None:
        """Steps after which episodes are cut, as far as the log shows: the longest one's, where of those that were cut
        a tenth are about as long. Others are cut for a reason of their own, such as a goal that is reached."""
        longest = self.longest_cut
        if longest is None or (self.episode_length[self._cut] >= _ABOUT * longest).mean() < _MANY:
            return None
        return longest

    @cached_property
    def _cut(self) -> Bools:
        return ~self.terminal[self.episode_start[1:] - 1]

    def within_limit(self, steps: int) -> int:
        """Return `steps`, or those of the longest episode where it was cut after fewer."""
        return steps if self.longest_cut is None else min(steps, self.longest_cut)

    @cached_property
    def episode(self) -> Ints:
        """(T,) index of each step's episode."""
        return np.repeat(np.arange(self.episodes), self.episode_length)

    @cached_property
    def timestep(self) -> Ints:
        """(T,) steps since the episode began."""
        return np.arange(len(self)) - self.episode_start[self.episode]

    @cached_property
    def episode_return(self) -> NDArray[np.float64]:
        """(E,) raw, undiscounted."""
        return np.add.reduceat(self.reward.astype(np.float64), self.episode_start[:-1])

    def discounted_sums(self, values: NDArray[Any], factor: float) -> NDArray[np.float64]:
        """Return sum_k factor^k x_{t+k} to each step's episode's end, (T,), of values x (T,)."""
        last, length = self.episode_start[1:] - 1, self.episode_length
        sums, running = np.empty(len(self)), np.zeros(self.episodes)
        for back in range(int(length.max())):  # all episodes step back together
            alive = length > back
            index = last[alive] - back
            running[alive] = values[index] + factor * running[alive]
            sums[index] = running[alive]
        return sums

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of every column and of the spaces: the log's identity, whatever it is called."""
        spec = self.spec
        spaces = {"observation": spec.observation_space, "low": spec.action_low, "high": spec.action_high}
        return digest(self.columns(), extra=json.dumps(spaces, sort_keys=True))

    def with_spec(self, spec: Spec) -> Transitions:
        """Return the same columns and spaces with another spec: an environment, scores or a name that came later."""
        known = replace(self, spec=spec)
        known.__dict__["content_hash"] = self.content_hash  # `replace` leaves behind what is cached
        return known

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spec"}


def digest(arrays: Mapping[str, NDArray[Any]], extra: str = "") -> str:
    """Return SHA-256 over each array's name, dtype, shape and values, in name order."""
    sha = hashlib.sha256(extra.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        sha.update(array.data)
    return sha.hexdigest()


@dataclass(frozen=True)
class Log:
    """The log as the method uses it: transitions, the one reward transform, and which episodes are held out."""

    transitions: Transitions
    discount: float
    reward_scale: float
    """Rewards times this are what every learned part sees; only scores are raw."""
    holdout_episode: Bools
    """(E,) True for the episodes kept for the diagnostics."""

    @cached_property
    def reward(self) -> Floats:
        """(T,) transformed."""
        return (self.transitions.reward * np.float32(self.reward_scale)).astype(np.float32)

    @cached_property
    def holdout(self) -> Bools:
        """(T,) True for the steps of held-out episodes."""
        return self.holdout_episode[self.transitions.episode]

    @cached_property
    def train_steps(self) -> Ints:
        """Indices of the steps that may be trained on."""
        return np.flatnonzero(~self.holdout)

    @cached_property
    def holdout_steps(self) -> Ints:
        """Indices of the held-out steps."""
        return np.flatnonzero(self.holdout)

    @cached_property
    def observation_moments(self) -> tuple[Floats, Floats]:
        """Mean and std, (O,) each, of the training observations; where they are constant, their size, 1 at least."""
        mean, std, size = self._observation_spread
        return mean, np.where(std > 0, std, np.maximum(size, 1.0)).astype(np.float32)

    @cached_property
    def varying(self) -> Bools:
        """(O,) entries of the observation that are not constant over the training steps."""
        return self._observation_spread[1] > 0

    @cached_property
    def _observation_spread(self) -> tuple[Floats, Floats, NDArray[np.float64]]:
        observation = self.transitions.observation[self.train_steps].astype(np.float64)
        size = np.abs(observation).max(0)
        return observation.mean(0).astype(np.float32), spread(observation, size), size

    @cached_property
    def action_unit(self) -> Floats:
        """(A,) what noise and changes of actions are measured in: 1, half the bounds' width, less where the log uses
        little of it, and 0 where it always does the same. A tenth of wide bounds may be far from all that was tried.
        """
        action = self.transitions.action[self.train_steps].astype(np.float64)
        return np.minimum(1.0, spread(action, np.ones(action.shape[1])) / np.float32(_WIDE))

    def first_steps(self, episodes: int) -> Ints:
        """(N,) first steps of the episodes, evenly spaced and repeated where there are fewer."""
        first = self.transitions.episode_start[:-1]
        return first[np.arange(episodes) * len(first) // episodes]

    @cached_property
    def common_timestep(self) -> int:
        """Last step of an episode that enough of the log reaches for a policy to learn what time it is: a tenth of the
        episodes, or 20 of them."""
        length = np.sort(self.transitions.episode_length)[::-1]
        return int(length[min(20, -(-len(length) // 10)) - 1]) - 1

    @cached_property
    def step_ranges(self) -> tuple[Floats, Floats, float, float]:
        """Observation minimum and maximum (O,), and transformed reward minimum and maximum."""
        t = self.transitions
        low = np.minimum(t.observation.min(0), t.next_observation.min(0))
        high = np.maximum(t.observation.max(0), t.next_observation.max(0))
        return low, high, float(self.reward.min()), float(self.reward.max())

    @cached_property
    def return_parts(self) -> tuple[Floats, Floats]:
        """(T,) discounted return to the episode's end, and (T,) what V of its last observation is weighted by.

        G_t = first + second * V(s_end); the second is gamma^(steps left) after truncation, 0 after termination.
        """
        t = self.transitions
        last = t.episode_start[1:] - 1
        bootstrap = np.zeros(len(t))
        bootstrap[last] = self.discount * ~t.terminal[last]
        partial, weight = (t.discounted_sums(x, self.discount) for x in (self.reward, bootstrap))
        return partial.astype(np.float32), weight.astype(np.float32)

    def n_step(self, n: int) -> tuple[Floats, Ints, Floats]:
        """Return what n logged steps bring from each step: reward, where they end, and what V there is weighted by.

        First (T,): sum of gamma^k r_{t+k} over the m = min(n, steps left) next steps. Second (T,): index of the last of
        them, whose next_observation V looks at. Third (T,): gamma^m, 0 where that step terminated.
        """
        t = self.transitions
        total, last = np.zeros(len(t)), np.minimum(np.arange(len(t)) + n - 1, self.episode_end)
        for k in range(min(n, int(t.episode_length.max()))):
            index = np.arange(len(t)) + k
            inside = index <= last
            total[inside] += self.discount**k * self.reward[index[inside]]
        weight = self.discount ** (last - np.arange(len(t)) + 1.0) * ~t.terminal[last]
        return total.astype(np.float32), last, weight.astype(np.float32)

    @cached_property
    def episode_end(self) -> Ints:
        """(T,) index of the last step of each step's episode; next_observation there is what V bootstraps from."""
        t = self.transitions
        return (t.episode_start[1:] - 1)[t.episode]

    @cached_property
    def return_moments(self) -> tuple[float, float]:
        """Mean and std of the discounted return over the training steps, without bootstrap: the unit of values."""
        partial = self.return_parts[0][self.train_steps].astype(np.float64)
        return float(partial.mean()), float(max(partial.std(), 1e-3))


_ROUNDING = 3e-7
"""Spread of a column, in units of its magnitude, under which it is the rounding of float32."""


def spread(values: NDArray[np.float64], magnitude: NDArray[np.float64]) -> Floats:
    """Return the std (D,) of values (N, D), each in units of its own; 0 where they are constant but for rounding.

    magnitude: (D,) size of the float32 numbers that the values were computed from.
    """
    std = values.std(0)
    return np.where(_is_rounding(std, magnitude), 0.0, std).astype(np.float32)


def _is_rounding(std: NDArray[np.float64], magnitude: NDArray[Any]) -> Bools:
    return std <= _ROUNDING * magnitude


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's rho of two columns (N,), equal values with their mean rank; 0 where one is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = np.cumsum(count) - (count - 1) / 2.0
    return mean[which]


def reward_scale(transitions: Transitions, transform: str) -> float:
    """Return the factor of the one reward transform (never a shift: it would change what termination is worth)."""
    returns = transitions.episode_return
    spread = float(returns.max() - returns.min())
    if transform == "none":
        return 1.0
    if transform == "range" and spread <= 0:
        raise UserError(
            f"data.reward_transform=range needs episodes of different return; all {transitions.episodes} have "
            f"{returns[0]:g}: use data.reward_transform=auto."
        )
    if transform == "range" or (transform == "auto" and spread > 1e-6 * max(1.0, float(np.abs(returns).max()))):
        return 1000.0 / spread
    std = float(transitions.reward.std())
    return 1.0 / std if std > 0 else 1.0


_WIDE = 0.4
"""Std of a log's actions in [-1, 1] from which on they use the bounds: uniform ones have 0.58, MuJoCo's 0.4 to 0.8."""
DISCOUNTS = (0.99, 0.995, 0.997, 0.999)
_LOST = 0.25
"""Of what the best episodes return: so much less may those return that a discount takes for the best."""


def log_remarks(transitions: Transitions) -> list[str]:
    """What is allowed in a log but hardly meant."""
    out = []
    t = transitions
    ended = t.episode_length[t.terminal[t.episode_start[1:] - 1]]
    longest = int(t.episode_length.max())
    if len(ended) >= 10 and longest > 1 and (at_limit := float((ended == longest).mean())) >= 0.9:
        out.append(
            f"{at_limit:.0%} of the episodes that terminate do so after exactly {longest} steps: if that is a limit of "
            "time, they are truncated, not terminated, and nothing may be learned of an end there."
        )
    std, size = t.observation.std(0, dtype=np.float64), np.abs(t.observation).max(0)
    for entry in np.flatnonzero((std > 0) & _is_rounding(std, size)):
        out.append(
            f"entry {entry} of the observation, of size {size[entry]:.3g}, varies no more than float32 rounds it and "
            "counts as constant: if it means something, subtract its first value before logging."
        )
    if copies := int((t.original != np.arange(t.episodes)).sum()):
        out.append(
            f"{copies} of {t.episodes} episodes are exact copies of others: they weigh as often as they are there, and "
            "are held out, or learned from, together."
        )
    first = float(t.reward[0])
    if (t.reward == t.reward[0]).all() and (first == 0.0 or not t.terminal.any()):
        out.append(f"every reward is {first:g}: nothing tells a good action from a bad one.")
    return out


def fitting_discount(transitions: Transitions) -> float:
    """Return the smallest of DISCOUNTS that agrees with the undiscounted return on which episodes are good.

    What is scored is not discounted. At 0.99 a walk that falls after 200 steps beats one half as fast that lasts for
    1000, and all that is learned would follow it. The tenth of the episodes with the most discounted return may return
    a quarter less than the tenth that returns most, in units of the latter's return or of how far it is above the mean.
    """
    returns = transitions.episode_return
    count = max(1, len(returns) // 10)
    most = float(np.sort(returns)[-count:].mean())
    unit = max(abs(most), most - float(returns.mean()))
    for discount in DISCOUNTS:
        discounted = transitions.discounted_sums(transitions.reward, discount)[transitions.episode_start[:-1]]
        taken = float(returns[np.argsort(-discounted, kind="stable")[:count]].mean())
        if most - taken <= _LOST * unit:
            return discount
    return DISCOUNTS[-1]


def prepare(transitions: Transitions, config: DataConfig, seed: int) -> Log:
    """Fix discount, reward transform and held-out episodes of a log; one that terminates is trained on, if any.

    Copies of an episode are held out together: what was learned from tells nothing of what was not.
    """
    originals, which = np.unique(transitions.original, return_inverse=True)
    count = max(1, round(config.holdout_fraction * len(originals)))
    if len(originals) < 2:
        copies = f", {transitions.episodes} times" if transitions.episodes > 1 else ""
        raise UserError(
            f"dataset {transitions.spec.dataset}: {len(originals)} episode{copies}, but one is held out for the "
            "diagnostics and one at least is trained on: log at least 2 episodes."
        )
    steps = np.bincount(which, weights=transitions.episode_length)
    order = np.random.default_rng(np.random.SeedSequence([seed, 1])).permutation(len(originals))
    if steps[order[:count]].sum() > len(transitions) // 2:  # of few, the long ones were drawn
        order = np.argsort(steps, kind="stable")
    ends = transitions.terminal[transitions.episode_start[1:] - 1][originals][order]
    if ends.any() and not ends[count:].any():  # then what a termination is could not be learned
        first = int(np.flatnonzero(ends)[0])
        order[[first, count]] = order[[count, first]]
    holdout = np.isin(which, order[:count])
    discount = fitting_discount(transitions) if config.discount == "auto" else config.discount
    return Log(transitions, discount, reward_scale(transitions, config.reward_transform), holdout)


def check(transitions: Transitions) -> None:
    """Raise UserError for a log that nothing can be learned from: empty, one-step, or with non-finite values."""
    name = transitions.spec.dataset
    if transitions.episodes == 0 or len(transitions) == 0:
        raise UserError(f"dataset {name} holds no transition: check how it was written.")
    if int(transitions.episode_length.max()) < 2:
        raise UserError(f"dataset {name}: every episode has one step; there is no sequence to plan or to imitate.")
    for column in ("observation", "action", "reward", "next_observation"):
        values = getattr(transitions, column)
        bad = ~np.isfinite(values.reshape(len(transitions), -1)).all(1)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"dataset {name}: {column} is NaN or infinite in {int(bad.sum())} of {len(transitions)} steps, first "
                f"in episode {int(transitions.episode[first])}, step {int(transitions.timestep[first])}: "
                "repair or drop these episodes and import the log again."
            )
