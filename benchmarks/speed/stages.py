"""What is measured: the stages, who takes part, what counts as the limit, and the goals. Changes of a goal belong here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHONS = {
    "ours.py": Path(sys.executable),
    "d3rlpy_peer.py": ROOT / ".venv-peers" / "bin" / "python",
    "mbrl_peer.py": ROOT / ".venv-mbrl" / "bin" / "python",
}
"""Interpreter of each script of contestants."""


@dataclass(frozen=True)
class Entry:
    """A contestant of a stage."""

    name: str
    """How the table calls it."""
    script: str
    work: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """A ratio that is to be reached."""

    text: str
    ours: str
    other: str
    cpu: float | None
    gpu: float | None


@dataclass(frozen=True)
class Stage:
    """Contestants that take turns."""

    name: str
    title: str
    unit: str
    """Of the items that contestants count."""
    entries: tuple[Entry, ...]
    goals: tuple[Goal, ...]
    limits: Mapping[str, str] = field(default_factory=dict)
    """Which product each of ours is bounded by: names of entries."""
    reads: bool = False
    """A Minari dataset of a million steps, which is made first; waiting for the disk counts."""
    share: tuple[float, float] | None = None
    """Share of the limit that is to be reached, on a CPU and on a GPU."""


def _product(name: str, groups: int, rows: int, width: int, dtype: str = "float32") -> Entry:
    return Entry(name, "ours.py", "product", {"groups": groups, "rows": rows, "width": width, "dtype": dtype})


_MPC = {"members": 7, "candidates": 256, "horizon": 5}
_ONE = "MPPI, one state at a time (ours)"
_MBRL = "mbrl-lib"
_PLAIN = "ipd_ray, no policy, no value"
_LESS = "mbrl-lib's MPPI (no policy, no value: 0.6 of the operations)"
_LOOP = "7 models in a loop (ours)"


def _distillation(layers: int, width: int, goal: float) -> Stage:
    size = {"layers": layers, "width": width, "heads": 4, "context": 20, "batch": 64}
    peer = "d3rlpy's Decision Transformer"
    return Stage(
        f"distill_{layers}x{width}", f"distillation, {layers}x{width}, context 20", "windows",
        (
            Entry("ipd_ray", "ours.py", "distill", {**size, "tokens": "step"}),
            Entry("ipd_ray, three tokens a step", "ours.py", "distill", {**size, "tokens": "separate"}),
            Entry(peer, "d3rlpy_peer.py", "dt", size),
            _product("product", 1, 64 * 20, width),
        ),
        (
            Goal("as shipped", "ipd_ray", peer, goal, 4.0),
            Goal("with as many tokens", "ipd_ray, three tokens a step", peer, None, None),
        ),
        {"ipd_ray": "product", "ipd_ray, three tokens a step": "product"},
    )  # fmt: skip


def _evaluation(episodes: int, gpu: float) -> Stage:
    one = "one environment at a time (ours)"
    return Stage(
        f"evaluate_{episodes}", f"evaluation, {episodes} episodes", "environment steps",
        (
            Entry("ipd_ray", "ours.py", "evaluate", {"episodes": episodes}),
            Entry(one, "ours.py", "evaluate_one", {"episodes": min(episodes, 10)}),
        ),
        (Goal("", "ipd_ray", one, 1.5, gpu),),
    )  # fmt: skip


STAGES = (
    Stage(
        "values", "value updates (IQL, batch 256, 2x256)", "updates",
        (
            Entry("ipd_ray", "ours.py", "values"),
            Entry("ipd_ray, bfloat16", "ours.py", "values", {"precision": "bfloat16"}),
            Entry("d3rlpy's IQL, whole step", "d3rlpy_peer.py", "iql"),
            Entry("d3rlpy's IQL, update alone", "d3rlpy_peer.py", "iql_update"),
            _product("product", 2, 256, 256),
            _product("product, bfloat16", 2, 256, 256, "bfloat16"),
        ),
        (
            Goal("its whole step", "ipd_ray", "d3rlpy's IQL, whole step", 2.0, 8.0),
            Goal("its update alone", "ipd_ray", "d3rlpy's IQL, update alone", 1.2, None),
            Goal("its whole step, bfloat16", "ipd_ray, bfloat16", "d3rlpy's IQL, whole step", 2.0, 8.0),
            Goal("its update alone, bfloat16", "ipd_ray, bfloat16", "d3rlpy's IQL, update alone", 1.2, None),
        ),
        {"ipd_ray": "product", "ipd_ray, bfloat16": "product, bfloat16"},
    ),
    Stage(
        "world_model", "world model, 7 members", "updates",
        (
            Entry("ipd_ray", "ours.py", "world_model"),
            Entry("ipd_ray, bfloat16", "ours.py", "world_model", {"precision": "bfloat16"}),
            Entry(_LOOP, "ours.py", "world_model_loop"),
            Entry(_MBRL, "mbrl_peer.py", "world_model", {"members": 7}),
            _product("product", 7, 256, 200),
            _product("product, bfloat16", 7, 256, 200, "bfloat16"),
        ),
        (
            Goal("float32", "ipd_ray", _LOOP, 1.4, 4.0),
            Goal("float32", "ipd_ray", _MBRL, 1.4, 4.0),
            Goal("bfloat16", "ipd_ray, bfloat16", _LOOP, 1.4, 4.0),
            Goal("bfloat16", "ipd_ray, bfloat16", _MBRL, 1.4, 4.0),
        ),
        {"ipd_ray": "product", "ipd_ray, bfloat16": "product, bfloat16"},
    ),
    Stage(
        "planning", "planning, same algorithm (N 256, H 5, 7 members, 4x200)", "states",
        (
            Entry("ipd_ray", "ours.py", "plan", _MPC),
            Entry("ipd_ray, bfloat16", "ours.py", "plan", {**_MPC, "planner": {"precision": "bfloat16"}}),
            Entry(_PLAIN, "ours.py", "plan", {**_MPC, "plain": True}),
            Entry(_ONE, "ours.py", "plan_one", _MPC),
            Entry(_LESS, "mbrl_peer.py", "plan", _MPC),
            _product("product", 7, 512, 200),
            _product("product, bfloat16", 7, 512, 200, "bfloat16"),
        ),
        (
            Goal("float32", "ipd_ray", _ONE, 1.1, 10.0),
            Goal("bfloat16", "ipd_ray, bfloat16", _ONE, 1.8, 10.0),
            Goal("float32, without policy and value", _PLAIN, _LESS, 1.1, 10.0),
            Goal("bfloat16", "ipd_ray, bfloat16", _LESS, None, None),
        ),
        {"ipd_ray": "product", "ipd_ray, bfloat16": "product, bfloat16"},
        share=(0.6, 0.4),
    ),
    Stage(
        "planning_shipped", "planning as shipped (gradient plans of gym-small)", "states",
        (
            Entry("ipd_ray", "ours.py", "plan", {"shipped": True}),
            Entry(_ONE, "ours.py", "plan_one", _MPC),
            Entry(_LESS, "mbrl_peer.py", "plan", _MPC),
            _product("product", 5, 250, 200),
        ),
        (Goal("", "ipd_ray", _ONE, 5.0, 50.0), Goal("", "ipd_ray", _LESS, None, None)),
        {"ipd_ray": "product"},
    ),
    _distillation(3, 128, 1.2),
    _distillation(4, 256, 1.6),
    _evaluation(10, 5.0),
    _evaluation(50, 10.0),
    Stage(
        "loading", "load 1M transitions from Minari", "transitions",
        (
            Entry("ipd_ray, first time", "ours.py", "load_first"),
            Entry("ipd_ray, after", "ours.py", "load_again"),
            Entry("Minari's iteration", "ours.py", "load_minari"),
        ),
        (
            Goal("first time", "ipd_ray, first time", "Minari's iteration", 2.0, None),
            Goal("after", "ipd_ray, after", "Minari's iteration", 20.0, None),
        ),
        reads=True,
    ),
)  # fmt: skip
"""In the order of the table; `start` and `memory`, which are no races, come after them (bench.py)."""
