"""Which plans count, by hand; and the test of the method: the log's own actions are no improvement on the log."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from method_fixtures import learned_pendulum, log_of, segments_of

from ipd_ray.config import AcceptConfig, ImagineConfig, PlannerConfig, SelectConfig
from ipd_ray.imagine.accept import Accepted, accept, kappa, summarise, widened
from ipd_ray.imagine.rollout import imagine_shard, shard_specs
from ipd_ray.imagine.select import select_starts
from ipd_ray.values.fit import bootstrapped_returns, evaluate_in_chunks
from ipd_ray.world_model.uncertainty import KINDS

WIDE = (np.array([-10.0], np.float32), np.array([10.0], np.float32), -100.0, 100.0)


LENIENT = AcceptConfig(min_length=1, margin=0.0)


def verdict(*, ranges: Any = WIDE, config: AcceptConfig = LENIENT, value_std: float = 1.0, **columns: Any) -> Accepted:
    """The verdict on segments of 4 steps that earn 1 each and end at V = 0, where the log earned nothing; gamma 0.5."""
    length, discount = 4, 0.5
    S = len(next(iter(columns.values()))) if columns else 1
    plain = {"reward": np.ones((S, length)), "uncertainty": np.full((S, length), 0.1)}
    segments = segments_of(range(S), length, **{**plain, **columns})
    return accept(segments, config, threshold=1.0, discount=discount, value_std=value_std, ranges=ranges)


def steps(*values: float) -> Any:
    return np.array([values])


def test_imagined_return_by_hand():
    # gamma 0.5: 1 + 1/2 + 1/4 + 1/8 + 16/16
    v = verdict(value=steps(0, 2, 4, 8, 16))
    assert v.imagined.tolist() == [1.875 + 1.0] and v.length.tolist() == [4]


def test_no_value_after_an_imagined_end():
    # Ends at the second step: 1 + 1/2, two steps, V = 0 though the column says 99.
    v = verdict(terminal=steps(False, True, False, False), reward=steps(1, 1, 0, 0), value=steps(0, 2, 99, 99, 99))
    assert v.imagined.tolist() == [1.5] and v.length.tolist() == [2]


def test_own_return_by_hand():
    # 2 + 2/2 + 2/4 + 2/8 + 32/16
    v = verdict(own_reward=steps(2, 2, 2, 2), own_value=steps(0, 0, 0, 0, 32))
    assert v.own.tolist() == [3.75 + 2.0]


def test_own_return_ends_with_the_log():
    # Terminated after two steps: 2 + 2/2, no V. Cut off by a time-out after two steps: 2 + 2/2 + 8/4.
    common = {"own_reward": steps(2, 2, 0, 0), "own_value": steps(0, 0, 8, 8, 8), "own_length": np.array([2])}
    ended = verdict(**common, own_terminal=steps(False, True, False, False))
    assert ended.own.tolist() == [3.0]
    assert verdict(**common).own.tolist() == [5.0]


def test_a_segment_is_cut_before_its_first_uncertain_step():
    # The third step is uncertain, the fourth is not: two steps are left, I = 1 + 1/2 + 4/4.
    v = verdict(uncertainty=steps(0.1, 1.0, 1.1, 0.1), value=steps(0, 2, 4, 8, 16))
    assert v.length.tolist() == [2] and v.imagined.tolist() == [2.5]


def test_the_log_is_cut_where_the_segment_is():
    # B = 2 + 2/2 + 8/4, over the two steps that are left of the plan.
    v = verdict(uncertainty=steps(0.1, 0.1, 9.0, 0.1), own_reward=steps(2, 2, 2, 2), own_value=steps(0, 0, 8, 0, 0))
    assert v.own.tolist() == [5.0]


def test_a_segment_that_is_uncertain_at_once_has_no_steps():
    v = verdict(uncertainty=steps(2, 0, 0, 0), value=steps(3, 9, 9, 9, 9))
    assert v.length.tolist() == [0] and v.imagined.tolist() == [3.0] and not v.accepted[0]


def test_a_segment_is_cut_where_it_leaves_the_range_of_the_log():
    # Range [-10, 10], margin 5 % of 20: 11 is in, 11.1 is out; it is the step *to* it that is dropped.
    observation = np.array([[[0], [11.0], [-11.0], [11.1], [0]]])
    assert verdict(observation=observation).length.tolist() == [2]
    # Rewards in [-100, 100], margin 5 % of 200.
    assert verdict(reward=steps(1, 110, 110.5, 1)).length.tolist() == [2]
    assert verdict(reward=steps(1, -110.5, 1, 1)).length.tolist() == [1]


def test_rewards_of_masked_steps_are_not_out_of_range():
    # Rewards of this log are at least 1; the zeros after the end are no reason to cut.
    v = verdict(terminal=steps(False, True, False, False), reward=steps(1, 1, 0, 0), ranges=(*WIDE[:2], 1.0, 5.0))
    assert v.length.tolist() == [2] and v.accepted[0] and v.reasons["out_of_range"] == 0.0


def test_too_short_a_rest_is_refused():
    lengths = [2, 3, 4]
    uncertainty = [[9.0 if k >= n else 0.1 for k in range(4)] for n in lengths]
    v = verdict(uncertainty=uncertainty, config=AcceptConfig(min_length=3, margin=0.0))
    assert v.length.tolist() == lengths and v.accepted.tolist() == [False, True, True]
    assert v.reasons["too_short"] == pytest.approx(1 / 3)


def test_no_segment_of_short_episodes_is_too_short():
    # L is 4 where the longest episode is: nothing could be as long as min_length.
    assert verdict(config=AcceptConfig(min_length=9, margin=0.0)).accepted.all()


def test_a_segment_must_beat_the_log_and_v_by_the_margin():
    # I = 1.875. Margin 0.25 of a spread of 2 = 0.5: B or V(s_0) may be under 1.375, not over it.
    config = AcceptConfig(min_length=1, margin=0.25)
    first, start = [1.37, 1.38, 0.0, 0.0], [0.0, 0.0, 1.37, 1.38]
    own = np.array([[r, 0, 0, 0] for r in first])
    value = np.array([[v, 0, 0, 0, 0] for v in start])
    v = verdict(own_reward=own, value=value, config=config, value_std=2.0)
    assert v.accepted.tolist() == [True, False, True, False]
    assert (v.reasons["not_over_log"], v.reasons["not_over_value"]) == (0.25, 0.25)


def test_as_good_as_the_log_is_not_enough():
    v = verdict(own_reward=np.ones((1, 4)))
    assert v.imagined.tolist() == v.own.tolist() and not v.accepted[0]


def test_ranges_take_in_the_last_observation():
    log = log_of([([[0.0, 5.0], [1.0, -2.0], [7.0, 1.0]], [[0.0], [0.0]], [3.0, -4.0], False)], reward_scale=2.0)
    low, high, reward_low, reward_high = log.step_ranges
    assert (low.tolist(), high.tolist(), reward_low, reward_high) == ([0.0, -2.0], [7.0, 5.0], -8.0, 6.0)


def test_a_range_is_widened_by_its_width_and_by_rounding():
    low, high = widened(np.array([0.0, 100.0, -2.0]), np.array([10.0, 100.0, -2.0]), 0.1)
    assert low == pytest.approx([-1.0, 100.0, -2.0], rel=2e-4) and high == pytest.approx([11.0, 100.0, -2.0], rel=2e-4)
    assert (low[1:] < [100.0, -2.0]).all() and (high[1:] > [100.0, -2.0]).all()  # what is constant is inside


def test_kappa_can_be_measured_where_the_planner_works():
    # Two episodes of 60 steps: the first idles at U = 0.1, the second works at U = 0.1 .. 6.0. Windows of one step.
    u = np.concatenate([np.full(60, 0.1), np.arange(1, 61) / 10.0]).astype(np.float32)
    episode = np.repeat([0, 1], 60)
    assert kappa(u, episode, length=1, survival=0.5) == pytest.approx(0.1)
    assert kappa(u, episode, length=1, survival=0.5, begins=episode == 1) == pytest.approx(3.0)
    # Forty-nine windows say too little: all are taken.
    assert kappa(u, episode, length=1, survival=0.5, begins=np.arange(120) >= 71) == pytest.approx(0.1)


def test_a_smaller_share_of_what_is_accepted_is_a_part_of_a_larger_one():
    reward = np.ones((400, 4))
    shares = [LENIENT.model_copy(update={"share": share}) for share in (0.0, 0.25, 0.5, 1.0)]
    found = [verdict(reward=reward, config=config) for config in shares]
    kept = [v.accepted for v in found]
    assert all(v.passed.all() for v in found)
    assert [int(k.sum()) for k in (kept[0], kept[3])] == [0, 400]
    assert abs(int(kept[1].sum()) - 100) < 30 and abs(int(kept[2].sum()) - 200) < 40
    assert not (kept[1] & ~kept[2]).any()


def test_a_mean_over_nothing_accepted_is_none():
    log = log_of([([[0.0]] * 5, [[0.0]] * 4, [0.0] * 4, False)])
    for reward, accepted, worth, own in ((1.0, 1, 1.875, 0.0), (0.0, 0, None, None)):
        segments = segments_of(range(1), 4, reward=np.full((1, 4), reward))
        found = summarise(segments, verdict(reward=np.full((1, 4), reward)), log)
        assert (found["accepted"], found["imagined_mean"], found["own_mean"]) == (accepted, worth, own)
        assert found["by_distance_to_termination"]["later_or_never"]["gain"] == worth


def test_kappa_by_hand():
    # Windows of 2 in the episode (1, 5, 2, 3): peaks 5, 5, 3. In (4): one short window, peak 4. Half of 3 4 5 5 is
    # two windows, and the smallest U at which two pass is 4.
    u, episode = np.array([1, 5, 2, 3, 4], np.float32), np.array([0, 0, 0, 0, 1])
    found = kappa(u, episode, length=2, survival=0.5)
    peaks = np.array([5, 5, 3, 4])
    assert 4.0 <= found < 5.0 and (peaks <= found).mean() == 0.5


@pytest.mark.parametrize(("survival", "smallest"), [(0.5, 4.0), (0.7, 5.0), (0.9, 6.0)])
def test_kappa_is_the_smallest_that_lets_enough_windows_pass(survival: float, smallest: float):
    # Peaks 3, 4, 5, 6: two, three and four of them must pass.
    u, episode = np.array([3, 4, 5, 6], np.float32), np.arange(4)
    assert kappa(u, episode, length=3, survival=survival) == smallest


# --- the test of the method -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def on_the_pendulum() -> tuple[Accepted, Accepted]:
    """Verdicts on replays of the log's own actions, and on plans, from the same starts and through the same models."""
    learned, length, config = learned_pendulum(), 8, AcceptConfig()
    log, t = learned.log, learned.log.transitions
    v = evaluate_in_chunks(learned.values.v, t.observation, device="cpu")
    returns = bootstrapped_returns(log, learned.values.v, "cpu")
    select = SelectConfig(starts=240, control_share=0.3, episode_cap=0.1)
    starts = select_starts(log, v, returns, select, length=length, seed=0)
    (spec,) = shard_specs(starts.index, starts.control, len(starts.index))
    imagine = ImagineConfig(length=length)
    u = learned.holdout_uncertainty[KINDS.index(imagine.uncertainty)]
    threshold = kappa(u, t.episode[log.holdout_steps], length=length, survival=config.survival)
    planner = PlannerConfig(candidates=48, horizon=5, noise_std=0.4)
    out = []
    for replay in (True, False):
        segments = imagine_shard(
            spec, log, learned.world_model, learned.values, planner, imagine, seed=0, device="cpu", replay=replay
        )
        out.append(
            accept(
                segments, config, threshold=threshold, discount=log.discount, value_std=learned.value_std,
                ranges=log.step_ranges,
            )
        )
    return out[0], out[1]


def test_the_actions_of_the_log_offered_as_imagination_are_almost_never_accepted():
    replayed, _ = on_the_pendulum()
    assert len(replayed.accepted) >= 100
    assert (replayed.length >= 3).mean() > 0.3  # they are not refused for uncertainty alone
    assert replayed.accepted.mean() < 0.05


def test_plans_are_accepted_far_more_often_than_the_actions_of_the_log():
    replayed, planned = on_the_pendulum()
    assert planned.accepted.mean() > max(0.1, 3.0 * replayed.accepted.mean())


def test_a_replay_is_worth_what_the_log_is_worth():
    # The model is good: over the same steps I and B differ by much less than plans gain.
    replayed, planned = on_the_pendulum()
    kept = replayed.length >= 3
    error = np.abs(replayed.imagined - replayed.own)[kept].mean()
    gain = (planned.imagined - planned.own)[planned.accepted].mean()
    assert error < 0.25 * gain
