"""What a log holds, as numbers and as a picture: look at both before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ipd_ray.data.transitions import Transitions, fitting_discount, log_remarks
from ipd_ray.text import readable

SATURATED = 0.99
"""An action dimension beyond this, of [-1, 1], counts as at its bound."""

INK, MUTED, FILL, ACCENT = "#1f2933", "#7b8794", "#4c78a8", "#e45756"


def describe(transitions: Transitions) -> dict[str, Any]:
    """Return what a log holds; returns are raw and undiscounted, `normalised` has 0 and 100 at the reference scores,
    `discount` is what data.discount=auto takes."""
    returns, spec = transitions.episode_return, transitions.spec
    ended = transitions.terminal[transitions.episode_start[1:] - 1]
    summary = _spread(returns)
    normalised = {name: spec.normalise(summary[name]) for name in ("mean", "p50", "p90", "max")}
    return {
        "dataset": spec.dataset,
        "episodes": transitions.episodes,
        "steps": len(transitions),
        "observation_dim": transitions.observation_dim,
        "action_dim": spec.action_dim,
        "return": summary,
        "normalised": None if normalised["mean"] is None else normalised,
        "ref_min_score": spec.ref_min_score,
        "ref_max_score": spec.ref_max_score,
        "length": _spread(transitions.episode_length),
        "terminated": int(ended.sum()),
        "truncated": int((~ended).sum()),
        "reward": _spread(transitions.reward) | {"zero_share": float((transitions.reward == 0).mean())},
        "discount": fitting_discount(transitions),
        "remarks": log_remarks(transitions),
        "action_saturation": float((np.abs(transitions.action) > SATURATED).mean()),
        "action_mean": transitions.action.mean(0, dtype=np.float64).tolist(),
        "action_std": transitions.action.std(0, dtype=np.float64).tolist(),
        "observation_min": transitions.observation.min(0).tolist(),
        "observation_max": transitions.observation.max(0).tolist(),
        "observation_std": transitions.observation.std(0, dtype=np.float64).tolist(),
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    values = values.astype(np.float64)
    p50, p90 = np.percentile(values, [50, 90])
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "p50": float(p50),
        "p90": float(p90),
        "max": float(values.max()),
    }


def plot(transitions: Transitions, path: Path) -> None:
    """Draw returns, lengths, returns in the log's order and actions; the suffix of path sets the format."""
    figure = Figure(figsize=(10.5, 6.6), layout="constrained", dpi=130)  # no pyplot: no display, no global state
    ((top_left, top_right), (low_left, low_right)) = figure.subplots(2, 2)
    spec = transitions.spec
    figure.suptitle(
        f"{spec.dataset}   {transitions.episodes:,} episodes, {len(transitions):,} steps",
        color=INK,
        fontsize=12,
        fontweight="bold",
    )
    _returns(top_left, transitions)
    _lengths(top_right, transitions)
    _order(low_left, transitions)
    _actions(low_right, transitions)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
        axes.title.set(color=INK, fontsize=10.5)
        axes.xaxis.label.set(color=INK, fontsize=9)
        axes.yaxis.label.set(color=INK, fontsize=9)
    figure.savefig(path)


def _returns(axes: Axes, transitions: Transitions) -> None:
    returns, spec = transitions.episode_return, transitions.spec
    axes.hist(returns, bins=min(40, max(8, len(returns) // 4)), color=FILL)
    mean = float(returns.mean())
    axes.axvline(mean, color=ACCENT, lw=1.5, label=f"mean {readable(mean)}")
    axes.axvline(float(returns.max()), color=ACCENT, lw=1.5, ls=":", label=f"best {readable(returns.max())}")
    for score, name in ((spec.ref_min_score, "0"), (spec.ref_max_score, "100")):
        if score is not None:
            axes.axvline(score, color=MUTED, lw=1, ls="--", label=f"reference {name}: {readable(score)}")
    _legend(axes)
    axes.set(title="Episode return", xlabel="raw return", ylabel="episodes")


def _lengths(axes: Axes, transitions: Transitions) -> None:
    length = transitions.episode_length
    ended = transitions.terminal[transitions.episode_start[1:] - 1]
    bins = np.linspace(length.min() - 0.5, length.max() + 0.5, min(40, int(np.ptp(length)) + 1) + 1)
    parts = [(ended, f"terminated ({ended.sum():,})", ACCENT), (~ended, f"truncated ({(~ended).sum():,})", FILL)]
    parts = [part for part in parts if part[0].any()]
    axes.hist(
        [length[part[0]] for part in parts],
        bins=list(bins),
        stacked=True,
        color=[part[2] for part in parts],
        label=[part[1] for part in parts],
    )
    if np.ptp(length) == 0:
        axes.set(xlim=(length[0] - 5, length[0] + 5), xticks=[int(length[0])])
    _legend(axes)
    axes.set(title="Episode length", xlabel="steps", ylabel="episodes")


def _order(axes: Axes, transitions: Transitions) -> None:
    returns = transitions.episode_return
    axes.plot(returns, ".", ms=4 if len(returns) < 300 else 2.5, color=FILL, alpha=0.7)
    window = max(1, len(returns) // 10)
    if window > 1:
        running = np.convolve(returns, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(running)) + (window - 1) / 2, running, color=ACCENT, lw=1.5, label=f"mean of {window}")
        _legend(axes)
    axes.set(title="Return in the log's order", xlabel="episode", ylabel="raw return")


def _actions(axes: Axes, transitions: Transitions) -> None:
    bins = np.linspace(-1, 1, 41)
    dims = transitions.spec.action_dim
    if dims <= 4:
        colours = (FILL, ACCENT, "#72b7b2", "#b279a2")
        for dim in range(dims):
            share = np.histogram(transitions.action[:, dim], bins)[0] / len(transitions)
            axes.stairs(100 * share, bins, color=colours[dim], lw=1.5, label=f"dimension {dim}")
        if dims > 1:
            _legend(axes, columns=2)
    else:
        share = np.histogram(transitions.action, bins)[0] / transitions.action.size
        axes.stairs(100 * share, bins, color=FILL, fill=True)
    saturation = float((np.abs(transitions.action) > SATURATED).mean())
    axes.set(
        title=f"Actions, {100 * saturation:.1f} % at a bound",
        xlabel="action, rescaled to [-1, 1]" + (f", all {dims} dimensions" if dims > 4 else ""),
        ylabel="% of steps",
    )


def _legend(axes: Axes, columns: int = 1) -> None:
    axes.legend(fontsize=8, labelcolor=INK, ncols=columns, facecolor="white", edgecolor="none", framealpha=0.9)
