"""Values learned where they are known."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Episode, content, described, log_of, tensors_of
from torch import Tensor

from ipd_ray.artifacts import Workspace
from ipd_ray.config import ValuesConfig
from ipd_ray.data.transitions import Log
from ipd_ray.training import set_threads
from ipd_ray.values.fit import (
    ValueTrainer,
    bootstrapped_returns,
    fit_values,
    generalised_advantage,
    load_values,
    rank_correlation,
)
from ipd_ray.values.networks import ValueFunctions

LOOP, FIRST, LAST, END = 5.0 + 10.0 * np.eye(4, dtype=np.float32)  # far from the units of the networks


def learned(log: Log, **changes: Any) -> ValueFunctions:
    set_threads(1)
    config = {"updates": 1000, "batch_size": 32, "width": 16, "learning_rate": 5e-3, "polyak": 0.05, **changes}
    trainer = ValueTrainer(log, ValuesConfig.model_validate(config), 0, "cpu")
    for step in range(trainer._config.updates):
        trainer.update(step)
    return trainer.model


@lru_cache(maxsize=1)
def chain() -> tuple[Log, ValueFunctions]:
    """LOOP -> LOOP for ever, cut off by a time-out after 3 steps; FIRST -> LAST -> END, which terminates. Reward 1."""
    action = np.random.default_rng(0).uniform(-0.9, 0.9, (20, 3, 1))
    episodes: list[Episode] = []
    for i in range(10):
        episodes.append(([LOOP] * 4, action[i], [1.0, 1.0, 1.0], False))
        episodes.append(([FIRST, LAST, END], action[10 + i, :2], [1.0, 1.0], True))
    log = log_of(episodes, discount=0.5)
    return log, learned(log, expectile=0.5)


def at(state: np.ndarray) -> Tensor:
    return torch.from_numpy(state)[None]


def test_a_time_out_does_not_stop_the_bootstrap():
    # V(LOOP) = 1 + 0.5 V(LOOP) = 2. Were the time-out an end, a third of the targets would be 1: V = 1.5.
    assert chain()[1].v(at(LOOP)).item() == pytest.approx(2.0, abs=0.1)


def test_termination_stops_the_bootstrap():
    # V(LAST) = 1, whatever V(END) may be; V(FIRST) = 1 + 0.5 * 1 = 1.5.
    assert chain()[1].v(at(LAST)).item() == pytest.approx(1.0, abs=0.1)
    assert chain()[1].v(at(FIRST)).item() == pytest.approx(1.5, abs=0.1)


def test_both_critics_learn_the_value_of_an_action():
    q = chain()[1].q(torch.from_numpy(np.stack([LOOP, FIRST, LAST])), torch.zeros(3, 1))
    assert q.shape == (2, 3)
    assert torch.allclose(q, torch.tensor([2.0, 1.5, 1.0]).expand(2, -1), atol=0.15)


def test_learning_in_bfloat16_comes_to_the_same_values():
    log, exact = chain()
    rounded = learned(log, expectile=0.5, precision="bfloat16")
    assert not torch.equal(exact.v_net.out.weight, rounded.v_net.out.weight)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    states = torch.from_numpy(np.stack([LOOP, FIRST, LAST]))
    assert torch.allclose(rounded.v(states), torch.tensor([2.0, 1.5, 1.0]), atol=0.1)
    assert torch.allclose(rounded.v(states), exact.v(states), atol=0.1)


def test_returns_are_bootstrapped_after_a_time_out_alone():
    # gamma 0.5 and V = 8: 1 + .5 + .25 + 8 / 8, 1 + .5 + 8 / 4, 1 + 8 / 2; terminated: 1 + .5, 1.
    log = chain()[0]
    returns = bootstrapped_returns(log, lambda s: torch.full((len(s),), 8.0), "cpu")
    assert returns[:5].tolist() == [2.75, 3.5, 5.0, 1.5, 1.0]


def test_generalised_advantage_by_hand():
    # gamma 0.5; V = 2 everywhere, 8 where a time-out cut off. delta: 1 + .5 * 2 - 2 = 0, 0, 1 + .5 * 8 - 2 = 3;
    # terminated: 0, 1 - 2 = -1. lambda 0.5: sums of 0.25^k delta.
    log = chain()[0]
    v, v_end = np.full(len(log.transitions), 2.0, np.float32), np.full(log.transitions.episodes, 8.0, np.float32)

    def first_two_episodes(lam: float) -> list[float]:
        return generalised_advantage(log, v, v_end, lam)[:5].tolist()

    assert first_two_episodes(0.0) == [0.0, 0.0, 3.0, 0.0, -1.0]
    assert first_two_episodes(0.5) == [3.0 / 16, 3.0 / 4, 3.0, -0.25, -1.0]
    # lambda 1 is the bootstrapped return over V: 1 + .5 + .25 + 8 / 8 - 2, ...
    assert first_two_episodes(1.0) == [0.75, 1.5, 3.0, -0.5, -1.0]


@lru_cache(maxsize=1)
def bandit() -> ValueFunctions:
    """One state, one step: action +-0.9 at even odds returns +-1, in the unit of 40."""
    sign = np.where(np.arange(64) % 2 == 0, 1.0, -1.0)
    episodes: list[Episode] = [([[0.5], [0.5]], [[0.9 * s]], [40.0 * s], True) for s in sign]
    return learned(log_of(episodes), expectile=0.9, prompt_expectile=0.75, advantage_temperature=3.0, batch_size=1024)


def test_v_is_the_expectile_over_actions():
    # Q = +-40: the 0.9-expectile is 0.8 * 40 (0.9 (1 - m) = 0.1 (m + 1)).
    state = torch.tensor([[0.5]])
    assert bandit().q(state, torch.tensor([[0.9]])).mean().item() == pytest.approx(40.0, abs=2.0)
    assert bandit().q(state, torch.tensor([[-0.9]])).mean().item() == pytest.approx(-40.0, abs=2.0)
    assert bandit().v(state).item() == pytest.approx(32.0, abs=3.0)


def test_return_expectiles_are_those_of_the_logged_returns():
    # 0.5: the mean, 0. 0.75: 0.75 (1 - m) = 0.25 (m + 1) at m = 0.5, times 40.
    mean, upper = bandit().return_expectiles(torch.tensor([[0.5]]))
    assert mean.item() == pytest.approx(0.0, abs=3.0)
    assert upper.item() == pytest.approx(20.0, abs=3.0)


def test_the_behaviour_policy_leans_to_the_better_action():
    # Plain cloning would give 0; A = (+8, -72), mean |A| = 40: weights exp(0.6) and exp(-5.4), mean action 0.9 * 0.995.
    assert bandit().act(torch.tensor([[0.5]])).item() == pytest.approx(0.896, abs=0.05)


def test_what_is_left_behind_is_what_was_learned_and_scores_itself(tmp_path: Path):
    # Reward is 1 - |s|, where s decays: V is a function of s that a line cannot follow.
    rng = np.random.default_rng(0)
    episodes: list[Episode] = []
    for _ in range(24):
        s = rng.uniform(-2.0, 2.0) * 0.9 ** np.arange(13)
        episodes.append((s[:, None], rng.uniform(-0.9, 0.9, (12, 1)), 1.0 - np.abs(s[:-1]), False))
    log = log_of(episodes, discount=0.8, holdout=range(0, 24, 4))
    config = ValuesConfig(updates=800, batch_size=64, width=32, learning_rate=3e-3, polyak=0.05)
    fit_values(log, config, seed=0, device="cpu", workspace=Workspace(tmp_path))
    artifact = described(tmp_path)
    shown = content(artifact)["diagnostics"]
    assert shown["rank_correlation"] > 0.95 > shown["rank_correlation_linear"] + 0.1
    assert shown["mc_rmse"] < 0.5 * shown["mc_rmse_linear"]
    model = load_values(tensors_of(artifact), content(artifact), "cpu")
    assert not any(p.requires_grad for p in model.parameters())
    v = model.v(torch.from_numpy(log.transitions.observation))
    assert float(v.std(correction=0)) == pytest.approx(shown["v_std"], rel=1e-4)


def test_rank_correlation_by_hand():
    assert rank_correlation(np.array([1, 2, 3]), np.array([10, 20, 90])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1, 2, 3]), np.array([9, 5, 1])) == pytest.approx(-1.0)
    # ranks 0 1 2 3 against 1 0 3 2: 1 - 6 * 4 / (4 * 15) = 0.6
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([2, 1, 4, 3])) == pytest.approx(0.6)
    assert rank_correlation(np.array([1, 2, 3]), np.array([5, 5, 5])) == 0.0
    # Equal values share their mean rank: 1, 2.5, 2.5, 4 against 2.5, 1, 2.5 (of 2, 3), 4.
    a, b = np.array([0.0, 1.0, 1.0, 2.0]), np.array([1.0, 0.0, 1.0, 2.0])
    expected = np.corrcoef([1, 2.5, 2.5, 4], [2.5, 1, 2.5, 4])[0, 1]
    assert rank_correlation(a, b) == pytest.approx(expected)
