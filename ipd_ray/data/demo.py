"""The demo log: Pendulum-v1 by a scripted controller of mixed skill, made on the spot with gymnasium alone.

Every episode is mediocre, and stays so by construction: the controller sleeps for stretches, and an episode that still
returns more than -350 (about one in a hundred, from a lucky start) is thrown away and drawn anew. Good parts exist,
swing-up at full energy and balancing for a second or four, but never in one piece: putting them together is what the
method is for.

Frozen: the numbers below are not tuned on what any policy reaches. A change needs a new GENERATOR number.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from ipd_ray.data.export import ROOT_VARIABLE, write_minari

DEMO_ID = "ipd_ray/pendulum/mixed-v0"
GENERATOR = 1
EPISODES = 80
CEILING = -350.0
"""No episode returns more."""
REF_SCORES = (-1200.0, -150.0)
"""About what a random policy and a good one return; our own references."""

TOP_ENERGY = 15.0
"""Of Pendulum-v1 at rest upright: theta'' = 15 sin(theta) + 3 u, so E = theta'^2 / 2 + 15 cos(theta)."""


def demo_root() -> Path:
    """Return the folder the demo's dataset lies in: MINARI_DATASETS_PATH where set and writable, else ./demo/minari."""
    root = os.environ.get(ROOT_VARIABLE)
    if root and ((Path(root) / DEMO_ID).exists() or _writable(Path(root))):
        return Path(root)
    return Path.cwd() / "demo" / "minari"


def _writable(folder: Path) -> bool:
    """By the mode bits too: a folder marked read-only is left alone even by root."""
    return not folder.exists() or (os.access(folder, os.W_OK) and bool(folder.stat().st_mode & stat.S_IWUSR))


def make_demo(root: Path | None = None, seed: int = 0, force: bool = False) -> str:
    """Make the demo's Minari dataset in root (demo_root() where not given) unless it is there; return its id."""
    root = demo_root() if root is None else root
    made_by = {"demo_generator": GENERATOR, "demo_seed": seed}
    metadata = root / DEMO_ID / "data" / "metadata.json"
    if not force and metadata.exists():
        found = json.loads(metadata.read_text())
        if made_by.items() <= found.items():
            return DEMO_ID
    env = gymnasium.make("Pendulum-v1")
    write_minari(
        DEMO_ID,
        [_mediocre_episode(env, seed, index) for index in range(EPISODES)],
        observation_space=env.observation_space,
        action_space=env.action_space,
        description=f"scripted controller of mixed skill, no episode above {CEILING:g}",
        root=root,
        env_spec=env.spec.to_json() if env.spec else None,
        ref_scores=REF_SCORES,
        metadata=made_by,
        replace=True,
    )
    env.close()
    return DEMO_ID


@dataclass(frozen=True)
class _Skill:
    """One episode's controller. Times in steps of 0.05 s."""

    kind: str
    """random: drifting torque; swing: pumps towards a wrong energy, never balances; lapse: able, but falls asleep."""
    target: float
    """Energy pumped to."""
    gain: float
    stiffness: float
    damping: float
    delay: int
    """lapse: asleep at first."""
    awake: int
    asleep: int
    noise: float
    """Std of the exploration noise on the torque."""


def _draw_skill(rng: np.random.Generator) -> _Skill:
    kind = str(rng.choice(["random", "swing", "lapse"], p=[0.12, 0.25, 0.63]))
    return _Skill(
        kind=kind,
        target=TOP_ENERGY + (rng.uniform(-8.0, 8.0) if kind == "swing" else 0.0),
        gain=rng.uniform(0.05, 0.6),
        stiffness=rng.uniform(7.0, 14.0),
        damping=rng.uniform(1.5, 3.5),
        delay=int(rng.integers(0, 40)),
        awake=int(rng.integers(30, 90)),
        asleep=int(rng.integers(15, 45)),
        noise=rng.uniform(0.1, 0.5),
    )


def _torque(skill: _Skill, step: int, angle: float, speed: float, drift: float) -> float:
    """Return the torque before noise; angle is 0 upright."""
    clock = step - skill.delay
    awake = clock >= 0 and clock % (skill.awake + skill.asleep) < skill.awake
    if skill.kind == "random" or (skill.kind == "lapse" and not awake):
        return drift
    if skill.kind == "lapse" and abs(angle) < 0.45 and abs(speed) < 2.5:
        return -(skill.stiffness * angle + skill.damping * speed)
    if abs(speed) < 0.1:
        return 2.0 if drift > 0 else -2.0
    energy = 0.5 * speed * speed + TOP_ENERGY * np.cos(angle)
    return float(skill.gain * (skill.target - energy) * speed)


def _mediocre_episode(env: gymnasium.Env, seed: int, index: int) -> EpisodeBuffer:
    """Draw episodes from (seed, index, attempt) until one returns at most CEILING."""
    attempt = 0
    while True:
        episode = _episode(env, np.random.default_rng(np.random.SeedSequence([seed, index, attempt])))
        if sum(episode.rewards) <= CEILING:
            return episode
        attempt += 1


def _episode(env: gymnasium.Env, rng: np.random.Generator) -> EpisodeBuffer:
    start = int(rng.integers(2**31))
    observation, _ = env.reset(seed=start)
    skill, drift, step = _draw_skill(rng), 0.0, 0
    observations, actions, rewards, truncations = [observation], [], [], []
    truncated = False
    while not truncated:
        angle, speed = float(np.arctan2(observation[1], observation[0])), float(observation[2])
        drift = 0.9 * drift + rng.normal(0.0, 0.8)
        torque = np.clip(_torque(skill, step, angle, speed, drift), -2.0, 2.0) + rng.normal(0.0, skill.noise)
        action = np.clip([torque], -2.0, 2.0).astype(np.float32)
        observation, reward, _, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        truncations.append(truncated)
        step += 1
    return EpisodeBuffer(
        seed=start,
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=np.zeros(step, bool),
        truncations=np.array(truncations),
    )
