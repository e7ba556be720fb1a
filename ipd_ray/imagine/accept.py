"""Which imagined segments count: one pure function, applied when shards are read. Shapes: S segments, L steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipd_ray.config import AcceptConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Bools, Floats, Ints, Log

_SHARE_STREAM = 77
_ROUNDING = 1e-5
"""Of a bound's size: more than the roundings of a long roll-out."""


@dataclass(frozen=True)
class Accepted:
    """The verdict on S segments."""

    passed: Bools
    """(S,) those that pass the tests."""
    accepted: Bools
    """(S,) those that count: all that passed, or the part of them that `accept.share` asks for."""
    length: Ints
    """(S,) steps left after the cut."""
    imagined: Floats
    """(S,) I: discounted imagined reward over `length` steps plus gamma^length V of where it ends."""
    own: Floats
    """(S,) B: the same along the log, from the same start."""
    reasons: dict[str, float]
    """Share of segments that fail each test."""

    @classmethod
    def nothing(cls) -> Accepted:
        """The verdict on no segment."""
        none, no = np.zeros(0, np.float32), np.zeros(0, bool)
        return cls(no, no, np.zeros(0, np.int64), none, none, {})


def widened(low: Any, high: Any, margin: float) -> tuple[Any, Any]:
    """Return the bounds of a range, each farther out by `margin` times its width, and by what float32 rounds off: what
    is constant in the log stays inside."""
    slack = margin * (high - low) + _ROUNDING * np.maximum(np.abs(low), np.abs(high))
    return low - slack, high + slack


FEW_WINDOWS = 50
"""Held-out windows under which kappa is taken from all of them."""


def kappa(
    holdout_uncertainty: Floats, holdout_episode: Ints, *, length: int, survival: float, begins: Bools | None = None
) -> float:
    """The smallest U at which `survival` of the held-out real windows of `length` steps pass whole.

    holdout_uncertainty: (N,) U of the held-out steps, whole episodes in order; holdout_episode: (N,). Episodes
    shorter than `length` give one window each. begins: (N,) the steps that a window may begin at, such as those of high
    regret: measured over all of them, kappa would be small where a log idles in a state that it knows well. All steps
    where not given, or where fewer than FEW_WINDOWS are left.
    """
    peaks, chosen = [], []
    for episode in np.unique(holdout_episode):
        rows = holdout_episode == episode
        u = holdout_uncertainty[rows]
        window = np.lib.stride_tricks.sliding_window_view(u, min(length, len(u)))
        peaks.append(window.max(1))
        chosen.append(np.ones(len(window), bool) if begins is None else begins[rows][: len(window)])
    peak, wanted = np.concatenate(peaks), np.concatenate(chosen)
    return float(np.quantile(peak[wanted] if wanted.sum() >= FEW_WINDOWS else peak, survival, method="inverted_cdf"))


def accept(
    segments: Segments,
    config: AcceptConfig,
    *,
    threshold: float,
    discount: float,
    value_std: float,
    ranges: tuple[Floats, Floats, float, float],
) -> Accepted:
    """Cut each segment before its first step that is uncertain or out of range, and keep it if it beats log and V.

    Kept: at least min_length steps are left, and, where there is a margin, I exceeds both B and V(s_0) by margin *
    value_std. The return that the
    log went on to reach selects starts, it accepts nothing: V stands on both sides here.
    """
    S, L = len(segments), segments.length
    low, high = widened(*ranges[:2], config.range_margin)
    reward_low, reward_high = widened(*ranges[2:], config.range_margin)  # the best reward is often the most common one
    following = segments.observation[:, 1:]
    in_range = ((following >= low) & (following <= high)).all(-1)
    in_range &= (segments.reward >= reward_low) & (segments.reward <= reward_high)
    certain = segments.uncertainty <= threshold
    ended_before = _ended_before(segments)
    usable = certain & in_range & ~ended_before
    length = _until(usable)
    imagined = value_of(segments.reward, segments.terminal, segments.value, length, discount)
    own = value_of(
        segments.own_reward,
        segments.own_terminal,
        segments.own_value,
        np.minimum(length, segments.own_length),
        discount,
    )
    bar = -np.inf if config.margin is None else config.margin * value_std
    long_enough = length >= min(config.min_length, L)
    beats_own, beats_value = imagined > own + bar, imagined > segments.value[:, 0] + bar
    passed = long_enough & beats_own & beats_value
    accepted = passed & _drawn(S, config.share)
    reasons = (
        {
            "too_short": float((~long_enough).mean()),
            "uncertain_first_step": float((~certain[:, 0]).mean()),
            "out_of_range": float((~in_range & ~ended_before).any(1).mean()),
            "not_over_log": float((~beats_own).mean()),
            "not_over_value": float((~beats_value).mean()),
        }
        if S
        else {}
    )
    return Accepted(passed, accepted, length.astype(np.int64), imagined, own, reasons)


def accept_walks(walks: Segments, config: AcceptConfig) -> tuple[Bools, Ints]:
    """Return which walks of a policy count, (S,), and how many steps of each, (S,): those within what is known.

    kappa cuts no walk: not what came of it is learned, but what an actor would do there, and far on it matters most.
    """
    length = _until(np.isfinite(walks.uncertainty) & ~_ended_before(walks))
    long_enough = length >= min(config.min_length, walks.length)
    return long_enough & _drawn(len(walks), config.share), length.astype(np.int64)


def _ended_before(segments: Segments) -> Bools:
    ends: Ints = np.cumsum(segments.terminal, 1) - segments.terminal
    return ends > 0


def _until(usable: Bools) -> Ints:
    """(S,) steps before the first that is not usable."""
    return np.where(usable.all(1), usable.shape[1], np.argmin(usable, 1))


def _drawn(count: int, share: float) -> Bools:
    """(S,) a random part; a smaller share is a part of a larger one."""
    out: Bools = np.random.default_rng(_SHARE_STREAM).random(count) < share
    return out


def value_of(reward: Floats, terminal: Bools, value: Floats, length: Ints, discount: float) -> Floats:
    """sum_{k < l} gamma^k r_k + gamma^l V(s_l), V = 0 after a termination inside the l steps: (S,)."""
    L = reward.shape[1]
    inside = np.arange(L) < length[:, None]
    total = (np.where(inside, reward, 0.0) * discount ** np.arange(L)).sum(1)
    ended = (terminal & inside).any(1)
    tail = np.where(ended, 0.0, value[np.arange(len(length)), length])
    return (total + discount**length * tail).astype(np.float32)


def summarise(segments: Segments, verdict: Accepted, log: Log) -> dict[str, Any]:
    """Return what a run reports of its imagination, of all that passed: accept rate, by depth and by distance to
    termination, and gain. A mean over none is None."""
    ok = verdict.passed
    gain = verdict.imagined - verdict.own
    t = log.transitions
    left = log.episode_end[segments.index] - segments.index + 1
    ends = t.terminal[log.episode_end[segments.index]]
    by_distance: dict[str, Any] = {}
    for name, rows in (
        ("ends_within_10", ends & (left <= 10)),
        ("ends_within_50", ends & (left > 10) & (left <= 50)),
        ("later_or_never", ~ends | (left > 50)),
    ):
        if rows.any():
            kept = ok & rows
            by_distance[name] = {
                "starts": int(rows.sum()),
                "accept_rate": float(ok[rows].mean()),
                "gain": float(gain[kept].mean()) if kept.any() else None,
            }
    return {
        "segments": len(segments),
        "accepted": int(ok.sum()),
        "accept_rate": float(ok.mean()) if len(ok) else 0.0,
        "accepted_steps": int(verdict.length[ok].sum()),
        "accept_rate_control": _rate(ok, segments.control),
        "accept_rate_flagged": _rate(ok, ~segments.control),
        "survival_by_depth": [float((verdict.length > k).mean()) for k in range(segments.length)],
        "uncertainty_quantiles": _quantiles(segments.uncertainty),
        "by_distance_to_termination": by_distance,
        "imagined_mean": float(verdict.imagined[ok].mean()) if ok.any() else None,
        "own_mean": float(verdict.own[ok].mean()) if ok.any() else None,
        "rejections": verdict.reasons,
    }


def _rate(ok: Bools, rows: Bools) -> float:
    return float(ok[rows].mean()) if rows.any() else 0.0


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    return {f"{q:g}": float(np.quantile(values, q)) for q in (0.1, 0.5, 0.9, 0.99)} if values.size else {}
