"""The columnar log. Arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from method_fixtures import counting_log
from method_fixtures import log_of as log_by_hand

from ipd_ray.config import DataConfig, load
from ipd_ray.data.transitions import (
    ACTION_LIMIT,
    Log,
    Spec,
    Transitions,
    check,
    fitting_discount,
    log_remarks,
    prepare,
    reward_scale,
    spread,
)
from ipd_ray.errors import UserError

SPEC = Spec(
    dataset="test/two-v0",
    observation_space={"type": "Box", "shape": [1], "dtype": "float32"},
    action_low=[-2.0],
    action_high=[6.0],
    action_shape=[1],
    action_dtype="float32",
)


def two_episodes(**changes: Any) -> Transitions:
    """Episode 0: rewards 1, 2, 4, terminated. Episode 1: rewards 8, 16, truncated."""
    columns: dict[str, Any] = {
        "observation": np.array([[0], [1], [2], [10], [11]], np.float32),
        "action": np.zeros((5, 1), np.float32),
        "reward": np.array([1, 2, 4, 8, 16], np.float32),
        "next_observation": np.array([[1], [2], [3], [11], [12]], np.float32),
        "terminal": np.array([False, False, True, False, False]),
        "episode_start": np.array([0, 3, 5]),
        "spec": SPEC,
    }
    return Transitions(**{**columns, **changes})


def test_steps_know_their_episode_and_their_time():
    t = two_episodes()
    assert (len(t), t.episodes, t.observation_dim) == (5, 2, 1)
    assert t.episode.tolist() == [0, 0, 0, 1, 1]
    assert t.timestep.tolist() == [0, 1, 2, 0, 1]
    assert t.episode_return.tolist() == [7.0, 24.0]


def test_next_observations_never_cross_episodes():
    t = two_episodes()
    inner = np.flatnonzero(t.episode[:-1] == t.episode[1:])
    assert np.array_equal(t.next_observation[inner], t.observation[inner + 1])
    assert t.next_observation[2] != t.observation[3]


def log_of(t: Transitions, discount: float = 0.5) -> Log:
    return Log(t, discount, 1.0, np.array([False, True]))


def test_n_steps_by_hand():
    # gamma 0.5, two steps. Episode 0: 1 + 2/2, 2 + 4/2, then 4 alone, terminated. Episode 1: 8 + 16/2, then 16 alone.
    reward, last, weight = log_of(two_episodes()).n_step(2)
    assert reward.tolist() == [2.0, 4.0, 4.0, 16.0, 16.0]
    assert last.tolist() == [1, 2, 2, 4, 4]
    # gamma^2 where V is asked after two steps, gamma after one, nothing after the termination.
    assert weight.tolist() == [0.25, 0.0, 0.0, 0.25, 0.5]
    one, _, _ = log_of(two_episodes()).n_step(1)
    assert one.tolist() == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_returns_to_go_by_hand():
    # gamma 0.5. Episode 0: 4; 2 + 2 = 4; 1 + 2 = 3. Episode 1: 16; 8 + 8 = 16.
    partial, weight = log_of(two_episodes()).return_parts
    assert partial.tolist() == [3.0, 4.0, 4.0, 16.0, 16.0]
    # V of the last observation counts gamma^(steps left) after truncation, nothing after termination.
    assert weight.tolist() == [0.0, 0.0, 0.0, 0.25, 0.5]


def test_the_bootstrap_state_is_the_last_one_of_the_episode():
    assert log_of(two_episodes()).episode_end.tolist() == [2, 2, 2, 4, 4]


def test_held_out_episodes_are_whole():
    log = log_of(two_episodes())
    assert log.train_steps.tolist() == [0, 1, 2]
    assert log.holdout_steps.tolist() == [3, 4]


def test_prepare_holds_out_by_seed_alone():
    t = two_episodes()
    config = DataConfig(holdout_fraction=0.5)
    assert np.array_equal(prepare(t, config, 3).holdout_episode, prepare(t, config, 3).holdout_episode)
    assert prepare(t, config, 3).holdout_episode.sum() == 1


def test_reward_scale_by_hand():
    t = two_episodes()
    assert reward_scale(t, "range") == pytest.approx(1000 / 17)  # returns 24 and 7
    assert reward_scale(t, "none") == 1.0
    # mean 6.2; squares 27.04 + 17.64 + 4.84 + 3.24 + 96.04 = 148.8; / 5 = 29.76
    assert reward_scale(t, "std") == pytest.approx(29.76**-0.5)


def test_equal_returns_fall_back_to_the_std():
    t = two_episodes(reward=np.array([1, 2, 3, 1, 5], np.float32))  # 6 and 6
    assert reward_scale(t, "auto") == reward_scale(t, "std")
    with pytest.raises(UserError, match=r"reward_transform=range .* use data.reward_transform=auto"):
        reward_scale(t, "range")


def test_actions_rescale_and_come_back():
    # [-2, 6]: 2 is the middle, 4 is half way up.
    assert SPEC.rescale_action([[2.0], [4.0]]).tolist() == [[0.0], [0.5]]
    assert SPEC.rescale_action([[6.0], [99.0]])[:, 0] == pytest.approx(ACTION_LIMIT)
    raw = np.linspace(-2, 6, 9, dtype=np.float32)[:, None]
    assert SPEC.unscale_action(SPEC.rescale_action(raw)) == pytest.approx(raw, abs=1e-5)


def test_actions_get_their_shape_and_type_back():
    spec = replace(SPEC, action_low=[0.0] * 4, action_high=[1.0] * 4, action_shape=[2, 2], action_dtype="float64")
    raw = np.arange(12).reshape(3, 2, 2) / 12
    assert spec.rescale_action(raw).shape == (3, 4)
    back = spec.unscale_action(spec.rescale_action(raw))
    assert back.shape == (3, 2, 2) and back.dtype == np.float64
    assert back == pytest.approx(raw, abs=1e-5)


def test_dict_observations_flatten_in_sorted_key_order():
    box = {"type": "Box", "shape": [2], "dtype": "float64"}
    spec = replace(SPEC, observation_space={"type": "Dict", "spaces": {"b": box, "a": box}})
    flat = spec.flatten_observation({"b": [[3, 4]], "a": [[1, 2]]})
    assert flat.tolist() == [[1, 2, 3, 4]] and flat.dtype == np.float32


def test_scores_normalise_as_d4rl_does():
    spec = replace(SPEC, ref_min_score=-10.0, ref_max_score=30.0)
    assert spec.normalise(0.0) == 25.0
    assert SPEC.normalise(0.0) is None


def test_spec_survives_json():
    assert Spec.from_json(SPEC.to_json()) == SPEC


def test_content_hash_ignores_the_name_and_sees_a_changed_reward():
    t = two_episodes()
    assert two_episodes(spec=replace(SPEC, dataset="other/name-v0")).content_hash == t.content_hash
    assert two_episodes(reward=t.reward + np.float32(1e-3)).content_hash != t.content_hash


def test_each_column_has_its_own_spread_and_a_constant_one_has_none():
    # A sensor a million times smaller than another is one; what float32 rounds at 5.0 is none.
    values = np.array([[0.0, 1e-6, 5.0, 5.0], [2e3, 3e-6, 5.0, 5.0 + 5e-7]])
    std = spread(values, np.abs(values).max(0))
    assert std == pytest.approx([1e3, 1e-6, 0.0, 0.0])


def test_a_constant_column_is_divided_by_its_size():
    # What float32 rounds of 1.7e9 seconds is 128.
    seconds = np.array([[1.7e9], [1.7e9 + 128]], np.float32)
    log = log_by_hand([(np.repeat(seconds, 3, 0)[:5], np.zeros((4, 1)), np.zeros(4), False)] * 2)
    mean, std = log.observation_moments
    assert np.abs((log.transitions.observation - mean) / std).max() < 1e-6


def test_the_unit_of_actions_is_less_where_the_log_uses_little_of_their_bounds():
    actions = np.resize([1.0, -1.0], (10, 1)) * [1.0, 0.1, 0.0] + [0.0, 0.3, -1.0]
    log = log_by_hand([(np.zeros((11, 1)), actions, np.zeros(10), False)] * 2)
    assert log.action_unit == pytest.approx([1.0, 0.25, 0.0])


def test_a_limit_of_time_is_what_cuts_the_longest_episodes():
    def log(*kinds: tuple[int, bool]) -> Log:
        return log_by_hand([(np.zeros((n + 1, 1)), np.zeros((n, 1)), np.zeros(n), ended) for n, ended in kinds])

    assert all(log((first, True), (9, False)).transitions.time_limit == 9 for first in (5, 9))
    assert log((5, False), (9, True)).transitions.time_limit is None
    assert log((5, True), (9, False)).transitions.within_limit(20) == 9
    goals = log(*((n, False) for n in range(1, 21))).transitions  # cut at goals, one in twenty as late as the last
    assert (goals.time_limit, goals.longest_cut, goals.within_limit(30)) == (None, 20, 20)
    assert log((9, True)).transitions.within_limit(20) == 20


@pytest.mark.parametrize(
    ("lengths", "last"),
    [([50] * 5, 49), ([90, 40, *[10] * 10], 39), ([*range(1, 201)], 180), ([*range(1, 1001)], 980)],
)
def test_the_last_common_step_is_that_of_a_tenth_of_the_episodes_or_of_twenty(lengths: list[int], last: int):
    assert counting_log(lengths).common_timestep == last


def test_most_steps_are_trained_on_though_the_longest_episode_is_drawn_for_the_hold_out():
    t = counting_log([3, 1000]).transitions
    for seed in range(10):
        assert len(prepare(t, DataConfig(), seed).train_steps) == 1000


def episodes_of(*kinds: tuple[float, int]) -> Transitions:
    """Ten episodes of each kind (reward a step, steps)."""
    every = [kind for kind in kinds for _ in range(10)]
    lengths = np.array([steps for _, steps in every])
    reward = np.concatenate([np.full(steps, r, np.float32) for r, steps in every])
    zero = np.zeros((len(reward), 1), np.float32)
    return two_episodes(
        observation=zero, action=zero, next_observation=zero, reward=reward, terminal=np.zeros(len(reward), bool),
        episode_start=np.concatenate([[0], np.cumsum(lengths)]),
    )


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        # 2 a step for 200 steps: 400, and 173 discounted by 0.99; 1 for 1000: 1000, and 100. By 0.995 253 and 199, by
        # 0.997 301 and 317.
        ([(2.0, 200), (1.0, 1000)], 0.997),
        # 200 and 440: by 0.997 194 and 128, by 0.999 198 and 267.
        ([(10.0, 20), (0.4, 1100)], 0.999),
        ([(10.0, 20), (0.27, 1100)], 0.999),  # 198 and 180: none of them agrees
        ([(10.0, 20), (0.2, 1100)], 0.99),  # what is taken returns nearly as much, 200 for 220
        ([(1.0, 200), (1.1, 1000)], 0.99),
        ([(-1.0, 200), (-1.0, 100)], 0.99),  # all costs: the shorter, the better
        ([(1.0, 7)], 0.99),
    ],
)
def test_the_discount_fits_what_is_scored(kinds: list[tuple[float, int]], expected: float):
    assert fitting_discount(episodes_of(*kinds)) == expected


@pytest.mark.parametrize("word", ["1.5", "Auto", "null", "0"])
def test_a_discount_that_is_none_is_told_once(word: str):
    with pytest.raises(UserError, match=r"^data\.discount=.* must be auto, or a number above 0 and below 1, [^\n]*$"):
        load(overrides=[f"data.discount={word}"])


def test_a_discount_that_is_given_is_taken():
    t = episodes_of((2.0, 200), (1.0, 1000))
    assert prepare(t, DataConfig(discount=0.9), 0).discount == 0.9 and prepare(t, DataConfig(), 0).discount == 0.997


@pytest.mark.parametrize("seed", range(8))
def test_an_episode_that_terminates_is_trained_on(seed: int):
    # Four episodes of one step, the third alone terminates; half are held out.
    t = two_episodes()
    columns = {name: np.zeros((4, 1), np.float32) for name in ("observation", "action", "next_observation")}
    log = replace(
        t, **columns, reward=np.arange(4, dtype=np.float32), terminal=np.arange(4) == 2, episode_start=np.arange(5)
    )
    held = prepare(log, DataConfig(holdout_fraction=0.5), seed).holdout_episode
    assert held.sum() == 2 and not held[2]


def copied(*sources: int) -> Transitions:
    """Episodes of three steps, each a copy of the source with its number."""
    x = np.add.outer(np.asarray(sources, np.float32), np.arange(3, dtype=np.float32)).reshape(-1, 1)
    return Transitions(
        observation=x, action=x / 100, reward=x[:, 0], next_observation=x + 1, terminal=np.zeros(len(x), bool),
        episode_start=np.arange(len(sources) + 1) * 3, spec=SPEC,
    )


@pytest.mark.parametrize("seed", range(8))
def test_copies_of_an_episode_are_held_out_together(seed: int):
    log = copied(10, 20, 30, 10, 20, 30, 40, 10)
    assert log.original.tolist() == [0, 1, 2, 0, 1, 2, 6, 0]
    held = prepare(log, DataConfig(holdout_fraction=0.5), seed).holdout_episode
    assert 0 < held.sum() < 8
    assert not set(log.original[held]) & set(log.original[~held])
    assert any("4 of 8 episodes are exact copies" in said for said in log_remarks(log))
    with pytest.raises(UserError, match="1 episode, 3 times, but one is held out"):
        prepare(copied(10, 10, 10), DataConfig(), seed)


def test_what_differs_anywhere_is_no_copy():
    log = copied(10, 10, 10)
    for column in ("observation", "action", "reward"):
        changed = getattr(log, column).copy()
        changed[5] += 1e-3
        assert replace(log, **{column: changed}).original.tolist() == [0, 1, 0]
    longer = replace(log, episode_start=np.array([0, 3, 5, 9]))
    assert longer.original.tolist() == [0, 1, 2]


def test_check_passes_a_good_log():
    check(two_episodes())


def test_check_names_the_first_bad_step():
    reward = two_episodes().reward.copy()
    reward[4] = np.nan
    with pytest.raises(UserError, match=r"reward is NaN or infinite in 1 of 5 steps, first in episode 1, step 1"):
        check(two_episodes(reward=reward))


def test_check_refuses_episodes_of_one_step():
    with pytest.raises(UserError, match="every episode has one step"):
        check(two_episodes(episode_start=np.arange(6)))


def test_check_refuses_an_empty_log():
    empty = {name: column[:0] for name, column in two_episodes().columns().items()}
    with pytest.raises(UserError, match="holds no transition"):
        check(two_episodes(**empty | {"episode_start": np.array([0])}))


def test_one_episode_is_too_few():
    with pytest.raises(UserError, match="log at least 2 episodes"):
        prepare(two_episodes(episode_start=np.array([0, 5])), DataConfig(), 0)
