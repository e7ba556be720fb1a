"""Fitted-Q evaluation: the value of the policy that is asked about, not of the log's; the same after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import log_of

from ipd_ray.artifacts import Artifact, Workspace
from ipd_ray.config import ValuesConfig
from ipd_ray.data.transitions import Log, Transitions
from ipd_ray.evaluate.fitted_q import FittedQ, fit_q
from ipd_ray.training import set_threads
from ipd_ray.values.networks import ValueFunctions

CONFIG = ValuesConfig(width=32, layers=2, batch_size=128, learning_rate=2e-3)


class Always:
    """A policy that always takes one action."""

    def __init__(self, action: float):
        self._action = action

    def along(self, t: Transitions) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(t), 1), self._action, np.float32), np.full((t.episodes, 1), self._action, np.float32)


def random_log(terminated: bool, discount: float = 0.5) -> Log:
    """Uniform actions; the reward of a step is its action, halved by the reward scale; states say nothing."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(40):
        action = rng.uniform(-1.0, 1.0, (10, 1))
        episodes.append((rng.normal(size=(11, 2)), action, action[:, 0], terminated))
    return log_of(episodes, discount=discount, reward_scale=0.5, holdout=range(0, 40, 4))


def values_of(log: Log) -> ValueFunctions:
    torch.manual_seed(0)
    set_threads(1)
    values = ValueFunctions(2, 1, CONFIG)
    values.return_mean.fill_(log.return_moments[0])
    values.return_std.fill_(log.return_moments[1])
    return values


def fitted(log: Log, policy: Any, folder: Path, updates: int = 800) -> dict[str, Any]:
    fit_q(
        log, policy, values_of(log), CONFIG, updates=updates, seed=0, device="cpu", workspace=Workspace(folder, 1e-6)
    )
    return dict(json.loads((folder / "result.json").read_text())["diagnostics"])


@pytest.mark.parametrize("action", [-0.5, 0.5])
def test_it_is_the_policys_value_by_hand(action: float, tmp_path: Path) -> None:
    # truncated episodes go on for ever: V = a / (1 - 0.5) = 2 a in raw units; the log's own actions are 0 on average
    found = fitted(random_log(terminated=False), Always(action), tmp_path)
    assert found["value_mean"] == pytest.approx(2.0 * action, abs=0.1)
    assert found["value_held_out"] == pytest.approx(2.0 * action, abs=0.1)
    assert found["episodes"] == 10 and abs(found["log_value"]) < 0.5


@pytest.mark.parametrize("held", [1, 2])
def test_one_episode_has_no_standard_error(held: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    episodes = [(rng.normal(size=(6, 2)), np.zeros((5, 1)), np.zeros(5), False) for _ in range(4)]
    found = fitted(log_of(episodes, discount=0.5, holdout=range(held)), Always(0.5), tmp_path, updates=2)
    assert found["episodes"] == held and (found["value_sem"] is None) == (held == 1)


def test_nothing_follows_a_termination() -> None:
    # one step an episode: Q(s, a) is its reward, 0.5 * a scaled
    rng = np.random.default_rng(0)
    action = rng.uniform(-1.0, 1.0, (400, 1, 1))
    log = log_of(
        [(rng.normal(size=(2, 2)), a, a[:, 0], True) for a in action], discount=0.99, reward_scale=0.5,
        holdout=range(0, 400, 4),
    )
    trainer = FittedQ(log, np.full((400, 1), 0.7, np.float32), values_of(log), CONFIG, seed=0, device="cpu")
    for step in range(600):
        trainer.update(step)
    rows = np.arange(0, 400, 4)
    assert trainer.value(log, rows, np.full((100, 1), 0.7, np.float32)) == pytest.approx(0.35, abs=0.05)


def test_a_value_beyond_the_best_reward_for_ever_is_not_believed() -> None:
    log = random_log(terminated=False)
    values = values_of(log)
    torch.nn.init.constant_(values.q_net.out.bias, 1e4)
    trainer = FittedQ(log, np.zeros((400, 1), np.float32), values, CONFIG, seed=0, device="cpu")
    # Targets are at most 0.5 / (1 - 0.5) = 1 in scaled units, nothing beside 1e4: two squared errors of 1e4. Believed,
    # the target of 0.5 * 1e4 would leave a quarter of that.
    assert trainer.update(0)["q_loss"].item() == pytest.approx(2e8, rel=0.01)


def test_a_killed_fit_goes_on_to_the_same_q(tmp_path: Path) -> None:
    from ipd_ray.training import train

    log, policy = random_log(terminated=False), Always(0.5)
    fitted(log, policy, tmp_path / "whole", updates=40)
    workspace = Workspace(tmp_path / "killed", 1e-6)
    trainer = FittedQ(log, np.full((400, 1), 0.5, np.float32), values_of(log), CONFIG, seed=0, device="cpu")
    lines = train(trainer, 40, workspace, log_every=2)
    for _ in range(8):
        next(lines)
    fitted(log, policy, tmp_path / "killed", updates=40)
    whole, resumed = (Artifact(tmp_path / name).path / "tensors.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()
