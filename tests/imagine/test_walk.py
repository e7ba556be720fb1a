"""Walks of a policy that an actor corrects, in worlds that can be counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Line, log_of
from torch import Tensor

from ipd_ray.config import AcceptConfig, ActorConfig, CorrectConfig, ValuesConfig
from ipd_ray.data.shards import Segments
from ipd_ray.imagine.accept import accept_walks
from ipd_ray.imagine.actor import Actor, Rollouts
from ipd_ray.imagine.walk import walk
from ipd_ray.values.fit import frozen
from ipd_ray.values.networks import ValueFunctions
from ipd_ray.world_model.uncertainty import Trust

# Two episodes on a line, from 0 and from 0.5; actions of all sizes.
LOG = log_of([(np.linspace(start, start + 0.4, 41)[:, None], np.resize([1.0, -0.9], (40, 1)), np.ones(40), False)
              for start in (0.0, 0.5)])  # fmt: skip


class Right(Actor):
    """Goes right by 0.1, wherever it is."""

    def act(self, observation: Tensor) -> Tensor:
        return torch.full_like(observation, 0.1)


class Steady:
    """A policy that always does the same, and remembers what it was told."""

    def __init__(self, action: float):
        self.action = action
        self.rewards: list[Any] = []

    def reset(self, mask: Any = None) -> None: ...

    def act_flat(self, observation: np.ndarray, reward: Any = None) -> np.ndarray:
        self.rewards.append(reward)
        return np.full_like(observation, self.action)


def walked(
    policy: Steady, *, world: Any = None, noise_std: float = 0.0, threshold: float = 1e9
) -> tuple[Segments, dict[str, float]]:
    torch.manual_seed(0)
    values = frozen(ValueFunctions(1, 1, ValuesConfig(width=8)), "cpu")
    world = world or Line(lambda s, s2: s2)
    config = ActorConfig(noise_std=noise_std)
    rollouts = Rollouts(LOG, values, world, config, Trust("spread", threshold, 0.05), seed=0, device="cpu")
    return walk(policy, Right(1, 1, width=2, layers=1, reach=0.1), rollouts, CorrectConfig(walks=4, length=3))


def test_the_policy_walks_and_the_actor_says_what_it_would_do():
    segments, told = walked(Steady(0.02))
    assert segments.index.tolist() == [0, 0, 40, 40] and segments.timestep.tolist() == [0] * 4
    assert segments.observation[2, :, 0] == pytest.approx([0.5, 0.52, 0.54, 0.56], abs=1e-6)
    assert np.allclose(segments.action, 0.02) and np.allclose(segments.imitated, 0.1)
    assert segments.reward[2] == pytest.approx([0.52, 0.54, 0.56], abs=1e-6)
    assert (segments.own_length == 3).all() and np.isfinite(segments.uncertainty).all()
    assert told == pytest.approx({"imitation_rmse": 0.08, "ended": 0.0, "left": 0.0, "length_mean": 3.0}, abs=1e-6)


def test_every_second_walk_is_disturbed_and_what_was_done_is_noted_with_the_noise():
    segments, told = walked(Steady(0.02), noise_std=0.01)
    assert np.allclose(segments.action[::2], 0.02) and not np.allclose(segments.action[1::2], 0.02, atol=1e-4)
    assert np.allclose(np.diff(segments.observation[..., 0], axis=1), segments.action[..., 0], atol=1e-6)
    assert np.allclose(segments.imitated, 0.1)
    assert told["imitation_rmse"] == pytest.approx(0.08, abs=1e-6)  # of the undisturbed


def test_a_walk_is_cut_where_it_leaves_what_the_log_shows():
    # The log ends at 0.9 (0.945 with the margin): from 0.5 by 0.3 a step the second step leaves.
    segments, told = walked(Steady(0.3))
    assert np.isinf(segments.uncertainty[2]).tolist() == [False, True, False]
    assert not segments.terminal.any() and told["left"] == 0.5
    assert segments.observation[2, 2:, 0] == pytest.approx([0.8, 0.8], abs=1e-6)


def test_an_end_is_terminal_and_nothing_is_worth_anything_after_it():
    segments, told = walked(Steady(0.1), world=Line(lambda s, s2: s2, ended=lambda s: (s > 0.65).float()))
    assert segments.terminal[2].tolist() == [False, True, False] and not segments.terminal[0].any()
    assert (segments.value[2] != 0).tolist() == [True, True, False, False]
    assert segments.reward[2] == pytest.approx([0.6, 0.7, 0.0], abs=1e-6)
    assert told["ended"] == 0.5 and told["length_mean"] == 2.5


def test_the_policy_is_told_what_it_earned_in_the_log_s_own_units():
    policy = Steady(0.02)
    walked(policy)
    assert policy.rewards[0] is None
    assert policy.rewards[1] * LOG.reward_scale == pytest.approx([0.02, 0.02, 0.52, 0.52], abs=1e-6)


def test_of_a_walk_what_is_known_counts_and_its_end_belongs_to_it():
    # From 0 and from 0.5 by 0.3 a step: 0.9 is known, 1.1 is not; then an end beyond 0.65.
    segments, _ = walked(Steady(0.3))
    for least, counts in ((1, [True] * 4), (2, [True, True, False, False])):
        accepted, lengths = accept_walks(segments, AcceptConfig(min_length=least, threshold=1e-9))
        assert lengths.tolist() == [3, 3, 1, 1] and accepted.tolist() == counts
    ending, _ = walked(Steady(0.1), world=Line(lambda s, s2: s2, ended=lambda s: (s > 0.65).float()))
    assert accept_walks(ending, AcceptConfig())[1].tolist() == [3, 3, 2, 2]
    assert not accept_walks(segments, AcceptConfig(min_length=1, share=0.0))[0].any()
