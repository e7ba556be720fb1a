"""Which states are repaired."""

from __future__ import annotations

from typing import Any

import numpy as np
from method_fixtures import counting_log

from ipd_ray.config import SelectConfig
from ipd_ray.imagine.select import Starts, select_starts

LOG = counting_log([50, 30, 20, 100])
STEPS = 200


def select(regret: np.ndarray, *, length: int = 5, seed: int = 0, **config: Any) -> Starts:
    plain = {"starts": 20, "regret_share": 1.0, "control_share": 0.0, "frontier_share": 0.0, "episode_cap": 1.0}
    value, returns = regret.astype(np.float32) + 3.0, np.full(STEPS, 3.0, np.float32)
    wanted = SelectConfig.model_validate({**plain, **config})
    return select_starts(LOG, value, returns, wanted, length=length, seed=seed)


def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=STEPS)


def test_starts_are_at_least_a_segment_apart():
    # 200 / 5 = 40 starts fit at the very most; more are asked for.
    index = select(noise(), starts=200).index
    apart = np.diff(index)[np.diff(LOG.transitions.episode[index]) == 0]
    assert apart.min() >= 5
    # At a random order, car parking fills about three quarters.
    assert len(index) >= 22


def test_a_start_takes_no_room_from_other_episodes():
    # Segments longer than any episode: one start in each of four.
    index = select(noise(), starts=200, length=300).index
    assert LOG.transitions.episode[index].tolist() == [0, 1, 2, 3]


def test_no_episode_holds_more_than_its_cap():
    # A cap of 0.2 * 20 = 4.
    index = select(noise(), episode_cap=0.2).index
    counts = np.bincount(LOG.transitions.episode[index], minlength=4)
    assert counts.max() == 4 and len(index) == 15 + (counts[2] == 4)


def test_a_cap_below_one_start_is_one_start():
    assert np.bincount(LOG.transitions.episode[select(noise(), episode_cap=0.0).index]).max() == 1


def test_only_the_states_of_most_regret_are_taken():
    # Regret grows with the step: the top tenth is the last 20 of 200.
    starts = select(np.arange(STEPS, dtype=float), regret_share=0.1, length=1, starts=10)
    assert starts.index.min() >= 180 and len(starts.index) == 10
    # A random part of the top, not its tip.
    assert starts.index.tolist() != list(range(190, 200))


def test_regret_is_what_v_promises_over_what_came():
    # V is 1 everywhere; only the steps that returned less are worth repairing.
    returns = np.ones(STEPS, np.float32)
    returns[[20, 60, 120]] = -5.0
    config = SelectConfig(
        starts=3, regret_share=3 / STEPS, control_share=0.0, frontier_share=0.0, episode_cap=1.0
    )
    starts = select_starts(LOG, np.ones(STEPS, np.float32), returns, config, length=5, seed=0)
    assert starts.index.tolist() == [20, 60, 120]


def test_the_control_group_is_drawn_from_everywhere():
    # A fifth of 40 starts; the flagged ones can only come from the last 60 steps.
    starts = select(
        np.arange(STEPS, dtype=float), starts=40, control_share=0.2, regret_share=0.3, length=1
    )
    assert starts.control.sum() == 8 and len(starts.index) == 40
    assert starts.index[~starts.control].min() >= 140
    assert starts.index[starts.control].min() < 140
    assert (np.diff(starts.index) > 0).all()


def test_shares_that_both_round_up_leave_none_for_regret_and_draw_no_more_than_asked():
    found = select(noise(), length=1, starts=5, control_share=0.3, frontier_share=0.7, episode_cap=1.0)
    assert len(found.index) == 6  # round(1.5) + round(3.5)


def test_the_same_identity_draws_the_same_starts():
    one, again, other = (select(noise(), control_share=0.5, seed=s) for s in (3, 3, 4))
    assert np.array_equal(one.index, again.index) and np.array_equal(one.control, again.control)
    assert not np.array_equal(one.index, other.index)


def test_the_frontier_is_where_v_is_highest():
    # V falls with the step, and so does the return: only the last 20 steps are regretted, V is highest in the first.
    value = -np.arange(STEPS, dtype=np.float32)
    returns = value.copy()
    returns[180:] -= 50.0
    config = SelectConfig(starts=10, regret_share=0.1, control_share=0.0, frontier_share=0.5, episode_cap=1.0)
    index = select_starts(LOG, value, returns, config, length=1, seed=0).index
    assert (index < 20).sum() == 5 and (index >= 180).sum() == 5
