"""The whole method on logs unlike each other: what spaces, scales, rewards and ends of other tasks look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from numpy.typing import NDArray
from small_runs import SETTINGS

from ipd_ray import Policy, run
from ipd_ray.artifacts import Artifact
from ipd_ray.config import load
from ipd_ray.data.export import episode_buffer, write_minari
from ipd_ray.runs import RunFolder

ACTOR = [
    "planner.kind=actor", "actor.reaches=[0.3]", "actor.rounds=2", "actor.starts=20", "actor.length=10",
    "actor.updates=5", "actor.value_updates=5", "actor.episodes=4",
    "correct.walks=4", "correct.length=10",
]  # fmt: skip


def wide(*shape: int) -> Box:
    return Box(-np.inf, np.inf, shape, np.float32)


@dataclass(frozen=True)
class Kind:
    """What a log makes of a pendulum's (cos, sin, speed) and its rewards."""

    space: gymnasium.Space[Any] = field(default_factory=lambda: wide(3))
    observe: Callable[[NDArray[Any]], Any] = lambda s: s
    """Of (T + 1, 3)."""
    reward: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]] = lambda s, r: r + 17.0
    """Of s' (T, 3) and the pendulum's rewards (T,)."""
    steps: int = 40
    episodes: int = 8
    terminates: tuple[int, ...] = ()
    """Episodes that do, at their last step."""


KINDS = {
    "Dict": Kind(
        Dict({"goal": Box(-1.0, 1.0, (2,), np.float64), "joint": Box(-np.inf, np.inf, (3, 1), np.float64)}),
        lambda s: {"goal": np.zeros((len(s), 2)), "joint": s[..., None].astype(np.float64)},
    ),
    "rows and columns": Kind(wide(3, 1), lambda s: s[..., None]),
    "constant columns": Kind(
        wide(5), lambda s: np.concatenate([np.ones((len(s), 1)), s, np.full((len(s), 1), -733.3)], 1, dtype=np.float32)
    ),
    "constant reward": Kind(reward=lambda s, r: np.ones(len(r)), terminates=(0, 3, 5, 6)),
    "scales apart": Kind(
        wide(4), lambda s: np.concatenate([s * 1e-3, 1e3 * s[:, 2:]], 1, dtype=np.float32), lambda s, r: 1e3 * r
    ),
    "sparse reward": Kind(reward=lambda s, r: (s[:, 0] > 0.9).astype(np.float64)),
    "one termination": Kind(terminates=(2,)),
    "short episodes": Kind(steps=5, episodes=60),
}


def write(root: Path, kind: Kind) -> str:
    """Write the log of random torques."""
    env = gymnasium.make("Pendulum-v1")
    rng = np.random.default_rng(0)
    logged = []
    for episode in range(kind.episodes):
        states = [env.reset(seed=episode)[0]]
        actions = rng.uniform(-2.0, 2.0, (kind.steps, 1)).astype(np.float32)
        rewards = []
        for action in actions:
            state, reward, *_ = env.step(action)
            states.append(state)
            rewards.append(float(reward))
        s = np.stack(states).astype(np.float32)
        earned = kind.reward(s[1:], np.array(rewards))
        logged.append(episode_buffer(kind.observe(s), actions, earned, terminated=episode in kind.terminates))
    name = "test/kind-v0"
    write_minari(
        name, logged, observation_space=kind.space, action_space=env.action_space, description="random", root=root
    )
    return name


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("name", "planner"), [*((name, "actor") for name in KINDS), ("Dict", "mpc"), ("constant columns", "mpc")]
)
def test_the_method_learns_plans_and_chooses(
    name: str, planner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    kind = KINDS[name]
    drawn = planner == "mpc" or kind.terminates  # a report takes as long as the rest
    if not drawn:
        request.getfixturevalue("without_report")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = write(tmp_path / "minari", kind)
    words = [*SETTINGS, "accept.range_margin=0.5", "imagine.length=8", "accept.margin=null"]
    config = load(overrides=[*words, *(ACTOR if planner == "actor" else [])])
    folder = tmp_path / "run"
    summary = run(dataset, config, run_dir=folder)
    assert summary["chosen"]["variant"] in ("ipd", "no_imagination")
    assert summary["imagined"]["accepted"] > 0
    found = RunFolder(folder)
    model = Artifact(found.artifact("world_model")).diagnostics
    assert model["rmse"] < 3.0 * model["rmse_constant"]  # hardly trained, but of the right size
    if planner == "actor":
        assert Artifact(found.artifact("reach:0.3")).curve()[-1]["left"] < 1.0
    policy = Policy.load(folder)
    one = kind.space.sample()
    assert policy.act(one).shape == (1,)
    assert (found.path / "report.html").exists()
    if drawn:
        assert "<svg" in (found.path / "report.html").read_text()
