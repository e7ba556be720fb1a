"""Shards of imagined segments, in a world that is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import KnownValues, Line, counting_log, learned_pendulum, log_of

from ipd_ray.config import ImagineConfig, PlannerConfig
from ipd_ray.data.shards import Segments
from ipd_ray.imagine.rollout import ShardSpec, imagine_shard, own_steps, shard_specs

# Steps 0-3: x = 0, .1, .2, .3, then .4; steps 4-6: x = .8, .9, 1, then 1.1, terminated. Rewards 1-7.
LOG = log_of(
    [
        (np.arange(5)[:, None] / 10, np.full((4, 1), 0.1), [1.0, 2.0, 3.0, 4.0], False),
        (np.arange(8, 12)[:, None] / 10, np.full((3, 1), -0.9), [5.0, 6.0, 7.0], True),
    ]
)
EDGE = Line(lambda s, s2: s2, ended=lambda s2: (s2 > 1.05).float())
VALUES = KnownValues(value=lambda s: 10.0 * s, policy=lambda s: torch.full_like(s, 0.1))


def spec(*index: int, shard: int = 0) -> ShardSpec:
    return ShardSpec(shard, np.array(index), np.zeros(len(index), bool))


def imagine(*index: int, shard: int = 0, length: int = 3, seed: int = 0, **more: Any) -> Segments:
    # One candidate an elite, which carries no noise: a = 0.1 always, unless more are asked for.
    planner = PlannerConfig(kind="mpc", candidates=more.pop("candidates", 2), horizon=2)
    config = ImagineConfig(length=length)
    return imagine_shard(
        spec(*index, shard=shard), LOG, EDGE, VALUES, planner, config, seed=seed, device="cpu", **more
    )


def near(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-5)


def test_own_steps_by_hand():
    own = own_steps(LOG, np.array([0, 2, 5]), 3)
    assert own.length.tolist() == [3, 2, 2]
    assert own.reward.tolist() == [[1, 2, 3], [3, 4, 0], [6, 7, 0]]
    assert own.terminal.tolist() == [[False] * 3, [False] * 3, [False, True, False]]
    wanted = [near(0.0, 0.1, 0.2, 0.3), near(0.2, 0.3, 0.4, 0.4), near(0.9, 1.0, 1.1, 1.1)]
    assert own.observation[..., 0].tolist() == wanted


def test_own_rewards_are_transformed():
    assert own_steps(replace(LOG, reward_scale=0.5), np.array([0]), 2).reward.tolist() == [[0.5, 1.0]]


def test_a_segment_by_hand():
    # From x = 0.2 by 0.1 a step: .3, .4, .5; the reward is where it gets to, V ten times that.
    segment = imagine(2)
    assert segment.observation[0, :, 0].tolist() == near(0.2, 0.3, 0.4, 0.5)
    assert segment.action[0, :, 0].tolist() == near(0.1, 0.1, 0.1)
    assert segment.reward[0].tolist() == near(0.3, 0.4, 0.5)
    assert segment.value[0].tolist() == near(2.0, 3.0, 4.0, 5.0)
    assert segment.terminal[0].tolist() == [False] * 3
    assert (segment.index[0], segment.episode[0], segment.timestep[0]) == (2, 0, 2)
    # The log's own: two steps to x = .4, V along it.
    assert segment.own_value[0, : segment.own_length[0] + 1].tolist() == near(2.0, 3.0, 4.0)


def test_an_ended_row_keeps_its_state_and_earns_nothing():
    # From x = 0.9: 1.0, then 1.1, beyond the edge: that step counts, with its reward; nothing after it does.
    segment = imagine(5, 0, length=4)
    assert segment.observation[0, :, 0].tolist() == near(0.9, 1.0, 1.1, 1.1, 1.1)
    assert segment.reward[0].tolist() == near(1.0, 1.1, 0.0, 0.0)
    assert segment.terminal[0].tolist() == [False, True, False, False]
    assert segment.value[0].tolist() == near(9.0, 10.0, 0.0, 0.0, 0.0)
    assert segment.uncertainty[0, 2:].tolist() == [0.0, 0.0] and (segment.uncertainty[0, :2] > 0).all()
    assert segment.observation[1, :, 0].tolist() == near(0.0, 0.1, 0.2, 0.3, 0.4)  # its neighbour goes on


def test_no_segment_is_longer_than_the_longest_episode():
    assert imagine(0, length=200).length == 4


def test_a_replay_takes_the_actions_of_the_log():
    log = counting_log([4, 4])  # step t has action t / 100; beyond the episode its last action is repeated
    segments = imagine_shard(
        spec(1, 6), log, Line(lambda s, s2: s2), KnownValues(), PlannerConfig(), ImagineConfig(length=3), seed=0,
        device="cpu", replay=True,
    )
    assert segments.action[..., 0].tolist() == [near(0.01, 0.02, 0.03), near(0.06, 0.07, 0.07)]


def test_the_same_identity_imagines_the_same_bits():
    one = imagine(0, 2, 5, candidates=16).digest
    torch.manual_seed(7)
    assert imagine(0, 2, 5, candidates=16).digest == one
    assert imagine(0, 2, 5, candidates=16, shard=1).digest != one
    assert imagine(0, 2, 5, candidates=16, seed=1).digest != one


def test_steps_of_a_segment_have_noise_of_their_own():
    # Were the noise the same at each step, so would be all moves on a line whose reward and V are linear.
    moves = imagine(0, candidates=16).action[0, :, 0]
    assert len(set(moves.round(6).tolist())) == 3


def test_the_learned_world_imagines_the_same_bits_whoever_asks():
    learned = learned_pendulum()

    def digest() -> str:
        planner, config = PlannerConfig(kind="mpc", candidates=12, horizon=3), ImagineConfig(length=4)
        return imagine_shard(
            spec(10, 400, 1200), learned.log, learned.world_model, learned.values, planner, config, seed=0, device="cpu"
        ).digest

    assert digest() == digest()


def test_starts_are_cut_into_shards_in_order():
    index, control = np.arange(10, 17), np.arange(7) % 2 == 0
    specs = shard_specs(index, control, 3)
    assert [s.shard for s in specs] == [0, 1, 2]
    assert [s.index.tolist() for s in specs] == [[10, 11, 12], [13, 14, 15], [16]]
    assert np.concatenate([s.control for s in specs]).tolist() == control.tolist()
